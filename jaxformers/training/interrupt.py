"""Ctrl-C and SIGTERM as a question that is answered between two steps."""

import signal
import threading
from types import FrameType


class Interrupt:
    """While it is entered, Ctrl-C and SIGTERM set `asked`; a second one does what it did before.

    Only the main thread can listen to signals; elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None is a handler that was not set from Python: there is no way to bring it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self.__exit__()
