"""Adapters on the weights of a model, and the way back to the model without them."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from jaxformers.adapters.kinds import Replaced
from jaxformers.axes import Axes
from jaxformers.checks import check_callable, check_key, check_positive, check_size, check_usable
from jaxformers.optim import is_hidden_matrix
from jaxformers.optim.layout import LeafPath, leaf_path
from jaxformers.paths import some_of
from jaxformers.weight_fields import map_weights
from jaxformers.weights import LowRank, is_object

Model = TypeVar("Model")
Predicate = Callable[[str, Any], Any]


def over_rank(alpha: float | int, rank: int) -> float:
    """Returns the factor `alpha / rank` of a product (Hu et al. 2021, LoRA).

    Example:
        >>> over_rank(16, 64)
        0.25
    """
    return alpha / rank


def over_root_rank(alpha: float | int, rank: int) -> float:
    """Returns the factor `alpha / sqrt(rank)` of a product (Kalajdzievski 2023, rsLoRA).

    Example:
        >>> over_root_rank(16, 64)
        2.0
    """
    return alpha / math.sqrt(rank)


def is_inner_map(path: str, weight: Any) -> bool:
    """Returns whether a weight is a linear map of attention or of a feed-forward.

    Embeddings, positions, output layers, poolers, classifiers and routers are not.

    Example:
        >>> is_inner_map("decoder.layers.0.feed_forward.w_in", jnp.ones((16, 64)))
        True
    """
    return is_hidden_matrix(path, weight) and re.search("pooler|router", path) is None


def is_classifier(path: str, array: Any) -> bool:
    """Returns whether an array belongs to the classifier of an encoder.

    Example:
        >>> is_classifier("classifier.out.w", jnp.ones((16, 3)))
        True
    """
    return path.startswith("classifier.")


def lora(
    model: Model,
    rank: int = 8,
    alpha: float | int = 16,
    *,
    where: Predicate = is_inner_map,
    also: Predicate | None = is_classifier,
    scaling: Callable[[float, int], float] = over_rank,
    kind: Any = LowRank,
    name: str = "default",
    key: PRNGKeyArray | None = None,
) -> Model:
    """Returns the model with an adapter: low-rank changes of its weights, which are zero at first.

    Such a model trains its adapters alone, see `trainable`, also under optax and in a loop of your
    own. Its arrays stay those of the given model. Their type may have 16 bits or be `Quantized`;
    the adapter is float32. For several ranks, call the function once for each, with other weights.

    Arguments:
        model: the model, scanned or not. It may have adapters of other names already.
        rank: the rank r of the changes, 8.
        alpha: numerator of the factor on the changes, 16.
        where: predicate `(path, weight) -> bool`, True for the weights to adapt. It gets paths such
            as "decoder.layers.0.self_attention.wq", and weights of which it may read shape and
            dtype. The default is every linear map in attention and feed-forwards, also in experts.
        also: predicate `(path, array) -> bool`, True for arrays that are trained whole, as a part
            of the adapter. The default is the classifier of an encoder; None trains none.
        scaling: function `(alpha, rank) -> factor`: `over_rank`, the default, or `over_root_rank`
            (rsLoRA).
        kind: the class of adapted weights: `LowRank`, the default, `Dora`, or one of your own with
            a method `of` as `LowRank` has it.
        name: the name of the adapter, by which it is saved and removed, "default".
        key: PRNG key, required.

    Raises:
        ValueError: if an argument is out of its range, no weight is chosen, or a chosen weight has
            an adapter of this name already.

    Example:
        >>> adapted = lora(model, rank=4, key=key)
        >>> bool((adapted(tokens) == model(tokens)).all())
        True
        >>> from jaxformers.adapters import over_root_rank
        >>> options = {"scaling": over_root_rank, "where": lambda path, w: path.endswith("wq")}
        >>> adapted = lora(model, 32, **options, key=key)
    """
    check_usable(model=model)
    check_size(rank=rank)
    check_positive(alpha=alpha)
    check_adapter_name(name)
    check_callable(where=where, scaling=scaling, **{"kind.of": getattr(kind, "of", None)})
    check_callable(**{} if also is None else {"also": also})
    key, scale = check_key(key), scaling(alpha, rank)
    passed: list[str] = []
    adapted: list[str] = []

    def change(text: str, weight: Any, axes: Axes) -> Any:
        path = LeafPath(text, axes)
        seen = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        passed.append(text)
        if (also and also(path, seen)) or not where(path, seen):
            return weight
        check_new(text, weight, name)
        adapted.append(text)
        sizes = {"inputs": len(axes.inputs), "apart": len(axes.apart)}
        own = jax.random.fold_in(key, len(adapted))
        return kind.of(weight, rank, **sizes, scale=scale, name=name, key=own)

    changed = map_weights(change, model)
    if not adapted:
        some = some_of(passed) or "no weight at all"
        raise ValueError(
            "no weight is to be adapted: where= holds for none that also= leaves. It is called "
            f"with paths such as {some}."
        )
    whole = changed if also is None else _replaced(changed, also, name)
    if whole is changed and also not in (None, is_classifier):
        raise ValueError("no array is to be trained whole: also= holds for none.")
    return whole


def _replaced(model: Model, also: Predicate, name: str) -> Model:
    """Returns the model with `Replaced` in place of the arrays for which a predicate holds.

    It is the same object if there are none.
    """
    found = []

    def change(path: tuple, x: Any) -> Any:
        if not is_object(x) and not eqx.is_inexact_array(x):
            return x
        text = leaf_path(model, path)
        if not also(text, jax.ShapeDtypeStruct(x.shape, x.dtype)):
            return x
        found.append(text)
        if isinstance(x, Replaced) and x.name == name:  # by an earlier call for other weights
            return x
        check_new(text, x, name)
        return Replaced.of(x, name)

    changed = jax.tree_util.tree_map_with_path(change, model, is_leaf=is_object)
    return changed if found else model


def unload(model: Model, name: str | None = None) -> Model:
    """Returns the model without its adapters: the weights on which they were put.

    Arguments:
        model: a model with adapters.
        name: the name of the adapter to remove; None removes all.

    Raises:
        ValueError: if there is no such adapter.

    Example:
        >>> bare = unload(lora(model, key=key))
        >>> bare.output.w is model.output.w
        True
    """
    check_name(model, name)

    def strip(x: Any) -> Any:
        if not is_adapter(x):
            return x
        base = strip(x.base)
        if base is None and x.base is not None:
            raise ValueError(
                f"the adapter {x.name!r} lies on weights that only the adapter {x.base.name!r} "
                f"has. Remove {x.name!r} first."
            )
        return base if name in (None, x.name) else dataclasses.replace(x, base=base)

    return jax.tree.map(strip, model, is_leaf=is_object)


def adapter_names(model: Any) -> tuple[str, ...]:
    """Returns the names of the adapters of a model, in the order in which they lie on a weight.

    Example:
        >>> adapter_names(lora(model, name="french", key=key))
        ('french',)
    """
    found: dict[str, None] = {}
    for x in jax.tree.leaves(model, is_leaf=is_object):
        names = []
        while is_adapter(x):
            names.append(x.name)
            x = x.base
        found |= dict.fromkeys(reversed(names))
    return tuple(found)


def is_adapter(x: Any) -> bool:
    """Returns whether a weight is an adapter on another."""
    return is_object(x) and bool(x.trained_fields) and hasattr(x, "base") and hasattr(x, "name")


def without_adapters(x: Any) -> Any:
    """Returns the weight that lies below all adapters."""
    while is_adapter(x):
        x = x.base
    return x


def check_adapter_name(name: Any) -> None:
    """Raises `ValueError` unless `name` can be the name of an adapter."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text of at least one character, got {name!r:.80}.")


def check_name(model: Any, name: str | None) -> None:
    """Raises if a model has no adapter of this name, or none at all for None."""
    names = adapter_names(model)
    if not names or name not in (None, *names):
        what = "an adapter" if name is None else f"the adapter {name!r}"
        listed = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"the model must have {what}, and it has {listed}.")


def check_new(path: str, weight: Any, name: str) -> None:
    """Raises if a weight has an adapter of this name."""
    while is_adapter(weight):
        if weight.name == name:
            raise ValueError(
                f"{path} has an adapter {name!r} already. Give the new one another name, or remove "
                f"the old one with unload(model, {name!r})."
            )
        weight = weight.base
