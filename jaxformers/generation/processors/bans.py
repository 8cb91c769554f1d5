"""Tokens that do not come: repeated n-grams, words, and single tokens.

The formulas are those of transformers (`generation/logits_process.py`).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformers.checks import is_known
from jaxformers.generation.processors.processor import (
    History,
    Processor,
    ban,
    check_known_ids,
    mark,
    sequences,
)
from jaxformers.generation.prompts import check_ids, put
from jaxformers.generation.sampling import COUNT, one_or_more


class NoRepeatNgram(Processor):
    """Bans tokens that would complete a sequence of `size` tokens which the row has already.

    Paulus et al. 2017, section 2.5, for any size, as in `NoRepeatNGramLogitsProcessor`.

    Arguments:
        size: at least 1, one number or one per row.

    Raises:
        ValueError: if it is less.

    Example:
        >>> out = model.generate(prompt, 3, processors=[NoRepeatNgram(3)])
    """

    size: Int[Array, ""] | Int[Array, " b"]

    def __init__(self, size):
        self.size = one_or_more("size", size, *COUNT)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        size = history.each_row(self.size)
        return None, ban(_repeated(history, size, logits.shape[1]), logits)


def _repeated(history: History, size: Int[Array, " r"], vocab_size: int) -> Bool[Array, "r v"]:
    """Returns the tokens that would complete an n-gram which the row has already."""
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


class BadWords(Processor):
    """Bans the last token of a word where the row ends with the tokens before it.

    As `NoBadWordsLogitsProcessor`.

    Arguments:
        words: token sequences, such as [[5], [7, 8]].

    Raises:
        ValueError: if they are no list of sequences.

    Example:
        >>> out = model.generate(prompt, 3, processors=[BadWords([[5], [7, 8]])])
    """

    words: Int[Array, "p w"]

    def __init__(self, words):
        self.words = words if hasattr(words, "ndim") else sequences("words", words)
        if is_known(self.words):
            array = np.asarray(self.words)
            if array.ndim != 2 or not array.size or (array[:, -1] < 0).any():
                raise ValueError(
                    "words as an array must have one sequence in each row, filled with -1 on the "
                    f"left, got {array.tolist()!r:.80}. Pass a list such as [[5], [7, 8]]."
                )

    def check(self, batch_size: int, vocab_size: int) -> None:
        check_known_ids("words of BadWords", self.words, vocab_size)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        begun = history.ends_with(self.words[:, :-1])
        return None, ban(mark(self.words[:, -1], begun, logits.shape[1]), logits)


class SuppressTokens(Processor):
    """Bans tokens at all places, as `SuppressTokensLogitsProcessor`.

    Arguments:
        tokens: their ids.

    Raises:
        ValueError: if they are no ids; in a call of `generate` if they are all that there are.

    Example:
        >>> out = model.generate(prompt, 3, processors=[SuppressTokens([5, 7])])
    """

    tokens: Int[Array, " p"]

    def __init__(self, tokens):
        self.tokens = _ids(tokens)

    def check(self, batch_size: int, vocab_size: int) -> None:
        _check_choice("tokens of SuppressTokens", self.tokens, vocab_size)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        return None, ban(_among(self.tokens, logits.shape[1]), logits)


class SuppressFirstTokens(Processor):
    """Bans tokens at one place alone, as `SuppressTokensAtBeginLogitsProcessor`.

    Arguments:
        tokens: their ids.
        index: of the new token for which they are banned, 0 for the first.

    Raises:
        ValueError: if they are no ids; in a call of `generate` if they are all that there are.

    Example:
        >>> out = model.generate(prompt, 3, processors=[SuppressFirstTokens([5, 7])])
    """

    tokens: Int[Array, " p"]
    index: Int[Array, ""]

    def __init__(self, tokens, index=0):
        if is_known(index):
            array = np.asarray(index)
            if array.ndim or array.dtype.kind not in "iu" or array < 0:
                raise ValueError(f"index must be an integer of at least 0, got {index!r}.")
        self.tokens, self.index = _ids(tokens), put(index) if is_known(index) else index

    def check(self, batch_size: int, vocab_size: int) -> None:
        _check_choice("tokens of SuppressFirstTokens", self.tokens, vocab_size)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        now = history.new_count == self.index
        return None, ban(now & _among(self.tokens, logits.shape[1]), logits)


def _ids(tokens) -> Int[Array, " p"]:
    return tokens if not is_known(tokens) else put(check_ids("tokens", tokens))


def _among(tokens: Int[Array, " p"], vocab_size: int) -> Bool[Array, "1 v"]:
    return jnp.zeros((1, vocab_size), jnp.bool_).at[:, tokens].set(True)


def _check_choice(name: str, tokens: Int[Array, " p"], vocab_size: int) -> None:
    """Raises unless tokens are of the vocabulary, and leave one of it."""
    check_known_ids(name, tokens, vocab_size)
    if is_known(tokens) and len(np.unique(np.asarray(tokens))) == vocab_size:
        raise ValueError(f"{name} must leave a token to choose, got all {vocab_size} of them.")
