"""How a tensor in a file relates to our arrays: pure rearrangements, each written in both ways.

PyTorch stores a linear map as `(out, in)` with heads folded into features; ours is `(in, out)` with
an axis of heads. Some families fuse several maps into one tensor, or split one over many. All
of them move numbers without changing any, so that a round trip is equal bit by bit.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One correspondence: arrays of ours, tensors of a file, and how they are laid out.

    In names, `{i}` stands for a layer and `{e}` for an expert or a head. Ours are paths into the
    model. Where a family has several names for an array, `when` says of which architectures it is
    this one.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: str
    when: Callable[[Any], bool] | None = None

    def at(self, i: int) -> "Rule":
        """The rule of layer i."""
        ours, theirs = (
            tuple(name.replace("{i}", str(i)) for name in names)
            for names in (self.ours, self.theirs)
        )
        return self._replace(ours=ours, theirs=theirs)

    def expand(self, shape: Shape) -> "Rule":
        """The rule with a tensor for each expert or head, which the first axis of ours counts."""
        if not any("{e}" in name for name in self.theirs):
            return self
        names = (name.replace("{e}", str(e)) for name in self.theirs for e in range(shape[0]))
        return self._replace(theirs=tuple(names))


def _inputs(path: str, shape: Shape) -> int:
    """How many leading axes of an array are inputs of its map: heads and features of `wo`."""
    return 2 if path.endswith(".wo") else 1


def _matrix(path: str, shape: Shape) -> tuple[int, int]:
    """An array as the matrix `(in, out)` that it is."""
    split = _inputs(path, shape)
    return prod(shape[:split]), prod(shape[split:])


def tensor_shapes(rule: Rule, shapes: list[Shape]) -> list[Shape]:
    """The shapes that the file's tensors must have for arrays of these shapes."""
    first = shapes[0]
    match rule.layout:
        case "same":
            return [first]
        case "flat":
            return [(prod(first),)]
        case "row":
            return [(1, prod(first))]
        case "linear":
            fan_in, out = _matrix(rule.ours[0], first)
            return [(out, fan_in)]
        case "conv1d":
            return [_matrix(rule.ours[0], first)]
        case "linear rows" | "linear heads":
            pairs = [_matrix(path, shape) for path, shape in zip(rule.ours, shapes, strict=True)]
            return [(sum(out for _, out in pairs), pairs[0][0])]
        case "conv1d columns":
            pairs = [_matrix(path, shape) for path, shape in zip(rule.ours, shapes, strict=True)]
            return [(pairs[0][0], sum(out for _, out in pairs))]
        case "flat rows" | "flat heads":
            return [(sum(map(prod, shapes)),)]
        case "heads":
            heads, width = first
            return [(width,)] * heads
        case "experts":
            experts, fan_in, out = first
            return [(out, fan_in)] * experts
        case "experts stacked":
            experts, fan_in, out = first
            return [(experts, out, fan_in)]
        case "experts gate up":
            experts, fan_in, out = first
            return [(experts, 2 * out, fan_in)]
    raise KeyError(rule.layout)


def to_ours(rule: Rule, tensors: list[np.ndarray], shapes: list[Shape]) -> list[np.ndarray]:
    """The arrays that a file's tensors hold."""
    x, first = tensors[0], shapes[0]
    match rule.layout:
        case "same" | "flat" | "row" | "conv1d":
            return [x.reshape(first)]
        case "linear":
            return [x.T.reshape(first)]
        case "linear rows" | "conv1d columns":
            parts = _split(x.T if rule.layout == "linear rows" else x, shapes)
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        case "linear heads":
            heads, width = first[1:]
            stacked = x.T.reshape(first[0], heads, len(shapes), width)
            return [stacked[:, :, j] for j in range(len(shapes))]
        case "flat rows":
            cuts = np.cumsum([prod(shape) for shape in shapes])[:-1]
            return [p.reshape(s) for p, s in zip(np.split(x, cuts), shapes, strict=True)]
        case "flat heads":
            heads, width = first
            stacked = x.reshape(heads, len(shapes), width)
            return [stacked[:, j] for j in range(len(shapes))]
        case "heads":
            return [np.stack(tensors)]
        case "experts":
            return [np.stack([tensor.T for tensor in tensors])]
        case "experts stacked":
            return [x.swapaxes(1, 2)]
        case "experts gate up":
            return list(np.split(x.swapaxes(1, 2), 2, axis=2))
    raise KeyError(rule.layout)


def _split(matrix: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    """A matrix `(in, out)` cut along its outputs."""
    cuts = np.cumsum([prod(shape[1:]) for shape in shapes])[:-1]
    return np.split(matrix, cuts, axis=1)


def to_theirs(rule: Rule, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The tensors of a file that hold these arrays."""
    x = arrays[0]
    [shape, *_] = tensor_shapes(rule, [a.shape for a in arrays])
    match rule.layout:
        case "same" | "flat" | "row" | "conv1d":
            return [x.reshape(shape)]
        case "linear":
            return [x.reshape(shape[::-1]).T]
        case "linear rows":
            return [np.concatenate([a.reshape(a.shape[0], -1) for a in arrays], axis=1).T]
        case "conv1d columns":
            return [np.concatenate([a.reshape(a.shape[0], -1) for a in arrays], axis=1)]
        case "linear heads":
            return [np.stack(arrays, axis=2).reshape(x.shape[0], -1).T]
        case "flat rows":
            return [np.concatenate([a.reshape(-1) for a in arrays])]
        case "flat heads":
            return [np.stack(arrays, axis=1).reshape(-1)]
        case "heads":
            return list(x)
        case "experts":
            return [expert.T for expert in x]
        case "experts stacked":
            return [x.swapaxes(1, 2)]
        case "experts gate up":
            return [np.concatenate(arrays, axis=2).swapaxes(1, 2)]
    raise KeyError(rule.layout)
