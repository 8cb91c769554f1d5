"""The values of a model's sites."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from jaxformers.inspect.names import as_paths, check_reached
from jaxformers.sites import Recorder, watched


class Trace(NamedTuple):
    """What a call returned, and the values at its sites.

    Arguments:
        result: what the call returns without `trace`, bit for bit.
        sites: the arrays by path, in the order in which the model computes them.
    """

    result: Any
    sites: dict[str, Array]


def trace(
    model: Callable, only: Sequence[str] | None = None, *, shapes: bool = False
) -> Callable[..., Trace]:
    """Returns a function with the arguments of a model, which also returns the values at its sites.

    `jaxformers.sites.SITES` has the names. A path is that of a part of the model and a name, as
    "decoder.layers.3.self_attention.pattern", also where layers are scanned. The sites come from a
    program of their own, since keeping a value may change how others are rounded: they are those of
    the ordinary program but for roundings. For "scores" and "pattern" that program has plain
    attention in place of `fast_attention`. Gradients through sites keep all activations, whatever
    `rematerialize` says.

    Arguments:
        model: a model, one of its methods, or a function of arrays that calls models.
        only: the sites to keep: paths, and patterns with `*`. The names of TransformerLens, such as
            `blocks.*.attn.hook_pattern`, are understood. None keeps all, which may be much memory.
        shapes: whether to give shapes (`jax.ShapeDtypeStruct`) and compute nothing, False.

    Raises:
        ValueError: when called, if a name of `only` is that of no site. The error names others.

    Example:
        >>> result, sites = trace(model, only=["decoder.layers.*.residual_after"])(tokens)
        >>> list(sites)[0], sites["decoder.layers.0.residual_after"].shape
        ('decoder.layers.0.residual_after', (1, 4, 16))
    """
    owner = getattr(model, "__self__", model)
    patterns = ("*",) if only is None else as_paths(only, owner)
    # A function may read variables that change, so it has a program of its own.
    program = _record if isinstance(owner, eqx.Module) else eqx.filter_jit(partial(record))

    def traced(*args: Any, **options: Any) -> Trace:
        given = jax.tree.map(_as_array, (args, options), is_leaf=_is_rows)
        if shapes:
            result = eqx.filter_eval_shape(model, *given[0], **given[1])
            found, reached = eqx.filter_eval_shape(record, model, patterns, *given)
        else:
            result = model(*args, **options)
            try:
                found, reached = program(model, patterns, *given)
            except jax.errors.UnexpectedTracerError as error:
                raise ValueError(
                    "sites of the program are inside of a transformation, such as jax.jit or "
                    "jax.vmap, or of a loop, such as the loop of model.generate, from where no "
                    "value can be returned. Trace the model in it: jax.vmap(trace(model, only))."
                ) from error
        check_reached([] if only is None else patterns, reached)
        return Trace(result, {path: found[path] for path in reached if path in found})

    return traced


def record(
    function: Callable, patterns: tuple[str, ...], args: tuple, options: dict[str, Any]
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Returns the values of the sites that match, and the paths of all that are reached."""
    recorder = Recorder(patterns)
    with watched(recorder):
        function(*args, **options)
    return recorder.found, tuple(recorder.reached)


def body_of(model: Any) -> Callable:
    """Returns the call of a model, or of one without an output layer its hidden states."""
    headless = hasattr(model, "forward") and model.output is None
    if headless and hasattr(model, "encode"):
        return jax.tree_util.Partial(_hidden_of_pair, model)
    return model.forward if headless else model


def _hidden_of_pair(model: Any, src: Any, tgt: Any, **options: Any) -> Any:
    """Returns the decoder's hidden states of an encoder-decoder."""
    source = {name: x for name, x in options.items() if name == "src_padding_mask"}
    return model.decode(tgt, model.encode(src, **source), **options)


_record = eqx.filter_jit(record)


def _is_rows(x: Any) -> bool:
    """Returns whether `x` is a list of numbers or of such lists, as tokens may be."""
    return isinstance(x, list) and bool(x) and all(type(y) is int or _is_rows(y) for y in x)


def _as_array(x: Any) -> Any:
    return np.asarray(x, np.int32) if _is_rows(x) else x
