"""The keyword `pattern` of JSON Schema: a text in which a pattern is found."""

import json
import math
import re
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from jaxformers.constraints.expressions import (
    NOTHING,
    Chars,
    Expression,
    Repeat,
    Sequence,
    complement,
)
from jaxformers.constraints.regex_syntax import Dialect, parse, python_category

# What a pattern means both to ECMA 262, which JSON Schema names, and to Python.
NEWLINES = (10, 10), (13, 13), (0x2028, 0x2029)


def _ecma_category(name: str, negated: bool, ascii_only: bool) -> Any:
    return python_category(name, negated, not negated)


ECMA = Dialect(complement(NEWLINES), _ecma_category)
ANY = Repeat(Chars(complement(())), 0, None)


def read_pattern(pattern: Any) -> Expression:
    """Returns the texts in which a pattern is found.

    Raises:
        ValueError: if it is none, or not of the part that ECMA 262 and Python have in common.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern must be a string, got {pattern!r:.80}.")
    strange = re.search(r"\\[pPckAZ]|\(\?[^:=!<]|\(\?<[^=!]|\\N|\\U|\[\]|\[\^\]", pattern)
    if strange:
        raise ValueError(f"the pattern {pattern!r:.80} has {strange[0]}, which is not enforced.")
    return parse_search(pattern)


def parse_search(pattern: str) -> Expression:
    """Returns the expression of a text that has a match of a pattern somewhere."""
    try:
        nodes = list(_parser.parse(pattern))
    except re.error:
        return parse(pattern, ECMA)  # which says what is wrong
    starts = bool(nodes) and nodes[0] == (_constants.AT, _constants.AT_BEGINNING)
    ends = bool(nodes) and nodes[-1] == (_constants.AT, _constants.AT_END)
    inner = json.dumps([str(x) for x in nodes[starts : len(nodes) - ends]])
    if "AT_" in inner and not (starts and ends):
        raise ValueError(
            f"the pattern {pattern!r:.80} has ^ or $ within it, which is not enforced. Write "
            "^(?:...)$ around all of it."
        )
    expression = parse(pattern, ECMA)
    before = () if starts else (ANY,)
    return Sequence((*before, expression, *(() if ends else (ANY,))))


def limit(expression: Expression, least: int, most: int | None) -> Expression:
    """Returns the texts of a pattern of so many characters, where that is simple."""
    parts = [x for x in getattr(expression, "parts", (expression,)) if x != Sequence(())]
    while len(parts) == 1 and isinstance(parts[0], Sequence):
        parts = [x for x in parts[0].parts if x != Sequence(())]
    if len(parts) == 1 and isinstance(parts[0], Repeat) and isinstance(parts[0].body, Chars):
        body, low, high = parts[0]
        low = max(low, least)
        high = most if high is None else high if most is None else min(high, most)
        return NOTHING if high is not None and low > high else Repeat(body, low, high)
    short, long = _widths(expression)
    if short >= least and (most is None or long <= most):
        return expression
    raise ValueError(
        "pattern beside minLength or maxLength is enforced for patterns such as ^[a-z]+$ alone. "
        "Write the length into the pattern."
    )


def _widths(expression: Expression) -> tuple[float, float]:
    """Returns the lengths of the shortest and of the longest text."""
    if isinstance(expression, Chars):
        return 1, 1
    if isinstance(expression, Repeat):
        short, long = _widths(expression.body)
        most = math.inf if expression.most is None else expression.most
        return short * expression.least, long * most if long else 0
    if isinstance(expression, Sequence):
        widths = [_widths(x) for x in expression.parts]
        return sum(x[0] for x in widths), sum(x[1] for x in widths)
    widths = [_widths(x) for x in expression.options]
    return min(x[0] for x in widths), max(x[1] for x in widths)
