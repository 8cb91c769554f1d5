"""Paths to the leaves of a model, as text."""

from collections.abc import Sequence

import jax


def path_name(path: tuple) -> str:
    """Returns a path into a tree as text: `decoder.layers.0.self_attention.wq`.

    A part that is patched has the path that it has without the patch.
    """
    path = tuple(key for key in path if getattr(key, "name", None) != "unpatched")
    return jax.tree_util.keystr(path, simple=True, separator=".")


def some_of(paths: Sequence[str]) -> str:
    """Returns up to eight of some paths, spread over all of them, as text for an error.

    Example:
        >>> some_of(["a", "b"])
        'a, b'
    """
    return ", ".join(paths[:: len(paths) // 8 + 1])
