"""Tokens that have to come, and rows that must not end yet.

The formulas are those of transformers (`generation/logits_process.py`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformers.generation.processors.processor import (
    History,
    Processor,
    ban,
    check_known_ids,
    mark,
)
from jaxformers.generation.sampling import NOT_NEGATIVE, one_or_more


class MinNewTokens(Processor):
    """Bans the end tokens until a row has so many new tokens; stop sequences do not count before.

    As `MinNewTokensLengthLogitsProcessor`.

    Arguments:
        least: at least 0, one number or one per row.

    Raises:
        ValueError: if it is less.

    Example:
        >>> out = model.generate(prompt, 3, end_token=5, processors=[MinNewTokens(2)])
    """

    least: Int[Array, ""] | Int[Array, " b"]

    def __init__(self, least):
        self.least = one_or_more("least", least, *NOT_NEGATIVE)

    def may_end(self, state: None, history: History) -> Bool[Array, " r"]:
        return history.new_count >= history.each_row(self.least)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        if history.end_tokens is None:
            return None, logits
        early = ~self.may_end(None, history)[:, None]
        early = jnp.broadcast_to(early, (early.shape[0], history.end_tokens.shape[0]))
        return None, ban(mark(history.end_tokens, early, logits.shape[1]), logits)


class ForcedFirstToken(Processor):
    """Makes a token the first new one, as `ForcedBOSTokenLogitsProcessor` after a start token.

    Arguments:
        token: an id, one or one per row.

    Example:
        >>> model.generate(prompt, 3, processors=[ForcedFirstToken(5)])[0, prompt.shape[1]]
        Array(5, dtype=int32)
    """

    token: Int[Array, ""] | Int[Array, " b"]

    def __init__(self, token):
        self.token = one_or_more("token", token, *NOT_NEGATIVE)

    def check(self, batch_size: int, vocab_size: int) -> None:
        check_known_ids("token of ForcedFirstToken", self.token, vocab_size)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        return None, force(logits, history.each_row(self.token), history.new_count == 0)


class ForcedLastToken(Processor):
    """Makes a token the one of the last column, as `ForcedEOSTokenLogitsProcessor`.

    Arguments:
        token: an id, one or one per row.

    Example:
        >>> model.generate(prompt, 3, processors=[ForcedLastToken(5)])[0, -1]
        Array(5, dtype=int32)
    """

    token: Int[Array, ""] | Int[Array, " b"]

    def __init__(self, token):
        self.token = one_or_more("token", token, *NOT_NEGATIVE)

    def check(self, batch_size: int, vocab_size: int) -> None:
        check_known_ids("token of ForcedLastToken", self.token, vocab_size)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        if history.limit is None:
            return None, logits
        token, now = history.each_row(self.token), history.length == history.limit - 1
        return None, force(logits, token, now)


def force(
    logits: Float[Array, "r v"], token: Int[Array, " r"], now: Bool[Array, ""]
) -> Float[Array, "r v"]:
    """Returns 0 for `token` and -inf for all others, if it is time."""
    forced = jnp.where(jnp.arange(logits.shape[1]) == token[:, None], 0.0, -jnp.inf)
    return jnp.where(now, forced.astype(logits.dtype), logits)
