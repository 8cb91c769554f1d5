"""The function that loads a model from its file or from the checkpoints of a training."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh, Sharding

from jaxformers.checkpoint.construction import Decoder
from jaxformers.checkpoint.directory import leaves_of, step_path, steps_in
from jaxformers.checkpoint.model_file import check_path, read_array, read_description, read_object
from jaxformers.checkpoint.orbax_model import has_orbax_checkpoints, read_orbax_model
from jaxformers.checkpoint.trained_model import Wanted, build_model, placer
from jaxformers.checkpoint.training_state import HostKey
from jaxformers.checks import check_flag
from jaxformers.files.found import describe_untrained
from jaxformers.files.json_file import shorten
from jaxformers.files.safetensors_file import Stored


def load(
    path: str | os.PathLike,
    *,
    known: Iterable[Any] = (),
    sharding: Mesh | Sharding | Callable | None = None,
    averaged: bool = True,
) -> Any:
    """Returns the model in a file of `save`, or the newest model of a training.

    A file may name classes and functions of jaxformers, `equinox.nn` and `jax.nn`, and the
    elementwise functions of `jax.numpy`. Pass all others as `known`. `load` imports nothing, so
    that a file from an unknown author can be loaded.

    A directory of `Checkpoints` or `OrbaxCheckpoints` gives the model of its newest complete state.
    The training may still run. For `fit` it is the model that it trains. For a state of your own it
    is the part called `model`, or the first module of a tuple.

    Arguments:
        path: the file, or the directory.
        known: further classes and functions that the file may name, such as
            `[MyNorm, my_activation]`.
        sharding: placement of JAX arrays: a mesh of `jaxformers.sharding.make_mesh`, on which they
            lie as `layout` says; a `jax.sharding.Sharding` for all; or a function
            `(path, jax.ShapeDtypeStruct) -> Sharding` with paths such as
            "decoder.layers.0.self_attention.wq". None is the default device.
        averaged: which weights to load if the optimizer of a training keeps an average of them
            (`Averaged`). True, the default, loads the average, which `fit` evaluates. False loads
            the trained weights.

    Raises:
        ValueError: if the file does not exist, is damaged, names an unknown object, or has fields
            of another version. For a directory: if it has no checkpoints, or if they do not
            describe the model.
        ImportError: if the `safetensors` package is missing.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/norms.safetensors"
        >>> save(path, {"first": LayerNorm(16), "second": RMSNorm(16, eps=1e-5)})
        >>> load(path)["second"].eps
        1e-05
    """
    place, options = check_path(path), (list(known), sharding, averaged)
    check_flag(averaged=averaged)
    if "://" in os.fspath(path):
        return read_orbax_model(os.fspath(path), *options)
    if place.is_dir():
        return _from_directory(place, *options)
    found = read_object(place, known, sharding)
    if isinstance(found, dict) and found.keys() == {"step", "leaves"}:
        raise ValueError(
            f"{place} is a state of a training. load({str(place.parent)!r}) gives the model of the "
            "newest one; Checkpoints(directory).restore(like), or fit, goes on with it."
        )
    if not averaged:
        raise ValueError(f"averaged=False is for the directory of a training, {place} is a file.")
    return found


def _from_directory(directory: Path, known: list, sharding: Any, averaged: bool) -> Any:
    """Returns the model of the newest complete state in a directory."""
    steps = steps_in(directory)
    for step in reversed(steps):
        path = step_path(directory, step)
        try:
            saved = _Saved(path, step, sharding)
        except (OSError, ValueError) as error:
            if not path.exists():  # the training has replaced it by a newer one
                return _from_directory(directory, known, sharding, averaged)
            warnings.warn(f"a checkpoint is skipped: {error}", stacklevel=3)
            continue
        try:
            return build_model(saved.model, known, averaged, saved.dtype_of, saved.fetch)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if steps:
        raise ValueError(
            f"{directory} has checkpoints of the steps {', '.join(map(str, steps))}, and all are "
            "damaged."
        )
    if has_orbax_checkpoints(directory):
        return read_orbax_model(directory, known, sharding, averaged)
    raise ValueError(describe_untrained(directory))


class _Saved:
    """A state of a training in a file: the description of its model, and its arrays on request."""

    def __init__(self, path: Path, step: int, sharding: Any):
        tensors, described, self.model = read_description(path)

        def find(name: str, kind: str) -> Stored:
            if name not in tensors:
                raise ValueError(f"{path}: the tensor {shorten(name)} is missing")
            return tensors[name]

        self._leaves = leaves_of(path, Decoder(find).decode(described), step)
        self._sharding = sharding

    def dtype_of(self, path: str) -> Any:
        return self._find(path).dtype

    def fetch(self, wanted: Mapping[str, Wanted], model: Any) -> dict[str, Any]:
        """Returns the arrays by their path in the model."""
        sharding = placer(self._sharding, model, lambda x: self._find(x.path))
        return {
            name: read_array(name, self._find(x.path), x.kind, sharding, x.dtype)
            for name, x in wanted.items()
        }

    def _find(self, path: str) -> Stored:
        leaf = self._leaves.get(path)
        leaf = leaf.data if isinstance(leaf, HostKey) else leaf
        if not isinstance(leaf, Stored):
            raise ValueError(f"the array {shorten(path)} of its model is missing")
        return leaf
