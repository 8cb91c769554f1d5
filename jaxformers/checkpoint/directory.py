"""Checkpoints of a training in a directory, written in the background."""

import os
import re
import threading
import warnings
from pathlib import Path
from typing import Any

from jaxformers.checkpoint.migration import check_removed, match
from jaxformers.checkpoint.model_file import SavedState, check_path, read_object, write_object
from jaxformers.checkpoint.trained_model import describe_model
from jaxformers.checkpoint.training_state import (
    Tree,
    check_alike,
    check_step,
    describe,
    replaced,
    snapshot,
)
from jaxformers.checks import check_size
from jaxformers.files.claim import claim
from jaxformers.files.safetensors_file import check_package

_NAME = re.compile(r"step-(\d{9,})\.safetensors")
_LEFT_OVER = re.compile(r"step-\d{9,}\.safetensors\.\d+\.\d+\.tmp")


class Checkpoints:
    """The last checkpoints of a training in a directory, one file each, written in the background.

    `save` copies the state to the host, and a thread writes it; a training step waits only for the
    copy. The checkpoints in the directory are complete at any moment, even after a killed process
    or on a full disk. A checkpoint gets its name when it is safely on the disk, and an older one is
    deleted only after that. `restore` fills a skeleton with the whole state.
    `jaxformers.load(directory)` returns the model alone, and needs no skeleton.

    Arguments:
        directory: created if it does not exist. One process at a time writes to it.
        every: number of steps between two checkpoints of `fit`, 500.
        keep: number of checkpoints that are kept, 3.

    Raises:
        ValueError: if a number is not positive.
        OSError: if the directory cannot be written to, or another process uses it.
        ImportError: if the `safetensors` package is missing.

    Example:
        >>> import tempfile
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=2)
        >>> for step in (10, 20, 30):
        ...     checkpoints.save({"w": jnp.full(3, step)}, step)
        >>> checkpoints.wait()
        >>> checkpoints.steps()
        [20, 30]
        >>> training, step = checkpoints.restore({"w": jnp.zeros(3, jnp.int32)})
        >>> print(training["w"], step)
        [30 30 30] 30
    """

    directory: Path
    every: int
    keep: int

    def __init__(self, directory: str | os.PathLike, every: int = 500, keep: int = 3):
        check_size(every=every, keep=keep)
        check_package()
        self.directory, self.every, self.keep = check_path(directory), every, keep
        self._claim = claim(self.directory, "checkpoints", "another training", _clean)
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._broken: set[int] = set()  # found by restore, deleted after the next save

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints in the directory, the newest last."""
        return steps_in(self.directory)

    def save(self, training: Any, step: int) -> None:
        """Copies a state to the host, and starts to write it.

        It waits while the last state is still being written. Afterwards the arrays may be donated.
        If the last state could not be written, `save` still starts to write this state, and then
        raises the error.

        Arguments:
            training: any pytree. The checkpoint holds its arrays and Python numbers, and a
                description of its model. The model is the part called `model`, or the first module
                of a tuple.
            step: number of steps that the state has been trained for.

        Raises:
            ValueError: if the directory has checkpoints of later steps, which belong to another
                training, or if an array is spread over several hosts.
            OSError: if the last state could not be written.
        """
        failed = self._join()
        whole = [other for other in self.steps() if other not in self._broken]
        step = check_step(step, whole, self.directory)
        # The thread is not a daemon: a program that ends waits until the state is written.
        arguments = snapshot(training), step, describe_model(training)
        self._thread = threading.Thread(target=self._write, args=arguments)
        self._thread.start()
        if failed is not None:
            raise failed

    def _write(self, leaves: dict[str, Any], step: int, model: str) -> None:
        try:
            with self._claim.mutex:
                write_object(self._path(step), SavedState(step, leaves, model))
                self._broken.discard(step)
                whole = [other for other in self.steps() if other not in self._broken]
                for old in [*whole[: -self.keep], *self._broken]:
                    self._path(old).unlink(missing_ok=True)
                self._broken.clear()
        except OSError as error:
            self._error = error  # the next call raises it
        except Exception as error:
            self._error = OSError(f"{self._path(step)} could not be written: {error!r}")

    def wait(self) -> None:
        """Waits until the last state is written.

        Raises:
            OSError: if it could not be written. Earlier checkpoints are unchanged.
        """
        failed = self._join()
        if failed is not None:
            raise failed

    def _join(self) -> OSError | None:
        """Waits for the last save, and returns its error or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._error = self._error, None
        return failed

    def restore(self, like: Tree) -> tuple[Tree, int] | None:
        """Returns the newest complete state in the form of a skeleton, and its step.

        It skips a damaged checkpoint with a warning, and reads the one before it.

        Arguments:
            like: a tree with the structure of the saved one, the skeleton. The new arrays get the
                placement of its arrays or `ShapeDtypeStruct`s. Leaves that are neither arrays nor
                numbers are kept.

        Returns:
            The state and its step, or None if there are no checkpoints.

        Raises:
            ValueError: if the state belongs to another training, or if all checkpoints are damaged.
                The error names the leaves that differ.
            OSError: if a checkpoint cannot be read.
        """
        self.wait()
        with self._claim.mutex:  # another object may be writing to this directory
            return self._restore(like)

    def _restore(self, like: Tree) -> tuple[Tree, int] | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                saved = read_object(self._path(step))
                leaves = leaves_of(self._path(step), saved, step)
            except ValueError as error:  # damaged; after an OSError a later read may succeed
                self._broken.add(step)
                warnings.warn(f"a checkpoint is skipped: {error}", stacklevel=2)
                continue
            leaves = _current(leaves, like, str(self._path(step)))
            check_alike(describe(leaves), like, str(self._path(step)))
            return replaced(like, leaves), step
        if steps:
            raise ValueError(
                f"{self.directory} has checkpoints of the steps {', '.join(map(str, steps))}, and "
                "all are damaged. Delete them to begin anew."
            )
        return None

    def _path(self, step: int) -> Path:
        return step_path(self.directory, step)


def steps_in(directory: Path) -> list[int]:
    """Returns the steps of all checkpoints in a directory, the newest last."""
    files = (path for path in directory.iterdir() if path.is_file())
    names = (_NAME.fullmatch(path.name) for path in files)
    return sorted(int(name[1]) for name in names if name)


def step_path(directory: Path, step: int) -> Path:
    """Returns the path of a checkpoint's file."""
    return directory / f"step-{step:09}.safetensors"


def leaves_of(path: Path, saved: Any, step: int) -> dict[str, Any]:
    """Returns the leaves by path in the content of a file.

    Raises:
        ValueError: if the content is not the state at this step.
    """
    if (
        not isinstance(saved, dict)
        or saved.keys() != {"step", "leaves"}
        or saved["step"] != step
        or not isinstance(saved["leaves"], dict)
    ):
        raise ValueError(f"{path} holds no state of a training at step {step}.")
    return saved["leaves"]


def _current(leaves: dict[str, Any], like: Any, where: str) -> dict[str, Any]:
    """Returns the saved leaves of any version by the paths that a skeleton has now."""
    found = match(leaves, like)
    for path, neutral in found.removed.items():
        check_removed(leaves[path], neutral, f"{path} in {where}")
    return found.renamed(leaves) | found.added


def _clean(directory: Path) -> None:
    """Removes the temporary files of killed processes."""
    for path in directory.iterdir():
        if _LEFT_OVER.fullmatch(path.name) and path.is_file():
            path.unlink()
