"""Ctrl-C and SIGTERM as a question that is answered between two steps.

Python runs the handler of a signal in the main thread, between two of its instructions. While that
thread is in a loader, a compiler or a callback, this can take long. So a second thread, which the
system wakes at once, saves what was reached, and has the main thread leave a loader that does not
return.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")

SIGNALS = signal.SIGINT, signal.SIGTERM
PATIENCE = 2.0  # seconds that a loader has to return once a signal has come
# Its handler interrupts a sleep or a wait of the main thread; without one, nothing happens at it.
NUDGE = getattr(signal, "SIGURG", None)  # Windows has neither of the two
CHILD = getattr(signal, "SIGCHLD", None)


class Stopped(BaseException):
    """Leaves a loader after a signal; no `Exception`, which a loader may take for a failed read."""


class Interrupt:
    """While it is entered, Ctrl-C and SIGTERM set `asked`; a second one does what it did before.

    Only the main thread can listen to signals; elsewhere nothing is changed.

    Arguments:
        save: function that saves what was reached. The second thread calls it after a signal, at
            once or as soon as the main thread is `elsewhere`.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self.asked: signal.Signals | None = None
        self._save = save
        self._before: dict[int, Any] = {}
        self._state = threading.Lock()  # the main thread has it, except while it is elsewhere
        self._state.acquire()
        self._error: Exception | None = None  # of saving in the second thread
        self._fetching = False
        self._watch: _Watch | None = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handle(number, self._ask)
            self._watch = _Watch(self._rescue, self._insist)
            _ENTERED.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*self._before)
        if self._watch is not None:
            _ENTERED.remove(self)
            self._watch.end()
            self._watch = None

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """While it is entered, the main thread neither changes what `save` saves nor saves."""
        self._state.release()
        try:
            yield
        finally:
            self._fetching = False  # even if `Stopped` came just before `fetch` was to say so
            self._state.acquire()  # if it is being saved, wait for that
            error, self._error = self._error, None
            if error is not None:
                raise error

    def fetch(self, get: Callable[[], Item]) -> Item:
        """What a loader's function returns.

        Raises:
            Stopped: if a signal came before or meanwhile. Whatever the loader raises then is due to
                it: Ctrl-C in a terminal reaches the processes of a loader, too, and ends them.
        """
        if self.asked is None:
            try:
                self._fetching = True
                item = get()
                if self.asked is None:
                    return item
            except Exception:
                if self.asked is None:
                    raise
            finally:
                self._fetching = False
        raise Stopped

    def each(self, begin: Callable[[], Iterator[Item]]) -> Iterator[Item]:
        """The items of a loader, which a function begins to read, each by `fetch`."""
        iterator = self.fetch(begin)
        while True:
            try:
                item = self.fetch(lambda: next(iterator))
            except StopIteration:
                return
            yield item

    def pass_on(self) -> None:
        """What SIGTERM was to do, once all is saved: end the program, unless others handle it."""
        if self.asked == signal.SIGTERM:
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                sys.exit(128 + signal.SIGTERM)  # as a shell counts it, but with all cleaned up
            signal.raise_signal(signal.SIGTERM)

    def forget(self) -> None:
        """In a forked child, such as a loader's worker: signals do what they did before."""
        with contextlib.suppress(ValueError):
            self._restore(*self._before)
            if self._watch is not None:
                signal.set_wakeup_fd(self._watch.others)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self._restore(*SIGNALS)
        if NUDGE is not None:
            self._handle(NUDGE, self._leave)
        others = None if CHILD is None else signal.getsignal(CHILD)
        if CHILD is not None and callable(others):
            self._handle(CHILD, _without_errors(others))

    def _leave(self, *_: object) -> None:
        if self._fetching:
            raise Stopped

    def _handle(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._before:
                # None is a handler that was not set from Python: there is no way to bring it back.
                before = self._before.pop(number)
                signal.signal(number, signal.SIG_DFL if before is None else before)

    # What the second thread does.

    def _rescue(self) -> None:
        if self._state.acquire(blocking=False):
            try:
                self._save()
            except Exception as error:
                self._error = error  # for the main thread
            finally:
                self._state.release()

    def _insist(self) -> None:
        if self.asked is not None:
            self._rescue()
            main = threading.main_thread().ident
            if NUDGE is not None and self._fetching and main is not None:
                signal.pthread_kill(main, NUDGE)


class _Watch:
    """The second thread. The system writes the number of each signal to a socket that it reads.

    Arguments:
        rescue: called at once when one of `SIGNALS` comes.
        insist: called every `PATIENCE` seconds after that.
    """

    def __init__(self, rescue: Callable[[], None], insist: Callable[[], None]):
        self._rescue, self._insist = rescue, insist
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        # What others, such as a loop of asyncio, have to be told, too; -1 if there are none.
        self.others = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        signal.set_wakeup_fd(self.others)
        self._mouth.send(b"\0")  # no signal has this number; forked children keep it open
        self._thread.join()
        self._ear.close()
        self._mouth.close()

    def _run(self) -> None:
        while True:
            try:
                byte = self._ear.recv(1)
            except TimeoutError:
                self._insist()
                continue
            if byte == b"\0":
                return
            if byte[0] in SIGNALS:
                self._ear.settimeout(PATIENCE)
                self._rescue()
            if self.others != -1:
                with contextlib.suppress(OSError):
                    os.write(self.others, byte)


_ENTERED: list[Interrupt] = []  # the last one is the innermost


def _forget_all() -> None:
    while _ENTERED:
        _ENTERED.pop().forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _without_errors(handler: Callable[..., Any]) -> Callable[..., None]:
    """A handler of SIGCHLD; torch's raises an error, wherever the main thread is."""

    def quiet(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(Exception):
            handler(number, frame)

    return quiet
