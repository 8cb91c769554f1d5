"""A number for each head, as colors."""

import os

import numpy as np
from jaxtyping import ArrayLike, Float
from matplotlib.figure import Figure

from jaxformers.plot.picture import draw_signed, finish, new_picture


def head_heat_map(
    values: Float[ArrayLike, "l n"],
    label: str = "",
    *,
    title: str | None = None,
    save: str | os.PathLike | None = None,
) -> Figure:
    """Draws a number for each head as a color: blue below 0, red above it.

    It is for `head_attribution(...).mean((2, 3))`, `ablate_heads` and `induction_scores`. A number
    that is not finite is gray.

    Arguments:
        values: `(layers, heads)`.
        label: what the numbers are, with their unit, beside the scale of the colors.
        title: the title of the picture.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if the values have another shape.

    Example:
        >>> from jaxformers.inspect import induction_scores
        >>> scores = induction_scores(model, length=3, key=key)
        >>> figure = head_heat_map(scores, "induction score")
    """
    if np.ndim(values) != 2 or 0 in np.shape(values):
        raise ValueError(
            f"values must have shape (layers, heads), not empty, got {np.shape(values)}. Take the "
            "mean or one position of what head_attribution returns, as values.mean((2, 3))."
        )
    numbers = np.asarray(values, np.float32)
    layers, heads = numbers.shape
    unit = min(0.35, 30 / max(layers, heads))
    figure = new_picture(max(1.5, heads * unit) + 1.8, max(1.2, layers * unit) + 0.8, title)
    axes = figure.add_subplot()
    draw_signed(figure, axes, numbers, label)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, heads, 1 + heads // 17))
    axes.set_yticks(range(0, layers, 1 + layers // 17))
    return finish(figure, save)
