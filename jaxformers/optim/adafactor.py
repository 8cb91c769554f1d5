"""The optimizer Adafactor."""

from collections.abc import Callable
from dataclasses import KW_ONLY

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_nonnegative, check_positive
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.layout import LayoutFunction, default_layout
from jaxformers.optim.leafwise import LeafwiseOptimizer, Moments, learning_rate
from jaxformers.optim.schedules import Schedule


def relative_step(largest: float = 0.01) -> Schedule:
    """Returns the relative step size of Adafactor as a schedule.

    It is `min(largest, 1 / sqrt(t))` in update `t`, which counts from 1 (Shazeer & Stern 2018).

    Arguments:
        largest: upper bound of the rate, at least 0; 0.01.

    Raises:
        ValueError: if `largest` is negative or not finite.

    Example:
        >>> print(relative_step(0.5)(jnp.asarray([0, 3, 24])))
        [0.5 0.5 0.2]
    """
    check_nonnegative(largest=largest)
    return Schedule(_relative_step, (float(largest),))


def _relative_step(step: Int32[Array, "*n"], largest: float) -> Float[Array, "*n"]:
    return jnp.minimum(largest, 1 / jnp.sqrt((step + 1).astype(jnp.float32)))


class Adafactor(LeafwiseOptimizer):
    """Adam without a first moment, whose second moment is factored (Shazeer & Stern 2018).

    The state of a matrix holds the row means and the column means of its squared gradients. It
    takes `inputs + outputs` numbers for a matrix of shape `(inputs, outputs)`. The state of a
    vector holds every squared gradient. The update `t` counts from 1, and `rms` is the root mean
    square. Algorithms 4 and 5 of the paper are:

        decay   = 1 - t^-decay_rate
        rows    <- decay rows    + (1 - decay) (mean over outputs of g^2 + eps)
        columns <- decay columns + (1 - decay) (mean over inputs  of g^2 + eps)
        u = g / sqrt(rows columns / mean(rows))
        p <- p - rate (max(smallest_scale, rms(p)) u / max(1, rms(u) / max_rms) + weight_decay p)

    `optax.adafactor` differs in one point: it does not multiply the weight decay by the learning
    rate. `transformers.Adafactor` multiplies the weight decay by `rms(p)` as well.
    `torch.optim.Adafactor` adds `eps` at another place.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate`. The default is the
            schedule `relative_step()` of the paper, which decreases from 0.01. The rate is relative
            to the size of the weights unless `smallest_scale` is None.
        decay_rate: exponent with which the decay of the second moment approaches 1, above 0; 0.8.
        max_rms: limit of the root mean square of an update, 1. A larger update is scaled down to
            it. None sets no limit.
        smallest_scale: lower bound of the root mean square of the weights, by which the step is
            multiplied; 1e-3. With None the step does not depend on the weights.
        eps: number that is added to the squared gradients, above 0; 1e-30.
        weight_decay: at least 0; 0. It is multiplied by the learning rate of the step.
        max_grad_norm: global norm to which gradients are clipped before the update. None, the
            default, does not clip.
        decay_mask: function `model -> tree of bools`, True where weight decay applies.
        layout: function `(path, array) -> Layout` that says which axes of a leaf are rows and which
            are columns. Each layer and each expert has its own rows, columns and root mean squares.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> optimizer = Adafactor()
        >>> state = optimizer.init(model)
        >>> {name: x.shape for name, x in state.moments.output.w.items()}
        {'rows': (1, 16), 'columns': (1, 65)}
    """

    learning_rate: Float[ArrayLike, ""] | Callable = eqx.field(
        default=relative_step(), converter=learning_rate
    )
    decay_rate: float = 0.8
    max_rms: float | None = 1.0
    smallest_scale: float | None = 1e-3
    eps: float = 1e-30
    weight_decay: float = 0.0
    _: KW_ONLY
    max_grad_norm: float | None = None
    decay_mask: Callable[[PyTree], PyTree[bool]] = default_decay_mask
    layout: LayoutFunction = default_layout

    def __check_init__(self) -> None:
        check_positive(decay_rate=self.decay_rate, eps=self.eps)
        optional = {"max_rms": self.max_rms, "smallest_scale": self.smallest_scale}
        check_positive(**{name: x for name, x in optional.items() if x is not None})

    def moments(self, path: str, p: Float[Array, "..."]) -> Moments:
        """Returns zeros for the means of squared gradients by row and by column.

        For a vector they are zeros for each squared gradient.
        """
        layout = self.layout(path, p)
        zeros = layout.matrices(jnp.zeros_like(p, jnp.float32))  # on the devices of the leaf
        if layout.inputs == 0:
            return {"squares": zeros}
        return {"rows": zeros.sum(-1), "columns": zeros.sum(-2)}

    def direction(
        self,
        path: str,
        p: Float[Array, "..."],
        g: Float[Array, "..."],
        moments: Moments,
        step: Int32[Array, ""],
    ) -> tuple[Float[Array, "..."], Moments]:
        layout, shape = self.layout(path, p), p.shape
        p, g = layout.matrices(p), layout.matrices(g)
        fresh = (step + 1).astype(jnp.float32) ** -self.decay_rate
        squares = g**2 + self.eps
        if layout.inputs == 0:
            means = {"squares": squares}
        else:
            means = {"rows": squares.mean(-1), "columns": squares.mean(-2)}
        moments = {name: (1 - fresh) * moments[name] + fresh * x for name, x in means.items()}
        update = g * _inverse_root(moments)
        if self.max_rms is not None:
            update /= jnp.maximum(1.0, _rms(update) / self.max_rms)
        if self.smallest_scale is not None:
            update *= jnp.maximum(self.smallest_scale, _rms(p))
        return update.reshape(shape), moments


def _inverse_root(moments: Moments) -> Float[Array, "apart i o"]:
    """Returns `1 / sqrt(second moment)`, for a matrix from its row and column means."""
    if "squares" in moments:
        return 1 / jnp.sqrt(moments["squares"])
    rows, columns = moments["rows"], moments["columns"]
    # The two roots are separate: the product of two small means would be zero in float32.
    rows = rows / rows.mean(-1, keepdims=True)
    return (1 / jnp.sqrt(rows))[..., :, None] * (1 / jnp.sqrt(columns))[..., None, :]


def _rms(x: Float[Array, "apart i o"]) -> Float[Array, "apart 1 1"]:
    return jnp.sqrt(jnp.mean(x**2, axis=(-2, -1), keepdims=True))
