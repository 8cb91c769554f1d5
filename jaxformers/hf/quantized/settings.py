"""The entries of `quantization_config` while they are read."""

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_GROUP = 2**20


class Settings:
    """The entries of a `quantization_config`, or of an object in it.

    Arguments:
        entries: the entries.
        where: the name of the object, for errors.
    """

    def __init__(self, entries: Any, where: str = "quantization_config"):
        if not isinstance(entries, Mapping):
            raise ValueError(f"config.json: {where} must be an object, got {entries!r:.80}.")
        self.entries = entries
        self.where = where

    def choose(self, key: str, values: Sequence[Any], default: Any = None) -> Any:
        """Returns an entry that must be one of these values, in small letters if it is a text."""
        value = self.entries.get(key)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if not any(value == x and type(value) is type(x) for x in values):
            known = " or ".join(repr(x) for x in values)
            raise ValueError(
                f"config.json: {key} of {self.where} must be {known} to be read here, got "
                f"{value!r:.80}."
            )
        return value

    def group_size(self, default: int | None) -> int | None:
        """Returns the number of inputs that share a scale; None stands for all of them."""
        size = self.entries.get("group_size", default)
        size = default if size is None else size
        if size is None or (size == -1 and type(size) is int):
            return None
        if type(size) is not int or not 1 <= size <= LARGEST_GROUP:
            raise ValueError(
                f"config.json: group_size of {self.where} must be -1 or an integer from 1 to "
                f"{LARGEST_GROUP}, got {size!r:.80}."
            )
        return size

    def pair(self, key: str) -> tuple[int, int] | None:
        """Returns the two sizes of a block; None if there is no entry."""
        sizes = self.entries.get(key)
        if sizes is None:
            return None
        good = isinstance(sizes, list) and len(sizes) == 2
        if not good or any(type(n) is not int or not 1 <= n <= LARGEST_GROUP for n in sizes):
            raise ValueError(
                f"config.json: {key} of {self.where} must be two integers from 1, got "
                f"{sizes!r:.80}."
            )
        return sizes[0], sizes[1]

    def forbid(self, *keys: str) -> None:
        """Raises for entries with a meaning that is not read here."""
        for key in keys:
            if self.entries.get(key) not in (None, False, {}, []):
                raise ValueError(
                    f"config.json: {key} = {self.entries[key]!r:.80} of {self.where} is not read "
                    "here."
                )
