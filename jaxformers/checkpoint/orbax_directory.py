"""Checkpoints of a training on several hosts, written by orbax."""

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxformers.checkpoint.migration import Match, check_removed, match
from jaxformers.checkpoint.model_file import check_path
from jaxformers.checkpoint.trained_model import describe_model
from jaxformers.checkpoint.training_state import (
    HostKey,
    Tree,
    check_alike,
    check_step,
    describe,
    named_leaves,
    replaced,
)
from jaxformers.checks import check_size


class OrbaxCheckpoints:
    """Checkpoints of arrays that are spread over several hosts, each of which writes its part.

    All hosts create such an object with one directory that all of them can access, and call the
    same methods. A checkpoint is a directory in the format of https://orbax.readthedocs.io, and
    gets its name when it is complete. The directory has no lock against a second training.
    `jaxformers.load(directory)` returns the model of the newest state.

    Arguments:
        directory: created if it does not exist.
        every: number of steps between two checkpoints of `fit`, 500.
        keep: number of checkpoints that are kept, 3.

    Raises:
        ValueError: if a number is not positive.
        OSError: if the directory cannot be written to.
        ImportError: if the `orbax-checkpoint` package is missing.

    Example:
        >>> checkpoints = OrbaxCheckpoints("gs://bucket/run")  # doctest: +SKIP
        >>> training = fit(..., checkpoint=checkpoints)  # doctest: +SKIP
    """

    directory: Any  # like a Path, also for a remote directory
    every: int
    keep: int
    orbax: Any  # the package

    def __init__(self, directory: str | os.PathLike, every: int = 500, keep: int = 3):
        check_size(every=every, keep=keep)
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise ImportError(
                "OrbaxCheckpoints needs the orbax-checkpoint package: pip install "
                "'jaxformers[orbax]'."
            ) from None
        check_path(directory)
        local = "://" not in os.fspath(directory)
        try:
            self._manager = ocp.CheckpointManager(
                os.path.abspath(directory) if local else os.fspath(directory),  # no relative paths
                options=ocp.CheckpointManagerOptions(max_to_keep=keep),
                item_names=("arrays", "rest"),
            )
        except OSError as error:
            raise OSError(
                error.errno, f"checkpoints cannot be written to {directory}: {error}"
            ) from error
        self.directory, self.every, self.keep = self._manager.directory, every, keep
        self.orbax = ocp
        self._broken: set[int] = set()  # found by restore, deleted by the next save

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints in the directory, the newest last."""
        return sorted(self._manager.all_steps())

    def save(self, training: Any, step: int) -> None:
        """Copies a state to the hosts, and starts to write it; see `Checkpoints.save`.

        An existing checkpoint of this step does not change.
        """
        failed = None
        try:
            self.wait()
        except OSError as error:
            failed = error
        for broken in [other for other in self._broken if other >= step]:
            self._manager.delete(broken)  # it occupies the name, or would count as the newest
            self._broken.discard(broken)
        steps = self.steps()
        step = check_step(step, steps, self.directory)
        if step not in steps:
            self._save(training, step)
        if failed is not None:
            raise failed

    def _save(self, training: Any, step: int) -> None:
        leaves = named_leaves(training)
        arrays = {path: _stored(x) for path, x in leaves.items() if has_numbers(x)}
        numbers = {path: x for path, x in leaves.items() if not hasattr(x, "dtype")}
        rest = {
            "numbers": numbers,
            "described": describe(leaves),
            "model": describe_model(training),
        }
        args = self.orbax.args
        self._manager.save(
            step,
            args=args.Composite(arrays=args.StandardSave(arrays), rest=args.JsonSave(rest)),
            force=True,
        )

    def wait(self) -> None:
        """Waits until the last state is written.

        Raises:
            OSError: if it could not be written. Earlier checkpoints are unchanged.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and its stores raise errors of any type
            raise OSError(
                f"a checkpoint cannot be written to {self.directory}, earlier ones are as they "
                f"were: {error}"
            ) from error

    def restore(self, like: Tree) -> tuple[Tree, int] | None:
        """Returns the newest readable state and its step; see `Checkpoints.restore`.

        Each host reads its part of the arrays, by the sharding of `like`.
        """
        self.wait()
        steps = self.steps()
        leaves = named_leaves(like)
        for step in reversed(steps):
            rest = self.read(step, "rest", self.orbax.args.JsonRestore())
            if rest is None:
                continue
            where = f"step {step} in {self.directory}"
            fit = match(rest["described"], like)
            check_alike(fit.renamed(rest["described"]) | describe(fit.added), like, where)
            arrays = self._read_arrays(step, rest["described"], fit, leaves)
            if arrays is None:
                continue
            saved = rest["numbers"] | arrays
            for path, neutral in fit.removed.items():
                check_removed(saved.get(path, neutral), neutral, f"{path} in {where}")
            found = fit.renamed(saved) | fit.added
            values = {path: _value(x, found.get(path)) for path, x in leaves.items()}
            if jax.process_count() > 1:
                multihost_utils.assert_equal(step, "hosts restored different steps")
            return replaced(like, values), step
        if steps:
            raise ValueError(
                f"{self.directory} has checkpoints of the steps {', '.join(map(str, steps))}, and "
                "none can be read. Delete them to begin anew."
            )
        return None

    def _read_arrays(
        self, step: int, described: dict[str, str], fit: Match, leaves: dict[str, Any]
    ) -> Any:
        """Returns the arrays of a checkpoint by their saved paths, sharded as in the skeleton."""
        targets = {}
        for path, text in described.items():
            like = leaves.get(fit.current.get(path, path), shape_of(text))
            if has_numbers(like):
                targets[path] = _target_like(like)
        return self.read(step, "arrays", self.orbax.args.StandardRestore(targets))

    def read(self, step: int, item: str, args: Any) -> Any:
        """Returns a part of a checkpoint; warns and returns None if it cannot be read."""
        try:
            return self._manager.restore(step, args=self.orbax.args.Composite(**{item: args}))[item]
        except Exception as error:
            self._broken.add(step)
            where = f"step {step} in {self.directory}"
            warnings.warn(f"a checkpoint is skipped: {where}: {error}", stacklevel=3)
            return None


def is_key(x: Any) -> bool:
    """Returns whether `x` is an array of PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def has_numbers(x: Any) -> bool:
    """Returns whether `x` is an array that is not empty; orbax saves no empty arrays."""
    return hasattr(x, "dtype") and x.size > 0


def shape_of(text: str) -> Any:
    """Returns the shape in a text of `describe`, such as "float32 (3, 5)"; None for numbers."""
    kind, _, shape = text.partition(" ")
    if not shape:
        return None
    sizes = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
    keys = (jax.random.key(0, impl=name).dtype for name in ("threefry2x32", "rbg", "unsafe_rbg"))
    dtype = next((key for key in keys if str(key) == kind), None)
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(kind) if dtype is None else dtype)


def _stored(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return np.array(x)  # a copy, since x may be changed in place while it is written
    return jax.random.key_data(x) if is_key(x) else x


def _value(like: Any, found: Any) -> Any:
    """Returns the value that was read for a leaf; creates empty arrays and wraps keys."""
    if not hasattr(like, "dtype"):
        return found
    if is_key(like):
        return HostKey(str(jax.random.key_impl(like)), found)
    return found if has_numbers(like) else np.zeros(like.shape, like.dtype)


def target(shape: Any, place: Any) -> Any:
    """Returns orbax's target for an array: sharded if its place is a sharding, else in NumPy."""
    if isinstance(place, jax.sharding.Sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)


def _target_like(like: Any) -> Any:
    """Returns orbax's target for an array with the placement of `like`."""
    x = like
    if is_key(like):
        real = isinstance(like, jax.Array)
        x = jax.random.key_data(like) if real else jax.eval_shape(jax.random.key_data, like)
    spread = x.committed if isinstance(x, jax.Array) else hasattr(x, "sharding")
    return target(x, x.sharding if spread else None)
