"""Meshes of devices, and the mesh that an array lies on.

Everything here uses Auto axes: XLA partitions a program from the layouts of its inputs and from a
few constraints inside it. The mesh is a part of an array's type, `jax.typeof(x).sharding.mesh`,
also while a program is traced. So no mesh is kept in a global or in a context, and on one device
nothing happens at all.
"""

from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import PyTree

from jaxformers.checks import check_size

DATA, FSDP, TENSOR, SEQUENCE = AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, *, devices: Any = None
) -> Mesh:
    """Returns a mesh of devices with four axes, whose sizes multiply to the number of devices.

    Arguments:
        data: how many groups of devices have the whole model each, and rows of the batch of their
            own.
        fsdp: over how many devices each weight and its moments are divided. They also divide the
            rows of the batch. A layer's weights are gathered just before the layer computes
            (Rajbhandari et al. 2020, ZeRO-3).
        tensor: over how many devices heads, the features inside feed-forwards and the vocabulary
            are divided (Shoeybi et al. 2019, Megatron-LM).
        sequence: over how many devices the positions of each row are divided.
        devices: the devices; None is `jax.devices()`.

    Raises:
        ValueError: if a size is not a positive integer, or the sizes do not multiply to the number
            of devices.

    Example:
        >>> dict(make_mesh(data=len(jax.devices())).shape)["fsdp"]
        1
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence), strict=True))
    check_size(**sizes)
    found = jax.devices() if devices is None else list(np.ravel(np.asarray(devices, object)))
    if prod(sizes.values()) != len(found):
        text = " x ".join(f"{name} {size}" for name, size in sizes.items())
        rest = prod(size for name, size in sizes.items() if name != DATA)
        advice = (
            f"Pass data={len(found) // rest}."
            if len(found) % rest == 0
            else f"Choose sizes whose product divides {len(found)}, or pass devices=."
        )
        raise ValueError(
            f"the sizes of a mesh must multiply to the number of devices, {len(found)}, got {text} "
            f"= {prod(sizes.values())}. {advice}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, kinds, devices=found)


def as_auto(mesh: Any) -> Mesh:
    """Returns a mesh whose axes are Auto, of the same devices and names.

    `jax.make_mesh` gives Explicit axes unless it is told otherwise.

    Raises:
        ValueError: if it is no mesh, or an Explicit mesh is set for the whole program.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a mesh of devices such as make_mesh(data=2, fsdp=4), got {mesh!r:.200}."
        )
    check_context()
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_context() -> None:
    """Raises an error if an Explicit mesh is set, under which Auto meshes cannot be used."""
    context = jax.sharding.get_abstract_mesh()
    if any(kind == AxisType.Explicit for kind in context.axis_types):
        raise ValueError(
            f"a mesh with Explicit axes {context.axis_names} is set (jax.set_mesh), and models are "
            "spread over meshes with Auto axes. Leave jax.set_mesh out: the mesh is read from the "
            "arrays. Or set one with axis_types=(jax.sharding.AxisType.Auto,) for each axis."
        )


def sizes_of(mesh: Any) -> dict[str, int]:
    """Returns the sizes of the Auto axes of a mesh that have more than one device, by name."""
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def traced_mesh(x: Any) -> Any:
    """Returns the mesh that a traced array lies on if it has axes of ours, else None."""
    if not isinstance(x, jax.core.Tracer):
        return None
    mesh = getattr(jax.typeof(x).sharding, "mesh", None)
    if mesh is None or mesh.empty or not sizes_of(mesh).keys() & set(AXES):
        return None
    return mesh


def divides_positions(x: Any) -> bool:
    """Returns whether a traced array lies on a mesh that divides the positions of rows."""
    mesh = traced_mesh(x)
    return mesh is not None and SEQUENCE in sizes_of(mesh)


def mesh_in(tree: PyTree) -> Mesh | None:
    """Returns the mesh of the first array in a tree that is spread over devices, else None."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            where = x.sharding
            if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
                if where.mesh.size > 1:
                    check_context()
                    return where.mesh
    return None
