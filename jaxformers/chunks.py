"""Rows of hidden states in chunks, so that their logits are never all in memory at once."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxformers.sharding.mesh import divides_positions, sizes_of, traced_mesh
from jaxformers.sharding.rules import parts_of
from jaxformers.sites import is_recording

# The number of logits in a chunk: 128 MiB in float32 on a CPU, 1 GiB on accelerators, which need
# more work at a time. With fewer than `CHUNK_ROWS` rows, adding up the gradient of the weights
# costs too much time (on CPU 8 % with 256 rows, 18 % with 128). Up to two chunks are computed at
# once, because that needs no more memory than one chunk.
CHUNK_LOGITS = {"cpu": 2**25}
CHUNK_LOGITS_ELSEWHERE = 2**28
CHUNK_ROWS = 512


def chunk_for(hidden: Array, logits: jax.ShapeDtypeStruct) -> int:
    """Returns how many rows are a chunk: all of them if they need no chunks.

    Arguments:
        hidden: the hidden states, which may lie on a mesh.
        logits: the shape of their logits.
    """
    *shape, vocab_size = logits.shape
    if is_recording():  # no value can leave a loop
        return prod(shape)
    devices = _devices(logits.shape, traced_mesh(hidden))
    limit = CHUNK_LOGITS.get(jax.default_backend(), CHUNK_LOGITS_ELSEWHERE)
    return choose_chunk(prod(shape), vocab_size, devices, limit)


def choose_chunk(rows: int, vocab_size: int, devices: int, limit: int) -> int:
    """Returns how many rows are a chunk, of which each device computes at most `limit` logits.

    For each chunk the gradient of the weights is added up over all devices. So chunks are as large
    as the memory of all devices allows.
    """
    chunk = devices * max(limit // vocab_size, CHUNK_ROWS)
    return chunk if rows > 2 * chunk else rows


def split(
    hidden: Array, targets: Array, counted: Bool[Array, "*n"], chunks: int
) -> tuple[list[Array], Callable[[Array], Array]]:
    """Returns these in chunks along a new leading axis, and a function that undoes it.

    Each chunk takes every `chunks`-th row, so that a batch over many devices stays spread.

    Arguments:
        hidden: hidden states, `(b, t, d)` or `(t, d)`.
        targets, counted: the target of each row, and whether it counts.
        chunks: the least number of chunks.

    Returns:
        The three arrays in chunks; and a function of an array with one number for each row in
        chunks, which returns them in the shape of `targets`.
    """
    of_rows = hidden, targets, counted
    shape, rows = counted.shape, counted.size
    if counted.ndim == 2 and divides_positions(hidden):
        parts = split_of(shape, chunks, sizes_of(traced_mesh(hidden)))
        return [_split_both(x, *parts) for x in of_rows], lambda x: _join_both(x, shape, *parts)

    def take(x: Array) -> Array:
        x = x.reshape(rows, *x.shape[counted.ndim :])
        # The rows that fill up the last chunk do not count. They are copies, so they are finite
        # if the others are.
        x = jnp.concatenate([x, jax.lax.stop_gradient(x[: -rows % chunks])])
        return jnp.swapaxes(x.reshape(-1, chunks, *x.shape[1:]), 0, 1)

    def join(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(-1)[:rows].reshape(shape)

    hidden, targets, counted = map(take, of_rows)
    real = (jnp.arange(counted.size) < rows).reshape(-1, chunks)
    return [hidden, targets, counted & jnp.swapaxes(real, 0, 1)], join


def split_of(shape: Sequence[int], chunks: int, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Returns by how much rows and positions are split into `chunks` or a few more.

    Each chunk has as many rows and positions of each device. So none of them is sent.

    Arguments:
        shape: the numbers of rows and positions.
        chunks: the least number of chunks.
        sizes: of the mesh, by axis.
    """
    here = []
    for name, size in zip("bt", shape, strict=True):
        over = parts_of(name, sizes)
        here.append(size // over if size % over == 0 else size)
    rows, positions = ([i for i in range(1, n + 1) if n % i == 0] for n in here)
    enough = [(i, j) for i in rows for j in positions if i * j >= chunks]
    return min(enough, key=prod, default=(rows[-1], positions[-1]))


def _split_both(x: Array, rows: int, positions: int) -> Array:
    """Returns every `rows`-th row and every `positions`-th position of these, in chunks."""
    b, t, *rest = x.shape
    x = x.reshape(b // rows, rows, t // positions, positions, *rest)
    x = jnp.moveaxis(x, (1, 3), (0, 1))
    return x.reshape(rows * positions, *x.shape[2:])


def _join_both(x: Array, shape: Sequence[int], rows: int, positions: int) -> Array:
    """Returns the numbers that `_split_both` has split, in their old order."""
    x = x.reshape(rows, positions, *x.shape[1:])
    return jnp.moveaxis(x, (0, 1), (1, 3)).reshape(shape)


def _devices(shape: tuple[int, ...], mesh: Any) -> int:
    """Returns over how many devices of a mesh logits are divided."""
    if mesh is None or len(shape) != 3:
        return 1
    sizes = sizes_of(mesh)
    over = [parts_of(name, sizes) for name in "btv"]
    return prod(number for number, size in zip(over, shape, strict=True) if size % number == 0)
