"""The tensors of a file or of a model, under the names that the family's table has for them."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from jaxformers.files.hub import TensorFiles
from jaxformers.files.quantized_matrix import QuantizedMatrix
from jaxformers.hf.family import Family
from jaxformers.hf.quantized.module import QuantizedTensor

# Files that began in TensorFlow have its names for the two halves of a norm.
OLDER_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# Constants that files of any family may hold: older versions of transformers wrote them.
CONSTANTS = (r"(^|\.)position_ids$", r"\.inv_freq$", r"\.masked_bias$")


class FileTensors:
    """A checkpoint's tensors under the names of its family's table.

    Files may lack the prefix of the table's names, have older names, and hold tensors that no
    model needs.
    """

    def __init__(self, family: Family, files: TensorFiles):
        self.family = family
        self.files = files
        self.made: dict[str, np.ndarray] = {}  # those that no file has
        self.names: dict[str, str] = {}
        self.unknown: list[str] = []  # names that are in no table
        prefixed: set[bool] = set()
        expected = [theirs for rule in family.weights for theirs in rule.theirs]
        expected += [copy for copy, _ in family.copies]
        columns = [rule for rule in family.weights if rule.layout.startswith("conv1d")]
        self._columns = matcher(x for rule in columns for x in rule.theirs)
        known = matcher(dict.fromkeys(expected))
        for name in files.names:
            new = name
            for old, replacement in (*family.aliases, *OLDER_NAMES):
                new = re.sub(old, replacement, new)
            candidates = (new, f"{family.prefix}{new}", new.removeprefix(family.prefix))
            ours = [x for x in candidates if known(x)]
            if not ours and any(re.search(p, new) for p in (*family.ignored, *CONSTANTS)):
                continue
            canonical = ours[0] if ours else new
            if ours and family.prefix and canonical.startswith(family.prefix):
                prefixed.add(new.startswith(family.prefix))
            if not ours:
                self.unknown.append(canonical)
            if canonical in self.names:
                raise ValueError(
                    f"{files.directory} has two tensors for {canonical}: {self.names[canonical]} "
                    f"and {name}."
                )
            self.names[canonical] = name
        self.bare = prefixed == {False}  # as files of bare models are
        for copy, of in family.copies:
            self.merge(copy, of)

    def has(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._find(name).dtype

    def read(self, name: str) -> np.ndarray:
        made = self.made.get(name)
        return self._find(name).read() if made is None else made

    def view(self, name: str) -> np.ndarray:
        """Returns a tensor of which only the parts that are used are read, where that is possible.

        Tensors of other formats than safetensors are read as a whole.
        """
        made = self.made.get(name)
        tensor = self._find(name)
        return made if made is not None else getattr(tensor, "view", tensor.read)()

    def parts(self, name: str) -> QuantizedMatrix | None:
        """Returns the parts of a quantized tensor whose layout `Quantized` has, else None."""
        parts = getattr(self._find(name), "parts", None)
        return None if parts is None else parts()

    def put(self, name: str, x: np.ndarray) -> None:
        """Takes a tensor that no file has, or another one in place of the file's."""
        self.names[name], self.made[name] = name, x

    def merge(self, copy: str, of: str) -> bool:
        """Returns whether two tensors are one, which is stored under one of the names or twice."""
        if not self.has(copy):
            return True
        if not self.has(of):
            self.names[of] = self.names[copy]
        elif self.shape(copy) != self.shape(of) or not self._equal(copy, of):
            return False
        del self.names[copy]
        return True

    def choose(self, names: Sequence[str], name: str) -> None:
        """Keeps the first of these tensors that is there, under the name `name`."""
        found = [self.names.pop(x) for x in names if x in self.names]
        if found:
            self.names[name] = found[0]

    def discard_empty_biases(self, expected: Collection[str]) -> None:
        """Removes biases of 0 that a tool has written beside quantized weights of maps without."""
        for name in [x for x in self.names if x.endswith(".bias") and x not in expected]:
            weight = f"{name.removesuffix('.bias')}.weight"
            quantized = self.has(weight) and isinstance(self._find(weight), QuantizedTensor)
            if quantized and not self.read(name).any():
                del self.names[name]

    def _find(self, name: str) -> Any:
        """Returns a tensor with its shape, type and values, as the table has it."""
        if name in self.made:
            return self.made[name]
        tensor: Any = self.files.find(self.names[name])
        turned = isinstance(tensor, QuantizedTensor) and self._columns(name)
        return tensor.T if turned else tensor

    def _equal(self, name: str, other: str) -> bool:
        same_type = self.dtype(name) == self.dtype(other)
        return same_type and bool((self.read(name) == self.read(other)).all())


def matcher(names: Iterable[str]) -> Callable[[str], Any]:
    """Returns a function that tells whether a name is one of a table's."""
    return re.compile("|".join(map(pattern, names)) or r"(?!)").fullmatch


def pattern(name: str) -> str:
    """Returns a regular expression for the names that a name of a table stands for."""
    return re.escape(name).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+")


class ModelTensors:
    """The tensors of a model that is being written, for settings that ask about them.

    Arguments:
        shapes: the shapes of the tensors by name.
        bare: whether the names are written without the prefix of whole models.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], bare: bool):
        self.shapes = shapes
        self.bare = bare

    def has(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def merge(self, copy: str, of: str) -> bool:
        return not self.has(copy)

    def choose(self, names: Sequence[str], name: str) -> None:
        pass  # a tensor of a model has its name already
