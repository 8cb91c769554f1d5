"""Expressions of JSON: strings, numbers in a range, and the text of one value."""

import json
import math
from typing import Any

from jaxformers.constraints.expressions import (
    EMPTY,
    NOTHING,
    Alternatives,
    Chars,
    Expression,
    Repeat,
    Sequence,
    alternatives,
    complement,
    intersect,
    one_of,
    optional,
    sequence,
)

SPACE = Repeat(one_of(" "), 0, 1)  # at most one, after a comma or a colon
COMMA, COLON = sequence(",", SPACE), sequence(":", SPACE)
DIGIT, HEX = one_of("0123456789"), one_of("0123456789abcdefABCDEF")
RAW = complement([(0, 31), (34, 34), (92, 92)])  # what a string has without an escape
SHORT = sequence("\\", one_of('"\\/bfnrt'))
# No half of a pair of surrogates comes alone, which would be no character.
LONG = alternatives(
    [
        sequence("\\u", one_of("0123456789abcefABCEF"), Repeat(HEX, 3, 3)),
        sequence("\\u", one_of("dD"), one_of("01234567"), HEX, HEX),
        sequence(
            *("\\u", one_of("dD"), one_of("89abAB"), HEX, HEX),
            *("\\u", one_of("dD"), one_of("cdefCDEF"), HEX, HEX),
        ),
    ]
)
# Whole numbers have so many digits at most, fractions so many: what readers hold exactly.
DIGITS, DECIMALS = 18, 16


def string(least: int = 0, most: int | None = None) -> Expression:
    """Returns a string of so many characters."""
    character = [Chars(RAW), SHORT] if least or most is not None else [Chars(RAW), SHORT, LONG]
    return sequence('"', Repeat(alternatives(character), least, most), '"')


def written(expression: Expression) -> Expression:
    """Returns how the characters of a text are written within a string of JSON."""
    if isinstance(expression, Chars):
        escaped = intersect(expression.ranges, ((0, 31), (34, 34), (92, 92)))
        codes = [x for low, high in escaped for x in range(low, high + 1)]
        options: list[Any] = [json.dumps(chr(x))[1:-1] for x in codes]
        return alternatives([Chars(intersect(expression.ranges, RAW)), *options])
    if isinstance(expression, Sequence):
        return Sequence(tuple(map(written, expression.parts)))
    if isinstance(expression, Alternatives):
        return Alternatives(tuple(map(written, expression.options)))
    return expression._replace(body=written(expression.body))


def value(given: Any) -> Expression:
    """Returns one value, with at most one space between its elements.

    Raises:
        ValueError: if JSON has no such value.
    """
    if isinstance(given, dict):
        items = [sequence(value(str(key)), COLON, value(x)) for key, x in given.items()]
        return sequence("{", _joined(items), "}")
    if isinstance(given, list | tuple):
        return sequence("[", _joined([value(x) for x in given]), "]")
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError(f"JSON has no {given}.")
    if isinstance(given, str):
        whole = all(not 0xD800 <= ord(x) <= 0xDFFF for x in given)
        return sequence(json.dumps(given, ensure_ascii=not whole))
    try:
        return sequence(json.dumps(given))
    except TypeError:
        raise ValueError(f"JSON has no value for {given!r:.80}.") from None


def _joined(items: list[Expression]) -> Expression:
    parts = [part for item in items for part in (COMMA, item)]
    return Sequence(tuple(parts[1:]))


def integers(least: int | None, most: int | None) -> Expression:
    """Returns the whole numbers from `least` to `most`; None is without limit."""
    if least is not None and most is not None and least > most:
        return NOTHING
    options = []
    if most is None or most >= 0:
        options.append(_natural(max(least or 0, 0), most))
    if least is None or least < 0:
        negative = _natural(
            max(1, -most if most is not None else 1), None if least is None else -least
        )
        options.append(sequence("-", negative))
    return alternatives(options)


def _natural(least: int, most: int | None) -> Expression:
    if most is None:
        most = 10 ** max(DIGITS, len(str(least)) + 1) - 1
    options = []
    for length in range(len(str(least)), len(str(most)) + 1):
        low = max(least, 10 ** (length - 1) if length > 1 else 0)
        options.append(_between(str(low), str(min(most, 10**length - 1))))
    return alternatives(options)


def _between(low: str, high: str) -> Expression:
    """Returns the numbers between two of the same length, both included."""
    if not low:
        return EMPTY
    rest = len(low) - 1
    if low[0] == high[0]:
        return sequence(low[0], _between(low[1:], high[1:]))
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return sequence(Chars(((ord(low[0]), ord(high[0])),)), Repeat(DIGIT, rest, rest))
    options = [
        sequence(low[0], _between(low[1:], "9" * rest)),
        sequence(high[0], _between("0" * rest, high[1:])),
    ]
    if ord(high[0]) - ord(low[0]) > 1:
        middle = Chars(((ord(low[0]) + 1, ord(high[0]) - 1),))
        options.append(sequence(middle, Repeat(DIGIT, rest, rest)))
    return alternatives(options)


def numbers(least: int | None, most: int | None) -> Expression:
    """Returns the numbers from `least` to `most`; with an exponent only without a limit."""
    fraction = sequence(".", Repeat(DIGIT, 1, DECIMALS))
    if least is None and most is None:
        exponent = optional(one_of("eE"), optional(one_of("+-")), Repeat(DIGIT, 1, 2))
        return sequence(integers(None, None), optional(fraction), exponent)
    options = [integers(least, most)]
    if most is None or most > max(least or 0, 0):  # a fraction goes away from 0
        top = None if most is None else most - 1
        options.append(sequence(_natural(max(least or 0, 0), top), fraction))
    if least is None or least < min(0 if most is None else most, 0):
        low = max(0, 0 if most is None else -most)
        bottom = None if least is None else -least - 1
        options.append(sequence("-", _natural(low, bottom), fraction))
    return alternatives(options)
