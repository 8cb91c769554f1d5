"""The kinds of weights that adapters have beside `LowRank`."""

from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxformers.axes import Axes
from jaxformers.precision import widened
from jaxformers.weights import LowRank, Weight, WeightObject, lookup


class Dora(eqx.Module, WeightObject):
    """A low-rank change of the directions of a weight, with trained magnitudes (Liu et al. 2024).

    The weights of each output are `magnitude v / |v|`, where `v` are those of
    `base + scale a b`. The norms |v| are computed anew in each call, which takes the memory of one
    dense weight, and they have no gradient (section 4.3 of the paper). Merge the weights before you
    generate.

    Arguments:
        base: the weight `(apart, i, o)`, as in `LowRank`.
        a: `(apart, i, r)`.
        b: `(apart, r, o)`.
        magnitude: `(apart, o)`.
        scale: factor on the product, 1.
        name: the name of the adapter that this weight belongs to.

    Example:
        >>> w = Dora.of(jnp.full((4, 3), 0.5), rank=2, key=key)
        >>> w.magnitude, w.product(jnp.ones((1, 4)))
        (Array([1., 1., 1.], dtype=float32), Array([[2., 2., 2.]], dtype=float32))
    """

    trained_fields: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    base: Weight
    a: Float[Array, "..."]
    b: Float[Array, "..."]
    magnitude: Float[Array, "..."]
    scale: float = eqx.field(static=True, default=1.0)
    name: str = eqx.field(static=True, default="default")

    @classmethod
    def of(cls, weight: Weight, rank: int, **options: Any) -> "Dora":
        """Returns a weight that equals `weight` at first; arguments are those of `LowRank.of`."""
        return cls.over(LowRank.of(weight, rank, **options))

    @classmethod
    def over(cls, low: LowRank) -> "Dora":
        """Returns the weight that equals a `LowRank` at first."""
        return cls(low.base, low.a, low.b, norms(low), low.scale, low.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def low(self) -> LowRank:
        """The weight without its magnitudes."""
        return LowRank(self.base, self.a, self.b, self.scale, self.name)

    @property
    def T(self) -> Array:
        return self.dense().T

    def __getitem__(self, i: Int[Array, ""] | int) -> "Dora":
        low = self.low[i]
        return replace(self, base=low.base, a=low.a, b=low.b, magnitude=self.magnitude[i])

    def product(self, x: Float[Array, "*r i"]) -> Float[Array, "*r o"]:
        y = self.low.product(x)
        return (widened(y) * self._factors.reshape(-1)).astype(y.dtype)

    def rows(self, rows: Int[Array, "..."]) -> Float[Array, "... d"]:
        y = self.low.rows(rows)
        return (widened(y) * self._factors).astype(y.dtype)

    def dense(self) -> Array:
        outputs = self.magnitude.ndim - self._apart
        kept = (*self.shape[: self._apart], *(1,) * (self.a.ndim - 1 - self._apart))
        factors = self._factors.reshape(*kept, *self.shape[len(self.shape) - outputs :])
        return (self.low.wide() * factors).astype(self.dtype)

    def field_axes(self, axes: Axes) -> dict[str, Axes]:
        kept = axes.apart + axes.outputs
        magnitude = Axes(*(tuple(x[i] for i in kept) for x in (axes.names, axes.roles)))
        a, b = axes.factors()
        return {"base": axes, "a": a, "b": b, "magnitude": magnitude}

    @property
    def _apart(self) -> int:
        return self.low._apart

    @property
    def _factors(self) -> Float[Array, "..."]:
        # The weights of an output may be zero: its factor then has no effect.
        return widened(self.magnitude) / jnp.maximum(norms(self.low), jnp.finfo(jnp.float32).tiny)


def norms(low: LowRank) -> Float[Array, "..."]:
    """Returns the norm of the weights of each output, `(apart, o)`, without a gradient."""
    apart = low._apart
    inputs = range(apart, low.a.ndim - 1)
    return jnp.sqrt(jnp.square(lax.stop_gradient(low.wide())).sum(tuple(inputs)))


class Replaced(eqx.Module, WeightObject):
    """A weight or a vector in place of another, which it keeps and leaves as it is.

    An adapter trains whole arrays in this way, such as a classifier, norms or biases. It is also
    possible in fields for arrays, such as a gain or a bias: modules call their methods `astype` and
    `reshape` alone.

    Arguments:
        base: the array or object in whose place it is. None is a table that the output layer
            shares, in whose place this is a weight of its own.
        value: the array that is used and trained. It may have another type than the base.
        name: the name of the adapter that this weight belongs to.

    Example:
        >>> w = Replaced(jnp.zeros((4, 3)), jnp.ones((4, 3)))
        >>> w.product(jnp.ones((1, 4)))
        Array([[4., 4., 4.]], dtype=float32)
    """

    trained_fields: ClassVar[tuple[str, ...]] = ("value",)

    base: Weight | None
    value: Float[Array, "..."]
    name: str = eqx.field(static=True, default="default")

    @classmethod
    def of(cls, base: Weight, name: str = "default") -> "Replaced":
        """Returns a float32 copy over a weight or a vector."""
        value = base.dense() if isinstance(base, WeightObject) else base
        return cls(base, jnp.array(widened(value), copy=True), name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype if self.base is None else self.base.dtype

    @property
    def T(self) -> "Replaced":
        base = None if self.base is None else self.base.T
        return Replaced(base, self.value.T, self.name)

    def __getitem__(self, i: Int[Array, ""] | int) -> "Replaced":
        base = None if self.base is None else self.base[i]
        return Replaced(base, self.value[i], self.name)

    def product(self, x: Float[Array, "*r i"]) -> Float[Array, "*r o"]:
        wide = x if x.dtype.itemsize > self.value.dtype.itemsize else x.astype(self.value.dtype)
        value = self.value.reshape(x.shape[-1], -1).astype(wide.dtype)
        return (wide @ value).astype(x.dtype)

    def rows(self, rows: Int[Array, "..."]) -> Float[Array, "... d"]:
        return lookup(self.value, rows).astype(self.dtype)

    def dense(self) -> Array:
        return self.value.astype(self.dtype)

    def astype(self, dtype: Any) -> Array:
        """Returns the array in a type, as if this were the array."""
        return self.value.astype(dtype)

    def reshape(self, *shape: int) -> Array:
        """Returns the array in a shape, as if this were the array."""
        return self.value.reshape(*shape)

    def field_axes(self, axes: Axes) -> dict[str, Axes]:
        return {"base": axes, "value": axes}
