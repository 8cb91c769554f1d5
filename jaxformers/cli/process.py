"""The streams, warnings and interrupts of a process that runs a command."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from _thread import interrupt_main
from collections.abc import Iterator
from typing import Any

AGAIN = 0.02  # seconds


@contextlib.contextmanager
def process() -> Iterator[None]:
    """Runs a command with open streams, warnings of one line, and Ctrl-C that is never lost."""
    open_streams()
    before = sys.unraisablehook

    def interrupt_again(found: Any) -> None:
        """Repeats a Ctrl-C that came within a callback, whose exceptions go nowhere."""
        if found.exc_type is not KeyboardInterrupt:
            return before(found)
        timer = threading.Timer(AGAIN, interrupt)
        timer.daemon = True
        timer.start()

    with warnings.catch_warnings():
        warnings.showwarning = note
        sys.unraisablehook = interrupt_again
        try:
            yield
        finally:
            sys.unraisablehook = before


def interrupt() -> None:
    """Interrupts the main thread, also where it waits for input."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGINT)
    else:
        interrupt_main()


def open_streams() -> None:
    """Opens streams that the process began without, or files would get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the end
    # A terminal that lacks a character gets a substitute.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def note(message: Any, *_: Any, **__: Any) -> None:
    """Says a warning in one line, without the line of code that it came from."""
    print("note:", " ".join(str(message).split()), file=sys.stderr)


def failed(error: Any) -> int:
    """Says an error in one line. Returns the exit status."""
    with contextlib.suppress(OSError):  # whatever is left to write may not be written either
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
    return 1


def drop_output() -> None:
    """Sends standard output nowhere, or its rest would fail again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
