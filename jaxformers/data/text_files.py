"""Texts of files, read piece by piece, from any place on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIECE = 2**18  # bytes of a text file that are encoded at once


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: what it says.
        stop: the byte of the file after it, where reading may go on.
        ends: whether the document ends here.
    """

    text: str
    stop: int
    ends: bool


def read_pieces(path: Path, start: int = 0, field: str = "text") -> Iterator[Piece]:
    """The pieces of a file from a byte on that is 0 or the `stop` of one.

    A file named `.jsonl` or `.ndjson` has a JSON object with a text in each line, which is a
    document. Any other is one document; it is cut after lines, where tokenizers cut too.

    Raises:
        ValueError: if a text is no UTF-8, or a line no such object; with the place.
    """
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    return _read_lines(path, start, field) if lines else _read_text(path, start)


def check_inputs(paths: list[Path]) -> None:
    """Raise unless all are files with something in them."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing or no regular file.")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty.")


def _read_text(path: Path, start: int) -> Iterator[Piece]:
    with path.open("rb") as file:
        while True:
            file.seek(start)
            block = file.read(PIECE + 1)
            if not block:
                return
            ends = len(block) <= PIECE
            block = block if ends else block[: _cut(block)]
            yield Piece(_decode(block, path, start), start + len(block), ends)
            start += len(block)


def _read_lines(path: Path, start: int, field: str) -> Iterator[Piece]:
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if line.strip():
                text = _text_of(_decode(line, path, start), field, path, start)
                yield Piece(text, start + len(line), True)
            start += len(line)


def _text_of(line: str, field: str, path: Path, start: int) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_place(path, start)} is no JSON: {error}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{_place(path, start)} must be a JSON object, got {line[:80]!r}.")
    if not isinstance(record.get(field), str):
        raise ValueError(
            f"{_place(path, start)} must have a text in its field {field!r}, got the fields "
            f"{sorted(record)}. Name the field with --field."
        )
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_place(path, start)} is no Unicode text: {error}.") from None
    return record[field]


def _decode(block: bytes, path: Path, start: int) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise ValueError(
            f"{_place(path, at)}, byte {at} of the file, is no UTF-8: {error.reason} "
            f"(0x{block[error.start]:02x}). Convert the file to UTF-8."
        ) from None


def _place(path: Path, byte: int) -> str:
    """The line of a byte, which is looked for only once something is wrong."""
    line = 1
    with path.open("rb") as file:
        while byte > 0 and (block := file.read(min(byte, PIECE))):
            line += block.count(b"\n")
            byte -= len(block)
    return f"line {line} of {path}"


def _cut(block: bytes) -> int:
    """Where to cut a text that goes on, by its first bytes: a place that depends on these alone.

    Tokenizers that cut texts into words before all else put spaces into words with what follows
    them, or together. Neither happens at a line's end between two lines that are not blank.
    """
    at = len(block) - 1
    while (at := block.rfind(b"\n", 1, at)) > 0:
        if not block[at - 1 : at].isspace() and not block[at + 1 : at + 2].isspace():
            return at + 1
    if (at := block.rfind(b"\n", 0, len(block) - 1)) >= 0:
        return at + 1
    at = len(block) - 1
    while at > len(block) - 4 and block[at] & 0xC0 == 0x80:  # within a character
        at -= 1
    return at
