"""Which leaves of a model weight decay applies to."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxformers.optim.layout import default_layout, leaf_path


def default_decay_mask(model: PyTree, *, decay_embeddings: bool = True) -> PyTree[bool]:
    """The model's tree with a bool for each leaf, True for weights, False for norms and biases.

    Weight decay applies where it is True: to inexact arrays of at least two axes (a layer's, where
    layers are stacked) that belong to no norm, in a field named neither as a gain (`gain`, `scale`)
    nor as a bias (`b`, `bq`, `b_in`, `bias`; attention's have two axes, so axes alone do not tell).
    See `default_layout`.

    Arguments:
        model: any pytree.
        decay_embeddings: whether embedding tables decay, True; they are what is below a field
            whose name contains "embed" or "position".

    Example:
        >>> default_decay_mask({"w": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "gain": jnp.ones(3)})
        {'b': False, 'gain': False, 'w': True}
    """

    def decays(path: tuple, leaf: Any) -> bool:
        name = leaf_path(model, path)
        embedding = any(word in name.lower() for word in ("embed", "position"))
        spared = embedding and not decay_embeddings
        return eqx.is_inexact_array(leaf) and default_layout(name, leaf).inputs > 0 and not spared

    return jax.tree_util.tree_map_with_path(decays, model)
