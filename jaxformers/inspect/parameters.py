"""The parameters of a model as a table: path, shape, axes, type, number, and what is trained."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxformers.axes import Axes, axes_of
from jaxformers.optim import as_optimizer
from jaxformers.paths import path_name
from jaxformers.trainability import trainable

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the first number in a path


@dataclass(frozen=True)
class Parameter:
    """An array of a model, or equal arrays of several layers as one row.

    Arguments:
        path: its path, as the predicates of `freeze` and `Groups` get it. In a row for several
            layers, `*` stands for the numbers of all layers, and `0-3` for those of some.
        shape: the shape of each array.
        axes: the names of the axes, such as `("d", "n", "h")`; "_" has no name.
        dtype: the type, such as "float32".
        number: how many numbers all arrays of this row have together. A byte of a `Quantized`
            weight of 4 bits has two.
        bytes: the memory of all arrays of this row.
        trained: whether the arrays are trained.
        arrays: how many arrays the row stands for.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    number: int
    bytes: int
    trained: bool
    arrays: int = 1

    @property
    def part(self) -> str:
        """The part of the model that the array belongs to, all layers together."""
        return part_of(self.path)


@dataclass(frozen=True)
class ParameterTable:
    """The parameters of a model, which `describe` returns. It prints as a table.

    Arguments:
        kind: the name of the class of the model.
        rows: a `Parameter` for each array.
    """

    kind: str
    rows: tuple[Parameter, ...]

    @property
    def number(self) -> int:
        """How many numbers all arrays have together."""
        return _sum(self.rows, "number")

    @property
    def trained(self) -> int:
        """How many of these numbers are trained."""
        return _sum([row for row in self.rows if row.trained], "number")

    @property
    def bytes(self) -> int:
        """The memory of all arrays."""
        return _sum(self.rows, "bytes")

    @property
    def parts(self) -> dict[str, "ParameterTable"]:
        """The table of each part, such as "embedding" or "decoder.self_attention"."""
        found: dict[str, list[Parameter]] = {}
        for row in self.rows:
            found.setdefault(row.part, []).append(row)
        return {name: ParameterTable(self.kind, tuple(rows)) for name, rows in found.items()}

    @property
    def grouped(self) -> tuple[Parameter, ...]:
        """The rows in which equal arrays of several layers are one row."""
        layers: dict[str, list[str]] = {}
        alike: dict[tuple, list[Parameter]] = {}
        for row in self.rows:
            pattern = LAYER.sub("*", row.path, count=1)
            layers.setdefault(pattern, []).append(row.path)
            alike.setdefault((pattern, row.shape, row.axes, row.dtype, row.trained), []).append(row)
        return tuple(
            _joined(rows, pattern, whole=len(rows) == len(layers[pattern]))
            for (pattern, *_), rows in alike.items()
        )

    def __str__(self) -> str:
        arrays = [
            (
                row.path,
                " ".join(map(str, row.shape)),
                " ".join(row.axes),
                row.dtype,
                f"{row.arrays:,}",
                f"{row.number:,}",
                "trained" if row.trained else "frozen",
            )
            for row in self.grouped
        ]
        head = ("path", "shape", "axes", "type", "arrays", "number", "")
        sums = [
            (name, *(f"{x:,}" for x in (table.number, table.trained, table.bytes)))
            for name, table in [*self.parts.items(), (self.kind, self)]
        ]
        return "\n".join(
            [
                *_aligned([head, *arrays], right=(4, 5)),
                "",
                *_aligned([("part", "number", "trained", "bytes"), *sums], right=(1, 2, 3)),
            ]
        )

    __repr__ = __str__


def describe(model: PyTree, optimizer: Any = None) -> ParameterTable:
    """Returns a table of the parameters of a model, with the paths that optimizers select by.

    The paths are those that the predicates of `freeze`, `Groups`, `lora` and `quantize` get. A
    printed table has one row for equal arrays of several layers, as `decoder.layers.*.norm.gain`,
    and the sums of each part and of the model.

    Arguments:
        model: a model of this package or any other pytree. It may have shapes in place of arrays.
        optimizer: the optimizer of a training, such as `freeze(AdamW(1e-3), predicate)`, which
            says what is trained. None, the default, is what every optimizer trains: all arrays of
            floating point, or the adapters alone if there are any, see `trainable`.

    Returns:
        A `ParameterTable`: `rows` has a `Parameter` for each array, `grouped` those of equal layers
        as one, `parts` the table of each part; `number`, `trained` and `bytes` are sums.

    Raises:
        ValueError: if the optimizer is no optimizer.

    Example:
        >>> table = describe(model)
        >>> row = table.rows[1]
        >>> row.path, row.shape, row.axes, row.number
        ('decoder.layers.0.self_attention.wq', (16, 2, 8), ('d', 'n', 'h'), 256)
        >>> table.number, table.parts["output"].number
        (4401, 1105)
        >>> frozen = describe(model, freeze(AdamW(1e-3), lambda path, x: "embedding" in path))
        >>> frozen.number - frozen.trained
        1040
    """
    chosen = trainable if optimizer is None else as_optimizer(optimizer).trains

    def row(path: tuple, x: Any, axes: Axes | None, trained: Any) -> Parameter | None:
        return None if axes is None else _row(path_name(path), x, axes.names, bool(trained))

    rows = jax.tree_util.tree_map_with_path(row, model, axes_of(model), _abstractly(chosen, model))
    return ParameterTable(type(model).__name__, tuple(jax.tree.leaves(rows)))


def part_of(path: str) -> str:
    """Returns the part of a model that an array belongs to, all layers together.

    Example:
        >>> part_of("decoder.layers.3.self_attention.wq"), part_of("output.weight")
        ('decoder.self_attention', 'output')
    """
    path = re.sub(r"\.layers(\.(\d+|stacked))?(?=\.)", "", path)
    first, *rest = path.split(".")[:-1] or [path]
    if first in ("decoder", "encoder") and rest:
        is_norm = "norm" in rest[0] or rest[0].endswith("_residual")
        return f"{first}.norms" if is_norm else f"{first}.{rest[0]}"
    return first


def _abstractly(choose: Callable[[PyTree], PyTree], model: PyTree) -> PyTree:
    """Returns what a function says about a model, whose arrays may be shapes alone."""
    found = []
    eqx.filter_eval_shape(lambda x: found.append(choose(x)), model)
    return found[0]


def _row(path: str, x: Any, axes: tuple[str, ...], trained: bool) -> Parameter:
    size = prod(x.shape)
    packed = sum(name.endswith("/2") for name in axes)  # two numbers of 4 bits are in a byte
    dtype = str(x.dtype)
    return Parameter(
        path, tuple(x.shape), axes, dtype, size * 2**packed, size * x.dtype.itemsize, trained
    )


def _joined(rows: list[Parameter], pattern: str, whole: bool) -> Parameter:
    """Returns equal arrays as one row; `whole` says whether these are the arrays of all layers."""
    if len(rows) == 1:
        return rows[0]
    numbers = [int(LAYER.findall(row.path)[0]) for row in rows]
    path = pattern if whole else pattern.replace("*", _ranges(numbers), 1)
    number, size = _sum(rows, "number"), _sum(rows, "bytes")
    return dataclasses.replace(rows[0], path=path, number=number, bytes=size, arrays=len(rows))


def _ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as text.

    Example:
        >>> _ranges([0, 1, 2, 5])
        '0-2,5'
    """
    ranges: list[list[int]] = []
    for i in numbers:
        if ranges and ranges[-1][-1] == i - 1:
            ranges[-1] = [ranges[-1][0], i]
        else:
            ranges.append([i])
    return ",".join("-".join(map(str, x)) for x in ranges)


def _sum(rows: Iterable[Parameter], name: str) -> int:
    return sum(getattr(row, name) for row in rows)


def _aligned(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Returns lines with columns of equal width, of which some are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            x.rjust(width) if i in right else x.ljust(width)
            for i, (x, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
