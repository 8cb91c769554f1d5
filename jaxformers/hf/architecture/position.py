"""Positions: rotary, learned, sinusoids, ALiBi and T5's bias."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from jaxformers.hf.architecture.parts import Parts, collapse, of_layer
from jaxformers.hf.architecture.rope import Rope
from jaxformers.hf.config.entries import Config
from jaxformers.initializers import Initializer
from jaxformers.pieces import Pieces
from jaxformers.positions.absolute import (
    LearnablePositionalEncoding,
    SinusoidalPositionalEncoding,
)
from jaxformers.positions.bias import ALiBi, T5PositionBias
from jaxformers.positions.rotary import RotaryPositionalEncoding


@dataclass(frozen=True)
class PositionOptions:
    """The positions of a model.

    Arguments:
        kind: "rope", "learned", "sinusoid", "alibi" or "t5".
        max_seq_length: the number of positions in a table.
        offset: the row of the first position.
        sinusoid_interleaved: whether sines and cosines alternate.
        sinusoid_inclusive: whether the last frequency is the smallest that the base allows.
        rope: rotary positions; a tuple if layers differ.
        t5_buckets: the number of buckets of T5's bias, which may accompany another kind (MPNet).
        t5_distance: the distance from which on all positions share a bucket.
    """

    kind: str = "rope"
    max_seq_length: int | None = None
    offset: int = 0
    sinusoid_interleaved: bool = True
    sinusoid_inclusive: bool = False
    rope: Rope | tuple[Rope | None, ...] | None = None
    t5_buckets: int | None = None
    t5_distance: int | None = None

    def completed(self) -> "PositionOptions":
        """Returns the options with a single `rope` if the layers have equal ones."""
        return replace(self, rope=collapse(self.rope))

    @classmethod
    def of(cls, parts: Parts) -> "PositionOptions":
        """Returns the options of a model, read from its modules.

        Raises:
            ValueError: if the model has positions that no checkpoint has.
        """
        scheme, bias = parts.embedding.position, parts.stacks[-1].score_bias
        if scheme is None and bias is None:
            return cls(rope=tuple(Rope.of(attention) for attention in parts.self_attentions))
        if scheme is None or bias is None:
            return cls(**_read(bias if scheme is None else scheme))
        if not isinstance(bias, T5PositionBias):
            raise ValueError(f"positions {scheme!r} beside {bias!r} are not in checkpoints.")
        return cls(**(_read(bias) | _read(scheme)))

    def pieces(self, width: int, num_heads: int, init: Initializer) -> Pieces:
        """Returns the pieces for a model whose embedding has this width."""
        rows = self.max_seq_length or 1
        match self.kind:
            case "learned":
                learned = partial(LearnablePositionalEncoding, rows, width, offset=self.offset)
                return Pieces(position=lambda key: learned(init=init, key=key))
            case "sinusoid":
                options = self.sinusoid_interleaved, self.sinusoid_inclusive, self.offset
                return Pieces(position=SinusoidalPositionalEncoding(rows, width, *options))
            case "alibi":
                return Pieces(position=ALiBi())
            case "t5":
                return Pieces(position=lambda key: self._t5_bias(num_heads, init, key))
        # Each layer gets its own scheme; this one keeps the model from adding sinusoids.
        return Pieces(position=RotaryPositionalEncoding())

    def layer_pieces(self, i: int) -> Pieces:
        """Returns the pieces that only layer i has."""
        if self.kind != "rope":
            return Pieces()
        rope = of_layer(self.rope, i)
        return Pieces(position=None if rope is None else rope.scheme())

    def finish(self, model: Any, num_heads: int, init: Initializer, key: PRNGKeyArray) -> Any:
        """Returns the model with T5's bias added, if the bias accompanies another kind."""
        if self.kind == "t5" or self.t5_buckets is None:
            return model
        bias = self._t5_bias(num_heads, init, jax.random.fold_in(key, 1))
        return eqx.tree_at(lambda m: m.encoder.score_bias, model, bias, is_leaf=lambda x: x is None)

    def _t5_bias(self, num_heads: int, init: Initializer, key: PRNGKeyArray) -> T5PositionBias:
        buckets, distance = self.t5_buckets or 32, self.t5_distance or 128
        return T5PositionBias(num_heads, buckets, distance, init=init, key=key)


def _read(scheme: Any) -> dict[str, Any]:
    match scheme:
        case LearnablePositionalEncoding():
            rows = scheme.max_seq_length
            return {"kind": "learned", "offset": scheme.offset, "max_seq_length": rows}
        case SinusoidalPositionalEncoding():
            return {
                "kind": "sinusoid",
                "sinusoid_interleaved": scheme.interleaved,
                "sinusoid_inclusive": scheme.inclusive,
                "offset": scheme.offset,
                "max_seq_length": scheme.max_seq_length,
            }
        case ALiBi():
            return {"kind": "alibi"}
        case T5PositionBias():
            buckets, distance = scheme.weight.shape[0], scheme.max_distance
            return {"kind": "t5", "t5_buckets": buckets, "t5_distance": distance}
    raise ValueError(f"the positions {scheme!r} have no name in checkpoints.")


class AfterPadding(NamedTuple):
    """Learned positions in a table whose first rows are for the ids up to the padding id.

    RoBERTa counts positions from the padding id on, so that a table of 514 rows has room for 512
    tokens.

    Arguments:
        pad: the padding id if the file names none.
        rows: the number of rows if the file names none.
        key: the key of the padding id; None if the id is always `pad`.
    """

    pad: int = 1
    rows: int = 512
    key: str | None = "pad_token_id"

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        pad = self.pad if self.key is None else config.get(self.key, self.pad, "count")
        rows = config.get("max_position_embeddings", self.rows, "size")
        if rows <= pad + 1:
            config.refuse("max_position_embeddings", f"with pad_token_id {pad} no token has room.")
        fields |= {"position.offset": pad + 1, "position.max_seq_length": rows - pad - 1}

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        # The written file is read again, which shows whether it can express these positions.
        offset, length = fields["position.offset"], fields["position.max_seq_length"]
        pad = offset - 1 if offset > 0 else self.pad
        config[self.key or "pad_token_id"] = pad
        config["max_position_embeddings"] = pad + 1 + (length or self.rows)
