"""The parts that all pictures share: the figure, its colors, its axes of tokens and the file."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxformers.checks import check_padding_mask
from jaxformers.plot.labels import as_it_is, check_labels, visible

# Both can be read on white and on black.
BELOW, ABOVE = "#3b82c4", "#d1495b"


class Picture(Figure):
    """A figure that notebooks show, also where pyplot is not imported."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def new_picture(width: float, height: float, title: str | None = None) -> Picture:
    """Returns an empty figure of a size in inches, with a title."""
    figure = Picture(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title, wrap=True, **as_it_is())
    return figure


def finish(figure: Figure, save: str | os.PathLike | None) -> Figure:
    """Returns a figure that does not depend on the style any more, and writes it to a file."""
    figure.draw_without_rendering()  # makes what would take its colors from a later style
    if save is not None:
        if not Path(save).suffix:
            raise ValueError(f"save must be a file with a type, such as x.png, got {save!r:.80}.")
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save, dpi=150)
    return figure


def signed_colors() -> Colormap:
    """Returns colors of numbers around 0, which has the color of the background."""
    colors = [BELOW, matplotlib.rcParams["axes.facecolor"], ABOVE]
    return LinearSegmentedColormap.from_list("signed", colors).with_extremes(bad="gray")


def draw_signed(figure: Figure, axes: Axes, values: np.ndarray, label: str) -> None:
    """Draws numbers as colors around 0, with the scale of the colors."""
    limit = np.abs(values[np.isfinite(values)]).max(initial=0.0) or 1.0
    image = axes.imshow(values, cmap=signed_colors(), vmin=-limit, vmax=limit, aspect="auto")
    draw_scale(figure, axes, image, label)


def draw_scale(figure: Figure, axes: Axes, image: ScalarMappable, label: str) -> None:
    """Draws the scale of colors beside the axes, about as wide in every picture."""
    width, height = figure.get_size_inches()
    size = {"fraction": 0.15 / width, "pad": 0.1 / width, "aspect": height / 0.15}
    bar = figure.colorbar(image, ax=axes, **size)
    bar.set_label(label, **as_it_is())


def tokens_of(
    labels: Any, padding_mask: Any, shape: tuple[int, ...], row: int, names: tuple[str, str]
) -> tuple[np.ndarray, list[str]]:
    """Returns which positions along an axis are real, and their labels, by default their numbers.

    Arguments:
        labels: a list of strings, or None.
        padding_mask: of the row or of all rows, or None.
        shape: the shape of the tokens, `(t,)` or `(b, t)`.
        row: the row of the batch.
        names: the names of both arguments, for errors.
    """
    length = shape[-1]
    if labels is not None:
        labels = check_labels(names[0], labels, length)
    real = np.ones(length, bool)
    if padding_mask is not None:
        shape = shape[-1:] if np.ndim(padding_mask) == 1 else shape
        mask = np.asarray(check_padding_mask(padding_mask, shape, names[1]))
        real = mask if mask.ndim == 1 else mask[row]
    if not real.any():
        raise ValueError(f"{names[1]} must have a real token in row {row}, got padding alone.")
    numbers = np.flatnonzero(real)
    return real, [str(i) if labels is None else visible(labels[i]) for i in numbers]


def write_labels(
    axis: Axis, labels: list[str], size: float, places: Any = None, rotation: float = 0.0
) -> None:
    """Writes labels along an axis, by default at 0, 1, ..."""
    places = range(len(labels)) if places is None else places
    axis.set_ticks(places, labels, fontsize=size, rotation=rotation, **as_it_is())


def check_row(row: Any, batch: tuple[int, ...]) -> None:
    """Raises `ValueError` unless there is such a row; an array without a batch has row 0."""
    rows = batch[0] if batch else 1
    if isinstance(row, bool) or not isinstance(row, int | np.integer) or not 0 <= row < rows:
        raise ValueError(f"row must be an integer from 0 to {rows - 1}, got {row!r}.")
