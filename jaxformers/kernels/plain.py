"""The plain form of attention, which makes all scores at once; the other kernels are held to it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxformers.masks import AttentionMask, Mask, as_mask

# What `attention_fn=` takes: a function `(q, k, v, mask) -> outputs` of the shapes of
# `dot_product_attention` that divides the scores by sqrt(h). Where an attention has a `softcap`, it
# is also passed that, and while training with attention dropout `dropout`, a function on the
# weights; a kernel without them need not take them.
AttentionFunction = Callable[..., Array]


def check_inputs(q: Array, k: Array, v: Array) -> None:
    """Raise unless queries, keys and values fit together."""
    same_batch = q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
    pairs = k.shape[-3:-1] == v.shape[-3:-1] and q.shape[-1] == k.shape[-1]
    if min(q.ndim, k.ndim, v.ndim) < 3 or not (same_batch and pairs) or q.shape[-3] % k.shape[-3]:
        raise ValueError(
            "attention takes queries (b, n, t, h), keys and values (b, g, s, h) with g a divisor "
            f"of n, got {q.shape}, {k.shape} and {v.shape}."
        )


def match(q: Float[Array, "*b n t h"], k: Float[Array, "*b g s h"]) -> Float[Array, "*b n t s"]:
    """`q k^T` in float32, with each of the g key heads beside n / g query heads.

    Ainslie et al. 2023 (grouped queries).
    """
    *batch, n, t, h = q.shape
    g, s = k.shape[-3:-1]
    # The queries of a group are folded into t, so that shared keys are read once, not repeated.
    grouped = q.reshape(*batch, g, n // g * t, h)
    scores = jnp.einsum("...gth,...gsh->...gts", grouped, k, preferred_element_type=jnp.float32)
    return scores.reshape(*batch, n, t, s)


def mix(weights: Float[Array, "*b n t s"], v: Float[Array, "*b g s h"]) -> Float[Array, "*b n t h"]:
    """The values summed by the weights, in float32."""
    *batch, n, t, s = weights.shape
    g, h = v.shape[-3], v.shape[-1]
    grouped = weights.astype(v.dtype).reshape(*batch, g, n // g * t, s)
    mixed = jnp.einsum("...gts,...gsh->...gth", grouped, v, preferred_element_type=jnp.float32)
    return mixed.reshape(*batch, n, t, h)


def attention_scores(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    mask: AttentionMask,
    softcap: float | None = None,
) -> tuple[Float[Array, "*b n t s"], Bool[Array, "..."] | None]:
    """`q k^T / sqrt(h)` in float32, the lowest number where nothing may be seen; and where it may.

    With a soft-cap c the scores are `c tanh(scores / c)` (Gemma 2).
    """
    n, t, h = q.shape[-3:]
    s = k.shape[-2]
    scores = match(q * h**-0.5, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    bias, allowed = mask.score_bias(t, s, n), mask.materialize(t, s)
    scores = scores if bias is None else scores + bias
    if allowed is not None:
        # The lowest number rather than -inf, which would make a row without any key NaN.
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    return scores, allowed


def attention_weights(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    mask: AttentionMask,
    softcap: float | None = None,
) -> Float[Array, "*b n t s"]:
    """`softmax(q k^T / sqrt(h))` in float32; a query that may attend to nothing gets zeros."""
    scores, allowed = attention_scores(q, k, mask, softcap)
    weights = jax.nn.softmax(scores)
    return weights if allowed is None else jnp.where(allowed.any(-1, keepdims=True), weights, 0.0)


def dot_product_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "*b n t h"]:
    """The plain form of attention: it makes all `t x s` scores, and differentiates in any mode.

    Arguments:
        q: queries, `(b, n, t, h)`.
        k, v: keys and values, `(b, g, s, h)`; g divides n.
        mask: an `AttentionMask`, booleans that broadcast to `(b, n, t, s)`, or None.
        softcap: bound of the scores, as in `MultiHeadAttention`.
        dropout: applied to the weights.

    Returns:
        `(b, n, t, h)`.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> q, k = jnp.ones((2, 8, 5, 4)), jnp.ones((2, 2, 5, 4))
        >>> dot_product_attention(q, k, k, AttentionMask(causal=True)).shape
        (2, 8, 5, 4)
    """
    check_inputs(q, k, v)
    mask = as_mask(mask)
    weights = checkpoint_name(dropout(attention_weights(q, k, mask, softcap)), "attention_weights")
    return mix(weights, v).astype(v.dtype)
