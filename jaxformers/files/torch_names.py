"""The names in a PyTorch file: storages, tensors, and the few functions that make them.

Nothing is looked up in Python. Only the names of this module are known, others are errors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from jaxformers.files.json_file import shorten

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
# Newer dtypes have no storage class: their tensors name the dtype beside plain bytes.
DTYPES: dict[str, np.dtype] = {
    **{f"uint{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"int{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{name: np.dtype(name) for name in ("bool", "complex64", "complex128")},
    "bfloat16": np.dtype(jnp.bfloat16),
    "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(jnp.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(jnp.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(jnp.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(jnp.float8_e8m0fnu),
}


class Storage(NamedTuple):
    """A row of `size` numbers in the file, from number `start` of the storage `key` on."""

    key: str
    dtype: np.dtype
    size: int
    start: int = 0


class Tensor(NamedTuple):
    """A tensor of numbers in a storage. Offset and strides count numbers of the tensor's dtype."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Name(NamedTuple):
    """A name in the file and the function for its call here, None if it is never called."""

    module: str
    name: str
    call: Callable[[tuple], Any] | None


def _tensor(dtype: np.dtype, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """Returns a tensor after a check that it fits into its storage."""
    sizes = (shape, strides)
    if not isinstance(storage, Storage) or not all(map(are_sizes, (*sizes, (offset,)))):
        raise ValueError(
            "a tensor must have a storage, and an offset, a shape and strides that are integers "
            f"from 0, got {shorten(storage)}, {shorten(offset)}, {shorten(shape)} and "
            f"{shorten(strides)}"
        )
    if len(shape) != len(strides) or len(shape) > 32:
        raise ValueError(
            "a tensor must have a stride for each of up to 32 axes, got the shape "
            f"{shorten(shape)} and the strides {shorten(strides)}"
        )
    count = 1
    for n in shape:
        count *= n or 1  # beside a 0 the other sizes may be anything, but NumPy multiplies them
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    has = storage.size * storage.dtype.itemsize
    if count * dtype.itemsize >= 2**63 or (0 not in shape and (last + 1) * dtype.itemsize > has):
        raise ValueError(
            f"a tensor of shape {shorten(shape)}, strides {shorten(strides)} and offset {offset} "
            f"does not fit its storage of {has} bytes"
        )
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def are_sizes(x: Any) -> TypeGuard[tuple[int, ...]]:
    """Returns whether `x` is a tuple of sizes, offsets or strides."""
    return isinstance(x, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in x)


def _rebuild_tensor(args: tuple) -> Tensor:
    """Makes a tensor of (storage, offset, shape, strides, ...); the rest is for training only."""
    if not 4 <= len(args) <= 7 or not isinstance(args[0], Storage):
        raise ValueError(f"a tensor is made of a storage, an offset ..., got {shorten(args)}")
    _refuse_metadata(args[6:])
    return _tensor(args[0].dtype, *args[:4])


def _rebuild_tensor_v3(args: tuple) -> Tensor:
    """Makes a tensor of the same arguments and a dtype."""
    if not 7 <= len(args) <= 8 or not isinstance(args[6], np.dtype):
        raise ValueError(f"a tensor of a newer dtype must name it, got {shorten(args)}")
    _refuse_metadata(args[7:])
    return _tensor(args[6], *args[:4])


def _refuse_metadata(metadata: tuple) -> None:
    if any(metadata):
        raise ValueError(
            f"a tensor that has yet to be negated or conjugated is not read ({shorten(metadata)}): "
            "save it after resolve_neg() or resolve_conj()"
        )


def _rebuild_parameter(args: tuple) -> Tensor:
    """Returns the tensor of (tensor, requires_grad, hooks, and sometimes attributes)."""
    if len(args) not in (3, 4) or not isinstance(args[0], Tensor):
        raise ValueError(f"a parameter is made of a tensor, got {shorten(args)}")
    return args[0]


def _rebuild_from_type(args: tuple) -> Tensor:
    """Makes a tensor of (function, class, arguments, attributes), without the attributes."""
    plain = (_rebuild_tensor, _rebuild_tensor_v3)
    match args:
        case (Name(call=call), Name(call=None), tuple() as arguments, _) if call in plain:
            return call(arguments)
    raise ValueError(f"a tensor with attributes is made of a plain one, got {shorten(args)}")


def _ordered_dict(args: tuple) -> dict:
    """Makes a dictionary of nothing, or in files of Python 2 of a list of pairs."""
    found: dict = {}
    match args:
        case ():
            return found
        case (list() as pairs,) if all(isinstance(x, list | tuple) and len(x) == 2 for x in pairs):
            for key, value in pairs:
                set_item(found, key, value)
            return found
    raise ValueError(f"an OrderedDict is made of nothing or of pairs, got {shorten(args)}")


def _size(args: tuple) -> tuple[int, ...]:
    match args:
        case (list() | tuple() as sizes,) if are_sizes(tuple(sizes)):
            return tuple(sizes)
    raise ValueError(f"a torch.Size is made of integers, got {shorten(args)}")


_CALLS: dict[tuple[str, str], Callable[[tuple], Any] | None] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch.nn.parameter", "Buffer"): None,
}
_NAMES: dict[tuple[str, str], Any] = {
    **{(module, name): Name(module, name, call) for (module, name), call in _CALLS.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{(module, x): d for x, d in STORAGES.items() for module in ("torch", "torch.storage")},
}


def find_name(module: str, name: str) -> Any:
    """Returns the meaning of a name: a `Name`, or the dtype of a storage or dtype of PyTorch."""
    if (module, name) not in _NAMES:
        raise ValueError(
            f"it asks for {shorten(f'{module}.{name}')}, which no file of plain tensors needs and "
            "which could run any code. Nothing was run. If you trust the file, load it in PyTorch "
            "and save the tensors alone: torch.save(model.state_dict(), path)"
        )
    return _NAMES[module, name]


def set_item(container: dict, key: Any, value: Any) -> None:
    """Adds an entry to a dictionary.

    Integers of more than 60 bits are errors, because many of them can have the same hash.
    """
    if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**60):
        raise ValueError(f"an entry must have a text or an integer for its key, got {shorten(key)}")
    if key in container:
        raise ValueError(f"the key {shorten(key)} comes more than once in a dictionary")
    container[key] = value
