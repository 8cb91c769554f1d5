"""Stop strings as a table over tokens, so that the compiled loop ends a row where one is complete.

Aho and Corasick 1975 find several texts in one pass over the bytes: a state is the longest end of
what was read that begins one of them. A token is its bytes one after the other.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxformers.constraints.tables import walk
from jaxformers.constraints.utf8 import ByteAutomaton
from jaxformers.constraints.vocabulary import vocabulary_of
from jaxformers.generation.processors import StopTable
from jaxformers.one_program import bucket
from jaxformers.tokenizers.tokenizer import Tokenizer

# Columns of `walk`: of tokens without bytes, and of states that stay.
NO_TEXT, UNCHANGED = 0, 1
# The least sizes of the tables, so that most stop strings share a program.
STATES, COLUMNS = 32, 128


def stop_table(strings: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> StopTable | None:
    """Returns the processor that ends rows with stop strings.

    It is None for a tokenizer whose tokens are no bytes by themselves. Then rows end later, and
    their texts are the same.
    """
    return _made(tuple(strings), tokenizer, vocab_size)


@functools.lru_cache(maxsize=16)  # every batch and every call with the same strings has the same
def _made(strings: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int) -> StopTable | None:
    try:
        vocabulary = vocabulary_of(tokenizer)
    except ValueError:
        return None
    table, complete = searcher([x.encode() for x in strings])
    s = len(table)
    # A token that completes a string anywhere within leads to a state of the second half.
    within = np.concatenate([table + s * complete[table], table + s])
    automaton = ByteAutomaton(
        np.concatenate([within, np.full((1, 256), 2 * s)]).astype(np.int32),
        np.zeros(2 * s + 1, np.bool_),
        np.arange(256),
    )
    class_of, columns = walk(automaton, vocabulary, vocab_size, np.zeros(0, np.int64))
    # Tokens that are no text, such as special ones, change nothing.
    column = np.full(vocab_size, UNCHANGED)
    column[: len(class_of)] = np.where(class_of == NO_TEXT, UNCHANGED, class_of)
    used, of_token = np.unique(column, return_inverse=True)
    rows, width = bucket(s, smallest=STATES), bucket(len(used), smallest=COLUMNS)
    next_ = np.zeros((rows, width), np.int32)
    after = columns[used][:, :s].T
    next_[:s, : len(used)] = np.where(after >= s, after - s + rows, after)
    return StopTable(*jax.device_put((of_token.reshape(-1).astype(np.int32), next_)))


def searcher(strings: Sequence[bytes]) -> tuple[Int[np.ndarray, "s 256"], Bool[np.ndarray, " s"]]:
    """Returns the state after each byte in each state, and the states in which a string ends.

    The state at the beginning is 0.

    Example:
        >>> table, complete = searcher([b"ab"])
        >>> int(table[table[0, 97], 98]), complete.tolist()
        (2, [False, False, True])
    """
    begun = sorted({x[:n] for x in strings for n in range(len(x) + 1)}, key=len)
    number = {x: i for i, x in enumerate(begun)}
    table = np.zeros((len(begun), 256), np.int32)
    complete = np.array([any(x.endswith(end) for end in strings) for x in begun])
    fallback = [0] * len(begun)  # the state of the longest end that begins a string
    for i, read in enumerate(begun):
        if i:
            table[i] = table[fallback[i]]
        for byte in range(256):
            after = number.get(read + bytes([byte]))
            if after is not None:
                fallback[after] = int(table[i, byte]) if i else 0
                table[i, byte] = after
    return table, complete
