"""Models of an architecture, without the weights of a checkpoint."""

from typing import Any

from jaxtyping import PRNGKeyArray

from jaxformers.hf.architecture.record import Architecture
from jaxformers.initializers import Initializer
from jaxformers.pieces import Pieces


def build(a: Architecture, model: Any, init: Initializer, key: PRNGKeyArray) -> Any:
    """Returns a model of this architecture.

    Arguments:
        a: the architecture.
        model: the class of models of its shape, such as `TransformerLM`.
        init: initializer of the weights.
        key: PRNG key.
    """
    built = model(
        *_vocabularies(a),
        d_model=a.d_model,
        num_heads=a.attention.num_heads,
        d_ff=a.feed_forward.d_ff,
        max_seq_length=a.position.max_seq_length or 1,
        dropout_rate=a.dropout,
        embedding_scale=a.embedding.scale,
        final_norm=a.residual.final_norm,
        tie_embeddings=a.output.tied,
        key=key,
        **_of_shape(a, init),
        **_pieces(a, init),
    )
    built = a.residual.finish(built, a.norm, a.d_model)
    return a.position.finish(built, a.attention.num_heads, init, key)


def _vocabularies(a: Architecture) -> tuple[int | None, ...]:
    return (a.src_vocab_size, a.vocab_size) if a.shape == "seq2seq" else (a.vocab_size,)


def _of_shape(a: Architecture, init: Initializer) -> dict[str, Any]:
    """Returns the arguments that only models of this shape have."""
    match a.shape:
        case "seq2seq":
            return {
                "num_encoder_layers": a.num_layers,
                "num_decoder_layers": a.num_decoder_layers,
                "decoder_num_heads": a.attention.decoder_num_heads,
                "decoder_d_ff": a.feed_forward.decoder_d_ff,
                "share_embeddings": a.embedding.shared,
            }
        case "encoder":
            heads = a.heads.constructors(a.norm, init)
            return {"num_layers": a.num_layers, "layer_order": a.layer_order, **heads}
    return {"num_layers": a.num_layers}


def _pieces(a: Architecture, init: Initializer) -> Pieces:
    def per_layer(i: int) -> Pieces:
        return Pieces(**a.attention.layer_pieces(i), **a.position.layer_pieces(i))

    width = a.embedding.width(a.d_model)
    return Pieces(
        norm=a.norm.constructor(),
        per_layer=per_layer,
        init=init,
        **a.residual.pieces(),
        **a.attention.pieces(a.d_model, a.norm),
        **a.position.pieces(width, a.attention.num_heads, init),
        **a.feed_forward.pieces(),
        **a.embedding.pieces(a.norm),
        **a.output.pieces(a.norm, init),
    )
