"""The layout of weights in 8-bit floats with a scale per block, as of DeepSeek-V3 and Qwen3.

A weight `(out, in)` is `weight * weight_scale_inv` of its block. `weight` is float8 (E4M3), and
`weight_scale_inv` has a number for each block of 128 by 128, or one for the whole matrix.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformers.hf.quantized.bits import spread
from jaxformers.hf.quantized.module import Module, QuantizedTensor
from jaxformers.hf.quantized.settings import Settings

SCALES = np.float32, jnp.bfloat16, np.float16, jnp.float8_e8m0fnu


class Fp8:
    """The format of 8-bit floats in blocks.

    Arguments:
        entries: those of `quantization_config`.

    Raises:
        ValueError: if they describe a layout that is not read.
    """

    main = "weight_scale_inv"
    others = ("weight_scale_inv",)
    dropped = ("activation_scale", "input_scale")

    def __init__(self, entries: Mapping[str, Any]):
        settings = Settings(entries)
        settings.choose("fmt", ("e4m3",), "e4m3")
        settings.choose("expert_dtype", ("fp8",), "fp8")
        self.block = settings.pair("weight_block_size")

    def open(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        out, width = module.find("weight", [jnp.float8_e4m3fn]).shape
        block = (out, width) if self.block is None else self.block
        grid: tuple[int, ...] = (-(-out // block[0]), -(-width // block[1]))
        if self.block is None:
            alone = module.files.shape(f"{module.name}.weight_scale_inv")
            grid = alone if alone in ((), (1,)) else grid
        module.sized("weight_scale_inv", SCALES, grid)
        return QuantizedTensor((out, width), dtype, partial(_numbers, module, block))


def _numbers(module: Module, block: tuple[int, int]) -> np.ndarray:
    x = module.read("weight").astype(np.float32)
    scale = module.read("weight_scale_inv").astype(np.float32)
    x *= spread(scale, x.shape, block)
    return x
