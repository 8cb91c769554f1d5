"""Numbers of a few bits that are packed in integers, and the scales beside them."""

from typing import NamedTuple

import numpy as np

from jaxformers.files.quantized_matrix import QuantizedMatrix

# The numbers of four bits with a sign, two of exponent and one of mantissa (E2M1).
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Returns the unsigned numbers of 4 or 8 bits in int32 words, the lowest bits first.

    Arguments:
        words: int32 `(..., w)`.
        bits: 4 or 8.

    Returns:
        uint8 `(..., 32 / bits * w)`.

    Example:
        >>> unpack_words(np.array([0x76543210], np.int32), 4)
        array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
    """
    numbers = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return numbers if bits == 8 else unpack_halves(numbers)


def unpack_halves(numbers: np.ndarray) -> np.ndarray:
    """Returns the numbers of 4 bits in bytes `(..., j)`, the low half first: `(..., 2j)`."""
    pairs = np.stack([numbers & 15, numbers >> 4], axis=-1)
    return pairs.reshape(*numbers.shape[:-1], -1)


class Integers(NamedTuple):
    """A matrix `(out, in)` of integers, which stand for `scale * (unsigned - zero)`.

    Arguments:
        unsigned: uint8 `(out, in)`, numbers of so many bits.
        scale: `(out, k)`.
        zero: integers `(out, k)`.
        bits: 4 or 8.
        group: which of the k groups each input is in; None for runs of the same length.
    """

    unsigned: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """Returns the numbers in float32."""
        scale, zero = self.scale.astype(np.float32), self.zero.astype(np.float32)
        x = self.unsigned.astype(np.float32)
        if self.group is not None:
            x -= zero[:, self.group]
            x *= scale[:, self.group]
            return x
        groups = x.reshape(*scale.shape, -1)
        groups -= zero[..., None]
        groups *= scale[..., None]
        return groups.reshape(x.shape)

    def parts(self) -> QuantizedMatrix | None:
        """Returns the parts that `Quantized` holds; None where groups are no runs of inputs."""
        if self.group is not None:
            return None
        narrow = self.scale.dtype == np.float16
        scale = self.scale if narrow else self.scale.astype(np.float32)
        integers, zero = self.unsigned, self.zero.astype(np.int32)
        if self.bits == 8:
            integers, zero = (integers ^ 128).view(np.int8), zero - 128
        if not zero.any():
            return QuantizedMatrix(integers, scale, None, self.bits)
        offset = -scale.astype(np.float32) * zero.astype(np.float32)
        with np.errstate(over="ignore"):
            same = offset.astype(scale.dtype)
        return QuantizedMatrix(
            integers, scale, same if (same == offset).all() else offset, self.bits
        )


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Returns the scale of each number of a matrix. Blocks at its ends may be smaller."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    rows, columns = (np.arange(n) // size for n, size in zip(shape, block, strict=True))
    return scale[rows[:, None], columns]
