"""Documents packed into rows and separated by segment ids."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxformers.checks import check_size
from jaxformers.data.order import GROUP, Picked, Shuffled, permute, scramble
from jaxformers.data.source import Source
from jaxformers.data.tokens import open_tokens


class PackedDocuments(Source):
    """Batches of rows that hold whole documents side by side, in shuffled order.

    A document that fits into a row is not divided. A longer one is cut into full rows and a rest.
    Each part is read alone, from position 0. Without `counts`, every token except the first of a
    document is a target exactly once per epoch. A target is always in the same document as its
    input.

    Best-fit packing of the lengths' histogram decides once which lengths share a row (Krell et al.
    2021). Which documents of these lengths share it is drawn anew in each epoch. Any batch is
    computed directly. Memory is some 50 bytes per document.

    Arguments:
        documents: a token file, or a list of documents, see `open_tokens`. Documents of a single
            token have no target and are left out.
        length: the number of tokens in a row, t.
        batch_size: the number of rows in a batch, b.
        seed: the seed of the order, an integer from 0 on; default 0.
        counts: for each document booleans, one per token, that say whether it counts as a target;
            `chat` and `answer` return them. Parts in which no target counts are left out. None
            counts all.

    Batches:
        int32 `(b, t)`: `tokens`, `targets`, `positions` (from 0 in each document, -1 for padding),
        `segment_ids` (1, 2, ... in each row, 0 for padding); boolean `(b, t)`: `loss_mask`, True
        where the target counts, and False for padding.

    Raises:
        ValueError: if the ends of documents are unknown, no document has two tokens, or `counts`
            does not fit; and as `open_tokens` does.

    Example:
        >>> packed = PackedDocuments([[1, 2, 3], [4, 5], [6, 7, 8, 9]], length=4, batch_size=2)
        >>> (batch,) = packed.in_order()
        >>> batch["tokens"]
        array([[6, 7, 8, 4],
               [1, 2, 0, 0]], dtype=int32)
        >>> batch["targets"]
        array([[7, 8, 9, 5],
               [2, 3, 0, 0]], dtype=int32)
        >>> batch["segment_ids"]
        array([[1, 1, 1, 2],
               [1, 1, 0, 0]], dtype=int32)
    """

    order: Shuffled

    def __init__(
        self,
        documents: Any,
        length: int,
        batch_size: int,
        seed: int = 0,
        *,
        counts: Sequence[Any] | None = None,
    ):
        check_size(length=length)
        self.tokens, self.length = open_tokens(documents), length
        starts, sizes = _pieces(self.tokens.starts, self.tokens.lengths, length)
        self._counts = None if counts is None else _join_counts(counts, self.tokens.lengths)
        if self._counts is not None:
            before = np.concatenate([[0], np.cumsum(self._counts)])
            learnt = before[starts + sizes + 1] > before[starts + 1]
            starts, sizes = starts[learnt], sizes[learnt]
        if not len(sizes):
            raise ValueError(
                "at least one document must have two tokens, one to read and one to predict that "
                "counts; got none. Tokenize with an end token, and let targets count after the "
                "first token of a document."
            )
        by_size = np.argsort(sizes, kind="stable")
        self._starts, self._sizes = starts[by_size], sizes[by_size]
        self._patterns = pack(np.bincount(sizes, minlength=length + 1))
        self._last_row = np.cumsum([pattern.repeats for pattern in self._patterns])
        self.order = Shuffled(int(self._last_row[-1]), batch_size, seed)

    @property
    def fill(self) -> float:
        """The share of the rows that is text and not padding."""
        return float(self._sizes.sum() / (self.order.count * self.length))

    def collect(self, picked: Picked) -> dict[str, np.ndarray]:
        shape = len(picked.examples), self.length
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids")}
        batch["positions"] = np.full(shape, -1, np.int32)
        batch["loss_mask"] = np.zeros(shape, np.bool_)
        for row, pieces in enumerate(self._pieces_of(picked)):
            at = 0
            for segment, piece in enumerate(pieces, 1):
                size = int(self._sizes[piece])
                text, _ = self.tokens.rows(
                    self._starts[piece : piece + 1], np.array([size + 1]), size + 1
                )
                place = row, slice(at, at + size)
                batch["tokens"][place], batch["targets"][place] = text[0, :-1], text[0, 1:]
                batch["segment_ids"][place] = segment
                batch["positions"][place] = np.arange(size)
                targets = slice(self._starts[piece] + 1, self._starts[piece] + size + 1)
                batch["loss_mask"][place] = self._counts is None or self._counts[targets]
                at += size
        return batch

    def _pieces_of(self, picked: Picked) -> list[list[int]]:
        """Returns the pieces of each row, as indices into the pieces sorted by size."""
        which = np.searchsorted(self._last_row, picked.examples, side="right")
        rows, slots = [], []
        for row, pattern in enumerate(self._patterns[k] for k in which.tolist()):
            repeat = picked.examples[row] - (self._last_row[which[row]] - pattern.repeats)
            for size, rank in zip(pattern.sizes, pattern.ranks, strict=True):
                rows.append(row)
                slots.append((size, rank + repeat))
        size, rank = np.array(slots).T
        epoch = picked.epochs[rows]
        first = np.searchsorted(self._sizes, size)
        count = np.searchsorted(self._sizes, size, side="right") - first
        key = scramble(self.order.seed, GROUP, epoch, size)
        piece = first + np.where(epoch < 0, rank, permute(rank, count, key))
        ends = np.searchsorted(rows, np.arange(len(which)), side="right")
        return [part.tolist() for part in np.split(piece, ends[:-1])]


def _join_counts(counts: Sequence[Any], lengths: np.ndarray) -> np.ndarray:
    """Returns the booleans of all tokens, after a check that they fit the documents."""
    arrays = [np.asarray(x) for x in counts]
    sizes = [x.shape for x in arrays]
    if sizes != [(n,) for n in lengths] or any(x.dtype != np.bool_ for x in arrays):
        raise ValueError(
            f"counts must have a row of booleans for each of the {len(lengths)} documents, one per "
            f"token; got {len(arrays)} rows, of the shapes {sizes[:3]}."
        )
    return np.concatenate(arrays)


class Pattern(NamedTuple):
    """A pattern of rows with the same lengths: row i has the piece `rank + i` of each length."""

    repeats: int
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]


def pack(histogram: np.ndarray) -> list[Pattern]:
    """Returns patterns of rows that hold all pieces, by best-fit from the longest piece on.

    Arguments:
        histogram: the number of pieces of length 0, 1, ... up to the length of a row.

    Example:
        >>> pack(np.array([0, 1, 2, 1, 0]))  # of length 1, 2, 2, 3 in rows of 4
        [Pattern(repeats=1, sizes=(2, 2), ranks=(0, 1)),
         Pattern(repeats=1, sizes=(3, 1), ranks=(0, 0))]
    """
    length = len(histogram) - 1
    open_rows: list[list[Pattern]] = [[] for _ in range(length + 1)]  # by the space left
    for size in range(length, 0, -1):
        rank, left = 0, int(histogram[size])
        space = size
        while left:
            while space < length and not open_rows[space]:
                space += 1
            # A new row takes one piece, and the next pieces of its size may follow.
            if open_rows[space]:
                count, sizes, ranks = open_rows[space].pop()
            else:
                fits = length // size
                count, sizes, ranks = max(1, left // fits), (), ()
            taken = min(count, left)
            if taken < count and sizes:
                rest = tuple(rank + taken for rank in ranks)
                open_rows[space].append(Pattern(count - taken, sizes, rest))
            filled = Pattern(taken, (*sizes, size), (*ranks, rank))
            open_rows[space - size].append(filled)
            rank, left, space = rank + taken, left - taken, size
    return [pattern for patterns in open_rows for pattern in patterns]


def _pieces(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each piece begins and how many inputs it has. Its last target comes after them.

    The last token of a document is only a target, so n tokens have n - 1 inputs.
    """
    inputs = np.maximum(sizes - 1, 0)
    counts = -(-inputs // length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return (
        np.repeat(starts, counts) + number * length,
        np.minimum(length, np.repeat(inputs, counts) - number * length),
    )
