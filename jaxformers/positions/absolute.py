"""Positions that are added to the token embeddings: sinusoids, and a learned table."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.checks import check_flag, check_key, check_seq_length, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import lookup


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


def _check_offset(offset: int) -> int:
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer) or offset < 0:
        raise ValueError(f"offset must be an integer of at least 0, got {offset!r}.")
    return int(offset)


def _first_positions(seq_length: int, max_seq_length: int) -> Int[Array, " t"]:
    check_size(seq_length=seq_length)
    check_seq_length(seq_length, max_seq_length)
    return jnp.arange(seq_length)
