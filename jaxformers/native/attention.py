"""Attention of few queries to many keys as one operation in C, as in decoding."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformers.kernels.plain import check_inputs, dot_product_attention, refuse_dropout
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.native import library
from jaxformers.native.operation import is_fixed, is_spread, operation

FEW = 16  # queries; with more, the products of XLA are faster
MOST_FEATURES = 512  # of a head


class _Given:
    """A bias that is an array."""

    def __init__(self, x: Float[Array, "*b n t s"]):
        self.x = x

    def bias(self, *_: Any) -> Float[Array, "*b n t s"]:
        return self.x


def _plain(
    q: Float[Array, "b n t h"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    allowed: Bool[Array, "..."],
    bias: Float[Array, "..."],
    *,
    heads: int,
    softcap: float,
) -> Float[Array, "b n t j"]:
    given: Any = _Given(bias) if bias.size else None
    mask = AttentionMask(explicit=allowed, bias=given)
    k, v = (x.reshape(q.shape[0], heads, allowed.shape[-1], x.shape[-1]) for x in (k, v))
    out = dot_product_attention(q, k, v, mask, softcap=softcap or None)
    return out.astype(q.dtype)


def _shape(
    q: Any, k: Any, v: Any, allowed: Any, bias: Any, heads: int, softcap: float
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)


_attend = operation("attend", _plain, _shape)


def native_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Any = None,
) -> Float[Array, "*b n t h"]:
    """Returns attention that one call of C computes; few queries and many keys.

    It reads only those keys that some query may attend to. `obstacle_to_native` says where it
    cannot run. Under `vmap` and under differentiation it is `dot_product_attention`.

    The arguments and the result are those of `dot_product_attention`.
    """
    check_inputs(q, k, v)
    refuse_dropout("native_attention", dropout)
    mask, (n, t), s = as_mask(mask), q.shape[-3:-1], k.shape[-2]
    allowed, bias = mask.materialize(t, s), mask.score_bias(t, s, n)
    allowed = jnp.ones((1, s), jnp.bool_) if allowed is None else allowed
    bias = (
        jnp.zeros((1, 1, 1, 0), jnp.float32)
        if bias is None
        else _four_axes(bias.astype(jnp.float32), s)
    )
    numbers = {"heads": k.shape[-3], "softcap": float(softcap or 0)}
    kv = (_without_ones(x) for x in (k, v))
    out = _attend(q if q.ndim == 4 else q[None], *kv, _four_axes(allowed, s), bias, **numbers)
    return out.reshape(*q.shape[:-1], v.shape[-1])


def obstacle_to_native(q: Any, k: Any, v: Any) -> str | None:
    """Returns why `native_attention` cannot be used for such arrays, or None if it can."""
    types = q.dtype, k.dtype, v.dtype
    if types not in ((jnp.float32,) * 3, (jnp.bfloat16,) * 3):
        return f"no C call, since it takes float32 or bfloat16, not {q.dtype} and {k.dtype}"
    few_axes = len(q.shape) <= 4 and is_fixed(q, k, v)
    if not few_axes or q.shape[-1] > MOST_FEATURES or 0 in (*q.shape, *k.shape):
        return f"no C call for the shapes {q.shape} and {k.shape}"
    if any(map(is_spread, (q, k, v))):
        return "no C call, since the arrays are spread over devices"
    missing = library.obstacle()
    return None if missing is None else f"no C call, since {missing}"


def _without_ones(x: Array) -> Array:
    """Returns an array without axes of size 1, the last one excepted, as loops carry it."""
    return x.reshape(*(n for n in x.shape[:-1] if n > 1), x.shape[-1])


def _four_axes(x: Array, s: int) -> Array:
    """Returns an array with four axes, of which the last one has its full length."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x if x.shape[-1] == s else jnp.broadcast_to(x, (*x.shape[:-1], s))
