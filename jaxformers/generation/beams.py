"""Beam search: several continuations of each row side by side, the best of which are kept.

The bookkeeping is that of Hugging Face transformers (`_beam_search` in `generation/utils.py`), so
that both find the same sequences. Beams are rows of the model's batch, those of a row together.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformers.generation.loop import NAN, NONE_LEFT, prefill, repeat_while
from jaxformers.generation.plan import Plan
from jaxformers.generation.prompts import Source

# What keeps a sequence out of a choice of the best: far below any sum of log-probabilities, also
# of logits divided by a low temperature, and below any score that a length penalty makes of one.
OUT = -1.0e30


class Beams(eqx.Module):
    """Settings of a beam search; `Options` explains the names."""

    length_penalty: Float[Array, " b"]
    num_beams: int = eqx.field(static=True)
    early_stopping: bool | str = eqx.field(static=True)


class Hypotheses(NamedTuple):
    """Sequences of each row; k of them in the state, more among the candidates of a step."""

    tokens: Int[Array, "b k s"]
    log_probs: Float[Array, "b k s"]  # of each token under the model itself
    scores: Float[Array, "b k"]  # sums; of finished ones divided by length ** length_penalty
    finished: Bool[Array, "b k"]
    stopped: Bool[Array, "b k"]  # finished by an end token or a stop sequence

    def take(self, index: Int[Array, "b j"]) -> "Hypotheses":
        """Returns the ones that `index` names, in each row."""

        def gather(x):
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

        return Hypotheses(*map(gather, self))

    def best(self, count: int) -> Int[Array, "b {count}"]:
        """Returns which have the highest scores, best first."""
        return lax.top_k(self.scores, count)[1].astype(jnp.int32)


class BeamState(NamedTuple):
    """The state that the loop carries."""

    running: Hypotheses
    ended: Hypotheses
    first: Int[Array, " bk"]
    length: Int[Array, ""]
    hopeful: Bool[Array, " b"]  # whether a running beam could still beat those that have ended
    stuck: Bool[Array, ""]  # whether every candidate of the last step ended
    failed: Int[Array, " b"]
    processing: tuple[Any, ...]  # the states of the processors
    cache: Any


@eqx.filter_jit
def run_beams(
    model: Any,
    plan: Plan,
    beams: Beams,
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    slots: int,
    source: Source | None = None,
) -> tuple[Hypotheses, Int[Array, " b"]]:
    """Returns the ended hypotheses of each row, best first, and why rows failed."""
    k = beams.num_beams
    read, logits = prefill(model, plan, tokens, real, slots, source)
    start = Hypotheses(
        tokens=jnp.repeat(read.tokens[:, None], k, axis=1),
        log_probs=jnp.repeat(read.log_probs[:, None], k, axis=1),
        # All beams are the same at first, so only the first may be continued.
        scores=jnp.where(jnp.arange(k) == 0, 0.0, OUT)
        + jnp.zeros((tokens.shape[0], 1), jnp.float32),
        finished=jnp.zeros((tokens.shape[0], k), jnp.bool_),
        stopped=jnp.zeros((tokens.shape[0], k), jnp.bool_),
    )
    state = BeamState(
        running=start,
        ended=start._replace(scores=jnp.full_like(start.scores, OUT)),
        first=jnp.repeat(read.first, k),
        length=read.length,
        hopeful=~read.done,
        stuck=jnp.zeros((), jnp.bool_),
        failed=read.failed,
        processing=jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), read.processing),
        cache=read.cache.repeat(k),
    )
    plan = plan.repeat(k)

    def unfinished(state: BeamState) -> Bool[Array, ""]:
        # Rows without hope, such as those that were added to the call, need not be full.
        full = (state.ended.finished.all(-1) | ~state.hopeful).all()
        full = full & (beams.early_stopping is True)
        return state.hopeful.any() & ~state.stuck & ~full & (state.failed == 0).all()

    def advance(state: BeamState) -> BeamState:
        flat = state.running.tokens.reshape(-1, slots)
        last = lax.dynamic_slice_in_dim(flat, state.length - 1, 1, axis=1)
        real = jnp.ones(last.shape, jnp.bool_)
        hidden, cache = model.forward(last, padding_mask=real, cache=state.cache)
        return expand(plan, beams, state._replace(cache=cache), model.logits_of(hidden)[:, 0])

    state = expand(plan, beams, state, jnp.repeat(logits, k, axis=0))
    state = repeat_while(unfinished, advance, state)
    none_left = ~read.done & ~state.ended.finished.any(-1) & (state.failed == 0).all()
    return state.ended, jnp.where(none_left, NONE_LEFT, state.failed)


def expand(plan: Plan, beams: Beams, state: BeamState, logits: Float[Array, "bk v"]) -> BeamState:
    """Returns the state with one more column: the best go on, those that end are ranked."""
    k = beams.num_beams
    failed = jnp.isnan(logits).any(-1).reshape(-1, k).any(-1)
    processing, candidates, parents = continuations(plan, k, state, logits)
    length = state.length + 1
    flat = candidates.tokens.reshape(-1, candidates.tokens.shape[-1])
    first = jnp.repeat(state.first[::k], candidates.tokens.shape[1])
    beams_of = parents + k * jnp.arange(len(failed))[:, None]
    before = jax.tree.map(lambda x: x[beams_of.reshape(-1)], processing)
    stopped = plan.ends(before, plan.history(flat, first, length)).reshape(parents.shape)
    ends = stopped | (length >= plan.limit)

    candidates = candidates._replace(stopped=stopped)
    running = candidates._replace(scores=candidates.scores + ends.astype(jnp.float32) * OUT)
    going_on = running.best(k)
    running = running.take(going_on)
    ended = rank(plan, beams, state, candidates, ends)
    rows = jnp.take_along_axis(beams_of, going_on, axis=1).reshape(-1)
    return state._replace(
        running=running,
        ended=ended,
        length=length,
        hopeful=state.hopeful & may_improve(plan, beams, running, ended, length),
        stuck=(ends.all(-1) | ~state.hopeful).all(),
        failed=jnp.where(failed, NAN, state.failed),
        processing=jax.tree.map(lambda x: x[rows], processing),
        cache=state.cache.take(rows),
    )


def continuations(
    plan: Plan, k: int, state: BeamState, logits: Float[Array, "bk v"]
) -> tuple[tuple[Any, ...], Hypotheses, Int[Array, "b j"]]:
    """Returns the processors' states, the candidates, and the beams that each of these extends.

    Candidates have the best sums of log-probabilities, or are draws by them. There are enough of
    them that k do not end, however many end.
    """
    old = state.running
    slots, v = old.tokens.shape[-1], logits.shape[-1]
    count = min(max(2, 1 + plan.end_tokens.shape[0]) * k, k * v)
    log_probs = jax.nn.log_softmax(logits)
    history = plan.history(old.tokens.reshape(-1, slots), state.first, state.length)
    processing, warped = plan.warp(state.processing, log_probs, history)
    sums = warped.reshape(-1, k, v) + old.scores[:, :, None]
    sums = noisy = sums.reshape(-1, k * v)
    if plan.keys is not None:  # the highest sums with Gumbel noise are draws without replacement
        index = state.length - plan.start
        keys = jax.vmap(jax.random.fold_in, (0, None))(plan.keys, index)
        noisy = sums + jax.vmap(lambda key: jax.random.gumbel(key, (k * v,)))(keys)
    chosen = lax.top_k(noisy, count)[1]
    parents, token = chosen // v, chosen % v
    chosen_log_probs = jnp.take_along_axis(log_probs.reshape(-1, k * v), chosen, axis=1)
    new = old.take(parents)
    tokens, log_probs = (
        lax.dynamic_update_slice_in_dim(x, y[..., None], state.length, axis=2)
        for x, y in ((new.tokens, token.astype(jnp.int32)), (new.log_probs, chosen_log_probs))
    )
    scores = jnp.take_along_axis(sums, chosen, axis=1)
    return processing, Hypotheses(tokens, log_probs, scores, new.finished, new.stopped), parents


def rank(
    plan: Plan, beams: Beams, state: BeamState, candidates: Hypotheses, ends: Bool[Array, "b j"]
) -> Hypotheses:
    """Returns the k best of the hypotheses that had ended and those that do now."""
    k = beams.num_beams
    # Candidates beyond the first k are only spare ones to go on with.
    ends = ends & (jnp.arange(ends.shape[1]) < k)
    # Where few tokens are legal, the rest of the candidates are none.
    ends = ends & (candidates.scores > OUT / 2)
    new_tokens = (state.length + 1 - plan.start).astype(jnp.float32)
    scores = candidates.scores / new_tokens ** beams.length_penalty[:, None]
    full = state.ended.finished.all(-1, keepdims=True) & (beams.early_stopping is True)
    for out in (full, ~state.hopeful[:, None], ~ends):
        scores = scores + out.astype(jnp.float32) * OUT
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1),
        state.ended,
        candidates._replace(scores=scores, finished=ends),
    )
    return both.take(both.best(k))


def may_improve(
    plan: Plan, beams: Beams, running: Hypotheses, ended: Hypotheses, length: Int[Array, ""]
) -> Bool[Array, " b"]:
    """Returns whether the best running beam could still beat the worst ended one."""
    new = length - plan.start
    if beams.early_stopping == "never":  # a long sequence may gain by its length
        new = jnp.where(beams.length_penalty > 0, plan.limit - plan.start, new)
    best = running.scores[:, 0] / new.astype(jnp.float32) ** beams.length_penalty
    worst = ended.scores.min(-1, keepdims=True)
    return (best[:, None] > jnp.where(ended.finished, worst, OUT)).any(-1)


def best_of(hypotheses: Hypotheses, count: int) -> Hypotheses:
    """Returns the `count` best of each row, one below the other."""
    return Hypotheses(*(x[:, :count].reshape(-1, *x.shape[2:]) for x in hypotheses))
