"""Regular expressions as trees over sets of characters.

They are what patterns, choices and schemas are translated to, and what automata are made from.
Characters are code points, and sets of them are sorted disjoint ranges with both ends included.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple, Union

Ranges = tuple[tuple[int, int], ...]

LAST = 0x10FFFF
# Halves of pairs in UTF-16, which are no characters and which UTF-8 cannot write.
SURROGATES = (0xD800, 0xDFFF)


class Chars(NamedTuple):
    """One character of a set; of an empty set there is no text."""

    ranges: Ranges


class Sequence(NamedTuple):
    """One part after the other; of no parts the empty text."""

    parts: tuple["Expression", ...]


class Alternatives(NamedTuple):
    """One of several expressions."""

    options: tuple["Expression", ...]


class Repeat(NamedTuple):
    """An expression `least` to `most` times in a row; None is without limit."""

    body: "Expression"
    least: int
    most: int | None


Expression = Union[Chars, Sequence, Alternatives, Repeat]  # noqa: UP007 - it refers to itself

EMPTY = Sequence(())
NOTHING = Chars(())


def normalize(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Returns ranges sorted, and joined where they touch.

    Example:
        >>> normalize([(5, 7), (1, 2), (3, 3)])
        ((1, 3), (5, 7))
    """
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Returns all other characters.

    Example:
        >>> complement([(0, 96), (98, 0x10FFFF)])
        ((97, 97),)
    """
    found, low = [], 0
    for first, last in normalize([*ranges, SURROGATES]):
        if first > low:
            found.append((low, first - 1))
        low = last + 1
    return tuple(found) if low > LAST else (*found, (low, LAST))


def intersect(one: Ranges, other: Ranges) -> Ranges:
    """Returns the characters that are in both sets.

    Example:
        >>> intersect(((1, 5), (8, 9)), ((4, 8),))
        ((4, 5), (8, 8))
    """
    pairs = ((max(a, c), min(b, d)) for (a, b), (c, d) in itertools.product(one, other))
    return normalize((low, high) for low, high in pairs if low <= high)


def one_of(characters: str) -> Chars:
    """Returns any one of some characters.

    Example:
        >>> one_of("ab")
        Chars(ranges=((97, 98),))
    """
    return Chars(normalize((ord(x), ord(x)) for x in characters))


def text(characters: str) -> Expression:
    """Returns the expression of one text."""
    return Sequence(tuple(one_of(x) for x in characters))


def sequence(*parts: Expression | str) -> Expression:
    """Returns the parts one after the other; strings are texts."""
    return Sequence(tuple(text(x) if isinstance(x, str) else x for x in parts))


def alternatives(options: Iterable[Expression | str]) -> Expression:
    """Returns one of several expressions; strings are texts."""
    made = tuple(text(x) if isinstance(x, str) else x for x in options)
    return made[0] if len(made) == 1 else Alternatives(made)


def optional(*parts: Expression | str) -> Expression:
    """Returns the parts one after the other, or nothing of them."""
    return Repeat(sequence(*parts), 0, 1)
