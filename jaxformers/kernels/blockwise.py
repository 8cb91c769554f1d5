"""Attention for one block of queries at a time, with the keys that the block may attend to."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.checks import check_size
from jaxformers.kernels.plain import attention_scores, check_inputs, mix, refuse_dropout
from jaxformers.masks import Mask, as_mask

# Queries at a time. On a CPU their scores stay in its cache.
BLOCK = 128


def exponentials(
    scores: Float[Array, "*b t s"], top: Float[Array, "*b t 1"]
) -> Float[Array, "*b t s"]:
    """Returns `exp(scores - top)`, and 0 in rows without any key, whose top is the lowest."""
    return jnp.exp(scores - jnp.maximum(top, jnp.finfo(top.dtype).min / 2))


def divide(out: Float[Array, "*b t h"], total: Float[Array, "*b t 1"]) -> Float[Array, "*b t h"]:
    """Returns `out / total`, and zeros for the rows without any key."""
    return out / jnp.where(total == 0, 1.0, total)


def blockwise_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
    block: int = BLOCK,
) -> Float[Array, "*b n t h"]:
    """Returns attention that is computed for one block of queries at a time.

    A causal mask halves the work, since a block only reads the keys up to its end. The sums are
    divided after the values are mixed: h divisions per query in place of s. It differentiates in
    any mode. The backward pass keeps the exponentials of all blocks, which is too much for long
    sequences.

    The arguments and the result are those of `dot_product_attention`, and

        block: how many queries are in a block, 128.

    Raises:
        ValueError: if the shapes do not fit together, or there is dropout.

    Example:
        >>> q, k = jnp.ones((2, 8, 300, 4)), jnp.ones((2, 2, 300, 4))
        >>> blockwise_attention(q, k, k, AttentionMask(causal=True)).shape
        (2, 8, 300, 4)
    """
    check_inputs(q, k, v)
    refuse_dropout("blockwise_attention", dropout)
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
