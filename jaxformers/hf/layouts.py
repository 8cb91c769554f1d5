"""The relation of a tensor in a file to our arrays: pure rearrangements, each written in both ways.

PyTorch stores a linear map as `(out, in)` with heads folded into features. Ours is `(in, out)` with
an axis of heads, and the axes of an array say which of them are inputs and which outputs. Some
families fuse several maps into one tensor, and others split one map over many. All of these move
numbers without changing any, so that a round trip is equal bit by bit.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxformers.axes import Axes

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One correspondence between arrays of ours and tensors of a file.

    In names, `{i}` stands for a layer and `{e}` for an expert or a head.

    Arguments:
        ours: paths into the model.
        theirs: names of tensors.
        layout: how they are laid out. "same" is equal shapes, "flat" one axis, "row" one row.
            "linear" is the matrix `(out, in)`, "conv1d" the matrix `(in, out)`. "linear rows",
            "conv1d columns" and "flat rows" join several arrays along their outputs one after the
            other; "linear heads" and "flat heads" join them so that the heads of a group lie
            together. "heads" and "experts" have a tensor for each.
        when: of which architectures the rule is, if a family has several names for an array.
        axes: the axes of each of ours, once the model is known.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: str
    when: Callable[[Any], bool] | None = None
    axes: tuple[Axes, ...] = ()

    def at(self, i: int) -> "Rule":
        """Returns the rule of layer i."""
        ours, theirs = (
            tuple(name.replace("{i}", str(i)) for name in names)
            for names in (self.ours, self.theirs)
        )
        return self._replace(ours=ours, theirs=theirs)

    def of(self, axes: tuple[Axes, ...], shape: Shape) -> "Rule":
        """Returns the rule for arrays with these axes.

        If it has a tensor for each expert or head, the first axis of ours, of this shape, counts
        them.
        """
        if not any("{e}" in name for name in self.theirs):
            return self._replace(axes=axes)
        names = (name.replace("{e}", str(e)) for name in self.theirs for e in range(shape[0]))
        return self._replace(theirs=tuple(names), axes=axes)

    def matrix_shapes(self, shapes: list[Shape]) -> list[tuple[int, int]]:
        """Returns the shapes `(in, out)` of the matrices that arrays of these shapes are."""
        return [axes.sizes(shape)[1:] for axes, shape in zip(self.axes, shapes, strict=True)]


def tensor_shapes(rule: Rule, shapes: list[Shape]) -> list[Shape]:
    """Returns the shapes that the file's tensors must have for arrays of these shapes."""
    first = shapes[0]
    match rule.layout:
        case "same":
            return [first]
        case "row":
            return [(1, prod(first))]
        case "flat" | "flat rows" | "flat heads":
            return [(sum(map(prod, shapes)),)]
        case "linear" | "linear rows" | "linear heads":
            pairs = rule.matrix_shapes(shapes)
            return [(sum(out for _, out in pairs), pairs[0][0])]
        case "conv1d" | "conv1d columns":
            pairs = rule.matrix_shapes(shapes)
            return [(pairs[0][0], sum(out for _, out in pairs))]
        case "heads":
            heads, width = first
            return [(width,)] * heads
        case "experts":
            ((fan_in, out),) = rule.matrix_shapes(shapes)
            return [(out, fan_in)] * first[0]
    raise KeyError(rule.layout)


def to_ours(rule: Rule, tensors: list[np.ndarray], shapes: list[Shape]) -> list[np.ndarray]:
    """Returns the arrays that a file's tensors hold."""
    x = tensors[0]
    match rule.layout:
        case "same" | "row":
            parts = [x]
        case "flat" | "flat rows":
            parts = np.split(x, np.cumsum([prod(shape) for shape in shapes])[:-1])
        case "flat heads":
            parts = _split_heads(x[None], [(1, *shape) for shape in shapes])
        case "linear" | "linear rows" | "conv1d" | "conv1d columns":
            matrix = x.T if rule.layout.startswith("linear") else x
            cuts = np.cumsum([out for _, out in rule.matrix_shapes(shapes)])[:-1]
            parts = np.split(matrix, cuts, axis=1)
        case "linear heads":
            parts = _split_heads(x.T, shapes)
        case "heads":
            parts = [np.stack(tensors)]
        case "experts":
            parts = [np.stack([tensor.T for tensor in tensors])]
        case _:
            raise KeyError(rule.layout)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def to_theirs(rule: Rule, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the tensors of a file that hold these arrays."""
    x = arrays[0]
    match rule.layout:
        case "same":
            return [x]
        case "row":
            return [x.reshape(1, -1)]
        case "flat" | "flat rows":
            return [np.concatenate([a.reshape(-1) for a in arrays])]
        case "flat heads":
            return [_join_heads([a[None] for a in arrays])[0]]
        case "linear" | "linear rows" | "conv1d" | "conv1d columns":
            pairs = rule.matrix_shapes([a.shape for a in arrays])
            parts = [a.reshape(pair) for a, pair in zip(arrays, pairs, strict=True)]
            matrix = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            return [matrix.T if rule.layout.startswith("linear") else matrix]
        case "linear heads":
            return [_join_heads(arrays).T]
        case "heads":
            return list(x)
        case "experts":
            return [expert.T for expert in x]
    raise KeyError(rule.layout)


def _split_heads(matrix: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    """Returns a matrix `(in, out)` cut into arrays `(in, heads, width)` whose heads alternate.

    The heads of a group lie together: some query heads, then the key head and the value head that
    they share, then the next group.
    """
    groups, width = min(heads for _, heads, _ in shapes), shapes[0][2]
    counts = [heads // groups for _, heads, _ in shapes]
    grouped = matrix.reshape(matrix.shape[0], groups, sum(counts), width)
    return np.split(grouped, np.cumsum(counts)[:-1], axis=2)


def _join_heads(arrays: list[np.ndarray]) -> np.ndarray:
    """Returns the matrix that `_split_heads` cuts into these arrays."""
    groups, width = min(a.shape[1] for a in arrays), arrays[0].shape[2]
    grouped = [a.reshape(a.shape[0], groups, -1, width) for a in arrays]
    return np.concatenate(grouped, axis=2).reshape(arrays[0].shape[0], -1)
