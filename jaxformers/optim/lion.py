"""The optimizer Lion."""

from collections.abc import Callable
from dataclasses import KW_ONLY

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_rate
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.leafwise import LeafwiseOptimizer, Moments, learning_rate


class Lion(LeafwiseOptimizer):
    """An optimizer that steps by the sign of a momentum (Chen et al. 2023, algorithm 2).

        p  <- p - rate (sign(b1 mu + (1 - b1) g) + weight_decay p)
        mu <- b2 mu + (1 - b2) g

    as in `optax.lion`. Lion keeps one moment, and AdamW keeps two. The authors use a learning rate
    3 to 10 times smaller than that of AdamW, and a weight decay larger by the same factor.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate` that counts from step 0.
        b1: weight of the moment in the direction, in [0, 1); 0.9.
        b2: decay of the moment, in [0, 1); 0.99.
        weight_decay: at least 0; 0.1. It is multiplied by the learning rate of the step.
        max_grad_norm: global norm to which gradients are clipped before the update. None, the
            default, does not clip.
        decay_mask: function `model -> tree of bools`, True where weight decay applies.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> optimizer = Lion(1e-4)
        >>> state = optimizer.init(model)
    """

    learning_rate: Float[ArrayLike, ""] | Callable = eqx.field(converter=learning_rate)
    b1: float = eqx.field(default=0.9, converter=float)
    b2: float = eqx.field(default=0.99, converter=float)
    weight_decay: float = 0.1
    _: KW_ONLY
    max_grad_norm: float | None = None
    decay_mask: Callable[[PyTree], PyTree[bool]] = default_decay_mask

    def __check_init__(self) -> None:
        check_rate(b1=self.b1, b2=self.b2)

    def moments(self, path: str, p: Float[Array, "..."]) -> Moments:
        """Returns zeros for the mean of gradients."""
        return {"mu": jnp.zeros_like(p, jnp.float32)}

    def direction(
        self,
        path: str,
        p: Float[Array, "..."],
        g: Float[Array, "..."],
        moments: Moments,
        step: Int32[Array, ""],
    ) -> tuple[Float[Array, "..."], Moments]:
        mu = moments["mu"]
        direction = jnp.sign(self.b1 * mu + (1 - self.b1) * g)
        return direction, {"mu": self.b2 * mu + (1 - self.b2) * g}
