"""The optimizer Muon for the matrices inside a model, with another optimizer for the rest."""

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_callable, check_flag, check_rate
from jaxformers.optim.adamw import AdamW
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.groups import Groups, Predicate
from jaxformers.optim.layout import LayoutFunction, default_layout
from jaxformers.optim.leafwise import LeafwiseOptimizer, Moments, learning_rate
from jaxformers.optim.optimizer import Model, Optimizer

Coefficients = tuple[tuple[float, float, float], ...]

# Jordan's triple, five times. Singular values approach 1 quickly, but do not become exactly 1.
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonalize(
    x: Float[Array, "*n i o"], coefficients: Coefficients = QUINTIC
) -> Float[Array, "*n i o"]:
    """Returns matrices with about the same singular vectors and with singular values near 1.

    They are the result of a Newton-Schulz iteration. It divides `x` by its norm, and computes
    `x <- a x + (b x x^T + c (x x^T)^2) x` for each of the triples (Jordan et al. 2024, Muon).

    Arguments:
        x: one matrix or several.
        coefficients: a triple `(a, b, c)` for each step; Jordan's triple five times.

    Example:
        >>> orthogonalize(jnp.asarray([[3.0, 0.0], [0.0, -0.2]])).round(1)
        Array([[ 0.7,  0. ],
               [ 0. , -1.1]], dtype=float32)
    """
    if x.shape[-2] > x.shape[-1]:  # x x^T is then the smaller of the two squares
        return jnp.swapaxes(orthogonalize(jnp.swapaxes(x, -1, -2), coefficients), -1, -2)

    def step(x, abc):
        a, b, c = abc
        square = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * square + c * (square @ square)) @ x, None

    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / jnp.maximum(norm, 1e-7)
    return jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]


def match_adamw(inputs: int, outputs: int) -> float:
    """Returns the factor `0.2 sqrt(max(inputs, outputs))` of an orthogonal matrix.

    With it, updates have about the root mean square of AdamW's updates, so that learning rates of
    AdamW fit (Liu et al. 2025).

    Example:
        >>> match_adamw(400, 100)
        4.0
    """
    return 0.2 * max(inputs, outputs) ** 0.5


def match_width(inputs: int, outputs: int) -> float:
    """Returns the factor `sqrt(max(1, outputs / inputs))` of an orthogonal matrix.

    It is that of Jordan's original Muon, whose learning rates are about 0.02.

    Example:
        >>> match_width(100, 400), match_width(400, 100)
        (2.0, 1.0)
    """
    return max(1.0, outputs / inputs) ** 0.5


def is_hidden_matrix(path: str, array: Any) -> bool:
    """Returns whether a leaf is a matrix inside the model.

    Embeddings, positions, output layers, classifiers, biases and norms are not.

    Example:
        >>> is_hidden_matrix("decoder.layers.0.self_attention.wq", jnp.ones((16, 2, 8)))
        True
        >>> is_hidden_matrix("embedding.token_embedding.weight", jnp.ones((65, 16)))
        False
    """
    layout = default_layout(path, array)
    outside = re.search("embed|position|score_bias|output|classifier|head", path.lower())
    # A single row or column cannot be made orthogonal.
    return min(layout.sizes(array.shape)[1:]) > 1 and outside is None


class OrthogonalMomentum(LeafwiseOptimizer):
    """The rule of Muon for matrices alone. `Muon` describes its arguments.

    Example:
        >>> matrices = OrthogonalMomentum(0.02, scale=match_width)
        >>> optimizer = Groups([(is_hidden_matrix, matrices)], rest=Lion(1e-4))
        >>> state = optimizer.init(model)
    """

    learning_rate: Float[ArrayLike, ""] | Callable = eqx.field(converter=learning_rate)
    momentum: float = eqx.field(default=0.95, converter=float)
    weight_decay: float = 0.1
    _: KW_ONLY
    nesterov: bool = True
    scale: Callable[[int, int], float] = match_adamw
    coefficients: Coefficients = QUINTIC
    layout: LayoutFunction = default_layout
    max_grad_norm: float | None = None
    decay_mask: Callable[[PyTree], PyTree[bool]] = default_decay_mask

    def __check_init__(self) -> None:
        check_rate(momentum=self.momentum)
        check_flag(nesterov=self.nesterov)
        check_callable(scale=self.scale, layout=self.layout)
        if np.ndim(self.coefficients) != 2 or np.shape(self.coefficients)[1] != 3:
            raise ValueError(
                "coefficients must be triples (a, b, c), one for each step, got "
                f"{self.coefficients!r}. One triple for 5 steps is ((a, b, c),) * 5."
            )

    def moments(self, path: str, p: Float[Array, "..."]) -> Moments:
        """Returns zeros for the mean of gradients.

        Raises:
            ValueError: if the leaf is no matrix.
        """
        if self.layout(path, p).inputs == 0:
            raise ValueError(
                f"Muon is for matrices, got {path} of shape {p.shape}, which the layout says is a "
                "vector. Leave it to another optimizer: Groups([(is_hidden_matrix, ...)], rest)."
            )
        return {"momentum": jnp.zeros_like(p, jnp.float32)}

    def direction(
        self,
        path: str,
        p: Float[Array, "..."],
        g: Float[Array, "..."],
        moments: Moments,
        step: Int32[Array, ""],
    ) -> tuple[Float[Array, "..."], Moments]:
        momentum = self.momentum * moments["momentum"] + (1 - self.momentum) * g
        ahead = self.momentum * momentum + (1 - self.momentum) * g if self.nesterov else momentum
        matrices = self.layout(path, p).matrices(ahead)
        scale = self.scale(*matrices.shape[1:])
        update = scale * orthogonalize(matrices, self.coefficients)
        return update.reshape(p.shape), {"momentum": momentum}


class Muon(Optimizer):
    """An optimizer that orthogonalizes the momentum of matrices (Jordan et al. 2024).

    A matrix `p` inside the model with gradient `g` is updated by

        momentum <- m momentum + (1 - m) g
        p <- p - rate (scale(inputs, outputs) orthogonalize(m momentum + (1 - m) g)
                       + weight_decay p)

    as in `torch.optim.Muon`, which computes in bfloat16; `Muon` computes in float32. optax's `muon`
    is equal if `nesterov` is False. If it is True, optax divides `m momentum` by `1 - m^(t + 1)`
    and `(1 - m) g` by `1 - m^t` in update `t`, which counts from 1, so that the newest gradient has
    more weight in the first updates.

    Another optimizer trains embeddings, the output layer, norms and biases. All heads of an
    attention form one matrix. Each layer and each expert has matrices of its own.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate` that counts from step 0.
        momentum: decay of the mean of gradients, in [0, 1); 0.95. It is `m` in the formula.
        weight_decay: at least 0; 0.1. It is multiplied by the learning rate of the step.
        rest: the optimizer of all other leaves, an `Optimizer` or an optax transformation. None,
            the default, is `AdamW` with the same learning rate and weight decay.
        max_grad_norm: norm over all leaves, the rest included, to which gradients are clipped
            before the update. None, the default, does not clip.
        nesterov: whether the update uses Nesterov momentum, as in the formula, True. If False, it
            orthogonalizes `momentum` alone.
        scale: function `(inputs, outputs) -> factor` of the orthogonal matrix. `match_adamw`, the
            default, fits learning rates of AdamW (torch's "match_rms_adamw"). `match_width` is
            torch's "original".
        coefficients: the triples of `orthogonalize`, one for each step.
        hidden: predicate `(path, array) -> bool`, True for the matrices that Muon trains.
        layout: function `(path, array) -> Layout` that divides the axes of a leaf into rows and
            columns.

    Raises:
        ValueError: if a number is out of its range. `init` raises it if `hidden` holds for no leaf.

    Example:
        >>> optimizer = Muon(1e-3, max_grad_norm=1.0)
        >>> state = optimizer.init(model)
    """

    groups: Groups

    def __init__(
        self,
        learning_rate: Float[ArrayLike, ""] | Callable,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        rest: Any = None,
        max_grad_norm: float | None = None,
        nesterov: bool = True,
        scale: Callable[[int, int], float] = match_adamw,
        coefficients: Sequence[tuple[float, float, float]] = QUINTIC,
        hidden: Predicate = is_hidden_matrix,
        layout: LayoutFunction = default_layout,
    ):
        matrices = OrthogonalMomentum(
            learning_rate,
            momentum,
            weight_decay,
            nesterov=nesterov,
            scale=scale,
            coefficients=tuple(coefficients),
            layout=layout,
        )
        rest = AdamW(learning_rate, weight_decay=weight_decay) if rest is None else rest
        self.groups = Groups([(hidden, matrices)], rest, max_grad_norm)

    def init(self, model: PyTree) -> PyTree:
        """Returns the states of the matrices and of the rest before the first update."""
        return self.groups.init(model)

    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, PyTree]:
        """Returns the model and the state after one update."""
        return self.groups.update(grads, state, model, **extra)

    def takes(self, name: str) -> bool:
        """Returns whether the optimizer of the rest takes an argument of this name."""
        return self.groups.takes(name)

    def trains(self, model: PyTree) -> PyTree[bool]:
        """Returns the model's tree with True for the matrices and each leaf the rest trains."""
        return self.groups.trains(model)

    def rate(self, state: PyTree) -> Float[Array, ""] | None:
        """Returns the learning rate of the matrices."""
        matrices = self.groups.optimizers[0]
        return None if matrices is None else matrices.rate(state[0])

    def averaged(self, model: Model, state: PyTree) -> Model:
        """Returns the model with the averages that the rest keeps."""
        return self.groups.averaged(model, state)
