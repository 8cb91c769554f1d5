"""The best model of a run in a file, also of a run that is continued later."""

import math
import os
from typing import Any

import jax

from jaxformers.checkpoint.model_file import check_path, read_notes, write_object
from jaxformers.sharding.hosts import by_first_host, collect
from jaxformers.training.reports import Report


class KeepBest:
    """A callback of `fit` that saves the model whenever it is better than all earlier ones.

    The file also holds the metric of its model, so that a continued run overwrites it only with a
    better model. A new run overwrites it at its first evaluation.

    Arguments:
        path: the file, such as "best.safetensors". `load` reads it.
        metric: the entry of `Report.metrics` by which models are compared; smaller is better.
            "eval_loss" is the default. "eval_cross_entropy" contains no label smoothing and no
            z-loss.

    Raises:
        ValueError: if the file exists and does not hold this metric of its model. A call raises it
            if `Report.metrics` has no such metric.
        OSError: if a call cannot write the file; an earlier file then stays.

    Example:
        >>> import tempfile
        >>> keep_best = KeepBest(tempfile.mkdtemp() + "/best.safetensors")
        >>> training = fit(
        ...     model,
        ...     AdamW(1e-3),
        ...     [batch],
        ...     loss=language_model_loss,
        ...     steps=2,
        ...     key=key,
        ...     eval_batches=[batch],
        ...     eval_every=1,
        ...     callbacks=[keep_best],
        ...     progress=False,
        ... )
        >>> keep_best.step
        2
    """

    step: int | None  # the step of the model in the file; `best` is its metric
    best: float

    def __init__(self, path: str | os.PathLike, metric: str = "eval_loss"):
        self.path, self.metric = check_path(path), metric
        self.step, self.best = None, math.inf
        self._noted: dict[str, Any] | None = None
        if self.path.exists():
            self._noted = read_notes(self.path)
            if not self._noted.keys() >= {"step", metric}:
                raise ValueError(
                    f"{self.path} is there already, and does not note the {metric} of its model: "
                    "move it away, or pass another path."
                )

    def __call__(self, report: Report) -> None:
        if self.metric not in report.metrics:
            raise ValueError(
                f"KeepBest needs {self.metric!r}, and fit reports {', '.join(report.metrics)}: "
                "pass eval_batches, or another metric."
            )
        if self._noted is not None and report.begun > 0:
            self.step, self.best = self._noted["step"], self._noted[self.metric]
        self._noted = None
        value = report.metrics[self.metric]
        if by_first_host(math.isfinite(value) and value < self.best):
            model = report.model if jax.process_count() == 1 else collect(report.model)
            if jax.process_index() == 0:  # only one host writes
                self.path.parent.mkdir(parents=True, exist_ok=True)
                notes = {"step": report.step, self.metric: value}
                write_object(self.path, model, notes)
            self.step, self.best = report.step, value
