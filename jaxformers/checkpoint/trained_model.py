"""The model in the state of a training, whose description is saved beside the state."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxformers.checkpoint.construction import Decoder, Encoder, kind_of
from jaxformers.checkpoint.training_state import named_leaves
from jaxformers.files.json_file import parse_json
from jaxformers.optim.averaged import AveragedState, kept_average
from jaxformers.optim.leafwise import State
from jaxformers.optim.optimizer import Optimizer
from jaxformers.paths import path_name
from jaxformers.sharding.rules import Places

_HOW = (
    "Build the model, the optimizer and the key as that training did. For what fit saved, pass "
    "them to fit with the same checkpoint= and steps= as many as were made: it returns the state "
    "without another step. A state of your own is filled in by restore(like) of its checkpoints."
)


def describe_model(training: PyTree) -> str:
    """Returns a text that describes the model in the state of a training.

    It refers to arrays by their paths in the state. If the model cannot be described, the text
    holds the reason, and the state can still be saved.
    """
    encoder = Encoder()
    for path, x in named_leaves(training).items():
        if hasattr(x, "dtype"):
            encoder.found[id(x)] = x, {"array": path, "as": kind_of(x)}
    model = _model_of(training)
    try:
        if model is None:
            raise ValueError("nothing in it is called model.")
        average = kept_average(training, model)
        described = {"model": encoder.encode(model), "average": encoder.encode(average)}
        if encoder.arrays:
            raise ValueError(f"{', '.join(encoder.arrays)} are arrays in static fields.")
        text = json.dumps(described, separators=(",", ":"))
        parse_json(text.encode(), "it")  # raises now what reading would raise
    except Exception as error:  # no error of the description may end a training
        return json.dumps({"reason": str(error)})
    return text


def _model_of(training: PyTree) -> Any:
    """Returns the part called `model`, the first module of a tuple, or the whole module."""
    if isinstance(training, Mapping):
        return training.get("model")
    if hasattr(training, "model"):
        return training.model
    if isinstance(training, tuple | list):
        modules = (x for x in training if isinstance(x, eqx.Module))
        states = State, AveragedState, Optimizer
        return next((x for x in modules if not isinstance(x, states)), None)
    return training if isinstance(training, eqx.Module) else None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An array of a model that is not yet read from its file.

    Arguments:
        path: its path in the state.
        kind: the kind of array to build: "jax", "numpy", "scalar" or "key <implementation>".
        dtype: the dtype of the array. None is the dtype in the file.
    """

    path: str
    kind: str
    dtype: Any = None


def build_model(
    text: str | None,
    known: Iterable[Any],
    averaged: bool,
    dtype_of: Callable[[str], Any],
    fetch: Callable[[Mapping[str, Wanted], Any], Mapping[str, Any]],
) -> Any:
    """Returns the model that a text of `describe_model` describes.

    Arguments:
        text: the description. None if the checkpoint is from a version without descriptions.
        known, averaged: the arguments of `load`.
        dtype_of: function from the path of an array in the state to its dtype.
        fetch: function from the wanted arrays, by their path in the model, and the model with them
            in place of its arrays, to the arrays.

    Raises:
        ValueError: if the model is not described, or names an unknown object.
    """
    described = {} if text is None else parse_json(text.encode(), "how its model is built")
    if described.keys() != {"model", "average"}:
        reason = described.get("reason", "an earlier version wrote it, which did not keep that.")
        raise ValueError(
            f"this state of a training does not say how its model is built: {reason}{_HOW}"
        )
    cache: dict[tuple[str, str], Wanted] = {}
    decoder = Decoder(lambda path, kind: cache.setdefault((path, kind), Wanted(path, kind)), known)
    model = decoder.decode(described["model"])
    average = decoder.decode(described["average"]) if averaged else None
    if average is not None:
        model = jax.tree.map(partial(_averaged, dtype_of), model, average)
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    wanted = {path_name(keys): x for keys, x in leaves if isinstance(x, Wanted)}
    first = {x: path for path, x in reversed(wanted.items())}  # each array is fetched once
    found = fetch({path: x for x, path in first.items()}, model)
    made = [found[first[x]] if isinstance(x, Wanted) else x for _, x in leaves]
    return jax.tree.unflatten(structure, made)


def placer(sharding: Any, model: Any, shape_of: Callable[[Wanted], Any]) -> Any:
    """Returns `sharding=` of `load` as it is, and for a mesh the function that lays out the model.

    Arguments:
        sharding: what was passed.
        model: the model with `Wanted` in place of its arrays.
        shape_of: function to an object with the shape and dtype of an array.
    """
    if not isinstance(sharding, Mesh):
        return sharding

    def outline(x: Any) -> Any:
        if not isinstance(x, Wanted):
            return x
        found = shape_of(x)
        return jax.ShapeDtypeStruct(found.shape, found.dtype)

    return Places(jax.tree.map(outline, model), sharding)


def _averaged(dtype_of: Callable[[str], Any], x: Any, mean: Any) -> Any:
    """Returns the average of an array, in the dtype of the array; `x` if it has no average."""
    if not (isinstance(x, Wanted) and isinstance(mean, Wanted)):
        return x
    same = dtype_of(x.path) == dtype_of(mean.path)
    return mean if same else dataclasses.replace(mean, dtype=dtype_of(x.path))
