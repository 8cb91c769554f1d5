"""Rotary positions: queries and keys are rotated by angles that grow with the position."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxformers.checks import check_flag, check_positive, check_size
from jaxformers.positions.scaling import Frequencies, RotaryScaling, rotary_frequencies
from jaxformers.positions.scheme import acts_as


class RotaryPositionalEncoding(eqx.Module):
    """Rotary positions: queries and keys are rotated by angles that grow with the position.

    The product of a query and a key then depends on their distance alone (Su et al. 2021,
    RoFormer). The angles are computed in float32 for activations of any type, because bfloat16
    cannot tell 257 from 256. The length of a sequence is not limited.

    Arguments:
        theta: the base of the geometric series of wavelengths, 10000 in the paper.
        rotary_dim: how many of the `head_dim` features are rotated, an even number; None, the
            default, rotates all of them.
        interleaved: True pairs neighboring features as the paper (and GPT-J) does. False, the
            default, pairs feature i with feature i + rotary_dim / 2 as Llama and GPT-NeoX do.
        scaling: a module that changes the frequencies for longer sequences, such as
            `YarnScaling(4.0, 32768)`; None, the default, leaves them as they are.

    Raises:
        ValueError: if an argument is out of its range.

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
        """Returns `x` (queries or keys per head), rotated by the angles of `positions`."""
        dim = self._dim(x.shape[-1])
        cos, sin = self._cos_sin(x.shape[-1], positions)
        rotating, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
        # A pair of features is a point in the plane. The two features of a pair lie along the last
        # axis if they are interleaved, otherwise along the axis before it.
        pairs = (dim // 2, 2) if self.interleaved else (2, dim // 2)
        axis = -1 if self.interleaved else -2
        points = rotating.reshape(*x.shape[:-1], *pairs)
        a, b = (lax.index_in_dim(points, i, axis, keepdims=False) for i in (0, 1))
        rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis)
        rotated = rotated.reshape(*x.shape[:-1], dim).astype(x.dtype)
        return jnp.concatenate([rotated, rest], axis=-1)

    def frequencies(self, head_dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        """Returns the angle per position of each pair, with the scaling, and its factor."""
        dim = self._dim(head_dim)
        if self.scaling is None:
            return rotary_frequencies(self.theta, dim), 1.0
        return self.scaling.frequencies(self.theta, dim, positions)

    def _dim(self, head_dim: int) -> int:
        """Returns how many features of a head are rotated."""
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        _check_even(dim)
        if dim > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim {head_dim}, got {dim}.")
        return dim

    def _cos_sin(self, head_dim: int, positions: Int[Array, "*b t"]) -> tuple[Array, Array]:
        """Returns cosine and sine of the angle of each pair, `(*b, 1, t, dim / 2)`."""
        frequencies, factor = self.frequencies(head_dim, positions)
        per_row = frequencies.astype(np.float32)[..., None, None, :]
        angles = positions[..., None, :, None].astype(jnp.float32) * per_row
        # The remainder is the number itself, which is at most 1. XLA takes a remainder for costly,
        # so it computes each one once, and not anew for each head and layer, as with a cosine.
        cos, sin = (lax.rem(f(angles), jnp.float32(2)) for f in (jnp.cos, jnp.sin))
        return factor * cos, factor * sin


def _check_even(rotary_dim: int) -> None:
    check_size(rotary_dim=rotary_dim)
    if rotary_dim % 2:
        raise ValueError(
            f"rotary positions rotate pairs of features, so their number must be even, got "
            f"{rotary_dim}. Pass rotary_dim= (even, at most head_dim)."
        )
