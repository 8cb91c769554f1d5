"""The layout of AWQ (Lin et al. 2023), as AutoAWQ writes it for products of matrices ("gemm").

A weight `(out, in)` of 4 bits is `scales[g] * (qweight - qzeros[g])`, where g is the group of the
input. `qweight` int32 `(in, out/8)` and `qzeros` int32 `(groups, out/8)` hold eight outputs in a
word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxformers.hf.quantized.bits import Integers, unpack_words
from jaxformers.hf.quantized.gptq import SCALES
from jaxformers.hf.quantized.module import Module, QuantizedTensor
from jaxformers.hf.quantized.settings import Settings

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word
PLACES = np.argsort(ORDER)  # of each output


class Awq:
    """The format of AWQ.

    Arguments:
        entries: those of `quantization_config`.

    Raises:
        ValueError: if they describe a layout that is not read.
    """

    main = "qweight"
    others = ("qzeros", "scales")
    dropped = ()

    def __init__(self, entries: Mapping[str, Any]):
        settings = Settings(entries)
        settings.choose("bits", (4,), 4)
        for key in ("version", "format"):
            settings.choose(key, ("gemm",), "gemm")
        self.group_size = settings.group_size(128)

    def open(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        width, words = module.find("qweight", [np.int32]).shape
        size = width if self.group_size is None else self.group_size
        if width % size:
            raise module.fault("qweight", f"of inputs in groups of {size}", (width, words))
        module.sized("qzeros", [np.int32], (width // size, words))
        module.sized("scales", SCALES, (width // size, 8 * words))
        return QuantizedTensor.of((8 * words, width), dtype, partial(_read, module))


def _read(module: Module) -> Integers:
    q, zero = _in_order(module.read("qweight")).T, _in_order(module.read("qzeros")).T
    return Integers(q, module.read("scales").T, zero, 4)


def _in_order(words: np.ndarray) -> np.ndarray:
    """Returns the numbers `(i, 8 w)` in words `(i, w)`."""
    numbers = unpack_words(words, 4).reshape(*words.shape, 8)
    return numbers[..., PLACES].reshape(words.shape[0], -1)
