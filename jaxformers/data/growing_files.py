"""Files that grow in steps and stay usable after a kill."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = 128  # bytes before the numbers of a .npy file


def open_array(path: Path, size: int) -> BinaryIO:
    """Opens a file for appending, cut to its first `size` bytes, which include the header."""
    have = path.stat().st_size if path.exists() else 0
    if size > HEADER and have < size:
        raise ValueError(
            f"{path} has {have} bytes, {size} were written. Remove {path.parent} and start again."
        )
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def header(count: int, dtype: np.dtype) -> bytes:
    """Returns the first bytes of a `.npy` file with `count` numbers."""
    buffer = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    if len(buffer.getvalue()) != HEADER:
        raise ValueError(f"NumPy wrote a header of {len(buffer.getvalue())} bytes, not {HEADER}.")
    return buffer.getvalue()
