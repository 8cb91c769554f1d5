"""Training curves, drawn by matplotlib from the log of a run."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers.training.log import read_metrics


def loss_curve(
    path: str | os.PathLike, save: str | os.PathLike | None = None, *, title: str | None = None
) -> Any:
    """Draws the loss of each step faintly, its running mean, and the loss of the evaluations.

    Arguments:
        path: the file `metrics.jsonl` that `fit` writes, or its directory.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.
        title: the title of the picture; None is the name of the directory.

    Returns:
        The `matplotlib.figure.Figure`, which notebooks show.

    Raises:
        ValueError: if there is no such log, or it has no step.
        ImportError: if matplotlib is missing.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> options = {"steps": 2, "key": key, "log": directory, "progress": False}
        >>> _ = fit(model, AdamW(1e-3), [batch], loss=language_model_loss, **options)
        >>> figure = loss_curve(directory)
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("curves need matplotlib: pip install 'jaxformers[train]'.") from None
    rows = read_metrics(path)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evaluation = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not train:
        raise ValueError(f"the log {path} has no step in it yet: there is nothing to draw.")
    steps, losses = np.array(train, float).T  # None, the loss of a bad step, becomes NaN
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    alpha, linewidth = (0.25, 0.7) if len(steps) >= 100 else (1.0, 1.5)
    axes.plot(steps, losses, "C0", alpha=alpha, linewidth=linewidth, label="training, each step")
    good = np.isfinite(losses)
    width = good.sum() // 50
    if width > 1:
        smooth = np.convolve(losses[good], np.ones(width) / width, "valid")
        middle = steps[good][(width - 1) // 2 :][: len(smooth)]
        axes.plot(middle, smooth, color="C0", label=f"training, mean of {width} steps")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="C1", label="evaluation")
    name = Path(path) if Path(path).is_dir() else Path(path).parent
    axes.set(xlabel="step", ylabel="loss", title=name.resolve().name if title is None else title)
    axes.grid(alpha=0.3)
    axes.legend()
    if save is not None:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save, dpi=150)
    return figure
