"""The text of one row of tokens while it grows: whole characters, up to the end of the row.

A token is a piece of bytes: it may end within a character, and a word may depend on the tokens
before it. So the text of new tokens is that by which the decoded text of a short window grows. The
window begins with tokens whose text is out already. Text that may still change, and text that may
be the beginning of a stop string, is kept back.
"""

from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are no character, or none yet
# A character has at most four bytes. If so many tokens do not end with a whole one, their bytes are
# no characters, and there is nothing to wait for.
LONGEST = 8
WIDEST = 64  # the most tokens of a window, which grows while they have no text


class WholeCharacters:
    """The text of tokens that come one by one.

    Arguments:
        decode: a function from a list of ids to their text.
        before: tokens before the first one, which are not part of the text. A tokenizer may write
            the first word of a text without the space that it has after other words.

    Example:
        >>> text = WholeCharacters(lambda ids: bytes(ids).decode(errors="replace"))
        >>> [text.add(byte) for byte in "aé!".encode()]
        ['a', '', 'é', '!']
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()):
        self._decode = decode
        self._ids = list(before)  # the window: its first `_read` tokens are out
        self._read = len(self._ids)
        self._out = len(decode(self._ids)) if self._ids else 0  # the characters that are out

    def add(self, token: int) -> str:
        """Returns the characters that are certain with one more token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = text.rstrip(UNKNOWN)
        if len(certain) == len(text):
            piece = text[self._out :]
            self._move(bool(piece))
        elif len(self._ids) - self._read >= LONGEST:  # only the last bytes can become a character
            end = max(len(certain), len(text) - 3)
            piece, rest = text[self._out : end], len(text) - max(end, self._out)
            self._ids, self._read = self._ids[-LONGEST // 2 :], 0
            self._out = len(self._decode(self._ids)) - rest
        else:
            piece = certain[self._out :]
            self._out += len(piece)
        return piece

    def _move(self, has_grown: bool) -> None:
        """Moves the window to the tokens whose text is out since the last time."""
        if has_grown:
            self._ids = self._ids[self._read :]
        elif len(self._ids) > WIDEST:
            self._ids.pop()
        # Tokens without text, such as special ones, say nothing of how the next word joins.
        self._read = len(self._ids)
        self._out = len(self._decode(self._ids))

    def finish(self) -> str:
        """Returns the characters that were kept back."""
        piece = self._decode(self._ids)[self._out :] if self._ids else ""
        self._out += len(piece)
        return piece


class StopStrings:
    """The text up to the first of some strings, which may come in several pieces.

    Arguments:
        strings: the text ends before the first of them that is complete.

    Example:
        >>> stop = StopStrings(["END"])
        >>> stop.add("The E"), stop.add("N"), stop.add("D."), stop.found
        ('The ', '', '', True)
    """

    def __init__(self, strings: Sequence[str] = ()):
        self._strings = tuple(strings)
        self._kept = ""
        self.found = False

    @property
    def kept(self) -> str:
        """The end of the text so far that may begin a string."""
        return self._kept

    def add(self, piece: str, may_end: bool = True) -> str:
        """Returns the text that no stop string can begin in any more.

        Arguments:
            piece: the next piece of the text.
            may_end: whether a stop string that is complete with this piece ends the text.
        """
        text = self._kept + piece
        places = [text.find(x) for x in self._strings]
        places = [place for place in places if place >= 0]
        if places and may_end:
            self._kept, self.found = "", True
            return text[: min(places)]
        width = max(map(self._overlap, [text] * len(self._strings), self._strings), default=0)
        end = len(text) - width
        self._kept = text[end:]
        return text[:end]

    def finish(self) -> str:
        """Returns the text that was kept back."""
        text, self._kept = self._kept, ""
        return text

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Returns how long an end of the text is that begins the string, without all of it."""
        longest = min(len(text), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class RowText:
    """The text of a row of new tokens, and the reason for its end.

    Arguments:
        characters: from tokens to characters.
        stop: the stop strings.
        ends: the tokens, and the sequences of tokens, that end the row. A single token is not part
            of the text.
        least: as many tokens come before an end.
    """

    def __init__(
        self,
        characters: WholeCharacters,
        stop: Sequence[str] = (),
        ends: Sequence[Sequence[int]] = (),
        least: int = 0,
    ):
        self._characters, self._stop = characters, StopStrings(stop)
        self._ends, self._least = [list(end) for end in ends], least
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    @property
    def is_running(self) -> bool:
        return self.finish_reason is None

    @property
    def length(self) -> int:
        """The number of characters so far, those that are kept back for a stop string included."""
        return len(self.text) + len(self._stop.kept)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the row."""
        return self._stop.found

    def add(self, token: int) -> str:
        """Returns the text that is certain with one more token; nothing after the end."""
        if not self.is_running:
            return ""
        self.tokens.append(token)
        may_end = len(self.tokens) >= self._least
        is_end = may_end and any(self.tokens[-len(end) :] == end for end in self._ends)
        piece = "" if is_end and [token] in self._ends else self._characters.add(token)
        piece = self._stop.add(piece, may_end)
        if is_end and not self._stop.found:
            piece += self._rest()
        if is_end or self._stop.found:
            self.finish_reason = "stop"
        self.text += piece
        return piece

    def finish(self) -> str:
        """Returns the text that was kept back, at the end of the tokens."""
        if not self.is_running:
            return ""
        piece = self._rest()
        self.finish_reason = "stop" if self._stop.found else "length"
        self.text += piece
        return piece

    def _rest(self) -> str:
        piece = self._stop.add(self._characters.finish())
        return piece if self._stop.found else piece + self._stop.finish()
