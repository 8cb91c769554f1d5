"""Compiled programs on disk, so that a second run starts at once."""

import os
import tempfile
from pathlib import Path

import jax


def keep_compiled_programs(directory: str | os.PathLike | None = None) -> Path:
    """Makes JAX keep compiled programs in a directory, and look there before it compiles.

    The setting holds for the whole process, so the library never makes it by itself. JAX stays with
    the first directory that it has used. It does not keep a program that takes less than a second
    to compile, unless its own settings say otherwise.

    Arguments:
        directory: the directory. None is the one that JAX is set to use
            (`JAX_COMPILATION_CACHE_DIR`), or else `jaxformers/programs` in the user's cache
            directory.

    Returns:
        The directory.

    Raises:
        ValueError: if the directory cannot be created or written.

    Example:
        >>> keep_compiled_programs("programs")  # doctest: +SKIP
        PosixPath('programs')
    """
    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    chosen = told if directory is None else directory
    if chosen is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = Path(home) / "jaxformers" / "programs"
    path = Path(chosen)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"compiled programs need a directory that can be written, got {path}: {error}. Pass "
            "another one, or do without."
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path
