"""How rotary positions are stretched to sequences longer than those a model was first trained on.

A scaling is passed to `RotaryPositionalEncoding(scaling=...)`. It has one method, `frequencies`,
which gives the angle per position of each pair of features, and a factor on the rotated features.
All of them slow the pairs that turn slowly, which would come to angles never seen in training,
and differ in what they do to the others.
"""

import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformers.checks import check_flag, check_nonnegative, check_positive, check_size

# Radians per position of each pair of features, and a factor on queries and keys.
Frequencies = tuple[Float[Array | np.ndarray, "*#b f"], float]


@runtime_checkable
class RotaryScaling(Protocol):
    """A rule for the frequencies of rotary positions."""

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        """The frequencies of the `dim / 2` pairs, for all rows alike or by the positions in each.

        The factor multiplies queries and keys, so the scores by its square.
        """
        ...


def rotary_frequencies(theta: float, dim: int) -> Float[np.ndarray, " f"]:
    """`theta^(-2i / dim)` for each pair of features i (Su et al. 2021, section 3.2.2)."""
    return theta ** (-np.arange(0, dim, 2) / dim)


class LinearScaling(eqx.Module):
    """All frequencies divided by a factor, as if positions were closer (Chen et al. 2023).

    Arguments:
        factor: how many times longer the sequences become, at least 1.

    Raises:
        ValueError: if the factor is below 1.

    Example:
        >>> position = RotaryPositionalEncoding(scaling=LinearScaling(8.0))
    """

    factor: float = eqx.field(static=True)

    def __init__(self, factor: float):
        self.factor = _check_factor(factor)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        return rotary_frequencies(theta, dim) / self.factor, 1.0


class ProportionalScaling(eqx.Module):
    """Only the fastest share of the pairs turns, the others keep still (Gemma 4).

    Unlike with `rotary_dim`, all features are paired and the series of frequencies is cut, not
    compressed.

    Arguments:
        share: the share of the pairs that turns, above 0 and at most 1.
        factor: divides the frequencies, at least 1.

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
            raise ValueError(f"share must be at most 1, got {share!r}. It is the share that turns.")
        self.share = float(share)
        self.factor = _check_factor(factor)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        turns = np.arange(dim // 2) < int(self.share * dim / 2)
        return np.where(turns, rotary_frequencies(theta, dim), 0.0) / self.factor, 1.0


class Llama3Scaling(eqx.Module):
    """Slow frequencies divided by a factor, fast ones kept, a blend between (Llama 3.1).

    Fast and slow are told by how often a pair turns over the original length, as in the code that
    Meta published with the model.

    Arguments:
        factor: divides the slow frequencies, at least 1.
        low_frequency_factor: pairs with fewer turns than this are slow.
        high_frequency_factor: pairs with more turns than this are fast; above the low one.
        original_length: the longest sequence before.

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
        self.factor = _check_factor(factor)
        self.low_frequency_factor = float(low_frequency_factor)
        self.high_frequency_factor = float(high_frequency_factor)
        self.original_length = _check_original(original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        frequencies = rotary_frequencies(theta, dim)
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        return _blend(frequencies, self.factor, (turns - low) / (high - low)), 1.0


class YarnScaling(eqx.Module):
    """Slow frequencies divided by a factor, fast ones kept, and larger scores (Peng et al. 2023).

    As `Llama3Scaling`, but the blend is linear in the index of the pair.

    Arguments:
        factor: divides the slow frequencies, at least 1.
        original_length: the longest sequence before.
        beta_fast: pairs that turn more often over the original length are kept, 32.
        beta_slow: pairs that turn less often are divided by the whole factor, 1.
        attention_factor: multiplies queries and keys; None is `yarn_attention_factor(factor)`.
        truncate: whether the blend begins and ends at whole pairs, True.

    Raises:
        ValueError: if a number is out of its range, or, when it is used, theta is not above 1.

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
        self.factor = _check_factor(factor)
        self.original_length = _check_original(original_length)
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
        # Where in the series of pairs a frequency makes that many turns over the original length.
        low, high = (
            dim * math.log(self.original_length / (2 * math.pi * turns), theta) / 2
            for turns in (self.beta_fast, self.beta_slow)
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
    """`0.1 ln(factor) + 1`, or the ratio of two such scales where a checkpoint gives both.

    Peng et al. 2023, section 3.4; the scales, `0.1 mscale ln(factor) + 1`, are DeepSeek's. One of
    them alone, or with 0 for the other, has no effect.

    Raises:
        ValueError: if the factor is below 1 or a scale below 0.

    Example:
        >>> round(yarn_attention_factor(8.0), 3)
        1.208
    """
    _check_factor(factor)
    check_nonnegative(mscale=mscale or 0.0, mscale_all_dim=mscale_all_dim or 0.0)
    above, below = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
    growth = 0.1 * math.log(factor)
    return (above * growth + 1) / (below * growth + 1)


class DynamicScaling(eqx.Module):
    """A larger theta as sequences grow beyond the original length ("NTK-aware", dynamic).

    The fastest pair keeps its frequency and the slowest is divided by about as much as the
    sequence is too long (Peng et al. 2023, section 3.3). The length is each row's largest position
    + 1, so that beyond the original length each token changes the angles of all before it.

    Decoding does as transformers does: a prompt is read at its own length, and the keys of a token
    stay in the cache as they were rotated when it came. So beyond the original length a token's
    log-probability from `generate` is not that of the model on the whole row, which `score` gives.

    Arguments:
        factor: how strongly theta grows, at least 1.
        original_length: up to this length nothing changes.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> position = RotaryPositionalEncoding(scaling=DynamicScaling(2.0, 2048))
    """

    factor: float = eqx.field(static=True)
    original_length: int = eqx.field(static=True)

    def __init__(self, factor: float, original_length: int):
        self.factor = _check_factor(factor)
        self.original_length = _check_original(original_length)

    def same_until(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """The longest rows that have the frequencies of rows of these lengths."""
        return jnp.maximum(lengths, self.original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        excess = jnp.maximum(_lengths(positions) - self.original_length, 0).astype(jnp.float32)
        growth = 1 + self.factor / self.original_length * excess[..., None]
        # theta * growth^(d / (d - 2)); with a single pair theta does not matter.
        powers = -np.arange(0, dim, 2) / max(dim - 2, 1)
        plain = rotary_frequencies(theta, dim).astype(np.float32)
        return plain * growth ** powers.astype(np.float32), 1.0


class LongScaling(eqx.Module):
    """A divisor for each frequency, found by search; others for long sequences (LongRoPE).

    Ding et al. 2024, in the form of Phi-3. As with `DynamicScaling` the length is each row's
    largest position + 1. With a cache, a row that becomes longer than the original length is read
    once again, as in transformers, so that every token comes from the angles that the model has for
    the tokens before it. That differs from `score`, which reads each token of a long row with the
    long divisors.

    Arguments:
        short_factors: divisors while the row is no longer than the original length, one for each
            of the `rotary_dim / 2` pairs.
        long_factors: divisors for longer rows.
        original_length: the longest sequence before.
        attention_factor: multiplies queries and keys, as `long_attention_factor` gives it.

    Raises:
        ValueError: if a number is out of its range, or, when it is used, a list has not one for
            each pair.

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
        self.original_length = _check_original(original_length)
        self.attention_factor = float(attention_factor)

    def same_until(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """The longest rows that have the frequencies of rows of these lengths."""
        is_long = lengths > self.original_length
        return jnp.where(is_long, jnp.iinfo(jnp.int32).max, self.original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        plain = rotary_frequencies(theta, dim)
        sizes = len(self.short_factors), len(self.long_factors)
        if sizes != (plain.size, plain.size):
            raise ValueError(
                f"short_factors and long_factors must have a number for each of the {plain.size} "
                f"pairs of features that turn, got {sizes[0]} and {sizes[1]}."
            )
        short, long = (
            (plain / factors).astype(np.float32)
            for factors in (self.short_factors, self.long_factors)
        )
        is_long = _lengths(positions) > self.original_length
        return jnp.where(is_long[..., None], long, short), self.attention_factor


def long_attention_factor(factor: float, original_length: int) -> float:
    """`sqrt(1 + ln(factor) / ln(original_length))`, for sequences `factor` times as long.

    Attention spreads over more keys as sequences grow; this sharpens it (the code of Phi-3).

    Raises:
        ValueError: if the factor is below 1 or the length below 2.

    Example:
        >>> round(long_attention_factor(32.0, 4096), 4)
        1.1902
    """
    _check_factor(factor)
    check_size(original_length=original_length)
    if original_length < 2:
        raise ValueError(f"original_length must be at least 2, got {original_length}.")
    return math.sqrt(1 + math.log(factor) / math.log(original_length))


def _blend(frequencies: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Frequencies kept by shares, cut to 0 and 1, and divided by `factor` for the rest."""
    kept = np.clip(kept, 0, 1)
    return frequencies * kept + frequencies / factor * (1 - kept)


def _lengths(positions: Int[Array, "*b t"]) -> Int[Array, "*b"]:
    return positions.max(-1) + 1


def _check_factor(factor: Any) -> float:
    check_positive(factor=factor)
    if factor < 1:
        raise ValueError(
            f"factor must be at least 1, got {factor!r}. It says how many times longer the "
            "sequences become."
        )
    return float(factor)


def _check_original(original_length: Any) -> int:
    check_size(original_length=original_length)
    return int(original_length)
