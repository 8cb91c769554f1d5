"""The entries of a config.json while it is read."""

from collections.abc import Mapping
from typing import Any

from jaxformers.generation.checkpoint_settings import SETTINGS
from jaxformers.hf.config.harmless import is_harmless

LARGEST = 2**31 - 1
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38  # that float32 can hold


class Config:
    """A config.json that is being read. It keeps account of the keys that a setting has read.

    Arguments:
        entries: the entries of the file.
        tensors: the tensors of the checkpoint, which settings may ask about: see `tensors.py`.
        base: the family's class without a head, if there is one.
    """

    def __init__(self, entries: Mapping[str, Any], tensors: Any, base: str | None = None):
        self.entries = dict(entries)
        self.tensors = tensors
        self.base = base
        self.used: set[str] = {"model_type"}

    def get(self, key: str, default: Any, kind: str, optional: bool = False) -> Any:
        """Returns an entry of the expected kind, or the default.

        Raises:
            ValueError: if it is of another kind, or null where that is not `optional`.
        """
        self.used.add(key)
        value = self.entries.get(key, default)
        if value is None and (optional or default is None):
            return None
        if not KINDS[kind](value):
            raise ValueError(f"config.json: {key} must be {NAMES[kind]}, got {value!r:.80}.")
        return float(value) if kind == "number" else value

    @property
    def is_bare(self) -> bool:
        """Whether the checkpoint is one of a bare model, by its class or the names of tensors."""
        named = self.base is not None and self.entries.get("architectures") == [self.base]
        return named or self.tensors.bare

    def rename(self, alias: str, key: str) -> None:
        """Takes an entry under its other name as if it had the usual one."""
        self.used.add(alias)
        other = self.entries.get(alias)
        if other is not None and self.entries.setdefault(key, other) != other:
            self.refuse(alias, f"{key} says {self.entries[key]!r:.80}.")

    def refuse(self, key: str, why: str) -> None:
        """Raises `ValueError` for an entry with a meaning that no model here has."""
        raise ValueError(
            f"config.json: {key} = {self.entries.get(key)!r:.80} is not handled: {why}"
        )

    def unknown(self) -> dict[str, Any]:
        """Returns the entries that no setting has read and that could change numbers."""
        told = self.used | SETTINGS.keys()  # `generate` names the ones that it does not take
        rest = {k: x for k, x in self.entries.items() if k not in told}
        return {k: x for k, x in rest.items() if not is_harmless(self.entries, k)}


def is_number(x: Any) -> bool:
    """Returns whether a value is a number; True and False are none."""
    return isinstance(x, int | float) and not isinstance(x, bool)


KINDS: dict[str, Any] = {
    "size": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= LARGEST,
    "layers": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 1024,
    # A table of all distances is made to look buckets up.
    "distance": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 2**16,
    "count": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= LARGEST,
    "positive": lambda x: is_number(x) and SMALLEST_FLOAT < x < LARGEST_FLOAT,
    "number": lambda x: is_number(x) and 0 <= x < LARGEST_FLOAT,
    "flag": lambda x: isinstance(x, bool),
    "text": lambda x: isinstance(x, str),
    "list": lambda x: isinstance(x, list),
    "dict": lambda x: isinstance(x, dict),
}
NAMES = {
    "size": f"an integer from 1 to {LARGEST}",
    "layers": "an integer from 1 to 1024",
    "distance": f"an integer from 1 to {2**16}",
    "count": f"an integer from 0 to {LARGEST}",
    "positive": f"a number above 0 and below {LARGEST_FLOAT}",
    "number": f"a number from 0 to {LARGEST_FLOAT}",
    "flag": "true or false",
    "text": "a string",
    "list": "a list",
    "dict": "an object",
}
