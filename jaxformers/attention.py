"""Multi-head attention: projections to heads, a kernel between them, and a projection back.

These are the letters of all shapes in this package, in annotations and einsums alike:

    b batch            n query heads              d width of the residual stream (d_model)
    t query position   g key/value heads          f width inside the feed-forward (d_ff)
    s key position     h features of one head     v vocabulary
    l layer            e expert

A few files need more: c classes, i inputs and o outputs of any linear map, j features of a value,
k experts of one token, m width of the vectors in an embedding, p rows of a table, r rank of a
product of two weights, u buckets of distances, y token types. `*b` is a batch axis that may be
absent. `axes.py` reads the annotations of fields.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.axes import Letters
from jaxformers.checks import (
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
from jaxformers.kernels.plain import AttentionFunction, check_kernel
from jaxformers.layers import as_module, dropout, split_key
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.norms import build_head_norm
from jaxformers.positions.scheme import RotatingPosition, acts_as
from jaxformers.precision import scaled
from jaxformers.sites import site
from jaxformers.weights import Weight, contract, contract_each


class KV(NamedTuple):
    """Keys and values per head: of the sequence itself, of an encoder's output, or of a cache.

    Self-attention, cross-attention and attention with a cache differ in these alone.
    """

    keys: Float[Array, "*b g s h"]
    values: Float[Array, "*b g s h"]


class MultiHeadAttention(eqx.Module):
    """Attention by several heads (Vaswani et al. 2017, section 3.2.2).

    `mha(x)` is self-attention, and `mha(x, memory)` attends to another sequence. A call projects
    queries, keys and values to the heads (`project_all`, or `project_queries` and `project`) and
    then attends from the queries to the others (`attend`). Decoders call these one by one, since a
    cache keeps the projected keys and values.

    Arguments:
        d_model: width of input and output.
        num_heads: query heads n.
        num_kv_heads: key/value heads g, a divisor of `num_heads`, each of which serves n / g query
            heads (Ainslie et al. 2023). None is `num_heads`; 1 is multi-query attention.
        head_dim: features per head h; None is `d_model / num_heads`.
        use_bias: whether the projections have biases, True.
        use_qkv_bias: the same for queries, keys and values alone; None follows `use_bias`.
        use_out_bias: the same for the output projection alone; None follows `use_bias`.
        qk_norm: constructor of a norm on queries and another on keys, applied before rotation. It
            is called `qk_norm(head_dim)`, and as `qk_norm(head_dim=..., num_heads=...)` if it has
            a parameter `num_heads`, as `PerHeadNorm` does. None is no norm.
        attention_scale: factor on the scores; None is `1 / sqrt(head_dim)`.
        softcap: c bounds the scores to `c tanh(scores / c)` before the mask is applied (Gemma 2);
            None does not.
        qkv_clip: c bounds the projected queries, keys and values to [-c, c] (MPT, OLMo); None does
            not.
        position: a scheme that rotates queries and keys, such as `RotaryPositionalEncoding()`;
            None does not rotate.
        window: under a causal mask a query attends to the last `window` positions, its own
            included. Under other masks it attends to those less than `window` away on both sides.
            None does not restrict.
        attention_dropout_rate: dropout on the attention weights while training, 0.
        attention_fn: the kernel, an `AttentionFunction`. The default, `fast_attention`, takes the
            fast kernel for this machine.
        init: how the weights are drawn, Xavier-uniform as in the original Transformer's code. The
            heads are one fan together, so that the initial scores of a head do not depend on the
            number of heads.
        residual_init: how the output projection is drawn; None is `init`.
        key: PRNG key, required.

    Raises:
        ValueError: if a size is not positive, `num_kv_heads` does not divide `num_heads`, a piece
            cannot be used here, or there is no key.

    Example:
        >>> mha = MultiHeadAttention(64, 8, key=jax.random.key(0))
        >>> mha(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    wq: Float[Weight, "d n h"]
    wk: Float[Weight, "d g h"]
    wv: Float[Weight, "d g h"]
    wo: Float[Weight, "n h d"]
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
        check_size(**{} if window is None else {"window": window})
        _check_position(position, h)
        check_kernel(attention_fn, softcap, attention_dropout_rate)
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
        """Returns attention from the positions of `query` to those of `keys`, `(b, t, d_model)`.

        Arguments:
            query: `(b, t, d_model)`, or `(t, d_model)`.
            keys: the sequence to attend to, `(b, s, d_model)`; None is `query`.
            values: the sequence that the values are made of, `(b, s, d_model)`; None is `keys`.
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
        at, to = mask.query_positions(query.shape[-2]), mask.key_positions(keys.shape[-2])
        if keys is query and values is query:
            return self.attend(*self.project_all(query, at, to), mask, key=key)
        kv = self.project(keys, values, to)
        return self.attend(self.project_queries(query, at), kv, mask, key=key)

    def project_all(
        self,
        x: Float[Array, "*b t d"],
        positions: Int[Array, "*#b t"],
        key_positions: Int[Array, "*#b t"],
    ) -> tuple[Float[Array, "*b n t h"], KV]:
        """Returns queries, keys and values of one sequence, as self-attention needs them."""
        q, k, v = contract_each(x, (self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv))
        return self._queries(q, positions), self._kv(k, v, key_positions)

    def project_queries(
        self, query: Float[Array, "*b t d"], positions: Int[Array, "*#b t"]
    ) -> Float[Array, "*b n t h"]:
        """Returns queries, normed, rotated to their positions and scaled, per head."""
        return self._queries(contract(query, self.wq, self.bq), positions)

    def project(
        self,
        keys: Float[Array, "*b s d"],
        values: Float[Array, "*b s d"],
        positions: Int[Array, "*#b s"],
    ) -> KV:
        """Returns keys, normed and rotated to their positions, and values, per head."""
        k = contract(keys, self.wk, self.bk)
        return self._kv(k, contract(values, self.wv, self.bv), positions)

    def attend(
        self,
        q: Float[Array, "*b n t h"],
        kv: KV,
        mask: AttentionMask,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns attention from projected queries to projected keys and values."""
        mask.check(q.shape[:-1] + kv.keys.shape[-2:-1])
        if self.window is not None:
            mask = mask.replace(window=min(self.window, mask.window or self.window))
        rate = self.attention_dropout_rate
        training = key is not None and rate > 0
        dropped = partial(dropout, rate=rate, key=key) if training else None
        out = self.attention_fn(q, kv.keys, kv.values, mask, softcap=self.softcap, dropout=dropped)
        out = jnp.swapaxes(site(out, "head_outputs"), -2, -3)
        return contract(out, self.wo, self.bo, inputs=2)

    def _queries(
        self, q: Float[Array, "*b t n h"], positions: Int[Array, "*#b t"]
    ) -> Float[Array, "*b n t h"]:
        """Returns queries, from their projection: normed, rotated and scaled, per head."""
        q = self._heads(q)
        q = q if self.q_norm is None else self.q_norm(q)
        q = q if self.position is None else self.position.rotate(q, positions)
        if self.attention_scale is not None:  # kernels divide by sqrt(h)
            q = scaled(q, self.attention_scale * self.head_dim**0.5)
        return site(q, "queries")

    def _kv(
        self,
        k: Float[Array, "*b s g h"],
        v: Float[Array, "*b s g h"],
        positions: Int[Array, "*#b s"],
    ) -> KV:
        """Returns keys, normed and rotated, and values, per head, from their projections."""
        k, v = self._heads(k), self._heads(v)
        k = k if self.k_norm is None else self.k_norm(k)
        k = k if self.position is None else self.position.rotate(k, positions)
        return KV(site(k, "keys"), site(v, "values"))

    def _heads(self, y: Float[Array, "*b t n h"]) -> Float[Array, "*b n t h"]:
        """Returns a projection within `qkv_clip`, with heads before positions."""
        y = y if self.qkv_clip is None else jnp.clip(y, -self.qkv_clip, self.qkv_clip)
        return jnp.swapaxes(y, -2, -3)


def _check_position(position: RotatingPosition | None, head_dim: int) -> None:
    """Checks that a scheme rotates heads of this size."""
    if position is None:
        return
    if not acts_as(position, RotatingPosition):
        raise ValueError(
            "position= of an attention layer must rotate queries and keys, as "
            f"RotaryPositionalEncoding() does, got {position!r}. Other schemes go to the model."
        )
    try:
        hash(position)
    except TypeError:  # it has arrays
        _try_rotation.__wrapped__(position, head_dim)
    else:
        _try_rotation(position, head_dim)


@lru_cache(maxsize=128)  # layers are many, and most have the same scheme
def _try_rotation(position: RotatingPosition, head_dim: int) -> None:
    """Raises the error of a scheme that cannot rotate heads of this size."""
    heads = jax.ShapeDtypeStruct((1, 1, head_dim), jnp.float32)
    jax.eval_shape(position.rotate, heads, jax.ShapeDtypeStruct((1,), jnp.int32))


def _head_sizes(
    d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """Returns n, g and h, after checking them against each other."""
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
