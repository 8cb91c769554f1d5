"""Compares a library of operations in C with JAX, in a process of its own: `check PATH`.

A process, because a library that does not fit the machine may end it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.native import attention, products
from jaxformers.native.library import register
from jaxformers.quantization import products as integers


def main(path: str) -> None:
    """Ends the process with an error unless all operations agree."""
    register(Path(path))
    draw = np.random.default_rng(0)

    def normal(*shape: int, dtype: type = jnp.float32) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        q, k, v = (
            normal(*x, dtype=dtype) for x in ((2, 6, 2, 24), (2, 2, 600, 24), (2, 2, 600, 40))
        )
        allowed = jnp.asarray(draw.random((2, 1, 2, 600)) < 0.5)
        bias = normal(1, 6, 2, 600)
        arrays = q, k, v, allowed, bias
        _compare(
            "attend", attention._attend, attention._plain, arrays, bound, heads=2, softcap=20.0
        )
        x, w = normal(3, 37), normal(37, 50, dtype=dtype)
        beside = x, w, w[:, :21]
        _compare("rows_times", products._rows_times, products._plain, beside, 1e-4)
        none = jnp.zeros((1, 0), jnp.float32)
        transposed = products._rows_times_transpose, products._plain_transpose
        _compare("rows_times_transpose", *transposed, (x, w.T, none, none), 1e-4)
        x, w = normal(2, 70, 1100, dtype=dtype), normal(2, 1100, 45, dtype=dtype)
        many = products._product, products._plain_product
        _compare("product", *many, (x, w), 1e-3, left=0, right=0)
        _compare("product", *many, (x.mT, w.mT), 1e-3, left=1, right=1)
    for dtype, low, high in ((jnp.int8, -127, 128), (jnp.uint8, 0, 256)):
        width = 64 if dtype == jnp.int8 else 32
        w = jnp.asarray(draw.integers(low, high, (21, width)), dtype)
        several = w, normal(21, 2), normal(21, 2), w[:6], normal(6, 1), jnp.zeros((6, 0))
        _compare("integers", integers._native, integers._plain, (normal(5, 64), *several), 1e-2)


def _compare(
    name: str, native: Callable, plain: Callable, arrays: tuple, bound: float, **numbers: float
) -> None:
    got, want = native(*arrays, **numbers), plain(*arrays, **numbers)
    difference = float(jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max())
    if not difference <= bound:
        raise SystemExit(f"{name} differs from JAX by {difference}")


if __name__ == "__main__":
    main(sys.argv[1])
