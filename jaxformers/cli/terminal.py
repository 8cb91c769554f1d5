"""Messages from a terminal or a pipe, and Ctrl-C while they are read and answered."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Collection
from typing import Any

PAUSE = 0.02  # lines of a paste come within fewer seconds
WAKE = 0.25


class Terminal:
    """The messages of whoever types, one at a time, until the end of the input.

    Within a `with` block and at a terminal, Ctrl-C forgets the line that is typed, with a
    KeyboardInterrupt if there is one. At other times it makes `asked` true, so that an answer can
    end after a whole token, and only another Ctrl-C raises. Input that is no terminal leaves Ctrl-C
    as it is.

    Arguments:
        commands: messages that are never a part of others.
    """

    def __init__(self, commands: Collection[str]):
        self.commands, self.asked = commands, False
        self.is_terminal = sys.stdin.isatty()
        self._is_reading, self._prompt = False, ""
        self._readline: Any = None
        self._lines: list[str] = []  # that were read with the message before
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Terminal":
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # with it, the arrow keys edit the line

                self._readline = readline
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if hasattr(signal, "setitimer"):
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def read(self, prompt: str) -> str | None:
        """Returns the next message, None at the end of the input.

        Lines that are there at once at a terminal, as after a paste, are one message.
        """
        self.asked = False
        lines = [self._next(prompt)]
        if lines[0] is None or lines[0].strip() in self.commands:
            return lines[0]
        while self._lines or self._has_more():
            line = self._next("")
            if line is None:
                break
            if line.strip() in self.commands:
                self._lines.insert(0, line)
                break
            lines.append(line)
        return "\n".join(x for x in lines if x is not None)

    def _next(self, prompt: str) -> str | None:
        """Returns the next line, None at the end of the input."""
        if self._lines:
            return self._lines.pop(0)
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        if not sys.stdout.isatty():  # the prompt is no part of what is written to a file
            print(end=prompt, file=sys.stderr, flush=True)
            prompt = ""
        self._is_reading, self._prompt = True, prompt
        try:
            # A Ctrl-C between Python and the wait of readline is noticed at the next signal alone.
            self._wake(WAKE)
            return input(prompt)
        except EOFError:
            return None
        finally:
            self._is_reading = False
            self._wake(0)

    def _wake(self, seconds: float) -> None:
        if signal.SIGINT in self._before and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def _has_more(self) -> bool:
        """Returns whether a terminal has another line already."""
        if not self.is_terminal or os.name != "posix":
            return False
        return bool(select.select([sys.stdin], [], [], PAUSE)[0])

    def _interrupt(self, *_: object) -> None:
        if self._is_reading and self._is_line_empty():
            # This may come after a line was read, which an exception would lose.
            os.write(sys.stdout.fileno(), f"\n{self._prompt}".encode())
        elif self._is_reading or self.asked:
            self._is_reading = self.asked = False
            raise KeyboardInterrupt
        else:
            self.asked = True

    def _is_line_empty(self) -> bool:
        """Returns whether nothing has been typed, as far as that is known."""
        edits = self._readline is not None and sys.stdout.isatty()
        return edits and not self._readline.get_line_buffer()
