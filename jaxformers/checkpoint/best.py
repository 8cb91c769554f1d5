"""The best model of a run in a file, also where the run goes on later."""

import math
import os
from typing import Any

import jax

from jaxformers.checkpoint.model_file import check_path, read_notes, write_object
from jaxformers.training.run import Report


class KeepBest:
    """A callback of `fit` that saves the model whenever it was never as good before.

    The file notes how good its model is, so that a run that goes on later writes over it only with
    a better one. A run that begins anew writes over it at its first evaluation.

    Arguments:
        path: the file, such as "best.safetensors"; `load` reads it.
        metric: which of `Report.metrics` says how good a model is, the less the better:
            "eval_loss", or "eval_cross_entropy" where there is label smoothing or z-loss.

    Raises:
        ValueError: if there is such a file already, and it does not note how good its model is; in
            a call, if there is no such metric.
        OSError: in a call, if the file cannot be written; what was there is there still.

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

    step: int | None  # of the model in the file, and how good it is
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
        if math.isfinite(value) and value < self.best:
            if jax.process_index() == 0:  # of many hosts, one writes
                self.path.parent.mkdir(parents=True, exist_ok=True)
                notes = {"step": report.step, self.metric: value}
                write_object(self.path, report.model, notes)
            self.step, self.best = report.step, value
