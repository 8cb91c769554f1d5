"""Position schemes: what a token's place in the sequence does to the computation.

A position is an integer: 0 for the first real token of a sequence, -1 for padding. Everything
here is a function of positions, so left padding, right padding and packed documents need no code
of their own. A scheme acts at one of three places, and says so by the method it has:

- `embed(positions)` gives vectors that are added to the token embeddings (sinusoids, a table);
- `rotate(x, positions)` turns queries and keys inside attention (rotary);
- `bias(q_positions, k_positions, num_heads, causal)` is added to the attention scores (ALiBi, T5).
"""

from typing import Any, Protocol, TypeGuard, runtime_checkable

from jaxtyping import Array, Float, Int


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
