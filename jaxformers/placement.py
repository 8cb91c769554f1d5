"""The devices that hold an array which is read from a file."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def place_of(path: str, shape: jax.ShapeDtypeStruct, sharding: Any) -> Any:
    """Returns where an array goes: a sharding, a device, or None for the default device.

    Arguments:
        path: of the array in the model, such as "decoder.layers.0.self_attention.wq".
        shape: of the array, with its type.
        sharding: a `jax.sharding.Sharding`, a device or None for all arrays, or a function
            `(path, shape) -> Sharding`.

    Raises:
        ValueError: if it is none of these, or the axes of the array do not divide.
    """
    place = sharding
    if callable(sharding) and not isinstance(sharding, type):
        place = sharding(path, shape)
    if not isinstance(place, jax.sharding.Sharding | jax.Device | None):
        raise ValueError(
            "sharding must be a jax.sharding.Sharding, such as NamedSharding(mesh, spec), or a "
            f"function (path, shape) -> Sharding, got {place!r:.200}"
            f"{'' if place is sharding else f' from the function for {path}'}."
        )
    if isinstance(place, jax.sharding.Sharding):
        try:
            place.shard_shape(shape.shape)
        except ValueError as error:
            raise _misfit(path, shape, error) from error
    return place


def put(path: str, x: np.ndarray, sharding: Any) -> jax.Array:
    """Returns an array on its devices; arguments and errors are those of `place_of`."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    place = place_of(path, shape, sharding)
    try:
        # One tensor is copied before the next is read, so that the host never holds two.
        return jax.device_put(x, place).block_until_ready()
    except ValueError as error:
        raise _misfit(path, shape, error) from error


def put_parts(
    path: str,
    x: np.ndarray,
    dtype: Any,
    sharding: Any,
    prepare: Callable[[np.ndarray], np.ndarray],
) -> jax.Array:
    """Returns an array whose devices have each read their own part of it, and no other.

    Arguments:
        path: of the array in the model.
        x: a view of the array in its file.
        dtype: the type that `prepare` gives.
        sharding: a `NamedSharding`, or the function from path and shape to one.
        prepare: function that checks a part and casts it.
    """
    shape = jax.ShapeDtypeStruct(x.shape, dtype)
    known: dict[str, np.ndarray] = {}  # devices with the same part share it

    def read(part: Any) -> np.ndarray:
        key = repr(part)
        if key not in known:
            known[key] = prepare(np.array(x[part]))
        return known[key]

    return jax.make_array_from_callback(x.shape, place_of(path, shape, sharding), read)


def _misfit(path: str, shape: jax.ShapeDtypeStruct, error: ValueError) -> ValueError:
    return ValueError(f"{path} {shape.shape} cannot be laid out as sharding= says: {error}")
