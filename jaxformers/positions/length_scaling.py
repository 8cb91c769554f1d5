"""Scalings of rotary positions that depend on the length of each row: dynamic NTK, LongRoPE."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxformers.checks import check_positive, check_size
from jaxformers.positions.scaling import (
    Frequencies,
    check_factor,
    check_original_length,
    rotary_frequencies,
)


class DynamicScaling(eqx.Module):
    """A scaling whose theta grows with the length of the sequence ("NTK-aware", dynamic).

    The fastest pair keeps its frequency. The frequency of the slowest pair is divided by about
    `length / original_length` (Peng et al. 2023, section 3.3). The length is each row's largest
    position + 1. Beyond the original length, each new token therefore changes the angles of all
    tokens before it.

    Decoding does as transformers does: a prompt is read at its own length, and the keys in the
    cache keep the angles at which they were rotated first. Beyond the original length, a token's
    log-probability from `generate` therefore differs from `score`, which reads the whole row at
    its final length.

    Arguments:
        factor: how strongly theta grows, at least 1.
        original_length: up to this length, in tokens, theta does not change.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> position = RotaryPositionalEncoding(scaling=DynamicScaling(2.0, 2048))
    """

    factor: float = eqx.field(static=True)
    original_length: int = eqx.field(static=True)

    def __init__(self, factor: float, original_length: int):
        self.factor = check_factor(factor)
        self.original_length = check_original_length(original_length)

    def same_until(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Returns the longest rows that have the frequencies of rows of these lengths."""
        return jnp.maximum(lengths, self.original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        excess = jnp.maximum(_lengths(positions) - self.original_length, 0).astype(jnp.float32)
        growth = 1 + self.factor / self.original_length * excess[..., None]
        # theta * growth^(d / (d - 2)); with a single pair theta does not matter.
        powers = -np.arange(0, dim, 2) / max(dim - 2, 1)
        plain = rotary_frequencies(theta, dim).astype(np.float32)
        return plain * growth ** powers.astype(np.float32), 1.0


class LongScaling(eqx.Module):
    """A scaling with a divisor for each frequency, and other divisors for long rows (LongRoPE).

    The divisors were found by search (Ding et al. 2024), and the form is that of Phi-3. The length
    is each row's largest position + 1, as for `DynamicScaling`. With a cache, a row that becomes
    longer than the original length is read again, as in transformers. Every new token then comes
    from a whole row with the same divisors. `score` differs: it reads each token of a long row
    with the long divisors.

    Arguments:
        short_factors: the divisors for rows up to the original length, one for each of the
            `rotary_dim / 2` pairs.
        long_factors: the divisors for longer rows, as many.
        original_length: the longest sequence of the first training, in tokens.
        attention_factor: multiplies queries and keys, see `long_attention_factor`.

    Raises:
        ValueError: if a number is out of its range. If a list does not have one number for each
            pair, the error comes at the first use.

    Example:
        >>> scaling = LongScaling([1.0, 1.0], [1.5, 9.0], 4096, long_attention_factor(32.0, 4096))
        >>> position = RotaryPositionalEncoding(rotary_dim=4, scaling=scaling)
    """

    short_factors: tuple[float, ...] = eqx.field(static=True)
    long_factors: tuple[float, ...] = eqx.field(static=True)
    original_length: int = eqx.field(static=True)
    attention_factor: float = eqx.field(static=True)

    def __init__(
        self,
        short_factors: list[float] | tuple[float, ...],
        long_factors: list[float] | tuple[float, ...],
        original_length: int,
        attention_factor: float,
    ):
        for name, factors in {"short_factors": short_factors, "long_factors": long_factors}.items():
            if not isinstance(factors, list | tuple):
                raise ValueError(f"{name} must be a list of numbers, got {factors!r}.")
            check_positive(**{f"{name}[{i}]": x for i, x in enumerate(factors)})
        check_positive(attention_factor=attention_factor)
        self.short_factors = tuple(float(x) for x in short_factors)
        self.long_factors = tuple(float(x) for x in long_factors)
        self.original_length = check_original_length(original_length)
        self.attention_factor = float(attention_factor)

    def same_until(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Returns the longest rows that have the frequencies of rows of these lengths."""
        is_long = lengths > self.original_length
        return jnp.where(is_long, jnp.iinfo(jnp.int32).max, self.original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        plain = rotary_frequencies(theta, dim)
        sizes = len(self.short_factors), len(self.long_factors)
        if sizes != (plain.size, plain.size):
            raise ValueError(
                f"short_factors and long_factors must have a number for each of the {plain.size} "
                f"pairs of features that rotate, got {sizes[0]} and {sizes[1]}."
            )
        short, long = (
            (plain / factors).astype(np.float32)
            for factors in (self.short_factors, self.long_factors)
        )
        is_long = _lengths(positions) > self.original_length
        return jnp.where(is_long[..., None], long, short), self.attention_factor


def long_attention_factor(factor: float, original_length: int) -> float:
    """Returns `sqrt(1 + ln(factor) / ln(original_length))`, for sequences `factor` times as long.

    Attention spreads over more keys in longer sequences. This factor sharpens it (code of Phi-3).

    Raises:
        ValueError: if the factor is below 1 or the length is below 2.

    Example:
        >>> round(long_attention_factor(32.0, 4096), 4)
        1.1902
    """
    check_factor(factor)
    check_size(original_length=original_length)
    if original_length < 2:
        raise ValueError(f"original_length must be at least 2, got {original_length}.")
    return math.sqrt(1 + math.log(factor) / math.log(original_length))


def _lengths(positions: Int[Array, "*b t"]) -> Int[Array, "*b"]:
    return positions.max(-1) + 1
