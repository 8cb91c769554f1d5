"""What position schemes do: their vectors, their rotations, their biases."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from jaxformers.checks import check_flag, check_size
from jaxformers.plot.picture import ABOVE, BELOW, draw_scale, draw_signed, finish, new_picture
from jaxformers.positions.rotary import RotaryPositionalEncoding
from jaxformers.positions.scaling import rotary_frequencies
from jaxformers.positions.scheme import AbsolutePosition, BiasPosition, acts_as


def position_vectors(
    position: Any,
    length: int | None = None,
    *,
    title: str | None = None,
    save: str | os.PathLike | None = None,
) -> Figure:
    """Draws the vectors that a scheme adds to the embeddings, sinusoids or a learned table.

    Arguments:
        position: a `SinusoidalPositionalEncoding`, a `LearnablePositionalEncoding` or your own
            scheme with `embed`.
        length: the number of positions; None, the default, is `max_seq_length`, at most 128.
        title: the title of the picture; None is the name of the scheme.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if it is another scheme, or has fewer positions.

    Example:
        >>> figure = position_vectors(SinusoidalPositionalEncoding(512, 64))
    """
    _check(position, AbsolutePosition, "vectors", "position_bias or rotary_angles")
    longest = position.max_seq_length
    length = min(longest, 128) if length is None else length
    check_size(length=length)
    if length > longest:
        raise ValueError(f"length must be at most max_seq_length {longest}, got {length}.")
    vectors = np.asarray(position.embed(jnp.arange(length)), np.float32)
    figure = new_picture(7.0, 4.0, _name(position) if title is None else title)
    axes = figure.add_subplot()
    draw_signed(figure, axes, vectors.T, "added to the embedding")
    axes.set(xlabel="position", ylabel="feature")
    return finish(figure, save)


def rotary_angles(
    position: RotaryPositionalEncoding,
    head_dim: int = 64,
    length: int = 128,
    *,
    title: str | None = None,
    save: str | os.PathLike | None = None,
) -> Figure:
    """Draws how rotary positions rotate each pair of features.

    The first part has the cosine of the angle at each position. The second has the wavelength of
    each pair, which is the number of positions of a whole rotation, with and without the scaling.
    The dashed line is `length`: pairs above it make no whole rotation.

    Arguments:
        position: a `RotaryPositionalEncoding`, with any scaling.
        head_dim: the number of features of a head, 64 by default.
        length: the number of positions, 128 by default. Scalings such as `DynamicScaling` depend
            on it.
        title: the title of the picture; None is the name of the scaling.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if it is another scheme, or the sizes do not fit it.

    Example:
        >>> from jaxformers import YarnScaling
        >>> figure = rotary_angles(RotaryPositionalEncoding(scaling=YarnScaling(4.0, 64)))
    """
    if not isinstance(position, RotaryPositionalEncoding):
        raise ValueError(
            f"position must be a RotaryPositionalEncoding, got {position!r:.80}. Draw others with "
            "position_vectors or position_bias."
        )
    check_size(head_dim=head_dim, length=length)
    frequencies, factor = position.frequencies(head_dim, jnp.arange(length))
    frequencies = np.asarray(frequencies, np.float64)
    cosines = np.cos(np.arange(length) * frequencies[:, None])
    figure = new_picture(9.0, 4.0, _name(position.scaling or position) if title is None else title)
    angles, waves = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    draw_signed(figure, angles, cosines, "cosine of the angle")
    angles.set(xlabel="position", ylabel="pair of features")
    pairs = np.arange(len(frequencies))
    plain = rotary_frequencies(position.theta, 2 * len(pairs))
    if position.scaling is not None:
        waves.plot(2 * np.pi / plain, pairs, "--", color="gray", label="without scaling")
    moves = frequencies > 0
    name = "wavelength" if factor == 1 else f"wavelength (features times {factor:.3g})"
    waves.plot(2 * np.pi / frequencies[moves], pairs[moves], ".-", color=ABOVE, label=name)
    if not moves.all():
        waves.plot([], [], " ", label=f"{(~moves).sum()} pairs do not rotate")
    waves.axvline(length, color=BELOW, linestyle=":", label=f"{length} positions")
    waves.set_xscale("log")
    waves.set(xlabel="wavelength in positions")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return finish(figure, save)


def position_bias(
    position: Any,
    num_heads: int,
    length: int = 64,
    *,
    causal: bool = False,
    title: str | None = None,
    save: str | os.PathLike | None = None,
) -> Figure:
    """Draws the bias that a scheme adds to the scores of each head, by the distance of the key.

    Arguments:
        position: an `ALiBi`, a `T5PositionBias` or your own scheme with `bias`.
        num_heads: the number of query heads.
        length: the number of positions, 64 by default; distances are smaller.
        causal: whether keys after the query are masked, False by default.
        title: the title of the picture; None is the name of the scheme.
        save: the file of the picture, of a type that matplotlib knows (.png, .pdf, .svg). None, the
            default, writes no file.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: if it is another scheme, or is for another number of heads.

    Example:
        >>> figure = position_bias(ALiBi(), num_heads=8, causal=True)
    """
    _check(position, BiasPosition, "biases", "position_vectors or rotary_angles")
    check_size(num_heads=num_heads, length=length)
    check_flag(causal=causal)
    keys = jnp.arange(length if causal else 2 * length - 1)
    bias = position.bias(jnp.array([length - 1]), keys, num_heads, causal)
    figure = new_picture(7.0, 4.0, _name(position) if title is None else title)
    axes = figure.add_subplot()
    colors = LinearSegmentedColormap.from_list("heads", [BELOW, ABOVE])
    for head, line in enumerate(np.asarray(bias, np.float32)[:, 0]):
        color = colors(head / max(num_heads - 1, 1))
        axes.plot(np.asarray(keys) - (length - 1), line, color=color, label=f"head {head}")
    axes.set(xlabel="position of the key - position of the query", ylabel="added to the score")
    axes.grid(alpha=0.3)
    if num_heads <= 16:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    else:
        scale = ScalarMappable(Normalize(0, num_heads - 1), colors)
        draw_scale(figure, axes, scale, "head")
    return finish(figure, save)


def _check(position: Any, kind: Any, gives: str, others: str) -> None:
    if not acts_as(position, kind):
        raise ValueError(
            f"position must be a scheme that gives {gives}, as an object, got {position!r:.80}. "
            f"Draw others with {others}."
        )


def _name(part: Any) -> str:
    return type(part).__name__
