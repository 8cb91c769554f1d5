"""A reader of JSON objects whose errors name the field."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxformers.serving.errors import Refused, show


class Fields:
    """The fields of a JSON object, each of which has to be read, or is unknown.

    A field with null is a field that is not there.

    Arguments:
        values: the object.
        where: its place in the body, such as "messages[0].".

    Example:
        >>> fields = Fields({"n": 3, "stream": True})
        >>> fields.whole("n", 1, 1, 8), fields.flag("stream"), fields.number("top_p", 1.0, 0, 1)
        (3, True, 1.0)
        >>> fields.finish()
    """

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self._values = {name: x for name, x in values.items() if x is not None}
        self._where, self._known = where, set[str]()

    def take(self, name: str) -> Any:
        """Returns a field of any kind, None if it is not there."""
        self._known.add(name)
        return self._values.get(name)

    def name(self, name: str) -> str:
        """Returns the name of a field with its place."""
        return f"{self._where}{name}"

    def wrong(self, name: str, wanted: str, got: Any = None, code: str | None = None) -> Refused:
        """Returns the error that a field is not what it must be."""
        said = "got nothing" if got is None else f"got {show(got)}"
        full = self.name(name)
        return Refused(f"{full} must be {wanted}, {said}.", param=full, code=code)

    def string(self, name: str, most: int | None = None, required: bool = False) -> str | None:
        """Returns a text, None if it is not there, of at most so many characters."""
        value = self.take(name)
        if value is None and not required:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        if most is not None and len(value) > most:
            full = self.name(name)
            raise Refused(
                f"{full} must be a string of at most {most} characters, got {len(value)}.",
                param=full,
            )
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Returns a number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        """Returns a whole number from `low` to `high`, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def flag(self, name: str) -> bool:
        """Returns true or false; false if it is not there."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def choice(self, name: str, options: Collection[str], required: bool = False) -> str | None:
        """Returns one of some words, None if it is not there."""
        value = self.take(name)
        if value is None and not required:
            return None
        if not isinstance(value, str) or value not in options:
            raise self.wrong(name, f"one of {', '.join(options)}", value)
        return value

    def inputs(self, name: str, most: int) -> list[Any]:
        """Returns one to `most` inputs, each of which is a text or a list, of token ids perhaps."""
        given = self.take(name)
        listed = [given] if isinstance(given, str) else given
        if isinstance(listed, list) and 0 < len(listed):
            kinds = {type(x) for x in listed}
            if kinds == {int}:
                return [listed]
            if len(listed) <= most and kinds in ({str}, {list}):
                return listed
        wanted = f"a text, a list of token ids, or a list of up to {most} of those"
        raise self.wrong(name, wanted, given)

    def group(self, name: str, required: bool = False) -> "Fields | None":
        """Returns the fields of an object within this one, None if it is not there."""
        value = self.take(name)
        return None if value is None and not required else self.part(value, name, "an object")

    def part(self, value: Any, name: str, wanted: str) -> "Fields":
        """Returns the fields of a value within this object, which must be an object as well."""
        if not isinstance(value, dict):
            raise self.wrong(name, wanted, value)
        return Fields(value, f"{self.name(name)}.")

    def accept(self, allowed: Mapping[str, Collection[Any]]) -> None:
        """Accepts fields with values that change nothing; every other value of them is refused.

        Arguments:
            allowed: such values by name; none at all are allowed of a field with ().
        """
        for name, values in allowed.items():
            value = self.take(name)
            if value is None or any(type(x) is type(value) and x == value for x in values):
                continue
            listed = " or ".join(json.dumps(x) for x in values)
            full = self.name(name)
            besides = f", or pass {listed}" if values else ""
            raise Refused(
                f"{full} is not supported by this server, got {show(value)}. "
                f"Leave it out{besides}.",
                param=full,
                code="unsupported_parameter",
            )

    def finish(self) -> None:
        """Raises if there is a field that nobody has read."""
        unknown = sorted(self._values.keys() - self._known)
        if unknown:
            full = self.name(unknown[0])
            raise Refused(
                f"{show(full)} is no field that this server knows. Leave it out; the known ones "
                f"here are {', '.join(sorted(self._known))}.",
                param=full[:80],
                code="unknown_parameter",
            )


def check_ids(ids: list[Any], vocab_size: int, where: str, param: str) -> None:
    """Raises unless a list has token ids of a model, at least one.

    Arguments:
        ids: what a client sent.
        vocab_size: of the model.
        where: the place of the list in the body.
        param: the name of the field.
    """
    wrong = next((show(x) for x in ids if type(x) is not int or not 0 <= x < vocab_size), None)
    if wrong is not None or not ids:
        got = "an empty list" if wrong is None else wrong
        raise Refused(
            f"{where} must have token ids from 0 to {vocab_size - 1}, got {got}.", param=param
        )
