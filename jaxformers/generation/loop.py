"""The decoding loop: the prompt in chunks, then token by token until all rows have ended.

A model takes part by three methods: `forward(tokens, padding_mask=, cache=)` gives hidden states
and the longer cache, `logits_of(hidden)` gives logits, and its `decoder` makes the first cache.
With an encoder, that cache holds the source's keys and padding, and all else is the same.

Rows of different length are moved to the right: in every row the prompt's last token is in column
`start - 1`, and new tokens follow from column `start` on. Each column of the tokens takes one of
the cache. Where a cache is continued, the tokens that it holds come before the prompt's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformers.cache import CHUNK, Cache, narrow
from jaxformers.generation.plan import Plan
from jaxformers.generation.prompts import Source
from jaxformers.masks import AttentionMask, padding_to_positions
from jaxformers.row_lengths import at_lengths, reread

# Why a row failed: its logits were not numbers, or no token was left to choose. With beams there
# may be fewer sequences than asked for.
NAN, NONE_LEFT, TOO_FEW = 1, 2, 3


class State(NamedTuple):
    """The state that the loop carries. The cache lacks the last column, which is read next."""

    tokens: Int[Array, "b s"]
    log_probs: Float[Array, "b s"]  # of the new tokens under the model itself, unwarped
    length: Int[Array, ""]  # columns in use
    first: Int[Array, " b"]  # the first real column of each row
    done: Bool[Array, " b"]
    failed: Int[Array, " b"]  # 0, or the reason why the row failed: NAN, NONE_LEFT
    real: Bool[Array, " b"]  # whether the last column holds a token rather than filling
    processing: tuple[Any, ...]  # the states of the processors before the last column
    cache: Any


def begin_cache(model: Any, batch_size: int, slots: int, source: Source | None) -> Cache:
    """Returns an empty cache of `slots` columns, with the keys of the source if there is one.

    It is not the model's own `init_cache`: padding does not count against `max_seq_length`.
    """
    if source is None:
        return model.decoder.init_cache(batch_size, slots)
    memory = model.encode(source.tokens, src_padding_mask=source.real)
    positions = padding_to_positions(source.real)
    return model.decoder.init_cache(batch_size, slots, memory, positions)


def prefill(
    model: Any,
    plan: Plan,
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    slots: int,
    source: Source | None = None,
    cache: Cache | None = None,
) -> tuple[State, Float[Array, "b v"]]:
    """Returns the state with the prompt in it, and the logits of the first new token."""
    b, t = tokens.shape
    lengths = real.sum(axis=1, dtype=jnp.int32)
    if cache is None:  # the prompt need not attend to slots that are still empty
        tokens, real = to_the_right(tokens, real, plan.start, plan.pad_token)
        cache = begin_cache(model, b, slots, source).resize(t)
        last, cache = read(at_lengths(model, lengths), tokens, real, plan.start, cache)
        cache = cache.resize(slots)
        filling = jnp.broadcast_to(plan.pad_token, (b, slots))
        row = lax.dynamic_update_slice(filling, tokens, (0, 0))
    else:
        row, row_real = append(cache, tokens, real)
        columns = plan.start - cache.columns
        lengths = lengths + cache.token_counts
        tokens, real = to_the_right(tokens, real, columns, plan.pad_token)
        # The cache itself hides the padding of a source.
        cross = None if cache.layers[0].cross is None else AttentionMask()
        cache = reread(model, cache, lengths, AttentionMask(causal=True), cross)
        last, cache = read(at_lengths(model, lengths), tokens, real, columns, cache)
        row, real = to_the_right(row, row_real, plan.start, plan.pad_token)
    none, first = jnp.zeros(b, jnp.bool_), jnp.argmax(real, axis=1).astype(jnp.int32)
    added = jnp.arange(b) >= plan.given
    state = State(
        tokens=row,
        log_probs=jnp.zeros(row.shape, jnp.float32),
        length=plan.start,
        first=first,
        done=added,
        failed=jnp.zeros(b, jnp.int32),
        real=~none,
        processing=plan.begin(plan.history(row, first, plan.start)),
        cache=cache,
    )
    return state, model.logits_of(last)[:, 0]


def append(
    cache: Cache, tokens: Int[Array, "b t"], real: Bool[Array, "b t"]
) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """Returns a cache's tokens with these after them, in its slots, and which are real."""
    row, row_real = (
        lax.dynamic_update_slice_in_dim(old, new, cache.columns, axis=1)
        for old, new in ((cache.tokens, tokens), (cache.positions >= 0, real))
    )
    return row, row_real


def read(
    model: Any,
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    columns: Int[Array, ""],
    cache: Any,
) -> tuple[Float[Array, "b 1 d"], Any]:
    """Returns the hidden state of the last of the first `columns`, and the cache with those."""
    t = tokens.shape[1]

    def chunk(begin: Any, size: int, cache: Any) -> tuple[Any, Any, Any]:
        part, part_real = (lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (tokens, real))
        hidden, cache = model.forward(part, padding_mask=part_real, cache=cache)
        # A chunk in the middle of the prompt gives its own last column, which nobody reads.
        last = jnp.clip(columns - 1 - begin, 0, size - 1)
        last = lax.dynamic_slice_in_dim(hidden, last, 1, axis=1)
        return jnp.asarray(begin + size), last, cache

    state = chunk(0, t % CHUNK or CHUNK, cache)
    if t > CHUNK:  # all others have one size, and so one body
        state = repeat_while(
            lambda state: state[0] < columns,
            lambda state: chunk(state[0], CHUNK, state[2]),
            state,
        )
    end, last, cache = state
    # Columns past the prompt are only there to keep shapes few: new tokens overwrite them.
    return last, cache.rewind(end - columns)


def to_the_right(
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    columns: Int[Array, ""],
    pad_token: Int[Array, ""],
) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Moves each row's tokens to the end of the first `columns`, with filling before them."""
    beyond = jnp.arange(tokens.shape[1]) >= columns
    order = jnp.argsort(jnp.where(beyond, 2, real.astype(jnp.int32)), axis=1, stable=True)
    tokens, real = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, real))
    return jnp.where(real, tokens, pad_token), real


def emit(plan: Plan, state: State, logits: Float[Array, "b v"]) -> State:
    """Returns the state with one more column; rows that have ended get the filling."""
    history = plan.history(state.tokens, state.first, state.length)
    processing, chosen, none_left = plan.choose(state.processing, logits, history)
    failed = jnp.where(jnp.isnan(logits).any(-1), NAN, NONE_LEFT * none_left.astype(jnp.int32))
    failed = jnp.where(state.done, state.failed, failed)
    stopped = state.done | (failed > 0)
    token = jnp.where(stopped, plan.pad_token, chosen)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    log_prob = jnp.where(stopped, 0.0, log_prob)
    tokens, log_probs = (
        lax.dynamic_update_slice_in_dim(old, new[:, None], state.length, axis=1)
        for old, new in ((state.tokens, token), (state.log_probs, log_prob))
    )
    length = state.length + 1
    return state._replace(
        tokens=tokens,
        log_probs=log_probs,
        length=length,
        done=stopped | plan.ends(processing, plan.history(tokens, state.first, length)),
        failed=failed,
        real=~stopped,
        processing=processing,
    )


def feed(model: Any, plan: Plan, state: State) -> tuple[State, Float[Array, "b v"]]:
    """Returns the state with its last column in the cache, and the logits of the next one."""
    last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
    # A draft may go beyond the limit, where a model need not know positions any more.
    real = state.real & (state.length <= plan.limit)
    hidden, cache = model.forward(last, padding_mask=real[:, None], cache=state.cache)
    return state._replace(cache=cache), model.logits_of(hidden)[:, 0]


def advance(model: Any, plan: Plan, state: State) -> State:
    """Returns the state after one more token."""
    return emit(plan, *feed(model, plan, state))


def copied(x: Any) -> Any:
    """Returns copies of arrays, which share no memory with the arguments of the program."""
    return jax.tree.map(jnp.copy, x)


def unfinished(plan: Plan, state: State) -> Bool[Array, ""]:
    """Returns whether there is a column left and a row that has not ended."""
    return (state.length < plan.limit) & ~state.done.all()


def repeat_while(condition: Callable, body: Callable, state: Any) -> Any:
    """Runs `lax.while_loop` on arrays without their axes of size 1 (see `narrow`)."""
    start, widen = narrow(state)

    def narrow_body(state: Any) -> Any:
        return narrow(body(widen(state)))[0]

    return widen(lax.while_loop(lambda x: condition(widen(x)), narrow_body, start))


@eqx.filter_jit
def run(
    model: Any,
    plan: Plan,
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    slots: int,
    source: Source | None = None,
    cache: Cache | None = None,
    keep_cache: bool = False,
) -> State:
    """Runs the whole of decoding in one program.

    Arguments:
        model, plan: how to decode.
        tokens, real: the prompt in the columns of its bucket.
        slots: columns of the prompt and of the new tokens.
        source: the encoder's tokens, for a model that has one.
        cache: what the rows begin with; the tokens that it holds are no part of the result.
        keep_cache: whether the state has the cache of all tokens; else it has None.
    """
    begin = None if cache is None else cache.columns
    plan = plan if begin is None else plan.after(begin)
    state = emit(plan, *prefill(model, plan, tokens, real, slots, source, cache))
    state = repeat_while(
        lambda state: unfinished(plan, state), lambda state: advance(model, plan, state), state
    )
    return finish(model, plan, state, slots, begin, keep_cache)


def finish(
    model: Any, plan: Plan, state: State, slots: int, begin: Array | None, keep_cache: bool
) -> State:
    """Returns the last state of a call, with the cache of all tokens or with none.

    Arguments:
        model, plan, state: of the call.
        slots: columns of the prompt and of the new tokens.
        begin: how many columns of a cache come before the prompt; None is no cache. Their tokens
            are left out.
        keep_cache: whether the state has the cache of all tokens; else it has None.
    """
    # New columns that no row reached are still filling.
    state = feed(model, plan, state)[0] if keep_cache else state._replace(cache=None)
    if begin is None:
        return state
    tokens, log_probs = (
        lax.dynamic_slice_in_dim(x, begin, slots, axis=1) for x in (state.tokens, state.log_probs)
    )
    return state._replace(tokens=tokens, log_probs=log_probs)
