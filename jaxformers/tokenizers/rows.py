"""Rows of a tokenizer: texts are checked, encodings truncated, and ids padded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxformers.files.json_file import shorten


def check_texts(name: str, texts: Any) -> list[str]:
    """Returns the texts as a list of at least one, or raises an error."""
    listed = [texts] if isinstance(texts, str) else texts
    if not (isinstance(listed, Sequence) and listed and all(isinstance(x, str) for x in listed)):
        raise ValueError(
            f"{name} must be a string or a list of at least one string, got {shorten(texts)}."
        )
    for text in listed:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} must be valid Unicode, got {shorten(text)}: {error.reason}. "
                'Repair it, for instance with .encode("utf-8", "replace").decode().'
            ) from None
    return list(listed)


def check_pairs(texts: Any, pairs: Any, first: list[str], second: list[str]) -> None:
    """Raises unless there is one second text for each text.

    Arguments:
        texts, pairs: as the caller gave them: two texts, or two lists.
        first, second: the same as lists.
    """
    if isinstance(texts, str) != isinstance(pairs, str) or len(first) != len(second):
        raise ValueError(
            f"pairs must be one text to each of texts, got {len(second)} to {len(first)}. Pass two "
            "strings, or two lists of equal length."
        )


def truncate(encoding: Any, max_length: int, side: str) -> tuple[list[int], list[int]]:
    """Returns ids and token types of an encoding, truncated to `max_length` on the given side.

    The backend is not used for this. Its setting is not safe with threads, and it keeps all
    that it cuts off, for two texts in each combination.
    """
    if len(encoding.ids) <= max_length:
        return encoding.ids, encoding.type_ids
    source = np.array([2 if i is None else i for i in encoding.sequence_ids])  # 2: special
    first, second, specials = (np.flatnonzero(source == i) for i in range(3))
    if max_length < len(specials):
        raise ValueError(
            f"max_length must have room for the {len(specials)} special tokens of a row, "
            f"got {max_length}. Pass a larger one."
        )
    lengths = _share(max_length - len(specials), len(first), len(second))
    kept = [
        text[:length] if side == "right" else text[len(text) - length :]
        for text, length in zip((first, second), lengths, strict=True)
    ]
    places = np.sort(np.concatenate([specials, *kept]))
    ids, types = (np.array(row)[places].tolist() for row in (encoding.ids, encoding.type_ids))
    return ids, types


def stack(rows: list[list[int]], fill: int, side: str) -> Int[np.ndarray, "b t"]:
    """Returns the rows in one array, padded with `fill` on the given side."""
    if side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {side!r}.')
    stacked = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
        if side == "left":
            stacked[i] = np.roll(stacked[i], -len(row))
    return stacked


def _share(room: int, first: int, second: int) -> tuple[int, int]:
    """Returns how many tokens of two texts to keep. The longer one is truncated first."""
    half = room // 2 if first <= second else room - room // 2
    kept = min(first, max(half, room - second))
    return kept, min(second, room - kept)
