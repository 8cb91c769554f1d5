"""An operation in C as a primitive of JAX, which has a function of JAX beside it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jaxtyping import Array

from jaxformers.native.library import target


def operation(
    name: str,
    plain: Callable[..., Array],
    shape: Callable[..., jax.ShapeDtypeStruct],
    *,
    ready: Callable[[], bool] = lambda: True,
    scratch: Callable[..., int] | None = None,
    cotangents: tuple[Callable[..., Array], Callable[..., Array]] | None = None,
) -> Callable[..., Array]:
    """Returns a function that runs an operation in C where a program is compiled for a CPU.

    On other devices, under `vmap`, under differentiation and in exported programs the plain
    function runs.

    Arguments:
        name: the operation, one of `jaxformers.native.library.OPERATIONS`.
        plain: computes the same with JAX, from arrays and from numbers given by name.
        shape: returns the shape and type of the result, from the arguments of `plain`.
        ready: returns whether this processor can run the operation; for `lambda: True` each can.
        scratch: returns how many bytes the operation needs beside its result, from the same; None
            is none.
        cotangents: for an operation on two arrays that is linear in each of them: two functions
            from the cotangent of the result, both arrays and the numbers to the cotangents of the
            arrays. Derivatives then run in C as well. None is for other operations.
    """
    primitive = Primitive(f"jaxformers_{name}")

    def abstract(*arrays: Any, **numbers: float) -> Any:
        y = shape(*arrays, **numbers)
        return jax.core.ShapedArray(y.shape, y.dtype)

    def native(*arrays: Array, **numbers: float) -> Array:
        attributes = {
            key: np.int64(x) if isinstance(x, int) else np.float32(x) for key, x in numbers.items()
        }
        results = [shape(*arrays, **numbers)]
        if scratch is not None:
            results.append(jax.ShapeDtypeStruct((scratch(*arrays, **numbers),), np.uint8))
        return jax.ffi.ffi_call(target(name), results)(*arrays, **attributes)[0]

    def differentiate(primals: Any, tangents: Any, **numbers: float) -> Any:
        moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

        def of_moving(*given: Array) -> Array:
            arrays = list(primals)
            for i, x in zip(moving, given, strict=True):
                arrays[i] = x
            return plain(*arrays, **numbers)

        given, change = (tuple(x[i] for i in moving) for x in (primals, tangents))
        return jax.jvp(of_moving, given, change)

    def batch(arrays: Any, axes: Any, **numbers: float) -> Any:
        return jax.vmap(partial(plain, **numbers), axes)(*arrays), 0

    in_jax, in_c = (mlir.lower_fun(f, multiple_results=False) for f in (plain, native))

    def lower_for_cpu(context: Any, *arrays: Any, **numbers: float) -> Any:
        # A program that is exported runs where there may be no library.
        exported = context.module_context.lowering_parameters.for_export
        return (in_c if ready() and not exported else in_jax)(context, *arrays, **numbers)

    program = jax.jit(
        lambda numbers, *arrays: primitive.bind(*arrays, **dict(numbers)), static_argnums=0
    )

    def run(*arrays: Array, **numbers: float) -> Array:
        with jax.disable_jit(False):  # else the program would call this function again
            return program(tuple(numbers.items()), *arrays)

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(run)
    mlir.register_lowering(primitive, in_jax)
    mlir.register_lowering(primitive, lower_for_cpu, platform="cpu")
    if cotangents is None:
        ad.primitive_jvps[primitive] = differentiate
    else:
        ad.defbilinear(primitive, *cotangents)
    batching.primitive_batchers[primitive] = batch
    return primitive.bind


def is_spread(x: Any) -> bool:
    """Returns whether an array lies on several devices, as far as is known while it is traced.

    An array whose type says more of a mesh than an operation knows counts as well: one inside
    `jax.shard_map`, or on a mesh with Explicit axes, be it of one device.
    """
    if not isinstance(x, jax.Array):
        return False
    if not isinstance(x, jax.core.Tracer) and len(x.sharding.device_set) > 1:
        return True
    mesh = getattr(jax.typeof(x).sharding, "mesh", None)
    if mesh is None or mesh.empty:  # a mesh that is set divides arrays whose types do not say so
        return jax.sharding.get_abstract_mesh().size > 1
    return mesh.size > 1 or any(kind != AxisType.Auto for kind in mesh.axis_types)


def is_fixed(*arrays: Any) -> bool:
    """Returns whether all sizes are numbers, which they need not be in an exported program."""
    return all(isinstance(n, int) for x in arrays for n in x.shape)
