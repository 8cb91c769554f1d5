"""Attention for some queries at a time, each block of them with the keys it can see."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.checks import check_size
from jaxformers.kernels.plain import attention_scores, check_inputs, mix
from jaxformers.masks import Mask, as_mask

# Queries at a time. On a CPU their scores stay in its cache.
BLOCK = 128


def exponentials(
    scores: Float[Array, "*b t s"], top: Float[Array, "*b t 1"]
) -> Float[Array, "*b t s"]:
    """`exp(scores - top)`; 0 in the rows where nothing may be seen, whose top is the lowest."""
    return jnp.exp(scores - jnp.maximum(top, jnp.finfo(top.dtype).min / 2))


def divide(out: Float[Array, "*b t h"], total: Float[Array, "*b t 1"]) -> Float[Array, "*b t h"]:
    """`out / total`, and zeros for the rows that saw nothing."""
    return out / jnp.where(total == 0, 1.0, total)


def blockwise_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "*b n t h"]:
    """Attention for a block of queries at a time: half the work where it is causal.

    Sums are divided once the values are mixed, on h numbers per query in place of s. Nothing here
    has a gradient of its own, so that it differentiates in any mode; for its backward pass the
    exponentials of all blocks are kept, which for long sequences is too much.

    Arguments and result are those of `dot_product_attention`, without dropout, and

        block: how many queries are looked at together, 128.

    Example:
        >>> q, k = jnp.ones((2, 8, 300, 4)), jnp.ones((2, 2, 300, 4))
        >>> blockwise_attention(q, k, k, AttentionMask(causal=True)).shape
        (2, 8, 300, 4)
    """
    check_inputs(q, k, v)
    check_size(block=block)
    mask, t, s = as_mask(mask), q.shape[-2], k.shape[-2]
    parts = []
    for start in range(0, t, block):
        stop = min(start + block, t)
        first, last = mask.reach(start, stop, s)
        keys, values = k[..., first:last, :], v[..., first:last, :]
        part = mask.block(start, stop - start, first, last - first)
        scores, _ = attention_scores(q[..., start:stop, :], keys, part, softcap)
        # Softmax is the same whatever is subtracted, so the gradient need not go through it.
        top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = exponentials(scores, top)
        out = divide(mix(weights, values), weights.sum(-1, keepdims=True))
        parts.append(out.astype(v.dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)
