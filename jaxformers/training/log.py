"""What a run tells: a line of JSON for each step, TensorBoard's curves, a progress bar."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import jax

FILE_NAME = "metrics.jsonl"
REFRESH = 1.0  # seconds over which the speed is taken
SMOOTHING = 0.95  # of the loss it shows


class Log:
    """Takes the figures of a run that goes on after step `done`; leave it to close the files.

    Arguments:
        directory: gets `metrics.jsonl` and, where the package tensorboard is installed, its event
            file; None writes nothing. Lines there of steps after `done` are dropped: those steps
            are made again.
        done: the steps made before.
        steps: those there will be in all.
        progress: whether to show a progress bar, on standard error.

    Raises:
        ValueError: if the directory cannot be written.
        ImportError: if there is to be a progress bar and tqdm is missing.
    """

    def __init__(self, directory: str | os.PathLike | None, done: int, steps: int, progress: bool):
        first = jax.process_index() == 0  # of many hosts, one tells
        self._bar = _Bar(done, steps) if progress and first and _can_show() else None
        self._file = self._events = None
        if directory is not None and first:
            self._file = _File(Path(directory), done)
            self._events = _events(Path(directory), done)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._each("close")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Put down the figures of a step."""
        self._each("write", step, metrics)

    def say(self, text: str) -> None:
        """Show a line above the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.say(text)

    def _each(self, what: str, *args: Any) -> None:
        """Have each do something; whatever cannot any more is let go, since a run is worth more."""
        for name in ("_file", "_events", "_bar"):
            sink = getattr(self, name)
            try:
                if sink is not None:
                    getattr(sink, what)(*args)
            except (OSError, ValueError) as error:
                setattr(self, name, None)
                warnings.warn(f"the run goes on without its {sink.name}: {error}", stacklevel=4)

    def warn(self, text: str) -> None:
        """Say it where it is seen, with or without a bar."""
        if self._bar is not None:
            self._bar.say(text)
        else:
            warnings.warn(text, stacklevel=3)

    def sync(self) -> None:
        """Have what was written on disk, before a checkpoint is there that relies on it."""
        if self._file is not None:
            self._file.sync()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a log, `metrics.jsonl` or the directory it is in, as dicts.

    What is not finite is None there. A line that a killed run left unfinished does not count.

    Raises:
        ValueError: if there is no such file, or a line before its end is no step's.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what ends in no newline is unfinished
    except OSError as error:
        raise ValueError(f"there is no log to read at {path}: {error}.") from error
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
    """`metrics.jsonl`, opened after what is kept of it."""

    name = FILE_NAME

    def __init__(self, directory: Path, done: int):
        self.path, self.unwritten = directory / FILE_NAME, b""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                kept = [row for row in _whole_rows(self.path) if row["step"] <= done]
                new = self.path.with_suffix(".new")
                with new.open("wb") as file:
                    file.writelines(map(_line, kept))
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self.path)
            self.file = FileIO(self.path, "a")
        except OSError as error:
            raise ValueError(
                f"the log needs a directory that can be written, got {directory}: {error}."
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # Python writes the shortest text that gives the same number again. JSON has no NaN.
        figures = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self.unwritten += _line({"step": step, **figures})
        try:
            self._flush()
        except OSError as error:
            # A full disk is no reason to stop: the line is tried again with the next.
            warnings.warn(f"{self.path} cannot be written: {error}", stacklevel=2)

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
            warnings.warn(f"{self.path} lacks its last lines: {error}", stacklevel=2)
        finally:
            self.file.close()


class _Bar:
    """tqdm's bar with the latest figures."""

    name = "progress bar"

    def __init__(self, done: int, steps: int):
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError(
                "the progress bar needs tqdm: pip install 'jaxformers[train]', or pass "
                "progress=False."
            ) from None
        # A terminal is painted over, a file gets longer.
        interval = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm(
            initial=done, total=steps, unit="step", mininterval=interval, dynamic_ncols=True
        )
        self.since, self.tokens, self.speed = time.perf_counter(), 0.0, math.nan
        self.loss, self.first = math.nan, True

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:
            return
        loss, now = metrics["loss"], time.perf_counter()
        if math.isfinite(loss):
            share = SMOOTHING if math.isfinite(self.loss) else 0.0
            self.loss = (1 - share) * loss + (share * self.loss if share else 0.0)
        self.tokens += metrics["tokens"]
        if self.first:  # what compiling took says nothing about the steps to come
            self.since, self.tokens, self.first = now, 0.0, False
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
        self.bar.update(1)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class _Events:
    """TensorBoard's event file."""

    name = "TensorBoard events"

    def __init__(self, directory: Path, done: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventFileWriter(str(directory))
        # Has TensorBoard forget the steps from here on, which are made again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.add(done + 1, session_log=start)

    def add(self, step: int, **what: Any) -> None:
        self.writer.add_event(self.event(wall_time=time.time(), step=step, **what))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self.add(step, summary=self.summary(value=values))

    def close(self) -> None:
        self.writer.close()


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The lines there; of a damaged file, put aside, those before the damage."""
    try:
        return read_metrics(path)
    except ValueError as error:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        warnings.warn(f"the log is damaged, and put aside as {aside}: {error}", stacklevel=7)
    whole = []
    for line in aside.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            whole += [row] if isinstance(row["step"], int) else []
        except (ValueError, TypeError, KeyError):
            break
    return whole


def _can_show() -> bool:
    """Whether there is somebody to show a bar to: a daemon's standard error is closed, or None."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def _events(directory: Path, done: int) -> _Events | None:
    try:
        return _Events(directory, done)
    except ImportError:
        return None


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
