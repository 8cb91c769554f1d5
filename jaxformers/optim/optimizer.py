"""The protocol of every optimizer, and optax transformations in this protocol.

    state = optimizer.init(model)
    model, state = optimizer.update(grads, state, model)

`grads` come from `eqx.filter_grad`, with None for leaves that are not trained. Gradients of leaves
that `trainable` excludes are ignored. If `update` also takes an argument `value`, `train_step` and
`fit` pass it the loss.
"""

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxformers.optim.compiled import check_fit, compiled, own_arrays
from jaxformers.trainability import trainable

Model = TypeVar("Model", bound=PyTree)


class Optimizer(eqx.Module):
    """The protocol of an optimizer. Derive a class from it to write an optimizer of your own.

    Example:
        >>> class GradientDescent(Optimizer):
        ...     step_size: float
        ...
        ...     def init(self, model):
        ...         return None
        ...
        ...     def update(self, grads, state, model):
        ...         updates = jax.tree.map(lambda g: -self.step_size * g, grads)
        ...         return eqx.apply_updates(model, updates), state
    """

    @abstractmethod
    def init(self, model: PyTree) -> PyTree:
        """Returns the state before the first update."""

    @abstractmethod
    def update(self, grads: PyTree, state: PyTree, model: Model) -> tuple[Model, PyTree]:
        """Returns the model and the state after one update."""

    def trains(self, model: PyTree) -> PyTree[bool]:
        """Returns the model's tree with True for each leaf to differentiate, see `trainable`."""
        return trainable(model)

    def rate(self, state: PyTree) -> Float[Array, ""] | None:
        """Returns the learning rate of the next update; None if it is not known."""
        return None

    def averaged(self, model: Model, state: PyTree) -> Model:
        """Returns the model to evaluate: the trained one, unless the state keeps an average."""
        return model

    def takes(self, name: str) -> bool:
        """Returns whether `update` takes a further argument of this name.

        `train_step` and `fit` pass one: `value`, the loss of the batch before the update.
        """
        return _takes(type(self).update, name)


_MORE_IS_NEEDED = (
    "an optax transformation needs more than a step has ({}). train_step and fit give value=, the "
    "loss, and no function of the weights, as the line search of optax.lbfgs would need it (and "
    "sophia, and sam with opaque_mode): give optax.lbfgs a learning rate and linesearch=None, or "
    "call as_optimizer(...).update with these arguments in a loop of your own."
)


_OTHER_WEIGHTS = (
    "an optax transformation is not for the weights of a model ({}). Those of optax.lookahead are "
    "pairs, and optax.contrib.galore takes no tree with a None where a model has no weight."
)


class _Optax(Optimizer):
    """An optax transformation in the protocol of `Optimizer`."""

    transformation: Any

    def init(self, model: PyTree) -> PyTree:
        params = eqx.filter(model, trainable(model))
        try:
            return own_arrays(self.transformation.init(params))
        except AttributeError as error:
            raise ValueError(_OTHER_WEIGHTS.format(error)) from error

    @compiled
    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, PyTree]:
        check_fit(model, grads=grads)
        trained = trainable(model)
        grads, params = eqx.filter(grads, trained), eqx.filter(model, trained)
        # optax needs a gradient for every parameter. Frozen ones get zeros, and do not change.
        filled = jax.tree.map(lambda p, g: jnp.zeros_like(p) if g is None else g, params, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            try:
                updates, state = self.transformation.update(filled, state, params, **extra)
            except (TypeError, ValueError) as error:
                if re.search(r"missing \d+ required keyword-only|must be provided", str(error)):
                    raise ValueError(_MORE_IS_NEEDED.format(error)) from error
                raise
            except AttributeError as error:
                raise ValueError(_OTHER_WEIGHTS.format(error)) from error
            model = jax.tree.map(
                lambda p, g, u: p if g is None else (p + u).astype(p.dtype), model, grads, updates
            )
        return model, state

    def takes(self, name: str) -> bool:
        return _takes(self.transformation.update, name)


def _takes(function: Callable, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    any_name = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    return any_name or name in parameters


def as_optimizer(optimizer: Any) -> Optimizer:
    """Returns an `Optimizer` as it is, and wraps an optax transformation in one.

    Arguments:
        optimizer: an `Optimizer` or an `optax.GradientTransformation`. Further arguments of the
            latter are passed to `update` by name.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> as_optimizer(AdamW(1e-3)).b1
        0.9
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if callable(getattr(optimizer, "gradient_transformation", None)):  # optax.MultiSteps
        optimizer = optimizer.gradient_transformation()
    # The type decides: both protocols have the methods init and update, with different results.
    if isinstance(optimizer, tuple) and hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return _Optax(optimizer)
    raise ValueError(
        "optimizer must be an Optimizer such as AdamW(1e-3), or an optax transformation such as "
        f"optax.lion(1e-4), got {optimizer!r}. Call the function that makes one; derive a class of "
        "your own from jaxformers.optim.Optimizer."
    )
