"""Scalings of rotary positions in a config.json."""

import math
from collections.abc import Mapping
from typing import Any

from jaxformers.hf.config.entries import KINDS, NAMES, Config
from jaxformers.positions.length_scaling import (
    DynamicScaling,
    LongScaling,
    long_attention_factor,
)
from jaxformers.positions.scaling import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    yarn_attention_factor,
)


def number(parameters: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Returns a number from the dictionary of a rope, or the default if it is absent.

    Raises:
        ValueError: if the value is not a positive number.
    """
    value = parameters.get(key)
    if value is None:
        return default
    if not KINDS["positive"](value):
        raise ValueError(
            f"config.json: {key} of the rope must be {NAMES['positive']}, got {value!r:.80}."
        )
    return float(value)


def _needed(parameters: Mapping[str, Any], key: str) -> float:
    value = number(parameters, key)
    if value is None:
        raise ValueError(f"config.json: the rope's scaling needs {key}, got none.")
    return value


_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {"short_factor", "long_factor", "factor", "attention_factor"},
}
_ALWAYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "finetuned"),
}


def read_scaling(
    config: Config, parameters: Mapping[str, Any], max_length: int, original_length: int | None
) -> Any:
    """Returns the scaling that a dictionary of the file describes, or None.

    Raises:
        ValueError: if the type, a key or a value is not supported.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise ValueError(
            f"config.json: the rope's type must be one of {', '.join(_KNOWN)}, got {kind!r:.80}."
        )
    unknown = {k for k, x in parameters.items() if x is not None} - _KNOWN[kind] - _ALWAYS
    if unknown:
        raise ValueError(
            f"config.json: the rope has settings that are not handled: {sorted(unknown)!s:.200}."
        )
    longest = config.get("max_position_embeddings", max_length, "size")
    own = config.get("original_max_position_embeddings", original_length, "size", optional=True)
    original = own or int(number(parameters, "original_max_position_embeddings", longest))
    if original < 1:
        raise ValueError("config.json: original_max_position_embeddings must be at least 1.")
    factor = number(parameters, "factor", longest / original)
    match kind:
        case "linear":
            return LinearScaling(_needed(parameters, "factor"))
        case "dynamic":
            return DynamicScaling(_needed(parameters, "factor"), longest)
        case "llama3":
            low, high = (_needed(parameters, f"{x}_freq_factor") for x in ("low", "high"))
            return Llama3Scaling(_needed(parameters, "factor"), low, high, original)
        case "yarn":
            return _yarn(parameters, factor, original)
        case "longrope":
            return _long(parameters, factor, original)
    return None


def _yarn(parameters: Mapping[str, Any], factor: float, original: int) -> YarnScaling:
    truncate = parameters.get("truncate")
    if truncate is not None and not isinstance(truncate, bool):
        raise ValueError(
            f"config.json: truncate of the rope must be true or false, got {truncate!r}."
        )
    mscale, all_dim = number(parameters, "mscale"), number(parameters, "mscale_all_dim")
    attention_factor = number(parameters, "attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, mscale, all_dim)
    return YarnScaling(
        factor,
        original,
        beta_fast=number(parameters, "beta_fast", 32.0),
        beta_slow=number(parameters, "beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=truncate is not False,
    )


def _long(parameters: Mapping[str, Any], factor: float, original: int) -> LongScaling:
    short, long = (_numbers(parameters, f"{length}_factor") for length in ("short", "long"))
    attention_factor = number(parameters, "attention_factor")
    if attention_factor is None:
        attention_factor = _usual_attention_factor(factor, original)
    return LongScaling(short, long, original, attention_factor)


def _usual_attention_factor(factor: float, original: int) -> float:
    return 1.0 if factor <= 1.0 else long_attention_factor(factor, original)


def _numbers(parameters: Mapping[str, Any], key: str) -> tuple[float, ...]:
    given = parameters.get(key)
    if not isinstance(given, list) or not given:
        raise ValueError(f"config.json: {key} of the rope must be a list, got {given!r:.80}.")
    return tuple(_needed({key: x}, key) for x in given)


def write_scaling(scaling: Any) -> dict[str, Any]:
    """Returns the dictionary that describes a scaling."""
    original = {"original_max_position_embeddings": getattr(scaling, "original_length", None)}
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                **original,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
                **original,
            }
        case LongScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "attention_factor": scaling.attention_factor,
                **original,
            }
    raise ValueError(f"the scaling {scaling!r} has no name in checkpoints.")


def write_lengths(scaling: Any, config: dict[str, Any], max_length: int | None) -> None:
    """Writes the lengths of training sequences, which a file has beside a scaling.

    Arguments:
        scaling: the scaling of all layers, or None.
        config: the entries, which are changed in place.
        max_length: the length of the longest sequence in training if the file names none; None in
            families without the keys of Phi-3, see `write_older_scaling`.
    """
    config.pop("original_max_position_embeddings", None)
    if isinstance(scaling, DynamicScaling):
        config["max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, LongScaling):
        # Version 4 of transformers reads the length only there.
        config["original_max_position_embeddings"] = scaling.original_length
        if max_length is not None and config.get("max_position_embeddings") is None:
            config["max_position_embeddings"] = _length_of(scaling)


def _length_of(scaling: LongScaling) -> int:
    """Returns the training length for which the factor on the scores is the default."""
    original = scaling.original_length
    exponent = max(0.0, scaling.attention_factor**2 - 1) * math.log(original)
    return original if exponent > 20 else round(original * math.exp(exponent))


def write_older_scaling(
    scaling: Any, config: Mapping[str, Any], max_length: int | None
) -> dict[str, Any]:
    """Returns the dictionary for version 4 of transformers, which allows three keys in Phi-3.

    The factor on the scores then follows from the lengths. Version 4 cannot express another factor.
    For another factor, all keys are written.
    """
    if max_length is not None and isinstance(scaling, LongScaling):
        original = scaling.original_length
        longest = config.get("max_position_embeddings") or max_length
        if scaling.attention_factor == _usual_attention_factor(longest / original, original):
            short, long = list(scaling.short_factors), list(scaling.long_factors)
            return {"type": "longrope", "short_factor": short, "long_factor": long}
    return write_scaling(scaling)
