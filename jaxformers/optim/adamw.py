"""AdamW."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_nonnegative, check_positive, check_rate, is_known
from jaxformers.optim.clipping import clip_by_global_norm
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.optimizer import Model, Optimizer, check_fit


class AdamWState(eqx.Module):
    """The number of updates made, and the moments of the gradients in float32."""

    step: Int32[Array, ""]
    mu: PyTree
    nu: PyTree


def _learning_rate(value: Any) -> Any:
    if callable(value) or not is_known(value):
        return value
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    check_nonnegative(learning_rate=value)
    # Python numbers are static under eqx.filter_jit: each new rate would compile anew.
    return np.float32(value)


def _bias_correction(b: float, t: Int32[Array, ""]) -> Float[Array, ""]:
    """`1 - b**t`; computed like that in float32, 0.999 would give an error of 1e-5."""
    return -jnp.expm1(t.astype(jnp.float32) * (math.log(b) if b else -math.inf))


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

    With `t` from 1, each trained leaf `p` with gradient `g` becomes

        mu <- b1 mu + (1 - b1) g,    nu <- b2 nu + (1 - b2) g^2
        p  <- p - rate (mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay p)

    as in `torch.optim.AdamW` and `optax.adamw`. A leaf that is no inexact array or whose gradient
    is None stays as it is. Frozen leaves need no moments: `init` takes a model without them too.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate` (step 0 comes first).
        b1: decay of the first moment, in [0, 1), 0.9.
        b2: decay of the second moment, in [0, 1), 0.999.
        eps: added to the denominator, above 0, 1e-8.
        weight_decay: at least 0, 0.01; multiplied by the learning rate of the step.
        max_grad_norm: gradients are first clipped to this global norm; None for no clipping.
        decay_mask: function `model -> tree of bools`, True where weight decay applies. To spare
            embeddings too: `functools.partial(default_decay_mask, decay_embeddings=False)`, made
            once (another one compiles the update anew).

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> model = eqx.nn.Linear(2, 1, key=jax.random.key(0))
        >>> optimizer = AdamW(1e-3, max_grad_norm=1.0)
        >>> state = optimizer.init(model)
        >>> grads = eqx.filter_grad(lambda model: model(jnp.ones(2)).sum())(model)
        >>> model, state = optimizer.update(grads, state, model)
        >>> print(state.step)
        1
    """

    learning_rate: Float[ArrayLike, ""] | Callable = eqx.field(converter=_learning_rate)
    b1: float = eqx.field(default=0.9, converter=float)
    b2: float = eqx.field(default=0.999, converter=float)
    eps: float = 1e-8
    weight_decay: float = 0.01
    _: KW_ONLY
    max_grad_norm: float | None = None
    decay_mask: Callable[[PyTree], PyTree[bool]] = default_decay_mask

    def __check_init__(self) -> None:
        check_rate(b1=self.b1, b2=self.b2)
        check_positive(eps=self.eps)
        check_nonnegative(weight_decay=self.weight_decay)
        if self.max_grad_norm is not None:
            check_positive(max_grad_norm=self.max_grad_norm)

    def init(self, model: PyTree) -> AdamWState:
        """The state before the first update: zero moments for each inexact array of `model`."""
        trained = eqx.filter(model, eqx.is_inexact_array)
        # Two sets of buffers: a function that donates the state must not get one twice.
        mu, nu = (jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), trained) for _ in range(2))
        return AdamWState(step=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    @eqx.filter_jit
    def update(self, grads: PyTree, state: AdamWState, model: Model) -> tuple[Model, AdamWState]:
        """The model and the state after one update.

        Compiled, and nothing is donated: the old model stays usable. Within a compiled function
        of yours it becomes a part of that function, which may donate.

        Arguments:
            grads: gradients of the model's structure, None where nothing is trained.
            state: what `init` or the last `update` returned.
            model: the model before the update.

        Raises:
            ValueError: if `grads`, `state` or the decay mask do not fit the model.
        """
        decays = self.decay_mask(model)
        check_fit(model, decay_mask=decays, mu=state.mu)
        check_fit(state.mu, nu=state.nu, grads=grads)
        if self.max_grad_norm is not None:
            grads, _ = clip_by_global_norm(grads, self.max_grad_norm)
        new = jax.tree.map(
            self._rule(state.step, self.rate(state)), model, grads, state.mu, state.nu, decays
        )
        model, mu, nu = (jax.tree.map(lambda _, row, i=i: row[i], model, new) for i in range(3))
        return model, AdamWState(step=state.step + 1, mu=mu, nu=nu)

    def rate(self, state: AdamWState) -> Float[Array, ""]:
        """The learning rate of the next update."""
        rate = self.learning_rate
        return jnp.asarray(rate(state.step) if callable(rate) else rate, jnp.float32)

    def _rule(self, step: Int32[Array, ""], rate: Float[Array, ""]) -> Callable:
        """The update of one leaf at `step`: `(p, g, mu, nu, decays) -> (p, mu, nu)`."""
        c1, c2 = (_bias_correction(b, step + 1) for b in (self.b1, self.b2))

        def rule(p: Any, g: Any, mu: Any, nu: Any, decays: bool) -> tuple[Any, Any, Any]:
            if g is None:
                return p, mu, nu
            g = g.astype(jnp.float32)
            mu = self.b1 * mu + (1 - self.b1) * g
            nu = self.b2 * nu + (1 - self.b2) * g**2
            update = (mu / c1) / (jnp.sqrt(nu / c2) + self.eps)
            if decays:
                update += self.weight_decay * p.astype(jnp.float32)
            return p - (rate * update).astype(p.dtype), mu, nu

        return rule
