"""From logits to a token: the distribution that is sampled from, and the draw.

The order of the steps and their arithmetic are those of Hugging Face transformers
(`generation/logits_process.py`), so that the same settings give the same distribution. Every number
is an array with one entry per row: rows may differ, and a new number compiles nothing.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt32

from jaxformers.checks import check_key, is_known

# One number, or one per row.
Numbers = ArrayLike | Sequence[int] | Sequence[float]
# One key, or one per row.
Keys = Key[Array, "..."] | UInt32[Array, "..."]


class Warper(eqx.Module):
    """What sampling does to the logits: temperature, then cuts of the improbable tokens.

    Each field is None (left out) or has one entry per row. `keep` is how many tokens survive every
    cut: 1, or with beams one more than there are end tokens.
    """

    temperature: Float[Array, " b"] | None = None
    top_k: Int[Array, " b"] | None = None
    top_p: Float[Array, " b"] | None = None
    min_p: Float[Array, " b"] | None = None
    typical_p: Float[Array, " b"] | None = None
    keep: int = eqx.field(static=True, default=1)

    def __call__(self, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """The logits that are sampled from, -inf for tokens that were cut."""
        keep = min(self.keep, logits.shape[-1])
        if self.temperature is not None:
            logits = logits / self.temperature[:, None]
        if self.top_k is not None or self.top_p is not None:
            logits = cut_top(logits, self.top_k, self.top_p, keep)
        if self.min_p is not None:
            logits = cut_min_p(logits, self.min_p, keep)
        if self.typical_p is not None:
            logits = cut_typical(logits, self.typical_p, keep)
        return logits


def cut_top(
    logits: Float[Array, "b v"],
    top_k: Int[Array, " b"] | None,
    top_p: Float[Array, " b"] | None,
    keep: int = 1,
) -> Float[Array, "b v"]:
    """The `top_k` most probable tokens, of these the fewest that hold `top_p` of the probability.

    Fan et al. 2018 and Holtzman et al. 2020. Both cuts are read off one sort, as thresholds: for
    large vocabularies the sort costs more than everything else here. Tokens tied with the last
    one kept are kept as well.
    """
    v = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    if top_k is not None:
        kept = jnp.clip(top_k, keep, v)
        lowest = jnp.take_along_axis(ascending, v - kept[:, None], axis=-1)
        ascending = jnp.where(ascending < lowest, -jnp.inf, ascending)
    if top_p is not None:
        below = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= 1 - top_p[:, None]
        ascending = jnp.where(below & (jnp.arange(v) < v - keep), jnp.inf, ascending)
        lowest = ascending.min(-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)


def cut_min_p(
    logits: Float[Array, "b v"], min_p: Float[Array, " b"], keep: int = 1
) -> Float[Array, "b v"]:
    """The tokens at least `min_p` times as probable as the likeliest one (Nguyen et al. 2024)."""
    probs = jax.nn.softmax(logits)
    cut = probs < min_p[:, None] * probs.max(-1, keepdims=True)
    return jnp.where(cut & ~_best(probs, keep), -jnp.inf, logits)


def cut_typical(
    logits: Float[Array, "b v"], typical_p: Float[Array, " b"], keep: int = 1
) -> Float[Array, "b v"]:
    """The tokens whose surprise is nearest to the entropy, `typical_p` of them by probability.

    Meister et al. 2023, "Locally typical sampling".
    """
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    # 0 log 0 is 0: tokens that were cut before add nothing to the entropy.
    entropy = -jnp.where(probs > 0, probs * log_probs, 0.0).sum(-1, keepdims=True)
    distance = jnp.abs(-log_probs - entropy)
    order = jnp.argsort(distance, axis=-1, stable=True)
    nearest_first = jnp.take_along_axis(distance, order, axis=-1)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    last = (mass < typical_p[:, None]).sum(-1, keepdims=True)
    last = jnp.clip(last, keep - 1, logits.shape[-1] - 1)
    return jnp.where(distance > jnp.take_along_axis(nearest_first, last, axis=-1), -jnp.inf, logits)


def _best(scores: Float[Array, "b v"], count: int) -> Bool[Array, "b v"]:
    """True at the `count` highest scores of each row; the first of tied ones."""
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros(scores.shape, jnp.bool_).at[rows, jax.lax.top_k(scores, count)[1]].set(True)


def draw(
    logits: Float[Array, "b v"], keys: Key[Array, " b"], index: Int[Array, ""]
) -> Int[Array, " b"]:
    """One token per row, row i with its own key for the `index`-th new token.

    The noise of a token depends on the row's key and the token's index alone (Gumbel-max), never
    on the batch, on how the loop got there, or on how many tokens a draft proposed.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(key: Keys | None, batch_size: int) -> Key[Array, " b"] | None:
    """A key per row: `fold_in(key, i)` of one key, or the given array of keys as it is."""
    if key is None:
        return None
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32
    per_row = isinstance(key, jax.Array) and key.ndim == (2 if raw else 1)
    if per_row and key.shape[0] != batch_size:
        raise ValueError(
            f"key must be one key or one per row, {batch_size} of them, got {key.shape[0]}. "
            "Write jax.random.split(key, batch_size)."
        )
    one = check_key(key[0] if per_row else key, "to sample with, or an array of one per row")
    if raw:
        key = jax.random.wrap_key_data(key)
    if per_row and one is not None:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


def per_row(
    name: str,
    value: Numbers | None,
    batch_size: int,
    dtype: type,
    inside: Callable[[np.ndarray], np.ndarray],
    wanted: str,
) -> Array | None:
    """An option as an array of one entry per row, checked where it is known; None stays None."""
    if value is None:
        return None
    if not is_known(value):
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), (batch_size,))
    array = np.asarray(value)
    kind = np.integer if dtype is np.int32 else np.number
    fits = np.issubdtype(array.dtype, kind) and array.shape in ((), (batch_size,))
    if not fits or not (np.isfinite(array) & inside(array)).all():
        raise ValueError(
            f"{name} must be {wanted}, or an array of that, one per row, shape ({batch_size},), "
            f"got {value!r}."
        )
    if dtype is np.int32:  # larger numbers mean the same as the largest
        array = np.minimum(array, np.iinfo(np.int32).max)
    return jax.device_put(np.broadcast_to(array.astype(dtype), (batch_size,)))
