"""One GGUF file: its header is checked, and its tensors are read and unpacked one by one.

The file has a header of metadata (keys with values), the names, shapes and types of the tensors,
and the tensors' bytes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every count and
length in the header is compared with the real size of the file before it is used. Blocks of
quantized numbers are unpacked by the `gguf` package.
"""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxformers.files.found import list_names
from jaxformers.files.hub import WEIGHTS
from jaxformers.files.json_file import regular_file, shorten, what_it_is
from jaxformers.files.safetensors_file import allocate

# The largest vocabularies have 300,000 tokens with as many merges, and a model of 400 billion
# parameters has 3,000 tensors.
MAX_KEYS = 2**16
MAX_TENSORS = 2**17
MAX_STRINGS = 2 * 2**20
MAX_HEADER_BYTES = 2**28
MAX_NAME_BYTES = 2**16

_STRING, _ARRAY, _BOOL = 8, 9, 7
# The types of numbers in metadata.
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"},
    **{_BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"},
}
# Tensors of these types are stored as they are.
_PLAIN = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
}
# The bytes that are unpacked at once: what they become fits the cache of a core.
_STEP = 2**18


class GgufTensor(NamedTuple):
    """A tensor in a file, with the bytes `begin .. end - 1`.

    Arguments:
        path: the file.
        kind: the name of its type, such as "Q4_K".
        shape: its shape as NumPy counts axes: the numbers of the last axis lie together.
        begin: its first byte.
        end: the byte after its last one.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        """The type of the numbers that `read` returns."""
        return _PLAIN.get(self.kind, np.dtype(np.float32))

    @property
    def packed(self) -> bool:
        """Returns whether the numbers are stored as blocks of integers with scales."""
        return self.kind not in _PLAIN

    def rows(self) -> np.ndarray:
        """Returns the bytes, uint8 of shape `(rows, bytes of a row)`."""
        count = math.prod(self.shape[:-1])
        data = allocate((count, (self.end - self.begin) // count), np.dtype(np.uint8))
        with self.path.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(data.reshape(-1).data) != data.nbytes:
                raise ValueError(
                    f"{self.path} has become shorter since it was opened. Copy it again."
                )
        return data

    def read(self) -> np.ndarray:
        """Returns the values, in memory from `allocate`; blocks are unpacked as float32."""
        data = self.rows()
        if not self.packed:
            return data.reshape(-1).view(self.dtype).reshape(self.shape)
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.kind]
        array = allocate((len(data), self.shape[-1]), self.dtype)
        step = max(1, _STEP // data.shape[1])
        try:
            # A damaged scale may be infinite. Whoever reads the values checks them.
            with np.errstate(all="ignore"):
                for i in range(0, len(data), step):
                    # One long row: rows as they are would be unpacked by sixteen, slowly.
                    unpacked = dequantize(data[i : i + step].reshape(1, -1), kind)
                    array[i : i + step] = unpacked.reshape(-1, self.shape[-1])
        except NotImplementedError:
            raise ValueError(
                f"{self.path} has tensors of the type {self.kind}, which the gguf package does not "
                "unpack: a newer one may, pip install --upgrade gguf."
            ) from None
        return array.reshape(self.shape)


class GgufFile(NamedTuple):
    """The header of a file.

    Arguments:
        path: the file.
        metadata: values by key: numbers, booleans and strings, arrays of NumPy, lists of strings.
        tensors: the tensors by name, in the order of their bytes.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Returns the header of a file.

    Raises:
        ValueError: if it is no GGUF file, damaged, or of a kind that is not read.
        ImportError: if the `gguf` package is missing.
    """
    size = regular_file(path).stat().st_size
    with path.open("rb") as file:
        first = file.read(64)
        if first[:4] != b"GGUF" or size < 24:
            raise ValueError(f"{path} is no GGUF file, or a damaged one.{what_it_is(first)}")
        check_package()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()


def find_gguf(path: Any) -> Path | None:
    """Returns the GGUF file that a path is, or that a directory holds; None if there is none.

    Other weights of a directory are preferred to a GGUF file.

    Raises:
        ValueError: if a directory has several.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        return None
    path = Path(path).expanduser()
    if os.path.isfile(path):
        return path if path.suffix == ".gguf" else None
    if not os.path.isdir(path) or any((path / name).exists() for name in WEIGHTS):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{path} has {len(files)} GGUF files, {list_names(x.name for x in files)}. Pass the "
            "path of one."
        )
    return files[0] if files else None


def check_package() -> None:
    """Raises an error unless the `gguf` package is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError(
            "GGUF files need the gguf package: pip install 'jaxformers[gguf]'."
        ) from None


class _Header:
    """A header that is being read, with the position of the next byte."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.strings = 0

    def read(self) -> GgufFile:
        version, tensors, keys = self._unpack("<IQQ")
        if version & 0xFFFF == 0:
            raise self._error(
                "its numbers are big-endian. gguf-convert-endian, a script of the gguf package, "
                "writes it as little-endian"
            )
        if version not in (2, 3):
            raise self._error(f"its version is {version}, and only 2 and 3 are read")
        self._check_count("keys", keys, MAX_KEYS, least=13)
        self._check_count("tensors", tensors, MAX_TENSORS, least=32)
        metadata = self._unique(self._key() for _ in range(keys))
        entries = self._unique(self._tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment must be a power of two, got {alignment!r:.80}")
        start = -(-self.at // alignment) * alignment
        return GgufFile(self.path, metadata, self._place(entries, start, alignment))

    def _unique(self, pairs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise self._error(f"{shorten(name)} comes twice")
            found[name] = value
        return found

    def _key(self) -> tuple[str, Any]:
        name = self._name()
        (kind,) = self._unpack("<I")
        return name, self._value(name, kind)

    def _value(self, name: str, kind: int) -> Any:
        where = f"the value of {shorten(name)}"
        if kind == _STRING:
            return self._string(where)
        if kind in _NUMBERS:
            value = self._numbers(_NUMBERS[kind], 1)[0].item()
            return self._flag(where, value) if kind == _BOOL else value
        if kind != _ARRAY:
            raise self._error(f"{where} has the unknown type {kind}")
        kind, count = self._unpack("<IQ")
        if kind == _STRING:
            self._check_count(f"strings in {where}", count, MAX_STRINGS - self.strings, least=8)
            self.strings += count
            return self._strings(where, count)
        if kind not in _NUMBERS:
            what = "arrays within an array" if kind == _ARRAY else f"the unknown type {kind}"
            raise self._error(f"{where} has {what}")
        least = np.dtype(_NUMBERS[kind]).itemsize
        self._check_count(f"numbers in {where}", count, MAX_HEADER_BYTES, least)
        numbers = self._numbers(_NUMBERS[kind], count)
        return numbers != 0 if kind == _BOOL else numbers

    def _flag(self, where: str, value: int) -> bool:
        if value not in (0, 1):
            raise self._error(f"{where} must be 0 or 1 (false or true), got {value}")
        return value == 1

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], str, int, int]]:
        """Returns the name of a tensor with its shape, type, size in bytes and offset."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._name()
        (axes,) = self._unpack("<I")
        if not 1 <= axes <= 8:
            raise self._error(f"the tensor {shorten(name)} must have 1 to 8 axes, got {axes}")
        sizes = self._unpack(f"<{axes}Q")
        number, offset = self._unpack("<IQ")
        if min(sizes) < 1 or math.prod(sizes) >= 2**60:
            raise self._error(f"the tensor {shorten(name)} has the absurd shape {sizes}")
        if number not in GGML_QUANT_SIZES:  # its keys are equal to their numbers
            raise self._error(
                f"the tensor {shorten(name)} has the type {number}, which the gguf package does "
                "not know: a newer one may, pip install --upgrade gguf"
            )
        kind = GGMLQuantizationType(number)
        block, bytes_of_block = GGML_QUANT_SIZES[kind]
        if sizes[0] % block:
            raise self._error(
                f"the tensor {shorten(name)} of type {kind.name} has rows of {sizes[0]} numbers, "
                f"which blocks of {block} do not fill"
            )
        size = math.prod(sizes) // block * bytes_of_block
        return name, (sizes[::-1], kind.name, size, offset)

    def _place(self, entries: dict[str, Any], start: int, alignment: int) -> dict[str, GgufTensor]:
        """Returns the tensors, after a check that each lies within the file and alone."""
        found = {}
        ordered = sorted(entries.items(), key=lambda item: item[1][3])
        at = 0
        for name, (shape, kind, size, offset) in ordered:
            where = f"the tensor {shorten(name)}"
            if offset < at or offset % alignment:
                raise self._error(
                    f"{where} begins at byte {offset} of the data. It must be a multiple of "
                    f"{alignment} and not before {at}, where the tensor before it ends"
                )
            at = offset + size
            if start + at > len(self.data):
                raise self._error(
                    f"{where} ends at byte {start + at}, and the file has {len(self.data)}. It is "
                    "truncated: download it again"
                )
            found[name] = GgufTensor(self.path, kind, shape, start + offset, start + at)
        return found

    def _name(self) -> str:
        return self._string("a name", MAX_NAME_BYTES)

    def _string(self, where: str, most: int = MAX_HEADER_BYTES) -> str:
        (length,) = self._unpack("<Q")
        self._check_count(f"bytes of {where}", length, most, least=1)
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{where} is no text in UTF-8: {error}") from None

    def _strings(self, where: str, count: int) -> list[str]:
        """Returns strings one after another; a vocabulary has very many."""
        data, length_of, found = self.data, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            begin = self.at + 8
            end = begin + length_of(data, self.at)[0] if begin <= self.end else begin
            if end > self.end:
                return [self._string(where)]  # which says what is wrong
            try:
                found.append(data[begin:end].decode())
            except UnicodeDecodeError:
                return [self._string(where)]
            self.at = end
        return found

    def _numbers(self, kind: str, count: int) -> np.ndarray:
        size = count * np.dtype(kind).itemsize
        if size > self.end - self.at:
            raise self._truncated()
        values = np.frombuffer(self.data[self.at : self.at + size], kind)
        self.at += size
        return values

    def _unpack(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize(form)
        if size > self.end - self.at:
            raise self._truncated()
        values = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return values

    def _check_count(self, what: str, count: int, most: int, least: int) -> None:
        """Raises unless `count` things of at least `least` bytes fit into the rest of the file."""
        if count > min(most, (self.end - self.at) // least):
            raise self._error(
                f"its header announces {count} {what}, and the rest of the file has "
                f"{len(self.data) - self.at} bytes (at most {max(most, 0)} are read): it is "
                "damaged or truncated"
            )

    def _truncated(self) -> ValueError:
        return self._error(f"its header does not end within its {self.end} bytes")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}.")
