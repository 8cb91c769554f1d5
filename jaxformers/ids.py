"""Token ids in the forms that users have: arrays of any library, lists, rows of different length.

Text, floats and the complete output of a tokenizer are not ids. The error for them says how to get
ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Token ids may be an array of any library, for which there is no type, or a list of rows.
Tokens = Any


def as_ids(x: Any, name: str) -> Any:
    """Returns token ids as one array of integers; one of NumPy or JAX is returned as it is.

    Raises:
        ValueError: if `x` does not hold integers, or holds rows of different length.
    """
    x, lengths = as_rows(x, name)
    if lengths is not None and len(set(lengths)) > 1:
        raise ValueError(
            f"{name} must be a rectangular array, got rows of different length. Pad them to one "
            "length and say what is padding with padding_mask=."
        )
    return stack(x) if isinstance(x, list) else x


def as_rows(x: Any, name: str) -> tuple[Any, list[int] | None]:
    """Returns an array of integers and None, or a list of rows as arrays and their lengths.

    Raises:
        ValueError: if `x` does not hold integers.
    """
    is_list = isinstance(x, list | tuple)
    if is_list and any(_is_mask(row) for row in x):
        raise ValueError(
            f"{name} must be one array of ids, got a {type(x).__name__} with a mask in it. "
            "tokenizer.encode returns (tokens, padding_mask): pass the first as tokens and the "
            "second as padding_mask=."
        )
    if not is_list or not len(x):
        x = _as_array(x, name)
        if x.dtype != object or x.ndim != 1:
            return _check_integers(x, name), None
        x = list(x)  # NumPy holds rows of different length as an array of objects
    if all(type(row) is int for row in x):
        return _check_integers(_as_array(x, name), name), None
    rows = [_as_array(row, name) for row in x]
    if all(row.ndim == 0 for row in rows):
        return stack([_check_integers(row, name) for row in rows]), None
    for row in rows:
        if row.ndim != 1:
            raise ValueError(
                f"{name} must have shape (t,) or (batch, t), or be a list of rows with one axis "
                f"each, got a list that holds the shape {row.shape}. Add or remove an axis."
            )
    return [_check_integers(row, name) for row in rows], [len(row) for row in rows]


def stack(rows: Sequence[Any]) -> Any:
    """Returns arrays of one shape as one NumPy array, or as one JAX array if one is traced."""
    known = not any(isinstance(row, jax.core.Tracer) for row in rows)
    if not known:
        return jnp.stack([jnp.asarray(row, jnp.int32) for row in rows])
    return np.stack([np.asarray(row, np.int64) for row in rows])


def _as_array(x: Any, name: str) -> Any:
    """Returns `x` as an array, or raises `ValueError` if it cannot be one."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, Mapping) or hasattr(x, "input_ids"):
        raise ValueError(
            f"{name} must be token ids, got a {type(x).__name__}, as tokenizers of other libraries "
            f'return it. Pass its ids, and beside them which are real: {name}=x["input_ids"], '
            'padding_mask=np.asarray(x["attention_mask"]) == 1.'
        )
    if isinstance(x, list | tuple) and not len(x):
        return np.zeros(0, np.int32)
    try:
        return np.asarray(x)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be token ids, got a {type(x).__name__} that is no array of them: {error}"
        ) from error


def _check_integers(x: Any, name: str) -> Any:
    """Returns the array itself if it holds integers, and otherwise raises `ValueError`."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    message = f"{name} must hold integer ids, got dtype {x.dtype}"
    if x.dtype.kind in "SU":
        text = x.ravel()[0].item() if x.size else ""
        raise ValueError(
            f"{message}, the text {text!r:.60}. No cast makes ids of text, a tokenizer "
            "does: write tokenizer = load_tokenizer(directory), with the directory of the "
            "checkpoint, and tokens, padding_mask = tokenizer.encode(text)."
        )
    if x.dtype == object:
        for item in x.ravel():
            if not isinstance(item, int | float):
                raise ValueError(f"{message}, with {item!r:.80} of type {type(item).__name__}.")
    if x.dtype == bool:
        message += ". Pass what says which tokens are real as padding_mask="
    raise ValueError(
        f"{message}. Token ids are indices into the vocabulary: if these are whole numbers of "
        "another type, cast them with np.asarray(x).astype(int)."
    )


def _is_mask(x: Any) -> bool:
    return hasattr(x, "dtype") and "bool" in str(x.dtype)
