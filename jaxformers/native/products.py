"""Products of rows and a matrix of weights, in C."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import Array, Bool, Float, Int8

from jaxformers.native import library
from jaxformers.native.operation import is_fixed, is_spread, operation

# With more rows the products of XLA are nearly as fast.
FEW = 16

# Weights in one call, as `source/products.c` has it.
MOST_WEIGHTS = 8

# Smaller matrices do not fill the matrix units.
MANY = 32


def few_rows(x: Any, w: Any) -> bool:
    """Returns whether a product is one of few rows, on one CPU, where there are operations in C."""
    few = x.ndim == 2 and is_fixed(x, w) and 1 <= len(x) <= FEW
    few = few and x.dtype in (jnp.float32, jnp.bfloat16)
    return few and 0 not in (*x.shape, *w.shape) and _are_on_one_cpu(x, w)


def many_rows(x: Any, w: Any, right: int = 0) -> bool:
    """Returns whether a product is one for the matrix units, on one CPU.

    Arguments:
        x: `(..., m, k)`, in float32 or bfloat16.
        w: `(..., k, n)`, or `(..., n, k)` if `right` is 1, in the type of `x` or in int8.
        right: 1 for the transpose of `w`; 0.
    """
    fit = x.ndim > 1 and x.shape[:-2] == w.shape[:-2] and x.shape[-1] == w.shape[right - 2]
    many = fit and is_fixed(x, w)
    many = many and min(*x.shape[-2:], *w.shape[-2:]) >= MANY
    many = many and x.dtype in (jnp.float32, jnp.bfloat16) and w.dtype in (x.dtype, jnp.int8)
    return many and _are_on_one_cpu(x, w) and library.has_matrix_units()


def _are_on_one_cpu(x: Any, w: Any) -> bool:
    """Returns whether a program would have both on one CPU, where there are operations in C."""
    return _is_for_one_cpu(x, w) and library.obstacle() is None


def _is_for_one_cpu(*arrays: Any) -> bool:
    """Returns whether a program with these arrays would be compiled for one CPU."""
    return jax.default_backend() == "cpu" and not any(is_spread(x) for x in arrays)


def is_true(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """Returns True, of which XLA knows no more than that `x` has to be there first."""
    first = x[(0,) * x.ndim]
    return jnp.isnan(first) | (first <= jnp.inf)


def in_turn(f: Callable[..., Array], x: Float[Array, "..."], *weights: Array | None) -> Array:
    """Returns `f(x, *weights)`, where `f` converts the weights to a wider type.

    XLA's CPU backend has no products of narrow types. It converts the weights of all layers when a
    program begins, and keeps them in float32 until they are used. A branch of `lax.cond` runs when
    its condition is known, which depends on `x`, so the converted weights of one product are there
    at a time. A gradient keeps the weights as they are and converts them again.
    """
    if not _is_for_one_cpu(x, *weights) or not is_fixed(x) or 0 in x.shape:
        return f(x, *weights)
    y = jax.eval_shape(f, x, *weights)

    def none(*_: Array) -> Array:
        return jnp.zeros(y.shape, y.dtype)

    return lax.cond(is_true(x), jax.checkpoint(f), none, x, *weights)


def keeps_products(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Is a policy of `jax.checkpoint` that keeps the results of products alone."""
    return primitive.name in ("dot_general", "jaxformers_product")


def rows_times(x: Float[Array, "*r i"], w: Float[Array, "i o"]) -> Float[Array, "*r o"]:
    """Returns `x w`, in C for few rows, and for many rows where there are matrix units."""
    beside = rows_times_each(x, [w])
    if beside is not None:
        return beside
    return _times(x, w, 0)


def rows_times_each(
    x: Float[Array, "*r i"], weights: list[Float[Array, "i _"]]
) -> Float[Array, "*r o"] | None:
    """Returns the products `x w` beside each other, by one call of C.

    None if there is none for these arrays. Up to `MOST_WEIGHTS` are taken.
    """
    for w in weights:
        if x.dtype != w.dtype or x.shape[-1] != w.shape[0] or not few_rows(x, w):
            return None
    return _rows_times(x.astype(jnp.float32), *weights).astype(x.dtype)


def rows_times_transpose(x: Float[Array, "*r i"], w: Float[Array, "o i"]) -> Float[Array, "*r o"]:
    """Returns `x w^T`, in C for few rows, and for many rows where there are matrix units."""
    if x.dtype == w.dtype and x.shape[-1] == w.shape[1] and few_rows(x, w):
        none = jnp.zeros((1, 0), jnp.float32)
        return _rows_times_transpose(x.astype(jnp.float32), w, none, none).astype(x.dtype)
    return _times(x, w, 1)


def _times(x: Float[Array, "*r i"], w: Float[Array, "..."], right: int) -> Float[Array, "*r o"]:
    """Returns `x w`, or `x w^T` if `right` is 1, where there is no operation for few rows."""
    if many_rows(x, w, right):
        return product(x, w, right=right).astype(x.dtype)
    many = is_fixed(x, w) and x.ndim == 2 and len(x) > FEW and x.dtype == w.dtype == jnp.bfloat16
    return (_multiply_in_turn if many else _multiply)(x, w, right)


def _multiply(x: Array, w: Array, right: int) -> Array:
    return x @ w.T if right else x @ w


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _multiply_in_turn(x: Array, w: Array, right: int) -> Array:
    return in_turn(partial(_multiply, right=right), x, w)


@_multiply_in_turn.defjvp
def _differentiate(right: int, given: Any, change: Any) -> Any:
    # A training step would take longer with many branches.
    return jax.jvp(partial(_multiply, right=right), given, change)


def shape_of_transposes(x: Any, *given: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of products `x w^T`; each weight is given with its scales and offsets."""
    return jax.ShapeDtypeStruct((x.shape[0], sum(w.shape[0] for w in given[::3])), jnp.float32)


def product(
    x: Float[Array, "..."],
    w: Float[Array, "..."] | Int8[Array, "..."],
    left: int = 0,
    right: int = 0,
) -> Float[Array, "..."]:
    """Returns products of matrices in float32, by the matrix units where there are any.

    Products of float32 have the error of sums in float32. An infinite number gives NaN, and numbers
    below 1e-31 have fewer digits.

    Arguments:
        x: `(..., m, k)`, or `(..., k, m)` if `left` is 1.
        w: `(..., k, n)`, or `(..., n, k)` if `right` is 1, with the leading axes of `x`.
        left: 1 for the transpose of `x`; 0.
        right: 1 for the transpose of `w`; 0.

    Returns:
        `(..., m, n)`.
    """
    y = _product(*(a.reshape(-1, *a.shape[-2:]) for a in (x, w)), left=left, right=right)
    return y.reshape(*x.shape[:-2], *y.shape[1:])


def _plain(x: Float[Array, "r i"], *weights: Float[Array, "i _"]) -> Float[Array, "r o"]:
    return jnp.concatenate([x @ w.astype(jnp.float32) for w in weights], 1)


def _shape(x: Any, *weights: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], sum(w.shape[1] for w in weights)), jnp.float32)


def _plain_transpose(
    x: Float[Array, "r i"], w: Float[Array, "o i"], scale: Array, offset: Array
) -> Float[Array, "r o"]:
    return x @ w.astype(jnp.float32).T


_rows_times = operation("rows_times", _plain, _shape)
_rows_times_transpose = operation("rows_times_transpose", _plain_transpose, shape_of_transposes)


def _shape_of_product(x: Any, w: Any, left: int, right: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], x.shape[1 + left], w.shape[2 - right]), jnp.float32)


def _plain_product(x: Array, w: Array, left: int, right: int) -> Array:
    x, w = x.mT if left else x, w.mT if right else w
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _scratch(x: Any, w: Any, left: int, right: int) -> int:
    """Returns the bytes of the smaller matrices when packed, of which float32 needs three times.

    Small ones of many pairs need none. The sizes are those of `source/matrices.c`.
    """
    pairs, m, n = _shape_of_product(x, w, left, right).shape
    strips, steps = -(-min(m, n) // 32), -(-min(w.shape[1 + right], 1024) // 32)
    bytes = strips * steps * 2048 * (3 if (x if m < n else w).dtype == jnp.float32 else 1)
    return pairs * bytes if pairs == 1 or bytes > 2**19 else 0


def _of_left(change: Array, x: Any, w: Array, left: int, right: int) -> Array:
    """Returns the cotangent of `x`, of which the type is known alone."""
    change = change.astype(x.aval.dtype)
    y = product(change, w, 0, 1 - right)  # the narrower type is on the right
    return (y.mT if left else y).astype(x.aval.dtype)


def _of_right(change: Array, x: Array, w: Any, left: int, right: int) -> Array:
    """Returns the cotangent of `w`, of which the type is known alone."""
    change = change.astype(x.dtype)
    y = product(change, x, 1, left) if right else product(x, change, 1 - left, 0)
    return y.astype(w.aval.dtype)


_product = operation(
    "product",
    _plain_product,
    _shape_of_product,
    ready=library.has_matrix_units,
    scratch=_scratch,
    cotangents=(_of_left, _of_right),
)
