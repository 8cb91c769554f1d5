"""The optimizer AdamW."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_positive, check_rate
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.leafwise import LeafwiseOptimizer, Moments, learning_rate


class AdamW(LeafwiseOptimizer):
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

    In update `t`, which counts from 1, a trained leaf `p` with gradient `g` is updated by

        mu <- b1 mu + (1 - b1) g,    nu <- b2 nu + (1 - b2) g^2
        p  <- p - rate (mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay p)

    as in `torch.optim.AdamW` and `optax.adamw`. A leaf does not change if it is no inexact array or
    if its gradient is None. Frozen leaves need no moments: `init` also accepts a model without
    them.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate` that counts from step 0.
        b1: decay of the first moment, in [0, 1); 0.9.
        b2: decay of the second moment, in [0, 1); 0.999.
        eps: number that is added to the denominator, above 0; 1e-8.
        weight_decay: at least 0; 0.01. It is multiplied by the learning rate of the step.
        max_grad_norm: global norm to which gradients are clipped before the update. None, the
            default, does not clip.
        decay_mask: function `model -> tree of bools`, True where weight decay applies. Embeddings
            do not decay with `functools.partial(default_decay_mask, decay_embeddings=False)`.
            Create this function once, because the update is compiled again for each new one.

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

    learning_rate: Float[ArrayLike, ""] | Callable = eqx.field(converter=learning_rate)
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

    def moments(self, path: str, p: Float[Array, "..."]) -> Moments:
        """Returns zeros for the means of gradients and of squared gradients."""
        return {name: jnp.zeros_like(p, jnp.float32) for name in ("mu", "nu")}

    def direction(
        self,
        path: str,
        p: Float[Array, "..."],
        g: Float[Array, "..."],
        moments: Moments,
        step: Int32[Array, ""],
    ) -> tuple[Callable[[Moments], Float[Array, "..."]], Moments]:
        mu = self.b1 * moments["mu"] + (1 - self.b1) * g
        nu = self.b2 * moments["nu"] + (1 - self.b2) * g**2
        c1, c2 = (_bias_correction(b, step + 1) for b in (self.b1, self.b2))

        def direction(moments: Moments) -> Float[Array, "..."]:
            return (moments["mu"] / c1) / (jnp.sqrt(moments["nu"] / c2) + self.eps)

        return direction, {"mu": mu, "nu": nu}


def _bias_correction(b: float, t: Int32[Array, ""]) -> Float[Array, ""]:
    """Returns `1 - b**t`.

    For b = 0.999 the plain formula in float32 would have an error of 1e-5.
    """
    return -jnp.expm1(t.astype(jnp.float32) * (math.log(b) if b else -math.inf))
