"""Ctrl-C and SIGTERM as a question that is answered between two steps."""

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While it is entered, Ctrl-C and SIGTERM set `asked`; a second one does what it did before.

    Only the main thread can listen to signals; elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None is a handler that was not set from Python: there is no way to bring it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def pass_on(self) -> None:
        """What SIGTERM was to do, once all is saved: end the program, unless others handle it."""
        if self.asked == signal.SIGTERM:
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                sys.exit(128 + signal.SIGTERM)  # as a shell counts it, but with all cleaned up
            signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self.__exit__()
