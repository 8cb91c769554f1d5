"""`generate` and `stream` for every model: what the user gave to the compiled loop, and back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformers.cache import SPARE, Cache
from jaxformers.checks import check_size, is_known
from jaxformers.generation import checkpoint_settings
from jaxformers.generation.beams import Beams, best_of, run_beams
from jaxformers.generation.loop import State, advance_stream, run, start_stream
from jaxformers.generation.plan import Plan, make_plan
from jaxformers.generation.prompts import (
    Prompt,
    Tokens,
    bucket,
    check_cache,
    check_ids,
    check_room,
    read_prompt,
    read_source,
    warn_of_unmasked,
)
from jaxformers.generation.sampling import per_row
from jaxformers.generation.speculative import LookupDraft, ModelDraft, run_speculative
from jaxformers.mistakes import special_of, warn_of_length
from jaxformers.origin import Origin, SpecialTokens


class Generation(NamedTuple):
    """What `generate` returns where more than the tokens is asked for.

    Arguments:
        tokens: int32, the prompt and the new tokens.
        log_probs: of each new token under the model itself (before temperature, cuts and
            penalties), 0 after a row's end; shape of the new tokens.
        scores: their sum per row; of beams the score they were ranked by.
        cache: the model's memory of `tokens`, if `return_cache`; a later call can continue it.
        acceptance_rate: with a draft, the share of its guesses that were kept.
        compile_seconds: what XLA spent compiling for this call; 0 if it knew all the shapes.

    Example:
        >>> out = model.generate(prompt, 3, return_scores=True)
        >>> out.tokens.shape, out.log_probs.shape, out.scores.shape
        ((1, 7), (1, 3), (1,))
    """

    tokens: Int[Array, "*b t"]
    log_probs: Float[Array, "*b u"]
    scores: Float[Array, "*b"]
    cache: Cache | None = None
    acceptance_rate: Float[Array, ""] | None = None
    compile_seconds: float | None = None


class Request(NamedTuple):
    """A call of `generate` or `stream`, checked."""

    plan: Plan
    prompt: Prompt
    columns: int  # of the prompt's bucket
    slots: int  # the columns of the prompt's and the budget's bucket
    start: int  # the column of the first new token, and one past that of the last
    stop: int

    @property
    def arrays(self) -> tuple[Array, Array, int]:
        """The prompt in its bucket, which columns are real, and the slots to decode in."""
        return *self.prompt.to_bucket(self.columns), self.slots


def read_request(
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    options: dict[str, Any],
    *,
    vocab_size: int,
    max_seq_length: int | None,
    padding_mask: Any = None,
    origin: Origin | None = None,
) -> Request:
    """The call's arguments, checked and turned into arrays.

    What they do not say of special tokens is as the model's checkpoint, its `origin`, says.
    """
    check_size(max_new_tokens=max_new_tokens)
    max_new_tokens = int(max_new_tokens)
    is_start = isinstance(prompt, Prompt)  # of a target, which begins with a single token
    if not isinstance(prompt, Prompt):
        prompt = read_prompt(prompt, padding_mask, vocab_size)
    longest = check_room(prompt, max_new_tokens, max_seq_length, options.get("cache"))
    batch_size, start = prompt.tokens.shape
    checkpoint_settings.warn_of_neglected(origin, options)
    is_beginning = start == 1 and options.get("cache") is None
    options = checkpoint_settings.complete(origin, options, is_beginning)
    plan = make_plan(batch_size, vocab_size, start, max_new_tokens, options)
    if not is_start:
        warn_of_unmasked(prompt, padding_mask, "prompt", special_in(options, origin, vocab_size))
    if is_known(prompt.real):
        warn_of_length(longest, origin, max_seq_length, "with its new tokens a row may reach")
    columns = bucket(start, max_seq_length)
    slots, stop = columns + bucket(max_new_tokens), start + max_new_tokens
    if max_seq_length is not None:
        slots = max(min(slots, max_seq_length), columns, stop)
    slots += read_draft_length(options)  # guesses may go beyond the last column
    return Request(plan, prompt, columns, slots, start, stop)


def special_in(options: dict[str, Any], origin: Origin | None, vocab_size: int) -> SpecialTokens:
    """The special tokens of a call, whose options are `complete`, and of its model's checkpoint."""
    special = special_of(origin)
    ends, pads = (
        check_ids(name, options.get(name), vocab_size).tolist()
        for name in ("end_token", "pad_token")
    )
    pad = next(iter(pads), None)
    # What a call fills rows with need not be padding where it stands in a prompt.
    filling = () if pad in (None, special.pad_token) else (pad,)
    return special._replace(end_token=(*special.end_token, *ends, *filling), pad_token=pad)


def generate(
    step: Any,
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    **model: Any,
) -> Any:
    """The prompt and what the model continues it with; see the models' own `generate`.

    Arguments:
        step: an adapter from `steps.py`, which drives the model.
        prompt: `(b, t)` or `(t,)`.
        max_new_tokens: how many tokens to add.
        options: see `Options`, and the arguments of the models' `generate`.
        **model: see `read_request`.
    """
    check_cache(step, options.get("cache"))
    request = read_request(prompt, max_new_tokens, options, **model)
    with compiling() as seconds:
        result = decode(step, request, options)
    if options.get("return_scores", False) or options.get("return_cache", False):
        return result._replace(compile_seconds=sum(seconds))
    return result.tokens


def decode(step: Any, request: Request, options: dict[str, Any]) -> Generation:
    """The loop that the options ask for, and what it found."""
    new = request.stop - request.start
    beams = read_beams(options, request.prompt.tokens.shape[0], new)
    if beams is not None:
        return search(step, request, *beams)
    draft, count = read_draft(step, options, request), read_draft_length(options)
    if draft is not None:
        state, rate = run_speculative(step, draft, request.plan, *request.arrays, count)
        return answer(request, request.prompt, state)._replace(acceptance_rate=rate)
    cache = room_for(step, options.get("cache"), request.slots)
    keep = options.get("return_cache", False)
    state = run(step, request.plan, *request.arrays, cache, keep)
    return answer(request, request.prompt, state)._replace(cache=state.cache)


@contextmanager
def compiling() -> Iterator[list[float]]:
    """The seconds that XLA spends compiling within the block, one entry per program."""
    seconds: list[float] = []

    def hear(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def search(step: Any, request: Request, beams: Beams, count: int) -> Generation:
    """What beam search finds, the `count` best for each row."""
    ended, failed = run_beams(step, request.plan, beams, *request.arrays)
    best, prompt = best_of(ended, count), request.prompt.repeat(count)
    result = answer(request, prompt, Found(best.tokens, best.log_probs, failed))
    return result._replace(scores=prompt.place(best.scores))


class Found(NamedTuple):
    """What `answer` needs of a loop's state."""

    tokens: Int[Array, "b s"]
    log_probs: Float[Array, "b s"]
    failed: Bool[Array, " r"]


def answer(request: Request, prompt: Prompt, found: Found | State) -> Generation:
    """What a loop found, in the shape the user gave the prompt in."""
    tokens = check_finite(found.tokens, found.failed)
    log_probs = prompt.cut(found.log_probs, request.start, request.stop)
    return Generation(
        tokens=prompt.join(tokens, request.start, request.stop),
        log_probs=prompt.place(log_probs),
        scores=prompt.place(log_probs.sum(-1)),
    )


# Options whose answer is only known at the end, or that decide several tokens at once.
NOT_STREAMED = {
    *("num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
    *("draft_model", "prompt_lookup", "draft_length", "return_scores", "return_cache", "cache"),
}


def stream(
    step: Any,
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    *,
    options: dict[str, Any],
    **model: Any,
) -> Iterator[Int[Array, "*b"]]:
    """The tokens of `generate` one column at a time, as they come."""
    beyond = NOT_STREAMED & set(options)
    if beyond:
        raise ValueError(
            f"{sorted(beyond)[0]} is not for streaming, which gives tokens as they come. Call "
            "generate, or leave it out."
        )
    request = read_request(prompt, max_new_tokens, options, **model)
    return _columns(step, request)


def _columns(step: Any, request: Request) -> Iterator[Int[Array, "*b"]]:
    state = start_stream(step, request.plan, *request.arrays)
    for column in range(request.start, request.stop):
        check_finite(state.tokens, state.failed)
        newest = request.prompt.cut(state.tokens, column, column + 1)
        done = bool(state.done.all())
        yield request.prompt.place(newest[:, 0])
        if done or column + 1 == request.stop:
            return
        state = advance_stream((step, request.plan), state)


def gather(
    end_token: Any, temperature: Any, top_k: Any, top_p: Any, key: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """All options by name."""
    named = {"end_token": end_token, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {**options, **named, "key": key}


def generate_from_source(
    make_step: Callable[..., Any],
    src: Tokens,
    max_length: int,
    start_token: int,
    src_padding_mask: Any,
    *,
    src_vocab_size: int,
    max_source_length: int | None,
    vocab_size: int,
    decode: Callable[..., Any] = generate,
    **rest: Any,
) -> Any:
    """`generate` (or `stream`) for a source, with the start token as the prompt."""
    check_size(max_length=max_length)
    if max_length < 2:
        raise ValueError(
            "max_length must be an integer of at least 2, the start token and one more, got "
            f"{max_length!r}."
        )
    for name in ("cache", "return_cache"):
        if rest["options"].get(name):
            raise ValueError(
                f"{name} is for models without an encoder, whose sequences can be continued. "
                "Leave it out."
            )
    origin = rest.get("origin")
    source, arrays = read_source(src, src_padding_mask, src_vocab_size, max_source_length, origin)
    (start,) = check_ids("start_token", [start_token], vocab_size)
    step = make_step(*arrays)
    prompt = source.begin(int(start))
    return decode(step, prompt, max_length - 1, vocab_size=vocab_size, **rest)


def read_beams(
    options: dict[str, Any], batch_size: int, max_new_tokens: int
) -> tuple[Beams, int] | None:
    """How to search and how many sequences to return, or None without beam search."""
    num_beams, count = options.get("num_beams", 1), options.get("num_return_sequences", 1)
    check_size(num_beams=num_beams, num_return_sequences=count)
    if num_beams == 1:
        for name in ("num_return_sequences", "length_penalty", "early_stopping"):
            if name in options:
                raise ValueError(
                    f"{name} is for beam search, got num_beams 1. Pass num_beams=, or leave it out."
                )
        return None
    if count > num_beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams, got {count} and {num_beams}."
        )
    for name in ("cache", "return_cache"):
        if options.get(name):
            raise ValueError(f"{name} does not go with num_beams, got both. Leave one out.")
    early_stopping = options.get("early_stopping", False)
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}.')
    # Scores are divided by a length to this power, which must not leave what float32 holds.
    least, most = (power / np.log(max(max_new_tokens, 2)) for power in (-60, 80))
    range_ = (
        np.float32,
        lambda x: (least <= x) & (x <= most),
        f"a number from {least:.1f} to {most:.1f} where max_new_tokens is {max_new_tokens}",
    )
    penalty = per_row("length_penalty", options.get("length_penalty", 1.0), batch_size, *range_)
    return Beams(jnp.asarray(penalty), num_beams, early_stopping), count


def read_draft_length(options: dict[str, Any]) -> int:
    """How many tokens are guessed at a time, 0 if none are."""
    given = [name for name in ("draft_model", "prompt_lookup") if options.get(name) is not None]
    if len(given) == 2:
        raise ValueError(
            "draft_model and prompt_lookup both guess tokens, got both. Leave one out."
        )
    if not given:
        if "draft_length" in options:
            raise ValueError(
                "draft_length is how many tokens are guessed at a time, got neither draft_model "
                "nor prompt_lookup to guess them. Pass one of these, or leave it out."
            )
        return 0
    for name in ("num_beams", "cache", "return_cache"):
        if options.get(name):
            raise ValueError(f"{name} does not go with {given[0]}, got both. Leave one out.")
    length = options.get("draft_length", 4)
    check_size(draft_length=length)
    if length > SPARE:
        raise ValueError(
            f"draft_length must be at most {SPARE}, got {length}. Longer guesses are hardly ever "
            "right to the end."
        )
    return length


def read_draft(
    step: Any, options: dict[str, Any], request: Request
) -> ModelDraft | LookupDraft | None:
    """Who guesses tokens, or None for plain decoding."""
    if not read_draft_length(options):
        return None
    model = options.get("draft_model")
    if model is None:
        check_size(prompt_lookup=options["prompt_lookup"])
        return LookupDraft(options["prompt_lookup"])
    draft = step.drive(model)
    if draft.vocab_size != step.vocab_size:
        raise ValueError(
            f"draft_model must have the model's vocabulary of {step.vocab_size} tokens, got one "
            f"of {draft.vocab_size}."
        )
    check_room(request.prompt, request.stop - request.start, model.max_seq_length)
    return ModelDraft(draft)


def room_for(step: Any, cache: Any, slots: int) -> Any:
    """The cache with room for `slots` more columns; None stays None."""
    if cache is None:
        return None
    free = cache.slots - int(cache.length) if is_known(cache.length) else 0
    return cache if free >= slots else step.resize(cache, bucket(cache.slots + slots - free))


def check_finite(tokens: Int[Array, "b s"], failed: Bool[Array, " r"]) -> Int[Array, "b s"]:
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
