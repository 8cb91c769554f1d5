"""Attention that never holds more scores than those of one block of queries and one of keys.

Rabe and Staats 2021; Dao et al. 2022 (FlashAttention), with the gradient of its appendix B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformers.checks import check_size
from jaxformers.kernels.blockwise import divide, exponentials
from jaxformers.kernels.plain import attention_scores, check_inputs, match, mix, refuse_dropout
from jaxformers.masks import AttentionMask, Mask, as_mask


class Blocks(NamedTuple):
    """The numbers of queries and keys in a block."""

    queries: int
    keys: int


def flash_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
    blocks: tuple[int, int] = (256, 512),
) -> Float[Array, "*b n t h"]:
    """Returns attention that needs memory linear in the sequence, forward and backward.

    Blocks in which no query may attend to a key are skipped. The backward pass computes the scores
    again. The function has a gradient of its own. JAX can therefore differentiate it in reverse
    mode, and in forward mode over that (`jax.hessian`), but neither in forward mode alone
    (`jax.jvp`) nor in reverse mode twice. `dot_product_attention` allows both.

    The arguments and the result are those of `dot_product_attention`, and

        blocks: how many queries and how many keys are in a block, 256 and 512.

    Raises:
        ValueError: if the shapes do not fit together, or there is dropout.

    Example:
        >>> q, k = jnp.ones((2, 8, 300, 4)), jnp.ones((2, 2, 300, 4))
        >>> flash_attention(q, k, k, AttentionMask(causal=True)).shape
        (2, 8, 300, 4)
    """
    check_inputs(q, k, v)
    refuse_dropout("flash_attention", dropout)
    mask, (block_q, block_k) = as_mask(mask), blocks
    check_size(queries_in_a_block=block_q, keys_in_a_block=block_k)
    t, s = q.shape[-2], k.shape[-2]
    sizes = Blocks(min(block_q, t), min(block_k, s))
    more_q, more_k = -t % sizes.queries, -s % sizes.keys
    padded = _pad(q, more_q), _pad(k, more_k), _pad(v, more_k), mask.pad(t, more_q, s, more_k)
    return _flash(padded, softcap, sizes)[..., :t, :]


@eqx.filter_custom_vjp
def _flash(inputs: Any, softcap: float | None, sizes: Blocks) -> Float[Array, "*b n t h"]:
    return _forward(inputs, softcap, sizes)[0]


@_flash.def_fwd
def _flash_forward(perturbed, inputs, softcap, sizes):
    # Rematerialization that keeps these does not run any of this again.
    kept = partial(checkpoint_name, name="head_outputs")
    out, *rest = jax.tree.map(kept, _forward(inputs, softcap, sizes))
    return out, (out, *rest)


@_flash.def_bwd
def _flash_backward(residuals, gradient, perturbed, inputs, softcap, sizes):
    return _backward(inputs, *residuals, gradient, softcap, sizes)


def _forward(inputs, softcap, sizes):
    """Returns the outputs, the log of each query's sum of exponentials, and the visible blocks."""
    q, k, v, mask = inputs
    rows = *q.shape[:-2], sizes.queries
    # A hidden score is twice this number, so that its exponential is 0.
    lowest = jnp.full((*rows, 1), jnp.finfo(jnp.float32).min / 2, jnp.float32)
    empty = lowest, _zeros(*rows, 1), _zeros(*rows, v.shape[-1])
    visible = _visible(mask, q.shape[-2], k.shape[-2], sizes)

    def for_queries(_, now):
        i, (first, last) = now
        queries = _part(q, i, sizes.queries)

        def see(j, carry):
            top, total, out = carry
            block = _block(mask, i, j, sizes)
            scores, _ = attention_scores(queries, _part(k, j, sizes.keys), block, softcap)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = exponentials(scores, new_top), jnp.exp(top - new_top)
            mixed = mix(weights, _part(v, j, sizes.keys))
            return new_top, total * shrink + weights.sum(-1, keepdims=True), out * shrink + mixed

        top, total, out = lax.fori_loop(first, last, see, empty)
        # A query without any key has no weights in the backward pass either.
        log_total = jnp.where(total == 0, jnp.inf, top + jnp.log(total))
        return None, (divide(out, total).astype(v.dtype), log_total)

    _, parts = lax.scan(for_queries, None, (jnp.arange(len(visible[0])), visible))
    return *map(_join, parts), visible


def _backward(inputs, out, log_total, visible, gradient, softcap, sizes):
    """Returns the gradients of queries, keys, values and the arrays of the mask's bias."""
    q, k, v, mask = inputs
    gradient = gradient.astype(jnp.float32)
    delta = (gradient * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def for_queries(carry, now):
        i, (first, last) = now
        queries, *given = (_part(x, i, sizes.queries) for x in (q, gradient, delta, log_total))

        def see(j, carry):
            d_queries, d_k, d_v, d_mask = carry
            keys, values = _part(k, j, sizes.keys), _part(v, j, sizes.keys)
            inputs = queries, keys, values, _block(mask, i, j, sizes)
            d = eqx.filter_grad(_surrogate)(inputs, *given, softcap)
            d_mask = jax.tree.map(lambda x, y: x + y.astype(jnp.float32), d_mask, d[3])
            d_queries = d_queries + d[0].astype(jnp.float32)
            return d_queries, _add(d_k, d[1], j), _add(d_v, d[2], j), d_mask

        start = _zeros(*queries.shape), *carry
        d_queries, *carry = lax.fori_loop(first, last, see, start)
        return tuple(carry), d_queries

    bias = eqx.filter(mask, eqx.is_inexact_array)  # nothing else in a mask has a gradient
    d_mask = jax.tree.map(lambda x: _zeros(*x.shape), bias)
    start = _zeros(*k.shape), _zeros(*v.shape), d_mask
    now = jnp.arange(len(visible[0])), visible
    (d_k, d_v, d_mask), d_q = lax.scan(for_queries, start, now)
    d_mask = jax.tree.map(lambda x, old: x.astype(old.dtype), d_mask, bias)
    return _join(d_q).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_mask


def _surrogate(inputs, gradient, delta, log_total, softcap):
    """Returns a number whose gradient is that of the attention, for one block.

    With weights p and the outputs' gradient g, the gradient of the scores is p (g v^T - delta) and
    that of the values is p^T g. Differentiating this number gives both, and carries the first on
    to the arrays that the scores are made of.
    """
    queries, keys, values, block = inputs
    scores, _ = attention_scores(queries, keys, block, softcap)
    weights = jnp.exp(scores - log_total)
    return (weights * (match(gradient, values.astype(jnp.float32)) - delta)).sum()


def _visible(mask: AttentionMask, t: int, s: int, sizes: Blocks) -> tuple[Any, Any]:
    """Returns the first visible block of keys of each block of queries, and one past the last."""
    i, j = jnp.arange(t // sizes.queries), jnp.arange(s // sizes.keys)

    def seen(i, j):
        allowed = _block(mask, i, j, sizes).materialize(*sizes)
        return jnp.array(True) if allowed is None else allowed.any((-1, -2))

    seen_by = lax.map(lambda i: lax.map(lambda j: seen(i, j), j), i)
    # Rows and heads are reduced last: if they are spread over devices, this step communicates.
    seen_by = seen_by.any(range(2, seen_by.ndim))
    first, last = (jnp.where(seen_by, x, y) for x, y in ((j, len(j)), (j + 1, 0)))
    return first.min(1), last.max(1)


def _zeros(*shape: int) -> Float[Array, "..."]:
    return jnp.zeros(shape, jnp.float32)  # in 64-bit mode as well


def _block(mask: AttentionMask, i: Any, j: Any, sizes: Blocks) -> AttentionMask:
    return mask.block(i * sizes.queries, sizes.queries, j * sizes.keys, sizes.keys)


def _part(x: Float[Array, "*b t h"], i: Any, size: int) -> Float[Array, "*b {size} h"]:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=-2)


def _add(x: Float[Array, "*b t h"], part: Float[Array, "*b p h"], i: Any) -> Any:
    """Returns `x` with the part added at block i."""
    size = part.shape[-2]
    changed = _part(x, i, size) + part.astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, changed, i * size, axis=-2)


def _join(parts: Float[Array, "c *b t h"]) -> Float[Array, "*b u h"]:
    """Returns the blocks that a scan has stacked, concatenated."""
    parts = jnp.moveaxis(parts, 0, -3)
    return parts.reshape(*parts.shape[:-3], -1, parts.shape[-1])


def _pad(x: Float[Array, "*b t h"], more: int) -> Float[Array, "*b u h"]:
    widths = [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]
    return jnp.pad(x, widths) if more else x
