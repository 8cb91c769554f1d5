"""From logits to a token: the distribution that is sampled from, and the draw.

The order of the steps and their arithmetic are those of Hugging Face transformers
(`generation/logits_process.py`), so that the same settings give the same distribution. Where tokens
are tied at the border of a cut, what is kept differs: see `cut_top` and `cut_typical`. Every number
is an array with one entry per row: rows may differ, and a new number compiles nothing.

Tokens are compared by their logits. Probabilities underflow: in float32 all tokens whose logit is
more than 103 below the highest have the same one, 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt32

from jaxformers.checks import check_key, is_known
from jaxformers.native.operation import is_spread
from jaxformers.one_program import bucket

# One number, or one per row.
Numbers = ArrayLike | Sequence[int] | Sequence[float]
# One key, or one per row.
Keys = Key[Array, "..."] | UInt32[Array, "..."]


# Kinds of numbers: their type, the range that is allowed, and that in words.
POSITIVE = np.float32, lambda x: x > 0, "a number above 0"
FRACTION = np.float32, lambda x: (x > 0) & (x <= 1), "a number in (0, 1]"
ANY = np.float32, lambda x: x == x, "a number"
COUNT = np.int32, lambda x: x >= 1, "an integer of at least 1"
NOT_NEGATIVE = np.int32, lambda x: x >= 0, "an integer of at least 0"

# Numbers of a row that are searched together, see `first_highest` and `draw`. With another number
# a key would draw other tokens.
BLOCK = 128

# Logits of a row among which a cut is sought. For fewer, `lax.top_k` takes hardly less time.
HIGHEST = 128

# Below this the likeliest token is certain: one rounding step between two logits, divided by it, is
# far above any noise. Sums of log-probabilities divided by it are still numbers.
COLDEST = 1e-25


class Warper(eqx.Module):
    """The steps of sampling: a temperature, then cuts of the improbable tokens.

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
        """Returns the logits that are sampled from, -inf for tokens that were cut."""
        keep = min(self.keep, logits.shape[-1])
        logits = logits.astype(jnp.float32)
        if self.temperature is not None:
            logits = divide(logits, self.temperature)
        if self.top_k is not None or self.top_p is not None:
            logits = cut_top(logits, self.top_k, self.top_p, keep)
        if self.min_p is not None:
            logits = cut_min_p(logits, self.min_p, keep)
        if self.typical_p is not None:
            logits = cut_typical(logits, self.typical_p, keep)
        return logits


def divide(logits: Float[Array, "b v"], temperature: Float[Array, " b"]) -> Float[Array, "b v"]:
    """Returns the logits divided by the temperature, however near to 0 it is.

    Temperatures below `COLDEST` are taken for it. Where a quotient is beyond float32 nevertheless,
    the row's highest logit is taken off before the division, which leaves the distribution the
    same.
    """
    warm = jnp.maximum(temperature, COLDEST)[:, None]
    divided = logits / warm
    overflows = (jnp.isinf(divided) & jnp.isfinite(logits)).any(-1, keepdims=True)
    best = logits.max(-1, keepdims=True)
    below = jnp.where((logits == best) & (best > -jnp.inf), 0.0, logits - best) / warm
    return jnp.where(overflows, below, divided)


def cut_top(
    logits: Float[Array, "b v"],
    top_k: Int[Array, " b"] | None,
    top_p: Float[Array, " b"] | None,
    keep: int = 1,
) -> Float[Array, "b v"]:
    """Keeps the `top_k` most probable tokens, and of these the fewest that hold `top_p`.

    Fan et al. 2018 and Holtzman et al. 2020. Both cuts are thresholds. They are sought among the
    `HIGHEST` highest logits, and where these do not do, by bisection: a sort of all logits would
    cost more than everything else here.

    Tokens tied with the last one kept are kept as well. For `top_k` transformers does the same.
    For `top_p` it keeps as many of the tied ones as are needed, those with the highest ids, so that
    there a row of equal logits and `top_p` 0.5 leaves half of the tokens, and here all of them.
    """
    scores = lax.stop_gradient(logits)

    def of_all() -> Float[Array, " b"]:
        return _last_by_bisection(scores, top_k, top_p, keep)

    if keep > HIGHEST:
        last = of_all()
    else:
        last, found = _last_of_highest(scores, top_k, top_p, keep)
        # Rows that were found keep their cut, so that none depends on the other ones.
        last = lax.cond(found.all(), lambda: last, lambda: jnp.where(found, last, of_all()))
    return jnp.where(logits < last[:, None], -jnp.inf, logits)


def _last_of_highest(
    logits: Float[Array, "b v"],
    top_k: Int[Array, " b"] | None,
    top_p: Float[Array, " b"] | None,
    keep: int,
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Returns the logit of the last token that `cut_top` keeps, and whether that was found."""
    v = logits.shape[-1]
    # XLA would compile a slice of this to a slice of a sort.
    highest = lax.optimization_barrier(lax.top_k(logits, min(v, HIGHEST))[0])
    n, end = highest.shape[-1], highest[:, -1:]

    def at(count: Int[Array, " b"]) -> Float[Array, " b"]:
        return jnp.take_along_axis(highest, count[:, None] - 1, axis=1)[:, 0]

    last, found = jnp.full(len(logits), -jnp.inf), jnp.ones(len(logits), jnp.bool_)
    if top_k is not None:
        last = jnp.where(top_k < v, at(jnp.clip(top_k, keep, n)), last)
        found = (top_k <= n) | (top_k >= v)
    if top_p is None:
        return last, found
    # The difference of two logits that are -inf would be no number.
    best, least = jnp.maximum(highest[:, :1], jnp.finfo(jnp.float32).min), last[:, None]
    # All that are above the end are among the highest, and those that are tied with it may not be.
    above = jnp.where((highest > end) & (highest >= least), jnp.exp(highest - best), 0.0)
    rest = jnp.where((logits <= end) & (logits >= least), jnp.exp(logits - best), 0.0).sum(-1)
    # The mass of each token and of those after it.
    mass = rest[:, None] + lax.cumsum(above, axis=1, reverse=True)
    cut = (1 - top_p) * mass[:, 0]
    count = (mass > cut[:, None]).sum(-1, dtype=jnp.int32)
    ends_above, ends_below = rest <= cut, rest > cut  # neither, if a logit is infinite
    found &= ends_above | ends_below & ((last >= end[:, 0]) | (n == v)) | (top_p >= 1)
    ends_at = jnp.where(ends_above, at(jnp.maximum(count, keep)), -jnp.inf)
    # Tokens whose probability underflows are not cut by 1.
    return jnp.where(top_p < 1, jnp.maximum(last, ends_at), last), found


def _last_by_bisection(
    logits: Float[Array, "b v"],
    top_k: Int[Array, " b"] | None,
    top_p: Float[Array, " b"] | None,
    keep: int,
) -> Float[Array, " b"]:
    """Returns the logit of the last token that `cut_top` keeps."""
    order = _in_order(logits)
    lowest, highest = order.min(-1), order.max(-1)

    def best(count: Int[Array, " b"] | int) -> Int[Array, " b"]:
        """Returns the least of the `count` highest places."""
        return _first(lowest, highest, lambda t: (order > t).sum(-1, dtype=jnp.int32) < count)

    if top_k is not None:
        lowest = best(jnp.clip(top_k, keep, logits.shape[-1]))
    if top_p is not None:
        cut = order < lowest[:, None]
        probs = jax.nn.softmax(jnp.where(cut, -jnp.inf, logits))
        last = _first(
            lowest,
            highest if keep == 1 else best(keep),
            lambda t: jnp.where(order <= t, probs, 0.0).sum(-1) > 1 - top_p,
        )
        # Tokens whose probability underflows are not cut by 1.
        lowest = jnp.where(top_p < 1, last, lowest)
    return _of_order(lowest)


def cut_min_p(
    logits: Float[Array, "b v"], min_p: Float[Array, " b"], keep: int = 1
) -> Float[Array, "b v"]:
    """Keeps tokens at least `min_p` times as probable as the likeliest (Nguyen et al. 2024)."""
    cut = jnp.exp(logits - logits.max(-1, keepdims=True)) < min_p[:, None]
    return jnp.where(cut & ~_best(logits, keep), -jnp.inf, logits)


def cut_typical(
    logits: Float[Array, "b v"], typical_p: Float[Array, " b"], keep: int = 1
) -> Float[Array, "b v"]:
    """Keeps the tokens whose surprise is nearest to the entropy, `typical_p` of probability.

    Meister et al. 2023, "Locally typical sampling". Tokens tied with the last one kept are kept as
    well, as transformers does; only where `keep` decides (beams), it keeps that many of them.
    """
    log_probs = jax.nn.log_softmax(logits)
    probs = jnp.exp(log_probs)
    # 0 log 0 is 0: tokens that were cut before add nothing to the entropy.
    entropy = -jnp.where(probs > 0, probs * log_probs, 0.0).sum(-1, keepdims=True)
    order = _in_order(jnp.abs(-log_probs - entropy))
    nearest, farthest = order.min(-1), order.max(-1)
    if keep > 1:
        nearest = _first(nearest, farthest, lambda t: (order <= t).sum(-1, dtype=jnp.int32) >= keep)
    last = _first(
        nearest, farthest, lambda t: jnp.where(order <= t, probs, 0.0).sum(-1) >= typical_p
    )
    # The sum of the probabilities may reach 1 before its end.
    cut = (order > last[:, None]) & (typical_p[:, None] < 1)
    return jnp.where(cut, -jnp.inf, logits)


def _in_order(numbers: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns the places of float32 numbers, integers of the same order; 0 and -0 share one."""
    bits = lax.bitcast_convert_type(jnp.where(numbers == 0, 0.0, numbers), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _of_order(order: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the numbers that have some places."""
    bits = jnp.where(order < 0, order ^ 0x7FFFFFFF, order)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _first(
    low: Int[Array, " b"],
    high: Int[Array, " b"],
    holds: Callable[[Int[Array, "b 1"]], Bool[Array, " b"]],
) -> Int[Array, " b"]:
    """Returns for each row the first place from `low` to `high` from which on a condition holds.

    It is `high` if the condition holds nowhere.
    """

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # their sum may be beyond int32
        found = holds(middle[:, None])
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    return lax.fori_loop(0, 32, halve, (low, high))[1]


def _best(scores: Float[Array, "b v"], count: int) -> Bool[Array, "b v"]:
    """Returns True at the `count` highest scores of each row; the first of tied ones."""
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros(scores.shape, jnp.bool_).at[rows, lax.top_k(scores, count)[1]].set(True)


def draw(
    logits: Float[Array, "b v"],
    keys: Key[Array, " b"],
    index: Int[Array, ""] | Int[Array, " b"],
) -> Int[Array, " b"]:
    """Draws one token per row, row i with its own key for the `index`-th new token.

    The highest sum of a logit and its noise is drawn (Gumbel-max): first of the blocks of tokens,
    then of the tokens of one block, which needs few random numbers. They depend on the row's key
    and the token's index alone, never on the batch, on how the loop got there, or on how many
    tokens a draft proposed.
    """
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(index, keys.shape))
    padding = (0, 0), (0, -logits.shape[1] % BLOCK)
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(len(logits), -1, BLOCK)
    n = blocks.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (n + BLOCK,), logits.dtype))(keys)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + noise[:, :n], axis=-1)
    within = _in_block(logits, block) + noise[:, n:]
    return (BLOCK * block + jnp.argmax(within, axis=-1)).astype(jnp.int32)


def first_highest(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """Returns the first of the highest numbers of each row; a row with a NaN gives any column.

    XLA's CPU backend compiles `jnp.argmax` to a loop without vectors, which takes 130 microseconds
    for 50,000 numbers. A maximum has vectors, so the highest number of each block is found first,
    and then one block is searched.

    Example:
        >>> first_highest(jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 5.0]]))
        Array([1, 2], dtype=int32)
    """
    if jax.default_backend() != "cpu" or is_spread(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    size, padding = (1, BLOCK), ((0, 0), (0, -logits.shape[1] % BLOCK))
    highest = lax.reduce_window(logits, -jnp.inf, lax.max, size, size, padding)
    block = jnp.argmax(highest, axis=-1)
    within = jnp.argmax(_in_block(logits, block), axis=-1)
    return (BLOCK * block + within).astype(jnp.int32)


def _in_block(numbers: Float[Array, "b v"], block: Int[Array, " b"]) -> Float[Array, "b k"]:
    """Returns the numbers of one block of each row, -inf beyond the last one."""
    columns, v = BLOCK * block[:, None] + jnp.arange(BLOCK), numbers.shape[1]
    found = jnp.take_along_axis(numbers, jnp.minimum(columns, v - 1), axis=1)
    return jnp.where(columns < v, found, -jnp.inf)


def row_keys(key: Keys | None, batch_size: int, rows: int | None = None) -> Key[Array, " b"] | None:
    """Returns a key per row: `fold_in(key, i)` of one key, or the given array of keys.

    Arguments:
        key: one key, or one per row.
        batch_size: how many rows the call has.
        rows: how many its program has; the last key is that of added rows as well.
    """
    rows = batch_size if rows is None else rows
    if key is None:
        return None
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32
    per_row = isinstance(key, jax.Array) and key.ndim == (2 if raw else 1)
    if per_row and key.shape[0] != batch_size:
        raise ValueError(
            f"key must be one key or one per row, {batch_size} of them, got {key.shape[0]}. "
            "Write jax.random.split(key, batch_size)."
        )
    is_key = per_row and (raw or jnp.issubdtype(key.dtype, jax.dtypes.prng_key))
    if not is_key:
        check_key(key, "to sample with, or an array of one per row")
    if raw:
        key = jax.random.wrap_key_data(key)
    if not per_row:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return key if rows == batch_size else _pick(key, [*range(batch_size)], rows)


def keys_of(key: Keys, batch_size: int, index: Sequence[int]) -> Key[Array, " b"]:
    """Returns the keys that `row_keys` gives some rows of a batch.

    Arguments:
        key: one key, or one per row.
        batch_size: how many rows the batch has.
        index: the numbers of the rows, in the order of the result.
    """
    if not isinstance(key, jax.Array):
        check_key(key, "to sample with, or an array of one per row")
    if key.ndim == (1 if key.dtype == jnp.uint32 else 0):
        key = jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key
        rows = bucket(len(index), smallest=1)  # as many as a program has
        padded = [*index, *[index[-1]] * (rows - len(index))]
        numbers = jax.device_put(np.asarray(padded, np.int32))
        folded = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return _pick(folded, range(len(index)))
    keys: Any = row_keys(key, batch_size)
    return _pick(keys, index)


def _pick(
    keys: Key[Array, " b"], index: Sequence[int], rows: int | None = None
) -> Key[Array, " r"]:
    """Returns some keys, the last of them several times up to `rows`, without compiling."""
    data = np.asarray(jax.random.key_data(keys))[np.asarray(index)]
    data = np.pad(data, ((0, (rows or len(data)) - len(data)), (0, 0)), "edge")
    return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(keys))


def per_row(
    name: str,
    value: Numbers | None,
    batch_size: int,
    dtype: type,
    inside: Callable[[np.ndarray], np.ndarray],
    wanted: str,
    advice: str = "",
    *,
    rows: int | None = None,
) -> Array | None:
    """Returns an option as an array of one entry per row; None stays None.

    `rows` is how many the program has, if not `batch_size`: added ones have the last number.
    """
    if value is None:
        return None
    if not is_known(value):
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), (batch_size,))
    shapes = (), (batch_size,)
    array = _read_numbers(
        name,
        value,
        dtype,
        inside,
        f"{wanted}, or an array of that, one per row, shape ({batch_size},)",
        advice,
        lambda shape: shape in shapes,
    )
    array = np.broadcast_to(array, (batch_size,))
    more = 0 if rows is None else rows - batch_size
    return jax.device_put(np.pad(array, (0, more), mode="edge"))


def one_or_more(
    name: str, value: Any, dtype: type, inside: Callable[[np.ndarray], np.ndarray], wanted: str
) -> Array:
    """Returns a number, or an array of several, checked where they are known."""
    if not is_known(value):
        return jnp.asarray(value).astype(dtype)
    wanted = f"{wanted}, or an array of that, one per row"
    return jax.device_put(
        _read_numbers(name, value, dtype, inside, wanted, "", lambda shape: len(shape) < 2)
    )


def _read_numbers(
    name: str,
    value: Any,
    dtype: type,
    inside: Callable[[np.ndarray], np.ndarray],
    wanted: str,
    advice: str,
    has_shape: Callable[[tuple[int, ...]], bool],
) -> np.ndarray:
    """Returns known numbers as an array of a type, or raises if they are not as wanted."""
    array = np.asarray(value)
    kind = np.integer if dtype is np.int32 else np.number
    fits = jnp.issubdtype(array.dtype, kind) and has_shape(array.shape)
    if not fits or not (np.isfinite(array) & inside(array)).all():
        raise ValueError(f"{name} must be {wanted}, got {value!r}.{advice}")
    # Numbers beyond what the type holds mean the same as the last one that it does.
    if dtype is np.int32:
        array = np.minimum(array, np.iinfo(np.int32).max)
    else:
        wide, limits = array.astype(np.float64), np.finfo(dtype)
        size = np.clip(np.abs(wide), limits.tiny, limits.max)
        array = np.where(wide == 0, 0.0, np.sign(wide) * size)
    return np.asarray(array, dtype)
