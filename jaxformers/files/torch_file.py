"""One file of PyTorch, `pytorch_model.bin`: its tensors are listed, and read one by one.

`torch.save` writes a pickle that describes the tensors, and their numbers beside it. Since PyTorch
1.6 both are entries of a zip file. Before, one followed the other. The pickle is read as data (see
`torch_pickle`), and all of its numbers are checked against the size of the file. The values of a
tensor are read from the file when they are asked for.
"""

import math
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxformers.files.json_file import regular_file, shorten, what_it_is
from jaxformers.files.safetensors_file import allocate
from jaxformers.files.torch_names import Storage, Tensor
from jaxformers.files.torch_pickle import load_pickle
from jaxformers.files.zip_file import Entry, read_entries

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older format
# Tensors may share numbers, as tied ones do, or repeat them. The sum of their sizes is bounded.
_MAX_COPIES, _SMALL = 16, 64 * 2**20
_BLOCK = 2**20
_WRAPPERS = "module.", "_orig_mod."  # prefixes that PyTorch's wrappers of models add to names


class TorchTensor(NamedTuple):
    """A tensor in a file, with its first number at the byte `begin`."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    big_endian: bool

    def read(self) -> np.ndarray:
        """Returns the values of the tensor, in memory from `allocate`."""
        array = allocate(self.shape, self.dtype)
        if array.size:
            # An axis of size 1 may have any stride.
            strides = [x for n, x in zip(self.shape, self.strides, strict=True) if n > 1]
            order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
            target = np.atleast_1d(array.squeeze().transpose(order))
            apart = [strides[axis] * self.dtype.itemsize for axis in order]
            with self.path.open("rb") as file:
                _fill(target, file, self.begin, apart or [self.dtype.itemsize], self.path)
        if self.big_endian and self.dtype.itemsize > 1:
            part = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
            array.reshape(-1).view(f"u{part}").byteswap(inplace=True)
        return array


def read_torch_file(path: Path) -> dict[str, TorchTensor]:
    """Returns the tensors of a file by name.

    The file has a dictionary of tensors, such as a model's `state_dict`, or a dictionary with one
    such dictionary in it, as training scripts save it. If all names begin with "module." (models
    in `DataParallel`) or "_orig_mod." (compiled models), these prefixes are removed.

    Raises:
        ValueError: if the file is damaged, or has anything but tensors, texts and numbers.
    """
    size = regular_file(path).stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        try:
            read = _read_zip if start.startswith(b"PK\3\4") else _read_sequence
            named, places, big_endian = read(file, size)
            tensors = {
                name: _place(path, tensor, places, big_endian) for name, tensor in named.items()
            }
        except ValueError as error:
            raise ValueError(
                f"{path} is no file of tensors by torch.save, or a damaged one: {error}."
                f"{'' if start.startswith((b'PK', bytes([128]))) else what_it_is(start)}"
            ) from error
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if total > _MAX_COPIES * size + _SMALL:
        raise ValueError(f"{path} has {size} bytes, and its tensors would have {total}.")
    return tensors


def _read_zip(file: BufferedReader, size: int) -> tuple[dict[str, Tensor], dict[str, Entry], bool]:
    """Returns the tensors, the position of each storage, and whether storages are big-endian."""
    entries = read_entries(file, size)
    folders = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise ValueError(f"it must have one entry data.pkl in a folder, it has {len(folders)}")
    [folder] = folders
    if f"{folder}/constants.pkl" in entries:
        raise ValueError(
            "it is a program in TorchScript. Save the tensors alone: "
            "torch.save(model.state_dict(), path)"
        )
    pickle = entries[f"{folder}/data.pkl"]
    file.seek(pickle.begin)
    tensors = find_tensors(load_pickle(file, pickle.end - pickle.begin)[0])
    if file.tell() != pickle.end:
        raise ValueError("its pickle does not end where its entry does")
    order = b"little"
    if f"{folder}/byteorder" in entries:
        entry = entries[f"{folder}/byteorder"]
        file.seek(entry.begin)
        order = file.read(min(entry.end - entry.begin, 16))
    if order not in (b"little", b"big"):
        raise ValueError(f"its byteorder must be little or big, got {order!r}")
    begin = f"{folder}/data/"
    places = {name.removeprefix(begin): e for name, e in entries.items() if name.startswith(begin)}
    return tensors, places, order == b"big"


def _read_sequence(
    file: BufferedReader, size: int
) -> tuple[dict[str, Tensor], dict[str, Entry], bool]:
    """Returns the same for the older format, which is several pickles followed by the storages.

    In this format storages are little-endian on all machines.
    """
    file.seek(0)
    for number in (_MAGIC, _VERSION):
        if load_pickle(file)[0] != number:
            raise ValueError(f"it does not begin with the numbers {_MAGIC} and {_VERSION}")
    load_pickle(file)  # describes the machine that wrote the file
    content, dtypes = load_pickle(file)
    keys, _ = load_pickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"it must list its storages, got {shorten(keys)}")
    places: dict[str, Entry] = {}
    at = file.tell()
    for key in keys:
        if key in places or key not in dtypes:
            raise ValueError(f"it lists the storage {shorten(key)} twice, or without a tensor")
        file.seek(at)
        count = file.read(8)
        at += 8
        end = at + int.from_bytes(count, "little") * dtypes[key].itemsize
        if len(count) < 8 or end > size:
            raise ValueError(f"it is truncated, in its storage {shorten(key)}")
        places[key] = Entry(at - 8, at, end)
        at = end
    if at != size:
        raise ValueError(f"it has {size - at} bytes left over")
    return find_tensors(content), places, False


def find_tensors(content: Any) -> dict[str, Tensor]:
    """Returns the one dictionary of tensors in a file's content, without its other values."""
    if not isinstance(content, dict):
        raise ValueError("it must hold a dictionary of tensors, such as model.state_dict()")
    candidates = [("the whole file", content), *content.items()]
    found = [(key, value) for key, value in candidates if _has_tensors(value)]
    if len(found) != 1:
        names = ", ".join(shorten(key) for key, _ in found[:5])
        raise ValueError(
            "it must hold one dictionary of tensors, such as model.state_dict(), it has "
            f"{len(found)}{f' ({names})' if found else ''}. Save the one that you mean alone: "
            "torch.save(model.state_dict(), path)"
        )
    [(_, names)] = found
    tensors = {name: tensor for name, tensor in names.items() if isinstance(tensor, Tensor)}
    if not all(isinstance(name, str) for name in tensors):
        raise ValueError("its tensors must have names")
    while prefix := next((x for x in _WRAPPERS if all(name.startswith(x) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _has_tensors(x: Any) -> bool:
    return isinstance(x, dict) and any(isinstance(value, Tensor) for value in x.values())


def _place(path: Path, tensor: Tensor, places: dict[str, Entry], big_endian: bool) -> TorchTensor:
    """Returns the position of a tensor, after a check that its storage exists and has its size."""
    storage: Storage = tensor.storage
    if storage.key not in places:
        raise ValueError(f"the storage {shorten(storage.key)} is missing")
    begin, end = places[storage.key][1:]
    width = storage.dtype.itemsize
    if (storage.start + storage.size) * width > end - begin:
        raise ValueError(
            f"the storage {shorten(storage.key)} should have {storage.size} numbers of {width} "
            f"bytes, it has {end - begin} bytes"
        )
    first = begin + storage.start * width + tensor.offset * tensor.dtype.itemsize
    return TorchTensor(path, tensor.dtype, tensor.shape, tensor.strides, first, big_endian)


def _fill(
    target: np.ndarray, file: BufferedReader, at: int, strides: Sequence[int], path: Path
) -> None:
    """Reads numbers that begin at the byte `at` and are `strides` bytes apart along each axis.

    The strides must not increase. If the file has the order of the array, its bytes are read into
    the array. Otherwise they are read in blocks and copied.
    """
    width = target.dtype.itemsize
    row = width + sum((n - 1) * x for n, x in zip(target.shape[1:], strides[1:], strict=True))
    if target.flags.c_contiguous and tuple(strides) == target.strides:
        file.seek(at)
        _read_into(file, target.reshape(-1), path)
    elif row > _BLOCK:
        for i, part in enumerate(target):
            _fill(part, file, at + i * strides[0], strides[1:], path)
    else:
        step = max(1, _BLOCK // max(1, strides[0]))
        for i in range(0, len(target), step):
            part = target[i : i + step]
            block = np.empty((len(part) - 1) * strides[0] + row, np.uint8)
            file.seek(at + i * strides[0])
            _read_into(file, block, path)
            part[...] = np.ndarray(part.shape, target.dtype, block, 0, strides)


def _read_into(file: BufferedReader, array: np.ndarray, path: Path) -> None:
    if file.readinto(array.view(np.uint8).data) != array.nbytes:
        raise ValueError(f"{path} has become shorter since it was opened.")
