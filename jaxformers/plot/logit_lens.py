"""The tokens that the residual stream predicts after each layer."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxformers.plot.labels import as_it_is, token_labels, visible
from jaxformers.plot.picture import (
    check_row,
    draw_scale,
    finish,
    new_picture,
    tokens_of,
    write_labels,
)
from jaxformers.tokenizers.tokenizer import Tokenizer

SIZE = 7.0  # of letters, in points


def logit_lens_table(
    logits: Float[Array | np.ndarray, "..."],
    vocabulary: Tokenizer | Callable,
    tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    padding_mask: Bool[ArrayLike, "..."] | None = None,
    title: str | None = None,
    save: str | os.PathLike | None = None,
) -> Figure:
    """Draws the likeliest next token after each layer, its probability as the color of the cell.

    Columns are positions. The lowest row is the stream before the first layer, and the highest is
    the prediction of the model.

    Arguments:
        logits: what `logit_lens` returns, `(layers + 1, b, t, v)`, or one row of it.
        vocabulary: a `Tokenizer`, or a function from a list of ids to a list of as many strings.
        tokens: the labels of the t tokens that the model reads, such as `token_labels` gives; the
            numbers of positions by default. Long ones are cut.
        row: the row of the batch, 0 by default.
        padding_mask: True where a token is real, `(t,)` or `(b, t)`. Others are left out.
        title: the title of the picture.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if the logits have another shape or are not finite, or anything else does not
            fit them.

    Example:
        >>> from jaxformers.inspect import logit_lens
        >>> letters = lambda ids: [chr(32 + i) for i in ids]
        >>> logits = logit_lens(model, tokens)
        >>> figure = logit_lens_table(logits, letters, token_labels(tokens[0], letters))
    """
    shape = np.shape(logits)
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"logits must have shape (layers + 1, b, t, v) or (layers + 1, t, v), got {shape}. "
            "logit_lens gives them."
        )
    check_row(row, shape[1:-2])
    names = "tokens", "padding_mask"
    real, labels = tokens_of(tokens, padding_mask, shape[1:-1], row, names)
    likeliest, probabilities = zip(*(_best(x, row, real) for x in logits), strict=True)
    ids, cells = np.unique(likeliest, return_inverse=True)
    words = [visible(x, 12) for x in token_labels(ids, vocabulary)]
    colors = np.array(probabilities)
    rows, positions = colors.shape
    figure = new_picture(7.0, max(1.2, rows * 0.22) + 1.6, title)
    axes = figure.add_subplot()
    width = _write_cells(figure, axes, np.array(words)[cells].reshape(colors.shape), colors)
    write_labels(axes.xaxis, labels, SIZE, rotation=90.0)
    write_labels(axes.yaxis, ["embedded", *map(str, range(rows - 1))], SIZE)
    axes.tick_params(length=0)
    axes.set(xlabel="token that is read", ylabel="after layer")
    figure.set_figwidth(max(1.5, positions * width) + 1.8)
    draw_scale(figure, axes, axes.images[0], "probability")
    return finish(figure, save)


def _best(logits: Array | np.ndarray, row: int, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the likeliest id at each real position of a row, and its probability."""
    x = np.asarray(logits if np.ndim(logits) == 2 else logits[row], np.float32)[real]
    largest = x.max(-1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("logits must be finite at all real tokens, got NaN or infinity.")
    return x.argmax(-1), 1 / np.exp(x - largest).sum(-1)


def _write_cells(figure: Figure, axes: Axes, words: np.ndarray, probabilities: np.ndarray) -> float:
    """Draws the cells and returns the width that the longest word needs, in inches."""
    image = axes.imshow(probabilities, vmin=0, vmax=1, aspect="auto", origin="lower")
    options = {"fontsize": SIZE, "ha": "center", "va": "center", **as_it_is()}
    widths = []
    for (y, x), word in np.ndenumerate(words):
        luminance = np.power(image.to_rgba(probabilities[y, x])[:3], 2.2) @ [0.21, 0.72, 0.07]
        color = "black" if luminance > 0.18 else "white"  # from 0.18 on, black is easier to read
        text = axes.text(x, y, word, color=color, **options)
        widths.append(text.get_window_extent().width)
    return max(widths) / figure.dpi + 0.1
