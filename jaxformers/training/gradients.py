"""The loss of a batch and its gradients."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_callable, check_size
from jaxformers.optim import Model, Optimizer
from jaxformers.precision import cast_floating, check_float_dtype, widened_beside
from jaxformers.sharding.constraints import gather
from jaxformers.sharding.spread import Places, lie_at
from jaxformers.trainability import has_adapters
from jaxformers.training.objectives import Batch, Loss


class Gradients(eqx.Module):
    """The way in which the loss of a batch and its gradients are computed, see `train_step`."""

    loss: Loss
    compute_dtype: Any = eqx.field(static=True)
    accumulate: int = eqx.field(static=True)
    count: Callable

    def __init__(self, loss: Loss, compute_dtype: Any, accumulate: int, count: Callable):
        check_callable(loss=loss, count=count)
        check_size(accumulate=accumulate)
        self.loss, self.accumulate, self.count = loss, accumulate, count
        self.compute_dtype = None if compute_dtype is None else _check_compute_dtype(compute_dtype)

    def __call__(
        self,
        optimizer: Optimizer,
        model: Model,
        batch: Batch,
        key: PRNGKeyArray,
        places: Places = None,
    ) -> tuple[Float[Array, ""], Model]:
        trained, frozen = eqx.partition(model, optimizer.trains(model))
        if self.compute_dtype is None and not has_adapters(model):
            frozen = widened_beside(frozen, trained)

        @eqx.filter_value_and_grad
        def value_and_grad(trained, batch, key):
            model = eqx.combine(trained, frozen)
            if self.compute_dtype is not None:
                model = cast_floating(model, self.compute_dtype)
            return _check_loss(self.loss(gather(model, outside_layers=True), batch, key))

        if self.accumulate == 1:
            value, grads = value_and_grad(trained, batch, key)
            return value, lie_at(grads, places)

        def add(sums, part):
            weight = jnp.asarray(self.count(part[0]), jnp.float32)
            new = *value_and_grad(trained, *part), jnp.ones(())
            # The loss of a part without targets that count is undefined, so it becomes 0.
            new = jax.tree.map(
                lambda x: jnp.where(weight == 0, 0, weight * x.astype(jnp.float32)), new
            )
            sums = jax.tree.map(jnp.add, sums, new)
            return (sums[0], lie_at(sums[1], places), sums[2]), None

        shapes = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
        shapes = lie_at(shapes, places)
        parts = _split_rows(batch, self.accumulate), jax.random.split(key, self.accumulate)
        sums, _ = jax.lax.scan(add, (jnp.zeros(()), shapes, jnp.zeros(())), parts)
        *means, weight = sums
        weight = jnp.where(weight == 0, 1, weight)  # if no target counts, the loss is 0
        value, grads = jax.tree.map(lambda x: x / weight, tuple(means))
        return value, grads


def _split_rows(batch: Batch, parts: int) -> Batch:
    """Splits the rows of a batch into `parts` parts, along a new leading axis."""
    shapes = {name: np.shape(x) for name, x in batch.items() if x is not None}
    rows = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(rows) != 1 or rows.pop() % parts or max(map(len, shapes.values())) < 2:
        raise ValueError(
            f"accumulate={parts} needs a batch whose arrays all have the same number of rows, "
            f"divisible by {parts}, got the shapes {shapes}. Choose another batch size or "
            "accumulate=."
        )

    def split(x: Array) -> Array:
        # Each part takes every `parts`-th row, so that a batch over many devices stays spread.
        x = jnp.asarray(x)
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    return {name: split(x) for name, x in batch.items() if x is not None}


def _check_loss(value: Any) -> Float[Array, ""]:
    if not eqx.is_inexact_array(value) or value.shape != ():
        raise ValueError(
            "loss must return one floating-point number as an array of shape (), got "
            f"{eqx.tree_pformat(value)}."
        )
    return value


def _check_compute_dtype(dtype: Any) -> np.dtype:
    dtype = check_float_dtype(compute_dtype=dtype)
    if dtype == jnp.float16:
        raise ValueError(
            "compute_dtype float16 is refused: gradients below 6e-8 would be zero unless the loss "
            "were scaled. Pass jnp.bfloat16, which has the range of float32."
        )
    return dtype
