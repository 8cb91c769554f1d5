"""Rotary positions and windows in a config.json: three spellings, and patterns over the layers.

Files of transformers 4 say `rope_theta` and `rope_scaling`; those of 5 `rope_parameters`, either
once or for each type of layer. We read all three, and write the first beside one of the others:
version 4 silently takes its defaults for what it does not know, and so do other readers.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxformers.hf.architecture import Architecture, Rope
from jaxformers.hf.scaling_settings import (
    number,
    read_scaling,
    write_lengths,
    write_older_scaling,
    write_scaling,
)
from jaxformers.hf.settings import Config

FULL, SLIDING = "full_attention", "sliding_attention"
NO_ROPE = "no_rope_layers"  # of the file: 1 for each layer that turns queries and keys, else 0
REPEATED = ("every", "first")  # patterns that one number tells
# What version 5 of transformers says in `rope_parameters`.
OLDER_KEYS = frozenset(
    {
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
        *("rotary_emb_base", "rotary_pct", "global_rope_theta", "local_rope_theta"),
    }
)


class Windows(NamedTuple):
    """Which layers see a window only.

    Arguments:
        default: the window where the file names none.
        pattern: layers that slide if the file does not list their types: "all"; "last" ones, from
            `max_window_layers` on; the first, third, ... ("odd") before that; "every", all but each
            n-th; "first", all but the first of n; "still", those that turn nothing (SmolLM3).
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
        enabled = self.enabled_key is None or config.get(self.enabled_key, False, "flag")
        config.used.add(self.key)
        window = config.get(self.key, self.default, "size", optional=True) if enabled else None
        if window is not None and self.both_sides:
            window = window // 2 + 1
        types = self._types(config, fields["num_layers"], window is not None)
        fields["_types"], fields["_window"] = types, window
        fields["window"] = tuple(window if kind == SLIDING else None for kind in types)

    def _types(self, config: Config, layers: int, slides: bool) -> list[str]:
        keys = self.every_key, "max_window_layers" if self.pattern in ("last", "odd") else None
        config.used.update(key for key in keys if key is not None)
        given = config.get("layer_types", None, "list", optional=True) if self.typed else None
        if given is not None:
            if len(given) != layers or any(kind not in (FULL, SLIDING) for kind in given):
                raise ValueError(
                    f"config.json: layer_types must name {FULL!r} or {SLIDING!r} for each of the "
                    f"{layers} layers, got {given!r:.120}."
                )
            if SLIDING in given and not slides:
                config.refuse("layer_types", f"there is no {self.key} for {SLIDING!r}.")
            return given
        every = self.every
        if self.every_key is not None:
            every = config.get(self.every_key, self.every, "size")
        limit = config.get(keys[1], 28, "count") if keys[1] is not None else 0
        turning = turning_layers(config, layers) if self.pattern == "still" else []
        n = every if self.pattern in REPEATED else limit
        slides = slides or self.pattern in REPEATED
        sliding = [slides and self._slides(i, n, turning) for i in range(layers)]
        return [SLIDING if slide else FULL for slide in sliding]

    def _slides(self, i: int, n: int, turning: Sequence[bool] = ()) -> bool:
        """Whether layer i slides by the pattern, whose number is n."""
        match self.pattern:
            case "last":
                return i >= n
            case "odd":
                return i < n and i % 2 == 0
            case "every":
                return (i + 1) % n != 0
            case "first":
                return i % n != 0
            case "still":
                return not turning[i]
        return True

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        windows = [a.layer("window", i) for i in range(a.num_layers)]
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"layers have windows of different size, {sorted(sizes)}.")
        window = next(iter(sizes), None)
        if window is not None and self.both_sides:
            window = (window - 1) * 2
        if window is None and self.pattern in REPEATED:
            window = self.default  # their types say that it does not matter
        config[self.key] = window
        if self.enabled_key is not None:
            config[self.enabled_key] = bool(sizes)
        if self.typed:
            config["layer_types"] = [FULL if size is None else SLIDING for size in windows]
            self._write_pattern([size is not None for size in windows], config)

    def _write_pattern(self, slides: list[bool], config: dict[str, Any]) -> None:
        """The number that says the same as the types, for readers that know no types."""
        key = "max_window_layers" if self.pattern == "last" else self.every_key
        if key is None or (self.pattern == "last" and not any(slides)):
            return
        config.pop(key, None)
        for n in range(self.pattern in REPEATED, len(slides) + 2):
            if slides == [self._slides(i, n) for i in range(len(slides))]:
                config[key] = n
                return


def turning_layers(config: Config, layers: int) -> list[bool]:
    """Which layers turn queries and keys, where a file lists them (SmolLM3)."""
    every = config.get("no_rope_layer_interval", 4, "size")
    given = config.get(NO_ROPE, None, "list", optional=True)
    given = [int((i + 1) % every != 0) for i in range(layers)] if given is None else given
    if len(given) != layers or any(x not in (0, 1) for x in given):
        raise ValueError(
            f"config.json: {NO_ROPE} must have 0 or 1 for each of the {layers} layers, got "
            f"{given!r:.80}."
        )
    return [x == 1 for x in given]


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
        without: layers without rotary positions: FULL, or NO_ROPE where the file lists the others.
        if_windowed: whether that holds only for files with a window.
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
    if_windowed: bool = False
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
        if self.without == NO_ROPE:
            return turning_layers(config, len(types))
        windowed = not self.if_windowed or fields["_window"] is not None
        return [self.without is None or kind == SLIDING or not windowed for kind in types]

    def _rope(self, config: Config, fields: dict[str, Any], kind: str) -> Rope:
        slides = kind == SLIDING and self.sliding_theta is not None
        theta_key = (self.sliding_theta_key if slides else None) or self.theta_key
        default = self.sliding_theta if slides else self.theta
        parameters, nested = self._parameters(config, kind)
        theta = config.get(theta_key, default, "positive")
        theta = number(parameters, "rope_theta", theta)
        key = self.partial_key or "partial_rotary_factor"
        share = config.get(key, self.partial, "positive")
        share = number(parameters, "partial_rotary_factor", share)
        if self.partial_key is None and share != 1.0:
            raise ValueError(f"config.json: {key} must be 1 in this family, got {share}.")
        head_dim = fields.get("head_dim") or fields["d_model"] // fields["num_heads"]
        dim = int(head_dim * share)
        unscaled = kind == SLIDING and self.unscaled_sliding and not nested
        lengths = self.max_length, self.original_length
        scaling = None if unscaled else read_scaling(config, parameters, *lengths)
        return Rope(theta, dim, self.interleaved, scaling)

    def _parameters(self, config: Config, kind: str) -> tuple[dict[str, Any], bool]:
        """What the file says of one type of layer, and whether it says so for that type alone."""
        both = config.get("rope_parameters", None, "dict", optional=True) or {}
        older = config.get("rope_scaling", None, "dict", optional=True)
        typed, by_type = self.sliding_theta is not None, FULL in both or SLIDING in both
        if older and not (both and typed):
            return {} if kind == SLIDING and self.unscaled_sliding else older, False
        if both and typed != by_type:
            config.refuse(
                "rope_parameters", "it must " + "not " * by_type + "name types of layers."
            )
        if not by_type:
            return both, False
        own = both.get(kind)
        if own is not None and not isinstance(own, dict):
            raise ValueError(f"config.json: rope_parameters must hold objects, got {own!r:.80}.")
        if older and not (kind == SLIDING and self.unscaled_sliding):
            lengths = self.max_length, self.original_length
            if read_scaling(config, older, *lengths) != read_scaling(config, own or {}, *lengths):
                config.refuse("rope_scaling", "rope_parameters says something else.")
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
        if self.without == NO_ROPE:
            config[NO_ROPE] = [int(rope is not None) for rope in ropes]
        if self.if_windowed and not any(slide) and None not in ropes:
            config["sliding_window"] = None
        full = full or sliding
        if full is None:
            raise ValueError("no layer has rotary positions.")
        self._write_both(full, sliding, a, config)

    def _write_both(
        self, full: Rope, sliding: Rope | None, a: Architecture, config: dict[str, Any]
    ) -> None:
        """Write the older words, and those of version 5 of transformers."""
        for key in ("rope_parameters", "rope_scaling"):
            config.pop(key, None)
        config[self.theta_key] = full.theta
        partial = {}
        if self.partial_key is not None:
            partial["partial_rotary_factor"] = _share(full.dim, a.head_dim or 1)
            config[self.partial_key] = partial["partial_rotary_factor"]
        max_length = None if self.original_length is None else self.max_length
        write_lengths(full.scaling, config, max_length)
        if full.scaling is not None:
            config["rope_scaling"] = write_older_scaling(full.scaling, config, max_length)
        by_type = {FULL: full} if sliding is None else {FULL: full, SLIDING: sliding}
        words = {kind: _dictionary(rope) for kind, rope in by_type.items()}
        typed = self.sliding_theta is not None
        config["rope_parameters"] = words if typed else words[FULL] | partial


def _dictionary(rope: Rope) -> dict[str, Any]:
    scaling = {} if rope.scaling is None else write_scaling(rope.scaling)
    return {"rope_type": "default", **scaling, "rope_theta": rope.theta}


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
