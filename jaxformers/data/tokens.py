"""Token ids on disk or in memory, divided into documents.

A token file is a directory that `python -m jaxformers tokenize` writes:

    tokens.npy   the ids of all documents one after the other, uint16 or uint32
    ends.npy     the index at which each document ends, int64
    tokens.json  counts, the size of the vocabulary, checksums; written last
    tokenizer/   the tokenizer
    lock         an empty file, locked by the command that writes the others

All arrays are read through a memory map, so a file may be larger than the memory.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers.checks import check_size
from jaxformers.files.json_file import read_json

FORMAT = "jaxformers tokens 1"
CHUNK = 2**22


def open_tokens(source: Any, vocab_size: int | None = None) -> "Tokens":
    """Opens token ids in any of several forms and checks them.

    Arguments:
        source: the directory of a token file; a `.npy` file; a 1-D array of integers, such as an
            `np.memmap`; a list of documents, each a sequence of integers; or `Tokens`.
        vocab_size: ids must be below this number. The default is the number in the token file, or
            no limit.

    Raises:
        ValueError: if a file is missing, truncated, empty, of the wrong type, or has no integers.
            Ids beyond the vocabulary raise it when they are read, or all at once in
            `Tokens.verify`.

    Example:
        >>> tokens = open_tokens([[3, 1, 4], [1, 5]], vocab_size=6)
        >>> len(tokens), tokens.ends
        (5, array([3, 5]))
    """
    if vocab_size is not None:
        check_size(vocab_size=vocab_size)
    if isinstance(source, Tokens):
        if vocab_size is None:
            return source
        return Tokens(source.ids, source.ends, vocab_size, source.name, source.checksum)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return _open_directory(path, vocab_size)
        return Tokens(_open_npy(path), None, vocab_size, str(path))
    if isinstance(source, Sequence) and len(source) and not isinstance(source[0], int | np.integer):
        documents = [_check_ids(ids, f"document {k}") for k, ids in enumerate(source)]
        ends = np.cumsum([len(ids) for ids in documents])
        # Each document is converted alone: uint64 and int64 together would become floats.
        return Tokens(np.concatenate([ids.astype(np.int64) for ids in documents]), ends, vocab_size)
    return Tokens(source, None, vocab_size)


class Tokens:
    """The ids of documents one after the other, as `open_tokens` returns them.

    Attributes:
        ids: (n,) integers, in memory or mapped.
        ends: (documents,) the index at which each document ends; None if it is unknown.
        vocab_size: ids are below this number; None if it is unknown.
        name: the name of the tokens in errors.
        checksum: the CRC-32 of the ids in a token file, or None.

    Example:
        >>> len(Tokens(np.array([3, 1, 4])))
        3
    """

    def __init__(
        self,
        ids: Any,
        ends: np.ndarray | None = None,
        vocab_size: int | None = None,
        name: str = "tokens",
        checksum: int | None = None,
    ):
        self.ids = _check_ids(ids, name)
        if not len(self.ids):
            raise ValueError(f"{name} must hold at least one token, got none.")
        self.ends, self.vocab_size, self.name, self.checksum = ends, vocab_size, name, checksum

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        documents = "" if self.ends is None else f" in {len(self.ends)} documents"
        return f"Tokens({self.name}: {len(self)}{documents}, vocab_size={self.vocab_size})"

    @property
    def starts(self) -> np.ndarray:
        """The index at which each document begins, (documents,)."""
        ends = self.documents()
        return np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each document, (documents,)."""
        return np.diff(self.documents(), prepend=0)

    def documents(self) -> np.ndarray:
        """Returns the index at which each document ends, or raises an error if it is unknown."""
        if self.ends is None:
            raise ValueError(
                f"{self.name} must say where its documents end, got ids alone. Pass a list of "
                "documents, or a token file that `python -m jaxformers tokenize` wrote."
            )
        return np.asarray(self.ends)

    def rows(
        self, starts: np.ndarray, lengths: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns texts as the rows of an array, padded with 0 on the right.

        Arguments:
            starts: (b,) the index at which each text begins.
            lengths: (b,) the number of tokens of each text, at most `width`.
            width: the number of tokens in a row.

        Returns:
            `(tokens, real)`: int32 and boolean `(b, width)`.

        Raises:
            ValueError: if an id is negative or beyond the vocabulary.
        """
        tokens = np.zeros((len(starts), width), np.int32)
        for row, start, length in zip(tokens, starts.tolist(), lengths.tolist(), strict=True):
            part = self.ids[start : start + length]
            self._check(part, start)
            row[:length] = part
        return tokens, np.arange(width) < lengths[:, None]

    def split(self, share: float) -> tuple["Tokens", "Tokens"]:
        """Returns two parts, for training and validation. The second has a share of the tokens.

        If there are several documents, the cut is between two of them.

        Raises:
            ValueError: if one of the parts would be empty.

        Example:
            >>> train, validation = open_tokens(range(100)).split(0.1)
            >>> len(train), len(validation)
            (90, 10)
        """
        if not isinstance(share, float | np.floating) or not 0 < share < 1:
            raise ValueError(f"share must be a number between 0 and 1, got {share!r}.")
        cut, first, second = len(self) - round(share * len(self)), None, None
        if self.ends is not None and len(self.ends) > 1:
            k = min(max(1, int(np.searchsorted(self.ends, cut)) + 1), len(self.ends) - 1)
            cut, first, second = int(self.ends[k - 1]), self.ends[:k], self.ends[k:]
            second = second - cut
        elif self.ends is not None and 0 < cut < len(self):
            first, second = np.array([cut]), np.array([len(self) - cut])
        if not 0 < cut < len(self):
            raise ValueError(
                f"{len(self)} tokens do not divide into two parts, the last a share of {share}. "
                "Choose another share."
            )
        return (
            Tokens(self.ids[:cut], first, self.vocab_size, self.name),
            Tokens(self.ids[cut:], second, self.vocab_size, f"the end of {self.name}"),
        )

    def verify(self) -> None:
        """Reads all ids and checks them.

        Raises:
            ValueError: if an id is negative or beyond the vocabulary, the documents' ends do not
                ascend to the last token, or the checksum of the ids is wrong.
        """
        checksum = 0
        for start in range(0, len(self), CHUNK):
            part = np.ascontiguousarray(self.ids[start : start + CHUNK])
            self._check(part, start)
            checksum = zlib.crc32(part.data, checksum)
        if self.checksum is not None and checksum != self.checksum:
            raise ValueError(f"{self.name} is damaged: its checksum is wrong. Tokenize again.")
        if self.ends is not None:
            ends = np.asarray(self.ends)
            if ends[0] < 0 or ends[-1] != len(self) or (np.diff(ends) < 0).any():
                raise ValueError(
                    f"{self.name} is damaged: its documents' ends do not ascend to {len(self)}. "
                    "Tokenize again."
                )

    def _check(self, part: np.ndarray, start: int) -> None:
        """Raises an error if one of these ids, the first at `start`, is not in the vocabulary."""
        limit = 2**31 if self.vocab_size is None else self.vocab_size
        if not len(part) or 0 <= part.min() and part.max() < limit:
            return
        at = int(np.flatnonzero((part < 0) | (part >= limit))[0])
        raise ValueError(
            f"token {start + at} of {self.name} must be an id from 0 to {limit - 1}, got "
            f"{part[at]}. It was made by another tokenizer, or is damaged."
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type for ids of this vocabulary, little-endian: uint16 or uint32.

    Example:
        >>> token_dtype(50257)
        dtype('uint16')
    """
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_id(below: int = 2**31, **ids: Any) -> int:
    """Returns the one id that was given, or raises an error."""
    ((name, token),) = ids.items()
    if isinstance(token, bool | np.bool) or not isinstance(token, int | np.integer):
        raise ValueError(f"{name} must be the id of a token, an integer, got {token!r}.")
    if not 0 <= token < below:
        raise ValueError(f"{name} must be an id from 0 to {below - 1}, got {token}.")
    return int(token)


def _open_directory(path: Path, vocab_size: int | None) -> Tokens:
    header = path / "tokens.json"
    if not header.exists():
        unfinished = (path / "progress.json").exists()
        raise ValueError(
            f"{path} is a token file that is not finished. Run the same `python -m jaxformers "
            "tokenize` again: it goes on where it stopped."
            if unfinished
            else f"{path} is no token file: there is no tokens.json. Make one with "
            "`python -m jaxformers tokenize`."
        )
    said = read_json(header)
    names = ("tokens", "documents", "vocab_size", "checksum")
    if said.get("format") != FORMAT or not all(type(said.get(name)) is int for name in names):
        raise ValueError(f"{header} must be of the format {FORMAT!r}. Tokenize again.")
    if vocab_size is not None and said["vocab_size"] > vocab_size:
        raise ValueError(
            f"{path} has ids of a vocabulary of {said['vocab_size']}, got vocab_size={vocab_size}. "
            "Build the model with the vocabulary of the tokenizer."
        )
    ids, ends = _open_npy(path / "tokens.npy"), _open_npy(path / "ends.npy")
    wanted = {"tokens.npy": (said["tokens"], token_dtype(said["vocab_size"]))}
    wanted["ends.npy"] = (said["documents"], np.dtype("<i8"))
    for array, (name, (count, dtype)) in zip((ids, ends), wanted.items(), strict=True):
        if array.shape != (count,) or array.dtype != dtype:
            raise ValueError(
                f"{path / name} must hold {count} of {dtype}, as tokens.json says, got "
                f"{array.shape} of {array.dtype}. Tokenize again."
            )
    if not len(ends) or ends[-1] != len(ids):
        raise ValueError(
            f"{path / 'ends.npy'} must end at the last token, {len(ids)}. Tokenize again."
        )
    return Tokens(ids, ends, vocab_size or said["vocab_size"], str(path), said["checksum"])


def _open_npy(path: Path) -> np.ndarray:
    """Returns the array of a `.npy` file, mapped."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. Pass a directory that `python -m jaxformers tokenize` wrote."
        )
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            need = file.tell() + dtype.itemsize * int(np.prod(shape, dtype=object))
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is no .npy file: {error}. Raw ids, as nanoGPT writes them, are opened with "
            "np.memmap(path, dtype=np.uint16)."
        ) from None
    have = path.stat().st_size
    if have < need:
        raise ValueError(
            f"{path} is truncated: {shape} of {dtype} need {need} bytes, it has {have}. "
            "Copy it again, or tokenize again."
        )
    if dtype.hasobject:
        raise ValueError(f"{path} must hold integers, got Python objects. Save it as integers.")
    if 0 in shape:  # an empty array cannot be mapped
        return np.zeros(shape, dtype)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _check_ids(ids: Any, name: str) -> np.ndarray:
    """Returns `ids` as a 1-D array of integers, still mapped if they were."""
    try:
        array = np.asanyarray(ids)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if array.dtype.kind not in "iu" and array.size or array.ndim != 1:
        raise ValueError(
            f"{name} must hold integer ids in one row, got shape {array.shape} of dtype "
            f"{array.dtype}. Cast whole numbers with .astype(int); flatten rows with .reshape(-1)."
        )
    return array if array.size else np.zeros(0, np.int64)
