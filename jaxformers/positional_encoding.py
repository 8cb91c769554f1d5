"""Position schemes: what a token's place in the sequence does to the computation.

A position is an integer: 0 for the first real token of a sequence, -1 for padding. Everything
here is a function of positions, so left padding, right padding and packed documents need no code
of their own. A scheme acts at one of three places, and says so by the method it has:

- `embed(positions)` gives vectors that are added to the token embeddings (sinusoids, a table);
- `rotate(x, positions)` turns queries and keys inside attention (rotary);
- `bias(q_positions, k_positions, num_heads, causal)` is added to the attention scores (ALiBi, T5).
"""

import math
from typing import Any, Protocol, TypeGuard, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.checks import check_flag, check_key, check_positive, check_seq_length, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import lookup
from jaxformers.rotary_scaling import RotaryScaling, rotary_frequencies


@runtime_checkable
class AbsolutePosition(Protocol):
    """A scheme that is added to the token embeddings; it knows `max_seq_length` positions."""

    @property
    def max_seq_length(self) -> int: ...

    def embed(self, positions: Int[Array, "*b t"]) -> Float[Array, "*b t d"]: ...


@runtime_checkable
class RotatingPosition(Protocol):
    """A scheme that turns queries and keys by an angle which depends on their position."""

    def rotate(
        self, x: Float[Array, "*b n t h"], positions: Int[Array, "*#b t"]
    ) -> Float[Array, "*b n t h"]: ...


@runtime_checkable
class BiasPosition(Protocol):
    """A scheme that adds a bias to each attention score, by whether keys ahead are hidden."""

    def bias(
        self,
        q_positions: Int[Array, "*b t"],
        k_positions: Int[Array, "*b s"],
        num_heads: int,
        causal: bool = False,
    ) -> Float[Array, "*b n t s"]: ...


PositionScheme = AbsolutePosition | RotatingPosition | BiasPosition


def acts_as(position: object, scheme: Any) -> TypeGuard[Any]:
    """Whether it is a scheme of this kind; a class has the methods too, but is none yet."""
    return isinstance(position, scheme) and not isinstance(position, type)


def sinusoid(
    positions: Int[Array, "*b t"], d_model: int, interleaved: bool = True, inclusive: bool = False
) -> Float[Array, "*b t {d_model}"]:
    """Sines in the even and cosines in the odd features, or all sines before all cosines; float32.

    `PE(p, 2i) = sin(p / 10000^(2i/d))`, `PE(p, 2i+1) = cos(p / 10000^(2i/d))`
    (Vaswani et al. 2017, section 3.5); if inclusive, the last `2i/d` is 1.
    """
    exponents = np.arange(0, d_model, 2) / d_model
    exponents = exponents / exponents.max() if inclusive else exponents
    frequencies = 10000.0**-exponents
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1 if interleaved else -2)
    return both.reshape(*positions.shape, -1)[..., :d_model]


def positional_encoding(seq_length: int, d_model: int) -> Float[Array, "t d"]:
    """The sinusoidal encoding of positions `0 .. seq_length - 1`, shape `(seq_length, d_model)`.

    Raises:
        ValueError: if a size is not a positive integer.

    Example:
        >>> positional_encoding(50, 64).shape
        (50, 64)
    """
    check_size(seq_length=seq_length, d_model=d_model)
    return sinusoid(jnp.arange(seq_length), d_model)


class SinusoidalPositionalEncoding(eqx.Module):
    """Fixed sines and cosines, added to the token embeddings (Vaswani et al. 2017, section 3.5).

    The values are computed from the positions, never stored: a stored table would be trained.

    Arguments:
        max_seq_length: the longest sequence the model is meant for; longer ones are refused.
        d_model: width of the encoding.
        interleaved: True, the default, puts each sine beside its cosine as the paper does; False
            puts all sines before all cosines, as Marian and Pegasus do.
        inclusive: whether the wavelengths reach `10000 * 2 pi` and do not end just below, as in
            the original Transformer's code (M2M-100); then `d_model` is even and at least 4.
        offset: the number that position 0 has, as some count from another (M2M-100).

    Example:
        >>> SinusoidalPositionalEncoding(512, 64)(10).shape
        (10, 64)
    """

    max_seq_length: int = eqx.field(static=True)
    d_model: int = eqx.field(static=True)
    interleaved: bool = eqx.field(static=True)
    inclusive: bool = eqx.field(static=True)
    offset: int = eqx.field(static=True)

    def __init__(
        self,
        max_seq_length: int,
        d_model: int,
        interleaved: bool = True,
        inclusive: bool = False,
        offset: int = 0,
    ):
        check_size(max_seq_length=max_seq_length, d_model=d_model)
        check_flag(interleaved=interleaved, inclusive=inclusive)
        if inclusive and (d_model < 4 or d_model % 2):
            raise ValueError(f"inclusive needs an even d_model of at least 4, got {d_model}.")
        self.interleaved = bool(interleaved)
        self.inclusive = bool(inclusive)
        self.offset = _check_offset(offset)
        self.max_seq_length = int(max_seq_length)
        self.d_model = int(d_model)

    def embed(self, positions: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """The vectors of the given positions (of padding: those of position 0)."""
        numbers = jnp.maximum(positions, 0) + self.offset
        return sinusoid(numbers, self.d_model, self.interleaved, self.inclusive)

    def __call__(self, seq_length: int) -> Float[Array, "t d"]:
        """The encoding of positions `0 .. seq_length - 1`."""
        return self.embed(_first_positions(seq_length, self.max_seq_length))


class LearnablePositionalEncoding(eqx.Module):
    """A trained vector per position, added to the token embeddings (BERT, GPT-2).

    Arguments:
        max_seq_length: number of positions; longer sequences are refused.
        d_model: width of a row.
        offset: rows of the table before that of position 0, as some checkpoints have them (BART
            and OPT 2, RoBERTa its padding id + 1); 0.
        init: how the table is drawn, Xavier-uniform unless told otherwise.
        key: PRNG key, required.

    Example:
        >>> LearnablePositionalEncoding(512, 64, key=jax.random.key(0))(10).shape
        (10, 64)
    """

    weight: Float[Array, "p d"]
    offset: int = eqx.field(static=True)

    def __init__(
        self,
        max_seq_length: int,
        d_model: int,
        *,
        offset: int = 0,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(max_seq_length=max_seq_length, d_model=d_model)
        self.offset = _check_offset(offset)
        rows = offset + max_seq_length
        self.weight = init(check_key(key), (rows, d_model), rows, d_model)

    @property
    def max_seq_length(self) -> int:
        return self.weight.shape[0] - self.offset

    def embed(self, positions: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """The rows of the given positions: of padding that of position 0, beyond the table NaN."""
        rows = jnp.maximum(positions, 0) + self.offset
        return lookup(self.weight, rows)

    def __call__(self, seq_length: int) -> Float[Array, "t d"]:
        """The rows of positions `0 .. seq_length - 1`."""
        return self.embed(_first_positions(seq_length, self.max_seq_length))


class RotaryPositionalEncoding(eqx.Module):
    """Rotary positions: queries and keys turn by an angle that grows with the position.

    Their product then depends on the distance alone (Su et al. 2021, RoFormer). Angles are
    computed in float32 whatever the activations' type: bfloat16 cannot tell 257 from 256.
    There is no longest sequence.

    Arguments:
        theta: base of the geometric series of wavelengths, 10000 in the paper.
        rotary_dim: how many of the `head_dim` features turn (even); None turns all of them.
        interleaved: True pairs neighbouring features as the paper (and GPT-J) does; False, the
            default, pairs feature i with feature i + rotary_dim / 2 as Llama and GPT-NeoX do.
        scaling: how the angles are stretched for longer sequences, a module of
            `jaxformers.rotary_scaling` such as `YarnScaling(4.0, 32768)`; None leaves them.

    Example:
        >>> model = TransformerLM(65, position=RotaryPositionalEncoding(theta=5e5), key=key)
    """

    theta: float = eqx.field(static=True)
    rotary_dim: int | None = eqx.field(static=True)
    interleaved: bool = eqx.field(static=True)
    scaling: RotaryScaling | None

    def __init__(
        self,
        theta: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: RotaryScaling | None = None,
    ):
        check_positive(theta=theta)
        if rotary_dim is not None:
            _check_even(rotary_dim)
        check_flag(interleaved=interleaved)
        if scaling is not None and not acts_as(scaling, RotaryScaling):
            raise ValueError(
                f"scaling must be a scaling of rotary frequencies, as LinearScaling(4.0), got "
                f"{scaling!r}."
            )
        self.theta = float(theta)
        self.rotary_dim = None if rotary_dim is None else int(rotary_dim)
        self.interleaved = bool(interleaved)
        self.scaling = scaling

    def rotate(
        self, x: Float[Array, "*b n t h"], positions: Int[Array, "*#b t"]
    ) -> Float[Array, "*b n t h"]:
        """`x` (queries or keys per head) turned according to `positions`."""
        head_dim = x.shape[-1]
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        _check_even(dim)
        if dim > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim {head_dim}, got {dim}.")
        cos, sin = self._turns(dim, positions)
        turning, still = x[..., :dim].astype(jnp.float32), x[..., dim:]
        # A pair of features is a point in the plane; pairs lie on the last axis or the one before.
        pairs = (dim // 2, 2) if self.interleaved else (2, dim // 2)
        axis = -1 if self.interleaved else -2
        points = turning.reshape(*x.shape[:-1], *pairs)
        a, b = (lax.index_in_dim(points, i, axis, keepdims=False) for i in (0, 1))
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis)
        turned = turned.reshape(*x.shape[:-1], dim).astype(x.dtype)
        return jnp.concatenate([turned, still], axis=-1)

    def _turns(self, dim: int, positions: Int[Array, "*b t"]) -> tuple[Array, Array]:
        """Cosine and sine of the angle of each pair, alike for all heads: `(*b, 1, t, dim / 2)`."""
        frequencies: Array | np.ndarray = rotary_frequencies(self.theta, dim)
        factor = 1.0
        if self.scaling is not None:
            frequencies, factor = self.scaling.frequencies(self.theta, dim, positions)
        per_row = frequencies.astype(np.float32)[..., None, None, :]
        angles = positions[..., None, :, None].astype(jnp.float32) * per_row
        return factor * jnp.cos(angles), factor * jnp.sin(angles)


class ALiBi(eqx.Module):
    """Attention with linear biases: a score falls with the distance, by a slope per head.

    Nothing is added to the embeddings and there is no longest sequence (Press et al. 2022).

    Example:
        >>> model = TransformerLM(65, position=ALiBi(), key=key)
    """

    def bias(
        self,
        q_positions: Int[Array, "*b t"],
        k_positions: Int[Array, "*b s"],
        num_heads: int,
        causal: bool = False,
    ) -> Float[Array, "*b n t s"]:
        """`-slope * |q - k|` for each head, whether or not keys ahead are hidden."""
        distance = jnp.abs(q_positions[..., :, None] - k_positions[..., None, :])
        slopes = jnp.asarray(alibi_slopes(num_heads))[:, None, None]
        return -slopes * distance[..., None, :, :].astype(jnp.float32)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes of ALiBi: `2^(-8i/n)` for a power of two, else completed from the next one.

    Follows the authors' rule: the slopes of the largest power of two below, then every other
    slope of twice that many heads. What BLOOM and MPT do comes to the same.
    """
    power = 2 ** int(np.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between])[:num_heads].astype(np.float32)


class T5PositionBias(eqx.Module):
    """A trained number per head and bucket of distances, added to the scores (Raffel et al. 2020).

    Small distances have a bucket each, larger ones share them, and all from `max_distance` on
    share the last. Where the mask is not causal, keys ahead and keys behind have half each.
    Nothing is added to the embeddings and there is no longest sequence.

    Arguments:
        num_heads: query heads of the attention.
        num_buckets: rows of the table, at least 4; 32.
        max_distance: where the last bucket begins, above `num_buckets / 2`; 128.
        init: how the table is drawn, Xavier-uniform unless told otherwise.
        key: PRNG key, required.

    Raises:
        ValueError: if a size does not fit, or there is no key.

    Example:
        >>> model = TransformerLM(65, position=lambda key: T5PositionBias(8, key=key), key=key)
    """

    weight: Float[Array, "p n"]
    max_distance: int = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(num_heads=num_heads, num_buckets=num_buckets, max_distance=max_distance)
        if num_buckets < 4:
            raise ValueError(f"num_buckets must be at least 4, got {num_buckets}.")
        if max_distance <= num_buckets // 2:
            raise ValueError(
                f"max_distance must be above num_buckets / 2, got {max_distance} and {num_buckets}."
            )
        self.weight = init(check_key(key), (num_buckets, num_heads), num_buckets, num_heads)
        self.max_distance = int(max_distance)

    @property
    def num_buckets(self) -> int:
        return self.weight.shape[0]

    @property
    def num_heads(self) -> int:
        return self.weight.shape[1]

    def bias(
        self,
        q_positions: Int[Array, "*b t"],
        k_positions: Int[Array, "*b s"],
        num_heads: int,
        causal: bool = False,
    ) -> Float[Array, "*b n t s"]:
        """The number of each head for the bucket of `k - q`, in float32."""
        if num_heads != self.num_heads:
            raise ValueError(
                f"this T5PositionBias is for {self.num_heads} heads, got {num_heads}. Build it "
                f"with num_heads={num_heads}."
            )
        far = self.max_distance
        buckets = t5_buckets(np.arange(-far, far + 1), self.num_buckets, far, causal)
        by_distance = self.weight.astype(jnp.float32)[buckets]
        ahead = jnp.clip(k_positions[..., None, :] - q_positions[..., :, None], -far, far)
        return jnp.moveaxis(by_distance[ahead + far], -1, -3)


def t5_buckets(
    ahead: Int[np.ndarray, " r"], num_buckets: int, max_distance: int, causal: bool
) -> Int[np.ndarray, " r"]:
    """The bucket of each distance `key - query`: half of them exact, then growing with the log."""
    distance = np.maximum(-ahead, 0) if causal else np.abs(ahead)
    n = num_buckets if causal else num_buckets // 2
    exact = n // 2
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    # A bucket that begins at a whole distance has that one, however the logarithm was rounded.
    shared = exact + (growth * (n - exact) + 1e-9).astype(int)
    bucket = np.where(distance < exact, distance, np.minimum(shared, n - 1))
    return bucket if causal else bucket + n * (ahead > 0)


def _check_offset(offset: int) -> int:
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer) or offset < 0:
        raise ValueError(f"offset must be an integer of at least 0, got {offset!r}.")
    return int(offset)


def _first_positions(seq_length: int, max_seq_length: int) -> Int[Array, " t"]:
    check_size(seq_length=seq_length)
    check_seq_length(seq_length, max_seq_length)
    return jnp.arange(seq_length)


def _check_even(rotary_dim: int) -> None:
    check_size(rotary_dim=rotary_dim)
    if rotary_dim % 2:
        raise ValueError(
            f"rotary positions turn pairs of features, so their number must be even, got "
            f"{rotary_dim}. Pass rotary_dim= (even, at most head_dim)."
        )
