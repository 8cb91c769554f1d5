"""Which arrays of a model are trained."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxformers.weights import WeightObject


def trainable(model: PyTree) -> PyTree[bool]:
    """Returns the model's tree with True for each array to train.

    These are all inexact arrays, unless weights are objects that say which of their fields are
    trained. `LowRank` trains its factors, and a model with such adapters trains the adapters alone.
    Neither the base of an adapter nor a quantized weight is ever trained. Where adapters lie on one
    another, the outermost is trained.

    All optimizers of this package train these arrays, and so do `fit`, `train_step` and optax
    transformations in them. In a loop of your own, split the model by this tree.

    Arguments:
        model: any pytree.

    Example:
        >>> linear = {"w": LowRank.of(jnp.ones((3, 2)), rank=1, key=key), "b": jnp.ones(2)}
        >>> is_trained = trainable(linear)
        >>> is_trained["w"].base, is_trained["w"].a, is_trained["b"]
        (False, True, False)
        >>> trained, frozen = eqx.partition(linear, is_trained)
    """
    nodes, structure = jax.tree.flatten(model, is_leaf=_chooses)
    adapted = _any_adapter(nodes)

    def of_node(node: Any) -> PyTree[bool]:
        if not _chooses(node):
            return eqx.is_inexact_array(node) and not adapted
        return jax.tree_util.tree_map_with_path(
            lambda path, x: path[0].name in node.trained_fields and eqx.is_inexact_array(x), node
        )

    return jax.tree.unflatten(structure, [of_node(node) for node in nodes])


def has_adapters(model: PyTree) -> bool:
    """Returns whether weights of a model are objects that train a part of themselves."""
    return _any_adapter(jax.tree.leaves(model, is_leaf=_chooses))


def _any_adapter(nodes: list[Any]) -> bool:
    return any(_chooses(x) and bool(x.trained_fields) for x in nodes)


def _chooses(x: Any) -> bool:
    """Returns whether `x` is an object that says which of its fields are trained."""
    return isinstance(x, WeightObject) and x.trained_fields is not None
