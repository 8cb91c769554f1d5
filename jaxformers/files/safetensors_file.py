"""One safetensors file: its header is checked, its tensors are read and written one by one.

The file has 8 bytes for the length of a JSON header, the header, and the tensors' bytes one after
another (https://huggingface.co/docs/safetensors). The header is compared with the real size of the
file before it is used, here and by the `safetensors` package. The bytes are then read from the
file. The package would map the file into memory, where every page that was read counts as used
memory, so loading would need twice the memory of the model.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jaxformers.files.json_file import (
    MAX_JSON_BYTES,
    parse_json,
    regular_file,
    shorten,
    what_it_is,
)

# The names of dtypes in a file. Types of less than a byte (F4, F6) do not exist in NumPy.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The header of a sealed file begins like this, followed by the digest of the whole file. The digest
# is computed with zeros in its own place.
_SEAL = b'{"__metadata__":{"sha256":"'
_NO_DIGEST = b"0" * 64


@runtime_checkable
class FileTensor(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that `read` returns."""

    @property
    def dtype(self) -> np.dtype:
        """The type of its numbers."""

    def read(self) -> np.ndarray:
        """Returns its values."""


class Stored(NamedTuple):
    """A tensor in a file, with the bytes `begin .. end - 1`."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> np.ndarray:
        """Returns the values of the tensor, in memory from `allocate`."""
        return read_tensor(self)

    def view(self) -> np.ndarray:
        """Returns the values without reading them: what is used of them is read then."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.begin, self.shape)


class Unsaved(NamedTuple):
    """A tensor to be written, with a function that makes it just before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Any]

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a file by name, in the order of their bytes."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Returns the tensors of a file by name, in the order of their bytes, and its metadata."""
    size = regular_file(path).stat().st_size
    with path.open("rb") as file:
        first = file.read(64)
        length = int.from_bytes(first[:8], "little")
        if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
            raise ValueError(
                f"{path} is no safetensors file, or a damaged one: its first 8 bytes announce a "
                f"header of {length} bytes, in a file of {size} (at most {MAX_JSON_BYTES})."
                f"{what_it_is(first)}"
            )
        file.seek(8)
        entries = parse_json(file.read(length), f"the header of {path}")
    metadata = entries.pop("__metadata__", {})
    tensors = [(name, _stored(path, 8 + length, name, entry)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_layout(path, tensors, 8 + length, size)
    _check_with_package(path)  # it also checks that all metadata are texts
    return dict(tensors), metadata


def check_seal(path: Path) -> None:
    """Raises an error unless a file has exactly the bytes that `write_sealed_file` wrote.

    It reads the whole file at the speed of SHA-256, which is 2 GB/s on processors with instructions
    for it.
    """
    with path.open("rb") as file:
        start = file.read(8 + len(_SEAL) + 64)
        if start[8:-64] != _SEAL:
            raise ValueError(
                f"{path} was not written by jaxformers, or it is damaged: its header does not "
                f"begin with a digest.{what_it_is(start)}"
            )
        digest = hashlib.sha256(start[:-64] + _NO_DIGEST)
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest().encode() != start[-64:]:
        raise ValueError(
            f"{path} is damaged: its bytes are not those that were written (the SHA-256 digest in "
            "its header is another). Copy it again."
        )


def _stored(path: Path, start: int, name: str, entry: Any) -> Stored:
    """Returns the tensor of a header entry, after a check of its shape, dtype and offsets."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    where = f"{path}: tensor {shorten(name)}"
    if not (_are_sizes(shape) and len(shape) <= 32 and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(
            f"{where} must have a shape of up to 32 integers and two data_offsets, none below 0 or "
            f"beyond 64 bits, got {shorten(entry)}."
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has the dtype {shorten(dtype)}, known are {', '.join(DTYPES)}.")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(
            f"{where} of dtype {dtype} and shape {shape} does not fit its data_offsets {offsets}, "
            f"which are {end - begin} bytes apart."
        )
    # Beside a 0 the other sizes may be anything, but NumPy multiplies them, too.
    if math.prod(n or 1 for n in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise ValueError(f"{where} has the absurd shape {shape}.")
    return Stored(path, DTYPES[dtype], tuple(shape), start + begin, start + end)


def _are_sizes(x: Any) -> TypeGuard[list[int]]:
    return isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x)


def _check_layout(path: Path, tensors: list[tuple[str, Stored]], start: int, size: int) -> None:
    """Raises an error unless the tensors fill the file from `start` to its end without gaps."""
    at = start
    for name, tensor in tensors:
        if tensor.begin != at:
            raise ValueError(
                f"{path}: tensor {shorten(name)} begins at byte {tensor.begin}, but the bytes "
                f"before it end at {at}. Tensors must not overlap or leave gaps."
            )
        at = tensor.end
    if at != size:
        raise ValueError(
            f"{path} {'is truncated' if size < at else 'has bytes left over'}: by its header it "
            f"has {at} bytes, in fact {size}. Download or save it again."
        )


def check_package() -> None:
    """Raises an error unless the `safetensors` package is installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise ImportError(
            "checkpoints need the safetensors package: pip install 'jaxformers[hf]'."
        ) from None


def _check_with_package(path: Path) -> None:
    """Checks the file with the reference reader, which knows newer rules as well."""
    check_package()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}.") from error


def read_tensor(tensor: Stored) -> np.ndarray:
    """Returns the values of a tensor, in memory from `allocate`."""
    array = allocate(tensor.shape, tensor.dtype)
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        if file.readinto(_as_bytes(array)) != array.nbytes:
            raise ValueError(
                f"{tensor.path} has become shorter since it was opened. Copy it again."
            )
    return array


def allocate(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array, which `jax.device_put` takes over on a CPU without a copy.

    JAX copies an array unless it begins at a multiple of 64 bytes. NumPy's arrays do so only by
    chance, and NumPy does not return all freed memory to the system. So large arrays get pages of
    their own. After an array was passed to JAX, it must not be changed.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 2**20:
        return np.empty(shape, dtype)
    # The pages are not shared with child processes, if the system can do so.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    pages = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults: reading takes a third less time
    return np.frombuffer(pages, dtype).reshape(shape)


def write_file(path: Path, tensors: Sequence[Unsaved]) -> None:
    """Writes tensors one after another, wider numbers first, so that all of them are aligned."""
    _write(path, tensors, {"format": "pt"}, lambda part: None)  # transformers needs this entry


def write_sealed_file(path: Path, tensors: Sequence[Unsaved], metadata: Mapping[str, str]) -> None:
    """Writes tensors and texts with a digest of the whole file, for `check_seal`."""
    digest = hashlib.sha256()
    _write(path, tensors, {"sha256": _NO_DIGEST.decode(), **metadata}, digest.update)
    with path.open("r+b") as file:
        file.seek(8 + len(_SEAL))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def _write(
    path: Path,
    tensors: Sequence[Unsaved],
    metadata: Mapping[str, str],
    see: Callable[[Any], None],
) -> None:
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        start = len(text).to_bytes(8, "little") + text
        see(start)
        file.write(start)
        for tensor in tensors:
            part = _made(tensor)
            see(part)
            file.write(part)
            del part  # frees its memory before the next tensor is made
        file.flush()
        os.fsync(file.fileno())  # the contents must be on disk before the file gets its name
    read_header(path)


def _made(tensor: Unsaved) -> memoryview:
    array = np.asarray(tensor.make())
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(
            f"tensor {shorten(tensor.name)} was announced with shape {tensor.shape} and dtype "
            f"{tensor.dtype}, but it has {array.shape} and {array.dtype}."
        )
    return _as_bytes(np.ascontiguousarray(array))


def _as_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
