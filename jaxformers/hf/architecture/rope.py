"""Rotary positions, and their three forms in a config.json.

Files of transformers 4 have `rope_theta` and `rope_scaling`. Files of version 5 have
`rope_parameters`, either once or for each type of layer. All three forms are read. The first is
written together with one of the others, because version 4 and other readers do not know
`rope_parameters` and silently use their defaults.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxformers.attention import MultiHeadAttention
from jaxformers.hf.architecture.parts import of_layer
from jaxformers.hf.architecture.scaling import (
    number,
    read_scaling,
    write_lengths,
    write_older_scaling,
    write_scaling,
)
from jaxformers.hf.architecture.window import FULL, NO_ROPE, SLIDING, rotating_layers
from jaxformers.hf.config.entries import Config
from jaxformers.positions.rotary import RotaryPositionalEncoding

# Keys that version 5 of transformers has in `rope_parameters`.
OLDER_KEYS = frozenset(
    {
        *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
        *("rotary_emb_base", "rotary_pct", "global_rope_theta", "local_rope_theta"),
    }
)


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer.

    Arguments:
        theta: the base of the frequencies.
        dim: the number of features of a head that rotate.
        interleaved: whether the two features of a pair are adjacent.
        scaling: the scaling of frequencies for longer texts, or None.
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Any = None

    @classmethod
    def of(cls, attention: MultiHeadAttention) -> "Rope | None":
        """Returns the rotary positions of an attention, or None if it has no positions.

        Raises:
            ValueError: if it has positions of another kind.
        """
        rope = attention.position
        if rope is None:
            return None
        if not isinstance(rope, RotaryPositionalEncoding):
            raise ValueError(f"the positions {rope!r} have no name in checkpoints.")
        dim = attention.head_dim if rope.rotary_dim is None else rope.rotary_dim
        return cls(rope.theta, dim, rope.interleaved, rope.scaling)

    def scheme(self) -> RotaryPositionalEncoding:
        """Returns the position scheme of the layer."""
        return RotaryPositionalEncoding(self.theta, self.dim, self.interleaved, self.scaling)


class Rotary(NamedTuple):
    """The rotary positions of all layers.

    Arguments:
        theta: the default base of the frequencies.
        interleaved: whether the two features of a pair are adjacent.
        partial: the default share of the features of a head that rotate.
        partial_key: the key of that share outside of the dictionaries; None if all features always
            rotate.
        theta_key: the key of the base outside of the dictionaries.
        sliding_theta: the base of layers with a window if it is a different one.
        sliding_theta_key: the key of that base.
        unscaled_sliding: whether the scaling does not apply to layers with a window.
        without: the layers without rotary positions: None, FULL for the layers without a window,
            or NO_ROPE if the file lists the layers with rotary positions.
        if_windowed: whether `without` holds only for files with a window.
        max_length: the length of the longest sequence in training if the file names none.
        original_length: the length of the longest sequence before the training on longer texts, in
            families whose files may name it.
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

    @property
    def twice(self) -> bool:
        """Whether readers use different keys for the setting, so that all keys are written."""
        return True

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        layers = fields["num_layers"]
        types = fields.get("_types", [FULL] * layers)
        by_type = {kind: self._rope(config, fields, kind) for kind in (FULL, SLIDING)}
        rotate = self._rotate(config, fields, types)
        fields["position.rope"] = tuple(
            by_type[kind] if rotates else None for kind, rotates in zip(types, rotate, strict=True)
        )

    def _rotate(self, config: Config, fields: dict[str, Any], types: list[str]) -> list[bool]:
        if self.without == NO_ROPE:
            return rotating_layers(config, len(types))
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
        usual_dim = fields["d_model"] // fields["attention.num_heads"]
        head_dim = fields.get("attention.head_dim") or usual_dim
        dim = int(head_dim * share)
        unscaled = kind == SLIDING and self.unscaled_sliding and not nested
        lengths = self.max_length, self.original_length
        scaling = None if unscaled else read_scaling(config, parameters, *lengths)
        return Rope(theta, dim, self.interleaved, scaling)

    def _parameters(self, config: Config, kind: str) -> tuple[dict[str, Any], bool]:
        """Returns the entries for one type of layer, and whether only this type has them."""
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

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        layers = range(fields["num_layers"])
        ropes = [of_layer(fields["position.rope"], i) for i in layers]
        slide = [of_layer(fields["attention.window"], i) is not None for i in layers]
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
        self._write_both(full, sliding, fields, config)

    def _write_both(
        self, full: Rope, sliding: Rope | None, fields: Mapping[str, Any], config: dict[str, Any]
    ) -> None:
        """Writes the older keys, and those of version 5 of transformers."""
        for key in ("rope_parameters", "rope_scaling"):
            config.pop(key, None)
        config[self.theta_key] = full.theta
        partial = {}
        if self.partial_key is not None:
            partial["partial_rotary_factor"] = _share(full.dim, fields["attention.head_dim"] or 1)
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
    """Returns the share of a head for which `int(head_dim * share)` is `dim`."""
    share = dim / head_dim
    return share if int(head_dim * share) == dim else math.nextafter(share, math.inf)


def _one(ropes: list[Rope]) -> Rope | None:
    if any(rope != ropes[0] for rope in ropes):
        raise ValueError(
            "layers differ in their rotary positions in a way that it has no words for."
        )
    return ropes[0] if ropes else None
