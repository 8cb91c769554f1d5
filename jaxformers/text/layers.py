"""Layers after the pooling, as files of sentence-transformers hold them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxformers import activations
from jaxformers.files.hub import TensorFiles
from jaxformers.files.json_file import read_json, shorten
from jaxformers.heads import unit_length
from jaxformers.layers import Dense
from jaxformers.norms import LayerNorm

# The classes of PyTorch, with our functions.
ACTIVATIONS: dict[str, Callable | None] = {
    "Identity": None,
    "Tanh": activations.tanh,
    "ReLU": activations.relu,
    "GELU": activations.gelu,
    "SiLU": activations.silu,
}


class ResidualDense(eqx.Module):
    """A linear map of the vector, to whose result the input is added.

    Arguments:
        dense: the map, with its activation.
        residual: a map of the input to that width; None adds the input itself.
    """

    dense: Dense
    residual: Dense | None

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        return self.dense(x) + (x if self.residual is None else self.residual(x))


def settings_of(folder: Path) -> dict[str, Any]:
    """Returns the settings of a module, which has none if there is no file of them."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def read_layer(kind: str, folder: Path) -> Callable | None:
    """Returns a layer after the pooling, in float32, or None for one that does nothing.

    Arguments:
        kind: the name of its class in sentence-transformers.
        folder: its folder.

    Raises:
        ValueError: if it is of another kind, or its files do not fit it.
    """
    readers: dict[str, Callable[[dict[str, Any], Path], Callable | None]] = {
        "Normalize": lambda settings, folder: unit_length,
        "Dropout": lambda settings, folder: None,
        "Dense": _read_dense,
        "LayerNorm": _read_norm,
    }
    if kind not in readers:
        raise ValueError(
            f"{folder} holds a {kind}, which is not handled: of the modules of "
            f"sentence-transformers, {', '.join(readers)} are, after Transformer and Pooling."
        )
    settings = settings_of(folder)
    for name in ("module_input_name", "module_output_name"):
        if (given := settings.pop(name, None)) not in (None, "sentence_embedding"):
            raise ValueError(f"{folder}: {name} must be sentence_embedding, got {shorten(given)}.")
    return readers[kind](settings, folder)


def _read_norm(settings: dict[str, Any], folder: Path) -> Callable:
    tensors = _read_tensors(folder, {"norm.weight": 1, "norm.bias": 1})
    norm = LayerNorm(len(tensors["norm.weight"]))
    return eqx.tree_at(lambda x: (x.gain, x.b), norm, tuple(tensors.values()))


def _read_dense(settings: dict[str, Any], folder: Path) -> Callable:
    known = {"in_features", "out_features", "bias", "activation_function", "use_residual"}
    if unknown := settings.keys() - known:
        raise ValueError(f"{folder} has settings that are not handled: {sorted(unknown)}.")
    named = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = named.rpartition(".")[2] if isinstance(named, str) else ""
    if name not in ACTIVATIONS or not named.startswith("torch.nn."):
        raise ValueError(
            f"{folder}: activation_function must be one of {', '.join(ACTIVATIONS)} of torch.nn, "
            f"got {shorten(named)}."
        )
    ranks = {"linear.weight": 2, "linear.bias": 1, "residual.weight": 2}
    if not settings.get("bias", True):
        del ranks["linear.bias"]
    adds = settings.get("use_residual", False)
    if not adds or settings.get("in_features") == settings.get("out_features"):
        del ranks["residual.weight"]
    tensors = _read_tensors(folder, ranks)
    bias = tensors.get("linear.bias")
    dense = _dense(tensors["linear.weight"], bias, ACTIVATIONS[name])
    if not adds:
        return dense
    residual = tensors.get("residual.weight")
    return ResidualDense(dense, None if residual is None else _dense(residual, None, None))


def _dense(w: Array, b: Array | None, activation: Callable | None) -> Dense:
    """Returns a linear map with weights of PyTorch, `(out, in)`."""
    options: dict[str, Any] = dict(use_bias=b is not None, init=lambda *_: w.T)
    dense = Dense(w.shape[1], w.shape[0], activation, **options, key=jax.random.key(0))
    return dense if b is None else eqx.tree_at(lambda x: x.b, dense, b)


def _read_tensors(folder: Path, ranks: dict[str, int]) -> dict[str, Array]:
    """Returns these tensors of a folder, which must hold no others, in float32.

    Arguments:
        folder: where they are.
        ranks: the number of axes of each.
    """
    files = TensorFiles(folder)
    found = {name: len(files.shape(name)) for name in files.names}
    if found != ranks:
        raise ValueError(
            f"{folder} must have the tensors {ranks}, by their numbers of axes, got {found}. Its "
            "config.json and its weights do not belong together."
        )
    return {name: jnp.asarray(np.asarray(files.read(name), np.float32)) for name in ranks}
