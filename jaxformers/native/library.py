"""The library of operations in C: built once for a processor, tested, and loaded."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import jax

from jaxformers.compilation_cache import user_cache

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
OPERATIONS = "attend", "rows_times", "rows_times_transpose", "product"
FLAGS = "-std=gnu11", "-O3", "-shared", "-fPIC"
_preparing = threading.Lock()  # threads may ask at the same time
_loaded: list[ctypes.CDLL] = []  # a library that is in use must stay loaded


@cache
def obstacle() -> str | None:
    """Returns why there are no operations in C on this machine, or None if there are.

    The first call on a machine compiles them, which takes some seconds. `JAXFORMERS_NATIVE=0` in
    the environment does without them.

    Example:
        >>> obstacle() is None or isinstance(obstacle(), str)
        True
    """
    with _preparing:
        return _prepare()


def target(operation: str) -> str:
    """Returns the name by which programs of XLA call an operation.

    It holds the key of the sources, so that a compiled program on disk never meets another version.
    """
    return f"jaxformers_{operation}_{_key()}"


def has_matrix_units() -> bool:
    """Returns whether a library is in use and the processor has units for products (AMX).

    Example:
        >>> has_matrix_units() in (True, False)
        True
    """
    return any(library.jaxformers_matrix_units() for library in _loaded)


def register(path: Path) -> None:
    """Loads a library, and tells JAX its operations."""
    try:
        library = ctypes.CDLL(str(path))
        for name in OPERATIONS:
            handler = jax.ffi.pycapsule(getattr(library, f"jaxformers_{name}"))
            jax.ffi.register_ffi_target(target(name), handler, platform="cpu")
        library.jaxformers_matrix_units()  # a program from the disk may use them at once
    except (OSError, AttributeError, RuntimeError) as error:
        raise _Unavailable(f"the library {path} cannot be loaded: {error}") from error
    _loaded.append(library)


class _Unavailable(Exception):
    """There are no operations in C; the text says why."""


@cache
def _prepare() -> str | None:
    try:
        _load()
    except (_Unavailable, OSError, RuntimeError, ValueError) as error:
        logger.info("no operations in C: %s", error)
        return str(error)
    return None


def _load() -> None:
    """Loads the library for this processor, and builds it if there is none that loads."""
    if os.environ.get("JAXFORMERS_NATIVE") == "0":
        raise _Unavailable("JAXFORMERS_NATIVE=0 turns them off")
    if os.name != "posix" or sys.byteorder != "little":
        raise _Unavailable("they are for Linux and macOS on processors that are little-endian")
    path = user_cache() / "native" / f"{_key()}.so"
    if path.exists():
        if path.stat().st_uid not in (os.getuid(), 0):
            raise _Unavailable(f"the library {path} belongs to another user")
        try:
            return register(path)
        except _Unavailable as error:
            logger.info("%s. It is built again.", error)
    compiler = _compiler()
    _check_writable(path.parent)
    failure = path.with_name(f"{path.stem}-{_identity(compiler)}.failed")
    if failure.exists():
        raise _Unavailable(f"{failure.read_text()} (delete {failure} to try again)")
    try:
        _build(compiler, path)
    except _Unavailable as error:
        failure.write_text(str(error))
        raise
    register(path)


def _compiler() -> list[str]:
    """Returns the command of the C compiler, which has arguments in `CC="ccache gcc"`."""
    told = os.environ.get("CC", "").strip()
    if told:
        return [told] if shutil.which(told) else shlex.split(told)
    found = shutil.which("cc") or shutil.which("clang")
    if not found:
        raise _Unavailable("there is no C compiler (cc) on this machine")
    return [found]


def _identity(compiler: list[str]) -> str:
    """Returns a name for a compiler, which is another one after an upgrade."""
    files = [Path(x).stat() for x in map(shutil.which, compiler) if x]
    return _digest(*compiler, *(f"{x.st_size} {x.st_mtime_ns}" for x in files))


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise _Unavailable(f"the cache directory {directory} cannot be written: {error}") from error


def _build(compiler: list[str], path: Path) -> None:
    """Compiles the sources to `path`, which exists only if the library passed its test."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise _Unavailable("there is no Python interpreter that could test them")
    logger.info("compiling operations in C to %s", path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        library = Path(scratch) / path.name
        sources = [str(x) for x in sorted(SOURCES.glob("*.c"))]
        include = f"-I{jax.ffi.include_dir()}"
        for processor in (["-march=native"], []):  # some compilers know no `native`
            options = *FLAGS, *processor, include, "-o", str(library)
            command = [*compiler, *options, *sources, "-lm"]
            told = _run(command, "the C compiler")
            if told is None:
                break
            logger.info("%s %s: %s", shlex.join(compiler), " ".join(processor), told)
        else:
            raise _Unavailable(told)
        told = _run(
            [sys.executable, "-P", "-m", "jaxformers.native.check", str(library)], "their test"
        )
        if told is not None:
            raise _Unavailable(told)
        os.replace(library, path)


def _run(command: list[str], what: str) -> str | None:
    """Runs a command; returns why it failed, or None if it did not."""
    # Settings of the user's program, such as JAX_DISABLE_JIT or warnings that are errors, are
    # none of the test's.
    unwanted = "JAX_", "XLA_", "PYTHONWARNINGS"
    environment = {k: x for k, x in os.environ.items() if not k.startswith(unwanted)}
    environment |= {"JAX_PLATFORMS": "cpu", "JAXFORMERS_NATIVE": "0"}
    home = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), home])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{what} could not run: {error}"
    if done.returncode == 0:
        return None
    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return f"{what} ended with {done.returncode}: {' '.join(last)}"


@cache
def _key() -> str:
    """Returns a name for these sources, this version of XLA's interface and this processor."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        files = [*sorted(x for x in SOURCES.iterdir() if x.is_file()), header]
        texts = [path.read_text("utf-8") for path in files]
    except OSError as error:
        raise _Unavailable(f"a source cannot be read: {error}") from error
    return _digest(*texts, *FLAGS, platform.platform(), _processor())


def _processor() -> str:
    """Returns what a compiler may rely on: the machine, and the features of its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    features = [x for x in lines if x.startswith(("flags", "Features"))]
    return f"{platform.machine()} {features[0] if features else platform.processor()}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
