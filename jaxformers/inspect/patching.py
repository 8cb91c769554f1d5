"""Models some of whose values are replaced."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxformers.inspect.names import as_paths, check_reached
from jaxformers.inspect.tracing import body_of, record
from jaxformers.sites import Turn, Watched, can_match, paths_of, unwatched, watched

Model = TypeVar("Model", bound=eqx.Module)


def patch(model: Model, sites: Mapping[str, Any]) -> Model:
    """Returns the model with other values at some of its sites.

    The result is a model of the same class: it decodes with `generate`, has gradients, and can be
    compiled, scanned, rematerialized, traced and patched again. With a cache, a site has the values
    of the new tokens alone.

    Arguments:
        model: a model.
        sites: for paths or patterns, as of `trace`, what takes the place of the value: a function
            of it that returns one of the same shape, or an array that broadcasts to its shape, or a
            number. Arrays, also those in modules that are such functions, are part of the model.
            Of several for one site the first comes first.

    Raises:
        ValueError: if there is no such site, or, when the model is called, if what is to take the
            place of a value has another shape.

    Example:
        >>> path = "decoder.layers.0.self_attention.head_outputs"
        >>> without_head = patch(model, {path: lambda x: x.at[:, 0].set(0)})
        >>> without_head.generate(tokens, 3).shape
        (1, 7)
    """
    if not isinstance(sites, Mapping):
        raise ValueError(f"sites must be a dict of paths and values, got {sites!r:.200}.")
    paths = as_paths(tuple(sites), model)
    reached = _paths_in(model)
    check_reached(paths, reached)
    parts: dict[str, list[Patch]] = {}  # each part of the model gets what concerns it alone
    for pattern, value in zip(paths, sites.values(), strict=True):
        for name in {path.partition(".")[0] for path in reached if fnmatchcase(path, pattern)}:
            parts.setdefault(name, []).append(Patch(pattern, value))
    for name in parts:
        if not isinstance(getattr(model, name, None), eqx.Module):
            raise ValueError(
                f"a site is in a part of a model, such as 'decoder', got one at {name!r}, which is "
                f"no module in a {type(model).__name__}. Call the part that has the site in "
                "`with scope(name)` of jaxformers.sites, by the name of its field."
            )
    return eqx.tree_at(
        lambda model: [getattr(model, name) for name in parts],
        model,
        [Patched(getattr(model, name), Patches(tuple(found))) for name, found in parts.items()],
    )


class Patch(eqx.Module):
    """What takes the place of the values at the paths that match a pattern."""

    pattern: str = eqx.field(static=True)
    value: Any

    def __call__(self, path: str, x: Array) -> Array:
        """Returns what takes the place of `x`."""
        if not callable(self.value):
            value = _as_numbers(path, self.value)
            try:
                return jnp.broadcast_to(value, x.shape).astype(x.dtype)
            except ValueError as error:
                raise _misfit(path, x, value) from error
        value = self.value(x)
        if value is x:
            return x
        value = _as_numbers(path, value)
        if value.shape != x.shape:
            raise _misfit(path, x, value)
        return value.astype(x.dtype)


class Patches(eqx.Module):
    """A watcher that replaces values."""

    patches: tuple[Patch, ...]

    def see(self, path: str, turn: Turn | None, x: Array) -> Array:
        for patch in self.patches:
            x = _replaced(patch, path, turn, x)
        return x

    def asks(self, name: str) -> bool:
        return can_match(name, [patch.pattern for patch in self.patches])


class Patched(eqx.Module, Watched):
    """A part of a model with other values at some of its sites; in all else it is that part."""

    unpatched: Any
    patches: Patches

    def __call__(self, *args: Any, **options: Any) -> Any:
        with watched(self.patches):
            return self.unpatched(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("unpatched", "patches"):
            raise AttributeError(name)
        found = getattr(self.unpatched, name)
        if not callable(found) or not hasattr(found, "__self__"):
            return found

        @wraps(found)
        def method(*args: Any, **options: Any) -> Any:
            with watched(self.patches):
                result = found(*args, **options)
            return Patched(result, self.patches) if type(result) is type(self.unpatched) else result

        return method


def _replaced(patch: Patch, path: str, turn: Turn | None, x: Array) -> Array:
    """Returns what takes the place of a value, in a scan only in the layers that are meant."""
    meant = [fnmatchcase(one, patch.pattern) for one in paths_of(path, turn)]
    if not any(meant):
        return x
    new = patch(path, x)
    if turn is None or all(meant) or new is x:
        return new
    return lax.cond(jnp.asarray(meant)[turn.layer], lambda x: patch(path, x), lambda x: x, x)


def _as_numbers(path: str, value: Any) -> Array:
    """Returns what takes the place of a value as an array, or raises if it is no real numbers."""
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError):
        value = None
    if value is None or jnp.iscomplexobj(value):
        raise ValueError(
            f"what takes the place of {path} must be an array or a number, or a function that "
            "returns an array, and not None, text or complex numbers."
        )
    return value


def _misfit(path: str, x: Array, value: Array) -> ValueError:
    return ValueError(
        f"what takes the place of {path} must have its shape {x.shape}, got {value.shape}."
    )


def _paths_in(model: Any) -> tuple[str, ...]:
    """Returns the paths of all sites of a model, found by tracing it with a few tokens."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    args: tuple[Any, ...] = (tokens, tokens) if hasattr(model, "tgt_embedding") else (tokens,)
    with unwatched():  # whoever watches this call shall not see the tokens of this one
        return eqx.filter_eval_shape(record, body_of(model), ("*",), args, {})[1]
