"""A moving average of the weights, which is often better than the last weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_rate, check_usable, is_known
from jaxformers.optim.compiled import check_fit, check_state, compiled
from jaxformers.optim.optimizer import Model, Optimizer, as_optimizer
from jaxformers.precision import widened
from jaxformers.sharding.mesh import mesh_in
from jaxformers.sharding.spread import replicate


class AveragedState(eqx.Module):
    """The number of updates, the average, and the state of the wrapped optimizer."""

    step: Int32[Array, ""]
    average: PyTree
    inner: PyTree


def _decay(value: Any) -> Any:
    if callable(value) or not is_known(value):
        return value
    check_rate(decay=value)
    return np.float32(value)  # an array: a new value does not compile the update again


class Averaged(Optimizer):
    """An optimizer that also keeps an exponential moving average of the weights.

    After each update the average becomes, in float32,

        average <- decay average + (1 - decay) p

    as in `torch.optim.swa_utils.AveragedModel` (Polyak & Juditsky 1992). It starts as a copy of the
    weights. Frozen leaves have no average.

    Arguments:
        optimizer: an `Optimizer` or an optax transformation.
        decay: a number in [0, 1), 0.999, or a function `t -> decay`. For a number, the decay of
            update `t`, which counts from 1, is at most `(1 + t) / (10 + t)`, so that the first
            weights soon have little influence. TensorFlow's `ExponentialMovingAverage` does the
            same with `num_updates`. A function has no such limit: `schedules.constant(0.999)` gives
            the plain average.

    Raises:
        ValueError: if `decay` is out of its range or `optimizer` is no optimizer.

    Example:
        >>> optimizer = Averaged(AdamW(1e-3), decay=0.99)
        >>> state = optimizer.init(model)
        >>> evaluated = optimizer.averaged(model, state)
    """

    optimizer: Optimizer = eqx.field(converter=as_optimizer)
    decay: Float[ArrayLike, ""] | Callable = eqx.field(default=0.999, converter=_decay)

    def init(self, model: PyTree) -> AveragedState:
        """Returns the first state, whose average is a copy of the trained leaves."""
        check_usable(model=model)
        trained = eqx.filter(model, self.trains(model))
        average = jax.tree.map(lambda p: jnp.array(widened(p), copy=True), trained)
        step = replicate(jnp.zeros((), jnp.int32), mesh_in(model))
        return AveragedState(step=step, average=average, inner=self.optimizer.init(model))

    @compiled
    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, AveragedState]:
        """Returns the model and the state after one update of the optimizer and of the average."""
        check_state(state, AveragedState)
        check_fit(model, average=state.average)
        model, inner = self.optimizer.update(grads, state.inner, model, **extra)
        t = state.step + 1
        if callable(self.decay):
            decay = jnp.asarray(self.decay(t), jnp.float32)
        else:
            decay = jnp.minimum(
                self.decay, (1 + t).astype(jnp.float32) / (10 + t).astype(jnp.float32)
            )

        def step(p: Any, mean: Any) -> Any:
            if mean is None:
                return None
            return mean + (1 - decay).astype(mean.dtype) * (widened(p) - mean)

        average = jax.tree.map(step, model, state.average)
        return model, AveragedState(step=t, average=average, inner=inner)

    def takes(self, name: str) -> bool:
        """Returns whether the wrapped optimizer takes an argument of this name."""
        return self.optimizer.takes(name)

    def trains(self, model: PyTree) -> PyTree[bool]:
        """Returns the model's tree with True for each leaf that the wrapped optimizer trains."""
        return self.optimizer.trains(model)

    def rate(self, state: AveragedState) -> Float[Array, ""] | None:
        """Returns the learning rate of the wrapped optimizer."""
        return self.optimizer.rate(state.inner)

    def averaged(self, model: Model, state: AveragedState) -> Model:
        """Returns the model with the averages as weights, in the types of the weights."""
        return jax.tree.map(
            lambda p, mean: p if mean is None else jnp.array(mean, p.dtype), model, state.average
        )


def kept_average(state: PyTree, model: PyTree) -> PyTree | None:
    """Returns the averages of a model's weights in a state of any optimizers.

    Arguments:
        state: any tree that contains states of optimizers.
        model: the model that they train.

    Returns:
        The model's tree with the averages, and None for leaves without one. None if the state holds
        no average of this model.
    """

    def is_state(x: Any) -> bool:
        return isinstance(x, AveragedState)

    def fits(average: PyTree) -> bool:
        try:
            jax.tree.map(lambda *_: None, model, average)
        except ValueError:  # The average belongs to another model that is trained beside it.
            return False
        return True

    states = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
    averages = [x.average for x in states if fits(x.average)]
    return eqx.combine(*averages) if averages else None
