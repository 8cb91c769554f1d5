"""Decoding: one compiled program for every model.

`generate` turns what the user gave into arrays, then runs one program: the whole prompt in one
call, then one `lax.while_loop` over tokens that ends when all rows have ended. The program is
handed an adapter (`steps.py`) and knows no model.

Rows of different length are moved to the right, so that in every row the prompt's last token
stands in column `t - 1` and new ones from column `t` on. Column c of the tokens is column c of the
cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from jaxformers.checks import check_options, check_padding_mask, check_size, check_tokens, is_known
from jaxformers.prompts import Tokens, check_ids, check_room, join, pad_to_bucket
from jaxformers.sampling import Keys, Warper, draw, make_warper, row_keys


class Plan(eqx.Module):
    """What to do with logits and when to stop, all numbers as arrays: new ones compile nothing."""

    start: Int[Array, ""]  # the column of the first new token
    limit: Int[Array, ""]  # one past the column of the last
    keys: Key[Array, " b"] | None  # one per row; None is greedy
    warper: Warper
    end_tokens: Int[Array, " e"]
    pad_token: Int[Array, ""]


class State(NamedTuple):
    """What the loop carries."""

    tokens: Int[Array, "b s"]
    length: Int[Array, ""]  # columns in use
    first: Int[Array, " b"]  # the first real column of each row
    done: Bool[Array, " b"]
    failed: Bool[Array, " b"]  # rows whose logits were not numbers
    real: Bool[Array, " b"]  # whether the last column is a token rather than filling
    cache: Any


def choose(plan: Plan, logits: Float[Array, "b v"], length: Int[Array, ""]) -> Int[Array, " b"]:
    """The token of column `length`."""
    if plan.keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw(plan.warper(logits), plan.keys, length - plan.start)


def emit(plan: Plan, state: State, logits: Float[Array, "b v"]) -> State:
    """The state with one more column; rows that have ended get the filling."""
    failed = ~state.done & jnp.isnan(logits).any(-1)
    stopped = state.done | failed
    token = jnp.where(stopped, plan.pad_token, choose(plan, logits, state.length))
    ends = (token[:, None] == plan.end_tokens).any(-1)
    return state._replace(
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.length, axis=1),
        length=state.length + 1,
        done=stopped | ends,
        failed=state.failed | failed,
        real=~stopped,
    )


def prefill(
    step: Any, plan: Plan, tokens: Int[Array, "b t"], real: Bool[Array, "b t"], slots: int
) -> State:
    """The state after the first new token."""
    b, t = tokens.shape
    tokens, real = to_the_right(plan, tokens, real)
    hidden, cache = step(tokens, real, step.start(b, slots))
    # Columns past the prompt are only there to keep shapes few: new tokens overwrite them.
    cache = step.rewind(cache, plan.start)
    last = lax.dynamic_slice_in_dim(hidden, plan.start - 1, 1, axis=1)
    filling = jnp.broadcast_to(plan.pad_token, (b, slots))
    none = jnp.zeros(b, jnp.bool_)
    state = State(
        tokens=lax.dynamic_update_slice(filling, tokens, (0, 0)),
        length=plan.start,
        first=jnp.argmax(real, axis=1).astype(jnp.int32),
        done=none,
        failed=none,
        real=~none,
        cache=cache,
    )
    return emit(plan, state, step.project(last)[:, 0])


def advance(step: Any, plan: Plan, state: State) -> State:
    """The state after one more token."""
    last = lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
    hidden, cache = step(last, state.real[:, None], state.cache)
    return emit(plan, state._replace(cache=cache), step.project(hidden)[:, 0])


def unfinished(plan: Plan, state: State) -> Bool[Array, ""]:
    """Whether there is a column left and a row that has not ended."""
    return (state.length < plan.limit) & ~state.done.all()


def to_the_right(
    plan: Plan, tokens: Int[Array, "b t"], real: Bool[Array, "b t"]
) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Each row's tokens moved together to the end of the prompt's columns, filling before them."""
    beyond = jnp.arange(tokens.shape[1]) >= plan.start
    order = jnp.argsort(jnp.where(beyond, 2, real.astype(jnp.int32)), axis=1, stable=True)
    tokens, real = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, real))
    return jnp.where(real, tokens, plan.pad_token), real


@eqx.filter_jit
def run(
    step: Any, plan: Plan, tokens: Int[Array, "b t"], real: Bool[Array, "b t"], slots: int
) -> tuple[Int[Array, "b s"], Bool[Array, " b"]]:
    """The whole of decoding: the tokens of all columns, and which rows failed."""
    state = prefill(step, plan, tokens, real, slots)
    state = lax.while_loop(
        lambda state: unfinished(plan, state), lambda state: advance(step, plan, state), state
    )
    # New tokens that no row got to stay what the buffer began with, the filling.
    return state.tokens, state.failed


class Options(TypedDict, total=False):
    """What `generate` takes besides the arguments it names; every name may be left out.

    Arguments:
        pad_token: what rows are filled with once they have ended; default `end_token`, or 0.
        min_p: sample from tokens at least this times as probable as the most probable one, [0, 1].
        typical_p: sample from the tokens whose surprise is nearest to the entropy, this much
            probability of them, in (0, 1].
    """

    pad_token: int | None
    min_p: ArrayLike | None
    typical_p: ArrayLike | None


def generate(
    step: Any,
    prompt: Tokens,
    max_new_tokens: int,
    *,
    vocab_size: int,
    max_seq_length: int | None,
    end_token: int | None,
    temperature: ArrayLike,
    top_k: ArrayLike | None,
    top_p: ArrayLike | None,
    key: Keys | None,
    padding_mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Int[Array, "*b t"]:
    """The prompt and what the model continues it with; see the models' own `generate`.

    Arguments:
        step: an adapter from `steps.py`, which drives the model.
        prompt: `(b, t)` or `(t,)`.
        max_new_tokens: how many tokens to add.
        vocab_size: number of tokens the model knows.
        max_seq_length: the longest sequence it knows; None if there is no limit.
    """
    check_options(options, Options.__annotations__, "generate")
    check_size(max_new_tokens=max_new_tokens)
    prompt = check_tokens(prompt, vocab_size, "prompt")
    padding_mask = check_padding_mask(padding_mask, prompt.shape)
    check_room(prompt, padding_mask, max_new_tokens, max_seq_length)
    end_tokens = check_ids("end_token", end_token, vocab_size)
    pad = check_ids("pad_token", options.get("pad_token"), vocab_size)
    batch_size, t = (1, *prompt.shape)[-2:]
    sampling = temperature, top_k, top_p, options.get("min_p"), options.get("typical_p")
    if key is None:
        check_greedy(*sampling)
    plan = Plan(
        start=jnp.asarray(np.int32(t)),
        limit=jnp.asarray(np.int32(t + max_new_tokens)),
        keys=row_keys(key, batch_size),
        warper=Warper() if key is None else make_warper(batch_size, *sampling),
        end_tokens=jnp.asarray(end_tokens),
        pad_token=jnp.asarray(np.int32([*pad, *end_tokens, 0][0])),
    )
    tokens, real, slots = pad_to_bucket(prompt, padding_mask, max_new_tokens, max_seq_length)
    tokens, failed = run(step, plan, tokens, real, slots)
    return join(prompt, check_finite(tokens, failed), t, max_new_tokens)


def generate_from_source(
    make_step: Callable[..., Any],
    src: Tokens,
    max_length: int,
    start_token: int,
    src_padding_mask: ArrayLike | None,
    *,
    src_vocab_size: int,
    vocab_size: int,
    **options: Any,
) -> Int[Array, "*b t"]:
    """Target sequences for a source: `generate` with the start token as the prompt."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(
            "max_length must be an integer of at least 2, the start token and one more, got "
            f"{max_length!r}."
        )
    src = check_tokens(src, src_vocab_size, "src")
    mask = check_padding_mask(src_padding_mask, src.shape, "src_padding_mask")
    (start,) = check_ids("start_token", start_token, vocab_size)
    step = make_step(*(x if x is None or x.ndim == 2 else x[None] for x in (src, mask)))
    prompt = jnp.asarray(np.full((*src.shape[:-1], 1), start))
    return generate(step, prompt, max_length - 1, vocab_size=vocab_size, **options)


def check_greedy(temperature: ArrayLike, *others: ArrayLike | None) -> None:
    """Raise if an option of sampling is given where nothing is sampled."""
    names = "top_k", "top_p", "min_p", "typical_p"
    given = [name for name, value in zip(names, others, strict=True) if value is not None]
    if not (isinstance(temperature, int | float) and temperature == 1.0):
        given.insert(0, "temperature")
    if given:
        raise ValueError(
            f"{' and '.join(given)} only matter when sampling, got no key, which means greedy "
            "decoding. Pass key=jax.random.key(0) to sample, or leave them out."
        )


def check_finite(tokens: Int[Array, "b s"], failed: Bool[Array, " b"]) -> Int[Array, "b s"]:
    """The tokens, or an error where the model gave logits that are not numbers."""
    message = (
        "the model's logits are NaN, so that there is nothing to choose from. Look for the cause "
        "among its weights with jnp.isfinite, or compute in float32."
    )
    if not is_known(failed):
        return eqx.error_if(tokens, failed.any(), message)
    rows = np.flatnonzero(np.asarray(failed)).tolist()
    if rows:
        raise FloatingPointError(f"in row {rows[0]} of the batch {message}")
    return tokens
