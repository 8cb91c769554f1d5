"""Products of few rows and a matrix of weights, in C."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.native import library
from jaxformers.native.operation import is_fixed, is_spread, operation

# With more rows the products of XLA, which convert a weight once for all of them, are as fast.
FEW = 16


def few_rows(x: Any, w: Any, most: int = FEW) -> bool:
    """Returns whether a product is one of few rows, on one CPU, where there are operations in C."""
    few = x.ndim == 2 and is_fixed(x, w) and 1 <= len(x) <= most
    few = few and x.dtype in (jnp.float32, jnp.bfloat16)
    if not few or 0 in (*x.shape, *w.shape) or jax.default_backend() != "cpu":
        return False
    return not (is_spread(x) or is_spread(w)) and library.obstacle() is None


def rows_times(x: Float[Array, "*r i"], w: Float[Array, "i o"]) -> Float[Array, "*r o"]:
    """Returns `x w`, by an operation in C where that is faster.

    That is measured for weights of 16 bits, and for those of 32 bits with up to eight rows.
    """
    most = {jnp.dtype(jnp.float32): 8, jnp.dtype(jnp.bfloat16): FEW}.get(w.dtype, 0)
    if x.dtype == w.dtype and x.shape[-1] == w.shape[0] and few_rows(x, w, most):
        return _rows_times(x.astype(jnp.float32), w).astype(x.dtype)
    return x @ w


def rows_times_transpose(x: Float[Array, "*r i"], w: Float[Array, "o i"]) -> Float[Array, "*r o"]:
    """Returns `x w^T`, by an operation in C where that is faster.

    That is measured for weights of 16 bits, and for those of 32 bits with up to four rows.
    """
    most = {jnp.dtype(jnp.float32): 4, jnp.dtype(jnp.bfloat16): FEW}.get(w.dtype, 0)
    if x.dtype == w.dtype and x.shape[-1] == w.shape[1] and few_rows(x, w, most):
        none = jnp.zeros((1, 0), jnp.float32)
        return _rows_times_transpose(x.astype(jnp.float32), w, none, none).astype(x.dtype)
    return x @ w.T


def shape_of_transpose(x: Any, w: Any, scale: Any, offset: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of `x w^T`; scales and offsets belong to integers."""
    return jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)


def _plain(x: Float[Array, "r i"], w: Float[Array, "i o"]) -> Float[Array, "r o"]:
    return x @ w.astype(jnp.float32)


def _shape(x: Any, w: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32)


def _plain_transpose(
    x: Float[Array, "r i"], w: Float[Array, "o i"], scale: Array, offset: Array
) -> Float[Array, "r o"]:
    return x @ w.astype(jnp.float32).T


_rows_times = operation("rows_times", _plain, _shape)
_rows_times_transpose = operation("rows_times_transpose", _plain_transpose, shape_of_transpose)
