"""Updates as compiled programs, and what is looked at before one."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from jaxformers.checks import check_usable, is_known
from jaxformers.precision import noticed

Update = TypeVar("Update", bound=Callable)
Tree = TypeVar("Tree", bound=PyTree)


def compiled(update: Update) -> Update:
    """Returns the method `update` as a compiled program, or as a part of the one it is called in.

    Arrays that a step was given to write over are refused, and of weights of 16 bits a warning
    speaks once.
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
            # Not a program of its own within another one, which sees then what stays as it is.
            return (program if known else update)(self, grads, state, model, **extra)

    return run  # type: ignore[return-value]


def own_arrays(tree: Tree) -> Tree:
    """Returns a tree each of whose arrays is a copy, at one place alone and owned by nobody else.

    The state that an optax transformation begins with may hold the weights themselves, or a key
    that the transformation keeps; a step writes over what it is given.
    """
    leaves, structure = jax.tree.flatten(tree)
    del tree  # one array at a time: what nobody else has is free when it is copied
    for i, x in enumerate(leaves):
        leaves[i] = x.copy() if isinstance(x, jax.Array) else x
    return jax.tree.unflatten(structure, leaves)


def check_fit(model: PyTree, **trees: PyTree) -> None:
    """Raise unless each tree has, at each leaf of the model, an array of its shape or none."""

    def check(path: tuple, p: Any, x: Any) -> str | None:
        fits = eqx.is_inexact_array(p) and eqx.is_array(x) and x.shape == p.shape
        # A leaf's moments, in a dict, have shapes of their own.
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
    """Raise unless a state is of the kind that `init` makes."""
    fits = isinstance(state, kind) and (length is None or len(state) == length)
    if not fits:
        count = "" if length is None else f" of {length}"
        raise ValueError(
            "the state must be that of this optimizer, from init or the last update: expected "
            f"{kind.__name__}{count}, got {eqx.tree_pformat(state):.200}"
        )
