"""The arrays and numbers of a training by path, copied out of any pytree and back into it."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxformers.paths import path_name
from jaxformers.sharding.hosts import check_here

Tree = TypeVar("Tree", bound=PyTree)


class HostKey(NamedTuple):
    """PRNG keys as numbers, on the host unless they are spread over several hosts."""

    impl: str
    data: Any

    @property
    def dtype(self) -> Any:
        return _key_type(self).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return _key_type(self).shape


def _key_type(key: HostKey) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.wrap_key_data(jnp.asarray(key.data), impl=key.impl))


def digest(tree: PyTree) -> str:
    """Returns the SHA-256 digest of all arrays of a tree with their paths, dtypes and shapes.

    Two models have the same digest exactly if their arrays have the same bits.

    Arguments:
        tree: any pytree. Leaves that are no arrays are ignored.

    Raises:
        ValueError: if an array is spread over several hosts.

    Example:
        >>> digest({"w": jnp.ones((2, 3))})[:8]
        '2eee0fc0'
        >>> digest(model) == digest(jax.tree.map(lambda x: x, model))
        True
    """
    total = hashlib.sha256()
    for path, x in sorted(named_leaves(tree).items()):
        if _is_array(x):
            host = to_host(path, x)
            data = host.data if isinstance(host, HostKey) else host
            total.update(f"{path} {x.dtype} {x.shape}\n".encode())
            total.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves that are arrays or Python numbers, by path.

    Raises:
        ValueError: if two leaves have the same path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named: dict[str, Any] = {}
    for path, x in leaves:
        if _is_data(x):
            name = path_name(path)
            if name in named:
                raise ValueError(
                    f"two leaves have the path {name!r}: give dicts keys without points."
                )
            named[name] = x
    return named


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_data(x: Any) -> bool:
    return _is_array(x) or isinstance(x, bool | int | float | jax.ShapeDtypeStruct)


def to_host(path: str, x: Any) -> Any:
    """Returns a copy on the host, which does not change when `x` is donated or changed in place.

    Raises:
        ValueError: if `x` is traced, or spread over several hosts.
    """
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise ValueError(f"{path} has no numbers here: save outside of jit, grad and vmap.")
    if isinstance(x, jax.Array):
        check_here(path, x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return HostKey(str(jax.random.key_impl(x)), np.array(jax.random.key_data(x)))
        # NumPy shares the memory of a CPU's array. From another device it has a copy already.
        in_place = any(device.platform == "cpu" for device in x.devices())
        return np.array(x, copy=True if in_place else None)
    return np.array(x) if isinstance(x, np.ndarray) else x


def snapshot(tree: PyTree) -> dict[str, Any]:
    """Returns the arrays and numbers of a tree by path, copied to the host."""
    leaves = named_leaves(tree)
    for x in leaves.values():
        if isinstance(x, jax.Array) and x.is_fully_addressable:
            x.copy_to_host_async()  # starts all copies before it waits for the first
    return {path: to_host(path, x) for path, x in leaves.items()}


def check_step(step: Any, steps: Sequence[int], directory: Any) -> int:
    """Returns the step of a state to save.

    Raises:
        ValueError: if it is not a whole number from 0, or if the directory has a later step.
    """
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ValueError(f"step must be a whole number from 0, got {step!r}.")
    if steps and steps[-1] > step:
        raise ValueError(
            f"{directory} has the later step {steps[-1]}, so that step {step} would be the first "
            "to go. Continue that training by restore(), or pass another directory."
        )
    return int(step)


def check_alike(have: Mapping[str, str], like: PyTree, where: str) -> None:
    """Checks that saved leaves have the paths, shapes and dtypes of the leaves of a skeleton.

    Arguments:
        have: the result of `describe` for the saved arrays and numbers.
        like: the skeleton.
        where: name of the file in an error.

    Raises:
        ValueError: if a leaf differs or is missing.
    """
    want = describe(named_leaves(like))
    differing = [
        path
        for path in {**want, **have}
        if want.get(path) not in (have.get(path), _in_float32(have.get(path, "")))
    ]
    if differing:
        lines = [
            f"{p or 'the whole'}: {have.get(p, 'nothing')} there, {want.get(p, 'nothing')} here"
            for p in differing[:5]
        ]
        more = f"\nand {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"{where} was begun with other settings, and does not fit this training: pass the "
            "model, the optimizer and the options that it was begun with, or another directory.\n"
            + "\n".join(lines)
            + more
        )


def _in_float32(described: str) -> str:
    """Returns the description of a leaf with float32 in place of a float type of 16 bits.

    Earlier versions trained weights of 16 bits in their own type. Now float32 is used.
    """
    return re.sub("^b?float16 ", "float32 ", described)


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Returns the dtypes and shapes of arrays and the types of numbers, as text by path."""
    return {
        path: f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
        for path, x in leaves.items()
    }


def replaced(like: Tree, values: Mapping[str, Any]) -> Tree:
    """Returns the skeleton with new arrays and numbers, each with the placement of its old one."""

    def replace(path: tuple, old: Any) -> Any:
        if not _is_data(old):
            return old
        return placed_like(values[path_name(path)], old)

    return jax.tree_util.tree_map_with_path(replace, like)


def placed_like(value: Any, like: Any) -> Any:
    """Returns a value of the host as a leaf of the kind and with the placement of `like`."""
    if isinstance(like, np.generic):
        return np.asarray(value)[()]
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return value
    committed = like.committed if isinstance(like, jax.Array) else True
    where = like.sharding if committed else None
    if isinstance(value, HostKey):
        keys = jax.random.wrap_key_data(jnp.asarray(value.data), impl=value.impl)
        return jax.device_put(keys, where)
    if value.dtype != like.dtype:  # weights of 16 bits continue in float32
        value = value.astype(like.dtype)
    x = jax.device_put(value, where)
    # A weak type is that of a Python number. A file does not store it.
    return like.at[...].set(x) if isinstance(like, jax.Array) and like.weak_type else x
