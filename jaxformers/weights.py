"""The weights of a model, and the functions through which activations reach them.

A weight is an array, or an object that acts as one, such as `LowRank`. The modules of this package
multiply activations by a weight with `contract`, or by several with `contract_each`, and read rows
of a table with `lookup`, and they do nothing else with a weight. A new kind of weight is therefore
one class. It derives from `WeightObject`, which says what the class must have.

Fields that may hold any weight are annotated like `Float[Weight, "d n h"]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.axes import Axes
from jaxformers.checks import check_key, check_positive, check_size
from jaxformers.native.operation import is_fixed
from jaxformers.native.products import (
    FEW,
    MOST_WEIGHTS,
    rows_times,
    rows_times_each,
    rows_times_transpose,
)
from jaxformers.precision import add, scaled, widened
from jaxformers.sharding.mesh import divides_positions

Model = TypeVar("Model")


class WeightObject(ABC):
    """An object that acts as an array of weights.

    A kind of weight is an Equinox module that derives from this class as well, so that its arrays
    are leaves of the model: they are trained, cast, stacked, saved and copied like all others. The
    weights that it is made of may be objects themselves. To be saved in files it gets a public name
    in `jaxformers.checkpoint.names`.

    `trained_fields` names the fields that are trained, such as the factors of an adapter, and is
    empty for a weight that is fixed; see `jaxformers.trainable`. None, the default, trains all
    arrays.

    Its `shape` and `dtype` are those of the array that it stands for. Layers that are scanned or
    copied by `vmap` have more axes in front, in the object as in an array, and `shape` has them
    too: a kind of weight reads its sizes from its arrays and never stores them.
    """

    trained_fields: ClassVar[tuple[str, ...] | None] = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this object stands for."""

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """The type of the numbers that this object gives."""

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    @abstractmethod
    def T(self) -> Any:
        """The transpose of a weight `(i, o)`, which is a weight `(o, i)`."""

    @abstractmethod
    def __getitem__(self, i: Int[Array, ""] | int) -> Any:
        """Returns one of several weights: those of expert `i`, for example."""

    @abstractmethod
    def product(self, x: Float[Array, "*r i"]) -> Float[Array, "*r o"]:
        """Returns `x w`, where w is this weight as a matrix `(i, o)`.

        Activations are rows `(r, i)`. They are `(b, t, i)` on a mesh that divides positions.
        """

    def products_beside(
        self, x: Float[Array, "*r i"], others: Sequence[Any]
    ) -> Float[Array, "*r o"] | None:
        """Returns the products of `x` with this weight and others beside each other.

        The others may be arrays or any objects. None, the default, says that there is no faster way
        than one product after the other.
        """
        return None

    @abstractmethod
    def rows(self, rows: Int[Array, "..."]) -> Float[Array, "... d"]:
        """Returns rows of a table `(p, d)` as `lookup` does, NaN for a row beyond its end."""

    @abstractmethod
    def dense(self) -> Array:
        """Returns the array that this object stands for."""

    @abstractmethod
    def field_axes(self, axes: Axes) -> dict[str, Axes]:
        """Returns the axes of each field, from those of the array that this object stands for."""


if TYPE_CHECKING:
    Weight = Array | WeightObject
else:

    class _Kinds(type):
        def __instancecheck__(cls, x: Any) -> bool:
            return isinstance(x, jax.Array | WeightObject)

    class Weight(metaclass=_Kinds):
        """An array or a `WeightObject`, for annotations."""


def contract(
    x: Float[Array, "..."],
    w: Float[Weight, "..."],
    bias: Float[Weight, "..."] | None = None,
    inputs: int = 1,
    *,
    transposed: bool = False,
) -> Float[Array, "..."]:
    """Returns the product of activations and a weight, plus a bias.

    It is the sum over the last axes of `x`, which are the first axes of `w`.

    Arguments:
        x: `(..., i)`, where i stands for as many axes as `inputs` says.
        w: `(i, o)`, where o stands for any number of axes.
        bias: `(o)`; None is no bias.
        inputs: the number of axes that are summed over, 1.
        transposed: whether `w` is a matrix `(o, i)`, such as a table of embeddings; False.

    Returns:
        `(..., o)`, in the type of `x`.

    Example:
        >>> x, wq = jnp.ones((2, 10, 16)), jnp.ones((16, 4, 8))
        >>> contract(x, wq).shape
        (2, 10, 4, 8)
    """
    kept = x.ndim - inputs
    shape = x.shape[:kept]
    rows, size = prod(shape), prod(x.shape[kept:])
    if divides_positions(x):
        # Flat, rows and positions that are both divided over devices would be gathered.
        x = x.reshape(*x.shape[:kept], size)
    else:
        # On three-dimensional activations XLA's CPU backend transposes copies of them before each
        # gradient of a weight, which costs a third of a training step. On flat ones it does not.
        x = x.reshape(rows, size)
    if transposed:
        outputs: tuple[int, ...] = w.shape[:1]
        y = w.T.product(x) if isinstance(w, WeightObject) else rows_times_transpose(x, w)
    else:
        outputs = w.shape[inputs:]
        y = _product(x, w, prod(w.shape[:inputs]))
    return _with_bias(y, bias).reshape(*shape, *outputs)


def contract_each(
    x: Float[Array, "*r i"], *maps: tuple[Weight, Weight | None]
) -> list[Float[Array, "..."]]:
    """Returns what `contract(x, w, bias)` does for each of several pairs of a weight and a bias.

    Few rows take the time to read the weights. Where one operation in C can read all of them, it
    does so, since each one more would cost the time in which its threads begin.

    Example:
        >>> x, w = jnp.ones((2, 10, 16)), jnp.ones((16, 4, 8))
        >>> [y.shape for y in contract_each(x, (w, None), (w, None), (w[:, :2], None))]
        [(2, 10, 4, 8), (2, 10, 4, 8), (2, 10, 2, 8)]
    """
    few = is_fixed(x) and prod(x.shape[:-1]) <= FEW and 0 < len(maps) <= MOST_WEIGHTS
    few = few and not divides_positions(x)
    beside = _beside(x.reshape(-1, x.shape[-1]), maps) if few else None
    if beside is None:
        return [contract(x, w, bias) for w, bias in maps]
    found, start = [], 0
    for w, bias in maps:
        end = start + prod(w.shape[1:])
        y = _with_bias(beside[:, start:end], bias)
        found.append(y.reshape(*x.shape[:-1], *w.shape[1:]))
        start = end
    return found


def _beside(
    x: Float[Array, "*r i"], maps: Sequence[tuple[Weight, Weight | None]]
) -> Float[Array, "*r o"] | None:
    """Returns the products of `x` with several weights beside each other, if one call has them."""
    first, *others = (w for w, _ in maps)
    if isinstance(first, WeightObject):
        return first.products_beside(x, others)
    arrays = [w.reshape(w.shape[0], -1) for w, _ in maps if not isinstance(w, WeightObject)]
    return rows_times_each(x, arrays) if len(arrays) == len(maps) else None


def _with_bias(y: Float[Array, "*r o"], bias: Weight | None) -> Float[Array, "*r o"]:
    vector: Any = bias  # an array, or `Replaced` in place of one
    return y if bias is None else add(y, vector.reshape(-1))


def _product(x: Float[Array, "*r i"], w: Weight, size: int) -> Float[Array, "*r o"]:
    """Returns the product of rows with a weight that has `size` inputs in all."""
    return w.product(x) if isinstance(w, WeightObject) else rows_times(x, w.reshape(size, -1))


def lookup(table: Float[Weight, "p d"], rows: Int[Array, "..."]) -> Float[Array, "... d"]:
    """Returns rows of a table, NaN for a row beyond its end.

    The gradient of a row is summed in float32.

    Example:
        >>> lookup(jnp.ones((65, 16)), jnp.array([[1, 2, 3]])).shape
        (1, 3, 16)
    """
    return table.rows(rows) if isinstance(table, WeightObject) else _rows(table, rows)


@jax.custom_jvp
def _rows(table: Float[Array, "p d"], rows: Int[Array, "..."]) -> Float[Array, "... d"]:
    return table.at[rows].get(mode="fill", fill_value=jnp.nan)


@_rows.defjvp
def _rows_jvp(primals, tangents):
    (table, rows), change = primals, tangents[0]
    of_rows = widened(change).at[rows].get(mode="fill", fill_value=0)
    return _rows(table, rows), of_rows.astype(change.dtype)


def is_object(x: Any) -> bool:
    """Returns whether a weight is an object."""
    return isinstance(x, WeightObject)


def merge(model: Model) -> Model:
    """Returns the model with an array in place of each weight that is an object.

    Arguments:
        model: any pytree, such as a model whose weights are `LowRank`.

    Returns:
        The same tree with arrays in the types that the weights give. Adapters are added to their
        bases, and quantized weights are unpacked. The given model stays as it is.

    Example:
        >>> merged = merge(lora(model, rank=4, key=key))
        >>> merged.decoder.layers[0].self_attention.wq.shape
        (16, 2, 8)
    """
    return jax.tree.map(lambda x: x.dense() if is_object(x) else x, model, is_leaf=is_object)


class LowRank(eqx.Module, WeightObject):
    """A weight plus a product of two thin ones: `base + scale a b` (Hu et al. 2021, LoRA).

    The sum is never made: activations x give `x base + scale (x a) b`. The factors a and b are
    trained, and the base is not, see `trainable`.

    Arguments:
        base: the weight `(apart, i, o)`, an array or an object. Here i and o stand for any number
            of axes, and so do the axes apart, which count weights of the same kind (experts).
        a: `(apart, i, r)`, where r is the rank.
        b: `(apart, r, o)`.
        scale: factor on the product, 1.
        name: the name of the adapter that this weight belongs to, see `jaxformers.lora`.

    Example:
        >>> mha = MultiHeadAttention(64, 8, key=key)
        >>> wq = LowRank.of(mha.wq, rank=4, key=key)
        >>> adapted = eqx.tree_at(lambda x: x.wq, mha, wq)
        >>> adapted.wq.shape, adapted.wq.a.shape, adapted.wq.b.shape
        ((64, 8, 8), (64, 4), (4, 8, 8))
    """

    trained_fields: ClassVar[tuple[str, ...]] = ("a", "b")

    base: Weight
    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: float = eqx.field(static=True, default=1.0)
    name: str = eqx.field(static=True, default="default")

    @classmethod
    def of(
        cls,
        weight: Weight,
        rank: int,
        *,
        inputs: int = 1,
        apart: int = 0,
        scale: float = 1.0,
        name: str = "default",
        key: PRNGKeyArray | None = None,
    ) -> "LowRank":
        """Returns a weight that equals `weight` at first, since b is zero.

        The factors are float32, also those of a weight in 16 bits.

        Arguments:
            weight: the base.
            rank: the rank r.
            inputs: how many axes are inputs: 1, but 2 for `wo` of attention, `(n, h, d)`.
            apart: how many axes before these count weights of the same kind: 0, but 1 for the
                weights of experts.
            scale: factor on the product.
            name: the name of the adapter.
            key: PRNG key for a, which is normal with variance `1 / i`.

        Raises:
            ValueError: if a number is out of range, the weight has not that many axes, or there is
                no key.
        """
        check_size(rank=rank, inputs=inputs)
        check_positive(scale=scale)
        split = apart + inputs
        if apart < 0 or split >= weight.ndim:
            raise ValueError(
                f"a weight of shape {weight.shape} must have axes apart, inputs and outputs, got "
                f"apart={apart} and inputs={inputs}."
            )
        ahead, outputs = weight.shape[:split], weight.shape[split:]
        a = jax.random.normal(check_key(key), (*ahead, rank), jnp.float32)
        a = a * prod(ahead[apart:]) ** -0.5
        b = jnp.zeros((*ahead[:apart], rank, *outputs), jnp.float32)
        return cls(weight, a, b, float(scale), name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def T(self) -> "LowRank":
        return LowRank(self.base.T, self.b.T, self.a.T, self.scale, self.name)

    def __getitem__(self, i: Int[Array, ""] | int) -> "LowRank":
        if self._apart == 0:
            raise ValueError(f"a weight of shape {self.shape} is one weight: there is no [{i}].")
        return LowRank(self.base[i], self.a[i], self.b[i], self.scale, self.name)

    def product(self, x: Float[Array, "*r i"]) -> Float[Array, "*r o"]:
        a, b = self.a.reshape(x.shape[-1], self.rank), self.b.reshape(self.rank, -1)
        # Factors of float32 beside activations of 16 bits multiply in float32.
        wide = x if x.dtype.itemsize > a.dtype.itemsize else x.astype(a.dtype)
        low = wide @ a.astype(wide.dtype) @ b.astype(wide.dtype)
        return add(_product(x, self.base, x.shape[-1]), scaled(low, self.scale))

    def rows(self, rows: Int[Array, "..."]) -> Float[Array, "... d"]:
        low = contract(_rows(self.a, rows), self.b)
        return add(lookup(self.base, rows), scaled(low, self.scale))

    def dense(self) -> Array:
        return self.wide().astype(self.dtype)

    def wide(self) -> Array:
        """Returns the array that this object stands for, in float32 if its base has 16 bits."""
        base = self.base.dense() if isinstance(self.base, WeightObject) else self.base
        apart = self.shape[: self._apart]
        a = widened(self.a).reshape(*apart, -1, self.rank)
        low = a @ widened(self.b).reshape(*apart, self.rank, -1)
        return widened(base) + self.scale * low.reshape(self.shape)

    def field_axes(self, axes: Axes) -> dict[str, Axes]:
        a, b = axes.factors()
        return {"base": axes, "a": a, "b": b}

    @property
    def _apart(self) -> int:
        """The number of axes apart, those of stacked layers included."""
        return self.a.ndim + self.b.ndim - len(self.shape) - 2
