"""The state of a training in a directory: saved in the background, rotated, restored."""

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
    """The last states of a training in a directory, one file each, written in the background.

    `save` copies the state to the host, which is all that a step waits for; a thread writes it. At
    any moment, killed processes and full disks included, the directory holds whole checkpoints:
    one gets its name when it is safe on the disk, and only then an older one goes. `restore` fills
    a skeleton with the whole state; `jaxformers.load(directory)` needs none, and gives the model.

    Arguments:
        directory: made if it is not there; one process writes to it at a time.
        every: after how many steps `fit` saves, 500.
        keep: how many checkpoints stay, 3.

    Raises:
        ValueError: if a number is not positive.
        OSError: if the directory cannot be written to, or another process has it.
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
        self._broken: set[int] = set()  # found when restoring, gone after the next save

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, the newest last."""
        return steps_in(self.directory)

    def save(self, training: Any, step: int) -> None:
        """Copy a state to the host, and begin to write it.

        It waits if the last one is still being written. Arrays may be donated afterwards. If the
        last one could not be written, this one is tried all the same before the error is raised.

        Arguments:
            training: any pytree; its arrays and Python numbers are kept, and of its model how that
                is built: of what is called `model` in it, or the first module of a tuple.
            step: how many steps it has behind it.

        Raises:
            ValueError: if there are later steps (of another training), or an array is spread over
                several hosts.
            OSError: if the last one could not be written.
        """
        failed = self._join()
        whole = [other for other in self.steps() if other not in self._broken]
        step = check_step(step, whole, self.directory)
        # Not a daemon: a program that ends waits until it is written.
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
            self._error = error  # for the next call
        except Exception as error:
            self._error = OSError(f"{self._path(step)} could not be written: {error!r}")

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: if it could not be; earlier checkpoints are as they were.
        """
        failed = self._join()
        if failed is not None:
            raise failed

    def _join(self) -> OSError | None:
        """What went wrong with the last save, when it is over."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._error = self._error, None
        return failed

    def restore(self, like: Tree) -> tuple[Tree, int] | None:
        """The newest state that is whole, in the form of a skeleton, and its step.

        Of one that is damaged a warning says what is wrong, and the one before is taken.

        Arguments:
            like: a tree like the one that was saved, whose arrays (or their `ShapeDtypeStruct`s)
                say where the new ones go. Leaves that are neither arrays nor numbers are kept.

        Returns:
            The state and its step, or None if there are no checkpoints.

        Raises:
            ValueError: if the state is of another training, naming what differs, or all
                checkpoints are damaged.
            OSError: if one cannot be read.
        """
        self.wait()
        with self._claim.mutex:  # another object of this directory may be writing
            return self._restore(like)

    def _restore(self, like: Tree) -> tuple[Tree, int] | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                saved = read_object(self._path(step))
                leaves = leaves_of(self._path(step), saved, step)
            except ValueError as error:  # damaged; what cannot be read now may be read later
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
    """Returns the steps of the checkpoints that are there, the newest last."""
    files = (path for path in directory.iterdir() if path.is_file())
    names = (_NAME.fullmatch(path.name) for path in files)
    return sorted(int(name[1]) for name in names if name)


def step_path(directory: Path, step: int) -> Path:
    """Returns the file of a checkpoint."""
    return directory / f"step-{step:09}.safetensors"


def leaves_of(path: Path, saved: Any, step: int) -> dict[str, Any]:
    """Returns the leaves in what a file holds, by path; raises if it is not that step's state."""
    if (
        not isinstance(saved, dict)
        or saved.keys() != {"step", "leaves"}
        or saved["step"] != step
        or not isinstance(saved["leaves"], dict)
    ):
        raise ValueError(f"{path} holds no state of a training at step {step}.")
    return saved["leaves"]


def _current(leaves: dict[str, Any], like: Any, where: str) -> dict[str, Any]:
    """Returns what any version saved by the paths that a skeleton has now."""
    found = match(leaves, like)
    for path, neutral in found.removed.items():
        check_removed(leaves[path], neutral, f"{path} in {where}")
    return found.renamed(leaves) | found.added


def _clean(directory: Path) -> None:
    """Removes what a process that was killed has left."""
    for path in directory.iterdir():
        if _LEFT_OVER.fullmatch(path.name) and path.is_file():
            path.unlink()
