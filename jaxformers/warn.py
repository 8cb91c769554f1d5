"""Warnings that are given once, at the line of the user's program that caused them."""

import sys
import warnings

_said: set[str] = set()
_filters: list | None = None


def warn_once(message: str) -> None:
    """Gives a `UserWarning`, unless it has been given since Python's filters were last changed.

    Code that catches warnings (`warnings.catch_warnings`, each test of pytest) has its own filters,
    and so receives every warning. Where warnings are errors, the error is raised each time.
    """
    global _filters
    if warnings.filters is not _filters:
        _said.clear()
        _filters = warnings.filters  # type: ignore[assignment]
    if message not in _said:
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        warnings.warn_explicit(
            message,
            UserWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
            module=frame.f_globals.get("__name__"),
            registry=frame.f_globals.setdefault("__warningregistry__", {}),
        )
        _said.add(message)


def _is_ours(name: str) -> bool:
    """Returns whether a module is in this package or in a library that calls its functions."""
    return name.partition(".")[0] in ("jaxformers", "jaxtyping", "equinox", "jax", "contextlib")
