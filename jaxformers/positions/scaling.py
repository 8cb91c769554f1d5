"""Scalings of rotary positions, for sequences longer than those a model was first trained on.

A scaling is passed to `RotaryPositionalEncoding(scaling=...)`. Its method `frequencies` returns the
angle per position of each pair of features, and a factor for the rotated features. Without scaling,
the pairs that rotate slowly would reach angles that did not occur in training. Every scaling slows
these pairs. The scalings differ in how they change the other pairs.
"""

import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformers.checks import check_flag, check_nonnegative, check_positive, check_size

# Radians per position of each pair of features, and a factor for queries and keys.
Frequencies = tuple[Float[Array | np.ndarray, "*#b f"], float]


@runtime_checkable
class RotaryScaling(Protocol):
    """A rule for the frequencies of rotary positions."""

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        """Returns the frequencies of the `dim / 2` pairs, alike or for each row, and a factor.

        The factor multiplies queries and keys, so the scores are multiplied by its square.
        """
        ...


def rotary_frequencies(theta: float, dim: int) -> Float[np.ndarray, " f"]:
    """Returns `theta^(-2i / dim)` for each pair of features i (Su et al. 2021, section 3.2.2)."""
    return theta ** (-np.arange(0, dim, 2) / dim)


class LinearScaling(eqx.Module):
    """A scaling that divides all frequencies by a factor (Chen et al. 2023).

    Arguments:
        factor: how many times longer the sequences become, at least 1.

    Raises:
        ValueError: if the factor is below 1.

    Example:
        >>> position = RotaryPositionalEncoding(scaling=LinearScaling(8.0))
    """

    factor: float = eqx.field(static=True)

    def __init__(self, factor: float):
        self.factor = check_factor(factor)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        return rotary_frequencies(theta, dim) / self.factor, 1.0


class ProportionalScaling(eqx.Module):
    """A scaling that rotates only the fastest share of the pairs (Gemma 4).

    The other pairs are not rotated. Unlike with `rotary_dim`, all features are paired, and the
    frequencies that are kept have their usual values.

    Arguments:
        share: the share of the pairs that is rotated, above 0 and at most 1.
        factor: divides the frequencies, at least 1; default 1.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> position = RotaryPositionalEncoding(theta=1e6, scaling=ProportionalScaling(0.25))
    """

    share: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)

    def __init__(self, share: float, factor: float = 1.0):
        check_positive(share=share)
        if share > 1:
            raise ValueError(
                f"share must be at most 1, got {share!r}. It is the share of the rotated pairs."
            )
        self.share = float(share)
        self.factor = check_factor(factor)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        rotates = np.arange(dim // 2) < int(self.share * dim / 2)
        return np.where(rotates, rotary_frequencies(theta, dim), 0.0) / self.factor, 1.0


class Llama3Scaling(eqx.Module):
    """A scaling that divides slow frequencies by a factor and keeps fast ones (Llama 3.1).

    The number of full rotations of a pair over the original length decides whether it is slow or
    fast, as in the code that Meta published with the model. Between both limits the result is
    interpolated.

    Arguments:
        factor: divides the slow frequencies, at least 1.
        low_frequency_factor: pairs with fewer rotations than this are slow.
        high_frequency_factor: pairs with more rotations than this are fast; above the low one.
        original_length: the longest sequence of the first training, in tokens.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> position = RotaryPositionalEncoding(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    """

    factor: float = eqx.field(static=True)
    low_frequency_factor: float = eqx.field(static=True)
    high_frequency_factor: float = eqx.field(static=True)
    original_length: int = eqx.field(static=True)

    def __init__(
        self,
        factor: float,
        low_frequency_factor: float,
        high_frequency_factor: float,
        original_length: int,
    ):
        check_positive(
            low_frequency_factor=low_frequency_factor, high_frequency_factor=high_frequency_factor
        )
        if high_frequency_factor <= low_frequency_factor:
            raise ValueError(
                "high_frequency_factor must be above low_frequency_factor, got "
                f"{high_frequency_factor!r} and {low_frequency_factor!r}."
            )
        self.factor = check_factor(factor)
        self.low_frequency_factor = float(low_frequency_factor)
        self.high_frequency_factor = float(high_frequency_factor)
        self.original_length = check_original_length(original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        frequencies = rotary_frequencies(theta, dim)
        rotations = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        return _blend(frequencies, self.factor, (rotations - low) / (high - low)), 1.0


class YarnScaling(eqx.Module):
    """A scaling that slows slow pairs, keeps fast ones and enlarges scores (Peng et al. 2023).

    It differs from `Llama3Scaling` in the interpolation, which is linear in the index of the pair.

    Arguments:
        factor: divides the slow frequencies, at least 1.
        original_length: the longest sequence of the first training, in tokens.
        beta_fast: pairs with more rotations over the original length keep their frequencies;
            default 32.
        beta_slow: the frequencies of pairs with fewer rotations are divided by the whole factor;
            default 1.
        attention_factor: multiplies queries and keys; None is `yarn_attention_factor(factor)`.
        truncate: whether the interpolation begins and ends at whole pairs, True by default.

    Raises:
        ValueError: if a number is out of its range. If theta is not above 1, the error comes at
            the first use.

    Example:
        >>> position = RotaryPositionalEncoding(1e6, scaling=YarnScaling(4.0, 32768))
    """

    factor: float = eqx.field(static=True)
    original_length: int = eqx.field(static=True)
    beta_fast: float = eqx.field(static=True)
    beta_slow: float = eqx.field(static=True)
    attention_factor: float = eqx.field(static=True)
    truncate: bool = eqx.field(static=True)

    def __init__(
        self,
        factor: float,
        original_length: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
    ):
        self.factor = check_factor(factor)
        self.original_length = check_original_length(original_length)
        check_positive(beta_fast=beta_fast, beta_slow=beta_slow)
        if beta_fast <= beta_slow:
            raise ValueError(
                f"beta_fast must be above beta_slow, got {beta_fast!r} and {beta_slow!r}."
            )
        if attention_factor is None:
            attention_factor = yarn_attention_factor(factor)
        check_positive(attention_factor=attention_factor)
        check_flag(truncate=truncate)
        self.beta_fast, self.beta_slow = float(beta_fast), float(beta_slow)
        self.attention_factor = float(attention_factor)
        self.truncate = bool(truncate)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        if theta <= 1:
            raise ValueError(f"YarnScaling needs a theta above 1, got {theta}.")
        # The index in the series of pairs at which a frequency makes that many rotations.
        low, high = (
            dim * math.log(self.original_length / (2 * math.pi * rotations), theta) / 2
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 1 if high == low else high  # a step, where there is no room for a ramp
        kept = 1 - (np.arange(dim // 2) - low) / (high - low)
        frequencies = rotary_frequencies(theta, dim)
        return _blend(frequencies, self.factor, kept), self.attention_factor


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Returns `0.1 ln(factor) + 1`, the factor for queries and keys (Peng et al. 2023, 3.4).

    A checkpoint in DeepSeek's form gives two scales. If both are given and not 0, the result is
    `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`. One scale alone has no
    effect.

    Raises:
        ValueError: if the factor is below 1 or a scale is below 0.

    Example:
        >>> round(yarn_attention_factor(8.0), 3)
        1.208
    """
    check_factor(factor)
    check_nonnegative(mscale=mscale or 0.0, mscale_all_dim=mscale_all_dim or 0.0)
    above, below = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
    growth = 0.1 * math.log(factor)
    return (above * growth + 1) / (below * growth + 1)


def _blend(frequencies: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Returns a blend: the frequency itself by the share `kept`, otherwise divided by `factor`."""
    kept = np.clip(kept, 0, 1)
    return frequencies * kept + frequencies / factor * (1 - kept)


def check_factor(factor: Any) -> float:
    """Checks that `factor` is a number of at least 1 and returns it."""
    check_positive(factor=factor)
    if factor < 1:
        raise ValueError(
            f"factor must be at least 1, got {factor!r}. It says how many times longer the "
            "sequences become."
        )
    return float(factor)


def check_original_length(original_length: Any) -> int:
    """Checks that `original_length` is a positive integer and returns it."""
    check_size(original_length=original_length)
    return int(original_length)
