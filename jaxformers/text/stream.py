"""Text that is given out while it is generated."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxformers.text.row_text import RowText


class TextStream(Iterator[Any]):
    """The text of new tokens in pieces of whole characters, as the tokens come.

    It yields a string for one prompt, and for a list of prompts a list with a string for each,
    which may be empty. The pieces of a prompt together are the text that the call without streaming
    returns. `close` ends the generation early, as do the end of a `with` block and an interrupt.
    Several threads may ask for pieces, each of which goes to one of them.

    Arguments:
        columns: an iterator of the new tokens, an array `(b,)` at a time. If it has a method
            `close`, that is called at the end.
        rows: the text of each row, empty so far.
        is_single: whether there is one prompt, and no list of them.
        at_end: a function that is called once with the stream, at its end or when it is closed, but
            not after an error.

    Example:
        >>> from jaxformers.text.row_text import WholeCharacters
        >>> row = RowText(WholeCharacters(lambda ids: bytes(ids).decode(errors="replace")))
        >>> stream = TextStream(iter([np.array([104]), np.array([105])]), [row], is_single=True)
        >>> list(stream), stream.text, stream.finish_reason
        (['h', 'i'], 'hi', 'length')
    """

    def __init__(
        self,
        columns: Any,
        rows: list[RowText],
        is_single: bool,
        at_end: Callable[["TextStream"], None] | None = None,
    ):
        self.columns, self._rows, self._is_single, self._at_end = columns, rows, is_single, at_end
        self._is_open, self._lock = True, threading.RLock()

    @property
    def text(self) -> Any:
        """The text so far, or a list of texts."""
        return self._given([row.text for row in self._rows])

    @property
    def tokens(self) -> Any:
        """The new tokens so far as a list of ids, or a list of those."""
        return self._given([list(row.tokens) for row in self._rows])

    @property
    def finish_reason(self) -> Any:
        """The reason of the end, or a list of reasons.

        "stop" is an end token or a stop string, "length" is the largest number of new tokens, and
        None means that the text has not ended.
        """
        return self._given([row.finish_reason for row in self._rows])

    def __next__(self) -> Any:
        with self._lock:
            while self._is_open:
                try:
                    pieces = self._read()
                except Exception:
                    self._is_open = False
                    raise
                except BaseException:  # an interrupt
                    self.close()
                    raise
                if not any(row.is_running for row in self._rows):
                    self.close()
                if any(pieces):
                    return self._given(pieces)
            raise StopIteration

    def close(self) -> None:
        """Ends the generation. The text so far remains."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            if hasattr(self.columns, "close"):
                self.columns.close()
            if self._at_end is not None:
                self._at_end(self)

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> list[str]:
        """Returns the pieces of text with the next column, or at the end of the columns."""
        try:
            column = next(self.columns)
        except StopIteration:
            return [row.finish() for row in self._rows]
        tokens = np.asarray(column).tolist()
        return [row.add(token) for row, token in zip(self._rows, tokens, strict=True)]

    def _given(self, values: list[Any]) -> Any:
        """Returns the value of the only row, or all of them."""
        return values[0] if self._is_single else values
