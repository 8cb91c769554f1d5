"""The meaning of the axes of a model's arrays, read from the annotations of its fields.

`wq: Float[Array, "d n h"]` names the axes of a weight. `axes_of` gives these names for every array
of a model, and says which axes are inputs of a linear map, which are its outputs, and which lie
apart because they count maps of the same kind, such as experts or stacked layers. Whoever adds a
weight to a module only writes its annotation.

The rule, which `read_axes` applies:

- The axes of a weight are those apart, then the inputs, then the outputs. The last axis is the
  outputs, the axis before it the inputs, and all others lie apart: "d f", "e d f", "v d".
- Among three axes or more, `h` after `n` or `g` belongs to these heads: "d n h", "n h d".
- `i` and `o` in one annotation are the inputs and the outputs in any order: PyTorch's "o i".
- An array of one axis is a vector, and so is an array whose name says bias or gain: "n h" of `bq`.
  All its axes are outputs, except those of experts and layers before them.
- Axes before those of the annotation count modules: the layers of `scan_layers`, or the copies
  that `eqx.filter_vmap` has made. They lie apart.

Arrays that nothing annotates are read in the same way by the name of their field. A weight may be
an object with several arrays; its method `field_axes(axes)` returns the axes of each of its fields,
given the axes of the array that it stands for.
"""

import functools
import re
import typing
from dataclasses import dataclass
from math import prod
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxformers.paths import path_name

# The name of an axis that nothing names, as in jaxtyping.
UNNAMED = "_"

# Heads and the features of a head, which together are the inputs or the outputs of a map.
_TOGETHER = ("n", "h"), ("g", "h")

# Names of vectors, and of the norms that they belong to.
_BIAS = r"b|b[a-z]|b_.*|bias.*|gain.*"
_SCALE = r"(.*_)?(scale|gamma|beta)[0-9]*|negative_slope"
_NORM = r"(.*_)?([a-z]*norm|ln)(_?[0-9a-z])?"
_NORM_VECTOR = rf"{_NORM}(_(w|g|weight|gain|scale|gamma|beta))?"

# The axes of unannotated arrays of three axes that have the names of attention's weights.
_BY_CONVENTION = {"wq": "d n h", "wk": "d g h", "wv": "d g h", "wo": "n h d"}

_EQUINOX_NORMS = eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm


@dataclass(frozen=True)
class Axes:
    """The names and the roles of the axes of an array.

    Arguments:
        names: such as `("d", "n", "h")`; "_" is an axis without a name.
        roles: of each axis "apart", "input" or "output".

    Example:
        >>> Axes(("n", "h", "d"), ("input", "input", "output")).sizes((2, 8, 16))
        (1, 16, 16)
    """

    names: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()

    @property
    def apart(self) -> tuple[int, ...]:
        """The indices of the axes that lie apart."""
        return self._where("apart")

    @property
    def inputs(self) -> tuple[int, ...]:
        """The indices of the axes that are inputs of a map; a vector has none."""
        return self._where("input")

    @property
    def outputs(self) -> tuple[int, ...]:
        """The indices of the axes that are outputs of a map, or the features of a vector."""
        return self._where("output")

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns the number of maps, and of the inputs and outputs of each, in an array."""
        apart, inputs, outputs = (
            prod(shape[i] for i in where) for where in (self.apart, self.inputs, self.outputs)
        )
        return apart, inputs, outputs

    def factors(self, rank: str = "r") -> tuple["Axes", "Axes"]:
        """Returns the axes of two factors whose product, a sum over `rank`, has these axes.

        Example:
            >>> a, b = read_axes(("d", "n", "h")).factors()
            >>> a.names, b.names
            (('d', 'r'), ('r', 'n', 'h'))
        """
        apart, inputs, outputs = (
            [self.names[i] for i in where] for where in (self.apart, self.inputs, self.outputs)
        )
        a = _in_groups((*apart, *inputs, rank), len(apart), len(inputs))
        b = _in_groups((*apart, rank, *outputs), len(apart), 1)
        return a, b

    def _where(self, role: str) -> tuple[int, ...]:
        return tuple(i for i, r in enumerate(self.roles) if r == role)


class Letters:
    """A note on a field that says what the letters of the module in this field mean here.

    A norm calls the features of its input `d`, for example. On queries these are the features of a
    head, which attention writes as `q_norm: Annotated[Callable | None, Letters(d="h")]`. A meaning
    of two letters adds an axis: `Letters(d="n d")`.
    """

    def __init__(self, **letters: str):
        self.letters = letters

    def rename(self, axes: Axes) -> Axes:
        """Returns the axes with their names in the letters of the module that has the field."""
        pairs = [
            (name, role)
            for old, role in zip(axes.names, axes.roles, strict=True)
            for name in re.sub(r"[A-Za-z]\w*", lambda x: self.letters.get(x[0], x[0]), old).split()
        ]
        return Axes(tuple(name for name, _ in pairs), tuple(role for _, role in pairs))


@dataclass(frozen=True)
class Stacked:
    """A note on a field whose module has one more axis, `name`, before the axes of each array."""

    name: str


# The names in the annotation of a field, None if there are none, and its notes.
_Annotation = tuple[tuple[str, ...] | None, tuple[Letters | Stacked, ...]]


def axes_of(model: PyTree) -> PyTree[Axes]:
    """Returns the axes of each array of a model.

    Arguments:
        model: a model of this package, any other pytree of Equinox modules, or such a tree with
            `jax.ShapeDtypeStruct` in place of arrays.

    Returns:
        A tree with the structure of `model` that has `Axes` in place of each array and None in
        place of other leaves.

    Example:
        >>> axes = axes_of(model)
        >>> axes.decoder.layers[0].self_attention.wo.names
        ('n', 'h', 'd')
        >>> axes.output.w.inputs, axes.output.w.outputs
        ((0,), (1,))
    """

    def of_leaf(path: tuple, leaf: Any) -> Axes | None:
        if not _is_array(leaf):
            return None
        return axes_at(model, path) or axes_by_name(path_name(path), len(leaf.shape))

    return jax.tree_util.tree_map_with_path(of_leaf, model)


def axes_at(tree: PyTree, path: tuple) -> Axes | None:
    """Returns the axes of the array at a path into a tree; None if a key is only a number.

    Arguments:
        tree: the model, or a part of it that has None elsewhere.
        path: keys as JAX gives them, for instance `jax.tree_util.tree_leaves_with_path`.
    """
    node, axes, in_norm = tree, None, False
    notes: list[Letters | Stacked] = []
    for i, key in enumerate(path):
        if isinstance(key, jax.tree_util.GetAttrKey):
            in_norm = isinstance(node, _EQUINOX_NORMS)
            if hasattr(node, "field_axes"):
                axes = axes or axes_by_name(path_name(path[:i]), len(node.shape))
                axes = node.field_axes(axes).get(key.name)
            else:
                axes, found = _declared(node, key.name)
                in_norm |= axes is None and "norm" in type(node).__name__.lower()
                notes += found
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
            in_norm = False
            node = node[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
        else:
            return None
    stacks = [note.name for note in notes if isinstance(note, Stacked)]
    for note in reversed(notes):
        if axes is not None and isinstance(note, Letters):
            axes = note.rename(axes)
    ndim = len(getattr(node, "shape", ()))
    if axes is None or len(axes.names) > ndim:
        axes = axes_by_name(path_name(path), ndim, in_norm)
    return _stack(axes, stacks, ndim)


def _stack(axes: Axes, stacks: list[str], ndim: int) -> Axes:
    """Returns the axes of an array that has more axes than its annotation, before the others."""
    more = ndim - len(axes.names)
    names = ([UNNAMED] * more + stacks)[len(stacks) :]
    return Axes((*names, *axes.names), ("apart",) * more + axes.roles)


@functools.cache
def read_axes(names: tuple[str, ...], field: str = "", in_norm: bool = False) -> Axes:
    """Returns the axes of an array with the roles that their names give them.

    This is the one rule of the package; the head of this file states it.

    Arguments:
        names: of the axes in order.
        field: the name of the array, which may say that it is a vector.
        in_norm: whether the array belongs to a norm, whose arrays are vectors.

    Example:
        >>> read_axes(("e", "d", "f")).roles
        ('apart', 'input', 'output')
        >>> read_axes(("n", "h"), "bq").roles
        ('output', 'output')
    """
    if in_norm or _says_vector(field):
        features = (i for i, name in enumerate(names) if name not in ("l", "e"))
        return _in_groups(names, next(features, max(0, len(names) - 1)), 0)
    if {"i", "o"} <= set(names):
        roles: list[str] = []
        for name in names:
            before = roles[-1] if roles else "apart"
            roles.append("input" if name == "i" else "output" if name == "o" else before)
        return Axes(names, tuple(roles))
    starts = [
        i
        for i in range(len(names))
        if i == 0 or len(names) == 2 or names[i - 1 : i + 1] not in _TOGETHER
    ]
    if len(starts) < 2:
        return _in_groups(names, 0, 0)
    if len(starts) == len(names) == 3 and field in _BY_CONVENTION:
        return Axes(names, read_axes(tuple(_BY_CONVENTION[field].split())).roles)
    return _in_groups(names, starts[-2], starts[-1] - starts[-2])


def _in_groups(names: tuple[str, ...], apart: int, inputs: int) -> Axes:
    """Returns the axes of which some lie apart, some after them are inputs, the rest outputs."""
    outputs = len(names) - apart - inputs
    return Axes(names, ("apart",) * apart + ("input",) * inputs + ("output",) * outputs)


def axes_by_name(path: str, ndim: int, in_norm: bool = False) -> Axes:
    """Returns the axes of an array of `ndim` axes that nothing annotates, by its path.

    Arguments:
        path: such as "blocks.norm.weight".
        ndim: how many axes the array has.
        in_norm: whether it belongs to a norm.

    Example:
        >>> axes_by_name("blocks.norm.weight", 2).roles
        ('apart', 'output')
    """
    parts = [name for name in path.lower().split(".") if not name.isdigit()]
    field, parent = [*("", "", *parts)[-1:-3:-1]]
    scanned = min(int("stacked" in parts), ndim)
    names = ("l",) * scanned + (UNNAMED,) * (ndim - scanned)
    bias, norm = re.fullmatch(_BIAS, field), in_norm or re.fullmatch(_NORM, parent)
    if not bias and (norm or _says_vector(field)):
        return _in_groups(names, max(ndim - 1, 0), 0)
    if bias or ndim - scanned < 2:
        return _in_groups(names, scanned, 0)
    if field in _BY_CONVENTION and ndim - scanned >= 3:
        own = read_axes(tuple(_BY_CONVENTION[field].split()))
        return Axes(names[:-3] + own.names, ("apart",) * (ndim - 3) + own.roles)
    return _in_groups(names, ndim - 2, 1)


def _says_vector(field: str) -> bool:
    """Returns whether the name of an array is that of a bias or a gain."""
    return any(re.fullmatch(x, field.lower()) for x in (_BIAS, _SCALE, _NORM_VECTOR))


def _declared(module: Any, field: str) -> tuple[Axes | None, tuple[Letters | Stacked, ...]]:
    """Returns the axes that a module or its class declares for a field, and the field's notes."""
    kind: Any = type(module)
    names, notes = _annotations(kind).get(field, (None, ()))
    names = _of_equinox(module, field) or names
    in_norm = isinstance(module, _EQUINOX_NORMS)
    return None if names is None else read_axes(names, field, in_norm), notes


def _of_equinox(module: Any, field: str) -> tuple[str, ...] | None:
    """Returns the names of the axes of an array of `equinox.nn`, whose fields have no shapes."""
    nn, bias = eqx.nn, field.startswith("bias")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return ("d",) if len(module.shape) == 1 else (UNNAMED,) * len(module.shape)
    if isinstance(module, nn.GroupNorm):
        return ("d",)
    if isinstance(module, nn.Embedding):
        return ("v", "d")
    if isinstance(module, nn.Conv | nn.ConvTranspose):
        return (*(("o",) if bias else ("o", "i")), *(UNNAMED,) * module.num_spatial_dims)
    if isinstance(module, nn.Linear | nn.GRUCell | nn.LSTMCell):
        return ("o",) if bias else ("o", "i")
    return None


@functools.cache
def _annotations(kind: type) -> dict[str, _Annotation]:
    """Returns the names and notes in the annotations of a class by field."""
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except Exception:  # whatever a class may write there
        return {}
    found: dict[str, _Annotation] = {}
    for name, hint in hints.items():
        notes = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Letters | Stacked)]
        found[name] = _names(hint), tuple(notes)
    return found


def _names(hint: Any) -> tuple[str, ...] | None:
    """Returns the names in an annotation such as `Float[Array, "d n h"] | None`."""
    if hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    found = {
        tuple(x.dim_str.split()) for x in (hint, *typing.get_args(hint)) if hasattr(x, "dim_str")
    }
    if len(found) != 1:
        return None
    (names,) = found
    # "..." and "*b" stand for any number of axes.
    if any(name == "..." or name.startswith("*") for name in names):
        return None
    return tuple(name.lstrip("#?_") or UNNAMED for name in names)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
