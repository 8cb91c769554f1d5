"""The leaves of a model to which weight decay applies."""

from typing import Any

import jax
from jaxtyping import PyTree

from jaxformers.optim.layout import default_layout, leaf_path
from jaxformers.trainability import trainable


def default_decay_mask(model: PyTree, *, decay_embeddings: bool = True) -> PyTree[bool]:
    """Returns the model's tree with a bool for each leaf: True for weights, False for vectors.

    Weight decay applies where the bool is True: to the trained arrays that `default_layout` reads
    as matrices. Norms, gains and biases do not decay. The number of axes does not decide, because
    the biases of attention have two.

    Arguments:
        model: any pytree.
        decay_embeddings: whether embedding tables decay, True. An embedding table is an array
            below a field whose name contains "embed" or "position".

    Example:
        >>> default_decay_mask({"w": jnp.ones((3, 2)), "b": jnp.ones((3, 2)), "gain": jnp.ones(3)})
        {'b': False, 'gain': False, 'w': True}
    """

    def decays(path: tuple, leaf: Any, trained: bool) -> bool:
        name = leaf_path(model, path)
        embedding = any(word in name.lower() for word in ("embed", "position"))
        spared = embedding and not decay_embeddings
        return trained and default_layout(name, leaf).inputs > 0 and not spared

    return jax.tree_util.tree_map_with_path(decays, model, trainable(model))
