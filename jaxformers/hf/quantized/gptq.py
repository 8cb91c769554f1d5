"""The layout of GPTQ (Frantar et al. 2022), as AutoGPTQ and GPTQModel write it.

A weight `(out, in)` of b bits is `scales[g] * (qweight - zero)`, where g is the group of the
input. `qweight` int32 `(in b / 32, out)` and `qzeros` int32 `(groups, out b / 32)` are packed with
the lowest bits first. The stored zero is one less than the real one, except in the second version
of the format. `g_idx` has the group of each input; they are in order unless the weights were
quantized in the order of their activations (`desc_act`).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformers.hf.quantized.bits import Integers, unpack_words
from jaxformers.hf.quantized.module import Module, QuantizedTensor
from jaxformers.hf.quantized.settings import Settings

SCALES = np.float16, jnp.bfloat16, np.float32


class Gptq:
    """The format of GPTQ.

    Arguments:
        entries: those of `quantization_config`.

    Raises:
        ValueError: if they describe a layout that is not read.
    """

    main = "qweight"
    others = ("qzeros", "scales", "g_idx")
    dropped = ()

    def __init__(self, entries: Mapping[str, Any]):
        settings = Settings(entries)
        self.bits = settings.choose("bits", (4, 8))
        self.group_size = settings.group_size(128)
        names = ("checkpoint_format", "format")
        given = {settings.choose(key, ("gptq", "gptq_v2"), "gptq") for key in names}
        self.shift = 0 if "gptq_v2" in given else 1
        settings.choose("pack_dtype", ("int32",), "int32")
        settings.forbid("dynamic", "is_marlin_format", "use_marlin_format")

    def open(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        per_word = 32 // self.bits
        packed, out = module.find("qweight", [np.int32]).shape
        width = packed * per_word
        size = width if self.group_size is None else self.group_size
        groups = -(-width // size)
        module.sized("scales", SCALES, (groups, out))
        if out % per_word:
            raise module.fault("qweight", f"of outputs in multiples of {per_word}", (packed, out))
        module.sized("qzeros", [np.int32], (groups, out // per_word))
        if module.has("g_idx"):
            module.sized("g_idx", [np.int32, np.int64], (width,))
        read = partial(self._read, module, groups, size)
        return QuantizedTensor.of((out, width), dtype, read)

    def _read(self, module: Module, groups: int, size: int) -> Integers:
        unsigned = unpack_words(module.read("qweight").T, self.bits)
        zero = unpack_words(module.read("qzeros"), self.bits).T + np.uint8(self.shift)
        zero &= np.uint8(2**self.bits - 1)
        width = unsigned.shape[1]
        run = np.arange(width) // size
        group = module.read("g_idx") if module.has("g_idx") else run
        if group.min() < 0 or group.max() >= groups:
            raise module.fault("g_idx", f"of groups from 0 to {groups - 1}", group.max())
        runs = width % size == 0 and (group == run).all()
        scale = module.read("scales").T
        return Integers(unsigned, scale, zero, self.bits, None if runs else group)
