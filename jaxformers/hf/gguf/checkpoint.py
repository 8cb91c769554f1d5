"""A GGUF file as the loader sees checkpoints: a config.json, and tensors with their names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxformers.files.gguf_blocks import take_apart
from jaxformers.files.gguf_file import GgufFile, GgufTensor, read_gguf
from jaxformers.files.hub import TensorFiles
from jaxformers.files.json_file import shorten
from jaxformers.files.quantized_matrix import QuantizedMatrix
from jaxformers.hf.gguf import changes, rope
from jaxformers.hf.gguf.metadata import Metadata
from jaxformers.hf.gguf.names import ARCHITECTURES, GgufArchitecture

# Tensors that say how positions are scaled, and that are no weights.
NO_WEIGHTS = rope.DIVISORS, rope.LONG, rope.SHORT

# The special tokens of config.json, and the keys of their ids. A text ends at each of the ids.
SPECIAL = {
    "bos_token_id": ("bos",),
    "eos_token_id": ("eos", "eot", "eom"),
    "pad_token_id": ("padding",),
}


class ChangedTensor(NamedTuple):
    """A tensor of a file as the checkpoint has it that the file was made of.

    Arguments:
        stored: the tensor in the file.
        change: the function that undoes the converter's change, one of `changes`; None is none.
        config: the entries of config.json, for the change.
    """

    stored: GgufTensor
    change: Callable | None
    config: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that `read` returns."""
        shape = self.stored.shape
        if self.change is changes.table and len(shape) == 1:
            return (1, *shape)
        return shape[::-1] if self.change is changes.transposed else shape

    @property
    def dtype(self) -> np.dtype:
        """The type of its numbers once they are unpacked."""
        return self.stored.dtype

    def read(self) -> np.ndarray:
        """Returns its values. Blocks are unpacked as float32."""
        return self.changed(self.stored.read())

    def parts(self) -> QuantizedMatrix | None:
        """Returns the parts of a quantized matrix; None for other tensors and types of blocks."""
        if len(self.stored.shape) != 2 or self.change is changes.table:
            return None
        matrix = take_apart(self.stored.kind, self.stored.rows())
        return None if matrix is None else replace(matrix, arrange=self.changed)

    def changed(self, x: np.ndarray) -> np.ndarray:
        """Returns an array that was laid out as the file's, laid out as the checkpoint's."""
        return x if self.change is None else self.change(x, self.config)


def open_gguf(path: Path) -> tuple[dict[str, Any], TensorFiles]:
    """Returns the entries that a config.json of the model would have, and its tensors.

    Raises:
        ValueError: if the file is damaged, its architecture is not known, or a tensor or a key has
            no meaning in it.
        ImportError: if the `gguf` package is missing.
    """
    file = read_gguf(path)
    architecture = find_architecture(file)
    metadata = Metadata(file)
    config = architecture.settings(metadata) | special_tokens(file)
    metadata.check_all_read()
    return config, TensorFiles.of(path, name_tensors(file, architecture, config))


def find_architecture(file: GgufFile) -> GgufArchitecture:
    """Returns the table of a file's architecture, after a check that it holds a whole model."""
    kind = file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ValueError(f"{file.path} is no model: its general.type is {shorten(kind)}.")
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count > 1:
        raise ValueError(
            f"{file.path} is one of {shorten(count)} parts of a model. Join them with llama.cpp: "
            "llama-gguf-split --merge first-part.gguf model.gguf."
        )
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture must be one of {', '.join(sorted(ARCHITECTURES))}, "
            f"got {shorten(name)}."
        )
    return ARCHITECTURES[name]


def name_tensors(
    file: GgufFile, architecture: GgufArchitecture, config: Mapping[str, Any]
) -> dict[str, ChangedTensor]:
    """Returns the tensors of a file by the names that they have in checkpoints."""
    found, unknown = {}, []
    for name, tensor in file.tensors.items():
        if name in NO_WEIGHTS:
            continue
        module, _, suffix = name.rpartition(".")
        layer = re.match(r"blk\.(0|[1-9]\d{0,5})\.", module)
        general = module if layer is None else f"blk.{{i}}.{module[layer.end() :]}"
        if general not in architecture.modules or suffix not in ("weight", "bias"):
            unknown.append(name)
            continue
        theirs = architecture.modules[general]
        theirs = theirs if layer is None else theirs.replace("{i}", layer[1])
        change = architecture.changes.get(general)
        if suffix == "bias" and change in (changes.transposed, changes.table):
            change = None
        found[f"{theirs}.{suffix}"] = ChangedTensor(tensor, change, config)
    if unknown:
        listed = ", ".join(map(shorten, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
        raise ValueError(
            f"{file.path} has tensors that a {file.metadata['general.architecture']} does not "
            f"have here: {listed}."
        )
    return found


def special_tokens(file: GgufFile) -> dict[str, Any]:
    """Returns the entries of config.json about special tokens; None where the file has none."""
    entries: dict[str, Any] = {}
    for key, names in SPECIAL.items():
        given = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        wrong = [x for x in given if x is not None and type(x) is not int]
        if wrong:
            raise ValueError(
                f"{file.path}: the {key} of its tokenizer must be an id, got {shorten(wrong[0])}."
            )
        ids = list(dict.fromkeys(x for x in given if x is not None))
        entries[key] = ids if len(ids) > 1 else next(iter(ids), None)
    return entries
