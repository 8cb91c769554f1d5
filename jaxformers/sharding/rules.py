"""The rules that say over which axes of a mesh an array of a model is spread.

They rest on the names of axes that `axes_of` reads from annotations. One table serves all models;
whoever wants another passes `rules=RULES | {...}`.
"""

from collections.abc import Mapping, Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxformers.axes import Axes, axes_of
from jaxformers.paths import path_name
from jaxformers.sharding.mesh import AXES, DATA, FSDP, SEQUENCE, TENSOR, as_auto, sizes_of

Rules = Mapping[str, str | tuple[str, ...] | None]

# The mesh axes of each letter; letters that are not here stay whole on every device. The letters
# are explained in `attention.py`.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "b": (DATA, FSDP),
    "t": SEQUENCE,
    "d": FSDP,
    "m": FSDP,
    "i": FSDP,
    "n": TENSOR,
    "g": TENSOR,
    "f": TENSOR,
    "v": TENSOR,
}


class Misfit(NamedTuple):
    """An axis of an array that cannot be divided over the devices."""

    path: str
    name: str
    size: int
    over: tuple[str, ...]


def layout(model: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree[NamedSharding]:
    """Returns how each array of a model lies on a mesh.

    Arguments:
        model: a model, or such a tree with `jax.ShapeDtypeStruct` in place of arrays.
        mesh: from `make_mesh`, or any mesh whose axes have the names that the rules use.
        rules: the mesh axes, one or several or None, of each axis letter of the arrays. A mesh
            axis is used once in an array, by the first letter that asks for it. Biases, gains and
            other vectors are not divided over "fsdp", since they are small. Inside a program,
            activations are divided and weights gathered as `RULES` says, whatever is given here.
            So other rules may have more sent between devices, and never change a value.

    Returns:
        The model's tree with a `NamedSharding` in place of each array and None in place of other
        leaves.

    Raises:
        ValueError: if an axis of an array cannot be divided. The error names the array, the axis
            and its size, and a mesh that works. Also if no rule divides anything over an axis of
            the mesh.

    Example:
        >>> from jaxformers.sharding import make_mesh
        >>> mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
        >>> tuple(layout(model, mesh).decoder.layers[0].self_attention.wq.spec)
        ('fsdp',)
    """
    mesh = as_auto(mesh)
    check_names(mesh, rules)
    axes = axes_of(model)
    specs = iter(divide(named_arrays(model, axes), dict(mesh.shape), rules))
    return jax.tree.map(lambda _: NamedSharding(mesh, next(specs)), axes, is_leaf=_is_axes)


class NamedArray(NamedTuple):
    """An array of a model, by what the rules ask of it."""

    path: str
    axes: Axes
    shape: tuple[int, ...]


def named_arrays(model: PyTree, axes: PyTree[Axes]) -> list[NamedArray]:
    """Returns the arrays of a model, in the order of `axes`, which is `axes_of(model)`."""
    shapes = [x.shape for x in jax.tree.leaves(model) if hasattr(x, "shape")]
    found = jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)
    pairs = zip(found, shapes, strict=True)
    return [NamedArray(path_name(path), names, shape) for (path, names), shape in pairs]


def _is_axes(x: Any) -> bool:
    return isinstance(x, Axes)


def divide(
    arrays: Sequence[NamedArray], asked: Mapping[str, int], rules: Rules = RULES
) -> list[PartitionSpec]:
    """Returns how each of these arrays lies on a mesh of these sizes, which needs no devices.

    Raises:
        ValueError: as `layout` does.
    """
    sizes = {axis: size for axis, size in asked.items() if size > 1}
    specs, divided, misfits = [], [], []
    for path, axes, shape in arrays:
        specs.append(spec_of(axes, sizes, rules))
        for name, size, over in zip(axes.names, shape, specs[-1], strict=False):
            if over is not None:
                over = as_names(over)
                divided.append((size, over))
                if size % prod(sizes[axis] for axis in over):
                    misfits.append(Misfit(path, name, size, over))
    if misfits:
        raise ValueError(_explain(misfits[0], divided, asked))
    return specs


class Places:
    """The places of a model's arrays by path, as `sharding=` of loaders takes them.

    Arguments:
        model: the model with shapes in place of its arrays.
        mesh: from `make_mesh`.

    Raises:
        ValueError: as `layout` does, before anything is read.
    """

    def __init__(self, model: PyTree, mesh: Mesh):
        self.mesh = as_auto(mesh)
        places = jax.tree_util.tree_leaves_with_path(layout(model, self.mesh))
        self._known = {path_name(path): place for path, place in places}

    def __call__(self, path: str, shape: Any) -> NamedSharding:
        return self._known[path]

    def add(self, path: str, axes: Axes) -> None:
        """Adds the place of an array with these axes, such as the scale of a quantized weight."""
        self._known[path] = NamedSharding(self.mesh, spec_of(axes, sizes_of(self.mesh)))


def spec_of(axes: Axes, sizes: Mapping[str, int], rules: Rules = RULES) -> PartitionSpec:
    """Returns how an array with these axes lies on a mesh with axes of these sizes.

    Example:
        >>> from jaxformers.axes import read_axes
        >>> tuple(spec_of(read_axes(("d", "n", "h")), {"fsdp": 4, "tensor": 2}))
        ('fsdp', 'tensor')
    """
    free = [axis for axis in sizes if axes.inputs or axis != FSDP]
    parts: list[Any] = []
    for name in axes.names:
        over = tuple(axis for axis in mesh_axes(name, rules) if axis in free)
        free = [axis for axis in free if axis not in over]
        parts.append(over if len(over) > 1 else over[0] if over else None)
    while parts and parts[-1] is None:  # as XLA writes them, so that equal layouts are equal
        parts.pop()
    return PartitionSpec(*parts)


def check_names(mesh: Mesh, rules: Rules) -> None:
    """Raises an error if a mesh has an axis that no rule names: its devices would do the same.

    Example:
        >>> check_names(jax.make_mesh((1,), ("x",)), RULES)  # one device has nothing to divide
    """
    named = {axis for name in rules for axis in mesh_axes(name, rules)}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in named:
            raise ValueError(
                f"the mesh has {size} devices along its axis {axis!r}, over which no rule divides "
                f"anything; the rules name {', '.join(sorted(named))}. Use make_mesh, or a rule "
                f"for it, such as rules=RULES | {{'b': {axis!r}}}."
            )


def mesh_axes(name: str, rules: Rules = RULES) -> tuple[str, ...]:
    """Returns the mesh axes of an axis letter; "d/2", two numbers in a byte, is as "d"."""
    return as_names(rules.get(name.partition("/")[0]))


def as_names(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of a rule, or of one axis of a `PartitionSpec`, as a tuple."""
    return (over,) if isinstance(over, str) else tuple(over or ())


def parts_of(name: str, sizes: Mapping[str, int]) -> int:
    """Returns into how many parts an axis with this letter is divided on a mesh of these sizes.

    Example:
        >>> parts_of("b", {"data": 2, "fsdp": 4, "tensor": 2})
        8
    """
    return prod(sizes.get(axis, 1) for axis in mesh_axes(name))


def _explain(
    misfit: Misfit, divided: list[tuple[int, tuple[str, ...]]], asked: Mapping[str, int]
) -> str:
    """Returns the text of the error for an axis that does not divide, with a mesh that works."""
    path, name, size, over = misfit
    # Each mesh axis shrinks to what divides all sizes; the devices that become free go to "data".
    fits = {
        axis: gcd(n, *(size for size, used in divided if axis in used)) for axis, n in asked.items()
    }
    if DATA in fits:
        fits[DATA] = asked[DATA]
        fits[DATA] *= prod(asked.values()) // prod(fits.values())
    text = ", ".join(f"{axis}={n}" for axis, n in fits.items() if n > 1)
    call = f"make_mesh({text})" if set(fits) <= set(AXES) else f"a mesh of {text}"
    spread = " x ".join(f"{axis}={asked[axis]}" for axis in over)
    return (
        f"{path} has {size} along its axis {name!r}, which cannot be divided over {spread}. Use "
        f"{call}, or keep this axis whole on every device: rules=RULES | {{{name!r}: None}}."
    )
