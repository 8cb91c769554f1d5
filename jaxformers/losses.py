"""Cross-entropy over a vocabulary, with label smoothing and z-loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Integer

from jaxformers.checks import check_nonnegative, is_known


def cross_entropy(
    logits: Float[ArrayLike, "*n v"],
    targets: Integer[ArrayLike, "*n"],
    mask: Bool[ArrayLike, "*n"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
) -> Float[Array, ""]:
    """The mean over counted tokens of `-log p(target)`, in nats, float32.

    The scores are normalised here, in float32, so both `model.logits(...)` and the log-probs that
    `model(...)` returns may be given: the log-softmax of log-probs is the log-probs again. Only
    z-loss needs the logits (the logsumexp of log-probs is 0, and so is their z-loss). If no token
    counts, the loss is 0 and so is its gradient.

    Arguments:
        logits: logits or log-probs of shape `(b, t, v)` or `(t, v)`, any floating-point dtype.
        targets: ids in `[0, v)` of shape `(b, t)` or `(t,)`; anything where they do not count.
        mask: boolean, of the targets' shape, True where a token counts; None counts all.
        label_smoothing: share of the target's probability that is spread evenly over the
            vocabulary, in [0, 1] (Szegedy et al. 2016), 0.
        z_loss: coefficient of the mean of `logsumexp(logits) ** 2`, which keeps logits from
            drifting (1e-4 in Chowdhery et al. 2022, PaLM), 0.
        ignore_index: targets equal to it do not count, whatever the mask says (torch has -100).

    Raises:
        ValueError: if shapes or dtypes do not fit, a coefficient is out of range, or a target that
            counts is not in `[0, v)`. Under `jit`, where values cannot be looked at, such a target
            makes the loss NaN.

    Example:
        >>> logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
        >>> print(cross_entropy(logits, jnp.asarray([0, 2])).round(4))
        0.4581
        >>> print(cross_entropy(logits, jnp.asarray([0, -1]), ignore_index=-1).round(4))
        0.6931
    """
    _check_coefficients(label_smoothing, z_loss)
    logits, targets = (x if hasattr(x, "dtype") else np.asarray(x) for x in (logits, targets))
    counted = _counted(logits, targets, mask, ignore_index)
    logits = jnp.asarray(logits, jnp.float32)
    if mask is not None or ignore_index is not None:
        # What does not count may be anything, NaN too, and must not reach a gradient.
        logits = jnp.where(counted[..., None], logits, 0.0)
    targets = jnp.where(counted, jnp.asarray(targets, jnp.int32), 0)
    # Everything relative to the largest logit: large logits would lose digits otherwise.
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    shifted = logits - top[..., None]
    log_z = jnp.log(jnp.exp(shifted).sum(axis=-1))
    loss = log_z - (_picked(logits, targets) - top)
    if label_smoothing:
        loss += label_smoothing * (log_z - shifted.mean(axis=-1) - loss)
    if z_loss:
        loss += z_loss * (log_z + top) ** 2
    total = jnp.where(counted, loss, 0.0).sum()
    return total / jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def _picked(logits: Float[Array, "*n v"], targets: Integer[Array, "*n"]) -> Float[Array, "*n"]:
    """The logit of each target, NaN where there is none (JAX would read a neighbour's)."""
    # Clipping and a small select: filling inside the gather costs a third more on CPU.
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where((targets >= 0) & (targets < logits.shape[-1]), picked, jnp.nan)


def _counted(
    logits: ArrayLike, targets: ArrayLike, mask: ArrayLike | None, ignore_index: int | None
) -> Bool[Array, "*n"]:
    """Which targets count, once everything fits together."""
    _check_shapes(logits, targets, mask)
    counted = jnp.ones(np.shape(targets), jnp.bool_) if mask is None else jnp.asarray(mask)
    if ignore_index is not None:
        counted &= jnp.asarray(targets, jnp.int32) != ignore_index
    if is_known(targets) and is_known(counted):
        _check_targets(np.asarray(targets)[np.asarray(counted)], np.shape(logits)[-1])
    return counted


def _check_coefficients(label_smoothing: float, z_loss: float) -> None:
    check_nonnegative(label_smoothing=label_smoothing, z_loss=z_loss)
    if label_smoothing > 1:
        raise ValueError(
            f"label_smoothing must be in [0, 1], got {label_smoothing!r}. "
            "It is the share of the target's probability that is spread, 0.1 for instance."
        )


def _check_shapes(logits: ArrayLike, targets: ArrayLike, mask: ArrayLike | None) -> None:
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


def _check_dtype(name: str, x: ArrayLike, kind: type) -> None:
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, kind):
        raise ValueError(
            f"{name} must have a dtype of kind {kind.__name__}, got {dtype}. The order is "
            "cross_entropy(logits, targets, mask); a mask of 0/1 numbers becomes one by mask == 1."
        )


def _check_targets(targets: np.ndarray, vocab_size: int) -> None:
    wrong = targets[(targets < 0) | (targets >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"targets must be ids from 0 to {vocab_size - 1} (the last axis of the logits has "
            f"{vocab_size}), got {wrong[0]}. Tokens that should not count are left out by mask= "
            "or ignore_index=."
        )
