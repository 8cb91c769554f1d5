"""The losses of trainings, from their logs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from jaxformers.plot.labels import as_it_is
from jaxformers.plot.picture import finish, new_picture
from jaxformers.training.log import read_metrics

Log = str | os.PathLike
Points = tuple[np.ndarray, np.ndarray]  # steps and losses


def loss_curve(
    path: Log | Sequence[Log] | Mapping[str, Log],
    save: str | os.PathLike | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draws the loss of each step faintly, its running mean, and the loss of the evaluations.

    The axis of the losses is logarithmic if they span more than a factor of ten.

    Arguments:
        path: the file `metrics.jsonl` that `fit` writes, or its directory. A list of them, or a
            dict of them by name, draws several runs, each in its own color.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.
        title: the title of the picture; None is the name of the directory of a single run.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no such log, it has no step, or it is given twice.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> options = {"steps": 2, "key": key, "log": directory, "progress": False}
        >>> _ = fit(model, AdamW(1e-3), [batch], loss=language_model_loss, **options)
        >>> figure = loss_curve(directory)
    """
    logs = _named(path)
    runs = {name: (_points(log, "loss"), _points(log, "eval_loss")) for name, log in logs.items()}
    colors = matplotlib.rcParams["axes.prop_cycle"].by_key().get("color", ["gray"])
    is_one = len(runs) == 1
    figure = new_picture(7.0, 4.0, next(iter(runs)) if is_one and title is None else title)
    axes = figure.add_subplot()
    for i, (name, (train, evaluation)) in enumerate(runs.items()):
        # The space is for names that begin with "_", which legends leave out.
        before = "" if is_one else f"{' ' * name.startswith('_')}{name}, "
        _draw_training(axes, train, before, colors[i % len(colors)])
        if len(evaluation[0]):
            color = colors[(i + is_one) % len(colors)]
            axes.plot(*evaluation, "o--", color=color, ms=4, label=f"{before}evaluation")
    losses = np.concatenate([losses for run in runs.values() for _, losses in run])
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.max() > 10 * losses.min() > 0:
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    outside = {"loc": "outside right upper", "fontsize": "small"}
    legend = axes.legend() if is_one else figure.legend(**outside)
    for text in legend.get_texts():
        text.set(**as_it_is())
    return finish(figure, save)


def _named(path: Any) -> dict[str, Log]:
    """Returns the logs by name, each that of its directory unless it was named."""
    several = isinstance(path, Iterable) and not isinstance(path, Log)
    given = path if several else [path]
    logs = list(given.values() if isinstance(given, Mapping) else given)
    if not logs or not all(isinstance(log, Log) for log in logs):
        raise ValueError(f"path must be at least one log, its directory or file, got {path!r:.80}.")
    if isinstance(given, Mapping):
        return {str(name): log for name, log in given.items()}
    folders = [Path(log) if Path(log).is_dir() else Path(log).parent for log in logs]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, logs))
    if len(set(names)) < len(names):
        raise ValueError(f"path must have different logs, got {', '.join(names)}.")
    return dict(zip(names, logs, strict=True))


def _points(log: Log, name: str) -> Points:
    """Returns the steps of a log that have a loss of this name, and the losses."""
    found = [(row["step"], row[name]) for row in read_metrics(log) if name in row]
    if name == "loss" and not found:
        raise ValueError(f"the log {log} has no step in it yet: there is nothing to draw.")
    steps, losses = np.array(found, float).reshape(-1, 2).T  # None, of a bad step, becomes NaN
    return steps, losses


def _draw_training(axes: Axes, points: Points, before: str, color: Any) -> None:
    steps, losses = points
    good = np.isfinite(losses)
    width = good.sum() // 50
    each, mean = "training, each step", f"training, mean of {width} steps"
    if before:  # several runs, in a shorter legend without what begins with "_"
        each, mean = "_" if width > 1 else f"{before}training", f"{before}training"
    faint: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.7} if width > 1 else {}
    axes.plot(steps, losses, color=color, label=each, **faint)
    if width > 1:
        smooth = np.convolve(losses[good], np.ones(width) / width, "valid")
        middle = steps[good][(width - 1) // 2 :][: len(smooth)]
        axes.plot(middle, smooth, color=color, label=mean)
