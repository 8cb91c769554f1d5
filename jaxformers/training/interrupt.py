"""The effect of Ctrl-C and SIGTERM: a run saves its state and ends.

Python runs the handler of a signal in the main thread, between two instructions of the interpreter.
The handler therefore waits while the main thread is inside a compiler or a loader written in C. A
second thread is woken by the system at once. It saves the state, and it makes the main thread leave
a loader that does not return.
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

import jax

from jaxformers.training.agreement import Agreement

Item = TypeVar("Item")

SIGNALS = signal.SIGINT, signal.SIGTERM
PATIENCE = 2.0  # seconds that a loader has after a signal to return
# This signal interrupts a sleep or a wait of the main thread. Without a handler it does nothing.
NUDGE = getattr(signal, "SIGURG", None)  # Windows has neither SIGURG nor SIGCHLD
CHILD = getattr(signal, "SIGCHLD", None)


class Stopped(BaseException):
    """An exception that leaves a loader after a signal.

    It is not a subclass of `Exception`, because a loader may catch those and read again.
    """


class Interrupt:
    """A context in which Ctrl-C and SIGTERM set `asked`. A second signal has its usual effect.

    Only the main thread can handle signals. In other threads the context changes nothing. Of
    several hosts each may get a signal. All of them then have it as `asked` from the same `agree`
    on; on one host it is there at once.

    Arguments:
        save: a function that saves the state of the run. The second thread calls it after a signal,
            while the main thread is in `foreign_code`.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self.asked: signal.Signals | None = None
        self._heard: signal.Signals | None = None  # by this host
        self._hosts = Agreement() if jax.process_count() > 1 else None
        self._save = save
        self._before: dict[int, Any] = {}
        self._state = threading.Lock()  # the main thread holds it, except in `foreign_code`
        self._state.acquire()
        self._error: Exception | None = None  # raised when the second thread saved
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
    def foreign_code(self) -> Iterator[None]:
        """Opens a context in which the main thread leaves the state alone, so `save` may run."""
        self._state.release()
        try:
            yield
        finally:
            self._fetching = False  # `Stopped` may have been raised before `fetch` could set it
            self._state.acquire()  # waits while the state is being saved
            error, self._error = self._error, None
            if error is not None:
                raise error

    def fetch(self, get: Callable[[], Item]) -> Item:
        """Returns the result of `get`, a function of a loader.

        Raises:
            Stopped: if a signal came before or during the call. An error of the loader is then a
                consequence of the signal: Ctrl-C in a terminal also ends its worker processes.
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
        """Yields the items of the iterator that `begin` returns, each obtained by `fetch`."""
        iterator = self.fetch(begin)
        while True:
            try:
                item = self.fetch(lambda: next(iterator))
            except StopIteration:
                return
            yield item

    def agree(self) -> None:
        """Sets `asked` if any host got a signal before the last call, which each made at a step."""
        if self._hosts is not None:
            number = self._hosts.next(0 if self._heard is None else int(self._heard))
            self.asked = signal.Signals(number) if number else None

    def pass_on(self) -> None:
        """Gives SIGTERM its usual effect: it ends the program, or the user's handler runs."""
        if self.asked == signal.SIGTERM:
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                sys.exit(128 + signal.SIGTERM)  # the status that a shell reports, after cleaning up
            signal.raise_signal(signal.SIGTERM)

    def forget(self) -> None:
        """Restores the usual effect of signals in a forked child, such as a loader's worker."""
        with contextlib.suppress(ValueError):
            self._restore(*self._before)
            if self._watch is not None:
                signal.set_wakeup_fd(self._watch.others)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._heard = signal.Signals(number)
        if self._hosts is None:
            self.asked = self._heard
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
                # None is a handler that was not set from Python, and cannot be restored.
                before = self._before.pop(number)
                signal.signal(number, signal.SIG_DFL if before is None else before)

    # The second thread calls the next two methods.

    def _rescue(self) -> None:
        if self._state.acquire(blocking=False):
            try:
                self._save()
            except Exception as error:
                self._error = error  # the main thread raises it
            finally:
                self._state.release()

    def _insist(self) -> None:
        if self.asked is not None:
            self._rescue()
            main = threading.main_thread().ident
            if NUDGE is not None and self._fetching and main is not None:
                signal.pthread_kill(main, NUDGE)


class _Watch:
    """The second thread, which reads a socket to which the system writes the number of each signal.

    Arguments:
        rescue: is called at once when one of `SIGNALS` comes.
        insist: is called every `PATIENCE` seconds after that.
    """

    def __init__(self, rescue: Callable[[], None], insist: Callable[[], None]):
        self._rescue, self._insist = rescue, insist
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        # The file descriptor that was set before, for instance by a loop of asyncio, or -1.
        self.others = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        signal.set_wakeup_fd(self.others)
        # No signal has the number 0. Closing is not enough, since forked children have copies.
        self._mouth.send(b"\0")
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
    """Returns the handler of a signal with its errors suppressed.

    PyTorch's handler of SIGCHLD raises an error when a worker has ended, and it does so in any
    code that the main thread is running.
    """

    def quiet(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(Exception):
            handler(number, frame)

    return quiet
