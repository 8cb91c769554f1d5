"""Texts of files that are read piece by piece, from any position on."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIECE = 2**18  # the number of bytes of a text file that are encoded at once
CONTEXT = 2**10  # the number of bytes before and after a piece that are encoded with it

# The byte-order marks, longer ones first.
MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: the text of the piece.
        stop: the byte of the file after it, at which reading may resume.
        ends: whether the document ends here.
        before, after: some text of the document around the piece.
    """

    text: str
    stop: int
    ends: bool
    before: str = ""
    after: str = ""


def read_pieces(path: Path, start: int = 0, field: str = "text") -> Iterator[Piece]:
    """Yields the pieces of a file from a byte on, which is 0 or the `stop` of a piece.

    Each line of a `.jsonl` or `.ndjson` file is a JSON object with the text of a document. Any
    other file is one document, which is cut between lines if possible. A byte-order mark is not
    part of a text.

    Raises:
        ValueError: if a text is not UTF-8, or a line is not such an object. The error names the
            line.
    """
    check_encoding(path)
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    return _read_lines(path, start, field) if lines else _read_text(path, start)


def check_inputs(paths: list[Path]) -> None:
    """Raises an error unless all paths are files that are not empty."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing or no regular file.")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty. Leave it out.")
        check_encoding(path)


def check_encoding(path: Path) -> None:
    """Raises an error if a file begins with the byte-order mark of another encoding than UTF-8."""
    with path.open("rb") as file:
        head = file.read(4)
    for mark, name in MARKS.items():
        if head.startswith(mark):
            raise ValueError(
                f"{path} is no UTF-8: it begins with the byte-order mark of {name}. Convert it, "
                f"for instance with iconv -f {name} -t UTF-8."
            )


def _read_text(path: Path, start: int) -> Iterator[Piece]:
    size = max(PIECE, 4)  # at least one character
    with path.open("rb") as file:
        begin = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        if start == 0 and path.stat().st_size == begin:
            yield Piece("", begin, True)
        start = max(start, begin)
        while True:
            context = max(begin, start - CONTEXT)
            file.seek(context)
            before, block = file.read(start - context), file.read(size + 1 + CONTEXT)
            if not block:
                return
            ends = len(block) <= size
            cut = len(block) if ends else _cut(block[: size + 1])
            # Characters that begin before or end after the context are left out.
            around = before, block[cut : cut + CONTEXT]
            yield Piece(
                _decode(block[:cut], path, start),
                start + cut,
                ends,
                *(part.decode(errors="ignore") for part in around),
            )
            start += cut


def _read_lines(path: Path, start: int, field: str) -> Iterator[Piece]:
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            record = line.removeprefix(codecs.BOM_UTF8)  # joined files have it in later lines, too
            if record.strip():
                content = _decode(record, path, start + len(line) - len(record))
                yield Piece(_text_of(content, field, path, start), start + len(line), True)
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
    """Returns the line of a byte. It reads the file again, so it is called only for errors."""
    line = 1
    with path.open("rb") as file:
        while byte > 0 and (block := file.read(min(byte, PIECE))):
            line += block.count(b"\n")
            byte -= len(block)
    return f"line {line} of {path}"


def _cut(block: bytes) -> int:
    """Returns where to cut a text that goes on. The cut depends only on the bytes given.

    If possible it is at the end of a line between two lines that are not blank, since tokenizers
    also cut there.
    """
    at = len(block) - 1
    while (at := block.rfind(b"\n", 1, at)) > 0:
        if not block[at - 1 : at].isspace() and not block[at + 1 : at + 2].isspace():
            return at + 1
    if (at := block.rfind(b"\n", 0, len(block) - 1)) >= 0:
        return at + 1
    at = len(block) - 1
    while at > len(block) - 4 and block[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    return at


def texts_of(paths: list[Path], field: str) -> Iterator[str]:
    """Yields the texts of files, piece by piece."""
    for path in paths:
        for piece in read_pieces(path, field=field):
            yield piece.text
