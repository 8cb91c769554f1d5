"""Writes what makes vectors of hidden states as sentence-transformers reads it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array

from jaxformers.files.atomic import replace_json
from jaxformers.files.hub import write_tensors
from jaxformers.heads import unit_length
from jaxformers.layers import Dense, Function
from jaxformers.norms import LayerNorm
from jaxformers.text.layers import ACTIVATIONS, ResidualDense
from jaxformers.text.sentence_transformers import (
    MODULES,
    OLDER_POOLINGS,
    POOLINGS,
    READING,
    SETTINGS,
    Described,
)

CLASS = "sentence_transformers.models"


def write_description(described: Described, width: int) -> None:
    """Writes the files of sentence-transformers beside a checkpoint.

    Arguments:
        described: what they say; its directory has the checkpoint.
        width: of the hidden states.

    Raises:
        ValueError: if a layer is none of sentence-transformers.
    """
    directory, names = described.transformer, described.pooling or ("mean",)
    layers = [_layer(layer) for layer in described.layers]
    kinds = ["Transformer", "Pooling", *(kind for kind, _, _ in layers)]
    folders = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    theirs = {ours: name for name, ours in POOLINGS.items()}
    modes = [theirs[name] for name in names]
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    if modes == [mode for mode in OLDER_POOLINGS.values() if mode in modes]:
        pooling |= {flag: mode in modes for flag, mode in OLDER_POOLINGS.items()}
    else:  # only the newer spelling has an order
        pooling["pooling_mode"] = modes
    pooling["include_prompt"] = described.include_prompt
    for folder, (_, settings, tensors) in zip(
        folders[1:], [("Pooling", pooling, {}), *layers], strict=True
    ):
        (directory / folder).mkdir(exist_ok=True)
        replace_json(directory / folder / "config.json", settings)
        if tensors:
            made = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()]
            write_tensors(directory / folder, made)
    lower, longest = described.do_lower_case, described.max_seq_length
    reading = {"max_seq_length": longest, "do_lower_case": lower}
    replace_json(directory / READING[0], reading)
    replace_json(directory / SETTINGS, _settings(described))
    listed = [
        {"idx": i, "name": str(i), "path": folder, "type": f"{CLASS}.{kind}"}
        for i, (kind, folder) in enumerate(zip(kinds, folders, strict=True))
    ]
    (directory / MODULES).write_text(json.dumps(listed, indent=2) + "\n")


def _settings(described: Described) -> dict[str, Any]:
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": dict(described.prompts),
        "default_prompt_name": described.default_prompt,
        "similarity_fn_name": described.similarity,
    }
    dim = described.truncate_dim
    return settings if dim is None else settings | {"truncate_dim": dim}


def _layer(layer: Callable) -> tuple[str, dict[str, Any], dict[str, Array]]:
    """Returns the class of a layer in sentence-transformers, its settings and its tensors."""
    function = layer.function if isinstance(layer, Function) else layer
    if function is unit_length:
        return "Normalize", {}, {}
    if isinstance(layer, LayerNorm) and (layer.eps, layer.gain_offset) == (1e-5, 0.0):
        if layer.gain is not None and layer.b is not None:
            tensors = {"norm.weight": layer.gain, "norm.bias": layer.b}
            return "LayerNorm", {"dimension": len(layer.gain)}, tensors
    if isinstance(layer, Dense):
        return "Dense", *_dense(layer)
    if isinstance(layer, ResidualDense):
        settings, tensors = _dense(layer.dense)
        if layer.residual is not None:
            tensors["residual.weight"] = _dense(layer.residual)[1]["linear.weight"]
        return "Dense", settings | {"use_residual": True}, tensors
    raise ValueError(
        f"the layer {layer!r:.80} has no module in sentence-transformers: Dense without a norm, "
        "LayerNorm and unit_length have."
    )


def _dense(layer: Dense) -> tuple[dict[str, Any], dict[str, Array]]:
    function = getattr(layer.activation, "function", layer.activation)
    names: Sequence[str] = [name for name, ours in ACTIVATIONS.items() if ours is function]
    if not names or layer.norm is not None:
        raise ValueError(
            f"a Dense of sentence-transformers has one of the activations {', '.join(ACTIVATIONS)} "
            f"and no norm, got {layer.activation!r:.80}. Build it from jaxformers.activations."
        )
    [name] = names
    place = "linear" if name == "Identity" else "activation"
    tensors = {"linear.weight": layer.w.T}
    if layer.b is not None:
        tensors["linear.bias"] = layer.b
    settings = {
        "in_features": layer.w.shape[0],
        "out_features": layer.w.shape[1],
        "bias": layer.b is not None,
        "activation_function": f"torch.nn.modules.{place}.{name}",
    }
    return settings, tensors
