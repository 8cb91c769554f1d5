"""Layouts, which read a weight with any axes as one matrix or several."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from jaxtyping import Array, Float, PyTree

from jaxformers.axes import Axes, axes_at, axes_by_name
from jaxformers.paths import path_name


class Layout(NamedTuple):
    """A division of the axes of a leaf into separate matrices, their rows and their columns.

    Arguments:
        apart: number of leading axes that separate matrices, such as those of layers or experts.
        inputs: number of axes after these that form the rows of a matrix, which are the inputs of a
            linear map. The remaining axes form its outputs. 0 means that the leaf is a vector, such
            as a bias or a gain.
    """

    apart: int
    inputs: int

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns the number of matrices in a leaf of this shape, and their inputs and outputs."""
        split = self.apart + self.inputs
        return prod(shape[: self.apart]), prod(shape[self.apart : split]), prod(shape[split:])

    def matrices(self, x: Float[Array, "..."]) -> Float[Array, "apart i o"]:
        """Returns `x` as a stack of matrices; a vector becomes a matrix with one row."""
        return x.reshape(self.sizes(x.shape))


LayoutFunction = Callable[[str, Any], Layout]


class LeafPath(str):
    """The path of a leaf as text, together with the axes of the leaf.

    Arguments:
        text: the path, such as "blocks.norm.weight".
        axes: the axes of the leaf. None means that only its path is known.
    """

    axes: Axes | None

    def __new__(cls, text: str, axes: Axes | None = None) -> "LeafPath":
        path = super().__new__(cls, text)
        path.axes = axes
        return path


def leaf_path(tree: PyTree, path: tuple) -> LeafPath:
    """Returns the path of a leaf of a tree, with the axes that annotations in the tree name.

    Example:
        >>> norms = eqx.filter_vmap(lambda _: eqx.nn.RMSNorm(8))(jnp.arange(3))
        >>> ((path, x),) = jax.tree_util.tree_leaves_with_path(eqx.filter(norms, eqx.is_array))[:1]
        >>> leaf_path(norms, path).axes.roles, x.shape
        (('apart', 'output'), (3, 8))
    """
    return LeafPath(path_name(path), axes_at(tree, path))


def default_layout(path: str, x: Any) -> Layout:
    """Returns the layout of a leaf, which follows from its axes.

    An optimizer passes a `LeafPath`, whose axes come from annotations like `Float[Array, "d n h"]`
    and from the modules of `equinox.nn`; `jaxformers/axes.py` states the rule. Without axes, the
    names in the path decide. A bias or a gain (`b`, `bq`, `b_in`, `bias`, `gain`, `scale`, `gamma`,
    `beta`), an array of a norm and an array of fewer than two axes are vectors. Attention's `wq`,
    `wk` and `wv` map d_model to all heads, and `wo` maps all heads to d_model. Other weights are
    `(inputs, outputs)`. The axes before these separate matrices: experts, the layers of
    `scan_layers`, and modules that `eqx.filter_vmap` has created.

    Arguments:
        path: path of the leaf, such as "decoder.layers.0.self_attention.wq".
        x: the array, or its shape as a `jax.ShapeDtypeStruct`.

    Example:
        >>> default_layout("decoder.layers.stacked.self_attention.wo", jnp.ones((6, 2, 8, 16)))
        Layout(apart=1, inputs=2)
        >>> default_layout("blocks.norm.weight", jnp.ones((6, 16)))
        Layout(apart=1, inputs=0)
    """
    axes = path.axes if isinstance(path, LeafPath) else None
    if axes is None or len(axes.names) != x.ndim:
        axes = axes_by_name(path, x.ndim)
    # The rows come first. In `equinox.nn.Linear` the rows are the outputs.
    pairs = axes.inputs, axes.outputs
    return Layout(len(axes.apart), len(min(pairs) if all(pairs) else axes.inputs))
