"""The options of `generate` that are short forms of processors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.generation import processors
from jaxformers.generation.processors import Processor
from jaxformers.generation.processors.processor import sequences
from jaxformers.generation.prompts import check_ids, put
from jaxformers.generation.sampling import ANY, COUNT, NOT_NEGATIVE, POSITIVE, per_row


def read_processors(
    batch_size: int, vocab_size: int, end_tokens: np.ndarray, options: dict[str, Any], rows: int
) -> tuple[Processor, ...]:
    """Returns the processors that the options ask for, and those of the call after them.

    Numbers are checked for `batch_size` rows, and made for the `rows` of the program.

    The order is that of transformers (`generation/logits_process.py`).
    """
    forced = (
        np.int32,
        lambda x: (x >= 0) & (x < vocab_size),
        (f"an id from 0 to {vocab_size - 1} (the vocabulary has {vocab_size})"),
    )
    number = partial(_row_number, options, batch_size, rows)
    # A first token that is forced comes before those that are chosen.
    first = 0 if options.get("forced_first_token") is None else 1
    made = (
        number("repetition_penalty", POSITIVE, processors.RepetitionPenalty),
        number("frequency_penalty", ANY, processors.FrequencyPenalty),
        number("presence_penalty", ANY, processors.PresencePenalty),
        number("no_repeat_ngram_size", COUNT, processors.NoRepeatNgram),
        _bad_words(options, end_tokens, vocab_size),
        _suppressed("suppress_tokens", options, vocab_size, processors.SuppressTokens),
        _suppressed(
            "begin_suppress_tokens",
            options,
            vocab_size,
            partial(processors.SuppressFirstTokens, index=first),
        ),
        number("min_new_tokens", NOT_NEGATIVE, processors.MinNewTokens),
        number("forced_first_token", forced, processors.ForcedFirstToken),
        number("forced_last_token", forced, processors.ForcedLastToken),
    )
    function = options.get("logits_fn")
    after = None if function is None else processors.LogitsFunction(function)
    own = _own_processors(options.get("processors"), batch_size, vocab_size)
    return (*(x for x in (*made, after) if x is not None), *own)


def _row_number(
    options: dict[str, Any], batch_size: int, rows: int, name: str, kind: Any, make: Callable
) -> Processor | None:
    """Returns a processor with the number of an option; None if the option is not given."""
    value = per_row(name, options.get(name), batch_size, *kind, rows=rows)
    return None if value is None else make(value)


def _suppressed(
    name: str, options: dict[str, Any], vocab_size: int, make: Callable
) -> Processor | None:
    """Returns a processor that bans the tokens of an option; None if there are none."""
    ids = check_ids(name, options.get(name), vocab_size)
    if len(set(ids.tolist())) == vocab_size:
        raise ValueError(f"{name} must leave a token to choose, got all {vocab_size} of them.")
    return make(put(ids)) if len(ids) else None


def _bad_words(
    options: dict[str, Any], end_tokens: np.ndarray, vocab_size: int
) -> Processor | None:
    """Returns the ban of bad words, of which a lone end token is none: rows could never end."""
    words = options.get("bad_words")
    if words is None or (isinstance(words, list | tuple) and not words):
        return None
    ends = [[end] for end in end_tokens.tolist()]
    words = [word for word in words if np.ravel(word).tolist() not in ends]
    return processors.BadWords(sequences("bad_words", words, vocab_size)) if words else None


def _own_processors(given: Any, batch_size: int, vocab_size: int) -> list[Processor]:
    """Returns the processors that a call was given, checked.

    Raises:
        ValueError: if they are no list of processors, or one does not fit the call.
    """
    given = [] if given is None else given
    is_list = isinstance(given, list | tuple)
    if not is_list or not all(isinstance(x, Processor) for x in given):
        raise ValueError(
            f"processors must be a list of Processors, such as [RepetitionPenalty(1.1)], got "
            f"{given!r:.200}. A function of logits is logits_fn=."
        )
    for processor in given:
        processor.check(batch_size, vocab_size)
    # NumPy arrays would be part of the program.
    return [
        jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, processor)
        for processor in given
    ]
