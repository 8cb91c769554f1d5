"""A matrix of integers with scales, as files of quantized weights hold it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


@dataclass(frozen=True)
class QuantizedMatrix:
    """The parts of a matrix `(out, in)` whose numbers are `scale * integer + offset`.

    Arguments:
        integers: `(out, in)`, int8 for 8 bits, uint8 from 0 to 15 for 4 bits.
        scale: `(out, k)`, a number for each of k groups of consecutive inputs.
        offset: of the same shape; None is 0.
        bits: 8 or 4.
        arrange: function from an array `(out, in)` to the tensor as the checkpoint has it, such
            as `np.transpose`; the identity by default.
    """

    integers: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    bits: int = 8
    arrange: Callable[[np.ndarray], np.ndarray] = _as_it_is
