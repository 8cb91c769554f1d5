"""Types of numbers: 16 bits for computations, 32 bits for weights in training."""

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxformers.checks import check_usable
from jaxformers.paths import path_name

Tree = TypeVar("Tree", bound=PyTree)

# The types of weights and of computations.
FLOATS = tuple(jnp.dtype(x) for x in ("float32", "bfloat16", "float16", "float64"))

_noticed: set[int] = set()  # ids of the optimizers for which the warning was given
_within: ContextVar[bool] = ContextVar("within", default=False)


def cast_floating(model: Tree, dtype: Any) -> Tree:
    """Returns the model with its floating-point arrays in another type, in which it computes.

    A model in bfloat16 takes half the memory and, on hardware that supports bfloat16, a fraction of
    the time. Softmax, norms, log-probs and the loss stay in float32. Weights that are `Quantized`
    give their numbers in that type, and their scales stay as they are. `train_step` casts the
    model in each step if it is given a `compute_dtype`.

    Arguments:
        model: any pytree; other leaves stay as they are.
        dtype: a floating-point type of 16 bits or more, such as `jnp.bfloat16`.

    Raises:
        ValueError: if the type is not one of these.

    Example:
        >>> half = cast_floating(model, jnp.bfloat16)
        >>> half.logits(tokens).dtype, half.generate(prompt, 5).shape
        (dtype('float32'), (1, 9))
    """
    dtype = check_float_dtype(dtype=dtype)
    check_usable(model=model)
    return _cast_where(_is_float, model, dtype)


def _cast_where(chosen: Callable[[Any], bool], model: Tree, dtype: Any) -> Tree:
    """Returns the model with some of its numbers in another type.

    A weight that can `cast` gives its numbers in that type. Its own arrays, such as the scales of
    `Quantized`, stay as they are.
    """

    def change(x: Any) -> Any:
        if not chosen(x):
            return x
        return x.cast(dtype) if hasattr(x, "cast") else x.astype(dtype)

    return jax.tree.map(change, model, is_leaf=lambda x: hasattr(x, "cast"))


def add(x: Float[Array, "*n d"], y: Float[Array, "..."]) -> Float[Array, "*n d"]:
    """Returns `x + y` in the type of `x`; the gradient of a broadcast `y` is summed in float32.

    In bfloat16 a sum of ones does not grow beyond 256.
    """
    return (widened(x) + widened(y)).astype(x.dtype)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x` in float32 if it has 16 bits, and otherwise `x` itself."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """Returns `x` times a number that 16 bits would round."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def is_narrow(x: Any) -> bool:
    """Returns whether `x` has floating-point numbers of fewer bits than float32."""
    return _is_float(x) and x.dtype.itemsize < 4


def widened_beside(model: Tree, others: PyTree) -> Tree:
    """Returns the model with arrays of 16 bits in the widest type of `others`, if that is wider.

    If frozen weights have 16 bits and the trained weights float32, the model computes in float32:
    the loss is that of a float32 model, and no activation is rounded to 16 bits.
    """
    floats = [x.dtype for x in jax.tree.leaves(others) if _is_float(x)]
    widest = max(floats, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float16))
    if widest.itemsize < 4:
        return model
    return _cast_where(is_narrow, model, widest)


@contextlib.contextmanager
def noticed(optimizer: Any, model: PyTree, trained: Callable[[], PyTree]) -> Iterator[None]:
    """Warns, once for each optimizer, if weights of 16 bits are trained; inner calls do not warn.

    Arguments:
        optimizer: the optimizer of the step.
        model: the model.
        trained: function `() -> tree`, which returns the model without its frozen arrays.
    """
    # An optax transformation is a tuple, so its update function identifies it.
    optimizer = optimizer.update if hasattr(optimizer, "_fields") else optimizer
    if (
        not _within.get()
        and id(optimizer) not in _noticed
        and any(map(is_narrow, jax.tree.leaves(model)))
    ):
        leaves = jax.tree_util.tree_leaves_with_path(trained())
        narrow = [(path, x) for path, x in leaves if is_narrow(x)]
        if narrow:
            _noticed.add(id(optimizer))
            weakref.finalize(optimizer, _noticed.discard, id(optimizer))
            _warn(path_name(narrow[0][0]), narrow[0][1].dtype, len(narrow))
    token = _within.set(True)
    try:
        yield
    finally:
        _within.reset(token)


def _warn(path: str, dtype: Any, count: int) -> None:
    frame, level = sys._getframe(), 1
    inside = ("jaxformers", "equinox", "jax", "contextlib", "jaxtyping", "beartype")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{count} arrays of 16 bits are trained, such as {path} of {dtype}: a change of less than "
        f"{float(jnp.finfo(dtype).eps) / 2:.1g} of a weight is rounded away, so that most weights "
        "stay as they are at usual learning rates. Train float32 weights, "
        "cast_floating(model, jnp.float32), and compute in 16 bits with "
        "compute_dtype=jnp.bfloat16; fit trains float32 weights in any case.",
        stacklevel=level,
    )


def _is_float(x: Any) -> bool:
    return (eqx.is_array(x) or hasattr(x, "cast")) and jnp.issubdtype(x.dtype, jnp.floating)


def check_float_dtype(**named: Any) -> np.dtype:
    """Returns the one given type as a NumPy dtype.

    Raises:
        ValueError: if it is not one of `FLOATS`, or JAX is not configured to hold it.
    """
    ((name, given),) = named.items()
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        raise ValueError(f"{name} must be a type such as jnp.bfloat16, got {given!r}.") from None
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be a floating-point type of 16 bits or more, got {given!r}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} {dtype} needs jax.config.update('jax_enable_x64', True).")
    return dtype
