"""What a user hands to `generate`, checked and brought into the shapes the program is compiled for.

Sizes are rounded up to buckets, so that a new length inside a bucket compiles nothing. That is done
in NumPy: in JAX, cutting or padding to each new length would itself compile.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Int

from jaxformers.checks import is_known

# What may be given as token ids.
Tokens = ArrayLike | Sequence[int] | Sequence[Sequence[int]]


def bucket(size: int, cap: int | None = None) -> int:
    """`size` rounded up to 16, 24, 32, 48, 64, 96 ..., but not beyond `cap` if `size` is not."""
    power = max(16, 1 << (size - 1).bit_length())
    rounded = power * 3 // 4 if power > 16 and size <= power * 3 // 4 else power
    return rounded if cap is None else max(min(rounded, cap), size)


def pad_to_bucket(
    prompt: Int[Array, "*b t"],
    padding_mask: Bool[Array, "*b t"] | None,
    max_new_tokens: int,
    max_seq_length: int | None,
) -> tuple[Int[Array, "b s"], Bool[Array, "b s"], int]:
    """The prompt in a bucket's columns, which of them are real, and how many slots to decode in."""
    xp, (tokens, real) = _numpy(prompt, padding_mask)
    real = xp.ones(tokens.shape, bool) if real is None else real
    tokens, real = xp.atleast_2d(tokens), xp.atleast_2d(real)
    t = tokens.shape[1]
    columns = bucket(t, max_seq_length)
    slots = columns + bucket(max_new_tokens)
    if max_seq_length is not None:
        slots = max(min(slots, max_seq_length), t + max_new_tokens)
    width = ((0, 0), (0, columns - t))
    return _like(prompt, xp.pad(tokens, width)), _like(prompt, xp.pad(real, width)), slots


def join(
    prompt: Int[Array, "*b t"], tokens: Int[Array, "b s"], t: int, max_new_tokens: int
) -> Int[Array, "*b u"]:
    """The prompt as it came, and the new tokens from column `t` on."""
    xp, (old, tokens) = _numpy(prompt, tokens)
    new = tokens[:, t : t + max_new_tokens].reshape(*old.shape[:-1], max_new_tokens)
    return _like(prompt, xp.concatenate([old, new], axis=-1))


def _numpy(*arrays: Array | None) -> tuple[ModuleType, list]:
    """NumPy and the arrays in it where their values are known, else JAX's and as they are."""
    if all(map(is_known, arrays)):
        return np, [None if x is None else np.asarray(x) for x in arrays]
    return jnp, list(arrays)


def _like(prompt: Array, x: ArrayLike) -> Array:
    """`x` on the prompt's devices, with its rows spread over them as the prompt's are."""
    if not (is_known(x) and is_known(prompt) and prompt.committed):
        return jnp.asarray(x)
    where = prompt.sharding
    if isinstance(where, NamedSharding):
        rows = where.spec[:1] if prompt.ndim == 2 else ()
        where = NamedSharding(where.mesh, PartitionSpec(*rows))
    return jax.device_put(x, where)


def check_room(
    prompt: Int[Array, "*b t"],
    padding_mask: Bool[Array, "*b t"] | None,
    max_new_tokens: int,
    max_seq_length: int | None,
) -> None:
    """Raise if a row is empty, or longer with its new tokens than the model knows positions."""
    longest = prompt.shape[-1]
    if padding_mask is not None and is_known(padding_mask):
        counts = np.asarray(padding_mask).sum(-1)
        if counts.min() == 0:
            raise ValueError(
                "prompt must have at least one real token in every row, got a row that is all "
                "padding. Begin it with a start token, or leave it out."
            )
        longest = int(counts.max())
    if max_seq_length is not None and longest + max_new_tokens > max_seq_length:
        raise ValueError(
            f"max_new_tokens must leave room for the prompt within max_seq_length = "
            f"{max_seq_length}, got {max_new_tokens} beside a prompt of {longest} tokens. Ask for "
            "fewer tokens, shorten the prompt, build the model with a larger max_seq_length, or "
            "use position=RotaryPositionalEncoding(), which has no limit."
        )


def check_ids(name: str, ids: int | Iterable[int] | None, vocab_size: int) -> np.ndarray:
    """Token ids, one or several or none, as an array."""
    ids = [] if ids is None else np.ravel(np.asarray(ids)).tolist()
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} must be ids from 0 to {vocab_size - 1} (the vocabulary has {vocab_size}), "
                f"got {token!r}."
            )
    return np.asarray(ids, np.int32)
