"""A model's architecture as one flat record, between a family's config.json and our constructors.

`build` makes a model of it, `describe` reads it back from a model, whoever built that. What
families differ in is a field here and an object in the model; nothing else knows of families.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxformers import activations
from jaxformers.embedding import TransformerEmbedding
from jaxformers.heads import Classifier
from jaxformers.initializers import Initializer
from jaxformers.layers import Dense, FeedForward, GatedFeedForward
from jaxformers.mixture_of_experts import MixtureOfExperts
from jaxformers.norms import AllHeadsNorm, LayerNorm, PerHeadNorm, RMSNorm
from jaxformers.output import OutputLayer
from jaxformers.pieces import Pieces
from jaxformers.positions.absolute import (
    LearnablePositionalEncoding,
    SinusoidalPositionalEncoding,
)
from jaxformers.positions.bias import (
    ALiBi,
    T5PositionBias,
)
from jaxformers.positions.rotary import (
    RotaryPositionalEncoding,
)
from jaxformers.residual import NoNorm

ACTIVATIONS: dict[str, Callable] = {
    "relu": activations.relu,
    "relu_squared": activations.relu_squared,
    "silu": activations.silu,
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "quick_gelu": activations.quick_gelu,
    "tanh": activations.tanh,
}
# The same functions as JAX spells them, for models built with those.
ALSO = [
    ("relu", jax.nn.relu),
    ("silu", jax.nn.silu),
    ("gelu_tanh", jax.nn.gelu),
    ("tanh", jnp.tanh),
]


class Rope(NamedTuple):
    """Rotary positions of a layer: base, features that turn, pairs beside each other, scaling."""

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Any = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Every option of every family; the defaults are those of most.

    Sizes that are None stand for the value that follows from the others. `window`, `rope` and
    `attention_scale` are tuples where layers differ.
    """

    shape: str  # "lm", "seq2seq" or "encoder"
    vocab_size: int
    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    src_vocab_size: int | None = None
    num_decoder_layers: int | None = None
    decoder_num_heads: int | None = None
    decoder_d_ff: int | None = None
    layer_order: tuple[int, ...] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    # the residual stream
    norm: str = "layer"  # or "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_gain: bool = True
    norm_offset: float = 0.0
    placement: str = "pre"
    first_attention_norm: bool = True
    final_norm: bool = True
    parallel: str | None = None
    residual_scale: float = 1.0
    # attention
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None  # "head", "per head" or "all heads"
    qk_norm_bias: bool | None = None
    attention_scale: float | tuple[float | None, ...] | None = None
    softcap: float | None = None
    qkv_clip: float | None = None
    window: int | tuple[int | None, ...] | None = None
    # positions
    position: str = "rope"  # "learned", "sinusoid", "alibi", "t5"
    max_seq_length: int | None = None
    position_offset: int = 0
    sinusoid_interleaved: bool = True
    sinusoid_inclusive: bool = False
    rope: Rope | tuple[Rope | None, ...] | None = None
    t5_buckets: int | None = None  # beside another position: T5's bias as well (MPNet)
    t5_distance: int | None = None
    # the feed-forward
    activation: str = "silu"
    gated: bool = False
    ff_bias: bool = False
    experts: int | None = None
    experts_used: int | None = None
    shared_expert_d_ff: int | None = None
    renormalize: bool = True
    # the embedding
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    embedding_dim: int | None = None
    project_tokens: bool = False
    token_types: int | None = None
    shared: bool = False
    # what stands on top
    output: bool = True
    tied: bool = False
    logits_bias: bool = False
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    transform: str | None = None  # "linear", or the activation of a dense layer with a norm
    transform_bias: bool = True
    pooler: bool = False
    labels: int | None = None
    classifier: str | None = None  # its pooling
    classifier_transform: str | None = None  # its activation
    classifier_norm: bool = False
    classifier_bias: bool = True

    def __post_init__(self) -> None:
        followers = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.d_model // self.num_heads,
            "src_vocab_size": self.vocab_size,
            "num_decoder_layers": self.num_layers,
            "decoder_num_heads": self.num_heads,
            "decoder_d_ff": self.d_ff,
            "qk_norm_bias": self.norm_bias,
        }
        for name, value in followers.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        given = self.attention_scale
        scales: tuple[float | None, ...] = given if isinstance(given, tuple) else (given,)
        scales = tuple(self.usual_scale if scale is None else scale for scale in scales)
        object.__setattr__(self, "attention_scale", scales)
        if self.layer_order == tuple(range(self.num_layers)):
            object.__setattr__(self, "layer_order", None)
        for name in ("window", "rope", "attention_scale"):
            object.__setattr__(self, name, collapse(getattr(self, name)))

    @property
    def usual_scale(self) -> float:
        """The `attention_scale` of most, `1 / sqrt(head_dim)`, which stands in place of None."""
        return (self.head_dim or 1) ** -0.5

    def layer(self, name: str, i: int) -> Any:
        """A field that may differ between layers, of layer i."""
        value = getattr(self, name)
        is_rope = isinstance(value, Rope)
        return value[i] if isinstance(value, tuple) and not is_rope else value


def collapse(value: Any) -> Any:
    """One value in place of a tuple whose entries are all the same."""
    if isinstance(value, tuple) and not isinstance(value, Rope) and len(set(value)) == 1:
        return value[0]
    return value


def build(a: Architecture, model: Any, init: Initializer, key: PRNGKeyArray) -> Any:
    """A model of this architecture: `model` is the class for its shape."""
    sizes: dict[str, Any] = {
        "d_model": a.d_model,
        "num_heads": a.num_heads,
        "d_ff": a.d_ff,
        "max_seq_length": a.max_seq_length or 1,
        "dropout_rate": a.dropout,
        "embedding_scale": a.embedding_scale,
        "final_norm": a.final_norm,
        "key": key,
    }
    pieces = _pieces(a, init)
    if a.shape == "lm":
        built = model(
            a.vocab_size, num_layers=a.num_layers, tie_embeddings=a.tied, **sizes, **pieces
        )
    elif a.shape == "seq2seq":
        built = model(
            a.src_vocab_size,
            a.vocab_size,
            num_encoder_layers=a.num_layers,
            num_decoder_layers=a.num_decoder_layers,
            decoder_num_heads=a.decoder_num_heads,
            decoder_d_ff=a.decoder_d_ff,
            tie_embeddings=a.tied,
            share_embeddings=a.shared,
            **sizes,
            **pieces,
        )
    else:
        built = model(
            a.vocab_size,
            num_layers=a.num_layers,
            layer_order=a.layer_order,
            tie_embeddings=a.tied,
            pooler=partial(Dense, activation=activations.tanh, init=init) if a.pooler else None,
            classifier=_classifier(a, init),
            **sizes,
            **pieces,
        )
    if not a.first_attention_norm:
        first = built.encoder.layers[0].self_attention_residual
        bare = NoNorm(_norm(a), a.d_model, first.add)
        built = eqx.tree_at(lambda m: m.encoder.layers[0].self_attention_residual, built, bare)
    if a.position != "t5" and a.t5_buckets is not None:
        bias = _t5_bias(a, init, jax.random.fold_in(key, 1))
        none = {"is_leaf": lambda x: x is None}
        built = eqx.tree_at(lambda m: m.encoder.score_bias, built, bias, **none)
    return built


def _norm(a: Architecture) -> Callable:
    if a.norm == "rms":
        return partial(RMSNorm, eps=a.norm_eps, gain_offset=a.norm_offset)
    has = {"use_bias": a.norm_bias, "use_gain": a.norm_gain}
    return partial(LayerNorm, eps=a.norm_eps, gain_offset=a.norm_offset, **has)


def _pieces(a: Architecture, init: Initializer) -> Pieces:
    norm = _norm(a)
    head_norm = partial(norm, use_bias=a.qk_norm_bias) if a.norm == "layer" else norm
    qk_norms = {
        None: None,
        "head": head_norm,
        "per head": partial(PerHeadNorm, head_norm),
        "all heads": partial(AllHeadsNorm, head_norm),
    }
    pieces = Pieces(
        num_kv_heads=None if a.num_kv_heads == a.num_heads else a.num_kv_heads,
        # Encoder and decoder may have different numbers of heads: each has its own usual size.
        head_dim=None if (a.head_dim or 0) * a.num_heads == a.d_model else a.head_dim,
        use_bias=a.ff_bias,
        use_qkv_bias=a.qkv_bias,
        use_out_bias=a.out_bias,
        qk_norm=qk_norms[a.qk_norm],
        softcap=a.softcap,
        qkv_clip=a.qkv_clip,
        attention_dropout_rate=a.attention_dropout,
        norm=norm,
        norm_placement=a.placement,
        residual_scale=a.residual_scale,
        parallel=a.parallel,
        feed_forward=_feed_forward(a),
        embedding=partial(
            TransformerEmbedding,
            norm=norm if a.embedding_norm else None,
            embedding_dim=a.embedding_dim,
            project_tokens=a.project_tokens,
            num_token_types=a.token_types,
        ),
        per_layer=partial(_layer_pieces, a),
        init=init,
    )
    position = _position(a, init)
    if position is not None:
        pieces["position"] = position
    if a.output:
        pieces["use_logits_bias"] = a.logits_bias
        pieces["output"] = partial(
            OutputLayer,
            scale=a.logits_scale,
            softcap=a.logits_softcap,
            transform=_transform(a, norm, init),
        )
    return pieces


def _layer_pieces(a: Architecture, i: int) -> Pieces:
    scale = a.layer("attention_scale", i)
    pieces = Pieces(
        window=a.layer("window", i),
        attention_scale=None if scale == a.usual_scale else scale,
    )
    if a.position == "rope":
        rope = a.layer("rope", i)
        pieces["position"] = None if rope is None else RotaryPositionalEncoding(*rope)
    return pieces


def _feed_forward(a: Architecture) -> Callable:
    activation = ACTIVATIONS[a.activation]
    if a.experts is not None:
        return partial(
            MixtureOfExperts,
            num_experts=a.experts,
            top_k=a.experts_used or 1,
            activation=activation,
            renormalize=a.renormalize,
            shared_d_ff=a.shared_expert_d_ff,
        )
    return partial(GatedFeedForward if a.gated else FeedForward, activation=activation)


def _position(a: Architecture, init: Initializer) -> Any:
    """The scheme for the whole model."""
    width = a.d_model if a.embedding_dim is None or a.project_tokens else a.embedding_dim
    match a.position:
        case "learned":
            return lambda key: LearnablePositionalEncoding(
                a.max_seq_length or 1, width, offset=a.position_offset, init=init, key=key
            )
        case "sinusoid":
            options = a.sinusoid_interleaved, a.sinusoid_inclusive, a.position_offset
            return SinusoidalPositionalEncoding(a.max_seq_length or 1, width, *options)
        case "alibi":
            return ALiBi()
        case "t5":
            # The decoder may have other heads than the encoder in other families, not here.
            return partial(_t5_bias, a, init)
    # Layers get their own; this one keeps the model from adding sinusoids.
    return RotaryPositionalEncoding()


def _t5_bias(a: Architecture, init: Initializer, key: PRNGKeyArray) -> T5PositionBias:
    buckets, distance = a.t5_buckets or 32, a.t5_distance or 128
    return T5PositionBias(a.num_heads, buckets, distance, init=init, key=key)


def _transform(a: Architecture, norm: Callable, init: Initializer) -> Callable | None:
    if a.transform is None:
        return None
    if a.transform == "linear":
        return partial(Dense, use_bias=a.transform_bias, init=init)
    activation = ACTIVATIONS[a.transform]
    return partial(Dense, activation=activation, norm=norm, use_bias=a.transform_bias, init=init)


def _classifier(a: Architecture, init: Initializer) -> Callable | None:
    if a.labels is None:
        return None
    transform = None
    if a.classifier_transform is not None:
        transform = partial(
            Dense,
            activation=ACTIVATIONS[a.classifier_transform],
            norm=_norm(a) if a.classifier_norm else None,
            use_bias=a.classifier_bias,
            init=init,
        )
    return partial(
        Classifier,
        num_labels=a.labels,
        pooling=a.classifier or "first",
        transform=transform,
        init=init,
    )
