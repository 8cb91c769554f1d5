"""Constraints inside a program, which keep XLA from moving more than it must.

Without them the values are the same on every mesh, and fifteen times as many bytes are moved: XLA
copies the activations of the whole batch to every device to multiply them by divided weights. Two
constraints suffice. The residual stream is divided by rows. A layer's weights are gathered over
"fsdp" inside the step of the layer, so that few layers are whole at a time. Both are for calls
without a cache: while tokens are decoded, gathering the few activations costs less.
"""

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxformers.axes import Axes, axes_of
from jaxformers.paths import path_name
from jaxformers.sharding.mesh import FSDP, sizes_of, traced_mesh
from jaxformers.sharding.rules import mesh_axes

Tree = TypeVar("Tree", bound=PyTree)


def divide_rows(x: Float[Array, "*b t d"]) -> Float[Array, "*b t d"]:
    """Returns the residual stream, divided over the mesh by rows and positions.

    An axis that cannot be divided is left to XLA, and so is a stream without rows.
    """
    mesh = traced_mesh(x)
    if mesh is None or x.ndim != 3:
        return x
    sizes, parts = sizes_of(mesh), []
    for name, size in zip("bt", x.shape, strict=False):
        over = tuple(axis for axis in mesh_axes(name) if axis in sizes)
        number = prod(sizes[axis] for axis in over)
        parts.append(PartitionSpec.UNCONSTRAINED if size % number else over or None)
    return _constrain(x, mesh, [*parts, None])


def gather(tree: Tree, outside_layers: bool = False) -> Tree:
    """Returns a part of a model whose weights are whole over "fsdp", where they are computed with.

    Arguments:
        tree: a layer, or a model.
        outside_layers: whether the layers of the model's stacks stay as they are, which gather
            their weights one after another; False.
    """

    if not any(map(gathers, jax.tree.leaves(tree))):
        return tree

    def whole(path: tuple, axes: Axes | None, x: Any) -> Any:
        if axes is None or not axes.inputs or not gathers(x):
            return x
        if outside_layers and "layers" in path_name(path).split("."):
            return x
        divided = [FSDP in mesh_axes(name) for name in axes.names]
        if not any(divided):
            return x
        free = PartitionSpec.UNCONSTRAINED  # over "tensor", as the rules say
        return _constrain(x, traced_mesh(x), [None if own else free for own in divided])

    return jax.tree_util.tree_map_with_path(
        whole, axes_of(tree), tree, is_leaf=lambda x: x is None or isinstance(x, Axes)
    )


def by_rows(function: Callable, module: Tree, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Returns `function(module, x)`, for which devices with other rows exchange nothing.

    It is for functions that treat each token alone but sort them, where XLA would bring all tokens
    together on every device. Each device then sorts its own rows. That needs whole weights. So the
    single tokens of a decoding loop, which would have them gathered in each turn, go without.
    """
    mesh = traced_mesh(x)
    if mesh is None or x.ndim != 3 or x.shape[1] == 1:
        return function(module, x)
    over = tuple(axis for axis in mesh_axes("b") if axis in sizes_of(mesh))
    if not over or x.shape[0] % prod(mesh.shape[axis] for axis in over):
        return function(module, x)
    arrays, rest = eqx.partition(module, eqx.is_array)
    rows = PartitionSpec(over)

    def run(arrays: Any, x: Array) -> Array:
        # Said here, once, or each turn of a loop would add up its gradients over all devices.
        arrays = jax.lax.pcast(arrays, over, to="varying")
        return function(eqx.combine(arrays, rest), x)

    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        axis_names=set(over),
    )(arrays, x)


def gathers(x: Any) -> bool:
    """Returns whether `x` lies on a mesh that divides weights over "fsdp"."""
    mesh = traced_mesh(x)
    return mesh is not None and FSDP in sizes_of(mesh)


def _constrain(x: Any, mesh: Any, parts: list[Any]) -> Any:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))
