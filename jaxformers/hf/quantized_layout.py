"""Lays out a quantized matrix of a file as the weights of ours that it makes.

A rule of a family's table rearranges numbers (`layouts.to_ours`). Here the same rearrangement is
applied to the number of each row and of each column of the matrix `(out, in)`, which shows for each
output of ours the row that it is, and whether the inputs keep their order. Integers, scales and
offsets are then taken row by row, so that no layout is written a second time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxformers.files.quantized_matrix import QuantizedMatrix
from jaxformers.hf.layouts import Rule, Shape, to_ours
from jaxformers.quantization.quantized import pack


def quantized_fields(
    rule: Rule, parts: Sequence[QuantizedMatrix], shapes: Sequence[Shape]
) -> list[dict[str, Any]] | None:
    """Returns the arguments of `Quantized` for each weight of ours, with NumPy arrays.

    Arguments:
        rule: the rule that makes the weights.
        parts: those of each of its tensors.
        shapes: the shapes of the weights.

    Returns:
        None where the layout does not fit: the inputs of a weight do not keep their order, its
        outputs do not lie in rows, 4 bits have an odd last axis of inputs, or the tensors of the
        rule are quantized in different ways.
    """
    kinds = {(x.bits, x.integers.shape[1], x.scale.shape[1], x.offset is None) for x in parts}
    if len(kinds) > 1:
        return None
    first, starts = parts[0], np.cumsum([0, *(len(x.scale) for x in parts)])
    rows, columns = [], []
    for x, start in zip(parts, starts[:-1], strict=True):
        out, width = x.integers.shape
        numbers = np.arange(start, start + out, dtype=np.int32)[:, None]
        rows.append(x.arrange(np.broadcast_to(numbers, (out, width))))
        columns.append(x.arrange(np.broadcast_to(np.arange(width, dtype=np.int32), (out, width))))
    integers = _joined([x.integers for x in parts])
    scale = _joined([x.scale for x in parts])
    offset = None if first.offset is None else _joined([x.offset for x in parts])
    fields = []
    laid_out = (to_ours(rule, of_each, list(shapes)) for of_each in (rows, columns))
    for i, (of_rows, of_columns) in enumerate(zip(*laid_out, strict=True)):
        at = _stored(rule, i, of_rows, of_columns)
        if at is None or (first.bits == 4 and at["stored"][-1] % 2):
            return None
        order, ahead = at["rows"], at["ahead"]
        own = integers[order].reshape(at["stored"])
        fields.append(
            {
                "integers": pack(own) if first.bits == 4 else own,
                "scale": scale[order].reshape(*ahead, -1),
                "offset": None if offset is None else offset[order].reshape(*ahead, -1),
                "bits": first.bits,
                "outputs": at["outputs"],
                "transposed": at["transposed"],
            }
        )
    return fields


def _stored(rule: Rule, i: int, rows: np.ndarray, columns: np.ndarray) -> dict[str, Any] | None:
    """Returns how weight i is stored with its outputs before its inputs; None if it cannot be.

    Arguments:
        rule: the rule.
        i: which of its weights it is.
        rows: of the weight's shape, the row of the file that each number is from.
        columns: the same for columns.
    """
    axes = rule.axes[i]
    apart, inputs, outputs = axes.apart, axes.inputs, axes.outputs
    # A table is read by rows: as the matrix that the output layer multiplies by, (v, d).
    transposed = rule.layout == "same"
    if transposed:
        inputs, outputs = outputs, inputs
    order = (*apart, *outputs, *inputs)
    ahead = tuple(rows.shape[j] for j in (*apart, *outputs))
    rows, columns = (x.transpose(order) for x in (rows, columns))
    stored = rows.shape
    rows, columns = (x.reshape(int(np.prod(ahead)), -1) for x in (rows, columns))
    if (rows != rows[:, :1]).any() or (columns != np.arange(columns.shape[1])).any():
        return None
    return {
        "rows": rows[:, 0],
        "ahead": ahead,
        "stored": stored,
        "outputs": len(outputs),
        "transposed": transposed,
    }


def _joined(arrays: Sequence[Any]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
