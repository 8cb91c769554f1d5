"""The programs of the decoding engine: rows that share a step and begin and end independently.

A prompt is read in a row of its own, in chunks. Then the row is written into the batch, where all
rows take one step at a time. The host hears of every token, and decides which rows go on; so what
it knows of a row, such as the tokens that a grammar allows, comes as numbers that are added to its
logits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxformers.cache import Cache, LayerCache
from jaxformers.generation.loop import NAN, NONE_LEFT, begin_cache
from jaxformers.generation.processors import FrequencyPenalty, PresencePenalty, RepetitionPenalty
from jaxformers.generation.processors.processor import History
from jaxformers.generation.prompts import Source
from jaxformers.generation.sampling import Warper, draw, first_highest
from jaxformers.row_lengths import at_lengths
from jaxformers.serving.job import MOST_TOP, Sampling


class Rules(NamedTuple):
    """The rules by which each row's tokens are chosen; see `Sampling`."""

    keys: UInt32[Array, "r k"]  # the data of PRNG keys
    is_greedy: Bool[Array, " r"]
    temperature: Float[Array, " r"]
    top_k: Int[Array, " r"]
    top_p: Float[Array, " r"]
    min_p: Float[Array, " r"]
    repetition_penalty: Float[Array, " r"]
    frequency_penalty: Float[Array, " r"]
    presence_penalty: Float[Array, " r"]
    wants_top: Bool[Array, " r"]

    @property
    def cuts(self) -> Bool[Array, " r"]:
        """Whether improbable tokens of each row are cut, for which all logits are sorted."""
        cuts = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        return cuts & ~self.is_greedy

    @property
    def penalizes(self) -> Bool[Array, " r"]:
        """Whether tokens that each row has already are penalized."""
        penalties = (self.frequency_penalty != 0) | (self.presence_penalty != 0)
        return penalties | (self.repetition_penalty != 1)

    def of(self, live: Bool[Array, " r"]) -> "Rules":
        """Returns the rules with which the rows that are not in use ask for nothing."""
        return self._replace(
            is_greedy=self.is_greedy | ~live,
            wants_top=self.wants_top & live,
            repetition_penalty=jnp.where(live, self.repetition_penalty, 1.0),
            frequency_penalty=jnp.where(live, self.frequency_penalty, 0.0),
            presence_penalty=jnp.where(live, self.presence_penalty, 0.0),
        )


class Rows(NamedTuple):
    """The state of some rows. Their last tokens are read in the next step, and not in the cache.

    Arguments:
        tokens: the ids of each row at the right, its last token in the last column.
        length: how many of these are the row's.
        new_count: how many of these are new.
        rules: how the next ones are chosen.
        cache: the memory of all of them but the last, `by_rows`.
    """

    tokens: Int[Array, "r s"]
    length: Int[Array, " r"]
    new_count: Int[Array, " r"]
    rules: Rules
    cache: Cache


class Chosen(NamedTuple):
    """The next token of each row.

    Arguments:
        tokens: the ids.
        log_probs: their log-probabilities under the model itself.
        top_tokens, top_log_probs: the likeliest ones, if a row wants them.
        failed: 0, or the reason why there is none: `NAN` or `NONE_LEFT`.
    """

    tokens: Int[Array, " r"]
    log_probs: Float[Array, " r"]
    top_tokens: Int[Array, "r k"]
    top_log_probs: Float[Array, "r k"]
    failed: Int[Array, " r"]


def read_rules(sampling: Sampling) -> Rules:
    """Returns the rules of one row."""
    is_greedy = sampling.temperature == 0
    key = jax.random.fold_in(jax.random.key(sampling.seed), sampling.index)
    numbers = [
        *(is_greedy, np.float32(1 if is_greedy else sampling.temperature)),
        *(np.int32(sampling.top_k), np.float32(sampling.top_p), np.float32(sampling.min_p)),
        *(np.float32(sampling.repetition_penalty), np.float32(sampling.frequency_penalty)),
        *(np.float32(sampling.presence_penalty), sampling.top > 0),
    ]
    return Rules(jax.random.key_data(key)[None], *jax.device_put([np.array([x]) for x in numbers]))


@eqx.filter_jit
def new_row(
    model: Any,
    slots: int,
    source: Int[Array, "1 source"] | None,
    real: Bool[Array, "1 source"] | None,
) -> Rows:
    """Returns one row without tokens, with the keys of its source if it has one."""
    given = None if source is None or real is None else Source(source, real)
    cache = begin_cache(model, 1, slots, given).by_rows()
    none, ones = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32)
    keys = jax.random.key_data(jax.random.key(0))[None]
    off = jnp.zeros(1, jnp.bool_)
    rules = Rules(keys, ~off, ones, none, ones, 0 * ones, ones, 0 * ones, 0 * ones, off)
    return Rows(jnp.zeros((1, slots), jnp.int32), none, none, rules, cache)


@eqx.filter_jit
def repeat(rows: Rows, times: int) -> Rows:
    """Returns each row so many times."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), rows)


@eqx.filter_jit(donate="all-except-first")
def read_chunk(
    fixed: tuple[Any, Int[Array, "1 c"], Int[Array, ""], Int[Array, " 1"]], row: Rows
) -> tuple[Rows, Float[Array, "1 d"]]:
    """Returns a row after more tokens of its prompt, and the hidden state of the last of these.

    Arguments:
        fixed: the model; ids, then filling; how many ids there are; the length of the prompt.
        row: what it has read so far.
    """
    model, tokens, count, length = fixed
    real = (jnp.arange(tokens.shape[1]) < count)[None]
    model = at_lengths(model, length)
    hidden, cache = model.forward(tokens, padding_mask=real, cache=row.cache)
    last = lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    return row._replace(cache=cache), last[:, 0]


@eqx.filter_jit(donate="all-except-first")
def begin(
    fixed: tuple[Any, Float[Array, "1 d"], Float[Array, "1 v"]],
    row: Rows,
    tokens: Int[Array, "1 s"],
    length: Int[Array, " 1"],
    rules: Rules,
) -> tuple[Rows, Chosen]:
    """Returns a row whose prompt has been read with its first new token.

    Arguments:
        fixed: the model, the hidden state of the prompt's last token, and what is added to logits.
        row: with the prompt in its cache.
        tokens, length: the prompt at the right, and its length.
        rules: of the row.
    """
    model, hidden, bias = fixed
    row = Rows(tokens, length, jnp.zeros_like(length), rules, row.cache)
    return choose(row, model.logits_of(hidden), bias, jnp.ones(1, jnp.bool_))


@eqx.filter_jit(donate="all-except-first")
def step(
    fixed: tuple[Any, Bool[Array, " r"], Float[Array, "r v"]], rows: Rows
) -> tuple[Rows, Chosen]:
    """Returns the rows after one more token each.

    Arguments:
        fixed: the model, which rows are in use, and what is added to logits.
        rows: those that are not in use stay as they are; their tokens mean nothing.
    """
    model, live, bias = fixed
    hidden, cache = model.forward(rows.tokens[:, -1:], padding_mask=live[:, None], cache=rows.cache)
    return choose(rows._replace(cache=cache), model.logits_of(hidden)[:, 0], bias, live)


def choose(
    rows: Rows, logits: Float[Array, "r v"], bias: Float[Array, "r v"], live: Bool[Array, " r"]
) -> tuple[Rows, Chosen]:
    """Returns the rows with one more token each.

    What only some requests ask for is computed only where a row in use asks for it.
    """
    rules, slots = rows.rules.of(live), rows.tokens.shape[1]
    logits = logits.astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    history = History(rows.tokens, slots - rows.length, slots - rows.new_count, jnp.asarray(slots))
    scores = bias + lax.cond(
        rules.penalizes.any(), lambda: penalize(rules, logits, history), lambda: logits
    )
    best = first_highest(scores)
    token = lax.cond(
        rules.is_greedy.all(),
        lambda: best,
        lambda: jnp.where(rules.is_greedy, best, sample(rules, scores, rows.new_count)),
    )
    many = min(MOST_TOP, logits.shape[1])
    none = jnp.zeros((len(token), many), jnp.float32), jnp.zeros((len(token), many), jnp.int32)
    top_log_probs, top_tokens = lax.cond(
        rules.wants_top.any(), lambda: tuple(lax.top_k(log_probs, many)), lambda: none
    )
    log_prob, score = (
        jnp.take_along_axis(x, token[:, None], axis=1)[:, 0] for x in (log_probs, scores)
    )
    # One logit that is no number makes all log-probabilities of a row so.
    failed = jnp.where(jnp.isnan(log_prob), NAN, jnp.where(score == -jnp.inf, NONE_LEFT, 0))
    chosen = Chosen(token, log_prob, top_tokens, top_log_probs, failed)
    after = rows._replace(
        tokens=jnp.concatenate([rows.tokens[:, 1:], token[:, None]], axis=1),
        length=rows.length + 1,
        new_count=rows.new_count + 1,
    )
    return after, chosen


def penalize(rules: Rules, logits: Float[Array, "r v"], history: History) -> Float[Array, "r v"]:
    """Returns the logits after the penalties, in the order of `generate`."""
    for processor in (
        RepetitionPenalty(rules.repetition_penalty),
        FrequencyPenalty(rules.frequency_penalty),
        PresencePenalty(rules.presence_penalty),
    ):
        logits = processor(None, logits, history)[1]
    return logits


def sample(rules: Rules, scores: Float[Array, "r v"], index: Int[Array, " r"]) -> Int[Array, " r"]:
    """Returns a random token of each row, its `index`-th new one."""
    top_k = jnp.where(rules.top_k > 0, rules.top_k, scores.shape[1])
    cut = Warper(rules.temperature, top_k, rules.top_p, rules.min_p)
    warped = lax.cond(
        rules.cuts.any(), lambda: cut(scores), lambda: Warper(rules.temperature)(scores)
    )
    return draw(warped, jax.random.wrap_key_data(rules.keys), index)


@eqx.filter_jit(donate="all-except-first")
def insert(fixed: tuple[Rows, Int[Array, ""]], rows: Rows) -> Rows:
    """Returns the rows with another one in a place; `fixed` is that row and the number."""
    row, place = fixed
    return jax.tree.map(
        lambda x, new: lax.dynamic_update_slice_in_dim(x, new, place, axis=0), rows, row
    )


@eqx.filter_jit
def take(rows: Rows, place: Int[Array, ""], count: Int[Array, ""]) -> Rows:
    """Returns one of the rows, with the memory of its first `count` tokens.

    The rest of it is zeros: a NaN would spread even from where no token is.
    """
    row = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, place, 1, axis=0), rows)
    cache = row.cache.first_tokens(count[None])

    def clean(layer: Any) -> LayerCache:
        used = (layer.positions >= 0)[:, None, :, None]
        return layer._replace(own=jax.tree.map(lambda x: jnp.where(used, x, 0), layer.own))

    return row._replace(
        cache=eqx.tree_at(lambda x: x.layers, cache, tuple(map(clean, cache.layers)))
    )


@eqx.filter_jit
def resize(rows: Rows, slots: int, own_slots: tuple[int, ...], source_slots: int | None) -> Rows:
    """Returns the rows with room for so many tokens; those beyond are no longer there.

    Arguments:
        rows: those in use must not be longer.
        slots: the most tokens of a row.
        own_slots: how many of them each layer keeps.
        source_slots: the most tokens of an encoder; None where there is none.
    """
    width = (0, 0, 0), (slots - rows.tokens.shape[1], 0, 0)
    cache = resize_source(rows.cache.resize(slots, own_slots), source_slots)
    return rows._replace(tokens=lax.pad(rows.tokens, jnp.int32(0), width), cache=cache)


def resize_source(cache: Cache, slots: int | None) -> Cache:
    """Returns a cache with room for so many tokens of an encoder."""
    old = cache.source_positions
    if slots is None or old is None:
        return cache
    more = slots - old.shape[1]

    def pad(layer: LayerCache) -> LayerCache:
        width = (0, 0, 0), (0, 0, 0), (0, more, 0), (0, 0, 0)
        cross = jax.tree.map(lambda x: lax.pad(x, jnp.zeros((), x.dtype), width), layer.cross)
        return layer._replace(cross=cross)

    positions = lax.pad(old, jnp.int32(-1), ((0, 0, 0), (0, more, 0)))
    return eqx.tree_at(
        lambda x: (x.layers, x.source_positions), cache, (tuple(map(pad, cache.layers)), positions)
    )


def at_the_right(tokens: Sequence[int], slots: int) -> Int[Array, "1 s"]:
    """Returns tokens in the last of so many columns."""
    return jax.device_put(np.pad(np.asarray(tokens, np.int32), (slots - len(tokens), 0))[None])
