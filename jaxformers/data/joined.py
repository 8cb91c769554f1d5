"""Ids of texts that are encoded in pieces, equal to the ids of each whole text.

Tokenizers depend on context: they add a space or "▁" before a text, remove or join spaces, compose
characters, and split words by the text that follows. Therefore each piece is encoded together with
some text before and after it. Two consecutive pieces are joined at a border between tokens around
which both have the same tokens. The context is dropped, and with it every change that the tokenizer
made only because a piece begins or ends there. If there is no such border, both pieces are encoded
again as one.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxformers.data.text_files import Piece
from jaxformers.tokenizers.files import guarded

AGREED = 8  # the number of tokens before and after a border that both pieces must share


class Part(NamedTuple):
    """Consecutive ids of a document, and whether the document ends with them."""

    ids: list[int]
    ends: bool


class Joined:
    """The ids of documents whose pieces come in order.

    The last piece may be kept until the next one shows where its ids end.

    Arguments:
        backend: a `tokenizers.Tokenizer`.
        start: the byte at which the first piece begins.
        offset: the first character of that piece whose ids are returned.

    Attributes:
        start, offset: the arguments with which to resume, since the text from there on is not
            joined yet.

    Example:
        >>> from jaxformers.tokenizers.training import bytes_tokenizer
        >>> joined = Joined(bytes_tokenizer().backend)
        >>> joined.add([Piece("ab", 2, False, "", "c"), Piece("c", 3, True, "ab", "")])
        [Part(ids=[97, 98, 99], ends=True)]
    """

    def __init__(self, backend: Any, start: int = 0, offset: int = 0):
        self._backend, self._stop, self._offset = backend, start, offset
        self._open: _Open | None = None

    @property
    def start(self) -> int:
        return self._stop if self._open is None else self._open.start

    @property
    def offset(self) -> int:
        return self._offset if self._open is None else self._open.offset

    def add(self, pieces: list[Piece]) -> list[Part]:
        """Returns the ids that are certain after these pieces, which follow the pieces before."""
        parts = []
        for piece, encoding in zip(pieces, self._encode(pieces), strict=True):
            new = _Open(piece, encoding, self._stop, self._offset)
            self._stop, self._offset = piece.stop, 0
            if self._open is not None:
                parts += self._join(self._open, new)
            else:
                self._open = new
            if self._open.piece.ends:
                parts.append(Part(self._open.ids(), True))
                self._open = None
        return parts

    def _join(self, left: "_Open", right: "_Open") -> list[Part]:
        """Returns the ids of `left` if their end is known, else nothing. The rest stays open."""
        border = None if left.count < left.wanted else _border(left, right)
        if border is not None:
            right.offset = border - len(left.piece.text)
            self._open = right
            return [Part(left.ids(border), False)]
        # The number doubles each time, so that text without a border is not encoded too often.
        if left.count >= left.wanted:
            left.wanted = 2 * left.count
        left.count += 1
        left.piece = Piece(
            left.piece.text + right.piece.text,
            right.piece.stop,
            right.piece.ends,
            left.piece.before,
            right.piece.after,
        )
        if left.count == left.wanted or left.piece.ends:
            (left.encoding,) = self._encode([left.piece])
        return []

    def _encode(self, pieces: list[Piece]) -> list[Any]:
        # The positions of tokens in the text are needed only for joining.
        whole = all(piece.ends and not piece.before for piece in pieces)
        encode = self._backend.encode_batch_fast if whole else self._backend.encode_batch
        texts = [piece.before + piece.text + piece.after for piece in pieces]
        return guarded(encode, texts, add_special_tokens=False)


@dataclass
class _Open:
    """A piece, or several as one, whose ids from a character on are still to be returned.

    Positions are counted in characters of the piece's text. Positions before it are negative.
    """

    piece: Piece
    encoding: Any
    start: int
    offset: int
    count: int = 1  # the number of pieces in it
    wanted: int = 1  # the number of pieces at which it is encoded again

    def index(self, place: int) -> int:
        """Returns the index of the first token that begins at a position or after it."""
        place += len(self.piece.before)
        return bisect_left(
            range(len(self.encoding)), place, key=lambda k: self.encoding.token_to_chars(k)[0]
        )

    def tokens(self, first: int, last: int) -> np.ndarray:
        """Returns id, begin and end `(n, 3)` of tokens that begin in `first .. last - 1`."""
        ids, shift = self.encoding.ids, len(self.piece.before)
        rows = [
            (ids[k], *(place - shift for place in self.encoding.token_to_chars(k)))
            for k in range(self.index(first), self.index(last))
        ]
        return np.array(rows, np.int64).reshape(-1, 3)

    def ids(self, border: int | None = None) -> list[int]:
        first = self.index(self.offset) if self.offset or self.piece.before else 0
        last = None if border is None else self.index(border)
        return self.encoding.ids[first:last]


def _border(left: _Open, right: _Open) -> int | None:
    """Returns the border nearest to the end of `left`, or None if the pieces share none."""
    end = len(left.piece.text)
    first, last = end - len(right.piece.before), end + len(left.piece.after)
    a = left.tokens(first, last)
    b = right.tokens(first - end, last - end) + [0, end, end]
    begins = np.flatnonzero((np.diff(a[:, 1], prepend=first) > 0) & (a[:, 1] > left.offset))
    for i in begins[np.argsort(np.abs(a[begins, 1] - end), kind="stable")].tolist():
        j = int(np.searchsorted(b[:, 1], a[i, 1]))
        if min(i, j, len(a) - i, len(b) - j) < AGREED:
            continue
        around = a[i - AGREED : i + AGREED]
        in_order = (np.diff(around[:, 1]) >= 0).all()  # marks above a letter may be swapped
        if in_order and np.array_equal(around, b[j - AGREED : j + AGREED]):
            return int(a[i, 1])
    return None
