"""Finds the quantized modules of a checkpoint and shows each as one tensor of floating numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxformers.files.hub import FileTensor, TensorFiles
from jaxformers.files.json_file import shorten
from jaxformers.hf.config.harmless import check_not_quantized
from jaxformers.hf.quantized.awq import Awq
from jaxformers.hf.quantized.compressed import CompressedTensors
from jaxformers.hf.quantized.fp8 import Fp8
from jaxformers.hf.quantized.gptq import Gptq
from jaxformers.hf.quantized.module import Format, Module
from jaxformers.precision import FLOATS

KEY = "quantization_config"
FORMATS: dict[str, Any] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
}


def open_quantized(
    config: dict[str, Any], files: TensorFiles
) -> tuple[dict[str, Any], TensorFiles]:
    """Returns a config.json and tensors as of the checkpoint before it was quantized.

    Each quantized weight is one tensor `X.weight` `(out, in)`, which is unpacked when it is read.
    Quantized modules are found by their tensors, so that those which a tool has left out are plain.

    Arguments:
        config: the entries of config.json.
        files: the tensors.

    Raises:
        ValueError: if the format is not read, or the tensors of a module do not fit together.
    """
    given = config.get(KEY)
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if not isinstance(method, str) or method not in FORMATS:
        check_not_quantized(config, FORMATS)
        return config, files
    form: Format = FORMATS[method](given)
    tensors = {name: files.find(name) for name in files.names}
    found = {
        name.removesuffix(f".{form.main}") for name in tensors if name.endswith(f".{form.main}")
    }
    plain = _plain_tensors(tensors, found, form)
    dtype = _dtype_beside(plain, [files.find(f"{name}.{form.main}") for name in found])
    if not found:
        raise ValueError(
            f"config.json: {KEY} says that weights are quantized by {method}, but no module of "
            f"{files.directory} has a tensor {form.main}. Where the weights are whole all the "
            "same, remove this entry."
        )
    weights = {f"{name}.weight": form.open(Module(name, files), dtype) for name in sorted(found)}
    opened = TensorFiles.of(files.directory, plain | weights)
    opened.lacking = files.lacking
    return {key: x for key, x in config.items() if key != KEY}, opened


def _plain_tensors(
    tensors: Mapping[str, FileTensor], found: set[str], form: Format
) -> dict[str, FileTensor]:
    """Returns the tensors that are no part of a quantized weight.

    Raises:
        ValueError: if a part is left over, or a weight has small numbers and no scales.
    """
    parts = {form.main, "weight", *form.others}
    plain = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in form.dropped or (module in found and part in parts):
            continue
        if part in form.others or (part == "weight" and tensor.dtype.itemsize == 1):
            raise ValueError(
                f"the quantized module {shorten(module)} has a tensor {part}, and none that is "
                f"{form.main}. The file is damaged, or config.json describes another one."
            )
        plain[name] = tensor
    return plain


def _dtype_beside(plain: Mapping[str, FileTensor], scales: list[FileTensor]) -> np.dtype:
    """Returns the type of the floating tensors beside the quantized ones, or of the widest."""
    kinds = {x.dtype for x in (*plain.values(), *scales) if x.dtype in FLOATS}
    beside = {x.dtype for x in plain.values() if x.dtype in FLOATS} or kinds
    return next(iter(beside)) if len(beside) == 1 else np.dtype(np.float32)
