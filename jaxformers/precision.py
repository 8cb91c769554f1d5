"""Types of numbers: 16 bits for computing, 32 for the weights that are trained."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Tree = TypeVar("Tree", bound=PyTree)

# The types that models are kept and computed in.
FLOATS = tuple(jnp.dtype(x) for x in ("float32", "bfloat16", "float16", "float64"))


def cast_floating(model: Tree, dtype: Any) -> Tree:
    """The model with its floating-point arrays in another type, for it to compute in.

    With bfloat16 a model takes half the memory and, where the hardware has it, a fraction of the
    time; softmax, norms, log-probs and the loss stay in float32. `train_step` does this in each
    step if it is given a `compute_dtype`.

    Arguments:
        model: any pytree; other leaves stay as they are.
        dtype: a floating-point type of 16 bits or more, such as `jnp.bfloat16`.

    Raises:
        ValueError: if the type is another.

    Example:
        >>> half = cast_floating(model, jnp.bfloat16)
        >>> half.logits(tokens).dtype, half.generate(prompt, 5).shape
        (dtype('float32'), (1, 9))
    """
    dtype = check_float_dtype(dtype=dtype)
    floats, rest = eqx.partition(model, _is_float)
    return eqx.combine(jax.tree.map(lambda x: x.astype(dtype), floats), rest)


def _is_float(x: Any) -> bool:
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def check_float_dtype(**named: Any) -> np.dtype:
    """The one type as a NumPy dtype, one of `FLOATS` that JAX is set up to hold."""
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
