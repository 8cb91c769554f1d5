"""The mean loss over given batches."""

from collections.abc import Callable
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
from jaxformers.training.objectives import Batch, Loss, check_ids, count_targets

IN_FLIGHT = 1  # batches that the device may be behind


@explain_arguments
def evaluate(
    model: PyTree,
    batches: Any,
    *,
    loss: Loss,
    count: Callable[[Batch], Any] = count_targets,
) -> float:
    """The mean loss over batches, each weighted by what counts in it, without dropout.

    Arguments:
        model: what `loss` takes. If some of its weights have 16 bits and others more, the loss is
            computed in the wider type.
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
    weights = np.array([float(weight) for _, weight in parts])
    if not weights.any():
        raise ValueError(
            f"there must be targets that count, got {len(parts)} batches with none. An iterator "
            "gives its batches once: pass a list, or a source of jaxformers.data."
        )
    values = np.array([float(value) for value, _ in parts])
    return float(np.average(values[weights > 0], weights=weights[weights > 0]))


@eqx.filter_jit
def _value(functions, model, batch):
    loss, count = functions
    return loss(widened_beside(model, model), batch, None), jnp.asarray(count(batch))
