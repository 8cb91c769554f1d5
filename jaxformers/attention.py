"""Attention.

The letters of all shapes in this package, in annotations and einsums alike:

    b batch            n query heads              d width of the residual stream (d_model)
    t query position   g key/value heads          f width inside the feed-forward (d_ff)
    s key position     h features of one head     v vocabulary
    l layer            e expert

and where they are needed: c classes, i inputs and o outputs of any linear map, j features of a
value, k experts of one token, m width of the vectors in an embedding, p rows of a table, r rank of
a weight that is a product, u buckets of distances, y token types, `*b` an optional batch. `axes.py`
reads the annotations of fields.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers import layers
from jaxformers.axes import Letters
from jaxformers.checks import (
    check_accepts,
    check_activations,
    check_flag,
    check_key,
    check_positive,
    check_rate,
    check_same_batch,
    check_size,
)
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.kernels.choice import fast_attention
from jaxformers.kernels.plain import AttentionFunction, attention_weights, mix
from jaxformers.layers import as_module, linear, split_key
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.norms import build_head_norm
from jaxformers.positions.scheme import (
    RotatingPosition,
    acts_as,
)


class KV(NamedTuple):
    """Keys and values per head: of the sequence itself, of an encoder's output, or of a cache."""

    keys: Float[Array, "*b g s h"]
    values: Float[Array, "*b g s h"]


def scaled_dot_product_attention(
    query: Float[Array, "*b t h"],
    keys: Float[Array, "*b s h"],
    values: Float[Array, "*b s j"],
    mask: Mask | None = None,
) -> tuple[Float[Array, "*b t j"], Float[Array, "*b t s"]]:
    """`softmax(query keys^T / sqrt(h)) values` (Vaswani et al. 2017, equation 1).

    Arguments:
        query: `(..., t, h)`.
        keys: `(..., s, h)`.
        values: `(..., s, j)`.
        mask: True where a query may attend, broadcastable to `(..., t, s)`.

    Returns:
        The output `(..., t, j)` and the attention weights `(..., t, s)`, whose rows sum to 1 (to
        0 where a query may attend to nothing).

    Raises:
        ValueError: if shapes do not fit, or the mask is not boolean.

    Example:
        >>> q, k, v = jnp.ones((2, 4, 10, 16)), jnp.ones((2, 4, 12, 16)), jnp.ones((2, 4, 12, 16))
        >>> output, weights = scaled_dot_product_attention(q, k, v)
        >>> output.shape, weights.shape
        ((2, 4, 10, 16), (2, 4, 10, 12))
    """
    for name, x in {"query": query, "keys": keys, "values": values}.items():
        if x.ndim < 2 or x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"query, keys and values must share their leading axes, got {name} {x.shape} "
                f"beside query {query.shape}."
            )
    if query.shape[-1] != keys.shape[-1] or keys.shape[-2] != values.shape[-2]:
        raise ValueError(
            "keys must have the query's features and as many positions as values, got query "
            f"{query.shape}, keys {keys.shape}, values {values.shape}."
        )
    # One head where there is no such axis, so that one body serves both.
    headless = query.ndim == 2
    q, k, v = (x[None] if headless else x for x in (query, keys, values))
    mask = as_mask(mask)
    mask.check(q.shape[:-1] + keys.shape[-2:-1])
    weights = attention_weights(q, k, mask)
    output = mix(weights, v).astype(v.dtype)
    return (output[0], weights[0]) if headless else (output, weights)


class MultiHeadAttention(eqx.Module):
    """Attention by several heads side by side (Vaswani et al. 2017, section 3.2.2).

    `mha(x)` is self-attention, `mha(x, memory)` attends to another sequence. A call is
    `attend(query, project(keys, values))`; whoever caches keys and values uses these two.

    Arguments:
        d_model: width of input and output.
        num_heads: query heads n.
        num_kv_heads: key/value heads g, a divisor of `num_heads`; None is `num_heads`, 1 is
            multi-query attention.
        head_dim: features per head h; None is `d_model / num_heads`.
        use_bias: whether the query, key and value projections have biases.
        use_qkv_bias: the same, in its stead; None follows `use_bias`.
        use_out_bias: the same for the output projection; None follows `use_bias`.
        qk_norm: constructor of a norm on queries and on keys, applied before rotation:
            `qk_norm(head_dim)` for the features of each head, for instance `RMSNorm`; one with a
            parameter `num_heads`, such as `PerHeadNorm`, is told that as well.
        attention_scale: factor on the scores in place of `1 / sqrt(head_dim)`; None is that.
        softcap: c bounds the scores to `c tanh(scores / c)` before anything is hidden (Gemma 2);
            None does not.
        qkv_clip: c bounds queries, keys and values to [-c, c] as they are projected (MPT, OLMo);
            None does not.
        position: a scheme that rotates queries and keys, such as `RotaryPositionalEncoding()`.
        window: a causal query sees the last `window` positions, its own included; others see
            those less than `window` away on both sides; None is all.
        attention_dropout_rate: dropout on the attention weights while training, 0.
        attention_fn: the kernel, a function like `dot_product_attention`; `fast_attention` takes
            the fast one for the machine at hand.
        init: how the weights are drawn. Xavier-uniform by default as in the original
            Transformer's code, with the heads together as the fan, so that a head's initial
            scores do not depend on how many heads there are.
        residual_init: how the output projection is drawn, as `init` unless given.
        key: PRNG key, required.

    Raises:
        ValueError: if a size is not positive, heads do not divide, or there is no key.

    Example:
        >>> mha = MultiHeadAttention(64, 8, key=jax.random.key(0))
        >>> mha(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    wq: Float[Array, "d n h"]
    wk: Float[Array, "d g h"]
    wv: Float[Array, "d g h"]
    wo: Float[Array, "n h d"]
    bq: Float[Array, "n h"] | None
    bk: Float[Array, "g h"] | None
    bv: Float[Array, "g h"] | None
    bo: Float[Array, " d"] | None
    q_norm: Annotated[Callable | None, Letters(d="h")]
    k_norm: Annotated[Callable | None, Letters(d="h", n="g")]
    position: RotatingPosition | None
    attention_fn: Callable = eqx.field(converter=as_module)
    window: int | None = eqx.field(static=True)
    attention_scale: float | None = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True)
    qkv_clip: float | None = eqx.field(static=True)
    attention_dropout_rate: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = True,
        use_qkv_bias: bool | None = None,
        use_out_bias: bool | None = None,
        qk_norm: Callable | None = None,
        attention_scale: float | None = None,
        softcap: float | None = None,
        qkv_clip: float | None = None,
        position: RotatingPosition | None = None,
        window: int | None = None,
        attention_dropout_rate: float = 0.0,
        attention_fn: AttentionFunction = fast_attention,
        init: Initializer = xavier_uniform,
        residual_init: Initializer | None = None,
        key: PRNGKeyArray | None = None,
    ):
        n, g, h = _head_sizes(d_model, num_heads, num_kv_heads, head_dim)
        check_rate(attention_dropout_rate=attention_dropout_rate)
        use_qkv_bias = use_bias if use_qkv_bias is None else use_qkv_bias
        use_out_bias = use_bias if use_out_bias is None else use_out_bias
        check_flag(use_bias=use_bias, use_qkv_bias=use_qkv_bias, use_out_bias=use_out_bias)
        numbers = dict(attention_scale=attention_scale, softcap=softcap, qkv_clip=qkv_clip)
        check_positive(**{name: x for name, x in numbers.items() if x is not None})
        if window is not None:
            check_size(window=window)
        if position is not None and not acts_as(position, RotatingPosition):
            raise ValueError(
                "position= of an attention layer must rotate queries and keys, as "
                f"RotaryPositionalEncoding() does, got {position!r}. Other schemes go to the model."
            )
        if position is not None:  # a scheme that cannot turn heads of this size says so now
            jax.eval_shape(
                position.rotate, jnp.zeros((1, 1, h), jnp.float32), jnp.zeros(1, jnp.int32)
            )
        options = {"softcap": softcap is not None, "dropout": attention_dropout_rate > 0}
        needed = [name for name, is_needed in options.items() if is_needed]
        check_accepts("attention_fn", attention_fn, ["q", "k", "v", "mask"], needed)
        q_key, k_key, v_key, o_key = split_key(check_key(key), 4)
        self.wq = init(q_key, (d_model, n, h), d_model, n * h)
        self.wk = init(k_key, (d_model, g, h), d_model, g * h)
        self.wv = init(v_key, (d_model, g, h), d_model, g * h)
        self.wo = (residual_init or init)(o_key, (n, h, d_model), n * h, d_model)
        self.bq = jnp.zeros((n, h), jnp.float32) if use_qkv_bias else None
        self.bk = jnp.zeros((g, h), jnp.float32) if use_qkv_bias else None
        self.bv = jnp.zeros((g, h), jnp.float32) if use_qkv_bias else None
        self.bo = jnp.zeros(d_model, jnp.float32) if use_out_bias else None
        self.q_norm = build_head_norm(qk_norm, h, n)
        self.k_norm = build_head_norm(qk_norm, h, g)
        self.position = position
        self.window = None if window is None else int(window)
        self.attention_scale = None if attention_scale is None else float(attention_scale)
        self.softcap = None if softcap is None else float(softcap)
        self.qkv_clip = None if qkv_clip is None else float(qkv_clip)
        self.attention_dropout_rate = float(attention_dropout_rate)
        self.attention_fn = attention_fn

    @property
    def d_model(self) -> int:
        return self.wq.shape[0]

    @property
    def num_heads(self) -> int:
        return self.wq.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.wk.shape[1]

    @property
    def head_dim(self) -> int:
        return self.wq.shape[2]

    def __call__(
        self,
        query: Float[Array, "*b t d"],
        keys: Float[Array, "*b s d"] | None = None,
        values: Float[Array, "*b s d"] | None = None,
        mask: Mask | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """What each query position gathers from the keys' positions.

        Arguments:
            query: `(b, t, d_model)`, or `(t, d_model)`.
            keys: the sequence to attend to, `(b, s, d_model)`; None is `query`.
            values: what is gathered, `(b, s, d_model)`; None is `keys`.
            mask: an `AttentionMask`, or booleans (True = may attend) that broadcast to
                `(b, num_heads, t, s)`.
            key: PRNG key for attention dropout while training; None means inference.

        Raises:
            ValueError: if shapes or types do not fit.
        """
        keys = query if keys is None else keys
        values = keys if values is None else values
        for name, x in {"query": query, "keys": keys, "values": values}.items():
            check_activations(x, self.d_model, name)
        check_same_batch(query=query, keys=keys, values=values)
        if keys.shape != values.shape:
            raise ValueError(f"keys and values must agree, got {keys.shape} and {values.shape}.")
        mask = as_mask(mask)
        kv = self.project(keys, values, mask.key_positions(keys.shape[-2]))
        return self.attend(query, kv, mask, key=key)

    def project(
        self,
        keys: Float[Array, "*b s d"],
        values: Float[Array, "*b s d"],
        positions: Int[Array, "*#b s"],
    ) -> KV:
        """Keys (normed, and rotated to their positions) and values, per head."""
        k = self._heads(keys, self.wk, self.bk)
        k = k if self.k_norm is None else self.k_norm(k)
        k = k if self.position is None else self.position.rotate(k, positions)
        v = self._heads(values, self.wv, self.bv)
        return KV(checkpoint_name(k, "keys"), checkpoint_name(v, "values"))

    def attend(
        self,
        query: Float[Array, "*b t d"],
        kv: KV,
        mask: AttentionMask,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """Attention from `query` to projected keys and values."""
        positions = mask.query_positions(query.shape[-2])
        q = self._heads(query, self.wq, self.bq)
        q = q if self.q_norm is None else self.q_norm(q)
        q = q if self.position is None else self.position.rotate(q, positions)
        # Kernels divide by sqrt(h).
        if self.attention_scale is not None:
            q = layers.scaled(q, self.attention_scale * self.head_dim**0.5)
        q = checkpoint_name(q, "queries")
        mask.check(q.shape[:-1] + kv.keys.shape[-2:-1])
        if self.window is not None:
            mask = mask.replace(window=min(self.window, mask.window or self.window))
        rate = self.attention_dropout_rate
        training = key is not None and rate > 0
        options: dict[str, Any] = {}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if training:
            options["dropout"] = partial(layers.dropout, rate=rate, key=key)
        out = self.attention_fn(q, kv.keys, kv.values, mask, **options)
        out = jnp.swapaxes(checkpoint_name(out, "head_outputs"), -2, -3)
        out = out.reshape(*query.shape[:-1], -1)
        return linear(out, self.wo.reshape(-1, self.d_model), self.bo)

    def _heads(self, x: Float[Array, "*b t d"], w, b) -> Float[Array, "*b n t h"]:
        """`x` mapped to one vector per head, with the heads before the positions."""
        y = linear(x, w.reshape(w.shape[0], -1), None if b is None else b.reshape(-1))
        y = y if self.qkv_clip is None else jnp.clip(y, -self.qkv_clip, self.qkv_clip)
        return jnp.swapaxes(y.reshape(*x.shape[:-1], *w.shape[1:]), -2, -3)


def _head_sizes(
    d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """Query heads, key/value heads and head_dim, checked against each other."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_size(d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}."
        )
    if head_dim is None:
        if d_model % num_heads:
            raise ValueError(
                f"d_model must be divisible by num_heads, got {d_model} and {num_heads}. "
                "Change one of them, or pass head_dim."
            )
        head_dim = d_model // num_heads
    check_size(head_dim=head_dim)
    return num_heads, num_kv_heads, head_dim
