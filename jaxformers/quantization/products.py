"""Products of activations and integers.

On a CPU the time of a product with few rows is the time to read the weights. XLA's CPU backend
compiles `x @ integers.T.astype(...)` for one row to a loop that reads the integers and converts
them on the way. It does so for this spelling only, and three things in a decoding loop undo it:

- The conversion does not change from token to token, so XLA moves it out of the loop, and a copy of
  the weights in float32 is read at each token. `lax.optimization_barrier` ties the integers to the
  activations, which do change.
- Operations that make the activations, such as a norm, are computed again for each output in the
  loop of the product. The result of a `lax.cond` is computed once. Its condition always holds, and
  XLA does not know that.
- Several rows share a converted copy. They are multiplied one after the other, while the integers
  are in the processor's caches. Beyond `FEW` rows the copy is faster.

Integers of 4 bits are unpacked to 8 bits outside of the barrier, so that a decoding loop unpacks
them once and reads 8 bits at each token.

Where there are operations in C (`jaxformers.native`), one of them takes up to 16 rows and reads the
integers as they are, those of 4 bits too. Another one takes many rows and integers of 8 bits on
processors with matrix units.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, UInt8

from jaxformers.native.operation import is_fixed, operation
from jaxformers.native.products import (
    few_rows,
    in_turn,
    is_true,
    many_rows,
    rows_times_transpose,
    shape_of_transposes,
)
from jaxformers.native.products import product as matrix_product

# The most rows that are multiplied one after the other. With more, the copy takes less time.
FEW = 8


def product(
    x: Float[Array, "*r i"],
    integers: Integer[Array, "o i"] | UInt8[Array, "o i/2"],
    scale: Float[Array, "o k"],
    offset: Float[Array, "o k"] | None,
) -> Float[Array, "*r o"]:
    """Returns the product with the matrix `scale * integers + offset`, in the type of `x`.

    Arguments:
        x: the activations.
        integers: the matrix, with the outputs before the inputs; two per byte if they are uint8.
        scale: a number for each output and each of k groups of consecutive inputs, in float32.
        offset: of the same shape; None is 0.
    """
    of_few = products_of_few(x, [(integers, scale, offset)])
    if of_few is not None:
        return of_few
    integers = unpack(integers) if integers.dtype == jnp.uint8 else integers
    few = x.ndim == 2 and is_fixed(x) and 1 <= len(x) <= FEW
    if not few or x.dtype.itemsize > 4 or jax.default_backend() != "cpu":
        return _by_copy(x, integers, scale, offset)
    rows = _computed_once(x.astype(jnp.float32))
    if len(x) == 1:
        y = _of_row(rows, integers, scale)
    else:
        y = lax.map(lambda row: _of_row(row[None], integers, scale)[0], rows)
    if offset is not None:
        y = y + rows.reshape(*rows.shape[:1], scale.shape[1], -1).sum(-1) @ offset.T
    return y.astype(x.dtype)


def numbers(
    integers: Integer[Array, "*o i"],
    scale: Float[Array, "*o k"],
    offset: Float[Array, "*o k"] | None,
) -> Float[Array, "*o i"]:
    """Returns `scale * integers + offset` in float32."""
    groups = integers.reshape(*scale.shape, integers.shape[-1] // scale.shape[-1])
    x = groups.astype(jnp.float32) * scale[..., None]
    x = x if offset is None else x + offset[..., None]
    return x.reshape(integers.shape)


def unpack(packed: UInt8[Array, "... j"]) -> UInt8[Array, "... 2*j"]:
    """Returns the integers of 0 to 15 in bytes that hold two each, see `pack`.

    Example:
        >>> unpack(jnp.array([33, 15], jnp.uint8))
        Array([ 1,  2, 15,  0], dtype=uint8)
    """
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def products_of_few(
    x: Float[Array, "*r i"], weights: list[tuple[Array, Array, Array | None]]
) -> Float[Array, "*r o"] | None:
    """Returns products beside each other, by one call of C, or None if there is none for these.

    The arguments are those of `product`, for each of several weights.
    """
    given = []
    for integers, scale, offset in weights:
        if not few_rows(x, integers) or not _are_whole_vectors(x, integers, scale):
            return None
        none = jnp.zeros((1, 0), jnp.float32)
        given += [integers, scale, none if offset is None else offset]
    return _native(x.astype(jnp.float32), *given).astype(x.dtype)


def _are_whole_vectors(x: Array, integers: Array, scale: Array) -> bool:
    """Returns whether inputs with one scale fill the vectors of the operation in C."""
    if integers.dtype == jnp.int8 and scale.shape[1] == 1:
        return True
    return x.shape[1] // scale.shape[1] % (16 if integers.dtype == jnp.int8 else 32) == 0


def _plain(x: Float[Array, "r i"], *given: Array) -> Float[Array, "r o"]:
    ys = []
    for integers, scale, offset in zip(given[::3], given[1::3], given[2::3], strict=True):
        whole = unpack(integers) if integers.dtype == jnp.uint8 else integers
        ys.append(_by_copy(x, whole, scale, offset if offset.size else None))
    return jnp.concatenate(ys, 1)


_native = operation("rows_times_transpose", _plain, shape_of_transposes)


def _of_row(
    x: Float[Array, "1 i"], integers: Integer[Array, "o i"], scale: Float[Array, "o k"]
) -> Float[Array, "1 o"]:
    integers, x = lax.optimization_barrier((integers, x))
    if scale.shape[1] == 1:
        return (x @ integers.T.astype(jnp.float32)) * scale[:, 0]
    return x @ numbers(integers, scale, None).T


def _by_copy(
    x: Float[Array, "*r i"],
    integers: Integer[Array, "o i"],
    scale: Float[Array, "o k"],
    offset: Float[Array, "o k"] | None,
) -> Float[Array, "*r o"]:
    integers, x = lax.optimization_barrier((integers, x))
    if scale.shape[1] > 1 or offset is not None:
        return in_turn(_of_numbers, x, integers, scale, offset)
    if many_rows(x, integers, right=1):
        y = matrix_product(x, integers, right=1)
    else:
        y = in_turn(_of_integers, x, integers)
    return (y * scale[:, 0].astype(y.dtype)).astype(x.dtype)


def _of_numbers(
    x: Float[Array, "*r i"],
    integers: Integer[Array, "o i"],
    scale: Float[Array, "o k"],
    offset: Float[Array, "o k"] | None,
) -> Float[Array, "*r o"]:
    return rows_times_transpose(x, numbers(integers, scale, offset).astype(x.dtype))


def _of_integers(x: Float[Array, "*r i"], integers: Integer[Array, "o i"]) -> Float[Array, "*r o"]:
    # The integers are exact in 16 bits, and their sum is one in float32.
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    return jnp.matmul(x, integers.T.astype(x.dtype), preferred_element_type=wide)


def _computed_once(x: Float[Array, "r i"]) -> Float[Array, "r i"]:
    """Returns `x`, which XLA then does not compute within other operations."""
    return lax.cond(is_true(x), lambda x: x, lambda x: x + 1, x)
