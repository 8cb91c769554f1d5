"""`generate` for both shapes of models: a user's call to the loop, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformers.cache import Cache
from jaxformers.checks import check_usable, is_known
from jaxformers.generation.beams import Beams, best_of, run_beams
from jaxformers.generation.loop import NAN, NONE_LEFT, TOO_FEW, State, run
from jaxformers.generation.prompts import Prompt, Tokens
from jaxformers.generation.request import (
    Request,
    read_beams,
    read_draft,
    read_draft_length,
    read_request,
    room_for,
)
from jaxformers.generation.speculative import run_speculative
from jaxformers.output import check_output
from jaxformers.sharding.hosts import to_numpy


class Generation(NamedTuple):
    """The result of `generate` where more than the tokens is asked for.

    Arguments:
        tokens: int32, the prompt and the new tokens.
        log_probs: of each new token under the model itself (before temperature, cuts and
            penalties), 0 after a row's end; shape of the new tokens.
        scores: their sum per row; of beams the score they were ranked by.
        finished: whether each row was ended by an end token or a stop sequence; otherwise it has
            reached `max_new_tokens`. `finish_reason` says the same in words.
        cache: the model's memory of `tokens` (and of what the call continued), if `return_cache`;
            a later call can continue it.
        acceptance_rate: with a draft, the share of its guesses that were kept.
        compile_seconds: how long XLA compiled for this call; 0 if it knew all the shapes.

    Example:
        >>> out = model.generate(prompt, 3, return_scores=True)
        >>> out.tokens.shape, out.log_probs.shape, out.scores.shape
        ((1, 7), (1, 3), (1,))
        >>> out.finish_reason
        ['length']
    """

    tokens: Int[Array, "*b t"]
    log_probs: Float[Array, "*b u"]
    scores: Float[Array, "*b"]
    finished: Bool[Array, "*b"]
    cache: Cache | None = None
    acceptance_rate: Float[Array, ""] | None = None
    compile_seconds: float | None = None

    @property
    def finish_reason(self) -> Any:
        """Why each row ended: "stop", an end token or a stop sequence, or "length".

        It is a list of these, or one of them for a prompt without a batch axis.
        """
        return np.where(np.asarray(self.finished), "stop", "length").tolist()


def generate(
    model: Any,
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    options: dict[str, Any],
    padding_mask: Any = None,
    source: Prompt | None = None,
) -> Any:
    """Returns the prompt and the tokens that continue it; see the models' own `generate`.

    Arguments:
        model: a `TransformerLM` or a `Transformer`.
        prompt: `(b, t)` or `(t,)`; of a target it has been read already.
        max_new_tokens: how many tokens to add.
        options: see `Options`, and the arguments of the models' `generate`.
        padding_mask: shape of the prompt, True where a token is real.
        source: the encoder's tokens, for a model that has one and no cache that holds them.
    """
    check_usable(model=model)
    check_output(model)
    request = read_request(model, prompt, max_new_tokens, options, padding_mask, source)
    with compiling() as seconds:
        result = decode(model, request, options)
    if options.get("return_scores", False) or options.get("return_cache", False):
        return result._replace(compile_seconds=sum(seconds))
    return result.tokens


def decode(model: Any, request: Request, options: dict[str, Any]) -> Generation:
    """Runs the loop that the options ask for, and returns its result."""
    new = request.stop - request.start
    beams = read_beams(options, request.prompt.tokens.shape[0], request.rows, new)
    if beams is not None:
        return search(model, request, *beams)
    draft, count = read_draft(model, options, request), read_draft_length(options)
    cache = room_for(options.get("cache"), request.slots)
    keep, arrays, rate = options.get("return_cache", False), request.arrays, None
    if draft is None:
        state = run(model, request.plan, *arrays, cache, keep)
    else:
        state, rate = run_speculative(model, draft, request.plan, *arrays, count, cache, keep)
    result = answer(request, request.prompt, state)
    return result._replace(cache=state.cache, acceptance_rate=rate)


@contextmanager
def compiling() -> Iterator[list[float]]:
    """Gives the seconds that XLA spends compiling within the block, one entry per program."""
    seconds: list[float] = []

    def hear(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def search(model: Any, request: Request, beams: Beams, count: int) -> Generation:
    """Runs beam search, and returns the `count` best sequences for each row."""
    ended, failed = run_beams(model, request.plan, beams, *request.arrays)
    if is_known(failed):  # in NumPy, which compiles nothing
        finished, reasons = to_numpy(ended.finished), to_numpy(failed)
        too_few = finished[:, 0] & ~finished[:, count - 1] & (reasons == 0)
        failed = jax.device_put(np.where(too_few, np.int32(TOO_FEW), reasons))
    best, prompt = best_of(ended, count), request.prompt.repeat(count)
    result = answer(request, prompt, Found(best.tokens, best.log_probs, best.stopped, failed))
    return result._replace(scores=prompt.place(prompt.own(best.scores)))


class Found(NamedTuple):
    """The part of a loop's state that `answer` needs."""

    tokens: Int[Array, "b s"]
    log_probs: Float[Array, "b s"]
    done: Bool[Array, " b"]
    failed: Int[Array, " r"]


def answer(request: Request, prompt: Prompt, found: Found | State) -> Generation:
    """Returns the result of a loop in the shape of the user's prompt."""
    tokens = check_failed(found.tokens, found.failed)
    log_probs = prompt.cut(found.log_probs, request.start, request.stop)
    return Generation(
        tokens=prompt.join(tokens, request.start, request.stop),
        log_probs=prompt.place(log_probs),
        scores=prompt.place(log_probs.sum(-1)),
        finished=prompt.place(prompt.own(found.done)),
    )


FAILURES = {
    NAN: "the model's logits are NaN, so that there is nothing to choose from. Look for the cause "
    "among its weights with jnp.isfinite, or compute in float32.",
    NONE_LEFT: "no token is left to choose: options such as bad_words, min_new_tokens or a forced "
    "token ban all that the constraint or a processor allows. Leave one of them out.",
    TOO_FEW: "the beams found fewer sequences than num_return_sequences that the constraint "
    "allows. Ask for fewer, or loosen the constraint.",
}


def check_failed(tokens: Int[Array, "b s"], failed: Int[Array, " r"]) -> Int[Array, "b s"]:
    """Returns the tokens, or raises if a row failed.

    Arguments:
        tokens: of a loop.
        failed: for each row 0, or a key of `FAILURES`.
    """
    if not is_known(failed):
        for reason, message in FAILURES.items():
            tokens = eqx.error_if(tokens, (failed == reason).any(), message)
        return tokens
    reasons = to_numpy(failed)
    rows = np.flatnonzero(reasons).tolist()
    if rows:
        raise failure(int(reasons[rows[0]]), f"in row {rows[0]} of the batch ")
    return tokens


def failure(reason: int, where: str = "") -> Exception:
    """Returns the error for a key of `FAILURES`; `where` is the beginning of its message."""
    kind = FloatingPointError if reason == NAN else ValueError
    return kind(where + FAILURES[reason])
