"""Positions that are added to the token embeddings: sinusoids, and a learned table."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.checks import check_flag, check_key, check_seq_length, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.weights import Weight, lookup


def sinusoid(
    positions: Int[Array, "*b t"], d_model: int, interleaved: bool = True, inclusive: bool = False
) -> Float[Array, "*b t {d_model}"]:
    """Returns sinusoids in float32, of shape `(*b, t, d_model)`, for integer positions `(*b, t)`.

    `PE(p, 2i) = sin(p / 10000^(2i/d))`, `PE(p, 2i+1) = cos(p / 10000^(2i/d))`
    (Vaswani et al. 2017, section 3.5). If `interleaved` is False, all sines come before all
    cosines. If `inclusive` is True, the last exponent `2i/d` is 1.
    """
    exponents = np.arange(0, d_model, 2) / d_model
    exponents = exponents / exponents.max() if inclusive else exponents
    frequencies = 10000.0**-exponents
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1 if interleaved else -2)
    return both.reshape(*positions.shape, -1)[..., :d_model]


def positional_encoding(seq_length: int, d_model: int) -> Float[Array, "t d"]:
    """Returns the sinusoidal encoding of positions `0 .. seq_length - 1`, `(seq_length, d_model)`.

    Raises:
        ValueError: if a size is not a positive integer.

    Example:
        >>> positional_encoding(50, 64).shape
        (50, 64)
    """
    check_size(seq_length=seq_length, d_model=d_model)
    return sinusoid(jnp.arange(seq_length), d_model)


class SinusoidalPositionalEncoding(eqx.Module):
    """Fixed sines and cosines that are added to the token embeddings (Vaswani et al. 2017, 3.5).

    The values are computed from the positions and never stored: a stored table would be trained.

    Arguments:
        max_seq_length: the longest sequence of the model. A longer one raises an error.
        d_model: the width of the encoding.
        interleaved: True, the default, puts each sine beside its cosine as the paper does. False
            puts all sines before all cosines, as Marian and Pegasus do.
        inclusive: whether the longest wavelength is exactly `10000 * 2 pi`, as in the original
            Transformer's code (M2M-100); then `d_model` is even and at least 4. If False, the
            default, the longest wavelength is slightly shorter.
        offset: the number of position 0, at least 0; default 0. M2M-100 counts from another one.

    Raises:
        ValueError: if an argument is out of its range.
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
        """Returns the vectors of the given positions. Padding has the vector of position 0."""
        numbers = jnp.maximum(positions, 0) + self.offset
        return sinusoid(numbers, self.d_model, self.interleaved, self.inclusive)

    def __call__(self, seq_length: int) -> Float[Array, "t d"]:
        """Returns the encoding of positions `0 .. seq_length - 1`."""
        return self.embed(_first_positions(seq_length, self.max_seq_length))


class LearnablePositionalEncoding(eqx.Module):
    """A table with a trained vector per position, added to the token embeddings (BERT, GPT-2).

    Arguments:
        max_seq_length: the number of positions. A longer sequence raises an error.
        d_model: the width of a row.
        offset: the number of rows before the row of position 0, default 0. Some checkpoints have
            such rows: BART and OPT have 2, RoBERTa has its padding id + 1.
        init: the initializer of the table, Xavier-uniform by default.
        key: PRNG key, required.

    Raises:
        ValueError: if an argument is out of its range, or there is no key.

    Example:
        >>> LearnablePositionalEncoding(512, 64, key=jax.random.key(0))(10).shape
        (10, 64)
    """

    weight: Float[Weight, "p d"]
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
        """Returns the rows of the given positions.

        Padding has the row of position 0. A position beyond the table has NaN.
        """
        rows = jnp.maximum(positions, 0) + self.offset
        return lookup(self.weight, rows)

    def __call__(self, seq_length: int) -> Float[Array, "t d"]:
        """Returns the rows of positions `0 .. seq_length - 1`."""
        return self.embed(_first_positions(seq_length, self.max_seq_length))


def _check_offset(offset: int) -> int:
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer) or offset < 0:
        raise ValueError(f"offset must be an integer of at least 0, got {offset!r}.")
    return int(offset)


def _first_positions(seq_length: int, max_seq_length: int) -> Int[Array, " t"]:
    check_size(seq_length=seq_length)
    check_seq_length(seq_length, max_seq_length)
    return jnp.arange(seq_length)
