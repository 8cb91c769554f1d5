"""The weights of a model: the fields that are annotated like `Float[Weight, "d n h"]`."""

import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxformers.axes import Axes, axes_at
from jaxformers.paths import path_name
from jaxformers.weights import Weight, is_object

Model = TypeVar("Model")


def map_weights(change: Callable[[str, Any, Axes], Any], model: Model) -> Model:
    """Returns the model with `change(path, weight, axes)` in place of each weight.

    Arguments:
        change: function of the path as text, such as "decoder.layers.0.self_attention.wq", of the
            weight, which is an array or an object, and of its axes. It returns a weight.
        model: any pytree of Equinox modules.

    Example:
        >>> paths = []
        >>> _ = map_weights(lambda path, weight, axes: paths.append(path), model)
        >>> paths[:2]
        ['embedding.token_embedding.weight', 'decoder.layers.0.self_attention.wq']
    """

    def at(path: tuple, x: Any) -> Any:
        axes = axes_at(model, path) if _is_weight(model, path) else None
        return x if axes is None else change(path_name(path), x, axes)

    return jax.tree_util.tree_map_with_path(at, model, is_leaf=is_object)


def _is_weight(model: Any, path: tuple) -> bool:
    """Returns whether a path leads to a field that may hold any weight."""
    if not path or not isinstance(path[-1], jax.tree_util.GetAttrKey):
        return False
    module = functools.reduce(lambda node, key: key_of(node, key), path[:-1], model)
    kind: Any = type(module)
    return path[-1].name in _fields(kind)


def key_of(node: Any, key: Any) -> Any:
    """Returns the part of a tree's node that a key of a path leads to."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    return node[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]


@functools.cache
def _fields(kind: type) -> frozenset[str]:
    """Returns the names of the fields of a class that may hold any weight."""
    try:
        hints = typing.get_type_hints(kind)
    except Exception:  # whatever a class may write there
        return frozenset()
    return frozenset(
        name
        for name, hint in hints.items()
        if any(getattr(x, "array_type", None) is Weight for x in (hint, *typing.get_args(hint)))
    )
