"""Scalings of rotary positions: how a model reads sequences longer than it was trained on.

Each gives the angle by which every pair of features turns from one position to the next, and a
factor on what is turned. They hold no arrays and can be compared.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformers.checks import check_flag, check_positive, check_size

# Angles per position, the same for all tokens or `(b, r)`, and the factor.
Turning = tuple[np.ndarray | Float[Array, "*b r"], float]


@runtime_checkable
class RotaryScaling(Protocol):
    """What `RotaryPositionalEncoding(scaling=)` takes."""

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Turning: ...


def rotary_frequencies(theta: float, dim: int) -> np.ndarray:
    """`theta^(-2i/dim)` for each of the `dim / 2` pairs (Su et al. 2021, section 3.2.2)."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def _lengths(positions: Int[Array, "*b t"]) -> Float[Array, "*b 1"]:
    """How long each row is so far: rows never depend on each other."""
    longest = jnp.max(positions, axis=-1).astype(jnp.float32) + 1.0
    return longest[..., None]


class LinearScaling(eqx.Module):
    """Positions divided by a factor (Chen et al. 2023, Position Interpolation).

    Arguments:
        factor: how many times longer sequences may be, above 0.
    """

    factor: float = eqx.field(static=True)

    def __init__(self, factor: float):
        check_positive(factor=factor)
        self.factor = float(factor)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Turning:
        return rotary_frequencies(theta, dim) / self.factor, 1.0


class DynamicScaling(eqx.Module):
    """A base that grows once a sequence is longer than the original length.

    Rows are looked at one by one. While decoding, keys in the cache keep the angles they got.

    Arguments:
        factor: growth of the base, above 0.
        original_length: up to here nothing changes.
    """

    factor: float = eqx.field(static=True)
    original_length: int = eqx.field(static=True)

    def __init__(self, factor: float, original_length: int):
        check_positive(factor=factor)
        check_size(original_length=original_length)
        self.factor, self.original_length = float(factor), int(original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Turning:
        share = jnp.maximum(_lengths(positions) / self.original_length, 1.0)
        growth = self.factor * share - (self.factor - 1.0)
        # theta grows by growth^(dim / (dim - 2)); with a single pair there is nothing to grow.
        exponents = np.arange(0, dim, 2) / max(dim - 2, 1)
        return rotary_frequencies(theta, dim).astype(np.float32) * growth ** -exponents.astype(
            np.float32
        ), 1.0


class Llama3Scaling(eqx.Module):
    """Slow turns divided by a factor, fast ones kept, and a blend between (Llama 3.1).

    Arguments:
        factor: how many times longer sequences may be, above 0.
        low_frequency_factor: wavelengths above `original_length` over this are divided.
        high_frequency_factor: wavelengths below `original_length` over this are kept.
        original_length: the length trained on.
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
            factor=factor,
            low_frequency_factor=low_frequency_factor,
            high_frequency_factor=high_frequency_factor,
        )
        check_size(original_length=original_length)
        if high_frequency_factor <= low_frequency_factor:
            raise ValueError(
                "high_frequency_factor must be above low_frequency_factor, got "
                f"{high_frequency_factor} and {low_frequency_factor}."
            )
        self.factor = float(factor)
        self.low_frequency_factor = float(low_frequency_factor)
        self.high_frequency_factor = float(high_frequency_factor)
        self.original_length = int(original_length)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Turning:
        plain = rotary_frequencies(theta, dim)
        turns = self.original_length * plain / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        kept = np.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return kept * plain + (1.0 - kept) * plain / self.factor, 1.0


class YarnScaling(eqx.Module):
    """Slow turns divided by a factor, fast ones kept, blended along the pairs (Peng et al. 2023).

    Arguments:
        factor: how many times longer sequences may be, above 0.
        original_length: the length trained on.
        beta_fast: pairs that turn more often than this over that length are kept.
        beta_slow: pairs that turn less often are divided.
        attention_factor: on queries and keys; None is the paper's `0.1 ln(factor) + 1`.
        truncate: whether the ends of the blend are rounded outward to whole pairs.
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
        if attention_factor is None:
            check_positive(factor=factor)
            attention_factor = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
        check_positive(
            factor=factor,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            attention_factor=attention_factor,
        )
        check_size(original_length=original_length)
        check_flag(truncate=truncate)
        self.factor, self.original_length = float(factor), int(original_length)
        self.beta_fast, self.beta_slow = float(beta_fast), float(beta_slow)
        self.attention_factor, self.truncate = float(attention_factor), truncate

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Turning:
        def pair(turns: float) -> float:
            """The pair that turns so often over the original length."""
            length = self.original_length / (turns * 2 * math.pi)
            return dim * math.log(length) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        plain = rotary_frequencies(theta, dim)
        return plain * (1.0 - divided) + plain / self.factor * divided, self.attention_factor


class LongScaling(eqx.Module):
    """A factor found by search for each pair, one set for short sequences and one for long ones.

    Ding et al. 2024, LongRoPE. Rows are looked at one by one. While decoding, keys in the cache
    keep the angles they got.

    Arguments:
        short_factors: a divisor for each pair, in sequences up to `original_length`.
        long_factors: the same for longer ones.
        original_length: the length trained on.
        attention_factor: on queries and keys, 1.
    """

    short_factors: tuple[float, ...] = eqx.field(static=True)
    long_factors: tuple[float, ...] = eqx.field(static=True)
    original_length: int = eqx.field(static=True)
    attention_factor: float = eqx.field(static=True)

    def __init__(
        self,
        short_factors: Sequence[float],
        long_factors: Sequence[float],
        original_length: int,
        attention_factor: float = 1.0,
    ):
        for name, factors in {"short_factors": short_factors, "long_factors": long_factors}.items():
            for factor in factors:
                check_positive(**{name: factor})
        check_size(original_length=original_length)
        check_positive(attention_factor=attention_factor)
        self.short_factors = tuple(map(float, short_factors))
        self.long_factors = tuple(map(float, long_factors))
        self.original_length = int(original_length)
        self.attention_factor = float(attention_factor)

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Turning:
        plain = rotary_frequencies(theta, dim)
        choices: list[Any] = []
        for factors in (self.short_factors, self.long_factors):
            if len(factors) != dim // 2:
                raise ValueError(
                    f"a scaling of {dim} rotary features needs {dim // 2} factors, got "
                    f"{len(factors)}."
                )
            choices.append((plain / np.asarray(factors)).astype(np.float32))
        is_long = _lengths(positions) > self.original_length
        return jnp.where(is_long, choices[1], choices[0]), self.attention_factor
