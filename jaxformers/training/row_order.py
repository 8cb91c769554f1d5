"""The order in which a run gives the positions of its batches to devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import numpy as np
from jax.sharding import Mesh

from jaxformers.attention import MultiHeadAttention
from jaxformers.kernels.choice import fast_attention
from jaxformers.layers import Function
from jaxformers.sharding.mesh import SEQUENCE, as_auto, mesh_in, sizes_of
from jaxformers.sharding.zigzag import zigzag
from jaxformers.sites import is_watched
from jaxformers.training.objectives import Loss, count_targets, language_model_loss
from jaxformers.transformer_lm import TransformerLM


def ordered(
    batch: dict[str, Any], loss: Loss, count: Callable, model: Any, mesh: Mesh
) -> dict[str, Any]:
    """Returns a batch in zigzag order where attention is a ring and the order changes no value.

    Others stay as they are: those of other losses, which may look at neighbors, those whose targets
    are counted by a function of the user's own, which may read a padding mask, those of models with
    parts or kernels of the user's own, and those of dropout, which draws numbers by the order.
    A batch that is on a mesh already has the order that it was given.
    """
    n = sizes_of(as_auto(mesh)).get(SEQUENCE, 1)
    own = count is not count_targets or getattr(loss, "func", loss) is not language_model_loss
    if n == 1 or own or mesh_in(batch) is not None:
        return batch
    shape, packed = np.shape(batch.get("tokens", 0)), batch.get("segment_ids") is not None
    fits = len(shape) == 2 and shape[1] % (2 * n) == 0
    if not fits or packed != (batch.get("positions") is not None) or not reads_positions(model):
        return batch
    return zigzag(batch, mesh)


def reads_positions(model: Any) -> bool:
    """Returns whether a model is known to read positions alone, whatever their order in a row."""
    if type(model) is not TransformerLM or is_watched(model):  # a patch may look at neighbors
        return False
    return all(map(_is_known, _modules(model)))


def _is_known(module: eqx.Module) -> bool:
    """Returns whether a module is of this package, has a ring, and draws no random numbers."""
    rates = (getattr(module, name, 0) for name in ("dropout_rate", "attention_dropout_rate"))
    made_of = module.function if isinstance(module, Function) else type(module)
    made_of = getattr(made_of, "func", made_of)  # of `functools.partial`
    if made_of.__module__.partition(".")[0] not in ("jaxformers", "jax") or any(rates):
        return False
    if not isinstance(module, MultiHeadAttention):
        return True
    return getattr(module.attention_fn, "function", None) is fast_attention


def _modules(x: Any) -> Iterator[eqx.Module]:
    """Yields all modules in a tree."""
    if isinstance(x, eqx.Module):
        yield x
        for field in dataclasses.fields(x):
            yield from _modules(getattr(x, field.name, None))
    elif isinstance(x, tuple | list):
        for one in x:
            yield from _modules(one)
