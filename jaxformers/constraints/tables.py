"""The automaton of a constraint over the tokens of a vocabulary, as two tables."""

import hashlib
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxformers.constraints.automaton import too_large
from jaxformers.constraints.utf8 import ByteAutomaton, unique_columns
from jaxformers.constraints.vocabulary import Vocabulary

# Columns of the tables: of tokens that are illegal everywhere, and of those that end a row.
ILLEGAL, END = 0, 1
# The most entries of the tables, of four bytes each.
ENTRIES = 32_000_000
# So many places of a row that is followed on the host are remembered.
PLACES = 8


class Tables(NamedTuple):
    """The state that each token leads to from each state; the one at the beginning is 0.

    Arguments:
        class_of: int32, `(v,)`, the column of each token.
        next: int32, `(s, c)`, the state after a token of a class, -1 where it is illegal.
    """

    class_of: np.ndarray
    next: np.ndarray


class TableFollower:
    """Tables followed on the host, which says what may come after the new tokens of a row.

    Arguments:
        tables: of a constraint.
    """

    def __init__(self, tables: Tables):
        self._tables = tables
        self._places: OrderedDict[tuple[int, ...], int] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """The memory of the tables."""
        return sum(x.nbytes for x in self._tables)

    def of_one_row(self) -> "TableFollower":
        """Returns a follower for one row, which remembers places of its own."""
        return TableFollower(self._tables)

    def legal(self, tokens: tuple[int, ...]) -> Bool[np.ndarray, " v"]:
        """Returns which tokens may come after some; all of them after an illegal one."""
        state = self._at(tokens)
        if state < 0:
            return np.ones(len(self._tables.class_of), np.bool_)
        return (self._tables.next[state] >= 0)[self._tables.class_of]

    def _at(self, tokens: tuple[int, ...]) -> int:
        """Returns the state after some tokens, which is one step after a state that is known."""
        if not tokens:
            return 0
        state, new = self._places.get(tokens[:-1]), tokens[-1:]
        if state is None:
            state, new = 0, tokens
        for token in new:
            state = (
                int(self._tables.next[state, self._tables.class_of[token]]) if state >= 0 else -1
            )
        self._places[tokens] = state
        if len(self._places) > PLACES:
            self._places.popitem(last=False)
        return state


def make_tables(
    automaton: ByteAutomaton, vocabulary: Vocabulary, vocab_size: int, end_tokens: Collection[int]
) -> Tables | None:
    """Returns the tables of an automaton, or None if no tokens write one of its texts.

    Only states are left that are reached, and from which tokens lead to an end.

    Arguments:
        automaton: over bytes.
        vocabulary: the bytes of the tokens.
        vocab_size: of the model; ids that one of both does not have are illegal.
        end_tokens: the ids that end a row, and are no text.

    Raises:
        ValueError: if they would be too large.
    """
    ends = np.array(sorted(end_tokens), np.int64)
    class_of, columns = walk(automaton, vocabulary, vocab_size, ends)
    used, class_of = np.unique(class_of, return_inverse=True)
    next_ = np.ascontiguousarray(columns[used].T)
    reached = _spread(0, *_grouped(np.arange(next_.size) // len(used), next_.reshape(-1)))
    reached = reached[reached < len(next_) - 1]  # the last one is where nothing leads on
    edges = np.repeat(reached, len(used)), next_[reached].reshape(-1)
    accepting = reached[automaton.accepting[reached]]
    alive = np.intersect1d(_spread(accepting, *_grouped(*edges[::-1])), reached)
    if not len(alive) or alive[0] != 0:
        return None
    number = np.full(len(next_), -1, np.int32)
    number[alive] = np.arange(len(alive))
    short, merged = unique_columns(number[next_[alive]])
    end = np.where(automaton.accepting[alive], np.arange(len(alive)), -1)
    table = np.concatenate([np.full((len(alive), 1), -1), end[:, None], short], axis=1)
    of_token = np.full(vocab_size, ILLEGAL, np.int32)
    count = min(vocab_size, len(vocabulary))
    of_token[:count] = 2 + merged[class_of.reshape(-1)]
    of_token[ends[ends < vocab_size]] = END
    return Tables(of_token, table.astype(np.int32))


def walk(
    automaton: ByteAutomaton, vocabulary: Vocabulary, vocab_size: int, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the column of each token, and the columns: where it leads from each state.

    All tokens are read byte by byte at the same time. Tokens that lead to the same states so far
    are one from then on, so that there are few columns.
    """
    dead, kinds = len(automaton.table) - 1, automaton.table.shape[1]
    lengths = vocabulary.lengths[: min(vocab_size, len(vocabulary))].copy()
    lengths[ends[ends < len(lengths)]] = 0
    columns = [np.full(dead + 1, dead, np.int32), np.arange(dead + 1, dtype=np.int32)]
    known = {_digest(column): i for i, column in enumerate(columns)}
    class_of = (lengths > 0).astype(np.int64)
    for position in range(int(lengths.max(initial=0))):
        here = np.flatnonzero((lengths > position) & (class_of > 0))
        byte = automaton.class_of[vocabulary.content[vocabulary.starts[here] + position]]
        steps, which = np.unique(class_of[here] * kinds + byte, return_inverse=True)
        led = np.empty(len(steps), np.int64)
        for i, step in enumerate(steps):
            column = automaton.table[columns[step // kinds], step % kinds]
            led[i] = known.setdefault(_digest(column), len(columns))
            if led[i] == len(columns):
                columns.append(column)
        if len(columns) * (dead + 1) > ENTRIES:
            raise too_large(f"its tables have more than {ENTRIES:,} entries")
        class_of[here] = led[which.reshape(-1)]
    return class_of, np.stack(columns)


def _digest(column: np.ndarray) -> bytes:
    return hashlib.blake2b(column.tobytes(), digest_size=16).digest()


def _grouped(sources: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges sorted by their sources, without those that come again."""
    size = int(max(sources.max(initial=0), targets.max(initial=0))) + 1
    edges = np.unique(sources.astype(np.int64) * size + targets)
    return edges // size, edges % size


def _spread(starts: int | np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns all states to which edges lead from some states, sorted, and these."""
    size = int(max(sources.max(initial=0), targets.max(initial=0), np.max(starts, initial=0))) + 1
    offsets = np.searchsorted(sources, np.arange(size + 1))
    found = np.zeros(size, np.bool_)
    new = np.atleast_1d(starts)
    while len(new):
        found[new] = True
        ranges = [targets[offsets[x] : offsets[x + 1]] for x in new]
        new = np.unique(np.concatenate(ranges))
        new = new[~found[new]]
    return np.flatnonzero(found)
