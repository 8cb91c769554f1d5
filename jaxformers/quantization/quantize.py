"""The conversion of a model's weights to eight or four bits."""

import dataclasses
from collections.abc import Callable
from math import gcd, prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.axes import Axes
from jaxformers.checks import check_callable, check_size, check_usable, is_known
from jaxformers.paths import some_of
from jaxformers.quantization.quantized import Quantized, pack
from jaxformers.quantization.rounding import GRIDS, rounded
from jaxformers.weight_fields import map_weights
from jaxformers.weights import WeightObject

Model = TypeVar("Model")

# Tables of positions, of buckets of distances and of token types, by the name of their rows.
_SMALL_TABLES = "p", "u", "y"
# The router to experts, and the gate of a shared expert, by the name of their outputs.
_GATES = "e", "1"

DEFAULT_GROUP = 32


def quantize(
    model: Model,
    bits: int = 8,
    group_size: int | None = None,
    where: Callable[[str, Any], Any] | None = None,
) -> Model:
    """Returns the model with `Quantized` weights.

    These are the weights of all linear maps and the tables of tokens, also those that an output
    layer uses. Biases, norms, routers of experts, and tables of positions and token types stay as
    they are. Weights that are `LowRank` get a quantized base. The model computes in the type that
    it had.

    With 8 bits a number is a scale times an integer of -127 to 127. With 4 bits it is a scale times
    an integer of 0 to 15, plus an offset. Scales and offsets have the least squared error that a
    search finds. A weight takes `bits` bits. Scales take 4 bytes per output, or 2 per group of
    inputs; with 4 bits, offsets take as much again.

    Arguments:
        model: a model of this package, or a part of one.
        bits: 8 or 4.
        group_size: how many consecutive inputs share a scale. None is all inputs of an output with
            8 bits. With 4 bits it is 32 where that divides the number of inputs, and all inputs
            elsewhere.
        where: function `(path, weight) -> bool`, True for weights to quantize among those above. It
            gets paths such as "decoder.layers.0.self_attention.wq", and weights of which it may
            read shape and dtype. None is all of them.

    Raises:
        ValueError: if the size does not divide the inputs of a weight, a weight has an odd number
            of inputs and `bits` is 4, a weight is `Quantized` already or holds numbers that are not
            finite, or no weight is chosen.

    Example:
        >>> small = quantize(model)
        >>> small.decoder.layers[0].self_attention.wq.integers.dtype
        dtype('int8')
        >>> smaller = quantize(model, bits=4, where=lambda path, weight: "feed_forward" in path)
    """
    check_usable(model=model)
    if bits not in GRIDS or isinstance(bits, bool):
        raise ValueError(f"bits must be 8 or 4, got {bits!r}.")
    check_size(**{} if group_size is None else {"group_size": group_size})
    check_callable(**{} if where is None else {"where": where})
    inputs = _chosen_inputs(model, where)
    _check_inputs(inputs, bits, group_size)

    def change(path: str, weight: Any, axes: Axes) -> Any:
        return _quantized(path, weight, axes, bits, group_size) if path in inputs else weight

    return map_weights(change, model)


def _chosen_inputs(
    model: Any, where: Callable[[str, Any], Any] | None
) -> dict[str, tuple[int, ...]]:
    """Returns the sizes of the axes of inputs of each weight to quantize, by path."""
    found: dict[str, tuple[int, ...]] = {}
    passed: list[str] = []

    def look(path: str, weight: Any, axes: Axes) -> Any:
        if _is_linear(axes):
            passed.append(path)
            seen = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
            if where is None or where(path, seen):
                stored = axes.outputs if _is_table(axes) else axes.inputs
                found[path] = tuple(weight.shape[i] for i in stored)
        return weight

    map_weights(look, model)
    if not found:
        some = some_of(passed) or "no linear map at all"
        raise ValueError(f"no weight is to be quantized: where is called with {some}.")
    return found


def _is_linear(axes: Axes) -> bool:
    """Returns whether a weight is that of a linear map, or a table of tokens."""
    names = [[axes.names[i] for i in where] for where in (axes.inputs, axes.outputs)]
    inputs, outputs = names
    return bool(inputs and outputs) and inputs[0] not in _SMALL_TABLES and outputs[-1] not in _GATES


def _is_table(axes: Axes) -> bool:
    """Returns whether a weight is a table of tokens, whose rows are outputs where it is tied."""
    return [axes.names[i] for i in axes.inputs] == ["v"]


def _check_inputs(inputs: dict[str, tuple[int, ...]], bits: int, group_size: int | None) -> None:
    widths = {path: prod(sizes) for path, sizes in inputs.items()}
    for path, width in widths.items():
        if group_size is not None and width % group_size:
            common = gcd(*widths.values())
            divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"group_size {group_size} does not divide the {width} inputs of {path}. Sizes that "
                f"divide the inputs of all chosen weights: {divisors}. Pass one of them, or choose "
                "other weights with where=."
            )
        if bits == 4 and inputs[path][-1] % 2:
            raise ValueError(
                f"4 bits need an even number of inputs, and the last axis of inputs of {path} has "
                f"{inputs[path][-1]}. Leave it out with where=, or use bits=8."
            )


def _quantized(
    path: str, weight: Any, axes: Axes, bits: int, group_size: int | None
) -> Quantized | WeightObject:
    """Returns a weight, or a weight with a base, in few bits."""
    if isinstance(weight, Quantized):
        raise ValueError(
            f"{path} is quantized already. Quantize the model that it came from, or leave it out "
            "with where=."
        )
    if not isinstance(weight, WeightObject):
        return of_array(path, weight, axes, bits, group_size)
    if not (dataclasses.is_dataclass(weight) and hasattr(weight, "base")):
        raise ValueError(
            f"{path} is a {type(weight).__name__}, which has no base to quantize. Merge the "
            "weights first, or leave it out with where=."
        )
    if weight.base is None:  # it is used in place of a table that the output layer shared
        return weight
    base = _quantized(path, weight.base, axes, bits, group_size)
    return dataclasses.replace(weight, base=base)


def of_array(
    path: str, weight: Float[Array, "..."], axes: Axes, bits: int, group_size: int | None
) -> Quantized:
    """Returns an array of weights in few bits.

    Arguments:
        path: where the array is, for errors.
        weight: `(apart, i, o)`, or a table `(o, i)`.
        axes: those of the array.
        bits, group_size: as in `quantize`.
    """
    table = _is_table(axes)
    order = axes.apart + (axes.inputs + axes.outputs if table else axes.outputs + axes.inputs)
    stored = weight if table else weight.transpose(order)
    outputs = len(axes.inputs if table else axes.outputs)
    ahead = stored.shape[: len(axes.apart) + outputs]
    width = prod(stored.shape[len(ahead) :])
    size = group_size or _default_size(bits, width)
    kind = jnp.float32 if size == width else jnp.float16
    integers, *line = rounded(stored.reshape(-1, size), GRIDS[bits], kind)
    scale, offset = (x.reshape(*ahead, width // size) for x in line)
    _check_finite(path, scale, offset)
    integers = integers.reshape(stored.shape)
    return Quantized(
        pack(integers) if bits == 4 else integers,
        scale,
        offset if bits == 4 else None,
        bits=bits,
        outputs=outputs,
        transposed=table,
        dtype=weight.dtype,
    )


def _default_size(bits: int, width: int) -> int:
    return DEFAULT_GROUP if bits == 4 and width % DEFAULT_GROUP == 0 else width


def _check_finite(path: str, *arrays: Array) -> None:
    for x in arrays:
        if is_known(x) and not bool(jnp.isfinite(x).all()):
            raise ValueError(
                f"{path} holds NaN, infinity, or numbers beyond {float(jnp.finfo(x.dtype).max):.0f}"
                ", which cannot be quantized so. Leave it out with where=."
            )
