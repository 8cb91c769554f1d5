"""Reads the arrays of a model from the tensors of a file, one tensor at a time."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.hf.layouts import Rule, to_ours
from jaxformers.hf.plan import WeightPlan
from jaxformers.hf.quantized_layout import quantized_fields
from jaxformers.hf.tensors import FileTensors
from jaxformers.placement import put, put_parts
from jaxformers.precision import check_float_dtype
from jaxformers.quantization.quantized import Quantized
from jaxformers.sharding.rules import Places


def read_arrays(
    plan: WeightPlan, stored: FileTensors, dtype: Any, sharding: Any, quantized: bool
) -> dict[str, jax.Array | Quantized]:
    """Returns the weights of a model by path. They are read and placed one tensor at a time.

    Arguments:
        plan: the plan of the model.
        stored: the tensors.
        dtype: the type of the weights; None for that of the file.
        sharding: as in `jaxformers.from_pretrained`.
        quantized: whether weights that the file has as integers stay so, where `Quantized` has
            their layout.

    Raises:
        ValueError: if a tensor has numbers that are not finite, or there is nothing that could
            stay quantized.
    """
    if isinstance(sharding, Mesh):
        model = jax.tree.map(lambda path: plan.leaves[path], plan.paths)
        sharding = Places(model, sharding)
    names = [name for rule in plan.rules for name in rule.theirs]
    dtype = read_dtype(dtype, {stored.dtype(name) for name in names})
    arrays: dict[str, jax.Array | Quantized] = {}
    kept = 0
    for rule in plan.rules:
        own = keep(rule, plan, stored, dtype, sharding) if quantized else None
        kept += own is not None
        arrays |= unpack(rule, plan, stored, dtype, sharding) if own is None else own
    if quantized and not kept:
        raise ValueError(
            "quantized=True keeps the integers of a quantized checkpoint, and this one has "
            "none whose layout is kept. Leave it out, and quantize the model here: "
            "jaxformers.quantize(model)."
        )
    return arrays


def keep(
    rule: Rule, plan: WeightPlan, stored: FileTensors, dtype: Any, sharding: Any
) -> dict[str, Quantized] | None:
    """Returns the quantized weights that tensors hold; None if they have others, or none."""
    found = [stored.parts(name) for name in rule.theirs]
    parts = [x for x in found if x is not None]
    if len(parts) < len(found):
        return None
    for name, x in zip(rule.theirs, parts, strict=True):
        for numbers in (x.scale, x.offset):
            if numbers is not None:
                check_finite(name, numbers)
    fields = quantized_fields(rule, parts, [plan.leaves[path].shape for path in rule.ours])
    if fields is None:
        return None
    weights = {}
    for path, axes, own in zip(rule.ours, rule.axes, fields, strict=True):
        if isinstance(sharding, Places):
            outline = eqx.filter_eval_shape(lambda own: Quantized(**own), own)
            for name, of_field in outline.field_axes(axes).items():
                sharding.add(f"{path}.{name}", of_field)
        placed: dict[str, Any] = {
            name: put(f"{path}.{name}", x, sharding) if isinstance(x, np.ndarray) else x
            for name, x in own.items()
        }
        weights[path] = Quantized(**placed, dtype=dtype)
    return weights


def unpack(
    rule: Rule, plan: WeightPlan, stored: FileTensors, dtype: Any, sharding: Any
) -> dict[str, jax.Array]:
    """Returns the arrays that tensors hold.

    On a mesh, each device's part is read alone.
    """
    shapes, name = [plan.leaves[path].shape for path in rule.ours], rule.theirs[0]
    if isinstance(sharding, Places):
        views = to_ours(rule, [stored.view(name) for name in rule.theirs], shapes)

        def finite(part: np.ndarray) -> np.ndarray:
            return cast(name, check_finite(name, part), dtype)

        pairs = zip(rule.ours, views, strict=True)
        return {path: put_parts(path, x, dtype, sharding, finite) for path, x in pairs}
    tensors = [check_finite(name, stored.read(name)) for name in rule.theirs]
    pairs = zip(rule.ours, to_ours(rule, tensors, shapes), strict=True)
    return {path: put(path, cast(name, x, dtype), sharding) for path, x in pairs}


def read_dtype(dtype: Any, stored: set[Any]) -> Any:
    """Returns the type of the weights: the given one, else that of the file (or its widest)."""
    if dtype is not None:
        return check_float_dtype(dtype=dtype)
    widest = jnp.float32 if len(stored) > 1 else next(iter(stored))
    return jax.dtypes.canonicalize_dtype(widest)


def cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns a tensor in another type, or raises if its numbers are too large for that."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if not is_finite(x):
        raise ValueError(
            f"the tensor {name} holds numbers that are too large for {dtype}. Pass another dtype=, "
            "such as jnp.float32."
        )
    return x


def check_finite(name: str, x: np.ndarray) -> np.ndarray:
    """Returns the tensor itself, or raises if it holds NaN or infinity."""
    if not is_finite(x):
        raise ValueError(
            f"the tensor {name} holds numbers that are NaN or infinite: the file is damaged."
        )
    return x


def is_finite(x: np.ndarray) -> bool:
    """Returns whether all numbers are finite; in steps, because a mask takes memory too."""
    flat, step = x.ravel(order="K"), 1 << 22  # no copy, even of what is transposed
    return all(np.isfinite(flat[i : i + step]).all() for i in range(0, flat.size, step))
