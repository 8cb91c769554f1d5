"""Small quantized checkpoints, made from the definition of each layout, number by number.

    expected = quantize("gptq", source, target)

writes the checkpoint `source`, whose matrices are `(out, in)`, with quantized weights to `target`,
and returns the numbers that these stand for by name, in float32.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxformers.files.hub import TensorFiles, write_tensors

KEPT = ("embed_tokens", "norm", "lm_head")
FP8 = np.dtype(jnp.float8_e4m3fn)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-x for x in E2M1]


def quantize(kind, source, target, edit=None, **settings):
    """Write a checkpoint; `edit` changes its tensors, and settings its quantization_config."""
    make, entries = KINDS[kind]
    shutil.copytree(source, target)
    files = TensorFiles(source)
    tensors, expected = {}, {}
    for i, name in enumerate(files.names):
        x = files.read(name)
        if any(part in name for part in KEPT) or x.ndim != 2:
            tensors[name] = expected[name] = x
            continue
        module = name.removesuffix(".weight")
        parts, expected[name] = make(np.random.default_rng(i), *x.shape)
        tensors |= {f"{module}.{part}": np.ascontiguousarray(y) for part, y in parts.items()}
    if edit is not None:
        edit(tensors)
    path = Path(target) / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {**entries, **settings}}
    path.write_text(json.dumps(config))
    write_tensors(target, [(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()])
    return expected


def pack(numbers, bits, order=None):
    """Words of 32 bits along the last axis; number `order[i]` of a word is at bit `i * bits`."""
    count = 32 // bits
    order = range(count) if order is None else order
    numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % count)])
    words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // count), np.int64)
    for w in range(words.shape[-1]):
        for i, place in enumerate(order):
            words[..., w] += numbers[..., w * count + place].astype(np.int64) << (bits * i)
    return words.astype(np.uint32).view(np.int32)


def draw(rng, out, width, groups, bits, dtype=np.float16):
    """Integers, scales `(out, groups)` and zero points of so many bits, without a sign."""
    top = 2**bits
    q, zero = rng.integers(0, top, (out, width)), rng.integers(1, top, (out, groups))
    return q, (rng.random((out, groups)) / top + 0.3 / top).astype(dtype), zero


def numbers(q, scale, zero, group):
    """The definition, number by number: `scale * (q - zero)` of the group of each input."""
    x = np.zeros(q.shape, np.float32)
    for i, g in enumerate(group):
        x[:, i] = scale[:, g].astype(np.float32) * (q[:, i] - zero[:, g]).astype(np.float32)
    return x


def gptq(bits=4, size=16, order=False, index=True, shift=1, symmetric=False):
    def make(rng, out, width):
        groups = width // size if size > 0 else 1
        q, scale, zero = draw(rng, out, width, groups, bits)
        zero = np.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
        group = np.arange(width) // (width // groups)
        group = rng.permutation(group) if order else group
        parts = {
            "qweight": pack(q.T.reshape(-1, 32 // bits, out).swapaxes(1, 2), bits)[..., 0],
            "qzeros": pack((zero - shift).T, bits),
            "scales": scale.T,
        }
        parts |= {"g_idx": group.astype(np.int32)} if index else {}
        return parts, numbers(q, scale, zero, group)

    return make


def awq(rng, out, width, size=16):
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    q, scale, zero = draw(rng, out, width, width // size, 4)
    parts = {"qweight": pack(q.T, 4, order), "qzeros": pack(zero.T, 4, order), "scales": scale.T}
    return parts, numbers(q, scale, zero, np.arange(width) // size)


def packed(bits=4, size=16, symmetric=True, order=False):
    def make(rng, out, width):
        groups = width // size if size else 1
        q, scale, zero = draw(rng, out, width, groups, bits, jnp.bfloat16)
        zero = np.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
        group = np.arange(width) // (width // groups)
        group = rng.permutation(group) if order else group
        parts = {"weight_packed": pack(q, bits), "weight_scale": scale}
        parts["weight_shape"] = np.array([out, width])
        if not symmetric:
            parts["weight_zero_point"] = pack(zero.T, bits).T
        parts |= {"weight_g_idx": group.astype(np.int32)} if order else {}
        return parts, numbers(q, scale, zero, group)

    return make


def int8(size=0, symmetric=True, whole=False):
    def make(rng, out, width):
        groups = width // size if size else 1
        q, scale, zero = draw(rng, out, width, groups, 8, np.float32)
        zero = np.full_like(zero, 128) if symmetric else zero
        scale = np.broadcast_to(scale[:1], scale.shape) if whole else scale
        parts = {"weight": (q - 128).astype(np.int8), "weight_scale": scale}
        parts["weight_scale"] = scale[0] if whole else scale
        if not symmetric:
            parts["weight_zero_point"] = (zero - 128).astype(np.int8)
        parts["input_scale"] = np.ones(1, np.float32)
        return parts, numbers(q, scale, zero, np.arange(width) // (width // groups))

    return make


def float8(name, rows=None, columns=None, dtype=np.float32):
    """One scale per block; None is the whole of an axis."""

    def make(rng, out, width):
        q = rng.normal(size=(out, width)).astype(FP8)
        a, b = rows or out, columns or width
        scale = rng.random((-(-out // a), -(-width // b))).astype(dtype)
        x = np.zeros((out, width), np.float32)
        for i in range(out):
            for j in range(width):
                x[i, j] = np.float32(q[i, j]) * np.float32(scale[i // a, j // b])
        return {"weight": q, name: scale.reshape(-1) if scale.size == 1 else scale}, x

    return make


def mxfp4(rng, out, width):
    q, exponents = rng.integers(0, 16, (out, width)), rng.integers(119, 129, (out, width // 32))
    x = np.array(E2M1, np.float32)[q] * np.repeat(2.0 ** (exponents - 127.0), 32, axis=1)
    bytes_ = (q[:, ::2] + 16 * q[:, 1::2]).astype(np.uint8)
    parts = {"weight_packed": bytes_, "weight_scale": exponents.astype(np.uint8)}
    return parts, x.astype(np.float32)


def compressed(form, **weights):
    """The quantization_config of compressed-tensors for one group of modules."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}}
    if form in ("int-quantized", "float-quantized"):
        kind = {"num_bits": 8, "type": weights["type"], "dynamic": True, "strategy": "token"}
        group["input_activations"] = {"symmetric": True, **kind}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _ints(form, bits, size, symmetric=True, **more):
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    kind = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return compressed(form, **kind, **{**strategy, **more})


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}
MXFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
FINE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
INTS = "int-quantized"
PACKED = "pack-quantized"

KINDS = {
    "gptq": (gptq(), GPTQ),
    "gptq symmetric": (gptq(symmetric=True), GPTQ | {"sym": True}),
    "gptq second version": (gptq(shift=0), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq 8 bits": (gptq(8, -1, index=False, symmetric=True), GPTQ | {"bits": 8, "group_size": -1}),
    "gptq in another order": (gptq(order=True), GPTQ | {"desc_act": True}),
    "awq": (awq, AWQ),
    "packed": (packed(), _ints(PACKED, 4, 16)),
    "packed, zero points": (packed(symmetric=False), _ints(PACKED, 4, 16, False)),
    "packed, channels": (packed(size=0), _ints(PACKED, 4, 0)),
    "packed, 8 bits": (packed(8, 0, False), _ints(PACKED, 8, 0, False)),
    "packed in another order": (packed(order=True), _ints(PACKED, 4, 16, actorder="group")),
    "int8": (int8(), _ints(INTS, 8, 0)),
    "int8, zero points": (int8(16, symmetric=False), _ints(INTS, 8, 16, False)),
    "int8, one scale": (int8(whole=True), _ints("naive-quantized", 8, 0, strategy="tensor")),
    "float8": (
        float8("weight_scale", rows=1, dtype=jnp.bfloat16),
        compressed("float-quantized", **FLOATS, strategy="channel"),
    ),
    "float8, one scale": (
        float8("weight_scale"),
        compressed("float-quantized", **FLOATS, strategy="tensor"),
    ),
    "float8, blocks": (
        float8("weight_scale", 12, 16),
        compressed("float-quantized", **FLOATS, strategy="block", block_structure=[12, 16]),
    ),
    "mxfp4": (mxfp4, compressed("mxfp4-pack-quantized", **MXFP4)),
    "fp8": (float8("weight_scale_inv", 16, 16), FINE | {"weight_block_size": [16, 16]}),
    "fp8, ends of blocks": (
        float8("weight_scale_inv", 24, 20),
        FINE | {"weight_block_size": [24, 20]},
    ),
    "fp8, one scale": (float8("weight_scale_inv"), FINE),
}
# Their layout is not that of `Quantized`.
UNPACKED = ("order", "float8", "mxfp4", "fp8")
