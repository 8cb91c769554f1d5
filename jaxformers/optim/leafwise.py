"""The base class of AdamW, Lion, Adafactor and Muon, which update one leaf at a time."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PyTree

from jaxformers.checks import check_nonnegative, check_positive, is_known
from jaxformers.optim.clipping import clip_by_global_norm
from jaxformers.optim.compiled import check_fit, check_state, choose, compiled
from jaxformers.optim.layout import leaf_path
from jaxformers.optim.optimizer import Model, Optimizer
from jaxformers.precision import widened
from jaxformers.sharding.mesh import mesh_in
from jaxformers.sharding.spread import lie_like, replicate
from jaxformers.trainability import trainable

Moments = dict[str, Array]


class State(eqx.Module):
    """The number of updates, and the moments of each trained leaf by name, in float32."""

    step: Int32[Array, ""]
    moments: PyTree


def learning_rate(value: Any) -> Any:
    """Returns a schedule as it is, and a number as float32.

    Raises:
        ValueError: if a number is negative or not finite.
    """
    if callable(value) or not is_known(value):
        return value
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    check_nonnegative(learning_rate=value)
    # Python numbers are static under eqx.filter_jit: each new rate would compile a new program.
    return np.float32(value)


class LeafwiseOptimizer(Optimizer):
    """An optimizer whose rule gives the direction of the update for one leaf at a time.

    Each trained leaf `p` becomes `p - rate (direction + weight_decay p)`, computed in float32 and
    rounded once to the type of `p`. A leaf does not change if `trainable` excludes it or if its
    gradient is None. Frozen leaves need no moments: `init` also accepts a model without them.

    To write a rule of your own, derive a class with the four fields below and the methods `moments`
    and `direction`.

    Example:
        >>> class SignDescent(LeafwiseOptimizer):
        ...     learning_rate: float
        ...     weight_decay: float = 0.0
        ...     max_grad_norm: None = None
        ...     decay_mask: Callable = default_decay_mask
        ...
        ...     def moments(self, path, p):
        ...         return {}
        ...
        ...     def direction(self, path, p, g, moments, step):
        ...         return jnp.sign(g), moments
        >>> state = SignDescent(1e-3).init(model)
    """

    learning_rate: eqx.AbstractVar[Any]
    weight_decay: eqx.AbstractVar[float]
    max_grad_norm: eqx.AbstractVar[float | None]
    decay_mask: eqx.AbstractVar[Callable[[PyTree], PyTree[bool]]]

    def __check_init__(self) -> None:
        check_nonnegative(weight_decay=self.weight_decay)
        if self.max_grad_norm is not None:
            check_positive(max_grad_norm=self.max_grad_norm)

    @abstractmethod
    def moments(self, path: str, p: Float[Array, "..."]) -> Moments:
        """Returns the moments of a leaf before the first update."""

    @abstractmethod
    def direction(
        self,
        path: str,
        p: Float[Array, "..."],
        g: Float[Array, "..."],
        moments: Moments,
        step: Int32[Array, ""],
    ) -> tuple[Float[Array, "..."] | Callable[[Moments], Float[Array, "..."]], Moments]:
        """Returns the direction of the step and the new moments of a leaf, all in float32.

        The direction has the shape of the leaf. The update subtracts it. It may be a function of
        the new moments. Then a step that keeps the old ones if its loss is not finite needs no
        copies of them.

        Arguments:
            path: path of the leaf, such as "decoder.layers.0.self_attention.wq".
            p: the leaf.
            g: its gradient.
            moments: the result of `moments`, or of the last update.
            step: the number of earlier updates.
        """

    def init(self, model: PyTree) -> State:
        """Returns the state before the first update, with moments for each array to train.

        Moments lie on the devices of their leaf, and are divided over them like the leaf.
        """
        trained = eqx.filter(model, trainable(model))
        # Each leaf has its own buffers: a function that donates the state must not get one twice.
        moments = jax.tree_util.tree_map_with_path(
            lambda path, p: {
                name: lie_like(x, p)
                for name, x in self.moments(leaf_path(trained, path), p).items()
            },
            trained,
        )
        step = replicate(jnp.zeros((), jnp.int32), mesh_in(trained))
        return State(step=step, moments=moments)

    @compiled
    def update(
        self,
        grads: PyTree,
        state: PyTree,
        model: Model,
        *,
        good: Bool[Array, ""] | None = None,
    ) -> tuple[Model, State]:
        """Returns the model and the state after one update.

        The method is compiled. It donates no arrays, so that the old model stays usable. Within a
        compiled function it becomes a part of that function, which may donate arrays.

        Arguments:
            grads: gradients in the model's structure, None for leaves that are not trained.
            state: the state that `init` or the last `update` returned.
            model: the model before the update.
            good: whether there is an update at all; if False, model and state stay as they are.
                None, the default, is True.

        Raises:
            ValueError: if `grads`, `state` or the decay mask does not fit the model.
        """
        check_state(state, State)
        decays = self.decay_mask(model)
        check_fit(model, decay_mask=decays, moments=state.moments, grads=grads)
        grads = eqx.filter(grads, trainable(model))
        if self.max_grad_norm is not None:
            grads, _ = clip_by_global_norm(grads, self.max_grad_norm)
        rate = self.rate(state)

        def change(path: tuple, p: Any, g: Any, moments: Any, decays: bool) -> tuple[Any, Any]:
            if g is None:
                return p, moments
            name = leaf_path(model, path)
            self._check_moments(name, p, moments)
            wide, g = widened(p), g.astype(jnp.float32)
            step, new = self.direction(name, wide.astype(jnp.float32), g, moments, state.step)
            new = choose(good, new, moments)
            step = step(new) if callable(step) else step
            if decays:
                step += self.weight_decay * wide.astype(jnp.float32)
            changed = (wide - (rate * step).astype(wide.dtype)).astype(p.dtype)
            return choose(good, changed, p), new

        new = jax.tree_util.tree_map_with_path(change, model, grads, state.moments, decays)
        model, moments = (jax.tree.map(lambda _, pair, i=i: pair[i], model, new) for i in (0, 1))
        return model, State(step=choose(good, state.step + 1, state.step), moments=moments)

    def rate(self, state: State) -> Float[Array, ""]:
        """Returns the learning rate of the next update."""
        rate = self.learning_rate
        return jnp.asarray(rate(state.step) if callable(rate) else rate, jnp.float32)

    def _check_moments(self, path: str, p: Array, moments: Any) -> None:
        expected = jax.eval_shape(lambda: self.moments(path, p))
        shapes = [jax.tree.map(lambda x: x.shape, x) for x in (moments, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the state must be that of this optimizer and this model, from init: {path} of "
                f"shape {p.shape} needs moments of shapes {shapes[1]}, got {shapes[0]}."
            )
