"""The three kinds of position schemes.

A position is an integer: 0 for the first real token of a sequence, -1 for padding. All schemes are
functions of positions, so left padding, right padding and packed documents need no code of their
own. The method of a scheme determines where it acts:

- `embed(positions)` returns vectors that are added to the token embeddings (sinusoids, a table);
- `rotate(x, positions)` rotates queries and keys inside attention (rotary);
- `bias(q_positions, k_positions, num_heads, causal)` returns a bias that is added to the attention
  scores (ALiBi, T5).
"""

from typing import Any, Protocol, TypeGuard, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class AbsolutePosition(Protocol):
    """A scheme whose vectors are added to the token embeddings, for `max_seq_length` positions."""

    @property
    def max_seq_length(self) -> int: ...

    def embed(self, positions: Int[Array, "*b t"]) -> Float[Array, "*b t d"]: ...


@runtime_checkable
class RotatingPosition(Protocol):
    """A scheme that rotates queries and keys by angles that depend on their positions."""

    def rotate(
        self, x: Float[Array, "*b n t h"], positions: Int[Array, "*#b t"]
    ) -> Float[Array, "*b n t h"]: ...


@runtime_checkable
class BiasPosition(Protocol):
    """A scheme that adds a bias to each attention score."""

    def bias(
        self,
        q_positions: Int[Array, "*b t"],
        k_positions: Int[Array, "*b s"],
        num_heads: int,
        causal: bool = False,
    ) -> Float[Array, "*b n t s"]: ...


PositionScheme = AbsolutePosition | RotatingPosition | BiasPosition


def acts_as(position: object, scheme: Any) -> TypeGuard[Any]:
    """Returns whether `position` is a scheme of this kind. A class is none, only its instance."""
    return isinstance(position, scheme) and not isinstance(position, type)
