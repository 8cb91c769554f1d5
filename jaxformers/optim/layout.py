"""The matrix that a weight is, whatever its axes: heads, experts and stacked layers."""

import functools
import re
import typing
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from jaxformers.paths import path_name

# Names of vectors, and of the norms that they belong to.
_BIAS = r"b|b[a-z]|b_.*|bias.*|gain.*"
_SCALE = r"(.*_)?(scale|gamma|beta)[0-9]*|negative_slope"
_NORM = r"(.*_)?([a-z]*norm|ln)(_?[0-9a-z])?"
_NORM_VECTOR = rf"{_NORM}(_(w|g|weight|gain|scale|gamma|beta))?"


_NORMS = eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm


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


class LeafPath(str):
    """The path of a leaf as text, with what the module that holds it says of the leaf.

    Arguments:
        text: such as "blocks.norm.weight".
        axes: how many axes it has in one such module; stacked modules have more. None is not known.
        in_norm: whether the module is a norm, by its class.
    """

    axes: int | None
    in_norm: bool

    def __new__(cls, text: str, axes: int | None = None, in_norm: bool = False) -> "LeafPath":
        path = super().__new__(cls, text)
        path.axes, path.in_norm = axes, in_norm
        return path


def leaf_path(tree: PyTree, path: tuple) -> LeafPath:
    """Returns the path of a leaf of a tree, with what its module says of it.

    Example:
        >>> norms = eqx.filter_vmap(lambda _: eqx.nn.RMSNorm(8))(jnp.arange(3))
        >>> ((path, x),) = jax.tree_util.tree_leaves_with_path(eqx.filter(norms, eqx.is_array))[:1]
        >>> leaf_path(norms, path).axes, x.ndim
        (1, 2)
    """
    owner, field, text = None, "", path_name(path)
    for key in path:
        owner, field = tree, ""
        if isinstance(key, jax.tree_util.GetAttrKey):
            field, tree = key.name, getattr(tree, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            tree = tree[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            tree = tree[key.key]
        else:
            return LeafPath(text)
    if not field:
        return LeafPath(text)
    axes = _axes(owner, field)
    norm = isinstance(owner, _NORMS) or (axes is None and "norm" in type(owner).__name__.lower())
    return LeafPath(text, axes, norm)


def _axes(module: Any, field: str) -> int | None:
    """Returns how many axes a field of one module has, if the module or its class says so."""
    if isinstance(module, eqx.nn.LayerNorm | eqx.nn.RMSNorm):
        return len(module.shape)
    if isinstance(module, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return module.num_spatial_dims + (2 if field == "weight" else 1)
    if isinstance(module, eqx.nn.Linear | eqx.nn.Embedding | eqx.nn.GRUCell | eqx.nn.LSTMCell):
        return 1 if field.startswith("bias") else 2
    if isinstance(module, eqx.nn.GroupNorm):
        return 1
    kind: Any = type(module)
    return _annotated(kind).get(field)


@functools.cache
def _annotated(kind: type) -> dict[str, int]:
    """Returns the number of axes in each annotation of a class such as `Float[Array, "d n h"]`."""
    try:
        hints = typing.get_type_hints(kind)
    except Exception:  # whatever a class may write there
        return {}
    found = {}
    for name, hint in hints.items():
        # "..." and "*b" stand for any number of axes.
        fixed = [
            len(x.dims)
            for x in (hint, *typing.get_args(hint))
            if hasattr(x, "dims") and getattr(x, "index_variadic", 0) is None
        ]
        if len(fixed) == 1:
            found[name] = fixed[0]
    return found


def default_layout(path: str, x: Any) -> Layout:
    """The layout of a leaf, by its path, name and axes, and by what its module says of it.

    A bias or a gain, known by its name (`b`, `bq`, `b_in`, `bias`, `gain`, `scale`, `gamma`,
    `beta`), is a vector, and so is what a norm has, and what has fewer than two axes. Attention's
    `wq`, `wk` and `wv` map d_model to all heads, `wo` maps all heads to d_model. Other weights are
    `(inputs, outputs)`. Axes before these are apart, and of a vector the axes of stacked layers:
    those of `scan_layers`, and of modules that `eqx.filter_vmap` has made, if they are of
    `equinox.nn` or have fields annotated like `Float[Array, "d n h"]`.

    Arguments:
        path: such as "decoder.layers.0.self_attention.wq"; where an optimizer calls it, a
            `LeafPath`.
        x: the array, or its shape as a `jax.ShapeDtypeStruct`.

    Example:
        >>> default_layout("decoder.layers.stacked.self_attention.wo", jnp.ones((6, 2, 8, 16)))
        Layout(apart=1, inputs=2)
        >>> default_layout("blocks.norm.weight", jnp.ones((6, 16)))
        Layout(apart=1, inputs=0)
    """
    names = [name for name in path.lower().split(".") if not name.isdigit()]
    field, parent = [*("", "", *names)[-1:-3:-1]]
    scanned = int("stacked" in names)
    if re.fullmatch(_BIAS, field):
        return Layout(scanned, 0)
    axes, in_norm = getattr(path, "axes", None), getattr(path, "in_norm", False)
    named = in_norm or re.fullmatch(_SCALE, field) or re.fullmatch(_NORM_VECTOR, field)
    if axes is None:
        named = named or re.fullmatch(_NORM, parent)
        axes = 1 if named else x.ndim - scanned
    stacked = max(0, x.ndim - axes)
    if named or x.ndim - stacked < 2:
        return Layout(stacked, 0)
    if field in ("wq", "wk", "wv", "wo") and x.ndim - stacked >= 3:
        return Layout(x.ndim - 3, 2 if field == "wo" else 1)
    return Layout(x.ndim - 2, 1)
