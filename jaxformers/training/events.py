"""The curves of a run for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformers.training.notices import LOGGER


class Events:
    """TensorBoard's event file for the steps after `done`."""

    name = "TensorBoard events"

    @classmethod
    def opened(cls, directory: Path, done: int) -> "Events | None":
        """Returns an open event file, or None if the package is missing or fails."""
        try:
            return cls(directory, done)
        except ImportError:
            return None
        except Exception as error:  # for instance a TypeError of an incompatible protobuf
            LOGGER.warning("There are no TensorBoard events: %r", error)
            return None

    def __init__(self, directory: Path, done: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventFileWriter(str(directory))
        # TensorBoard drops its old events from this step on, because these steps are made again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.add(done + 1, session_log=start)

    def add(self, step: int, **what: Any) -> None:
        self.writer.add_event(self.event(wall_time=time.time(), step=step, **what))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self.add(step, summary=self.summary(value=values))

    def close(self) -> None:
        self.writer.close()
