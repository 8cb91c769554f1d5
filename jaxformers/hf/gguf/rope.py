"""The scalings of rotary positions in a GGUF file, in the words of a config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxformers.hf.gguf.metadata import Metadata, shortest

# The factors of Llama 3 and its successors, from which the others of their config.json follow.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL_LENGTH = 8192

DIVISORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def scaling(metadata: Metadata, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Returns the entries about a scaling, none if there is no scaling.

    Raises:
        ValueError: if the file has a scaling that is not handled.
    """
    metadata.only("rope.scaling.yarn_ext_factor", 1.0)
    metadata.only("rope.scaling.yarn_attn_factor", 1.0)
    metadata.used.add(f"{metadata.architecture}.rope.scaling.finetuned")
    older = metadata.number("rope.scale_linear")
    kind = metadata.text("rope.scaling.type", "none" if older is None else "linear")
    factor = metadata.number("rope.scaling.factor", older)
    original = metadata.number("rope.scaling.original_context_length")
    tensors = metadata.file.tensors
    if LONG in tensors and SHORT in tensors:
        return _long(metadata, original)
    metadata.only("rope.scaling.attn_factor", 1.0)
    if DIVISORS in tensors:
        return {"rope_scaling": _divided(metadata, config, head_dim, original)}
    if kind == "none":
        return {}
    parameters = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        betas = {x: metadata.number(f"rope.scaling.yarn_{x}") for x in ("beta_fast", "beta_slow")}
        parameters |= {"original_max_position_embeddings": original, **betas}
    elif kind != "linear":
        raise metadata.error("rope.scaling.type", "must be none, linear or yarn", repr(kind))
    return {"rope_scaling": {key: x for key, x in parameters.items() if x is not None}}


def _long(metadata: Metadata, original: Any) -> dict[str, Any]:
    """Returns the entries of Phi-3's two lists of divisors."""
    metadata.only("rope.scaling.type", "longrope", "none")
    short, long = (_values(metadata, name) for name in (SHORT, LONG))
    parameters = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    factor = metadata.number("rope.scaling.attn_factor")
    if factor is not None:
        parameters["attention_factor"] = factor
    entries: dict[str, Any] = {"rope_scaling": parameters}
    if original is not None:
        entries["original_max_position_embeddings"] = original
    return entries


def _divided(
    metadata: Metadata, config: Mapping[str, Any], head_dim: int, original: Any
) -> dict[str, Any]:
    """Returns the scaling that divides frequencies by a tensor of the file.

    The tensor is made by Llama 3's formula, whose numbers the file has no keys for. They are those
    of the published models, or else the divisors themselves are the scaling.
    """
    divisors = np.array(_values(metadata, DIVISORS))
    for length in (original, ORIGINAL_LENGTH):
        if isinstance(length, int) and length > 0 and len(divisors) == head_dim // 2:
            factor = shortest(float(divisors[-1]))
            usual = _llama3_divisors(config["rope_theta"], head_dim, factor, length)
            if np.allclose(divisors, usual, rtol=1e-5, atol=0):
                lengths = {"original_max_position_embeddings": length}
                return {"rope_type": "llama3", "factor": factor, **LLAMA3, **lengths}
    return {
        "rope_type": "longrope",
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "attention_factor": 1.0,
    }


def _llama3_divisors(theta: float, head_dim: int, factor: float, length: int) -> np.ndarray:
    """Returns what the scaling of Llama 3 divides frequencies by (Grattafiori et al. 2024)."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3.values()
    share = np.clip((length / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


def _values(metadata: Metadata, name: str) -> list[float]:
    tensor = metadata.file.tensors[name]
    if len(tensor.shape) != 1 or tensor.shape[0] > 2**16 or tensor.packed:
        raise ValueError(f"{tensor.path}: {name} must be a list of divisors, got {tensor.shape}.")
    return [shortest(x) for x in tensor.read().astype(float).tolist()]
