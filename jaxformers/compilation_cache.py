"""Compiled programs on disk, so that a second run starts at once."""

import os
import tempfile
from pathlib import Path

import jax

from jaxformers.warn import warn_once

# The setting of JAX for the seconds that a program must have taken to compile.
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_compiled_programs(directory: str | os.PathLike | None = None) -> Path | None:
    """Makes JAX keep compiled programs in a directory, and look there before it compiles.

    The setting holds for the whole process, so a program calls this, never the library. The command
    line, the server and the examples do. JAX stays with the first directory that it has used. All
    programs are kept, also those that compile in less than a second, unless
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says how long it must have taken.

    With `JAX_ENABLE_COMPILATION_CACHE=0` in the environment nothing is kept.

    Arguments:
        directory: the directory. None is the one that JAX is set to use
            (`JAX_COMPILATION_CACHE_DIR`), or else `jaxformers/programs` in the user's cache
            directory.

    Returns:
        The directory, or None if nothing is kept.

    Raises:
        ValueError: if the given directory cannot be created or written.

    Warns:
        UserWarning: once, if no directory is given and the default cannot be created or written.

    Example:
        >>> keep_compiled_programs("programs")  # doctest: +SKIP
        PosixPath('programs')
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    chosen = told if directory is None else directory
    if chosen is None:
        chosen = user_cache() / "programs"
    path = Path(chosen)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        message = f"compiled programs need a directory that can be written, got {path}: {error}."
        if directory is not None:
            raise ValueError(f"{message} Pass another one, or do without.") from error
        warn_once(f"{message} They are not kept. JAX_COMPILATION_CACHE_DIR names another one.")
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    if _LEAST not in os.environ and getattr(jax.config, _LEAST.lower()) == 1.0:  # JAX's default
        jax.config.update(_LEAST.lower(), 0.0)
    return path


def user_cache() -> Path:
    """Returns the directory of this package in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache").expanduser()
    return Path(home) / "jaxformers"
