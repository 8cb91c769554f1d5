"""Which leaves of a model weight decay applies to."""

import re
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree


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
