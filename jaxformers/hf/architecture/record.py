"""The architecture of a model: a record of all options in which families differ."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxformers.hf.architecture.attention import AttentionOptions
from jaxformers.hf.architecture.embedding import EmbeddingOptions
from jaxformers.hf.architecture.feed_forward import FeedForwardOptions
from jaxformers.hf.architecture.heads import HeadOptions
from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.output import OutputOptions
from jaxformers.hf.architecture.position import PositionOptions
from jaxformers.hf.architecture.residual import ResidualOptions


@dataclass(frozen=True)
class Architecture:
    """A record of all options of a model.

    Every default is the value of most families.

    Arguments:
        shape: "lm", "seq2seq" or "encoder".
        vocab_size: size of the vocabulary; in an encoder-decoder, that of the target.
        d_model: width of the residual stream.
        num_layers: number of layers; in an encoder-decoder, that of the encoder.
        attention: its attentions.
        feed_forward: its feed-forwards.
        src_vocab_size: size of the source's vocabulary; None for `vocab_size`.
        num_decoder_layers: number of layers of the decoder; None for `num_layers`.
        layer_order: the order in which layers run, if some run several times (ALBERT).
        dropout: the dropout rate of the embedding and of the outputs of sublayers.
        norm: its norms.
        residual: its residual stream.
        position: its positions.
        embedding: its embedding.
        output: its output layer.
        heads: its other heads.

    Example:
        >>> attention, ff = AttentionOptions(num_heads=2, softcap=30.0), FeedForwardOptions(d_ff=32)
        >>> a = Architecture("lm", 61, 16, 2, attention, ff)
        >>> a.attention.softcap, a.attention.head_dim
        (30.0, 8)
        >>> a.flat()["attention.softcap"]
        30.0
    """

    shape: str
    vocab_size: int
    d_model: int
    num_layers: int
    attention: AttentionOptions
    feed_forward: FeedForwardOptions
    src_vocab_size: int | None = None
    num_decoder_layers: int | None = None
    layer_order: tuple[int, ...] | None = None
    dropout: float = 0.0
    norm: NormOptions = field(default_factory=NormOptions)
    residual: ResidualOptions = field(default_factory=ResidualOptions)
    position: PositionOptions = field(default_factory=PositionOptions)
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    heads: HeadOptions = field(default_factory=HeadOptions)

    def __post_init__(self) -> None:
        source, decoder, order = self.src_vocab_size, self.num_decoder_layers, self.layer_order
        completed = {
            "src_vocab_size": self.vocab_size if source is None else source,
            "num_decoder_layers": self.num_layers if decoder is None else decoder,
            "layer_order": None if order == tuple(range(self.num_layers)) else order,
            "attention": self.attention.completed(self.d_model, self.norm),
            "feed_forward": self.feed_forward.completed(),
            "position": self.position.completed(),
            "output": self.output.completed(),
        }
        for name, value in completed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Architecture":
        """Returns the architecture with these fields, whose names are those of `flat`."""
        own: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {name: {} for name in RECORDS}
        for path, value in fields.items():
            record, _, name = path.rpartition(".")
            (inner[record] if record else own)[name] = value
        return cls(**own, **{name: RECORDS[name](**inner[name]) for name in RECORDS})

    def flat(self) -> dict[str, Any]:
        """Returns all fields by name; a field of an inner record is named `record.field`."""
        found: dict[str, Any] = {}
        for name in (x.name for x in dataclasses.fields(self)):
            value = getattr(self, name)
            if name in RECORDS:
                inner = (x.name for x in dataclasses.fields(value))
                found |= {f"{name}.{x}": getattr(value, x) for x in inner}
            else:
                found[name] = value
        return found


# Errors list differences in this order.
RECORDS: dict[str, Any] = {
    "norm": NormOptions,
    "residual": ResidualOptions,
    "attention": AttentionOptions,
    "position": PositionOptions,
    "feed_forward": FeedForwardOptions,
    "embedding": EmbeddingOptions,
    "output": OutputOptions,
    "heads": HeadOptions,
}


def option_name(path: str) -> str:
    """Returns the name of a field in errors, which is the name of its option if there is one."""
    record, _, name = path.rpartition(".")
    if name in ("kind", "present"):
        return record
    return f"{record}_{name}" if name in _SHORT or record in ("output", "heads") else name


_SHORT = ("eps", "bias", "gain", "offset", "scale", "dropout", "norm", "dim")
