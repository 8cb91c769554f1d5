"""Cross-entropy over a vocabulary, with label smoothing and z-loss, dense or in chunks of rows."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Integer

from jaxformers.checks import check_callable, check_nonnegative, check_size, is_known
from jaxformers.sharding.mesh import divides_positions, sizes_of, traced_mesh
from jaxformers.sharding.rules import parts_of

# The number of logits in a chunk: 128 MiB in float32 on a CPU, 1 GiB on accelerators, which need
# more work at a time. With fewer than `CHUNK_ROWS` rows, adding up the gradient of the weights
# costs too much time (on CPU 8 % with 256 rows, 18 % with 128). Up to two chunks are computed at
# once, because that needs no more memory than one chunk.
CHUNK_LOGITS = {"cpu": 2**25}
CHUNK_LOGITS_ELSEWHERE = 2**28
CHUNK_ROWS = 512

IGNORED = -100  # the usual value of a target that does not count


def cross_entropy(
    logits: Float[ArrayLike, "*n v"],
    targets: Integer[ArrayLike, "*n"],
    mask: Bool[ArrayLike, "*n"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = IGNORED,
) -> Float[Array, ""]:
    """Returns the mean over counted tokens of `-log p(target)`, in nats, float32.

    The scores are normalized here, in float32. So `logits` may be `model.logits(...)` or the
    log-probs that `model(...)` returns, since the log-softmax of log-probs is the same log-probs.
    Only z-loss needs the logits: the logsumexp of log-probs is 0, and so is their z-loss. If no
    token counts, the loss and its gradient are 0.

    Arguments:
        logits: logits or log-probs of shape `(b, t, v)` or `(t, v)`, any floating-point dtype.
        targets: ids in `[0, v)` of shape `(b, t)` or `(t,)`; any integer where they do not count.
        mask: boolean, of the targets' shape, True where a token counts; None counts all.
        label_smoothing: the share of the target's probability that is spread evenly over the
            vocabulary, in [0, 1] (Szegedy et al. 2016); default 0.
        z_loss: the coefficient of the mean of `logsumexp(logits) ** 2`, which keeps the logits
            near 0 (1e-4 in Chowdhery et al. 2022, PaLM); default 0.
        ignore_index: targets with this value do not count, whatever the mask says; default -100 as
            in torch. None ignores no value.

    Raises:
        ValueError: if shapes or dtypes do not fit, a coefficient is out of range, or a target that
            counts is not in `[0, v)`. Under `jit`, where values are not known, such a target makes
            the loss and its gradient NaN.

    Example:
        >>> logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
        >>> print(cross_entropy(logits, jnp.asarray([0, 2])).round(4))
        0.4581
        >>> print(cross_entropy(logits, jnp.asarray([0, -100])).round(4))
        0.6931
    """
    _check_coefficients(label_smoothing, z_loss)
    logits, targets = (x if hasattr(x, "dtype") else np.asarray(x) for x in (logits, targets))
    counted = _counted(logits, targets, mask, ignore_index)
    return _share(logits, targets, counted, counted.sum(), label_smoothing, z_loss)


def chunked_cross_entropy(
    project: Callable[[Array], Array],
    hidden: Float[ArrayLike, "*n d"],
    targets: Integer[ArrayLike, "*n"],
    mask: Bool[ArrayLike, "*n"] | None = None,
    *,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = IGNORED,
) -> Float[Array, ""]:
    """Returns `cross_entropy(project(hidden), targets, mask)` without all logits in memory at once.

    For a text of 16,384 tokens and a vocabulary of 50,304 the logits need 3 GB, and their gradient
    needs as much. Here the logits are computed for some rows at a time and then dropped. The
    gradients are computed together with the loss, so no logit is computed twice. The gradients of
    the weights are summed in float32.

    Arguments:
        project: function from hidden states `(rows, d)` to logits `(rows, v)`, which treats each
            row alone, such as `model.logits_of`. Gradients reach the weights that it holds.
        hidden: hidden states of shape `(b, t, d)` or `(t, d)`.
        targets, mask: as for `cross_entropy`.
        chunk: the largest number of rows at a time. None takes as many as have `2**25` logits
            (on accelerators `2**28`), but at least 512. On a mesh, each device takes that many. If
            there are at most twice as many rows, all are taken at once, as `cross_entropy` does.
        label_smoothing, z_loss, ignore_index: as for `cross_entropy`.

    Raises:
        ValueError: as `cross_entropy` does, or if `chunk` is not a positive integer.

    Example:
        >>> hidden = model.forward(tokens)[0]
        >>> loss = chunked_cross_entropy(model.logits_of, hidden, tokens, chunk=2)
        >>> print(jnp.allclose(loss, cross_entropy(model.logits_of(hidden), tokens)))
        True
    """
    _check_coefficients(label_smoothing, z_loss)
    check_callable(project=project)
    hidden = jnp.asarray(hidden)
    targets = targets if hasattr(targets, "dtype") else np.asarray(targets)
    logits = jax.eval_shape(lambda x: project(x), hidden)
    counted = _counted(logits, targets, mask, ignore_index)
    rows = counted.size
    if chunk is None:
        devices = _devices(logits.shape, traced_mesh(hidden))
        limit = CHUNK_LOGITS.get(jax.default_backend(), CHUNK_LOGITS_ELSEWHERE)
        chunk = choose_chunk(rows, logits.shape[-1], devices, limit)
    check_size(chunk=chunk)
    if rows <= chunk:
        return _share(project(hidden), targets, counted, counted.sum(), label_smoothing, z_loss)
    count, of_rows = counted.sum(), (hidden, jnp.asarray(targets), counted)
    hidden, targets, counted = _split(of_rows, -(-rows // chunk))
    project = eqx.filter_closure_convert(project, hidden[0])  # its weights become leaves of a tree
    return _sum_of_shares(project, hidden, targets, counted, count, label_smoothing, z_loss)


def _split(of_rows: tuple[Array, Array, Array], chunks: int) -> list[Array]:
    """Returns hidden states, targets and what counts in chunks, along a new leading axis.

    Each chunk takes every `chunks`-th row, so that a batch over many devices stays spread.
    """
    hidden, _, counted = of_rows
    if counted.ndim == 2 and divides_positions(hidden):
        parts = split_of(counted.shape, chunks, sizes_of(traced_mesh(hidden)))
        return [_split_both(x, *parts) for x in of_rows]
    rows = counted.size

    def split(x: Array) -> Array:
        x = x.reshape(rows, *x.shape[counted.ndim :])
        # The rows that fill up the last chunk do not count. They are copies, so they are finite
        # if the others are.
        x = jnp.concatenate([x, jax.lax.stop_gradient(x[: -rows % chunks])])
        return jnp.swapaxes(x.reshape(-1, chunks, *x.shape[1:]), 0, 1)

    hidden, targets, counted = map(split, of_rows)
    real = (jnp.arange(counted.size) < rows).reshape(-1, chunks)
    return [hidden, targets, counted & jnp.swapaxes(real, 0, 1)]


def _split_both(x: Array, rows: int, positions: int) -> Array:
    """Returns every `rows`-th row and every `positions`-th position of these, in chunks."""
    b, t, *rest = x.shape
    x = x.reshape(b // rows, rows, t // positions, positions, *rest)
    x = jnp.moveaxis(x, (1, 3), (0, 1))
    return x.reshape(rows * positions, *x.shape[2:])


def split_of(shape: tuple[int, ...], chunks: int, sizes: Mapping[str, int]) -> tuple[int, int]:
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


def choose_chunk(rows: int, vocab_size: int, devices: int, limit: int) -> int:
    """Returns how many rows are a chunk, of which each device computes at most `limit` logits.

    For each chunk the gradient of the weights is added up over all devices. So chunks are as large
    as the memory of all devices allows.
    """
    chunk = devices * max(limit // vocab_size, CHUNK_ROWS)
    return chunk if rows > 2 * chunk else rows


def _devices(shape: tuple[int, ...], mesh: Any) -> int:
    """Returns over how many devices of a mesh logits are divided."""
    if mesh is None or len(shape) != 3:
        return 1
    sizes = sizes_of(mesh)
    over = [parts_of(name, sizes) for name in "btv"]
    return prod(number for number, size in zip(over, shape, strict=True) if size % number == 0)


@eqx.filter_custom_jvp
def _sum_of_shares(project, hidden, targets, counted, *options):
    """Returns the loss of all chunks, which are the leading axis of the three arrays."""

    def add(total, chunk):
        rows, *of_rows = chunk
        return total + _share(project(rows), *of_rows, *options), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (hidden, targets, counted))[0]


@_sum_of_shares.def_jvp
def _sum_of_shares_jvp(primals, tangents):
    """Computes gradients together with the value: reverse mode keeps them instead of the logits."""
    project, hidden, targets, counted, *options = primals
    moves = jax.tree.map(lambda x: x is not None, tangents[0], is_leaf=lambda x: x is None)
    weights, frozen = eqx.partition(project, moves)

    def share(weights, rows, *of_rows):
        return _share(eqx.combine(weights, frozen)(rows), *of_rows, *options)

    differentiate = jax.value_and_grad(share, (0,) if tangents[1] is None else (0, 1))

    def add(sums, chunk):
        value, (of_weights, *of_rows) = differentiate(weights, *chunk)
        sums = jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, (value, of_weights))
        return sums, of_rows

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), weights)
    start = jnp.zeros((), jnp.float32), zeros
    (value, of_weights), of_hidden = jax.lax.scan(add, start, (hidden, targets, counted))
    pairs = zip(jax.tree.leaves((of_weights, of_hidden)), jax.tree.leaves(tangents), strict=True)
    return value, sum((x.astype(jnp.float32) * y.astype(jnp.float32)).sum() for x, y in pairs)


def _share(
    logits: Float[ArrayLike, "*n v"],
    targets: Integer[ArrayLike, "*n"],
    counted: Bool[Array, "*n"],
    count: Integer[Array, ""],
    label_smoothing: float,
    z_loss: float,
) -> Float[Array, ""]:
    """Returns the part that these rows add to the mean over `count` rows."""
    # Logits that do not count may be NaN, and NaN must not reach a gradient.
    logits = jnp.where(counted[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    targets = jnp.where(counted, jnp.asarray(targets, jnp.int32), 0)
    # All logits are taken relative to the largest one, since large ones would lose digits.
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    shifted = logits - top[..., None]
    log_z = jnp.log(jnp.exp(shifted).sum(axis=-1))
    loss = log_z - (_picked(logits, targets) - top)
    if label_smoothing:
        loss += label_smoothing * (log_z - shifted.mean(axis=-1) - loss)
    if z_loss:
        loss += z_loss * (log_z + top) ** 2
    total = jnp.where(counted, loss, 0.0).sum()
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def _picked(logits: Float[Array, "*n v"], targets: Integer[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the logit of each target, NaN where there is none (JAX would read a neighbor's)."""
    # Filling inside the gather takes a third more time on CPU than clipping and a product.
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    # It is a product because the gradient has to be NaN as well, or a step would apply it.
    exists = (targets >= 0) & (targets < logits.shape[-1])
    return picked * jnp.where(exists, jnp.float32(1), jnp.nan)


def _counted(
    logits: Any, targets: ArrayLike, mask: ArrayLike | None, ignore_index: int | None
) -> Bool[Array, "*n"]:
    """Returns which targets count, after a check of shapes and ids."""
    _check_shapes(logits, targets, mask)
    counted = jnp.ones(np.shape(targets), jnp.bool_) if mask is None else jnp.asarray(mask)
    if ignore_index is not None:
        counted &= differ(targets, ignore_index)
    if is_known(targets) and is_known(counted):
        check_targets(np.asarray(targets)[np.asarray(counted)], np.shape(logits)[-1])
    return counted


def differ(targets: Any, ignore_index: int = IGNORED) -> Any:
    """Returns where targets are not `ignore_index`, compared in their type: casts make ids equal.

    Example:
        >>> print(differ(np.asarray([3, -100, 0])))
        [ True False  True]
    """
    numbers = jnp.iinfo(targets.dtype)
    if numbers.min <= ignore_index <= numbers.max:
        return targets != targets.dtype.type(ignore_index)
    return np.ones(targets.shape, np.bool_)


def _check_coefficients(label_smoothing: float, z_loss: float) -> None:
    check_nonnegative(label_smoothing=label_smoothing, z_loss=z_loss)
    if label_smoothing > 1:
        raise ValueError(
            f"label_smoothing must be in [0, 1], got {label_smoothing!r}. "
            "It is the share of the target's probability that is spread, 0.1 for instance."
        )


def _check_shapes(logits: Any, targets: ArrayLike, mask: ArrayLike | None) -> None:
    _check_dtype("logits", logits, jnp.floating)
    if np.ndim(logits) == 0:
        raise ValueError("logits must have shape (..., vocabulary), got a scalar.")
    for name, x, kind in (("targets", targets, jnp.integer), ("mask", mask, jnp.bool_)):
        if x is None:
            continue
        _check_dtype(name, x, kind)
        if np.shape(x) != np.shape(logits)[:-1]:
            raise ValueError(
                f"{name} must have the shape of the logits without the vocabulary axis, "
                f"{np.shape(logits)[:-1]}, got {np.shape(x)}. For logits (b, t, v) it is (b, t)."
            )


def _check_dtype(name: str, x: Any, kind: type) -> None:
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, kind):
        raise ValueError(
            f"{name} must have a dtype of kind {kind.__name__}, got {dtype}. The order is "
            "cross_entropy(logits, targets, mask); a mask of 0/1 numbers becomes one by mask == 1."
        )


def check_targets(targets: np.ndarray, vocab_size: int) -> None:
    """Raises an error unless all targets are ids in `[0, vocab_size)`."""
    wrong = targets[(targets < 0) | (targets >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"targets must be ids from 0 to {vocab_size - 1} (the last axis of the logits has "
            f"{vocab_size}), got {wrong[0]}. Write -100 for a target that does not count, or leave "
            "it out by loss_mask in the batch, which is mask= of cross_entropy."
        )
