"""The mean loss over given batches."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxformers.checks import check_callable, check_usable
from jaxformers.precision import widened_beside
from jaxformers.sharding.constraints import gather
from jaxformers.sharding.mesh import mesh_in
from jaxformers.sharding.spread import shard_or_copy
from jaxformers.trainability import has_adapters, trainable
from jaxformers.training.batches import in_order, on_device, prepared
from jaxformers.training.names import explain_arguments
from jaxformers.training.objectives import Batch, Loss, check_ids, count_targets, measure

IN_FLIGHT = 1  # the number of batches that the device may be behind


class MeanLoss(float):
    """The mean loss of an evaluation: a float with the attribute `cross_entropy`.

    Arguments:
        loss: the mean of the loss, label smoothing and z-loss included.
        cross_entropy: the mean without label smoothing and z-loss, in nats per target; None for a
            loss that is not from this package.

    Example:
        >>> mean = MeanLoss(2.5, cross_entropy=2.0)
        >>> mean + 1, mean.cross_entropy, round(mean.perplexity, 3)
        (3.5, 2.0, 7.389)
    """

    cross_entropy: float | None

    def __new__(cls, loss: float, cross_entropy: float | None = None) -> "MeanLoss":
        mean = super().__new__(cls, loss)
        mean.cross_entropy = cross_entropy
        return mean

    def __reduce__(self) -> tuple[Any, ...]:
        return MeanLoss, (float(self), self.cross_entropy)

    @property
    def perplexity(self) -> float | None:
        """`exp(cross_entropy)`, or None if the cross-entropy is not known."""
        if self.cross_entropy is None:
            return None
        return math.exp(self.cross_entropy) if self.cross_entropy < 700 else math.inf


@explain_arguments
def evaluate(
    model: PyTree,
    batches: Any,
    *,
    loss: Loss,
    count: Callable[[Batch], Any] = count_targets,
) -> MeanLoss:
    """Returns the mean loss over batches, without dropout.

    Each batch is weighted by the number of its targets that count. The result is a float. Label
    smoothing and z-loss are part of it if `loss` has them; `evaluate(...).cross_entropy` and
    `evaluate(...).perplexity` are without them.

    Arguments:
        model: the first argument of `loss`; for an average it is `optimizer.averaged(model,
            state)`. If some of the weights have 16 bits and others more, the loss is computed in
            the wider type.
        batches: dicts of arrays, or a source of `jaxformers.data`, whose examples are all used
            once. Each new shape of a batch compiles another program.
        loss: function `(model, batch, key) -> scalar`, a mean over the targets that count. The key
            is None.
        count: function `batch -> number` that counts those targets, `count_targets` by default.

    Raises:
        ValueError: if there are no batches, or no target counts in any; and as `loss` does.

    Example:
        >>> mean = evaluate(model, [batch, batch], loss=language_model_loss)
    """
    check_callable(loss=loss, count=count)
    check_usable(model=model)
    parts, mesh = [], mesh_in(model)
    put = on_device if mesh is None else partial(shard_or_copy, mesh=mesh)
    for i, batch in enumerate(in_order(batches)):
        batch = prepared(batch, f"evaluation batch {i}", loss, model, put)
        check_ids(loss, model, batch, wait=True)  # ids beyond the vocabulary would give NaN
        parts.append(_value((loss, count), model, batch))
        jax.block_until_ready(parts[-1 - IN_FLIGHT :][0])  # only few batches are in memory
    values, cross_entropies, weights = zip(*parts, strict=True) if parts else ((), (), ())
    weighed = np.array([float(x) for x in weights])
    if not weighed.any():
        raise ValueError(
            f"there must be targets that count, got {len(parts)} batches with none. An iterator "
            "gives its batches only once: pass a list, or a source of jaxformers.data."
        )

    def mean(figures: Sequence[Any]) -> float:
        # The loss of a batch without targets that count is undefined, so it is left out.
        known = np.array([float(x) for x in figures])
        return float(np.average(known[weighed > 0], weights=weighed[weighed > 0]))

    known = cross_entropies[0] is not None
    return MeanLoss(mean(values), mean(cross_entropies) if known else None)


@eqx.filter_jit
def _value(functions, model, batch):
    loss, count = functions
    if not has_adapters(model):
        model = widened_beside(model, eqx.filter(model, trainable(model)))
    model = gather(model, outside_layers=True)
    return *measure(loss, model, batch), jnp.asarray(count(batch))
