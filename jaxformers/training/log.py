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

FILE_NAME = "metrics.jsonl"
REFRESH = 0.2  # seconds between two changes of the progress bar's text


class Log:
    """Writes the figures of a run that begins after step `done`; enter it to open the files.

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
        self.directory = None if directory is None else Path(directory)
        self.done, self.steps = done, steps
        self._bar = _bar(done, steps) if progress else None
        self._file: FileIO | None = None
        self._unwritten = b""
        self._events: Any = None

    def __enter__(self) -> "Log":
        if self.directory is not None:
            try:
                self._file = _open(self.directory, self.done)
            except OSError as error:
                raise ValueError(
                    f"the log needs a directory that can be written, got {self.directory}: {error}."
                ) from error
            self._events = _event_writer(self.directory, self.done)
        self._since, self._tokens, self._loss = time.perf_counter(), 0.0, None
        return self

    def __exit__(self, *_: object) -> None:
        for thing in (self._bar, self._file, self._events):
            if thing is not None:
                thing.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Put down the figures of a step."""
        if self._file is not None:
            # Python writes the shortest text that gives the same number again. JSON has no NaN.
            row = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
            self._unwritten += (json.dumps({"step": step, **row}) + "\n").encode()
            self._flush()
        if self._events is not None:
            _add_event(self._events, step, metrics)
        if self._bar is not None:
            self._show(metrics)

    def _flush(self) -> None:
        """A full disk is no reason to stop: what did not fit is written with the next line."""
        try:
            written = self._file.write(self._unwritten) or 0
        except OSError as error:
            warnings.warn(f"{self.directory / FILE_NAME} cannot be written: {error}", stacklevel=2)
            return
        self._unwritten = self._unwritten[written:]

    def say(self, text: str) -> None:
        """Show a line above the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Have what was written on disk, before a checkpoint is that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _show(self, metrics: Mapping[str, float]) -> None:
        if "loss" not in metrics:
            return
        self._bar.update(1)
        self._tokens += metrics["tokens"]
        loss = metrics["loss"]
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        now = time.perf_counter()
        if now - self._since < REFRESH and self._bar.n < self.steps:
            return
        rate = metrics.get("learning_rate")
        self._bar.set_postfix_str(
            f"loss {self._loss:.3f}, "
            + ("" if rate is None else f"learning rate {rate:.1e}, ")
            + f"gradient norm {metrics['gradient_norm']:.2g}, "
            + f"{self._tokens / (now - self._since):,.0f} tokens/s"
            + (f", {metrics['skipped']} skipped" if metrics["skipped"] else ""),
            refresh=False,
        )
        self._since, self._tokens = now, 0.0


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a log, `metrics.jsonl` or the directory it is in, as dicts.

    A line that a killed run left unfinished at the end does not count.

    Raises:
        ValueError: if there is no such file, or a line before its end is no JSON.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]  # what ends in no newline is unfinished
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"there is no log to read at {path}: {error}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}.") from error
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise ValueError(f"{path}, line {number}: must be an object with a step, got {line}.")
        rows.append(row)
    return rows


def _open(directory: Path, done: int) -> FileIO:
    """The file to append to, without the lines of steps that are made again."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= done]
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    return FileIO(path, "a")


def _bar(done: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "the progress bar needs tqdm: pip install 'jaxformers[train]', or pass progress=False."
        ) from None
    # A terminal is repainted, a file gets longer.
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(initial=done, total=steps, unit="step", file=sys.stderr, mininterval=interval)


def _event_writer(directory: Path, done: int) -> Any:
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    writer = EventFileWriter(str(directory))
    # Has TensorBoard forget the steps from here on, which are made again.
    start = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=done + 1, session_log=start))
    return writer


def _add_event(writer: Any, step: int, metrics: Mapping[str, float]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
