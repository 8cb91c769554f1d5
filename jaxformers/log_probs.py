"""The log-probabilities of targets: those of a whole vocabulary need more time and memory.

The losses, `score` and the models' `log_probs_of` are built of these functions. Targets of -100
and those of padding do not count. Other ids outside of the vocabulary raise an error where they are
known; under `jit` they give NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Integer

from jaxformers import chunks
from jaxformers.precision import widened

IGNORED = -100  # the usual value of a target that does not count


def log_softmax(logits: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """Returns the log-probabilities of all tokens of the vocabulary.

    The logarithm of the sum is one number for each row. If the largest logit were subtracted
    first, XLA's CPU backend would compute that difference within the product that makes the
    logits, and the output layer and its gradient would take a third more time.

    Example:
        >>> print(log_softmax(jnp.zeros((1, 4))).round(4))
        [[-1.3863 -1.3863 -1.3863 -1.3863]]
    """
    top, log_z = normalizer(logits)
    return logits - (top + log_z)[..., None]


def log_probs_of(
    project: Callable[[Array], Array], hidden: Float[Array, "*n d"], targets: Int[Array, "*n"]
) -> Float[Array, "*n"]:
    """Returns the log-probability of each target, in float32, and 0 for targets of -100.

    Where `chunked_cross_entropy` takes chunks of rows, these logits are computed in chunks, too. A
    gradient then computes the logits of each chunk a second time.

    Arguments:
        project: function from hidden states `(rows, d)` to logits `(rows, v)`, which treats each
            row alone, such as `model.logits_of`.
        hidden: hidden states, `(b, t, d)` or `(t, d)`.
        targets: ids in `[0, v)`, or -100.

    Example:
        >>> hidden = model.forward(tokens)[0]
        >>> log_probs_of(model.logits_of, hidden, tokens).shape
        (1, 4)
    """
    rows, counted = targets.size, targets != IGNORED
    chunk = chunks.chunk_for(hidden, jax.eval_shape(lambda x: project(x), hidden))
    if rows <= chunk:
        return _log_probs_of(project(hidden), targets, counted)
    of_chunks, join = chunks.split(hidden, targets, counted, -(-rows // chunk))
    project = eqx.filter_closure_convert(project, of_chunks[0][0])
    weights, rest = eqx.partition(project, eqx.is_inexact_array)
    types = jax.tree.map(lambda x: x.dtype, weights)

    @partial(jax.checkpoint, prevent_cse=False)  # it runs in a loop
    def compute(weights: Any, chunk: list[Array]) -> Array:
        hidden, *of_rows = chunk
        weights = jax.tree.map(lambda x, dtype: x.astype(dtype), weights, types)
        return _log_probs_of(eqx.combine(weights, rest)(hidden), *of_rows)

    weights = jax.tree.map(widened, weights)  # their gradients are summed in float32
    return join(jax.lax.map(partial(compute, weights), of_chunks))


def _log_probs_of(
    logits: Float[Array, "*n v"], targets: Integer[Array, "*n"], counted: Bool[Array, "*n"]
) -> Float[Array, "*n"]:
    logits, targets = those_that_count(logits, targets, counted)
    return jnp.where(counted, pick(logits, targets, normalizer(logits)), 0.0)


def those_that_count(
    logits: Float[ArrayLike, "*n v"], targets: Integer[ArrayLike, "*n"], counted: Bool[Array, "*n"]
) -> tuple[Float[Array, "*n v"], Integer[Array, "*n"]]:
    """Returns logits in float32 and targets, which are 0 where they do not count.

    Logits that do not count may be NaN, and NaN must not reach a gradient.
    """
    logits = jnp.where(counted[..., None], jnp.asarray(logits, jnp.float32), 0.0)
    return logits, jnp.where(counted, jnp.asarray(targets, jnp.int32), 0)


def normalizer(logits: Float[Array, "*n v"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Returns the largest logit, and the logsumexp of the logits relative to it.

    Large logits would lose digits if they were not taken relative to the largest one.
    """
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    return top, jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1))


def pick(
    logits: Float[Array, "*n v"],
    targets: Integer[Array, "*n"],
    normalizer: tuple[Float[Array, "*n"], Float[Array, "*n"]],
) -> Float[Array, "*n"]:
    """Returns the log-probability of each target, NaN where there is none.

    JAX would read the logit of a neighbor there.

    Arguments:
        logits: in float32.
        targets: ids.
        normalizer: that of the logits.
    """
    top, log_z = normalizer
    # Filling inside the gather takes a third more time on CPU than clipping and a product.
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    # It is a product because the gradient has to be NaN as well, or a step would apply it.
    exists = (targets >= 0) & (targets < logits.shape[-1])
    return picked * jnp.where(exists, jnp.float32(1), jnp.nan) - top - log_z


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


def check_targets(targets: np.ndarray, vocab_size: int) -> None:
    """Raises an error unless all targets are ids in `[0, vocab_size)`."""
    wrong = targets[(targets < 0) | (targets >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"targets must be ids from 0 to {vocab_size - 1} (the last axis of the logits has "
            f"{vocab_size}), got {wrong[0]}. Write -100 for a target that does not count, or leave "
            "it out by loss_mask in the batch, which is mask= of cross_entropy."
        )
