"""Placement of models, batches and states on a mesh."""

from collections.abc import Iterator
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxformers.axes import Axes
from jaxformers.checks import is_known
from jaxformers.paths import path_name
from jaxformers.sharding.mesh import as_auto, mesh_in, sizes_of
from jaxformers.sharding.rules import RULES, Rules, as_names, check_names, layout, spec_of

Tree = TypeVar("Tree", bound=PyTree)


def shard(model: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """Returns a copy of a model whose arrays are spread over a mesh.

    All else follows: `optimizer.init` gives moments that lie like their weights, `train_step` and
    `fit` keep the layout, `generate` decodes with it. The arrays of the given model stay as they
    are; none is shared with the copy.

    Divided over "fsdp", a model needs little memory only if its layers are scanned: call
    `scan_layers` first. XLA gathers the weights of separate layers early, all at once, which takes
    about twice the memory of the parameters in addition.

    Arguments:
        model: a model, such as `TransformerLM`, also with adapters or quantized weights.
        mesh: from `make_mesh`.
        rules: see `layout`.

    Raises:
        ValueError: as `layout` does.

    Example:
        >>> from jaxformers.sharding import make_mesh
        >>> mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
        >>> spread = shard(model, mesh)
        >>> len(spread.output.w.devices())
        2
    """
    known: dict[int, jax.Array] = {}

    def put(where: NamedSharding | None, x: Any) -> Any:
        if where is None:
            return x
        if id(x) not in known:  # an array that a model has twice stays one array
            known[id(x)] = place(x, where)
        return known[id(x)]

    places = layout(model, mesh, rules)
    return jax.tree.map(put, places, model, is_leaf=lambda x: x is None)


def shard_batch(batch: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """Returns a batch whose rows are divided over the devices of a mesh.

    The first axis of each array is rows, divided over "data" and "fsdp"; the second is positions,
    divided over "sequence". Numbers are copied to every device.

    Arguments:
        batch: any pytree of arrays, of NumPy or JAX. On several hosts each passes the whole batch,
            of which its devices get their parts; `join_batch` takes the rows of a host alone.
        mesh: from `make_mesh`.
        rules: see `layout`; only the letters "b" and "t" matter here.

    Raises:
        ValueError: if rows or positions cannot be divided.

    Example:
        >>> from jaxformers.sharding import make_mesh
        >>> mesh = make_mesh(data=2, devices=jax.devices()[:2])
        >>> batch = shard_batch({"tokens": np.ones((4, 6), np.int32)}, mesh)
        >>> tuple(batch["tokens"].sharding.spec)
        ('data',)
    """
    mesh = as_auto(mesh)
    check_names(mesh, rules)
    sizes = sizes_of(mesh)

    def put(path: tuple, x: Any) -> Any:
        if not hasattr(x, "shape") and not isinstance(x, bool | int | float):
            return x
        shape = np.shape(x)
        spec = row_spec(len(shape), sizes, rules)
        for i, over in _undivided(shape, spec, sizes):
            what = "rows" if i == 0 else "positions"
            text = " x ".join(f"{axis}={sizes[axis]}" for axis in over)
            raise ValueError(
                f"{path_name(path) or 'the batch'} {shape} has {shape[i]} {what}, which cannot "
                f"be divided over {text}. Pass a multiple of {prod(sizes[axis] for axis in over)}."
            )
        return place(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, batch)


def shard_or_copy(batch: Tree, mesh: Mesh) -> Tree:
    """Returns a batch as `shard_batch` does; what cannot be divided is copied to every device.

    Arrays that lie on several devices stay there.
    """
    sizes = sizes_of(mesh)

    def put(x: Any) -> Any:
        if not hasattr(x, "shape") or mesh_in([x]) is not None:
            return x
        spec = row_spec(x.ndim, sizes)
        whole = any(_undivided(x.shape, spec, sizes))
        return place(x, NamedSharding(mesh, PartitionSpec() if whole else spec))

    return jax.tree.map(put, batch)


def _undivided(
    shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields the axes of an array that cannot be divided, each with its axes of the mesh."""
    for i, over in enumerate(map(as_names, spec)):
        if shape[i] % prod(sizes[axis] for axis in over):
            yield i, over


def row_spec(ndim: int, sizes: dict[str, int], rules: Rules = RULES) -> PartitionSpec:
    """Returns how an array of a batch lies, whose first axes are rows and positions."""
    return spec_of(Axes(("b", "t")[:ndim], ("input",) * min(ndim, 2)), sizes, rules)


def place(x: Any, where: NamedSharding) -> jax.Array:
    """Returns a copy of an array at its place, of which every host has at least its own parts."""
    if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        shared = isinstance(x, jax.Array) and x.sharding.device_set & where.device_set
        placed = jax.device_put(x, where, may_alias=False)
        # A device that has a part already keeps it: a step that overwrites it would destroy `x`.
        return placed.copy() if shared else placed
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])


def lie_like(moment: Any, weight: Any) -> Any:
    """Returns a moment that lies on the devices of its weight: as the weight if it has its shape.

    One of another shape is copied to each of these devices.
    """
    mesh = mesh_in([weight])
    if mesh is None or not isinstance(moment, jax.Array) or mesh_in([moment]) is not None:
        return moment
    same = moment.shape == weight.shape
    return place(moment, weight.sharding if same else NamedSharding(mesh, PartitionSpec()))


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """Returns a tree whose arrays on one device are copied to all devices of a mesh.

    These are the numbers beside the weights, such as counts of steps and keys. Without that the
    second step would find them at another place than the first, and be compiled again.
    """
    if mesh is None:
        return tree

    def put(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not is_known(x) or len(x.sharding.device_set) > 1:
            return x
        where = NamedSharding(mesh, PartitionSpec())
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(x), where)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return place(x, where)

    return jax.tree.map(put, tree)


def _is_none(x: Any) -> bool:
    return x is None


Places = tuple[Any, ...] | None


def places_of(mesh: Mesh | None, tree: PyTree) -> Places:
    """Returns where the arrays of a tree lie, or None if there is no mesh."""
    if mesh is None:
        return None
    leaves = jax.tree.leaves(tree, is_leaf=_is_none)
    return tuple(x.sharding if isinstance(x, jax.Array) and is_known(x) else None for x in leaves)


def lie_at(tree: Tree, places: Places) -> Tree:
    """Returns a traced tree whose arrays lie at these places; None changes nothing.

    The result of a step lies like its input in this way, so that the next step is the same program.
    """
    if places is None:
        return tree
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_none)
    leaves = [
        jax.lax.with_sharding_constraint(x, where)
        if isinstance(x, jax.Array) and isinstance(where, NamedSharding)
        else x
        for x, where in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)
