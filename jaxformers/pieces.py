"""The options that every layer, stack and model takes under the same names.

A new idea is an object passed in here (a norm, a feed-forward, a position scheme, a kernel), not a
flag. Stacks and models hand the options down as they came; a layer builds from them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

from jaxtyping import PRNGKeyArray

from jaxformers.attention import AttentionFunction, MultiHeadAttention
from jaxformers.checks import check_options
from jaxformers.embedding import TransformerEmbedding
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import FeedForward, LayerNorm, Residual, as_module, split_key
from jaxformers.output import OutputLayer
from jaxformers.positional_encoding import BiasPosition, PositionScheme


class Pieces(TypedDict, total=False):
    """What a layer is made of; every name may be left out.

    Arguments:
        num_kv_heads: key/value heads; default `num_heads`.
        head_dim: features per head; default `d_model / num_heads`.
        use_bias: whether attention and feed-forward have biases; default True.
        qk_norm: constructor of a norm on the queries and keys of each head; default none.
        window: how many positions self-attention sees, its own included; default all.
        attention_dropout_rate: dropout on attention weights; default 0.
        attention_fn: the attention kernel; default `dot_product_attention`.
        norm: constructor `norm(d_model)`; default `LayerNorm`.
        norm_first: True (default) for pre-norm, False for the paper's post-norm.
        feed_forward: constructor `feed_forward(d_model, d_ff, key=key)`; default `FeedForward`,
            other choices are `partial(FeedForward, activation=jax.nn.gelu)` and
            `GatedFeedForward`. If use_bias, init or residual_init are given, they are passed on.
        position: a position scheme, or for one with weights of its own a function `key -> scheme`
            (each stack draws its own); default sinusoids in models, none in layers and stacks.
        init: how weights are drawn; default `xavier_uniform`.
        residual_init: how projections into the residual stream are drawn; default as `init`.
    """

    num_kv_heads: int | None
    head_dim: int | None
    use_bias: bool
    qk_norm: Callable | None
    window: int | None
    attention_dropout_rate: float
    attention_fn: AttentionFunction
    norm: Callable
    norm_first: bool
    feed_forward: Callable
    position: PositionScheme | Callable[[PRNGKeyArray], PositionScheme] | None
    init: Initializer
    residual_init: Initializer | None


ATTENTION_PIECES = (
    "num_kv_heads",
    "head_dim",
    "use_bias",
    "qk_norm",
    "attention_dropout_rate",
    "attention_fn",
    "init",
    "residual_init",
)
SELF_ATTENTION_PIECES = (*ATTENTION_PIECES, "position", "window")
FEED_FORWARD_PIECES = ("use_bias", "init", "residual_init")


def check_pieces(pieces: Pieces, owner: type) -> None:
    """Raise `OptionError` for a name that is neither a piece nor an argument of `owner`."""
    own = set(inspect.signature(owner).parameters) - {"pieces"}
    check_options(pieces, own | set(Pieces.__annotations__), owner.__name__)


def build_self_attention(
    d_model: int, num_heads: int, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> MultiHeadAttention:
    """The attention of a layer over its own sequence."""
    options = _only(pieces, SELF_ATTENTION_PIECES)
    return MultiHeadAttention(d_model, num_heads, key=key, **options)


def build_cross_attention(
    d_model: int, num_heads: int, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> MultiHeadAttention:
    """The attention to an encoder's output, where neither positions nor windows apply."""
    return MultiHeadAttention(d_model, num_heads, key=key, **_only(pieces, ATTENTION_PIECES))


def build_feed_forward(
    d_model: int, d_ff: int, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> Callable:
    """The feed-forward of a layer."""
    constructor = pieces.get("feed_forward", FeedForward)
    return constructor(d_model, d_ff, key=key, **_only(pieces, FEED_FORWARD_PIECES))


def build_residual(d_model: int, dropout_rate: float, **pieces: Unpack[Pieces]) -> Residual:
    """The joint of one sublayer to the residual stream."""
    norm, norm_first = pieces.get("norm", LayerNorm), pieces.get("norm_first", True)
    return Residual(norm, d_model, dropout_rate, norm_first)


def build_final_norm(d_model: int, final_norm: bool | None, **pieces: Unpack[Pieces]):
    """The norm at the end of a stack, by default there if the layers are pre-norm, else None."""
    wanted = pieces.get("norm_first", True) if final_norm is None else final_norm
    return as_module(pieces.get("norm", LayerNorm)(d_model)) if wanted else None


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
    """The embedding of a model, and the pieces that are left for the stack above it."""
    embedding_key, position_key = split_key(key, 2)
    position = pieces.pop("position", None)
    if position is not None and learnable_pos:
        raise ValueError(
            "learnable_pos=True is itself a position scheme, got position= as well: "
            f"{position!r}. Give one of the two."
        )
    if isinstance(position, type):
        raise ValueError(
            f"position must be a scheme, got a class. Write position={position.__name__}()."
        )
    if not (position is None or isinstance(position, PositionScheme)):
        if not callable(position):
            raise ValueError(
                "position must be a position scheme such as RotaryPositionalEncoding(), or a "
                f"function `key -> scheme`, got {position!r}."
            )
        position = position(position_key)
    embedding = TransformerEmbedding(
        vocab_size,
        d_model,
        max_seq_length,
        learnable_pos,
        dropout_rate,
        position=position,
        scale=scale,
        init=pieces.get("init", xavier_uniform),
        key=embedding_key,
    )
    if position is not None and embedding.position is None:
        pieces["position"] = position
    return embedding, pieces


def build_output(
    d_model: int, vocab_size: int, tied: bool, key: PRNGKeyArray, **pieces: Unpack[Pieces]
) -> OutputLayer:
    """The output layer of a model; without a bias where it is tied, as in GPT-2 and T5."""
    use_bias = pieces.get("use_bias", True) and not tied
    init = pieces.get("init", xavier_uniform)
    return OutputLayer(d_model, vocab_size, use_bias, tied, init=init, key=key)


def take_bias(pieces: Pieces) -> tuple[BiasPosition | None, Pieces]:
    """The position scheme if it biases scores, and the other pieces.

    A stack holds it once for all its layers; any other scheme stays among the pieces.
    """
    position = pieces.get("position")
    if isinstance(position, type) or not isinstance(position, BiasPosition):
        return None, pieces
    rest: Pieces = {name: piece for name, piece in pieces.items() if name != "position"}  # type: ignore[assignment]
    return position, rest


def _only(pieces: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    # What the user left out stays left out, so that each constructor's own default holds.
    return {name: pieces[name] for name in names if name in pieces}
