"""The layouts of the package compressed-tensors, which LLM Compressor writes.

A quantized weight `(out, in)` is `weight_scale * (weight - weight_zero_point)`.

- "int-quantized" and "naive-quantized": `weight` is int8.
- "float-quantized": `weight` is float8 (E4M3).
- "pack-quantized": `weight_packed` int32 `(out, in b / 32)` has the integers of b bits, the lowest
  bits first, each plus `2^(b-1)`; `weight_shape` has out and in. The zero points are packed in the
  same way along out: `(out b / 32, groups)`.
- "mxfp4-pack-quantized": `weight_packed` uint8 `(out, in/2)` has two floats of four bits (E2M1),
  the low half first, and `weight_scale` uint8 `(out, in/32)` the exponent of a power of two, plus
  127 (Rouhani et al. 2023).

Scales are `(out, groups)`, `(out, 1)`, one number, or one number per block.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformers.hf.quantized.bits import E2M1, Integers, spread, unpack_halves, unpack_words
from jaxformers.hf.quantized.gptq import SCALES
from jaxformers.hf.quantized.module import Module, QuantizedTensor
from jaxformers.hf.quantized.settings import Settings

FORMATS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"),
    *("mxfp4-pack-quantized", "mixed-precision", "dense"),
)
MX_GROUP = 32


class CompressedTensors:
    """The formats of compressed-tensors.

    Arguments:
        entries: those of `quantization_config`.

    Raises:
        ValueError: if they describe a layout that is not read.
    """

    main = "weight_scale"
    others = ("weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx")
    dropped = (
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
        *("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
    )

    def __init__(self, entries: Mapping[str, Any]):
        settings = Settings(entries)
        settings.choose("format", FORMATS, "dense")
        settings.choose("quantization_status", ("compressed",), "compressed")
        settings.forbid("transform_config")
        sparsity = Settings(entries.get("sparsity_config") or {}, "sparsity_config")
        sparsity.choose("format", ("dense",), "dense")
        groups = Settings(entries.get("config_groups"), "config_groups")
        weights = [self._weights(groups, name) for name in groups.entries]
        self.groups = [x for x in weights if x is not None]
        self.bits = sorted({x.choose("num_bits", (4, 8), 8) for x in self.groups})
        self.sizes = {x.group_size(None) for x in self.groups}
        blocks = {x.pair("block_structure") for x in self.groups}
        self.blocks = {x for x in blocks if x is not None}

    def _weights(self, groups: Settings, name: str) -> Settings | None:
        """Returns the settings of the weights of a group of modules, None if it has none."""
        group = Settings(groups.entries[name], f"the group {name}")
        group.choose("format", FORMATS, "dense")
        given = group.entries.get("weights")
        return None if given is None else Settings(given, f"the weights of the group {name}")

    def open(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        if not module.has("weight_packed"):
            return self._plain(module, dtype)
        if module.files.dtype(f"{module.name}.weight_packed") == np.uint8:
            return _open_mxfp4(module, dtype)
        return self._packed(module, dtype)

    def _plain(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        """Opens a weight that has a byte for each number."""
        tensor = module.find("weight", [np.int8, jnp.float8_e4m3fn])
        out, width = tensor.shape
        block = self._block(module, (out, width))
        zeros = [tensor.dtype, np.int8]
        if module.has("weight_zero_point"):
            shape = module.files.shape(f"{module.name}.weight_scale")
            module.sized("weight_zero_point", zeros, shape)
        if tensor.dtype == np.int8 and block[0] in (1, out):
            return QuantizedTensor.of((out, width), dtype, partial(_read_bytes, module))
        return QuantizedTensor((out, width), dtype, partial(_in_blocks, module, block))

    def _packed(self, module: Module, dtype: np.dtype) -> QuantizedTensor:
        """Opens a weight whose integers are packed in words."""
        out, words = module.find("weight_packed", [np.int32]).shape
        read = module.sized("weight_shape", [np.int64, np.int32], (2,)).read()
        width = int(read[1])
        fitting = [b for b in self.bits if width > 0 and -(-width * b // 32) == words]
        if int(read[0]) != out or len(fitting) != 1:
            expected = f"the shape of {out} rows of {words} words with numbers of {self.bits} bits"
            raise module.fault("weight_shape", expected, read.tolist())
        [bits] = fitting
        block = self._block(module, (out, width))
        groups = 1 if block[0] > 1 else width // block[1]
        if module.has("weight_zero_point"):
            packed = -(-out * bits // 32)
            module.sized("weight_zero_point", [np.int32], (packed, groups))
        if block[0] not in (1, out):
            raise module.fault("weight_scale", "a scale per output or group", block)
        if module.has("weight_g_idx"):
            module.sized("weight_g_idx", [np.int32, np.int64], (width,))
        return QuantizedTensor.of((out, width), dtype, partial(_read_words, module, width, bits))

    def _block(self, module: Module, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the outputs and the inputs that share a scale, by the shape of the scales."""
        out, width = shape
        scales = module.files.shape(f"{module.name}.weight_scale")
        module.find("weight_scale", SCALES, len(scales))
        if scales in ((), (1,)):
            return out, width
        for rows, columns in self.blocks:
            if scales == (-(-out // rows), -(-width // columns)):
                return rows, columns
        if len(scales) != 2 or scales[0] != out or width % scales[1]:
            raise module.fault("weight_scale", f"of a grid over {shape}", scales)
        size = width // scales[1]
        if scales[1] > 1 and size not in self.sizes:
            known = ", ".join(map(str, sorted(x for x in self.sizes if x))) or "none"
            raise module.fault("weight_scale", f"of groups of config.json ({known})", size)
        return 1, size


def _in_blocks(module: Module, block: tuple[int, int]) -> np.ndarray:
    """Returns the numbers of a weight whose blocks each have one scale."""
    x = module.read("weight").astype(np.float32)
    if module.has("weight_zero_point"):
        x -= spread(module.read("weight_zero_point").astype(np.float32), x.shape, block)
    x *= spread(module.read("weight_scale").astype(np.float32), x.shape, block)
    return x


def _read_bytes(module: Module) -> Integers:
    q, scale = module.read("weight"), module.read("weight_scale")
    grid = (q.shape[0], 1 if scale.size == 1 else scale.shape[-1])
    zero = np.full(grid, 128)
    if module.has("weight_zero_point"):
        zero += module.read("weight_zero_point")
    return Integers(q.view(np.uint8) ^ 128, np.broadcast_to(scale, grid), zero, 8)


def _read_words(module: Module, width: int, bits: int) -> Integers:
    q = unpack_words(module.read("weight_packed"), bits)[:, :width]
    scale, group = module.read("weight_scale"), None
    grid = (q.shape[0], 1 if scale.size == 1 else scale.shape[-1])
    zero = np.full(grid, 2 ** (bits - 1))
    if module.has("weight_zero_point"):
        zero = unpack_words(module.read("weight_zero_point").T, bits)[:, : q.shape[0]].T
    if module.has("weight_g_idx"):
        group = module.read("weight_g_idx")
        if group.min() < 0 or group.max() >= grid[1]:
            expected = f"of groups from 0 to {grid[1] - 1}"
            raise module.fault("weight_g_idx", expected, group.max())
    return Integers(q, np.broadcast_to(scale, grid), zero, bits, group)


def _open_mxfp4(module: Module, dtype: np.dtype) -> QuantizedTensor:
    """Opens a weight of 4-bit floats with powers of two as scales."""
    out, packed = module.find("weight_packed", [np.uint8]).shape
    if 2 * packed % MX_GROUP:
        raise module.fault("weight_packed", f"of inputs in groups of {MX_GROUP}", 2 * packed)
    module.sized("weight_scale", [np.uint8], (out, 2 * packed // MX_GROUP))
    return QuantizedTensor((out, 2 * packed), dtype, partial(_mxfp4_numbers, module))


def _mxfp4_numbers(module: Module) -> np.ndarray:
    exponents = module.read("weight_scale")
    x = E2M1[unpack_halves(module.read("weight_packed"))]
    with np.errstate(over="ignore", invalid="ignore"):  # the loader refuses infinite numbers
        scale = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        groups = x.reshape(*exponents.shape, MX_GROUP)
        groups *= scale[..., None]
    return groups.reshape(x.shape)
