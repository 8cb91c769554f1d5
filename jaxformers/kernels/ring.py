"""Attention over a mesh that divides the positions of rows.

Keys and values travel in a ring from device to device while the queries stay (Liu et al. 2023, Ring
Attention). Each device computes `flash_attention` of its queries and the keys that have just come,
and adds up the results. The gradient travels once more around the ring, with the gradients of keys
and values beside them. No device ever has all keys.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxformers.kernels.flash import Blocks, _backward, _forward, _visible
from jaxformers.kernels.plain import check_inputs, refuse_dropout
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.sharding.mesh import SEQUENCE, divides_positions, traced_mesh


def can_travel(q: Array, k: Array, dropout: Any) -> bool:
    """Returns whether attention can be computed in a ring: each device has as many positions."""
    if dropout is not None or q.ndim != 4 or not divides_positions(q):
        return False
    size = traced_mesh(q).shape[SEQUENCE]
    return q.shape[-2] % size == 0 and k.shape[-2] % size == 0


def ring_attention(
    q: Float[Array, "b n t h"],
    k: Float[Array, "b g s h"],
    v: Float[Array, "b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
    blocks: tuple[int, int] = (256, 512),
) -> Float[Array, "b n t h"]:
    """Returns attention between positions that are divided over the mesh axis "sequence".

    The arguments and the result are those of `flash_attention`, and so is what it can be
    differentiated by. The arrays must be traced, and lie on a mesh with that axis.

    Raises:
        ValueError: if there is no such mesh, its size does not divide the positions, or there is
            dropout.
    """
    check_inputs(q, k, v)
    refuse_dropout("ring_attention", dropout)
    if not can_travel(q, k, None):
        raise ValueError(
            "ring_attention needs a mesh with an axis 'sequence' whose size divides the numbers of "
            f"queries and keys, got {q.shape[-2]} and {k.shape[-2]}. Use flash_attention."
        )
    mesh, t, s = traced_mesh(q), q.shape[-2], k.shape[-2]
    mask = as_mask(mask)
    mask = mask.replace(q_positions=mask.query_positions(t), k_positions=mask.key_positions(s))
    heads = PartitionSpec(None, None, SEQUENCE)
    arrays, rest = eqx.partition(mask, eqx.is_array)
    of_mask = jax.tree_util.tree_map_with_path(_place, arrays)
    size = mesh.shape[SEQUENCE]
    sizes = blocks_of(t // size, s // size, blocks)
    return jax.shard_map(
        lambda q, k, v, arrays: _ring((q, k, v, eqx.combine(arrays, rest)), softcap, sizes, size),
        mesh=mesh,
        in_specs=(heads, heads, heads, of_mask),
        out_specs=heads,
        axis_names={SEQUENCE},
        check_vma=False,
    )(q, k, v, arrays)


def _place(path: tuple, x: Array) -> PartitionSpec:
    """Returns how an array of a mask is divided: by the queries or the keys that travel."""
    if path[0].name == "explicit":
        divided = x.ndim > 1 and x.shape[-2] > 1
        return PartitionSpec(*(None,) * (x.ndim - 2), SEQUENCE) if divided else PartitionSpec()
    if path[0].name == "bias":
        return PartitionSpec()
    return PartitionSpec(*(None,) * (x.ndim - 1), SEQUENCE)


def blocks_of(t: int, s: int, blocks: tuple[int, int]) -> Blocks:
    """Returns the sizes of the blocks of a device's queries and keys.

    No block has positions of both halves, which are far apart in zigzag order. So blocks that are
    hidden whole are skipped in both.
    """
    t, s = (size // 2 if size % 2 == 0 else size for size in (t, s))
    return Blocks(_divisor(t, blocks[0]), _divisor(s, blocks[1]))


def _divisor(number: int, limit: int) -> int:
    """Returns the largest size of equal blocks up to a limit."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


@eqx.filter_custom_vjp
def _ring(inputs: Any, softcap: float | None, sizes: Blocks, size: int) -> Array:
    return _around(inputs, softcap, sizes, size)[0]


@_ring.def_fwd
def _ring_forward(perturbed, inputs, softcap, sizes, size):
    out, log_total = _around(inputs, softcap, sizes, size)
    return out, (out, log_total)


@_ring.def_bwd
def _ring_backward(residuals, gradient, perturbed, inputs, softcap, sizes, size):
    q, k, v, mask = inputs
    bias = eqx.filter(mask, eqx.is_inexact_array)

    def see(i, carry):
        (k, v, of_keys, d_k, d_v), d_q, d_mask = carry
        here = q, k, v, _block_of(mask, of_keys, i, size)
        more_q, more_k, more_v, more = _backward(
            here, *residuals, _seen(here, sizes), gradient, softcap, sizes
        )
        d_mask = jax.tree.map(jnp.add, d_mask, more)
        d_k, d_v = d_k + more_k.astype(jnp.float32), d_v + more_v.astype(jnp.float32)
        travelled = _pass_on((k, v, of_keys, d_k, d_v), size)
        return travelled, d_q + more_q.astype(jnp.float32), d_mask

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v, q)]
    start = (k, v, _of_keys(mask), *zeros[:2]), zeros[2], jax.tree.map(jnp.zeros_like, bias)
    (_, _, _, d_k, d_v), d_q, d_mask = lax.fori_loop(0, size, see, start)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_mask


def _around(inputs, softcap, sizes, size):
    """Returns the outputs, and the log of each query's sum of exponentials."""
    q, k, v, mask = inputs

    def see(i, carry):
        (k, v, of_keys), out, log_total = carry
        new, new_log, _ = _forward((q, k, v, _block_of(mask, of_keys, i, size)), softcap, sizes)
        new_log = jnp.where(new_log == jnp.inf, -jnp.inf, new_log)  # no key was seen
        total = jnp.logaddexp(log_total, new_log)
        safe = jnp.where(total == -jnp.inf, 0.0, total)
        out = out * jnp.exp(log_total - safe) + new.astype(jnp.float32) * jnp.exp(new_log - safe)
        return _pass_on((k, v, of_keys), size), out, total

    nothing = jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32)
    lowest = jnp.full((*q.shape[:-1], 1), -jnp.inf, jnp.float32)
    _, out, total = lax.fori_loop(0, size, see, ((k, v, _of_keys(mask)), nothing, lowest))
    return out.astype(v.dtype), jnp.where(total == -jnp.inf, jnp.inf, total)


def _of_keys(mask: AttentionMask) -> tuple[Array | None, Array | None]:
    return mask.k_positions, mask.k_segments


def _pass_on(tree: Any, size: int) -> Any:
    """Returns what the device before has."""
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, ring), tree)


def _block_of(mask: AttentionMask, of_keys: tuple, i: Any, size: int) -> AttentionMask:
    """Returns the mask of this device's queries and the keys that are here in turn i."""
    explicit = mask.explicit
    if explicit is not None and explicit.shape[-1] > 1:
        part = explicit.shape[-1] // size
        owner = (lax.axis_index(SEQUENCE) - i) % size
        explicit = lax.dynamic_slice_in_dim(explicit, owner * part, part, axis=-1)
    return mask.replace(k_positions=of_keys[0], k_segments=of_keys[1], explicit=explicit)


def _seen(inputs, sizes):
    """Returns which blocks of keys the queries see."""
    q, k, _, mask = inputs
    return _visible(mask, q.shape[-2], k.shape[-2], sizes)
