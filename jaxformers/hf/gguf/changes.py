"""The changes that a converter to GGUF made to tensors, undone.

Each function takes a tensor as the file has it, and the config.json, and returns the tensor of the
checkpoint that the file was made of.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def queries_in_halves(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Returns the rows or biases of queries in the order of checkpoints."""
    return in_halves(x, config["num_attention_heads"])


def keys_in_halves(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Returns the rows or biases of keys in the order of checkpoints."""
    return in_halves(x, config["num_key_value_heads"])


def in_halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows whose rotated pairs lie half a head apart; in the file they are neighbors.

    Example:
        >>> in_halves(np.array([0, 1, 2, 3, 4, 5]), 1)
        array([0, 2, 4, 1, 3, 5])
    """
    if heads < 1 or len(x) % (2 * heads):
        raise ValueError(f"{len(x)} rows of queries or keys are not those of {heads} heads.")
    pairs = x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def minus_one(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Returns the gain of a norm that adds one to it; the file has the sum."""
    return x - np.ones((), x.dtype)


def transposed(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Returns a matrix `(in, out)`, as GPT-2 has it; in the file it is `(out, in)`."""
    return x.T


def table(x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Returns a table as a matrix; files may leave out the axis of a single row."""
    return x.reshape(-1, x.shape[-1])
