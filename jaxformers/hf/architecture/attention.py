"""The attentions of an architecture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxformers.attention import MultiHeadAttention
from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.parts import Parts, collapse, of_layer, same
from jaxformers.kernels.blockwise import blockwise_attention
from jaxformers.kernels.choice import fast_attention
from jaxformers.kernels.flash import flash_attention
from jaxformers.kernels.plain import dot_product_attention
from jaxformers.layers import Function
from jaxformers.norms import AllHeadsNorm, PerHeadNorm
from jaxformers.pieces import Pieces

# These kernels compute the same function.
KERNELS = [
    Function(kernel)
    for kernel in (fast_attention, dot_product_attention, blockwise_attention, flash_attention)
]


@dataclass(frozen=True)
class AttentionOptions:
    """The attentions of a model.

    `window` and `scale` are tuples if layers differ in them.

    Arguments:
        num_heads: query heads.
        num_kv_heads: key/value heads; None for as many as query heads.
        head_dim: features per head; None for `d_model / num_heads`.
        decoder_num_heads: query heads of the decoder in an encoder-decoder; None for `num_heads`.
        qkv_bias: whether queries, keys and values have biases.
        out_bias: whether the output projection has a bias.
        qk_norm: norms on queries and keys: "head", "per head", "all heads" or None.
        qk_norm_bias: whether these norms have biases; None for the choice of the other norms.
        scale: factor on the scores; None for `1 / sqrt(head_dim)`.
        softcap: bound of the scores.
        qkv_clip: bound of queries, keys and values.
        window: the number of positions that a query sees; None for all.
        dropout: the dropout rate of attention weights.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    decoder_num_heads: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None
    qk_norm_bias: bool | None = None
    scale: float | tuple[float | None, ...] | None = None
    softcap: float | None = None
    qkv_clip: float | None = None
    window: int | tuple[int | None, ...] | None = None
    dropout: float = 0.0

    def completed(self, d_model: int, norm: NormOptions) -> "AttentionOptions":
        """Returns the options with all values that follow from other values."""
        head_dim = d_model // self.num_heads if self.head_dim is None else self.head_dim
        given = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        usual = usual_scale(head_dim)
        heads, kv_heads, bias = self.decoder_num_heads, self.num_kv_heads, self.qk_norm_bias
        return replace(
            self,
            num_kv_heads=self.num_heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            decoder_num_heads=self.num_heads if heads is None else heads,
            qk_norm_bias=norm.bias if bias is None else bias,
            scale=collapse(tuple(usual if scale is None else scale for scale in given)),
            window=collapse(self.window),
        )

    @classmethod
    def of(cls, parts: Parts, norm: NormOptions) -> "AttentionOptions":
        """Returns the options of a model, read from its modules; `norm` has those of other norms.

        Raises:
            ValueError: if attentions differ, or have a part that no checkpoint has.
        """
        every, own = parts.attentions, parts.self_attentions
        for x in every:
            if x.attention_fn not in KERNELS:
                raise ValueError(f"the kernel {x.attention_fn!r} has no name in checkpoints.")
        qk_norm, qk_norm_bias = _qk_norms(every, norm)
        return cls(
            num_heads=own[0].num_heads,
            num_kv_heads=own[0].num_kv_heads,
            head_dim=same("head_dim", [_unusual_head_dim(x) for x in every]),
            decoder_num_heads=parts.stacks[-1].layers[0].self_attention.num_heads,
            qkv_bias=_qkv_bias(every),
            out_bias=same("output biases", [x.bo is not None for x in every]),
            qk_norm=qk_norm,
            qk_norm_bias=qk_norm_bias,
            scale=tuple(x.attention_scale for x in own),
            softcap=same("soft-caps", [x.softcap for x in every]),
            qkv_clip=same("bounds", [x.qkv_clip for x in every]),
            window=tuple(x.window for x in own),
            dropout=same("dropout", [x.attention_dropout_rate for x in every]),
        )

    def pieces(self, d_model: int, norm: NormOptions) -> Pieces:
        """Returns the pieces for the constructor of a model."""
        # Encoder and decoder may differ in the number of heads, and then in the default head size.
        usual_size = (self.head_dim or 0) * self.num_heads == d_model
        return Pieces(
            num_kv_heads=None if self.num_kv_heads == self.num_heads else self.num_kv_heads,
            head_dim=None if usual_size else self.head_dim,
            use_qkv_bias=self.qkv_bias,
            use_out_bias=self.out_bias,
            qk_norm=self._qk_norm(norm),
            softcap=self.softcap,
            qkv_clip=self.qkv_clip,
            attention_dropout_rate=self.dropout,
        )

    def layer_pieces(self, i: int) -> Pieces:
        """Returns the pieces that only layer i has."""
        scale = of_layer(self.scale, i)
        usual = scale == usual_scale(self.head_dim)
        return Pieces(window=of_layer(self.window, i), attention_scale=None if usual else scale)

    def _qk_norm(self, norm: NormOptions) -> Callable | None:
        constructor = norm.constructor(use_bias=self.qk_norm_bias)
        return {
            None: None,
            "head": constructor,
            "per head": partial(PerHeadNorm, constructor),
            "all heads": partial(AllHeadsNorm, constructor),
        }[self.qk_norm]


def usual_scale(head_dim: int | None) -> float:
    """Returns the default factor on the scores, `1 / sqrt(head_dim)`."""
    return (head_dim or 1) ** -0.5


def _unusual_head_dim(x: MultiHeadAttention) -> int | None:
    """Returns the size of heads, or None if it follows from their number."""
    return None if x.head_dim * x.num_heads == x.d_model else x.head_dim


def _qkv_bias(every: list[MultiHeadAttention]) -> bool:
    biases = [(x.bq is not None, x.bk is not None, x.bv is not None) for x in every]
    q, k, v = same("biases", biases)
    if not q == k == v:
        raise ValueError("queries, keys and values differ in having a bias.")
    return q


def _qk_norms(every: list[MultiHeadAttention], norm: NormOptions) -> tuple[str | None, bool | None]:
    """Returns the kind of the norms on queries and keys, and whether they have biases.

    Raises:
        ValueError: if they differ from the other norms in more than the bias.
    """
    norms: list[Any] = [n for x in every for n in (x.q_norm, x.k_norm)]
    kinds = {type(None): None, PerHeadNorm: "per head", AllHeadsNorm: "all heads"}
    kind = same("norms of queries", [kinds.get(type(n), "head") for n in norms])
    if kind is None:
        return None, None
    read = [NormOptions.of(n if kind == "head" else n.norm) for n in norms]
    found = same("norms of queries", read)
    same("norms", [norm, replace(found, bias=norm.bias)])
    return kind, found.bias
