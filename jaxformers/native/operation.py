"""An operation in C as a primitive of JAX, which has a function of JAX beside it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxformers.native.library import target


def operation(
    name: str, plain: Callable[..., Array], shape: Callable[..., jax.ShapeDtypeStruct]
) -> Callable[..., Array]:
    """Returns a function that runs an operation in C where a program is compiled for a CPU.

    On other devices, under `vmap` and under differentiation the plain function runs.

    Arguments:
        name: the operation, one of `jaxformers.native.library.OPERATIONS`.
        plain: computes the same with JAX, from arrays and from numbers given by name.
        shape: returns the shape and type of the result, from those of the arrays.
    """
    primitive = Primitive(f"jaxformers_{name}")

    def abstract(*arrays: Any, **numbers: float) -> Any:
        y = shape(*arrays)
        return jax.core.ShapedArray(y.shape, y.dtype)

    def native(*arrays: Array, **numbers: float) -> Array:
        attributes = {
            key: np.int64(x) if isinstance(x, int) else np.float32(x) for key, x in numbers.items()
        }
        return jax.ffi.ffi_call(target(name), shape(*arrays))(*arrays, **attributes)

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

    program = jax.jit(
        lambda numbers, *arrays: primitive.bind(*arrays, **dict(numbers)), static_argnums=0
    )
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *arrays, **numbers: program(tuple(numbers.items()), *arrays))
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    lowered = mlir.lower_fun(native, multiple_results=False)
    mlir.register_lowering(primitive, lowered, platform="cpu")
    ad.primitive_jvps[primitive] = differentiate
    batching.primitive_batchers[primitive] = batch
    return primitive.bind


def is_spread(x: Any) -> bool:
    """Returns whether an array lies on several devices, as far as is known while it is traced."""
    if isinstance(x, jax.core.Tracer):
        mesh = getattr(jax.typeof(x).sharding, "mesh", None)
        return mesh is not None and not mesh.empty and mesh.size > 1
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
