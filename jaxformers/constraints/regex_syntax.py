"""Patterns in the syntax of Python's `re`, as expressions.

Python's own parser reads them. What no finite automaton can do, or what a text that has to match
as a whole cannot use, is refused by name.
"""

import functools
import re
import sys
import warnings
from collections.abc import Callable
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from jaxformers.constraints.expressions import (
    EMPTY,
    Alternatives,
    Chars,
    Expression,
    Ranges,
    Repeat,
    Sequence,
    complement,
    normalize,
)

REFUSED = {
    _constants.ASSERT: "look-ahead or look-behind, (?=...) or (?<=...)",
    _constants.ASSERT_NOT: "negative look-ahead or look-behind, (?!...) or (?<!...)",
    _constants.GROUPREF: "a reference to a group, such as \\1",
    _constants.GROUPREF_EXISTS: "a condition on a group, (?(1)...)",
    _constants.ATOMIC_GROUP: "an atomic group, (?>...)",
    _constants.POSSESSIVE_REPEAT: "a possessive quantifier, such as *+",
}
STARTS = _constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING
ENDS = _constants.AT_END, _constants.AT_END_STRING
LETTERS = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}


class Dialect(NamedTuple):
    """The meaning of the letters of a pattern: the characters of `.` and of such as `\\d`."""

    any_character: Ranges
    category: Callable[[str, bool, bool], Ranges]  # name, whether negated, whether in ASCII alone


@functools.cache
def characters_of(escape: str) -> Ranges:
    """Returns the characters of `\\d`, `\\s` or `\\w` in Python's `re`."""
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    return normalize((x.start(), x.end() - 1) for x in re.finditer(f"{escape}+", everything))


def python_category(name: str, negated: bool, ascii_only: bool) -> Ranges:
    """Returns the characters of a class such as `\\d` as Python's `re` means it."""
    ranges = characters_of(LETTERS[name])
    if ascii_only:
        ranges = tuple((low, min(high, 127)) for low, high in ranges if low < 128)
    return complement(ranges) if negated else ranges


PYTHON = Dialect(complement([(10, 10)]), python_category)


def parse(pattern: str, dialect: Dialect = PYTHON, flags: int = 0) -> Expression:
    """Returns the expression of a pattern that has to match a text as a whole.

    Raises:
        ValueError: if it is no pattern, or has what no automaton can do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of "[[", which is taken as it is
            tree = _parser.parse(pattern, flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"the pattern must be a regular expression in the syntax of Python's re, got "
            f"{pattern!r:.200}: {error}."
        ) from None
    try:
        return _Reader(pattern, dialect, tree.state.flags).read(tree, True, True)
    except RecursionError:
        raise ValueError(f"the pattern {pattern!r:.80} has too many groups in groups.") from None


class _Reader:
    """Translates the tree of one pattern."""

    def __init__(self, pattern: str, dialect: Dialect, flags: int):
        self.pattern, self.dialect, self.flags = pattern, dialect, flags
        if flags & re.MULTILINE:
            raise self.refuse("the flag (?m), with which ^ and $ are about lines")

    def refuse(self, what: str) -> ValueError:
        return ValueError(
            f"the pattern {self.pattern!r:.200} has {what}, which a constraint cannot follow. "
            "Write what may come with classes, groups, | and quantifiers."
        )

    def read(self, nodes: Any, starts: bool, ends: bool, flags: int | None = None) -> Expression:
        """Returns the expression of nodes in a row.

        Arguments:
            nodes: as Python's parser gives them.
            starts, ends: whether the row is at the beginning and at the end of the text.
            flags: of the group that they are in; None is those of the pattern.
        """
        flags = self.flags if flags is None else flags
        nodes = list(nodes)
        widths = [_widest(node) for node in nodes]
        parts = [
            self.one(
                operator,
                value,
                starts and not any(widths[:i]),
                ends and not any(widths[i + 1 :]),
                flags,
            )
            for i, (operator, value) in enumerate(nodes)
        ]
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def one(self, operator: Any, value: Any, starts: bool, ends: bool, flags: int) -> Expression:
        if operator in (_constants.LITERAL, _constants.NOT_LITERAL):
            ranges = self.fold(((value, value),), flags)
            return Chars(complement(ranges) if operator is _constants.NOT_LITERAL else ranges)
        if operator is _constants.ANY:
            return Chars(complement(()) if flags & re.DOTALL else self.dialect.any_character)
        if operator is _constants.IN:
            return Chars(self.members(value, flags))
        if operator is _constants.BRANCH:
            return Alternatives(tuple(self.read(x, starts, ends, flags) for x in value[1]))
        if operator is _constants.SUBPATTERN:
            _, added, removed, inner = value
            if added & re.MULTILINE:
                raise self.refuse("the flag (?m), with which ^ and $ are about lines")
            return self.read(inner, starts, ends, (flags | added) & ~removed)
        if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            least, most, inner = value
            return self.repeat(least, most, inner, starts, ends, flags)
        if operator is _constants.AT:
            return self.anchor(value, starts, ends)
        raise self.refuse(REFUSED.get(operator, f"{operator}"))

    def repeat(
        self, least: int, most: Any, inner: Any, starts: bool, ends: bool, flags: int
    ) -> Expression:
        """Returns a repeated expression, whose anchors can hold in one round alone."""
        once = most == 1 or not _widest((_constants.SUBPATTERN, (None, 0, 0, inner)))
        body = self.read(inner, starts and once, ends and once, flags)
        return Repeat(body, least, None if most is _constants.MAXREPEAT else int(most))

    def anchor(self, value: Any, starts: bool, ends: bool) -> Expression:
        """Returns nothing for ^ and $ where they always hold."""
        if (value in STARTS and starts) or (value in ENDS and ends):
            return EMPTY
        if value in STARTS or value in ENDS:
            raise self.refuse("^ after or $ before other text")
        raise self.refuse("the border of a word, \\b or \\B")

    def members(self, items: list[Any], flags: int) -> Ranges:
        """Returns the characters of a class in brackets."""
        negated = False
        ranges: list[tuple[int, int]] = []
        for operator, value in items:
            if operator is _constants.NEGATE:
                negated = True
            elif operator is _constants.LITERAL:
                ranges.extend(self.fold(((value, value),), flags))
            elif operator is _constants.RANGE:
                ranges.extend(self.fold((value,), flags))
            elif operator is _constants.CATEGORY:
                _, name = str(value).split("_", 1)
                is_negated = name.startswith("NOT_")
                ascii_only = bool(flags & re.ASCII) and not negated
                ranges.extend(
                    self.dialect.category(name.removeprefix("NOT_"), is_negated, ascii_only)
                )
            else:
                raise self.refuse(f"{operator}")
        return complement(ranges) if negated else complement(complement(ranges))

    def fold(self, ranges: Ranges, flags: int) -> Ranges:
        """Returns the characters and, with the flag (?i), those of the other case."""
        surrogate = any(low <= 0xDFFF and high >= 0xD800 for low, high in ranges)
        if not flags & re.IGNORECASE:
            return complement(complement(ranges)) if surrogate else ranges
        if not flags & re.ASCII and any(high > 127 for _, high in ranges):
            raise self.refuse("letters beyond ASCII with the flag (?i)")
        both = set(ranges)
        for low, high in ranges:
            for shift, first, last in ((32, 65, 90), (-32, 97, 122)):
                start, end = max(low, first), min(high, last)
                if start <= end:
                    both.add((start + shift, end + shift))
        if not flags & re.ASCII:  # the long s and the sign of Kelvin are s and k to Python
            for letter, sign in ((115, 0x17F), (107, 0x212A)):
                if any(low <= letter <= high for low, high in both):
                    both.add((sign, sign))
        return normalize(both)


def _widest(node: Any) -> int:
    """Returns the length of the longest text of a node."""
    operator, value = node
    if operator is _constants.AT:
        return 0
    state = _parser.State()
    try:
        return int(_parser.SubPattern(state, [node]).getwidth()[1])
    except (KeyError, AttributeError, IndexError):  # a group that is not closed yet
        return 1
