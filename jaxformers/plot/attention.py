"""The weights of attention as a grid of heads."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import ArrayLike, Bool
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxformers.plot.picture import (
    check_row,
    draw_scale,
    finish,
    new_picture,
    tokens_of,
    write_labels,
)

LEAST, MOST = 1.0, 40.0  # the size of a head at least and of all at most, in inches


def attention_grid(
    maps: Any,
    tokens: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    row: int = 0,
    padding_mask: Bool[ArrayLike, "..."] | None = None,
    key_padding_mask: Bool[ArrayLike, "..."] | None = None,
    title: str | None = None,
    save: str | os.PathLike | None = None,
) -> Figure:
    """Draws how much each query attends to each key, for each head.

    Rows of the grid are layers and columns are heads; the heads of a single layer are wrapped. In
    a head, rows are queries and columns are keys. All heads have the same scale of colors.

    Arguments:
        maps: what `attention_maps` returns, a list of `(b, n, t, s)` or `(n, t, s)` per layer; or
            such an array of one layer. Of a `Transformer`, take one of its three lists.
        tokens: the labels of the t queries, such as `token_labels` gives; the numbers of positions
            by default. Long ones are cut.
        keys: the labels of the s keys. By default they are those of the queries if s is t.
        layers: the numbers of the layers to draw; all by default.
        heads: the numbers of the heads to draw; all by default.
        row: the row of the batch, 0 by default.
        padding_mask: True where a query is real, `(t,)` or `(b, t)`. Others are left out.
        key_padding_mask: the same for keys, by default that of the queries if `keys` is None and s
            is t.
        title: the title above all heads.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if the maps are no weights of attention, or anything else does not fit them.

    Example:
        >>> figure = attention_grid(attention_maps(model, tokens), ["a", "b", "a", "c"])
    """
    is_one = hasattr(maps, "ndim")
    arrays = _rows_of([maps] if is_one else maps, row)
    first = np.shape(maps if is_one else maps[0])
    (_, t, s), batch = first[-3:], first[:-3]
    if keys is None and t == s:
        keys = tokens
        key_padding_mask = padding_mask if key_padding_mask is None else key_padding_mask
    names, key_names = ("tokens", "padding_mask"), ("keys", "key_padding_mask")
    is_query, queries = tokens_of(tokens, padding_mask, (*batch, t), row, names)
    is_key, key_labels = tokens_of(keys, key_padding_mask, (*batch, s), row, key_names)
    shown = _chosen("layers", layers, len(arrays))
    columns = _chosen("heads", heads, max(len(arrays[i]) for i in shown))
    cells = {
        (y, x): (f"head {j}" if is_one else f"layer {i}, head {j}", arrays[i][j])
        for y, i in enumerate(shown)
        for x, j in enumerate(columns)
        if j < len(arrays[i])
    }
    if len(shown) == 1:
        width = len(columns) if len(columns) <= 4 else 4 if len(columns) <= 16 else 8
        cells = {divmod(i, width): cell for i, cell in enumerate(cells.values())}
    cells = {
        place: (name, _weights(values[is_query][:, is_key]))
        for place, (name, values) in cells.items()
    }
    return finish(_draw(cells, queries, key_labels, title), save)


Cells = dict[tuple[int, int], tuple[str, np.ndarray]]  # by row and column: a title and weights


def _draw(cells: Cells, queries: list[str], keys: list[str], title: str | None) -> Figure:
    """Draws the heads into one system of coordinates, in inches."""
    height, width = (1 + max(numbers) for numbers in zip(*cells, strict=True))
    size = 8.0 if len(cells) <= 4 else 6.0 if len(cells) <= 16 else 4.5  # of letters, in points
    unit = size / 56  # of a token
    across, down = max(LEAST, unit * len(keys)), max(LEAST, unit * len(queries))
    shrunk = min(1.0, MOST / max(across * width, down * height))
    size, across, down = size * shrunk, across * shrunk, down * shrunk
    lefts = np.arange(width) * (across + 0.15 * shrunk)
    tops = np.arange(height) * (down + 0.3 * shrunk)
    right, bottom = lefts[-1] + across, tops[-1] + down
    margin = 0.5 + 0.01 * size * max(map(len, queries + keys))
    figure = new_picture(right + margin + 0.8, bottom + margin + 0.3, title)
    axes = figure.add_subplot()
    limits = {"vmin": 0, "vmax": max(weights.max() for _, weights in cells.values())}
    frame = {"fill": False, "linewidth": 0.8, "edgecolor": matplotlib.rcParams["axes.edgecolor"]}
    for (y, x), (name, weights) in cells.items():
        left, top = lefts[x], tops[y]
        place = (left, left + across, top + down, top)
        image = axes.imshow(weights, extent=place, aspect="auto", **limits)
        axes.add_patch(Rectangle((left, top), across, down, clip_on=False, **frame))
        middle = left + across / 2
        axes.text(middle, top - 0.05 * shrunk, name, fontsize=8 * shrunk, ha="center")
    axes.set(xlim=(0, right), ylim=(bottom, 0), xlabel="key", ylabel="query")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    write_labels(axes.xaxis, keys * width, size, _middles(lefts, across, len(keys)), rotation=90.0)
    write_labels(axes.yaxis, queries * height, size, _middles(tops, down, len(queries)))
    draw_scale(figure, axes, image, "weight")
    return figure


def _middles(begins: np.ndarray, length: float, number: int) -> np.ndarray:
    """Returns the middle of each of a number of equal parts of each interval."""
    return (begins[:, None] + (np.arange(number) + 0.5) * length / number).ravel()


def _rows_of(maps: Any, row: int) -> list[np.ndarray]:
    """Returns one row of each map, `(n, t, s)`."""
    if not isinstance(maps, list | tuple) or not maps:
        raise ValueError(
            "maps must be a list of arrays (b, n, t, s) or (n, t, s), one for each layer, or the "
            f"array of one layer, got {type(maps).__name__}. Of a Transformer, pass one of "
            'maps["encoder"], maps["decoder"] and maps["cross"].'
        )
    shapes = [np.shape(x) for x in maps]
    rest = {(*shape[:-3], *shape[-2:]) for shape in shapes}
    if len(rest) > 1 or len(shapes[0]) not in (3, 4) or 0 in shapes[0]:
        raise ValueError(
            "maps must have shape (b, n, t, s) or (n, t, s), not empty, and may differ only in the "
            f"number of heads n, got {', '.join(map(str, shapes))}."
        )
    check_row(row, shapes[0][:-3])
    return [np.asarray(x if np.ndim(x) == 3 else x[row], np.float32) for x in maps]


def _weights(values: np.ndarray) -> np.ndarray:
    if not (values.min() >= 0 and values.max() < 1.01):
        raise ValueError(
            "maps must be weights of attention, from 0 to 1 at all real tokens, got numbers from "
            f"{values.min():.3g} to {values.max():.3g}. attention_maps gives such weights."
        )
    return values


def _chosen(name: str, numbers: Sequence[int] | None, size: int) -> list[int]:
    """Returns the numbers of the layers or heads to draw."""
    if numbers is None:
        return list(range(size))
    is_list = isinstance(numbers, Sequence | np.ndarray) and len(numbers) > 0
    if not is_list or any(
        isinstance(i, bool | np.bool) or np.ndim(i) > 0 or i not in range(size) for i in numbers
    ):
        raise ValueError(
            f"{name} must be a list of numbers from 0 to {size - 1}, got {numbers!r:.80}."
        )
    return [int(i) for i in numbers]
