"""The number of operations that a model takes, from its shapes alone."""

import math
from typing import Any

import jax

from jaxformers.mixture_of_experts import MixtureOfExperts
from jaxformers.paths import path_name
from jaxformers.weight_fields import map_weights


def map_operations(model: Any) -> int:
    """Returns the operations of the linear maps for one token.

    An operation is an addition or a multiplication; norms, activations and softmax do not count.
    Of several experts those count that a token goes to.

    Arguments:
        model: a model, whose arrays may be shapes alone.
    """

    def is_mixture(x: Any) -> bool:
        return isinstance(x, MixtureOfExperts)

    mixtures = {
        path_name(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_mixture)
        if is_mixture(x)
    }
    total = 0

    def count(name: str, weight: Any, axes: Any) -> Any:
        nonlocal total
        size = math.prod(weight.shape)
        mixture = mixtures.get(name.rpartition(".")[0])
        if mixture is not None and axes.apart:
            size = size * mixture.top_k // mixture.router.shape[-1]
        if "embedding" not in name:
            total += 2 * size
        return weight

    map_weights(count, model)
    output = getattr(model, "output", None)
    if output is not None and output.tied:
        embedding = model.tgt_embedding if hasattr(model, "tgt_embedding") else model.embedding
        total += 2 * math.prod(embedding.table.shape)
    return total


def attention_operations(decoder: Any) -> int:
    """Returns the operations of attention for one token and each token that it attends to."""
    return sum(heads_operations(layer.self_attention) for layer in decoder.layers)


def heads_operations(attention: Any) -> int:
    """Returns the operations of one attention for a pair of query and key: score and sum."""
    return 4 * attention.num_heads * attention.head_dim
