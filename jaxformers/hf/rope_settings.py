"""Rotary positions and windows in a config.json: three spellings, and patterns over the layers.

Files of transformers 4 say `rope_theta` and `rope_scaling`; those of 5 `rope_parameters`, either
once or for each type of layer. We read all three and write the first, which both versions read.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture import Architecture, Rope
from jaxformers.hf.settings import Config
from jaxformers.rotary_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    YarnScaling,
)

FULL, SLIDING = "full_attention", "sliding_attention"


class Windows(NamedTuple):
    """Which layers see a window only.

    Arguments:
        default: the window where the file names none.
        pattern: layers that slide if the file does not list their types: "all"; "last" ones, from
            `max_window_layers` on; "every", all but each n-th; "first", all but the first of n.
        every: that n, or its default where `every_key` names it in the file.
        enabled_key: a switch that must be on, off by default.
        key, every_key: what the file calls them.
        typed: whether the file may list the types of layers.
    """

    default: int | None
    pattern: str = "all"
    every: int = 1
    enabled_key: str | None = None
    key: str = "sliding_window"
    every_key: str | None = None
    typed: bool = True
    both_sides: bool = False  # the window counts both sides of a token, and half of it is kept

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        window = config.get(self.key, self.default, "size", optional=True)
        enabled = self.enabled_key is None or config.get(self.enabled_key, False, "flag")
        window = window if enabled else None
        if window is not None and self.both_sides:
            window = window // 2 + 1
        types = self._types(config, fields["num_layers"], window is not None)
        fields["_types"] = types
        fields["window"] = tuple(window if kind == SLIDING else None for kind in types)

    def _types(self, config: Config, layers: int, slides: bool) -> list[str]:
        every = self.every
        if self.every_key is not None:
            every = config.get(self.every_key, self.every, "size")
        start = config.get("max_window_layers", 28, "count") if self.pattern == "last" else 0
        given = config.get("layer_types", None, "list", optional=True) if self.typed else None
        if given is not None:
            if len(given) != layers or any(kind not in (FULL, SLIDING) for kind in given):
                raise ValueError(
                    f"config.json: layer_types must name {FULL!r} or {SLIDING!r} for each of the "
                    f"{layers} layers, got {given!r:.120}."
                )
            return given
        sliding = {
            "all": lambda i: slides,
            "last": lambda i: slides and i >= start,
            "every": lambda i: (i + 1) % every != 0,
            "first": lambda i: i % every != 0,
            "none": lambda i: False,
        }[self.pattern]
        return [SLIDING if sliding(i) else FULL for i in range(layers)]

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        windows = [a.layer("window", i) for i in range(a.num_layers)]
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"layers have windows of different size, {sorted(sizes)}.")
        window = next(iter(sizes), None)
        if window is not None and self.both_sides:
            window = (window - 1) * 2
        if window is None and self.pattern in ("every", "first"):
            window = self.default  # their types say that it does not matter
        config[self.key] = window
        if self.enabled_key is not None:
            config[self.enabled_key] = bool(sizes)
        if self.typed:
            config["layer_types"] = [FULL if size is None else SLIDING for size in windows]


class Rotary(NamedTuple):
    """The rotary positions of all layers.

    Arguments:
        theta: the base where the file names none.
        interleaved: whether pairs of features lie beside each other.
        partial: the share of a head's features that turn, where the file names none.
        partial_key, theta_key: what the file calls them outside of the dictionaries; without a
            `partial_key` all features turn.
        sliding_theta, sliding_theta_key: the same for layers that slide, where those differ.
        unscaled_sliding: whether layers that slide are left out of the scaling.
        without: layers without rotary positions: FULL, or a key that lists 1 for those with.
        dim_key: a key that gives the number of features that turn (GPT-J).
        max_length: the longest sequence of the training, where the file names none.
        original_length: that before the training for longer ones, if the file has a key for it.
    """

    theta: float = 10000.0
    interleaved: bool = False
    partial: float = 1.0
    partial_key: str | None = "partial_rotary_factor"
    theta_key: str = "rope_theta"
    sliding_theta: float | None = None
    sliding_theta_key: str | None = None
    unscaled_sliding: bool = False
    without: str | None = None
    dim_key: str | None = None
    max_length: int = 2048
    original_length: int | None = None

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        layers = fields["num_layers"]
        types = fields.get("_types", [FULL] * layers)
        by_type = {kind: self._rope(config, fields, kind) for kind in (FULL, SLIDING)}
        turns = self._turns(config, fields, types)
        fields["rope"] = tuple(
            by_type[kind] if turn else None for kind, turn in zip(types, turns, strict=True)
        )

    def _turns(self, config: Config, fields: dict[str, Any], types: list[str]) -> list[bool]:
        if self.without is None:
            return [True] * len(types)
        if self.without == FULL:
            # Where nothing slides, all layers turn.
            slides = any(window is not None for window in fields["window"])
            return [kind == SLIDING or not slides for kind in types]
        every = config.get("no_rope_layer_interval", 4, "size")
        given = config.get(self.without, None, "list", optional=True)
        given = [int((i + 1) % every != 0) for i in range(len(types))] if given is None else given
        if len(given) != len(types) or any(x not in (0, 1) for x in given):
            raise ValueError(
                f"config.json: {self.without} must have 0 or 1 for each of the {len(types)} "
                f"layers, got {given!r:.80}."
            )
        return [x == 1 for x in given]

    def _rope(self, config: Config, fields: dict[str, Any], kind: str) -> Rope:
        slides = kind == SLIDING and self.sliding_theta is not None
        theta_key = self.sliding_theta_key if slides else self.theta_key
        default = self.sliding_theta if slides else self.theta
        parameters, nested = self._parameters(config, kind)
        theta = config.get(theta_key, default, "positive") if theta_key else default
        theta = _number(parameters, "rope_theta", theta)
        key = self.partial_key or "partial_rotary_factor"
        share = config.get(key, self.partial, "positive")
        share = _number(parameters, "partial_rotary_factor", share)
        if self.partial_key is None and share != 1.0:
            raise ValueError(f"config.json: {key} must be 1 in this family, got {share}.")
        head_dim = fields.get("head_dim") or fields["d_model"] // fields["num_heads"]
        dim = int(head_dim * share)
        if self.dim_key is not None:
            dim = config.get(self.dim_key, 64, "size", optional=True) or head_dim
        unscaled = kind == SLIDING and self.unscaled_sliding and not nested
        lengths = self.max_length, self.original_length
        scaling = None if unscaled else _scaling(config, parameters, *lengths)
        return Rope(theta, dim, self.interleaved, scaling)

    def _parameters(self, config: Config, kind: str) -> tuple[dict[str, Any], bool]:
        """What the file says of one type of layer, and whether it says so for that type alone."""
        both = config.get("rope_parameters", None, "dict", optional=True) or {}
        older = config.get("rope_scaling", None, "dict", optional=True)
        if older:
            return {} if kind == SLIDING and self.unscaled_sliding else older, False
        if FULL not in both and SLIDING not in both:
            if both and self.sliding_theta is not None:
                config.refuse("rope_parameters", "it must say which layers are meant.")
            return both, False
        own = both.get(kind)
        if own is not None and not isinstance(own, dict):
            raise ValueError(f"config.json: rope_parameters must hold objects, got {own!r:.80}.")
        return own or {}, True

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        ropes = [a.layer("rope", i) for i in range(a.num_layers)]
        slide = [a.layer("window", i) is not None for i in range(a.num_layers)]
        full = _one([r for r, s in zip(ropes, slide, strict=True) if r is not None and not s])
        sliding = _one([r for r, s in zip(ropes, slide, strict=True) if r is not None and s])
        if self.sliding_theta is None or sliding is None:
            full = _one([rope for rope in (full, sliding) if rope is not None])
        elif self.sliding_theta_key is not None:
            config[self.sliding_theta_key] = sliding.theta
        if self.without is not None and self.without != FULL:
            config[self.without] = [int(rope is not None) for rope in ropes]
        full = full or sliding
        if full is None:
            raise ValueError("no layer has rotary positions.")
        for key in ("rope_parameters", "rope_scaling", "original_max_position_embeddings"):
            config.pop(key, None)
        config[self.theta_key] = full.theta
        if self.partial_key is not None:
            config[self.partial_key] = _share(full.dim, a.head_dim or 1)
        if self.dim_key is not None:
            config[self.dim_key] = full.dim
        if full.scaling is not None:
            config["rope_scaling"] = _written(full.scaling)
        original = getattr(full.scaling, "original_length", None)
        if isinstance(full.scaling, DynamicScaling):
            config["max_position_embeddings"] = original
        elif self.original_length is not None and original is not None:
            config["original_max_position_embeddings"] = original


def _share(dim: int, head_dim: int) -> float:
    """The share of a head that `dim` features are; times the whole and rounded down, it is that."""
    share = dim / head_dim
    return share if int(head_dim * share) == dim else math.nextafter(share, math.inf)


def _one(ropes: list[Rope]) -> Rope | None:
    if any(rope != ropes[0] for rope in ropes):
        raise ValueError(
            "layers differ in their rotary positions in a way that it has no words for."
        )
    return ropes[0] if ropes else None


def _number(parameters: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = parameters.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"config.json: {key} of the rope must be a number above 0, got {value!r:.80}."
        )
    return float(value)


def _needed(parameters: Mapping[str, Any], key: str) -> float:
    value = _number(parameters, key)
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
    "original_max_position_embeddings",
}


def _scaling(
    config: Config, parameters: Mapping[str, Any], max_length: int, original_length: int | None
) -> Any:
    """The scaling that a dictionary of the file describes, or None."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _KNOWN:
        raise ValueError(
            f"config.json: the rope's type must be one of {', '.join(_KNOWN)}, got {kind!r:.80}."
        )
    unknown = {k for k, x in parameters.items() if x is not None} - _KNOWN[kind] - _ALWAYS
    if unknown:
        raise ValueError(
            f"config.json: the rope has settings that are not handled: {sorted(unknown)}."
        )
    longest = config.get("max_position_embeddings", max_length, "size")
    own = config.get("original_max_position_embeddings", original_length, "size", optional=True)
    original = own or int(_number(parameters, "original_max_position_embeddings", longest))
    factor = _number(parameters, "factor", longest / original)
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
    mscale, all_dim = _number(parameters, "mscale"), _number(parameters, "mscale_all_dim")
    attention_factor = _number(parameters, "attention_factor")
    if attention_factor is None and mscale and all_dim and factor > 1:
        attention_factor = (0.1 * mscale * math.log(factor) + 1) / (
            0.1 * all_dim * math.log(factor) + 1
        )
    return YarnScaling(
        factor,
        original,
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=truncate is not False,
    )


def _long(parameters: Mapping[str, Any], factor: float, original: int) -> LongScaling:
    lists = []
    for key in ("short_factor", "long_factor"):
        numbers = parameters.get(key)
        if not isinstance(numbers, list) or not numbers:
            raise ValueError(f"config.json: {key} of the rope must be a list, got {numbers!r:.80}.")
        lists.append(tuple(_number({key: x}, key) for x in numbers))
    attention_factor = _number(parameters, "attention_factor")
    if attention_factor is None:
        attention_factor = 1.0
        if factor > 1.0:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongScaling(*lists, original, attention_factor)


def _written(scaling: Any) -> dict[str, Any]:
    """A scaling as files say it."""
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
