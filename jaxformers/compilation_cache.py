"""Compiled programs on disk, so that a second run starts at once."""

import os
import tempfile
from pathlib import Path

import jax


def keep_compiled_programs(directory: str | os.PathLike | None = None) -> Path:
    """Have JAX keep what it compiles in a directory, and look there before it compiles.

    A setting of the whole process, which is why nothing here makes it unasked; JAX stays with the
    first directory that it has used. What takes less than
    a second to compile is not kept; JAX's own settings change that.

    Arguments:
        directory: None is the one JAX was already told (`JAX_COMPILATION_CACHE_DIR`), or else
            `jaxformers/programs` in the user's cache directory.

    Returns:
        The directory.

    Raises:
        ValueError: if there is a file of that name, or it cannot be made.

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
