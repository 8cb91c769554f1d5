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
            return _split_heads(x.T, shapes)
        case "flat rows":
            cuts = np.cumsum([prod(shape) for shape in shapes])[:-1]
            return [p.reshape(s) for p, s in zip(np.split(x, cuts), shapes, strict=True)]
        case "flat heads":
            parts = _split_heads(x[None], [(1, *shape) for shape in shapes])
            return [part[0] for part in parts]
        case "heads":
            return [np.stack(tensors)]
        case "experts":
            return [np.stack([tensor.T for tensor in tensors])]
    raise KeyError(rule.layout)


def _split(matrix: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    """A matrix `(in, out)` cut along its outputs."""
    cuts = np.cumsum([prod(shape[1:]) for shape in shapes])[:-1]
    return np.split(matrix, cuts, axis=1)


def _split_heads(matrix: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
    """A matrix `(in, out)` cut into arrays `(in, heads, width)` whose heads alternate.

    Those of a group lie together: some query heads, then the key head and the value head that they
    share, then the next group.
    """
    groups, width = min(heads for _, heads, _ in shapes), shapes[0][2]
    counts = [heads // groups for _, heads, _ in shapes]
    grouped = matrix.reshape(matrix.shape[0], groups, sum(counts), width)
    parts = np.split(grouped, np.cumsum(counts)[:-1], axis=2)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _join_heads(arrays: list[np.ndarray]) -> np.ndarray:
    """What `_split_heads` cuts."""
    groups, width = min(a.shape[1] for a in arrays), arrays[0].shape[2]
    grouped = [a.reshape(a.shape[0], groups, -1, width) for a in arrays]
    return np.concatenate(grouped, axis=2).reshape(arrays[0].shape[0], -1)


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
            return [_join_heads(arrays).T]
        case "flat rows":
            return [np.concatenate([a.reshape(-1) for a in arrays])]
        case "flat heads":
            return [_join_heads([a[None] for a in arrays])[0]]
        case "heads":
            return list(x)
        case "experts":
            return [expert.T for expert in x]
    raise KeyError(rule.layout)
