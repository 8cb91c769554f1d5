"""The weight of eight or four bits, `Quantized`."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Integer, UInt8

from jaxformers.axes import Axes
from jaxformers.quantization.products import numbers, product, products_of_few, unpack
from jaxformers.weights import WeightObject, lookup

# The name of the axis that counts the groups of inputs with one scale.
GROUPS = "z"


class Quantized(eqx.Module, WeightObject):
    """A weight of integers, each of which stands for `scale * integer + offset`.

    The axes of the integers are those of the weight with the outputs before the inputs, as PyTorch
    stores a matrix: `wq (d, n, h)` is stored as `(n, h, d)`, and `wo (n, h, d)` as `(d, n, h)`.
    Each output has one scale for each of k groups of consecutive inputs, where several axes of
    inputs count as one. Activations may have any type. Nothing in this weight is trained.

    Arguments:
        integers: int8 `(apart, o, i)` for 8 bits, uint8 `(apart, o, i/2)` for 4 bits; `pack` makes
            these. Here apart, o and i stand for any number of axes.
        scale: `(apart, o, k)`, float32 or float16; k is 1 for one scale per output.
        offset: of the same shape; None is 0.
        bits: 8 or 4.
        outputs: how many axes are outputs: 1, but 2 for `wq`.
        transposed: True for an object that stands for `(apart, o, i)` itself, such as a table of
            embeddings `(v, d)`. False for one that stands for `(apart, i, o)`.
        dtype: the type of the numbers that the weight gives, float32.

    Raises:
        ValueError: if types or shapes do not fit.

    Example:
        >>> integers, scale = jnp.ones((32, 16), jnp.int8), jnp.full((32, 1), 0.5)
        >>> w = Quantized(integers, scale)
        >>> w.shape, float(w.dense().max()), w.product(jnp.ones((3, 16))).shape
        ((16, 32), 0.5, (3, 32))
    """

    integers: Int8[Array, "..."] | UInt8[Array, "..."]
    scale: Float[Array, "..."]
    offset: Float[Array, "..."] | None = None
    bits: int = eqx.field(static=True, default=8, kw_only=True)
    outputs: int = eqx.field(static=True, default=1, kw_only=True)
    transposed: bool = eqx.field(static=True, default=False, kw_only=True)
    dtype: Any = eqx.field(static=True, default=jnp.float32, kw_only=True, converter=np.dtype)

    trained_fields: ClassVar[tuple[str, ...]] = ()

    def __check_init__(self) -> None:
        _check_types(self)
        _check_shapes(self)

    @property
    def shape(self) -> tuple[int, ...]:
        apart, outputs, inputs = self._sizes
        return (*apart, *outputs, *inputs) if self.transposed else (*apart, *inputs, *outputs)

    @property
    def T(self) -> "Quantized":
        if self.ndim != 2:
            raise ValueError(f"only a matrix is transposed, got a weight of shape {self.shape}.")
        return replace(self, transposed=not self.transposed)

    def __getitem__(self, i: Int[Array, ""] | int) -> "Quantized":
        if self._apart == 0:
            raise ValueError(f"a weight of shape {self.shape} is one weight: there is no [{i}].")
        offset = None if self.offset is None else self.offset[i]
        return replace(self, integers=self.integers[i], scale=self.scale[i], offset=offset)

    def cast(self, dtype: Any) -> "Quantized":
        """Returns the same weight, which gives its numbers in another type."""
        return replace(self, dtype=dtype)

    def product(self, x: Float[Array, "*r i"]) -> Float[Array, "*r o"]:
        if self.transposed:
            return x @ self._matrix().astype(x.dtype)
        return product(x, *self._matrices)

    def products_beside(
        self, x: Float[Array, "*r i"], others: Sequence[Any]
    ) -> Float[Array, "*r o"] | None:
        weights = [self, *others]
        if not all(isinstance(w, Quantized) and not w.transposed for w in weights):
            return None
        return products_of_few(x, [w._matrices for w in weights])

    def rows(self, rows: Int[Array, "..."]) -> Float[Array, "... d"]:
        if not self.transposed:
            return lookup(self.dense(), rows)
        integers = self.integers.at[rows].get(mode="fill", fill_value=0)
        scale = self.scale.at[rows].get(mode="fill", fill_value=jnp.nan)
        offset = self.offset
        offset = None if offset is None else offset.at[rows].get(mode="fill", fill_value=jnp.nan)
        offset = None if offset is None else _fixed(offset)
        return numbers(self._unpacked(integers), _fixed(scale), offset).astype(self.dtype)

    def dense(self) -> Array:
        apart, outputs, inputs = self._sizes
        matrix = self._matrix().astype(self.dtype)
        if self.transposed:
            return matrix.reshape(*apart, *outputs, *inputs)
        return jnp.swapaxes(matrix, -1, -2).reshape(*apart, *inputs, *outputs)

    def field_axes(self, axes: Axes) -> dict[str, Axes]:
        """Returns the axes of the fields; "d/2" is the axis d of two numbers in a byte.

        Scales and offsets are vectors.
        """
        names, apart, outputs = axes.names, len(axes.apart), self.outputs
        if not self.transposed:
            names = (*names[:apart], *names[-outputs:], *names[apart:-outputs])
        inputs = len(names) - apart - outputs
        stored = names if self.bits == 8 else (*names[:-1], f"{names[-1]}/2")
        roles = ("apart",) * apart + ("output",) * outputs
        scale = Axes((*names[: apart + outputs], GROUPS), (*roles, "output"))
        return {
            "integers": Axes(stored, roles + ("input",) * inputs),
            "scale": scale,
            "offset": scale,
        }

    @property
    def _apart(self) -> int:
        """The number of axes apart, those of stacked layers included."""
        return self.scale.ndim - 1 - self.outputs

    @property
    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The sizes of the axes apart, of the outputs and of the inputs."""
        shape, apart, split = self.integers.shape, self._apart, self.scale.ndim - 1
        last = shape[-1] if self.bits == 8 else 2 * shape[-1]
        return shape[:apart], shape[apart:split], (*shape[split:-1], last)

    @property
    def _matrices(self) -> tuple[Array, Array, Array | None]:
        """The integers `(o, i)`, and scales and offsets `(o, k)`."""
        integers = self.integers.reshape(prod(self._sizes[1]), -1)
        scale = _fixed(self.scale).reshape(len(integers), -1)
        offset = None if self.offset is None else _fixed(self.offset).reshape(scale.shape)
        return integers, scale, offset

    def _unpacked(self, integers: Array) -> Integer[Array, "..."]:
        return unpack(integers) if self.bits == 4 else integers

    def _matrix(self) -> Float[Array, "*apart o i"]:
        """Returns the numbers in float32, as one matrix for each of the axes apart."""
        apart, outputs, inputs = self._sizes
        integers = self._unpacked(self.integers).reshape(*apart, *outputs, prod(inputs))
        offset = None if self.offset is None else _fixed(self.offset)
        matrices = numbers(integers, _fixed(self.scale), offset)
        return matrices.reshape(*apart, prod(outputs), prod(inputs))


def _fixed(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns scales or offsets in float32, without a gradient."""
    return lax.stop_gradient(x).astype(jnp.float32)


def pack(
    integers: Integer[Array | np.ndarray, "... i"],
) -> UInt8[Any, "... i/2"]:
    """Returns integers of 0 to 15 as two per byte, of which the first is the low half.

    An array of NumPy gives one of NumPy.

    Raises:
        ValueError: if the last axis is odd.

    Example:
        >>> pack(jnp.array([1, 2, 15, 0]))
        Array([33, 15], dtype=uint8)
    """
    if integers.shape[-1] % 2:
        raise ValueError(
            f"4 bits need an even number of inputs in the last axis, got the shape "
            f"{integers.shape}. Use 8 bits for this weight."
        )
    low, high = integers[..., ::2].astype(jnp.uint8), integers[..., 1::2].astype(jnp.uint8)
    return low | high << 4


def _check_types(w: Quantized) -> None:
    kinds = {8: jnp.int8, 4: jnp.uint8}
    if w.bits not in kinds:
        raise ValueError(f"bits must be 8 or 4, got {w.bits!r}.")
    if w.integers.dtype != kinds[w.bits]:
        raise ValueError(
            f"the integers of {w.bits} bits must be {jnp.dtype(kinds[w.bits])}, got "
            f"{w.integers.dtype}."
        )


def _check_shapes(w: Quantized) -> None:
    integers, scale = w.integers.shape, w.scale.shape
    split = len(scale) - 1
    if w.outputs < 1 or w._apart < 0 or split >= len(integers) or integers[:split] != scale[:-1]:
        raise ValueError(
            f"integers (apart, o, i) need scales (apart, o, k) with {w.outputs} axes of outputs, "
            f"got the shapes {integers} and {scale}."
        )
    if w.offset is not None and w.offset.shape != scale:
        raise ValueError(f"offset must have the shape {scale} of scale, got {w.offset.shape}.")
    inputs = prod(w._sizes[2])
    if scale[-1] < 1 or inputs % scale[-1]:
        raise ValueError(f"{scale[-1]} groups do not divide {inputs} inputs: see the last axis.")
