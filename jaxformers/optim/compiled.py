"""Updates as compiled programs, and the checks of their arguments."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxformers.checks import check_usable, is_known
from jaxformers.precision import noticed

Update = TypeVar("Update", bound=Callable)
Tree = TypeVar("Tree", bound=PyTree)


def compiled(update: Update) -> Update:
    """Returns the method `update` as a compiled program.

    Within another compiled function it becomes a part of that function. It raises an error for
    arrays that have been donated, and warns once about weights of 16 bits.
    """
    program = eqx.filter_jit(update)

    @functools.wraps(update)
    def run(self: Any, grads: PyTree, state: PyTree, model: PyTree, **extra: Any) -> Any:
        known = all(is_known(x) for x in jax.tree.leaves((grads, state, model)))
        check_usable(grads=grads, state=state, model=model)

        def trained() -> PyTree:
            check_fit(model, grads=grads)
            has_gradient = jax.tree.map(lambda p, g: p if g is not None else None, model, grads)
            return eqx.filter(has_gradient, self.trains(model))

        with noticed(getattr(self, "transformation", self), model, trained):
            # Within another program it is inlined: the compiler sees which arrays do not change.
            return (program if known else update)(self, grads, state, model, **extra)

    return run  # type: ignore[return-value]


def choose(good: Bool[Array, ""] | None, new: Tree, old: PyTree) -> Tree:
    """Returns the arrays of `new` if `good` is True or None, else those of `old`."""

    def one(x: Any, y: Any) -> Any:
        if good is None or x is y or not eqx.is_array(x):
            return x
        return jnp.where(good, x, y if y.dtype == x.dtype else y.astype(x.dtype))

    return jax.tree.map(one, new, old)


def own_arrays(tree: Tree) -> Tree:
    """Returns a tree whose arrays are copies, each with a buffer of its own.

    The first state of an optax transformation may hold the weights themselves, or a key that the
    transformation keeps. A step that donates its state would overwrite them.
    """
    leaves, structure = jax.tree.flatten(tree)
    del tree  # frees each array that has no other owner as soon as it is copied
    for i, x in enumerate(leaves):
        leaves[i] = x.copy() if isinstance(x, jax.Array) else x
    return jax.tree.unflatten(structure, leaves)


def check_fit(model: PyTree, **trees: PyTree) -> None:
    """Checks that each tree has, for each leaf of the model, an array of its shape or None.

    Raises:
        ValueError: if a tree has another structure or an array of another shape.
    """

    def check(path: tuple, p: Any, x: Any) -> str | None:
        fits = eqx.is_inexact_array(p) and eqx.is_array(x) and x.shape == p.shape
        # The moments of a leaf are a dict of arrays with other shapes.
        if x is None or isinstance(x, bool | np.bool | dict) or fits:
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


def check_state(state: Any, kind: type[Any], length: int | None = None) -> None:
    """Checks that a state has the type that `init` returns, and the length.

    Raises:
        ValueError: if it has another type or length.
    """
    fits = isinstance(state, kind) and (length is None or len(state) == length)
    if not fits:
        count = "" if length is None else f" of {length}"
        raise ValueError(
            "the state must be that of this optimizer, from init or the last update: expected "
            f"{kind.__name__}{count}, got {eqx.tree_pformat(state):.200}"
        )
