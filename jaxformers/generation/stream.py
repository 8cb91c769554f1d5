"""`stream` for both shapes of models: the tokens of `generate` one column at a time."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxformers.cache import Cache
from jaxformers.checks import check_usable
from jaxformers.generation.generate import check_failed
from jaxformers.generation.loop import State, advance, copied, emit, feed, prefill
from jaxformers.generation.plan import Plan
from jaxformers.generation.prompts import Prompt, Source, Tokens, put
from jaxformers.generation.request import Request, read_request, room_for
from jaxformers.output import check_output

# Options whose answer is only known at the end, or that decide several tokens at once.
NOT_STREAMED = {
    *("num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
    *("draft_model", "prompt_lookup", "draft_length", "return_scores", "return_cache"),
}


class TokenStream(Iterator[Int[Array, "*b"]]):
    """The new tokens of a call of `stream`, which are computed as they are asked for.

    It is an iterator of int32 arrays, `(b,)`, or `()` for a prompt without a batch axis; it ends
    when all rows have ended. It may be left at any time: `cache` is the memory of the tokens that
    it has given until then.

    Example:
        >>> stream = model.stream(prompt, 8)
        >>> first, second = next(stream), next(stream)
        >>> stream.close()
        >>> more = model.stream(jnp.array([[7, 8]]), 3, cache=stream.cache)
        >>> len(list(more)), more.finish_reason
        (3, ['length'])
    """

    def __init__(self, model: Any, request: Request, cache: Cache | None, constraint: Any = None):
        self._constraint = constraint  # which the host follows as long as there is a stream
        begin = 0 if cache is None else int(cache.columns)
        start, stop = (begin + column for column in (request.start, request.stop))
        self._model, self._request, self._given = model, request, cache
        self._plan = dataclasses.replace(request.plan, start=put(start), limit=put(stop))
        self._next, self._stop = start, stop
        self._count, self._closed, self._lock = 0, False, threading.Lock()
        self._state: State | None = None
        self._cache: Cache | None = None

    def __next__(self) -> Int[Array, "*b"]:
        with self._lock:
            if self._closed:
                raise StopIteration
            try:
                return self._newest()
            except BaseException:  # an interrupt too: the state may be lost
                self.close()
                raise

    def _newest(self) -> Int[Array, "*b"]:
        """Returns one more column."""
        state, prompt = self._begun(), self._request.prompt
        if self._count:
            self._state = state = advance_stream((self._model, self._plan), state)
        check_failed(state.tokens, state.failed)
        newest = prompt.cut(state.tokens, self._next, self._next + 1)
        self._count, self._next, self._cache = self._count + 1, self._next + 1, None
        self._closed = bool(state.done.all()) or self._next == self._stop
        return prompt.place(newest[:, 0])

    def close(self) -> None:
        """Ends the stream; no more tokens come."""
        self._closed = True

    @property
    def cache(self) -> Cache:
        """The model's memory of the prompt and of all tokens given so far, for a later call.

        Reading it costs one call of the model and a copy of the memory.

        Raises:
            ValueError: if an interrupt came while the memory was given on to the next token.
        """
        if self._cache is None:
            state, rows = self._begun(), len(self._request.prompt.tokens)
            if state.tokens.is_deleted():
                raise ValueError(
                    "the stream was interrupted while it computed a token, and its memory is lost. "
                    "Read the tokens anew."
                )
            # The token before the first call, or before an interrupt, has not been given.
            excess = put(int(state.length) - self._next)
            self._cache = hold((self._model, self._plan), state, excess, rows)
        return self._cache

    @property
    def finish_reason(self) -> Any:
        """Why each row ended: "stop", "length" or, of a row that goes on, None.

        "stop" is an end token or a stop sequence, "length" the last of `max_new_tokens`. It is a
        list of these, or one of them for a prompt without a batch axis.
        """
        done = np.zeros(len(self._request.prompt.tokens), np.bool_)
        if self._state is not None and self._count:
            done = self._request.prompt.own(self._state.done)
        otherwise = "length" if self._next == self._stop else None
        reasons = ["stop" if row else otherwise for row in done]
        return reasons if self._request.prompt.batched else reasons[0]

    def _begun(self) -> State:
        """Returns the state; reads the prompt if that is still to be done."""
        if self._state is None:
            arrays = self._request.arrays
            self._state = start_stream(self._model, self._plan, *arrays, self._given)
            self._given = None
        return self._state


def stream(
    model: Any,
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    options: dict[str, Any],
    padding_mask: Any = None,
    source: Prompt | None = None,
) -> TokenStream:
    """Returns the tokens of `generate` one column at a time, as they come."""
    check_usable(model=model)
    check_output(model)
    beyond = sorted(NOT_STREAMED & set(options))
    if beyond:
        advice = "Call generate, or leave it out."
        if beyond == ["return_cache"]:
            advice = "Leave it out: a stream has its cache as an attribute."
        raise ValueError(
            f"{beyond[0]} is not for streaming, which gives tokens as they come. {advice}"
        )
    request = read_request(model, prompt, max_new_tokens, options, padding_mask, source)
    cache = room_for(options.get("cache"), request.slots)
    return TokenStream(model, request, cache, options.get("constraint"))


@eqx.filter_jit
def start_stream(
    model: Any,
    plan: Plan,
    tokens: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    slots: int,
    source: Source | None = None,
    cache: Cache | None = None,
) -> State:
    """Returns the state after the first new token, for decoding one call at a time.

    Arguments are those of `run`, but for the plan, whose columns are those after the cache.
    """
    # The state is donated, so none of it may be an array of the caller, such as a source's keys.
    return copied(emit(plan, *prefill(model, plan, tokens, real, slots, source, cache)))


@eqx.filter_jit(donate="all-except-first")
def advance_stream(fixed: tuple[Any, Plan], state: State) -> State:
    """Returns the state after one more token, in the memory of the old one."""
    return advance(*fixed, state)


@eqx.filter_jit
def hold(fixed: tuple[Any, Plan], state: State, excess: Int[Array, ""], rows: int) -> Cache:
    """Returns the cache of the first `rows` of a state, but for the last `excess` columns."""
    cache = feed(*fixed, state)[0].cache.rewind(excess)
    return copied(jax.tree.map(lambda x: x[:rows] if x.ndim else x, cache))
