"""The right to write to a directory, which one process has at a time."""

import contextlib
import errno
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK = "lock"  # the file in the directory that is locked; its text is the number of the process


class Claim:
    """The right to write to a directory, which the system takes back when the process ends.

    Arguments:
        directory: the directory, which is made if it does not exist.
        wanted: the name in errors for the files to be written.
        owner: the name in errors for another process that has the directory.
        clean: function that removes files of a killed process from the directory.

    Raises:
        OSError: if the directory cannot be written to, or another process has it.
    """

    mutex: threading.Lock  # for threads of this process

    def __init__(self, directory: Path, wanted: str, owner: str, clean: Callable[[Path], None]):
        self.mutex = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f"{LOCK}.{os.getpid()}.tmp"
            probe.write_bytes(b"0")
            probe.unlink(missing_ok=True)  # the owner of the directory may have removed it
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{wanted} cannot be written to {directory}: {error.strerror or error}. Pass a "
                "directory that can be written to",
            ) from error
        self.let_go = weakref.finalize(self, os.close, descriptor)
        _lock(descriptor, directory, owner)
        for path in directory.glob(f"{LOCK}.*.tmp"):
            path.unlink(missing_ok=True)
        clean(directory)


def claim(directory: Path, wanted: str, owner: str, clean: Callable[[Path], None]) -> Claim:
    """Returns the claim of this process to a directory. All objects of the process share it.

    The directory is free again when the last of them is deleted. Arguments and errors are those of
    `Claim`.
    """
    own = os.getpid(), os.path.realpath(directory)
    there = _CLAIMS.get(own) or Claim(directory, wanted, owner, clean)
    _CLAIMS[own] = there
    return there


@contextlib.contextmanager
def alone(
    directory: Path, wanted: str, owner: str, clean: Callable[[Path], None]
) -> Iterator[None]:
    """Holds the claim to a directory inside of `with`, also against threads of this process.

    Arguments and errors are those of `Claim`.
    """
    own = claim(directory, wanted, owner, clean)
    try:
        if not own.mutex.acquire(blocking=False):
            raise BlockingIOError(errno.EAGAIN, _in_use(directory, owner, str(os.getpid())))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.truncate(directory / LOCK, 0)
            own.mutex.release()
    finally:
        del own  # otherwise a traceback that is kept would keep the claim


def _lock(descriptor: int, directory: Path, owner: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError):  # the file system has no locks
            warnings.warn(f"{directory} has no guard against a second run: {error}", stacklevel=6)
            return
        process = os.read(descriptor, 20).decode(errors="replace").strip()
        raise OSError(error.errno, _in_use(directory, owner, process or "unknown")) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def _in_use(directory: Path, owner: str, process: str) -> str:
    return (
        f"{directory} is in use by {owner} (process {process}). Wait until it ends, or pass "
        "another directory"
    )


_CLAIMS: weakref.WeakValueDictionary[tuple, Claim] = weakref.WeakValueDictionary()


def _let_go() -> None:
    """Drops all claims in a forked child, such as a loader's worker, which may live longer."""
    for there in list(_CLAIMS.values()):
        there.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
