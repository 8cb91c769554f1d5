"""The metadata of a GGUF file while a config.json is made of it."""

from typing import Any

import numpy as np

from jaxformers.files.gguf_file import GgufFile
from jaxformers.files.json_file import shorten

KINDS = {"number": (int, float), "flag": (bool,), "text": (str,)}


class Metadata:
    """The entries of a file about its architecture. It keeps account of the keys that were read.

    Arguments:
        file: the header of the file.
    """

    def __init__(self, file: GgufFile):
        self.file = file
        self.architecture = file.metadata["general.architecture"]
        self.used: set[str] = set()

    def number(self, key: str, default: Any = None) -> Any:
        """Returns a number, or the default if it is absent.

        Raises:
            ValueError: if it is no number, or layers differ.
        """
        value = self._one(key)
        return default if value is None else shortest(self._check(key, value, "number"))

    def flag(self, key: str, default: bool) -> bool:
        """Returns True or False, or the default if it is absent."""
        value = self._one(key)
        return default if value is None else self._check(key, value, "flag")

    def text(self, key: str, default: str) -> str:
        """Returns a text, or the default if it is absent."""
        value = self._find(key)
        return default if value is None else self._check(key, value, "text")

    def numbers(self, key: str) -> list[int] | None:
        """Returns a list of whole numbers or booleans, as integers; None if it is absent."""
        value = self._find(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iub":
            raise self.error(key, "must be whole numbers, one for each layer", shorten(value))
        return value.astype(int).tolist()

    def is_list(self, key: str) -> bool:
        """Returns whether the value of a key is a list."""
        return isinstance(self._find(key), np.ndarray)

    def needed(self, key: str) -> Any:
        """Returns a number that the file must have."""
        value = self.number(key)
        if value is None:
            raise ValueError(f"{self.file.path} has no {self.architecture}.{key} in its metadata.")
        return value

    def only(self, key: str, *values: Any) -> None:
        """Checks that a key has one of these values if it is there."""
        value = self._one(key)
        if value is not None and value not in values:
            known = " or ".join(map(repr, values))
            raise self.error(key, f"is not handled unless it is {known}", shorten(value))

    def check_all_read(self) -> None:
        """Raises an error if the file says something of its architecture that nothing has read."""
        prefix = f"{self.architecture}."
        unread = sorted(
            key for key in self.file.metadata if key.startswith(prefix) and key not in self.used
        )
        if unread:
            listed = ", ".join(map(shorten, unread[:8])) + (" ..." if len(unread) > 8 else "")
            raise ValueError(
                f"{self.file.path} has metadata that are not handled, and a model that ignored "
                f"them could give other numbers: {listed}."
            )

    def error(self, key: str, expected: str, got: str) -> ValueError:
        return ValueError(f"{self.file.path}: {self.architecture}.{key} {expected}, got {got}.")

    def _find(self, key: str) -> Any:
        name = f"{self.architecture}.{key}"
        self.used.add(name)
        return self.file.metadata.get(name)

    def _one(self, key: str) -> Any:
        """Returns the value of a key; of a list with a value for each layer, the value of all."""
        value = self._find(key)
        if not isinstance(value, np.ndarray):
            return value
        if not value.size or (value != value[0]).any():
            raise self.error(key, "must be the same in all layers", shorten(value.tolist()))
        return value[0].item()

    def _check(self, key: str, value: Any, kind: str) -> Any:
        if type(value) not in KINDS[kind]:
            raise self.error(key, f"must be a {kind}", shorten(value))
        return value


def shortest(x: int | float) -> int | float:
    """Returns the shortest decimal that is the same number in float32.

    Files hold float32. An epsilon of 9.999999747378752e-06 is the 1e-05 of config.json.

    Example:
        >>> shortest(float(np.float32(1e-5)))
        1e-05
    """
    if not isinstance(x, float):
        return x
    with np.errstate(over="ignore"):
        single = np.float32(x)
    return float(str(single)) if float(single) == x else x
