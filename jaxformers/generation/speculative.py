"""Speculative decoding: a cheap guess of several tokens, checked by the model in one call.

A guess is kept as long as it is what the model itself would have chosen, by the highest logit or
with the row's own noise for that token. So the tokens are those of plain decoding, one by one, for
greedy decoding and for sampling alike, and the guess only changes how long they take. A draft that
samples does so with the same noise, which makes it agree often (Daliri, Musco and Suresh 2024,
"Coupling without communication"; the idea of a draft is of Leviathan et al. 2023).

The rows of a batch share their columns, so a batch moves on as far as its slowest row.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformers.cache import Cache
from jaxformers.generation.loop import (
    State,
    advance,
    append,
    emit,
    feed,
    finish,
    prefill,
    repeat_while,
    unfinished,
)
from jaxformers.generation.plan import Plan
from jaxformers.generation.prompts import Source
from jaxformers.row_lengths import same_until


class ModelDraft(eqx.Module):
    """Guesses by a smaller model, whose memory is its cache."""

    model: Any

    def start(self, plan: Plan, *prompt: Any) -> Any:
        """Returns the memory of the prompt, given as to `prefill`."""
        return prefill(self.model, plan, *prompt)[0].cache

    def guess(
        self, plan: Plan, state: State, memory: Any, count: int
    ) -> tuple[Int[Array, "b s"], Any]:
        """Returns the tokens with `count` more columns guessed, and the memory with them."""
        state = state._replace(cache=memory)
        state = lax.fori_loop(0, count, lambda _, state: advance(self.model, plan, state), state)
        return state.tokens, feed(self.model, plan, state)[0].cache

    def rewind(self, memory: Any, columns: Int[Array, ""]) -> Any:
        """Returns the memory without its last columns."""
        return memory.rewind(columns)


class LookupDraft(eqx.Module):
    """Guesses from the row itself: what followed the last time that it had its last tokens.

    Saxena 2023, "Prompt lookup decoding". It has no memory.
    """

    ngram: int = eqx.field(static=True)

    def start(self, plan: Plan, *prompt: Any) -> None:
        """Remembers nothing."""

    def guess(
        self, plan: Plan, state: State, memory: None, count: int
    ) -> tuple[Int[Array, "b s"], None]:
        """Returns the tokens with `count` more columns guessed."""
        tokens, length = state.tokens, state.length
        columns = jnp.arange(tokens.shape[1])
        fits = jnp.broadcast_to(columns < length, tokens.shape)
        matched = jnp.zeros(tokens.shape, jnp.int32)
        for back in range(1, self.ngram + 1):
            there = jnp.roll(tokens, back, axis=1)
            here = jnp.take(tokens, jnp.maximum(length - back, 0), axis=1)[:, None]
            fits = fits & (there == here) & (columns - back >= state.first[:, None])
            matched = matched + fits.astype(jnp.int32)
        # The longest match, and of several the latest. What follows may itself reach the end of
        # the row, and then goes on from where it began.
        found = jnp.argmax(matched * tokens.shape[1] + columns, axis=1)[:, None]
        found = jnp.minimum(found, length - 1)
        ahead = found + jnp.arange(count) % (length - found)
        guessed = jnp.take_along_axis(tokens, ahead, axis=1)
        return lax.dynamic_update_slice_in_dim(tokens, guessed, length, axis=1), None

    def rewind(self, memory: None, columns: Int[Array, ""]) -> None:
        """Forgets nothing."""


class Round(NamedTuple):
    """The state that the loop carries."""

    state: State
    memory: Any
    guessed: Int[Array, ""]
    kept: Int[Array, ""]


@eqx.filter_jit
def run_speculative(
    model: Any,
    draft: ModelDraft | LookupDraft,
    plan: Plan,
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    slots: int,
    source: Source | None,
    count: int,
    cache: Cache | None = None,
    keep_cache: bool = False,
) -> tuple[State, Float[Array, ""]]:
    """Returns the state that `run` returns, and the share of guesses kept.

    `count` tokens are guessed at a time. A draft with a memory of its own reads the tokens of the
    cache before those of the prompt.
    """
    begin = None if cache is None else cache.columns
    plan = plan if begin is None else plan.after(begin)
    state = emit(plan, *prefill(model, plan, tokens, real, slots, source, cache))
    prompt = (tokens, real, slots) if cache is None else (*append(cache, tokens, real), cache.slots)
    none = jnp.zeros((), jnp.int32)
    start = Round(state, draft.start(plan, *prompt, source), none, none)

    def advance_round(old: Round) -> Round:
        state = old.state
        guesses, memory = draft.guess(plan, state, old.memory, count)
        reach = within_angles(model, state, count)
        new, counts = check(model, plan, state, guesses, count, reach)
        moved = new.length - state.length
        room = jnp.minimum(reach, plan.limit - state.length)
        # The last token of a round is the model's own, unless a row or the columns ended there.
        last = lax.dynamic_slice_in_dim(new.tokens, new.length - 1, 1, axis=1)
        guess = lax.dynamic_slice_in_dim(guesses, new.length - 1, 1, axis=1)
        right = (moved <= reach) & ((last == guess)[:, 0] | state.done).all()
        # A row may have ended before the last of the guesses that the others kept.
        cache = new.cache.rewind(count + 1 - moved).first_tokens(counts)
        return Round(
            state=new._replace(cache=cache),
            memory=draft.rewind(memory, count + 1 - moved),
            guessed=old.guessed + room,
            kept=old.kept + moved - 1 + right.astype(jnp.int32),
        )

    end = repeat_while(lambda old: unfinished(plan, old.state), advance_round, start)
    rate = end.kept.astype(jnp.float32) / jnp.maximum(end.guessed, 1).astype(jnp.float32)
    return finish(model, plan, end.state, slots, begin, keep_cache), rate


def within_angles(model: Any, state: State, count: int) -> Int[Array, ""] | int:
    """Returns how many guesses may be checked in one call, at most `count`.

    Where angles depend on how long a row is, a call has those of its last token. So it stops at the
    last guess that leaves them as they are for the token before the guesses.
    """
    lengths = state.cache.token_counts + 1
    last = same_until(model, lengths)
    if last is None:
        return count
    # A row that has ended has no guesses.
    ahead = jnp.where(state.done, count, last - lengths)
    return jnp.clip(ahead.min(), 0, count).astype(jnp.int32)


def check(
    model: Any,
    plan: Plan,
    state: State,
    guesses: Int[Array, "b s"],
    count: int,
    reach: Int[Array, ""] | int,
) -> tuple[State, Int[Array, " b"]]:
    """Returns the state with the guesses that the model shares, and one more token that is its own.

    Of `count` guesses the first `reach` are looked at. The cache comes back with `count + 1` more
    columns. How many tokens of each row it shall keep is returned as well.
    """
    window = lax.dynamic_slice_in_dim(guesses, state.length - 1, count + 1, axis=1)
    columns = state.length + jnp.arange(count)
    ahead = ~state.done[:, None] & (columns < jnp.minimum(plan.limit, state.length + reach))
    real = jnp.concatenate([state.real[:, None], ahead], axis=1)
    hidden, cache = model.forward(window, padding_mask=real, cache=state.cache)
    logits = model.logits_of(hidden)
    start = state.length

    def agrees(both: tuple[State, Any]) -> Bool[Array, ""]:
        state, _ = both
        last = state.length - 1
        same = jnp.take(state.tokens, last, axis=1) == jnp.take(guesses, last, axis=1)
        # The cache has the guesses, so that a row's last token has to be one of them as well.
        fits = (state.length == start) | (same | ~state.real).all()
        return fits & (state.length - start <= reach) & unfinished(plan, state)

    def accept(both: tuple[State, Int[Array, " b"]]) -> tuple[State, Int[Array, " b"]]:
        state, counts = both
        here = lax.dynamic_slice_in_dim(logits, state.length - start, 1, axis=1)
        return emit(plan, state, here[:, 0]), counts + state.real.astype(jnp.int32)

    counts = state.cache.token_counts
    return repeat_while(agrees, accept, (state._replace(cache=cache), counts))
