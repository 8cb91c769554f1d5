"""The mean loss over given batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxformers.checks import check_callable, check_usable
from jaxformers.precision import widened_beside
from jaxformers.training.batches import in_order, prepared
from jaxformers.training.names import explain_arguments
from jaxformers.training.objectives import Batch, Loss, check_ids, count_targets, measure

IN_FLIGHT = 1  # batches that the device may be behind


class MeanLoss(float):
    """The mean loss of an evaluation: a number that has the cross-entropy beside it.

    Arguments:
        loss: the mean of what is minimized, label smoothing and z-loss included.
        cross_entropy: the mean without them, in nats for each target; None for a loss that is none
            of this package.

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
        """`exp(cross_entropy)`, None where that is not known."""
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
    """The mean loss over batches, each weighted by what counts in it, without dropout.

    It is a number. Under label smoothing or z-loss that is no cross-entropy, which is beside it:
    `evaluate(...).cross_entropy`, and `evaluate(...).perplexity`.

    Arguments:
        model: what `loss` takes, `optimizer.averaged(model, state)` for an average. If some of its
            weights have 16 bits and others more, the loss is computed in the wider type.
        batches: dicts of arrays; or a source of `jaxformers.data`, of which every example is taken
            once. Batches of other shapes compile another program each.
        loss: function `(model, batch, key) -> scalar`, a mean over what counts; key is None.
        count: function `batch -> number`, of what `loss` takes the mean over.

    Raises:
        ValueError: if there are no batches, or nothing counts in any; and as `loss` does.

    Example:
        >>> mean = evaluate(model, [batch, batch], loss=language_model_loss)
    """
    check_callable(loss=loss, count=count)
    check_usable(model=model)
    parts = []
    for i, batch in enumerate(in_order(batches)):
        batch = prepared(batch, f"evaluation batch {i}", loss, model)
        check_ids(loss, model, batch, wait=True)  # a mean of NaN would say nothing
        parts.append(_value((loss, count), model, batch))
        jax.block_until_ready(parts[-1 - IN_FLIGHT :][0])  # few batches at a time are in memory
    values, cross_entropies, weights = zip(*parts, strict=True) if parts else ((), (), ())
    weighed = np.array([float(x) for x in weights])
    if not weighed.any():
        raise ValueError(
            f"there must be targets that count, got {len(parts)} batches with none. An iterator "
            "gives its batches once: pass a list, or a source of jaxformers.data."
        )

    def mean(figures: Sequence[Any]) -> float:
        # The loss of a batch in which nothing counts may be anything.
        known = np.array([float(x) for x in figures])
        return float(np.average(known[weighed > 0], weights=weighed[weighed > 0]))

    known = cross_entropies[0] is not None
    return MeanLoss(mean(values), mean(cross_entropies) if known else None)


@eqx.filter_jit
def _value(functions, model, batch):
    loss, count = functions
    return *measure(loss, widened_beside(model, model), batch), jnp.asarray(count(batch))
