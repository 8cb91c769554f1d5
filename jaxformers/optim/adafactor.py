"""Adafactor."""

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
    """The paper's relative step size, `min(largest, 1 / sqrt(t))` with `t` from 1.

    Arguments:
        largest: the rate of the first steps, at least 0.

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
    """Adam without a first moment, and of the second only rows and columns (Shazeer & Stern 2018).

    A matrix of gradients' squares is remembered by the means of its rows and of its columns, so
    that the state of `(inputs, outputs)` takes `inputs + outputs` numbers; a vector's is whole.
    With `t` from 1 and `rms` the root of the mean of squares, the paper's algorithms 4 and 5:

        decay   = 1 - t^-decay_rate
        rows    <- decay rows    + (1 - decay) (mean over outputs of g^2 + eps)
        columns <- decay columns + (1 - decay) (mean over inputs  of g^2 + eps)
        u = g / sqrt(rows columns / mean(rows))
        p <- p - rate (max(smallest_scale, rms(p)) u / max(1, rms(u) / max_rms) + weight_decay p)

    as in `optax.adafactor` (but that there the decay is not multiplied by the learning rate) and
    `transformers.Adafactor` (there it is multiplied by `rms(p)` as well). `torch.optim.Adafactor`
    has another place for `eps`.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate`; the paper's
            `relative_step()`, which falls from 0.01. It is relative to the size of the weights
            unless `smallest_scale` is None.
        decay_rate: how fast the decay of the second moment goes to 1, above 0, 0.8.
        max_rms: updates of a larger root mean square are scaled down to it, 1; None for none.
        smallest_scale: the step is multiplied by the root mean square of the weights, or by this if
            that is smaller, 1e-3; None for steps that do not depend on the weights.
        eps: added to the squares of gradients, above 0, 1e-30.
        weight_decay: at least 0, 0; multiplied by the learning rate of the step.
        max_grad_norm: gradients are first clipped to this global norm; None for no clipping.
        decay_mask: function `model -> tree of bools`, True where weight decay applies.
        layout: function `(path, array) -> Layout`, which axes of a leaf are rows and columns.
            Layers and experts are apart: each has its rows, columns and root mean squares.

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
        """The means of rows and columns of the squared gradients, or of each square, zeros."""
        layout = self.layout(path, p)
        apart, rows, columns = layout.sizes(p.shape)
        if layout.inputs == 0:
            return {"squares": jnp.zeros((apart, rows, columns), jnp.float32)}
        shapes = {"rows": (apart, rows), "columns": (apart, columns)}
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

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
    """`1 / sqrt(second moment)`, where need be from its rows and columns."""
    if "squares" in moments:
        return 1 / jnp.sqrt(moments["squares"])
    rows, columns = moments["rows"], moments["columns"]
    # Two roots: the product of two small means would be zero in float32.
    rows = rows / rows.mean(-1, keepdims=True)
    return (1 / jnp.sqrt(rows))[..., :, None] * (1 / jnp.sqrt(columns))[..., None, :]


def _rms(x: Float[Array, "apart i o"]) -> Float[Array, "apart 1 1"]:
    return jnp.sqrt(jnp.mean(x**2, axis=(-2, -1), keepdims=True))
