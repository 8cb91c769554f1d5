"""What may come next, given what came before: penalties, bans and forced tokens.

The order of the steps and their arithmetic are those of Hugging Face transformers
(`generation/logits_process.py`); it has no presence and frequency penalty, which follow the OpenAI
API. They act on greedy decoding, sampling and beams alike.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformers.generation.prompts import check_ids


class History(NamedTuple):
    """The tokens so far: a row has the columns from `first` to `length`, new ones from `start`."""

    tokens: Int[Array, "b s"]
    first: Int[Array, " b"]
    start: Int[Array, ""]
    length: Int[Array, ""]

    @property
    def real(self) -> Bool[Array, "b s"]:
        """Which columns hold tokens of the row."""
        columns = jnp.arange(self.tokens.shape[1])
        return (columns >= self.first[:, None]) & (columns < self.length)

    def ends_with(self, patterns: Int[Array, "p w"]) -> Bool[Array, "b p"]:
        """Which rows end with which patterns; -1 in a pattern fits anything."""
        columns = self.length - patterns.shape[1] + jnp.arange(patterns.shape[1])
        tail = jnp.take(self.tokens, jnp.maximum(columns, 0), axis=1)
        tail = jnp.where(columns >= self.first[:, None], tail, -2)
        return ((tail[:, None] == patterns) | (patterns == -1)).all(-1)


class Constraints(eqx.Module):
    """What is done to the logits before anything is chosen; None leaves a step out.

    Numbers have one entry per row. `suppress_tokens` and `begin_suppress_tokens` are True at the
    tokens that do not come, at all or as the first one. `bad_words` holds a token sequence per
    line, filled with -1 on the left. `logits_fn(logits, tokens, real)` is the user's own step:
    logits `(b, v)`, tokens `(b, s)`, and which of those are tokens so far.
    """

    repetition_penalty: Float[Array, " b"] | None = None
    frequency_penalty: Float[Array, " b"] | None = None
    presence_penalty: Float[Array, " b"] | None = None
    no_repeat_ngram_size: Int[Array, " b"] | None = None
    bad_words: Int[Array, "p w"] | None = None
    suppress_tokens: Bool[Array, "1 v"] | None = None
    begin_suppress_tokens: Bool[Array, "1 v"] | None = None
    min_new_tokens: Int[Array, " b"] | None = None
    forced_first_token: Int[Array, " b"] | None = None
    forced_last_token: Int[Array, " b"] | None = None
    logits_fn: Callable | None = None

    def __call__(
        self,
        logits: Float[Array, "b v"],
        history: History,
        limit: Int[Array, ""],
        end_tokens: Int[Array, " e"],
    ) -> Float[Array, "b v"]:
        """The logits to choose from, -inf for what is banned; `limit` ends the columns."""
        new = history.length - history.start
        if self.repetition_penalty is not None:
            logits = penalize_repetition(logits, history, self.repetition_penalty)
        if self.frequency_penalty is not None or self.presence_penalty is not None:
            logits = penalize_counts(logits, history, self.frequency_penalty, self.presence_penalty)
        if self.no_repeat_ngram_size is not None:
            banned = repeated_ngrams(history, self.no_repeat_ngram_size, logits.shape[-1])
            logits = jnp.where(banned, -jnp.inf, logits)
        if self.bad_words is not None:
            begun = history.ends_with(self.bad_words[:, :-1])
            logits = jnp.where(mark(self.bad_words[:, -1], begun, logits), -jnp.inf, logits)
        if self.suppress_tokens is not None:
            logits = jnp.where(self.suppress_tokens, -jnp.inf, logits)
        if self.begin_suppress_tokens is not None:
            # A first token that is forced comes before those that are chosen.
            begins = new == (0 if self.forced_first_token is None else 1)
            logits = jnp.where(begins & self.begin_suppress_tokens, -jnp.inf, logits)
        if self.min_new_tokens is not None:
            early = jnp.broadcast_to(
                (new < self.min_new_tokens)[:, None], (logits.shape[0], end_tokens.shape[0])
            )
            logits = jnp.where(mark(end_tokens, early, logits), -jnp.inf, logits)
        if self.forced_first_token is not None:
            logits = force(logits, self.forced_first_token, new == 0)
        if self.forced_last_token is not None:
            logits = force(logits, self.forced_last_token, history.length == limit - 1)
        if self.logits_fn is not None:
            logits = self.logits_fn(logits, history.tokens, history.real).astype(jnp.float32)
        return logits

    def repeat(self, times: int) -> "Constraints":
        """The same for each row `times` times over."""
        per_row: dict[str, Any] = {
            field.name: jnp.repeat(value, times)
            for field in dataclasses.fields(self)
            if eqx.is_array(value := getattr(self, field.name)) and value.ndim == 1
        }
        return dataclasses.replace(self, **per_row)


def penalize_repetition(
    logits: Float[Array, "b v"], history: History, penalty: Float[Array, " b"]
) -> Float[Array, "b v"]:
    """Logits of the tokens that the row has, divided by the penalty if positive, else times it.

    Keskar et al. 2019 (CTRL), section 4.1.
    """
    penalty, limits = penalty[:, None], jnp.finfo(logits.dtype)
    lower = jnp.where(logits < 0, logits * penalty, logits / penalty)
    # Of two infinite logits there would be no difference, and no distribution.
    lower = jnp.where(jnp.isfinite(logits), jnp.clip(lower, limits.min, limits.max), lower)
    return jnp.where(counts(history, history.real, logits) > 0, lower, logits)


def penalize_counts(
    logits: Float[Array, "b v"],
    history: History,
    frequency: Float[Array, " b"] | None,
    presence: Float[Array, " b"] | None,
) -> Float[Array, "b v"]:
    """Logits less `frequency` each time a token was generated, and `presence` if it ever was."""
    new = history.real & (jnp.arange(history.tokens.shape[1]) >= history.start)
    count = counts(history, new, logits)
    if frequency is not None:
        logits = logits - frequency[:, None] * count.astype(logits.dtype)
    if presence is not None:
        logits = logits - presence[:, None] * (count > 0).astype(logits.dtype)
    return logits


def repeated_ngrams(
    history: History, size: Int[Array, " b"], vocab_size: int
) -> Bool[Array, "b v"]:
    """The tokens that would complete an n-gram of `size` tokens which the row already has."""
    tokens, length = history.tokens, history.length

    def same(back, fits):
        # Whether the token `back` columns before each column is the one `back` before the next.
        there = jnp.roll(tokens, back, axis=1)
        here = jnp.take(tokens, jnp.maximum(length - back, 0), axis=1)[:, None]
        return fits & ((there == here) | (back >= size[:, None]))

    columns = jnp.arange(tokens.shape[1])
    complete = columns >= (history.first + size - 1)[:, None]
    fits = lax.fori_loop(1, jnp.max(size), same, complete & (columns < length))
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), jnp.bool_).at[rows, tokens].max(fits)


def counts(
    history: History, where: Bool[Array, "b s"], logits: Float[Array, "b v"]
) -> Int[Array, "b v"]:
    """How often each row has each token of the vocabulary in the columns `where`."""
    rows = jnp.arange(logits.shape[0])[:, None]
    zeros = jnp.zeros(logits.shape, jnp.int32)
    return zeros.at[rows, history.tokens].add(where.astype(jnp.int32))


def mark(
    tokens: Int[Array, " p"], where: Bool[Array, "b p"], logits: Float[Array, "b v"]
) -> Bool[Array, "b v"]:
    """True at `tokens` in the rows where `where` says so."""
    return jnp.zeros(logits.shape, jnp.bool_).at[:, tokens].max(where)


def force(
    logits: Float[Array, "b v"], token: Int[Array, " b"], now: Bool[Array, ""]
) -> Float[Array, "b v"]:
    """0 for `token` and -inf for all others, if it is time."""
    forced = jnp.where(jnp.arange(logits.shape[1]) == token[:, None], 0.0, -jnp.inf)
    return jnp.where(now, forced.astype(logits.dtype), logits)


def marked(name: str, given: Any, vocab_size: int) -> Bool[Array, "1 v"] | None:
    """Token ids as booleans over the vocabulary; None for none of them.

    Raises:
        ValueError: if they are no ids, or all that there are.
    """
    ids = check_ids(name, given, vocab_size)
    where = np.zeros((1, vocab_size), np.bool_)
    where[0, ids] = True
    if where.all():
        raise ValueError(f"{name} must leave a token to choose, got all {vocab_size} of them.")
    return jax.device_put(where) if len(ids) else None


def sequences(
    name: str, given: Sequence[Sequence[int]] | None, vocab_size: int
) -> Int[Array, "p w"] | None:
    """Token sequences as lines of one array, filled with -1 on the left; None stays None."""
    if given is None:
        return None
    is_nested = isinstance(given, list | tuple) and all(
        isinstance(line, list | tuple | np.ndarray) and len(line) for line in given
    )
    if not is_nested or not given:
        raise ValueError(
            f"{name} must be a list of token sequences such as [[5], [7, 8]], got {given!r}."
        )
    longest = max(map(len, given))
    lines = [check_ids(name, line, vocab_size) for line in given]
    lines = [np.pad(line, (longest - len(line), 0), constant_values=-1) for line in lines]
    return jax.device_put(np.stack(lines))
