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
from jaxformers.sites import Turn, Watched, paths_of, watched

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
    patches = Patches(tuple(map(Patch, paths, sites.values())))
    parts = {path.partition(".")[0] for path in reached if patches.concerns(path)}
    parts = {name for name in parts if isinstance(getattr(model, name, None), eqx.Module)}
    return eqx.tree_at(
        lambda model: [getattr(model, name) for name in sorted(parts)],
        model,
        [Patched(getattr(model, name), patches) for name in sorted(parts)],
    )


class Patch(eqx.Module):
    """What takes the place of the values at the paths that match a pattern."""

    pattern: str = eqx.field(static=True)
    value: Any

    def __call__(self, path: str, x: Array) -> Array:
        """Returns what takes the place of `x`."""
        if not callable(self.value):
            value = jnp.asarray(self.value)
            try:
                return jnp.broadcast_to(value, x.shape).astype(x.dtype)
            except ValueError as error:
                raise _misfit(path, x, value) from error
        value = self.value(x)
        if value is x:
            return x
        value = jnp.asarray(value)
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
        return any(fnmatchcase(name, x.pattern.rpartition(".")[2]) for x in self.patches)

    def concerns(self, path: str) -> bool:
        """Returns whether a value at this path is replaced."""
        return any(fnmatchcase(path, patch.pattern) for patch in self.patches)


class Patched(eqx.Module, Watched):
    """A part of a model with other values at some of its sites; in all else it is that part."""

    part: Any
    patches: Patches

    def __call__(self, *args: Any, **options: Any) -> Any:
        with watched(self.patches):
            return self.part(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("part", "patches"):
            raise AttributeError(name)
        found = getattr(self.part, name)
        if not callable(found) or not hasattr(found, "__self__"):
            return found

        @wraps(found)
        def method(*args: Any, **options: Any) -> Any:
            with watched(self.patches):
                result = found(*args, **options)
            return Patched(result, self.patches) if type(result) is type(self.part) else result

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


def _misfit(path: str, x: Array, value: Array) -> ValueError:
    return ValueError(
        f"what takes the place of {path} must have its shape {x.shape}, got {value.shape}."
    )


def _paths_in(model: Any) -> tuple[str, ...]:
    """Returns the paths of all sites of a model, found by tracing it with a few tokens."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    args: tuple[Any, ...] = (tokens, tokens) if hasattr(model, "tgt_embedding") else (tokens,)
    return eqx.filter_eval_shape(record, body_of(model), ("*",), args, {})[1]
