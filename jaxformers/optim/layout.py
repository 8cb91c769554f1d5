"""The matrix that a weight is, whatever its axes: heads, experts and scanned layers."""

import re
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Layout(NamedTuple):
    """How the axes of a leaf are read: first those apart, then inputs, then outputs.

    Arguments:
        apart: how many leading axes count things of the same kind, such as layers or experts.
        inputs: how many axes after these are inputs of a linear map; the rest are its outputs. 0
            stands for a vector: a bias, a gain.
    """

    apart: int
    inputs: int

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many matrices a leaf of this shape is, of how many inputs and outputs."""
        split = self.apart + self.inputs
        return prod(shape[: self.apart]), prod(shape[self.apart : split]), prod(shape[split:])

    def matrices(self, x: Float[Array, "..."]) -> Float[Array, "apart i o"]:
        """`x` as a stack of matrices; a vector has one row."""
        return x.reshape(self.sizes(x.shape))


LayoutFunction = Callable[[str, Any], Layout]


def default_layout(path: str, x: Any) -> Layout:
    """The layout of a leaf of our models, by its path, name and axes.

    A bias or a gain, known by its name (`b`, `bq`, `b_in`, `bias`, `gain`), is a vector, and so is
    what has fewer than two axes. Attention's `wq`, `wk` and `wv` map d_model to all heads, `wo`
    maps all heads to d_model. Other weights are `(inputs, outputs)`. Axes before these are apart,
    and of a vector the axis of scanned layers.

    Arguments:
        path: such as "decoder.layers.0.self_attention.wq".
        x: the array, or its shape as a `jax.ShapeDtypeStruct`.

    Example:
        >>> default_layout("decoder.layers.stacked.self_attention.wo", jnp.ones((6, 2, 8, 16)))
        Layout(apart=1, inputs=2)
    """
    names = [name for name in path.lower().split(".") if not name.isdigit()]
    scanned = int("stacked" in names)
    field = names[-1] if names else ""
    vector = re.fullmatch("b|b[a-z]|b_.*|bias.*|gain.*", field) or x.ndim - scanned < 2
    if vector:
        return Layout(scanned, 0)
    if field in ("wq", "wk", "wv", "wo") and x.ndim - scanned >= 3:
        return Layout(x.ndim - 3, 2 if field == "wo" else 1)
    return Layout(x.ndim - 2, 1)
