"""Lion."""

from collections.abc import Callable
from dataclasses import KW_ONLY

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_rate
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.leafwise import LeafwiseOptimizer, Moments, learning_rate


class Lion(LeafwiseOptimizer):
    """Each number of a leaf moves by the learning rate, up or down (Chen et al. 2023, algorithm 2).

        p  <- p - rate (sign(b1 mu + (1 - b1) g) + weight_decay p)
        mu <- b2 mu + (1 - b2) g

    as in `optax.lion`. It keeps one moment where AdamW keeps two. The authors take a learning rate
    3 to 10 times smaller than AdamW's and a weight decay as many times larger.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate` (step 0 comes first).
        b1: the moment's share in the direction, in [0, 1), 0.9.
        b2: decay of the moment, in [0, 1), 0.99.
        weight_decay: at least 0, 0.1; multiplied by the learning rate of the step.
        max_grad_norm: gradients are first clipped to this global norm; None for no clipping.
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
        """The mean of gradients, zeros."""
        return {"mu": jnp.zeros(p.shape, jnp.float32)}

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
