"""The positions of the entries of a zip file, whose bytes are then read from the file itself.

Files are not trusted. Python's `zipfile` does not check that entries do not overlap and that memory
is bounded, and this module does. `torch.save` stores its entries uncompressed, one after another,
with a directory at the end (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
"""

import struct
from typing import BinaryIO, NamedTuple

from jaxformers.files.json_file import shorten

MAX_ENTRIES = 2**17
MAX_DIRECTORY_BYTES = 32 * 2**20

_END, _END_64, _LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_CENTRAL, _LOCAL = b"PK\1\2", b"PK\3\4"
_UNKNOWN = 0xFFFFFFFF  # the number has 64 bits and is among the extra fields


class Entry(NamedTuple):
    """An entry of a zip file: its header begins at `header`, its bytes are `begin .. end - 1`."""

    header: int
    begin: int
    end: int


def read_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """Returns the entries of a zip file by name.

    Raises:
        ValueError: if the file is truncated or damaged, or its entries are compressed or encrypted,
            have the same name, are beyond the file or overlap.
    """
    count, begin, end = _find_directory(file, size)
    file.seek(begin)
    data = file.read(end - begin)
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        name, header, length, at = _read_central(data, at)
        if name in entries:
            raise ValueError(f"the entry {shorten(name)} comes more than once in its directory")
        start = _read_local(file, name, header, begin)
        entries[name] = Entry(header, start, start + length)
    if at != len(data):
        raise ValueError(f"its directory has {count} entries and {len(data) - at} bytes left over")
    free = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]):
        if entry.header < free or entry.end > begin:
            raise ValueError(f"the entry {shorten(name)} overlaps another, or is cut off")
        free = entry.end
    return entries


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Returns the number of entries, and where their directory begins and ends."""
    tail = _read(file, max(0, size - 98), min(size, 98))  # 56 + 20 + 22 bytes
    if len(tail) < 22 or tail[-22:-18] != _END:
        raise ValueError("it has no directory at its end: it is truncated, or has bytes left over")
    count, length, begin = struct.unpack("<10xHII2x", tail[-22:])
    end = size - 22
    if len(tail) == 98 and tail[56:60] == _LOCATOR_64:
        end = size - 98
        (at,) = struct.unpack("<8xQ4x", tail[56:76])
        if tail[:4] != _END_64 or at != end:
            raise ValueError("the end of its directory is damaged")
        count, length, begin = struct.unpack("<32xQQQ", tail[:56])
    if begin + length != end or count > MAX_ENTRIES or length > MAX_DIRECTORY_BYTES:
        raise ValueError(
            f"by its end it has a directory of {count} entries in {length} bytes from byte "
            f"{begin} on, but that end begins at byte {end} (allowed are {MAX_ENTRIES} entries in "
            f"{MAX_DIRECTORY_BYTES} bytes)"
        )
    return count, begin, end


def _read_central(data: bytes, at: int) -> tuple[str, int, int, int]:
    """Returns the name, header position and length of an entry, and the next entry's position."""
    fixed = data[at : at + 46]
    if len(fixed) < 46 or fixed[:4] != _CENTRAL:
        raise ValueError("its directory is damaged")
    flags, method, stored, length, *sizes, header = struct.unpack("<8xHH8xIIHHH8xI", fixed)
    after_name = at + 46 + sizes[0]
    following = after_name + sizes[1] + sizes[2]
    if following > len(data):
        raise ValueError("its directory is damaged")
    name = data[at + 46 : after_name].decode()
    if method != 0 or flags & 1:
        raise ValueError(
            f"the entry {shorten(name)} is compressed or encrypted, which torch.save never does. "
            "Save it again with torch.save"
        )
    extra = _extra_64(data[after_name : after_name + sizes[1]])
    numbers = []
    for number in (length, stored, header):
        if number == _UNKNOWN:
            if len(extra) < 8:
                raise ValueError(f"the entry {shorten(name)} has no size")
            number, extra = int.from_bytes(extra[:8], "little"), extra[8:]
        numbers.append(number)
    if numbers[0] != numbers[1]:
        raise ValueError(
            f"the entry {shorten(name)} has two lengths, {numbers[0]} and {numbers[1]}"
        )
    return name, numbers[2], numbers[0], following


def _extra_64(extra: bytes) -> bytes:
    """Returns the extra field with 64-bit numbers, or no bytes."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            return extra[4 : 4 + length]
        extra = extra[4 + length :]
    return b""


def _read_local(file: BinaryIO, name: str, header: int, limit: int) -> int:
    """Returns where the bytes of an entry begin, after checking the header before them."""
    fixed = _read(file, header, 30) if header + 30 <= limit else b""
    if len(fixed) < 30 or fixed[:4] != _LOCAL:
        raise ValueError(f"the entry {shorten(name)} does not begin where the directory says")
    _, method, name_size, extra_size = struct.unpack("<6xHH16xHH", fixed)
    if method != 0 or file.read(name_size) != name.encode():
        raise ValueError(f"the entry {shorten(name)} has another header than in the directory")
    return header + 30 + name_size + extra_size


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
