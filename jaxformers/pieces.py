"""The options that every layer, stack and model takes under the same names.

A new idea is an object that is passed in (a norm, a feed-forward, a position scheme, a kernel), not
a flag. Stacks and models pass the options on unchanged, and a layer builds its modules from them.
"""

import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any, TypedDict, Unpack

from jaxtyping import PRNGKeyArray

from jaxformers.attention import MultiHeadAttention
from jaxformers.checks import check_callable, check_flag, check_options
from jaxformers.embedding import TransformerEmbedding
from jaxformers.initializers import Initializer, check_initializer, xavier_uniform
from jaxformers.kernels.plain import AttentionFunction
from jaxformers.layers import FeedForward, construct, split_key
from jaxformers.norms import LayerNorm
from jaxformers.output import OutputLayer
from jaxformers.positions.scheme import (
    BiasPosition,
    PositionScheme,
    acts_as,
)
from jaxformers.residual import (
    Joint,
    NoNorm,
    Parallel,
    PostNorm,
    PreNorm,
    Residual,
    as_parallel,
    as_placement,
    build_norm,
)


class Pieces(TypedDict, total=False):
    """The options of a layer, each of which may be left out.

    Example:
        >>> llama = Pieces(norm=RMSNorm, feed_forward=GatedFeedForward, use_bias=False)
        >>> model = TransformerLM(65, position=RotaryPositionalEncoding(), **llama, key=key)

    Arguments:
        num_kv_heads: key/value heads; default `num_heads`.
        head_dim: features per head; default `d_model / num_heads`.
        use_bias: whether attention, feed-forward and output layer have biases; default True.
        use_qkv_bias: whether the query, key and value projections have biases; default as
            `use_bias`.
        use_out_bias: whether attention's output projection has a bias; default as `use_bias`.
        use_logits_bias: whether a model's output layer has a bias; default as `use_bias`, and False
            for a tied output layer.
        qk_norm: constructor of a norm on queries and keys, see `MultiHeadAttention`; default none.
        attention_scale: factor on the attention scores; default `1 / sqrt(head_dim)`.
        softcap: bound of the attention scores, see `MultiHeadAttention`; default none.
        qkv_clip: bound of queries, keys and values, see `MultiHeadAttention`; default none.
        window: a causal query sees the last `window` positions, its own included; a query without
            a causal mask sees the positions less than `window` away on both sides; default all.
        attention_dropout_rate: dropout on attention weights; default 0.
        attention_fn: the attention kernel; default `fast_attention`.
        norm: constructor `norm(d_model)`; default `LayerNorm`.
        norm_first: True (default) for pre-norm, False for the paper's post-norm.
        norm_placement: `PreNorm`, `PostNorm`, `Sandwich`, `OutputNorm`, `NoNorm`, or a class of
            your own, see `Joint`; the short forms are "pre", "post", "sandwich", "output" and
            "none". Default as `norm_first` says.
        residual_scale: factor on the output of each sublayer; default 1.
        parallel: `OneNorm()` (GPT-J) or `TwoNorms()` (GPT-NeoX) for a feed-forward in
            parallel with attention, after the same norm or after a norm of its own; the short forms
            are "one norm" and "two norms". Default None, the feed-forward after attention.
        feed_forward: constructor `feed_forward(d_model, d_ff, key=key)`; default `FeedForward`,
            other choices are `partial(FeedForward, activation=jax.nn.gelu)` and
            `GatedFeedForward`. If use_bias, init or residual_init are given, they are passed on.
        position: a position scheme; default sinusoids in models, none in stacks and layers. Models
            also take a function `key -> scheme`, for schemes with weights: each stack draws its own
            weights. Stacks take schemes that rotate queries and keys or bias scores, layers only
            schemes that rotate.
        embedding: constructor of a model's embedding, called like `TransformerEmbedding`, the
            default; for instance `partial(TransformerEmbedding, norm=LayerNorm)`.
        output: constructor of a model's output layer, called like `OutputLayer`, the default; for
            instance `partial(OutputLayer, softcap=30.0)`. None is a model that gives hidden states
            alone, which is the default of encoders.
        per_layer: a function `i -> Pieces` with the options in which layer i of a stack differs,
            such as `lambda i: Pieces(window=512 if i % 6 != 5 else None)`.
        init: initializer of the weights; default `xavier_uniform`.
        residual_init: initializer of projections into the residual stream; default as `init`.
    """

    num_kv_heads: int | None
    head_dim: int | None
    use_bias: bool
    use_qkv_bias: bool | None
    use_out_bias: bool | None
    use_logits_bias: bool | None
    qk_norm: Callable | None
    attention_scale: float | None
    softcap: float | None
    qkv_clip: float | None
    window: int | None
    attention_dropout_rate: float
    attention_fn: AttentionFunction
    norm: Callable
    norm_first: bool
    norm_placement: str | Callable[..., Joint] | None
    residual_scale: float
    parallel: str | Parallel | None
    feed_forward: Callable
    position: PositionScheme | Callable[[PRNGKeyArray], PositionScheme] | None
    embedding: Callable
    output: Callable | None
    per_layer: Callable[[int], Any]
    init: Initializer
    residual_init: Initializer | None


ATTENTION_PIECES = (
    "num_kv_heads",
    "head_dim",
    "use_bias",
    "use_qkv_bias",
    "use_out_bias",
    "qk_norm",
    "attention_scale",
    "softcap",
    "qkv_clip",
    "attention_dropout_rate",
    "attention_fn",
    "init",
    "residual_init",
)
# The options that stacks do not take, and those that layers do not take.
MODEL_PIECES = {"embedding", "output", "use_logits_bias"}
STACK_PIECES = MODEL_PIECES | {"per_layer"}
SELF_ATTENTION_PIECES = (*ATTENTION_PIECES, "position", "window")
FEED_FORWARD_PIECES = ("use_bias", "init", "residual_init")


def check_pieces(pieces: Pieces, owner: type, without: Set[str] = frozenset()) -> None:
    """Checks the names and the values of pieces.

    Raises:
        OptionError: if a name is neither a piece nor an argument of `owner`.
        ValueError: if a value cannot be called as it must be.
    """
    own = set(inspect.signature(owner).parameters) - {"pieces"}
    check_options(pieces, own | set(Pieces.__annotations__) - without, owner.__name__)
    functions = _only(
        pieces,
        ("norm", "feed_forward", "attention_fn", "init", "embedding", "per_layer"),
    )
    optional = _only(pieces, ("qk_norm", "residual_init", "output"))
    check_callable(**functions, **{k: x for k, x in optional.items() if x is not None})
    check_initializer(init=pieces.get("init"), residual_init=pieces.get("residual_init"))


def build_self_attention(
    d_model: int, num_heads: int, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> MultiHeadAttention:
    """Returns the self-attention of a layer."""
    options = _only(pieces, SELF_ATTENTION_PIECES)
    return MultiHeadAttention(d_model, num_heads, key=key, **options)


def build_cross_attention(
    d_model: int, num_heads: int, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> MultiHeadAttention:
    """Returns the cross-attention of a layer, to which neither positions nor windows apply."""
    return MultiHeadAttention(d_model, num_heads, key=key, **_only(pieces, ATTENTION_PIECES))


def build_feed_forward(
    d_model: int, d_ff: int, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> Callable:
    """Returns the feed-forward of a layer."""
    constructor = pieces.get("feed_forward", FeedForward)
    options = _only(pieces, FEED_FORWARD_PIECES)
    sizes = {"d_model": d_model, "d_ff": d_ff}
    return construct("feed_forward", constructor, sizes, key=key, **options)


def build_residual(
    d_model: int, dropout_rate: float, beside: Parallel | None = None, **pieces: Unpack[Pieces]
) -> Joint:
    """Returns the joint of one sublayer to the residual stream.

    If a feed-forward is in parallel with attention, `beside` names the placement of its norm.
    """
    norm, scale = pieces.get("norm", LayerNorm), pieces.get("residual_scale", 1.0)
    placement = norm_placement(pieces) if beside is None else beside.placement
    return Residual(norm, d_model, dropout_rate, placement, scale)


def read_parallel(**pieces: Unpack[Pieces]) -> Parallel | None:
    """Returns the object for parallel layers; None is a feed-forward after attention."""
    parallel, placement = as_parallel(pieces.get("parallel")), norm_placement(pieces)
    if parallel is not None and placement is not PreNorm:
        raise ValueError(
            "parallel is for layers whose norms are before their sublayers, got norm_placement="
            f"{getattr(placement, 'placement', placement)!r:.80}. Leave one of the two out."
        )
    return parallel


def norm_placement(pieces: Pieces) -> Callable[..., Joint]:
    """Returns the constructor of a layer's joints, for which `norm_first` is the short form."""
    norm_first, placement = pieces.get("norm_first"), pieces.get("norm_placement")
    if norm_first is not None:
        check_flag(norm_first=norm_first)
        if placement is not None:
            raise ValueError(
                "norm_first is short for a norm_placement, got both: "
                f"{norm_first!r} and {placement!r}. Give one of the two."
            )
    if placement is None:
        return PostNorm if norm_first is False else PreNorm
    return as_placement(placement)


def layer_pieces(pieces: Pieces, layer: int) -> Pieces:
    """Returns the pieces that a stack passes to one of its layers."""
    own = pieces.copy()
    per_layer = own.pop("per_layer", None)
    if per_layer is None:
        return own
    changes = per_layer(layer)
    if not isinstance(changes, Mapping):
        raise ValueError(f"per_layer must return Pieces, got {changes!r} for layer {layer}.")
    check_options(changes, set(Pieces.__annotations__) - STACK_PIECES, "per_layer")
    return own | changes  # type: ignore[operator]


def build_final_norm(d_model: int, final_norm: bool | None, **pieces: Unpack[Pieces]):
    """Returns the norm at the end of a stack, or None.

    By default there is one unless the layers are post-norm or have no norms.
    """
    wanted = final_norm
    if wanted is None:
        wanted = norm_placement(pieces) not in (PostNorm, NoNorm)
    check_flag(final_norm=wanted)
    return build_norm(pieces.get("norm", LayerNorm), d_model) if wanted else None


def build_embedding(
    vocab_size: int,
    d_model: int,
    max_seq_length: int,
    learnable_pos: bool,
    dropout_rate: float,
    scale: float | None,
    key: PRNGKeyArray,
    **pieces: Unpack[Pieces],
) -> tuple[TransformerEmbedding, Pieces]:
    """Returns the embedding of a model, and the remaining pieces for its stack."""
    embedding_key, position_key = split_key(key, 2)
    position: Any = pieces.pop("position", None)
    if callable(position) and not isinstance(position, type | PositionScheme):
        position = position(position_key)
        if not acts_as(position, PositionScheme):
            raise ValueError(f"position, a function, must return a scheme, got {position!r}.")
    constructor = pieces.get("embedding", TransformerEmbedding)
    sizes = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "max_seq_length": max_seq_length,
        "learnable_pos": learnable_pos,
        "dropout_rate": dropout_rate,
    }
    embedding = construct(
        "embedding",
        constructor,
        sizes,
        position=position,
        scale=scale,
        init=pieces.get("init", xavier_uniform),
        key=embedding_key,
    )
    if position is not None and embedding.position is None:
        pieces["position"] = position
    return embedding, Pieces(**{k: x for k, x in pieces.items() if k not in MODEL_PIECES})  # type: ignore


def build_output(
    d_model: int,
    table_shape: tuple[int, ...],
    tied: bool,
    key: PRNGKeyArray,
    **pieces: Unpack[Pieces],
) -> OutputLayer | None:
    """Returns the output layer of a model, or None for `output=None`.

    A tied one has no bias by default, as in T5.
    """
    check_flag(tie_embeddings=tied)
    use_bias = pieces.get("use_logits_bias")
    constructor = pieces.get("output", OutputLayer)
    if constructor is None:
        if tied or use_bias is not None:
            raise ValueError(
                "tie_embeddings and use_logits_bias are for an output layer, got none. Pass "
                "output=OutputLayer, or leave them out."
            )
        return None
    if use_bias is None:
        use_bias = pieces.get("use_bias", True) and not tied
    vocab_size, width = table_shape
    options: dict[str, Any] = {} if width == d_model else {"embedding_dim": width}
    init = pieces.get("init", xavier_uniform)
    sizes = {"d_model": d_model, "vocab_size": vocab_size, "use_bias": use_bias, "tied": tied}
    return construct("output", constructor, sizes, init=init, key=key, **options)


def take_score_bias(pieces: Pieces) -> tuple[BiasPosition | None, Pieces]:
    """Returns the position scheme if it biases scores, or None, and the other pieces.

    A stack holds this scheme once for all its layers. Any other scheme stays among the pieces.
    """
    if not acts_as(pieces.get("position"), BiasPosition):
        return None, pieces
    rest = pieces.copy()
    return rest.pop("position"), rest  # type: ignore[return-value]


def _only(pieces: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    # An option that the user left out stays left out, so that the constructor's default applies.
    return {name: pieces[name] for name in names if name in pieces}
