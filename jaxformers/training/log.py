"""The log of a run: a line of JSON for each step, TensorBoard's curves, a progress bar."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import jax

from jaxformers.training.events import Events
from jaxformers.training.notices import LOGGER, warn_and_go_on

FILE_NAME = "metrics.jsonl"
REPORTED = "reported"  # this file has the last step with a complete evaluation and callbacks
REFRESH = 1.0  # the speed is a mean over this many seconds
SMOOTHING = 0.95  # of the loss in the progress bar


class Log:
    """The log of a run that goes on after step `done`, a context that closes the files at its end.

    Arguments:
        directory: gets `metrics.jsonl` and, where the package tensorboard is installed, its event
            file; None writes nothing. Lines of steps after `done` are removed from it, because
            those steps are made again.
        done: the number of steps made before.
        steps: the number of steps in all.
        progress: whether to show a progress bar on standard error, if tqdm is installed.
        due: whether an evaluation and callbacks follow step `done`. The attribute `due` says
            whether they are still missing. If they are, the line of that evaluation is removed.

    The attribute `metrics` has the figures of step `done` that are in the log.

    Raises:
        ValueError: if the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike | None,
        done: int,
        steps: int,
        progress: bool,
        due: bool = False,
    ):
        first = self._first = jax.process_index() == 0  # only the first of many hosts writes
        self.due, self.metrics = due, dict[str, float]()
        self._bar = _Bar.opened(done, steps) if progress and first and _can_show() else None
        self._file = self._events = self._reported = None
        if directory is not None and first:
            self._reported = Path(directory, REPORTED)
            before = _read_step(self._reported)
            self.due = due and before < done
            if before > done:  # later steps and their evaluations are made again
                self.reported(done)
            self._file = _File(Path(directory), done, self.due)
            self.metrics = self._file.last
            self._events = Events.opened(Path(directory), done)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._each("close")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the figures of a step."""
        self._each("write", step, metrics)

    def say(self, text: str) -> None:
        """Shows a line above the progress bar, if there is one."""
        if self._bar is not None:
            self._each("say", text)

    def tell(self, text: str) -> None:
        """Shows a line above the progress bar, or logs it. It is information, not a warning."""
        if self._bar is not None:
            self._each("say", text)
        elif self._first:
            # Without any setup of `logging`, Python shows this level on standard error.
            LOGGER.warning(text)

    def warn(self, text: str) -> None:
        """Shows a line above the progress bar, or warns."""
        if self._bar is not None:
            self._each("say", text)
        elif self._first:
            warn_and_go_on(text, 5)

    def compiling(self) -> None:
        """Shows that the first step is being compiled."""
        self._each("compiling")

    def reported(self, step: int) -> None:
        """Records that the evaluation and the callbacks after a step are complete."""
        if self._reported is not None:
            with contextlib.suppress(OSError):  # a resumed run then does them again
                self._reported.write_text(f"{step}\n")

    def _each(self, what: str, *args: Any) -> None:
        """Calls a method of each part. A part that fails is dropped, since the run must go on."""
        for name in ("_file", "_events", "_bar"):
            sink = getattr(self, name)
            try:
                if hasattr(sink, what):
                    getattr(sink, what)(*args)
            except Exception as error:
                setattr(self, name, None)
                warn_and_go_on(f"the run goes on without its {sink.name}: {error}", 5)

    def sync(self) -> None:
        """Forces the written lines to disk, before a checkpoint that relies on them exists."""
        if self._file is not None:
            self._file.sync()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a log as dicts, from `metrics.jsonl` or the directory that has it.

    A number that was not finite is None. A last line that a killed run did not finish is left out.

    Raises:
        ValueError: if there is no such file, or a line before its end is not that of a step.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # text after the last newline is unfinished
    except OSError as error:
        raise ValueError(
            f"there is no log to read at {path}: {error}. Pass the directory of a log."
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}.") from error
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise ValueError(
                f"{path}, line {number}: must be an object with a step, got {line!r:.80}."
            )
        rows.append(row)
    return rows


class _File:
    """The file `metrics.jsonl`, to which lines are appended.

    Arguments:
        directory: the directory of the file.
        done: the last step whose lines are kept.
        again: whether the evaluation after that step is made again, so that its line is removed.
    """

    name = FILE_NAME

    def __init__(self, directory: Path, done: int, again: bool):
        self.path, self.unwritten = directory / FILE_NAME, b""
        self.last: dict[str, float] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                kept = [row for row in _whole_rows(self.path) if row["step"] <= done]
                kept = [row for row in kept if row["step"] < done or "loss" in row or not again]
                self.last = _figures(row for row in kept if row["step"] == done)
                new = self.path.with_suffix(".new")
                with new.open("wb") as file:
                    file.writelines(map(_line, kept))
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self.path)
            self.file = FileIO(self.path, "a")
        except OSError as error:
            raise ValueError(
                f"the log needs a directory that can be written, got {directory}: {error}. "
                "Pass another one."
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # Python writes the shortest text that gives the same number again. JSON has no NaN.
        figures = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self.unwritten += _line({"step": step, **figures})
        try:
            self._flush()
        except OSError as error:
            # A full disk is no reason to stop: the line is written again together with the next.
            warn_and_go_on(f"{self.path} cannot be written: {error}", 3)

    def _flush(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) or 0 :]

    def sync(self) -> None:
        self._flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        try:
            self._flush()
        except OSError as error:
            warn_and_go_on(f"{self.path} lacks its last lines: {error}", 3)
        finally:
            self.file.close()


class _Bar:
    """The progress bar of tqdm with the latest figures."""

    name = "progress bar"

    @classmethod
    def opened(cls, done: int, steps: int) -> "_Bar | None":
        """Returns a bar, or None if tqdm is missing or fails."""
        try:
            return cls(done, steps)
        except ImportError:
            LOGGER.warning("There is no progress bar without tqdm: pip install 'jaxformers[train]'")
        except Exception as error:
            LOGGER.warning("There is no progress bar: %r", error)
        return None

    def __init__(self, done: int, steps: int):
        from tqdm import tqdm

        # In a terminal the bar overwrites itself. In a file each refresh adds a line.
        interval = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm(
            initial=done, total=steps, unit="step", mininterval=interval, dynamic_ncols=True
        )
        self.since, self.tokens, self.speed = time.perf_counter(), 0.0, math.nan
        self.loss, self.first = math.nan, True

    def compiling(self) -> None:
        self.bar.set_postfix_str("compiling")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:
            return
        loss, now = metrics["loss"], time.perf_counter()
        if math.isfinite(loss):
            share = SMOOTHING if math.isfinite(self.loss) else 0.0
            self.loss = (1 - share) * loss + (share * self.loss if share else 0.0)
        self.tokens += metrics["tokens"]
        if self.first:  # the time of compiling says nothing about the next steps
            self.since, self.tokens = now, 0.0
        elif now - self.since >= REFRESH:
            self.speed = self.tokens / (now - self.since)
            self.since, self.tokens = now, 0.0
        rate, skipped = metrics.get("learning_rate"), metrics["skipped"]
        parts = [
            f"loss {self.loss:.3f}",
            "" if rate is None else f"rate {rate:.1e}",
            f"gradient {metrics['gradient_norm']:.2g}",
            f"{self.speed:,.0f} tokens/s" if math.isfinite(self.speed) else "",
            f"{skipped:.0f} skipped" if skipped else "",
        ]
        self.bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)
        if self.first:  # counts as made before, so that tqdm's rate leaves it out
            self.first = False
            self.bar.n = self.bar.initial = self.bar.last_print_n = self.bar.n + 1
            self.bar.unpause()  # starts the clock of tqdm
            self.bar.refresh()
        else:
            self.bar.update(1)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log. If it is damaged, the file is renamed and good lines are kept."""
    try:
        return read_metrics(path)
    except ValueError as error:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        warn_and_go_on(f"the log is damaged and was renamed to {aside}: {error}", 8)
    whole = []
    for line in aside.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            whole += [row] if isinstance(row["step"], int) else []
        except (ValueError, TypeError, KeyError):
            break
    return whole


def _can_show() -> bool:
    """Returns whether a bar can be shown: the standard error of a daemon is closed, or None."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def _read_step(path: Path) -> int:
    """Returns the step in a file, or -1 if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def _figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures in the lines of one step. None means a number that is not finite."""
    found = {name: math.nan if x is None else x for row in rows for name, x in row.items()}
    found.pop("step", None)
    return {name: float(x) for name, x in found.items() if isinstance(x, int | float)}


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
