"""The model of a training in checkpoints of orbax."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.checkpoint.orbax_directory import (
    OrbaxCheckpoints,
    has_numbers,
    is_key,
    shape_of,
    target,
)
from jaxformers.checkpoint.trained_model import Wanted, build_model, placer
from jaxformers.placement import place_of, put


def has_orbax_checkpoints(directory: Path) -> bool:
    """Returns whether a local directory has checkpoints of `OrbaxCheckpoints`."""
    return any(
        path.name.isdigit() and (path / "rest").is_dir() and (path / "arrays").is_dir()
        for path in directory.iterdir()
    )


def read_orbax_model(
    directory: str | os.PathLike, known: Iterable[Any], sharding: Any, averaged: bool
) -> Any:
    """Returns the model of the newest readable state; its arguments are those of `load`.

    It reads only the arrays of the model. Each host reads its part of them.
    """
    checkpoints = OrbaxCheckpoints(directory)
    steps = checkpoints.steps()
    for step in reversed(steps):
        rest = checkpoints.read(step, "rest", checkpoints.orbax.args.JsonRestore())
        if rest is None:
            continue
        saved = _Saved(checkpoints, step, rest["described"], sharding)
        try:
            return build_model(rest.get("model"), known, averaged, saved.dtype_of, saved.fetch)
        except _UnreadableError:
            continue
        except ValueError as error:
            raise ValueError(f"step {step} in {directory}: {error}") from error
    found = f"the steps {', '.join(map(str, steps))}, and none can be read" if steps else "no steps"
    raise ValueError(f"{directory} has checkpoints of {found}.")


class _UnreadableError(Exception):
    """The error for damaged arrays of a step, after a warning that describes the damage."""


class _Saved:
    """A state of a training: the description of its model, and its arrays on request."""

    def __init__(
        self, checkpoints: OrbaxCheckpoints, step: int, described: dict[str, str], sharding: Any
    ):
        self._checkpoints, self._step, self._sharding = checkpoints, step, sharding
        self._described = described

    def dtype_of(self, path: str) -> Any:
        return shape_of(self._described[path]).dtype

    def fetch(self, wanted: Mapping[str, Wanted], model: Any) -> dict[str, Any]:
        """Returns the arrays by their path in the model."""
        self._sharding = placer(self._sharding, model, self._shape)
        shapes = {name: self._shape(x) for name, x in wanted.items()}
        places = {name: self._place(name, x, shapes[name]) for name, x in wanted.items()}
        targets = {
            x.path: _target(shapes[name], places[name])
            for name, x in wanted.items()
            if has_numbers(shapes[name])
        }
        ocp = self._checkpoints.orbax
        arguments = ocp.args.PyTreeRestore(
            targets,
            restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
            partial_restore=True,
        )
        found = self._checkpoints.read(self._step, "arrays", arguments)
        if found is None:
            raise _UnreadableError
        return {
            name: _made(name, x.kind, found.get(x.path), shapes[name], places[name])
            for name, x in wanted.items()
        }

    def _shape(self, x: Wanted) -> jax.ShapeDtypeStruct:
        shape = shape_of(self._described[x.path])
        return shape if x.dtype is None else jax.ShapeDtypeStruct(shape.shape, x.dtype)

    def _place(self, name: str, x: Wanted, shape: jax.ShapeDtypeStruct) -> Any:
        """Returns the placement of an array; NumPy arrays stay on the host."""
        return None if x.kind in ("numpy", "scalar") else place_of(name, shape, self._sharding)


def _target(shape: jax.ShapeDtypeStruct, place: Any) -> Any:
    """Returns orbax's target for an array; PRNG keys are read as numbers into NumPy."""
    if is_key(shape):
        return target(jax.eval_shape(jax.random.key_data, shape), None)
    return target(shape, place)


def _made(name: str, kind: str, found: Any, shape: jax.ShapeDtypeStruct, place: Any) -> Any:
    """Returns the array as the kind of array that was saved."""
    if found is None:
        found = np.zeros(shape.shape, shape.dtype)
    if kind in ("numpy", "scalar"):
        return found if kind == "numpy" else np.asarray(found)[()]
    if is_key(shape):
        keys = jax.random.wrap_key_data(jnp.asarray(found), impl=kind.removeprefix("key "))
        return jax.device_put(keys, place)
    return found if isinstance(found, jax.Array) else put(name, found, place)
