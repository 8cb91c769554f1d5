"""The architecture of a model, read back from its modules."""

from typing import Any

from jaxformers.hf.architecture.attention import AttentionOptions
from jaxformers.hf.architecture.embedding import EmbeddingOptions
from jaxformers.hf.architecture.feed_forward import FeedForwardOptions
from jaxformers.hf.architecture.heads import HeadOptions, norms_of_heads
from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.output import OutputOptions
from jaxformers.hf.architecture.parts import Parts
from jaxformers.hf.architecture.position import PositionOptions
from jaxformers.hf.architecture.record import Architecture
from jaxformers.hf.architecture.residual import ResidualOptions, norms_of_sublayers


def describe(model: Any) -> Architecture:
    """Returns the architecture of a model, from which `build` makes an equal one.

    Raises:
        ValueError: if the model has a part that no checkpoint has, such as another norm or kernel.
    """
    parts = Parts.of(model)
    both = parts.shape == "seq2seq"
    norm = NormOptions.of_all(
        [
            *norms_of_sublayers(parts),
            parts.embedding.norm,
            *(stack.norm for stack in parts.stacks),
            *norms_of_heads(parts),
        ]
    )
    return Architecture(
        shape=parts.shape,
        vocab_size=parts.embedding.vocab_size,
        d_model=parts.embedding.d_model,
        num_layers=len(parts.stacks[0].layers),
        src_vocab_size=model.src_vocab_size if both else None,
        num_decoder_layers=len(parts.stacks[-1].layers),
        layer_order=model.encoder.layer_order if parts.shape == "encoder" else None,
        dropout=parts.embedding.dropout_rate,
        norm=norm,
        residual=ResidualOptions.of(parts),
        attention=AttentionOptions.of(parts, norm),
        feed_forward=FeedForwardOptions.of(parts),
        embedding=EmbeddingOptions.of(parts),
        position=PositionOptions.of(parts),
        output=OutputOptions.of(parts),
        heads=HeadOptions.of(parts),
    )
