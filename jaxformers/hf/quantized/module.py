"""The tensors that hold the quantized weight of one module, and that weight as one tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxformers.files.hub import FileTensor, TensorFiles
from jaxformers.files.json_file import shorten
from jaxformers.files.quantized_matrix import QuantizedMatrix
from jaxformers.hf.quantized.bits import Integers

Shape = tuple[int, ...]


class Module:
    """The tensors of one module, by the last part of their names.

    Arguments:
        name: its name, such as "model.layers.0.self_attn.q_proj".
        files: the tensors of the checkpoint.
    """

    def __init__(self, name: str, files: TensorFiles):
        self.name = name
        self.files = files

    def has(self, part: str) -> bool:
        """Returns whether the module has the tensor."""
        return f"{self.name}.{part}" in self.files

    def find(self, part: str, dtypes: Sequence[Any], ndim: int = 2) -> FileTensor:
        """Returns a tensor that must be there, of one of these types, which is not read yet.

        Raises:
            ValueError: if it is missing, or has another type or number of axes, or no numbers.
        """
        if not self.has(part):
            raise ValueError(f"the quantized module {shorten(self.name)} has no tensor {part}.")
        tensor = self.files.find(f"{self.name}.{part}")
        names = ", ".join(str(np.dtype(x)) for x in dtypes)
        if tensor.dtype not in [np.dtype(x) for x in dtypes]:
            raise self.fault(part, f"of {names}", tensor.dtype)
        if len(tensor.shape) != ndim or 0 in tensor.shape:
            raise self.fault(part, f"of {ndim} axes that are not empty", tensor.shape)
        return tensor

    def sized(self, part: str, dtypes: Sequence[Any], shape: Shape) -> FileTensor:
        """Returns a tensor that must have this shape; errors are those of `find`."""
        tensor = self.find(part, dtypes, len(shape))
        if tensor.shape != shape:
            raise self.fault(part, f"of the shape {shape}", tensor.shape)
        return tensor

    def read(self, part: str) -> np.ndarray:
        """Returns the values of a tensor that is there."""
        return self.files.find(f"{self.name}.{part}").read()

    def fault(self, part: str, expected: str, got: Any) -> ValueError:
        """Returns the error for a tensor that does not fit the others."""
        return ValueError(
            f"the quantized module {shorten(self.name)}: its tensor {part} must be {expected}, got "
            f"{got!s:.80}. The file is damaged, or config.json describes another one."
        )


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class QuantizedTensor:
    """The weight of a module as a tensor of a file.

    Arguments:
        shape: `(out, in)`, whatever the checkpoint before it was quantized had.
        dtype: the type of its numbers, which is that of the file's other tensors.
        unpacked: function that reads the numbers, in float32.
        kept: function that reads the parts that `Quantized` holds; None where it does not.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    unpacked: Callable[[], np.ndarray]
    kept: Callable[[], QuantizedMatrix | None] = _nothing

    @classmethod
    def of(
        cls, shape: tuple[int, int], dtype: np.dtype, read: Callable[[], Integers]
    ) -> "QuantizedTensor":
        """Returns the weight that a function reads as integers."""
        return cls(shape, dtype, lambda: read().numbers(), lambda: read().parts())

    def read(self) -> np.ndarray:
        """Returns the numbers in float32."""
        return self.unpacked()

    @property
    def T(self) -> "QuantizedTensor":
        """The same weight as `(in, out)`, as GPT-2 has it."""

        def kept() -> QuantizedMatrix | None:
            parts = self.kept()
            return None if parts is None else replace(parts, arrange=np.transpose)

        return QuantizedTensor(self.shape[::-1], self.dtype, lambda: self.unpacked().T, kept)

    def parts(self) -> QuantizedMatrix | None:
        """Returns the integers with their scales, or None for a layout that stays unpacked."""
        return self.kept()


@runtime_checkable
class Format(Protocol):
    """A way to store quantized weights.

    Attributes:
        main: the part of names by which quantized modules are found.
        others: further parts of names that only quantized modules have.
        dropped: parts of names about activations, which stay floating.
    """

    main: str
    others: tuple[str, ...]
    dropped: tuple[str, ...]

    def open(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        """Returns the weight of a module, after a check of the types and shapes of its tensors."""
