"""The blocks of quantized numbers in GGUF files, taken apart into integers, scales and offsets.

Each number is `scale * integer + offset`. Every product and sum is exact in float32, so that they
are the numbers that the `gguf` package unpacks, bit by bit. The layouts are those of ggml
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from collections.abc import Callable

import numpy as np

from jaxformers.files.quantized_matrix import QuantizedMatrix


def take_apart(kind: str, rows: np.ndarray) -> QuantizedMatrix | None:
    """Returns the integers, scales and offsets of rows of blocks; None for other types of blocks.

    Arguments:
        kind: the name of the type, such as "Q4_K".
        rows: uint8 `(out, bytes of a row)`.

    Example:
        >>> one = np.float16([0.5]).tobytes() + bytes(range(32))
        >>> blocks = take_apart("Q8_0", np.frombuffer(one, np.uint8)[None])
        >>> blocks.integers[0, :4], blocks.scale
        (array([0, 1, 2, 3], dtype=int8), array([[0.5]], dtype=float16))
    """
    if kind not in KINDS:
        return None
    size, bits, split = KINDS[kind]
    with np.errstate(all="ignore"):  # of damaged scales, which whoever uses them checks
        integers, scale, offset = split(rows.reshape(-1, size))
    out = len(rows)
    narrow = np.int8 if bits == 8 else np.uint8
    return QuantizedMatrix(
        integers.astype(narrow).reshape(out, -1),
        scale.reshape(out, -1),
        None if offset is None else offset.reshape(out, -1),
        bits,
    )


_Split = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(x: np.ndarray) -> np.ndarray:
    """Returns the float16 number in two bytes of each block."""
    return np.ascontiguousarray(x).view("<f2")


def _planes(x: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Returns fields of some bits: the lowest ones of `width` bytes, then the next ones of them."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = x.reshape(len(x), -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return fields.reshape(len(x), -1)


def _times(scale: np.ndarray, by: int) -> np.ndarray:
    """Returns scales times a number, in float16 if that is exact."""
    wide = scale.astype(np.float32) * np.float32(by)
    narrow = wide.astype(np.float16)
    return narrow if scale.dtype == np.float16 and (narrow == wide).all() else wide


def _q8_0(x: np.ndarray) -> _Split:
    return x[:, 2:].view(np.int8), _half(x[:, :2]), None


def _q4_0(x: np.ndarray) -> _Split:
    scale = _half(x[:, :2])
    return _planes(x[:, 2:], 4, 16), scale, _times(scale, -8)


def _q4_1(x: np.ndarray) -> _Split:
    return _planes(x[:, 4:], 4, 16), _half(x[:, :2]), _half(x[:, 2:4])


def _fifth_bits(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(x, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(x: np.ndarray) -> _Split:
    integers = _planes(x[:, 6:], 4, 16) | _fifth_bits(x[:, 2:6])
    return integers.astype(np.int8) - np.int8(16), _half(x[:, :2]), None


def _q5_1(x: np.ndarray) -> _Split:
    integers = _planes(x[:, 8:], 4, 16) | _fifth_bits(x[:, 4:8])
    return integers, _half(x[:, :2]), _half(x[:, 2:4])


def _scales_and_offsets(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 8 scales and offsets of 32 numbers each, from the first 16 bytes of a block.

    After two float16 numbers come 12 bytes with two integers of 6 bits for each group. The last 8
    of these integers have their two high bits in bytes of the first 8.
    """
    low, rest = x[:, 4:12], x[:, 12:16]
    high = low >> 6 << 4
    six = low & np.uint8(63)
    scales = np.concatenate([six[:, :4], rest & np.uint8(15) | high[:, :4]], axis=1)
    offsets = np.concatenate([six[:, 4:], rest >> 4 | high[:, 4:]], axis=1)
    d, least = (_half(x[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    return d * scales.astype(np.float32), -(least * offsets.astype(np.float32))


def _q4_k(x: np.ndarray) -> _Split:
    return _planes(x[:, 16:], 4, 32), *_scales_and_offsets(x)


def _q5_k(x: np.ndarray) -> _Split:
    high = _planes(x[:, 16:48], 1, 32) << np.uint8(4)
    return _planes(x[:, 48:], 4, 32) | high, *_scales_and_offsets(x)


def _q6_k(x: np.ndarray) -> _Split:
    integers = _planes(x[:, :128], 4, 64) | _planes(x[:, 128:192], 2, 32) << np.uint8(4)
    scales = x[:, 192:208].view(np.int8).astype(np.float32)
    scale = _half(x[:, 208:]).astype(np.float32) * scales
    return integers.astype(np.int8) - np.int8(32), scale, None


def _q2_k(x: np.ndarray) -> _Split:
    d, least = (_half(x[:, i : i + 2]).astype(np.float32) for i in (80, 82))
    scale = d * (x[:, :16] & np.uint8(15)).astype(np.float32)
    offset = -(least * (x[:, :16] >> 4).astype(np.float32))
    return _planes(x[:, 16:80], 2, 32), scale, offset


def _q3_k(x: np.ndarray) -> _Split:
    six = _planes(x[:, 96:104], 4, 8) | _planes(x[:, 104:108], 2, 4) << np.uint8(4)
    scale = _half(x[:, 108:]).astype(np.float32) * (six.astype(np.float32) - np.float32(32))
    integers = _planes(x[:, 32:96], 2, 32) | _planes(x[:, :32], 1, 32) << np.uint8(2)
    return integers, scale, _times(scale, -4)


# Of each type the bytes of a block, the bits of an integer here, and how a block is split.
KINDS: dict[str, tuple[int, int, Callable[[np.ndarray], _Split]]] = {
    "Q8_0": (34, 8, _q8_0),
    "Q4_0": (18, 4, _q4_0),
    "Q4_1": (20, 4, _q4_1),
    "Q5_0": (22, 8, _q5_0),
    "Q5_1": (24, 8, _q5_1),
    "Q2_K": (84, 4, _q2_k),
    "Q3_K": (110, 4, _q3_k),
    "Q4_K": (144, 4, _q4_k),
    "Q5_K": (176, 8, _q5_k),
    "Q6_K": (210, 8, _q6_k),
}
