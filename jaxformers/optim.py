"""AdamW written out, gradient clipping, and one protocol for every optimiser.

    state = optimizer.init(model)
    model, state = optimizer.update(grads, state, model)

`grads` come from `eqx.filter_grad`: None for what is not trained.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jaxformers.checks import check_nonnegative, check_positive, check_rate, is_known

Model = TypeVar("Model", bound=PyTree)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all inexact arrays of a tree as one vector, computed in float32.

    Arguments:
        tree: any pytree, gradients for instance; other leaves do not count.

    Example:
        >>> print(global_norm({"w": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}))
        5.0
    """
    arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in arrays]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_by_global_norm(grads: PyTree, max_norm: float) -> tuple[PyTree, Float[Array, ""]]:
    """Gradients scaled down together so that their norm is at most `max_norm`, and their old norm.

    Gradients within the limit stay as they are (Pascanu et al. 2013).

    Arguments:
        grads: gradients; leaves that are not inexact arrays pass through.
        max_norm: the limit, above 0.

    Raises:
        ValueError: if `max_norm` is not a finite number above 0.

    Example:
        >>> grads, norm = clip_by_global_norm({"w": jnp.asarray([3.0, 4.0])}, 1.0)
        >>> print(grads["w"], norm)
        [0.6 0.8] 5.0
    """
    if is_known(max_norm):
        check_positive(max_norm=max_norm)
    norm = global_norm(grads)
    scale = max_norm / jnp.maximum(norm, jnp.asarray(max_norm, jnp.float32))
    arrays, rest = eqx.partition(grads, eqx.is_inexact_array)
    arrays = jax.tree.map(lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), arrays)
    return eqx.combine(arrays, rest), norm


def default_decay_mask(model: PyTree, *, decay_embeddings: bool = True) -> PyTree[bool]:
    """The model's tree with a bool for each leaf, True for weights, False for norms and biases.

    Weight decay applies where it is True: to inexact arrays of at least two axes in a field named
    neither as a gain (`gain`) nor as a bias (`b`, `bq`, `b_in`, `bias`; attention's have two axes,
    so axes alone do not tell).

    Arguments:
        model: any pytree.
        decay_embeddings: whether embedding tables decay, True; they are what is below a field
            whose name contains "embed" or "position".

    Example:
        >>> default_decay_mask({"w": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "gain": jnp.ones(3)})
        {'b': False, 'gain': False, 'w': True}
    """

    def decays(path: tuple, leaf: Any) -> bool:
        names = [str(getattr(k, "name", getattr(k, "key", ""))).lower() for k in path]
        field = next(filter(None, reversed(names)), "")
        embedding = any("embed" in name or "position" in name for name in names)
        weight = eqx.is_inexact_array(leaf) and leaf.ndim >= 2
        spared = re.fullmatch("b|b[a-z]|b_.*|bias.*|gain.*", field) is not None or (
            embedding and not decay_embeddings
        )
        return weight and not spared

    return jax.tree_util.tree_map_with_path(decays, model)


class Optimizer(eqx.Module):
    """The protocol; derive from it to write an optimiser of your own.

    Example:
        >>> class GradientDescent(Optimizer):
        ...     rate: float
        ...
        ...     def init(self, model):
        ...         return None
        ...
        ...     def update(self, grads, state, model):
        ...         updates = jax.tree.map(lambda g: -self.rate * g, grads)
        ...         return eqx.apply_updates(model, updates), state
    """

    @abstractmethod
    def init(self, model: PyTree) -> PyTree:
        """The state before the first update."""

    @abstractmethod
    def update(self, grads: PyTree, state: PyTree, model: Model) -> tuple[Model, PyTree]:
        """The model and the state after one update."""


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
        _check_fit(model, decay_mask=decays, mu=state.mu)
        _check_fit(state.mu, nu=state.nu, grads=grads)
        if self.max_grad_norm is not None:
            grads, _ = clip_by_global_norm(grads, self.max_grad_norm)
        new = jax.tree.map(self._rule(state.step), model, grads, state.mu, state.nu, decays)
        model, mu, nu = (jax.tree.map(lambda _, row, i=i: row[i], model, new) for i in range(3))
        return model, AdamWState(step=state.step + 1, mu=mu, nu=nu)

    def _rule(self, step: Int32[Array, ""]) -> Callable:
        """The update of one leaf at `step`: `(p, g, mu, nu, decays) -> (p, mu, nu)`."""
        rate = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        rate = jnp.asarray(rate, jnp.float32)
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


class _Optax(Optimizer):
    """An optax transformation behind our protocol."""

    transformation: Any

    def init(self, model: PyTree) -> PyTree:
        return self.transformation.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(
        self, grads: PyTree, state: PyTree, model: Model, **extra: Any
    ) -> tuple[Model, PyTree]:
        _check_fit(model, grads=grads)
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


def _check_fit(model: PyTree, **trees: PyTree) -> None:
    """Raise unless each tree has, at each leaf of the model, an array of its shape or none."""

    def check(path: tuple, p: Any, x: Any) -> str | None:
        fits = eqx.is_inexact_array(p) and eqx.is_array(x) and x.shape == p.shape
        if x is None or isinstance(x, bool | np.bool) or fits:
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
