"""A job of the engine whose tokens become text."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jaxformers.serving.job import Follower, Job, Token
from jaxformers.serving.options import Options
from jaxformers.serving.token_text import Listed
from jaxformers.text.row_text import RowText


class Prompt(NamedTuple):
    """What a row continues.

    Arguments:
        ids: the tokens before the first new one.
        before: those of them that the new text continues; of an encoder-decoder none.
        source: what an encoder reads; None for a model without one.
        text: the prompt as text, where it has to be repeated.
    """

    ids: list[int]
    before: list[int]
    source: list[int] | None = None
    text: str = ""

    @property
    def length(self) -> int:
        """The number of tokens that a client has sent."""
        return len(self.ids if self.source is None else self.source)


class Piece(NamedTuple):
    """What is new of an answer.

    Arguments:
        answer: its number.
        text: whole characters, of which there may be none.
        listed: tokens whose text is out.
        is_last: whether the answer has ended.
        error: what went wrong, if anything did.
    """

    answer: int
    text: str
    listed: list[Listed]
    is_last: bool = False
    error: BaseException | None = None


class TextJob(Job):
    """A row whose tokens become text as they come.

    Arguments:
        index: of the answer among those of its request.
        prompt: what it continues.
        max_new_tokens, follower: as of `Job`.
        options: of the request.
        row: the text, empty so far.
        ends: the tokens that end it and are no part of it.
        tell: hears of each piece if answers come as events, and of the last one in any case. It
            is called in the thread of the engine.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        max_new_tokens: int,
        options: Options,
        follower: Follower | None,
        row: RowText,
        ends: frozenset[int],
        tell: Callable[[Piece], None],
    ):
        sampling = replace(options.sampling, index=index)
        super().__init__(prompt.ids, max_new_tokens, sampling, prompt.source, follower)
        self.index, self.row = index, row
        self.listed: list[Listed] = []
        self._ends, self._tell, self._options = ends, tell, options
        self._waiting: list[Listed] = []  # tokens whose text is kept back
        self._unsent = ""
        self._failure: Exception | None = None

    def receive(self, token: Token) -> bool:
        if self.is_cancelled:
            return False
        offset = self.row.length
        try:
            piece = self.row.add(token.id)
        except Exception as error:  # of the tokenizer
            self._failure = error
            return False
        is_end = not self.row.is_running and not self.row.is_stopped and token.id in self._ends
        if self._options.lists and not is_end:
            self._waiting.append(Listed(token, offset))
        if self._options.streams and self.row.is_running:
            self._send(piece)
        else:
            self._unsent = piece
        return self.row.is_running

    def end(self, error: BaseException | None = None) -> None:
        last = "" if error or self.is_cancelled else self._finish()
        listed = self._out(is_last=True)
        piece = self._unsent + last
        self._tell(Piece(self.index, piece, listed, True, error or self._failure))

    def _finish(self) -> str:
        try:
            return self.row.finish()
        except Exception as error:
            self._failure = error
            return ""

    def _send(self, piece: str) -> None:
        listed = self._out()
        if piece or listed:
            self._tell(Piece(self.index, piece, listed))

    def _out(self, is_last: bool = False) -> list[Listed]:
        """Returns the tokens whose text is out since the last time; none of a stop string are."""
        length, all_ = len(self.row.text), is_last and not self.row.is_stopped
        out = [x for x in self._waiting if all_ or x.offset < length]
        self._waiting = self._waiting[len(out) :]
        self.listed += out
        return out
