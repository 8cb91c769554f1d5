"""Cross-entropy over a vocabulary, with label smoothing and z-loss, dense or in chunks of rows."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Integer

from jaxformers import chunks
from jaxformers.checks import check_callable, check_nonnegative, check_size, is_known
from jaxformers.log_probs import (
    IGNORED,
    check_targets,
    differ,
    normalizer,
    pick,
    those_that_count,
)


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
    chunk = chunks.chunk_for(hidden, logits) if chunk is None else chunk
    check_size(chunk=chunk)
    if rows <= chunk:
        return _share(project(hidden), targets, counted, counted.sum(), label_smoothing, z_loss)
    count, targets = counted.sum(), jnp.asarray(targets)
    (hidden, targets, counted), _ = chunks.split(hidden, targets, counted, -(-rows // chunk))
    project = eqx.filter_closure_convert(project, hidden[0])  # its weights become leaves of a tree
    return _sum_of_shares(project, hidden, targets, counted, count, label_smoothing, z_loss)


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
    logits, targets = those_that_count(logits, targets, counted)
    top, log_z = normalizer(logits)
    loss = -pick(logits, targets, (top, log_z))
    if label_smoothing:
        loss += label_smoothing * (log_z - (logits - top[..., None]).mean(axis=-1) - loss)
    if z_loss:
        loss += z_loss * (log_z + top) ** 2
    total = jnp.where(counted, loss, 0.0).sum()
    return total / jnp.maximum(count, 1).astype(jnp.float32)


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
