"""One protocol for every optimiser, ours and optax's.

    state = optimizer.init(model)
    model, state = optimizer.update(grads, state, model)

`grads` come from `eqx.filter_grad`: None for what is not trained.
"""

from abc import abstractmethod
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

Model = TypeVar("Model", bound=PyTree)


class Optimizer(eqx.Module):
    """The protocol; derive from it to write an optimiser of your own.

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
        """The state before the first update."""

    @abstractmethod
    def update(self, grads: PyTree, state: PyTree, model: Model) -> tuple[Model, PyTree]:
        """The model and the state after one update."""

    def trains(self, model: PyTree) -> PyTree[bool]:
        """The model's tree with True for each leaf to differentiate: all inexact arrays."""
        return jax.tree.map(eqx.is_inexact_array, model)

    def rate(self, state: PyTree) -> Float[Array, ""] | None:
        """The learning rate of the next update; None where it is not known."""
        return None

    def averaged(self, model: Model, state: PyTree) -> Model:
        """The model to evaluate: the trained one itself, unless an average is kept."""
        return model


class _Optax(Optimizer):
    """An optax transformation behind our protocol."""

    transformation: Any

    def init(self, model: PyTree) -> PyTree:
        return self.transformation.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, PyTree]:
        check_fit(model, grads=grads)
        params = eqx.filter(model, eqx.is_inexact_array)
        # optax wants a gradient for every parameter: frozen ones get zeros and lose their update.
        filled = jax.tree.map(lambda p, g: jnp.zeros_like(p) if g is None else g, params, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            updates, state = self.transformation.update(filled, state, params, **extra)
        model = jax.tree.map(
            lambda p, g, u: p if g is None else p + u.astype(p.dtype), model, grads, updates
        )
        return model, state


def as_optimizer(optimizer: Any) -> Optimizer:
    """An optimiser in our protocol: an `Optimizer` as it is, an optax transformation wrapped.

    Arguments:
        optimizer: an `Optimizer` or an `optax.GradientTransformation`; what the latter takes
            beyond optax's three arguments is handed to `update` by name.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> as_optimizer(AdamW(1e-3)).b1
        0.9
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    # By type, not by methods: both protocols have the same two, with different results.
    if isinstance(optimizer, tuple) and hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return _Optax(optimizer)
    raise ValueError(
        "optimizer must be an Optimizer such as AdamW(1e-3), or an optax transformation such as "
        f"optax.lion(1e-4), got {optimizer!r}. Call the function that makes one; derive a class of "
        "your own from jaxformers.optim.Optimizer."
    )


def check_fit(model: PyTree, **trees: PyTree) -> None:
    """Raise unless each tree has, at each leaf of the model, an array of its shape or none."""

    def check(path: tuple, p: Any, x: Any) -> str | None:
        fits = eqx.is_inexact_array(p) and eqx.is_array(x) and x.shape == p.shape
        # A leaf's moments, in a dict, have shapes of their own.
        if x is None or isinstance(x, bool | np.bool | dict) or fits:
            return None
        return f"{eqx.tree_pformat(x)} for {eqx.tree_pformat(p)} at {jax.tree_util.keystr(path)}"

    for name, tree in trees.items():
        try:
            misfits = jax.tree.leaves(jax.tree_util.tree_map_with_path(check, model, tree))
        except ValueError as error:
            misfits = [f"another structure: {error}"]
        if misfits:
            raise ValueError(
                f"{name} must have the model's structure and shapes: take gradients by "
                f"eqx.filter_grad, the state by init, a mask by jax.tree.map. Got {misfits[0]}"
            )


def check_state(state: Any, kind: type[Any], length: int | None = None) -> None:
    """Raise unless a state is of the kind that `init` makes."""
    fits = isinstance(state, kind) and (length is None or len(state) == length)
    if not fits:
        count = "" if length is None else f" of {length}"
        raise ValueError(
            "the state must be that of this optimiser, from init or the last update: expected "
            f"{kind.__name__}{count}, got {eqx.tree_pformat(state):.200}"
        )
