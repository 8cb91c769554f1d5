"""A request for one row of the decoding engine, and what the engine tells of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

MOST_TOP = 20  # the most alternatives of a token whose log-probabilities may be asked for


@dataclass(frozen=True)
class Sampling:
    """The rules by which the tokens of a row are chosen; the defaults sample from the model itself.

    Arguments:
        temperature: at least 0; 0 is greedy.
        top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: as in
            `generate`; a `top_k` of 0 is no limit.
        seed, index: the row's key is `jax.random.fold_in(jax.random.key(seed), index)`, which is
            that of row `index` in a call of `generate` with `key=jax.random.key(seed)`.
        logit_bias: numbers that are added to the logits of some tokens.
        top: of so many of the likeliest tokens the log-probabilities are told, at most `MOST_TOP`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    index: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top: int = 0


class Token(NamedTuple):
    """A new token of a row.

    Arguments:
        id: of the token.
        log_prob: its log-probability under the model itself.
        top: the likeliest tokens in its place with theirs, the likeliest first; as many as asked.
    """

    id: int
    log_prob: float
    top: list[tuple[int, float]]


@runtime_checkable
class Follower(Protocol):
    """What says which tokens may come next, such as that of a constraint."""

    def legal(self, tokens: tuple[int, ...]) -> Bool[np.ndarray, " v"]:
        """Returns which tokens may come after the new tokens so far."""
        ...


class Job:
    """A request for one row.

    The engine calls `receive` and `end` in its own thread. Neither may wait for anything.

    Arguments:
        prompt: the ids that the model reads before the first new token, at least one. For an
            encoder-decoder they begin with the start token.
        max_new_tokens: the row ends with so many new tokens.
        sampling: how tokens are chosen.
        source: the ids that an encoder reads; None for a model without one.
        follower: what says which tokens may come; None allows all.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        source: Sequence[int] | None = None,
        follower: Follower | None = None,
    ):
        self.prompt, self.max_new_tokens, self.sampling = list(prompt), max_new_tokens, sampling
        self.source = None if source is None else list(source)
        self.follower = follower
        self.is_cancelled = False

    def cancel(self) -> None:
        """Gives the row up; any thread may call it, any number of times, at any time."""
        self.is_cancelled = True

    def receive(self, token: Token) -> bool:
        """Takes the next token, and returns whether the row goes on after it."""
        raise NotImplementedError

    def end(self, error: BaseException | None = None) -> None:
        """Hears that no more tokens come; it is called once for each job that was taken.

        `error` is what went wrong, None after a last token, the limit, or a `cancel`.
        """


class QueueFull(Exception):
    """As many jobs wait as may."""


class Closed(Exception):
    """The engine takes no more jobs, since it is about to end."""
