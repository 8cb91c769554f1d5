"""Muon for the matrices inside a model, another optimizer for the rest."""

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

# Jordan's, five times: singular values go to about 1 fast, rather than to exactly 1.
QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonalize(
    x: Float[Array, "*n i o"], coefficients: Coefficients = QUINTIC
) -> Float[Array, "*n i o"]:
    """Matrices with about the same singular vectors and with singular values near 1.

    A Newton-Schulz iteration: `x <- a x + (b x x^T + c (x x^T)^2) x` from `x` of norm 1, for each
    of the triples (Jordan et al. 2024, Muon).

    Arguments:
        x: one matrix or more.
        coefficients: a triple `(a, b, c)` for each step.

    Example:
        >>> orthogonalize(jnp.asarray([[3.0, 0.0], [0.0, -0.2]])).round(1)
        Array([[ 0.7,  0. ],
               [ 0. , -1.1]], dtype=float32)
    """
    if x.shape[-2] > x.shape[-1]:  # the smaller of the two squares
        return jnp.swapaxes(orthogonalize(jnp.swapaxes(x, -1, -2), coefficients), -1, -2)

    def step(x, abc):
        a, b, c = abc
        square = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * square + c * (square @ square)) @ x, None

    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / jnp.maximum(norm, 1e-7)
    return jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]


def match_adamw(inputs: int, outputs: int) -> float:
    """Updates of about AdamW's root mean square, for AdamW's learning rates (Liu et al. 2025).

    Example:
        >>> match_adamw(400, 100)
        4.0
    """
    return 0.2 * max(inputs, outputs) ** 0.5


def match_width(inputs: int, outputs: int) -> float:
    """Updates as in Jordan's original Muon, whose learning rates are about 0.02.

    Example:
        >>> match_width(100, 400), match_width(400, 100)
        (2.0, 1.0)
    """
    return max(1.0, outputs / inputs) ** 0.5


def is_hidden_matrix(path: str, array: Any) -> bool:
    """Whether a leaf is a matrix inside the model: no embedding, position, output, bias or norm.

    Example:
        >>> is_hidden_matrix("decoder.layers.0.self_attention.wq", jnp.ones((16, 2, 8)))
        True
        >>> is_hidden_matrix("embedding.token_embedding.weight", jnp.ones((65, 16)))
        False
    """
    layout = default_layout(path, array)
    outside = re.search("embed|position|score_bias|output|classifier|head", path.lower())
    # Of a single row or column there is nothing to make orthogonal.
    return min(layout.sizes(array.shape)[1:]) > 1 and outside is None


class OrthogonalMomentum(LeafwiseOptimizer):
    """The rule of Muon, for matrices alone; see there for its arguments.

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
        """The mean of gradients, zeros.

        Raises:
            ValueError: if the leaf is no matrix.
        """
        if self.layout(path, p).inputs == 0:
            raise ValueError(
                f"Muon is for matrices, got {path} of shape {p.shape}, which the layout says is a "
                "vector. Leave it to another optimizer: Groups([(is_hidden_matrix, ...)], rest)."
            )
        return {"momentum": jnp.zeros(p.shape, jnp.float32)}

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
    """Momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024).

    For matrices inside the model, with `g` their gradients:

        momentum <- m momentum + (1 - m) g
        p <- p - rate (scale(inputs, outputs) orthogonalize(m momentum + (1 - m) g)
                       + weight_decay p)

    as in `torch.optim.Muon`, and in float32 where that computes in bfloat16. optax's `muon` differs
    where `nesterov` is True: in update t (the first is 1) it divides `m momentum` by
    `1 - m^(t + 1)` and `(1 - m) g` by `1 - m^t`, so that the newest gradient weighs more at first;
    where it is False, both are the same. Embeddings, the output
    layer, norms and biases are trained by another optimizer. Heads of attention are one matrix
    together; layers and experts are matrices of their own.

    Arguments:
        learning_rate: a number of at least 0, or a schedule `step -> rate` (step 0 comes first).
        momentum: decay of the mean of gradients, in [0, 1), 0.95.
        weight_decay: at least 0, 0.1; multiplied by the learning rate of the step.
        rest: the optimizer for what is no such matrix, ours or optax's. None is `AdamW` with the
            same learning rate and weight decay.
        max_grad_norm: gradients are first clipped to this global norm, those of the rest included;
            None for no clipping.
        nesterov: whether the current gradient counts again, True.
        scale: function `(inputs, outputs) -> factor` on the orthogonal matrix: `match_adamw`, which
            suits AdamW's learning rates (torch's "match_rms_adamw"), or `match_width` (torch's
            "original").
        coefficients: of the Newton-Schulz iteration, a triple for each step.
        hidden: predicate `(path, array) -> bool`, which leaves are such matrices.
        layout: function `(path, array) -> Layout`, how the axes of a leaf make a matrix.

    Raises:
        ValueError: if a number is out of its range; by `init`, if there is no such matrix.

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
        """The states of the matrices and of the rest before the first update."""
        return self.groups.init(model)

    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, PyTree]:
        """The model and the state after one update."""
        return self.groups.update(grads, state, model, **extra)

    def takes(self, name: str) -> bool:
        """What the optimizer of the rest takes."""
        return self.groups.takes(name)

    def trains(self, model: PyTree) -> PyTree[bool]:
        """All, unless the rest leaves something out."""
        return self.groups.trains(model)

    def rate(self, state: PyTree) -> Float[Array, ""] | None:
        """The learning rate of the matrices."""
        matrices = self.groups.optimizers[0]
        return None if matrices is None else matrices.rate(state[0])

    def averaged(self, model: Model, state: PyTree) -> Model:
        """The model with the averages that the rest keeps."""
        return self.groups.averaged(model, state)
