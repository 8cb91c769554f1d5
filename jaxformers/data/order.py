"""The examples of batch i as a function of the seed and i, so that a run can resume anywhere.

Nothing is replayed and nothing is stored. The position of an example in the shuffled order of an
epoch is computed from its number, by a permutation without a table (10^10 examples need no memory).
Random numbers are hashes of their purpose and index, so they do not depend on the order of draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxformers.checks import check_size

# In each round two numbers swap or stay with a chance of one half. After 24 rounds only one pair in
# 10^7 has never been treated differently.
ROUNDS = 24

# The purposes of random numbers. Hashing them makes different uses of one seed independent.
ORDER, ROW, OFFSET, GROUP, BATCH = range(5)


class Picked(NamedTuple):
    """The examples of one batch.

    Attributes:
        examples: the numbers of the examples, (b,) int64; -1 is an empty row.
        epochs: the epoch of each, (b,) int64; -1 for evaluation in order.
        numbers: a random number for each row, (b,) uint64.
        shape: the lengths to which the batch is padded, if the order determines them.
    """

    examples: np.ndarray
    epochs: np.ndarray
    numbers: np.ndarray
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shuffled:
    """The numbers 0 .. count-1 in a new order each epoch, cut into batches, without end.

    Each number comes exactly once in an epoch. Nothing is dropped at the end of an epoch: a batch
    may hold the last numbers of one epoch and the first of the next. A batch larger than `count`
    has numbers of several epochs.

    Arguments:
        count: the number of examples.
        batch_size: the number of examples in a batch.
        seed: an integer from 0 on; default 0. Each seed gives another order.
        rows: the rows `(first, last)` of each batch that are returned; None, the default, is all.
            `shard` sets them.

    Raises:
        ValueError: if a size is not a positive integer, or the seed is negative.

    Example:
        >>> order = Shuffled(5, batch_size=3, seed=0)
        >>> sorted(np.concatenate([order[i].examples for i in range(5)]).tolist())
        [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    """

    count: int
    batch_size: int
    seed: int = 0
    rows: tuple[int, int] | None = None

    def __post_init__(self):
        check_size(count=self.count, batch_size=self.batch_size)
        check_seed(self.seed)

    def __len__(self) -> int:
        """The number of batches in which each number comes at least once, an epoch rounded up."""
        return -(-self.count // self.batch_size)

    def __getitem__(self, i: Any) -> Picked:
        first, last = self.rows or (0, self.batch_size)
        places = check_index(i) * self.batch_size + np.arange(first, last)
        epochs, place = np.divmod(places, self.count)
        examples = permute(place, self.count, scramble(self.seed, ORDER, epochs))
        return Picked(examples, epochs, scramble(self.seed, ROW, places))

    def in_order(self) -> Iterator[Picked]:
        """Yields the numbers once each in ascending order. The last batch may be smaller."""
        first, last = self.rows or (0, self.batch_size)
        for start in range(0, self.count, self.batch_size):
            examples = np.arange(start + first, min(start + last, self.count))
            if len(examples):
                yield Picked(
                    examples, np.full_like(examples, -1), scramble(self.seed, ROW, ~examples)
                )

    def shard(self, index: int, count: int) -> "Shuffled":
        """Returns the order of the rows of process `index` of `count`, an equal part of a batch."""
        return replace(self, rows=shard_rows(self.rows or (0, self.batch_size), index, count))


class Bucketed:
    """Batches of examples of about equal length, with few shapes, in a new order each epoch.

    The lengths are divided into buckets such that there is the least padding. In an epoch, the
    examples are shuffled, sorted by bucket and cut into batches, which come in shuffled order. A
    batch has the shape of its longest bucket, so there are at most `buckets` shapes. Each example
    comes exactly once per epoch. If the examples do not fill all batches, one batch of the longest
    bucket has empty rows.

    Arguments:
        lengths: `(n, k)` integers, k lengths of each example.
        batch_size: the number of rows in a batch.
        buckets: the largest number of shapes, default 4.
        seed: an integer from 0 on, default 0.

    Example:
        >>> order = Bucketed(np.array([[3], [9], [2], [8], [3]]), batch_size=2, buckets=2)
        >>> order.shapes
        [(3,), (9,)]
        >>> sorted(np.concatenate([order[i].examples for i in range(3)]).tolist())
        [-1, 0, 1, 2, 3, 4]
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, buckets: int = 4, seed: int = 0):
        check_size(batch_size=batch_size, buckets=buckets)
        check_seed(seed)
        self.count, self.batch_size, self.seed = len(lengths), batch_size, seed
        self.num_batches = -(-self.count // batch_size)
        self.rows = (0, batch_size)
        size = lengths.max(axis=1)
        bounds = least_padding(size, buckets)
        self._bucket = np.searchsorted(bounds, size)
        # The shape of a bucket also fits shorter examples, since its first batch may have some.
        self.shapes = [tuple(lengths[size <= bound].max(axis=0).tolist()) for bound in bounds]
        self._plan = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self.num_batches

    def __getitem__(self, i: Any) -> Picked:
        i = check_index(i)
        epoch, place = divmod(i, self.num_batches)
        (batch,) = permute(
            np.array([place]), self.num_batches, scramble(self.seed, BATCH, epoch)
        ).tolist()
        examples = self._epoch(epoch)[batch * self.batch_size :][: self.batch_size]
        numbers = scramble(self.seed, ROW, i * self.batch_size + np.arange(self.batch_size))
        return self._pick(examples, epoch, numbers)

    def in_order(self) -> Iterator[Picked]:
        """Yields the examples once each in their order. The last batch may be smaller."""
        for start in range(0, self.count, self.batch_size):
            examples = np.arange(start, min(start + self.batch_size, self.count))
            picked = self._pick(examples, -1, scramble(self.seed, ROW, ~examples))
            if len(picked.examples):
                yield picked

    def shard(self, index: int, count: int) -> "Bucketed":
        """Returns the order of the rows of process `index` of `count`, an equal part of a batch."""
        part = object.__new__(Bucketed)
        part.__dict__.update(self.__dict__, rows=shard_rows(self.rows, index, count))
        return part

    def _pick(self, examples: np.ndarray, epoch: int, numbers: np.ndarray) -> Picked:
        # The shape is that of the whole batch, so that all its shards have the same shape.
        shape = self.shapes[self._bucket[examples[examples >= 0]].max()]
        rows = slice(*self.rows)
        return Picked(examples[rows], np.full_like(examples[rows], epoch), numbers[rows], shape)

    def _epoch(self, epoch: int) -> np.ndarray:
        """Returns the examples of an epoch, batch by batch, and keeps the last result."""
        known, plan = self._plan
        if known != epoch:
            order = permute(np.arange(self.count), self.count, scramble(self.seed, ORDER, epoch))
            plan = order[np.argsort(self._bucket[order], kind="stable")]
            empty = self.num_batches * self.batch_size - self.count
            plan = np.concatenate([plan, np.full(empty, -1)])
            self._plan = epoch, plan
        return plan


def least_padding(sizes: np.ndarray, count: int) -> np.ndarray:
    """Returns the upper bounds of at most `count` buckets with the least padding.

    If there are many different sizes, 256 quantiles are considered.

    Example:
        >>> least_padding(np.array([2, 3, 3, 8, 9]), 2)
        array([3, 9])
    """
    values = np.unique(np.quantile(sizes, np.linspace(0, 1, 257), method="higher"))
    below = np.append(0, np.searchsorted(np.sort(sizes), values, side="right"))
    # cost[i, j] is that of a bucket from value i to value j - 1. If i = j, the bucket is empty.
    cost = (below - below[:, None]) * np.append(0, values).astype(float)
    cost[np.tril_indices(len(cost), -1)] = np.inf
    best, choices = cost[0], []
    for _ in range(count - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    at, bounds = len(values), {len(values)}
    for choice in reversed(choices):
        at = int(choice[at])
        bounds.add(at)
    return values[np.array(sorted(bounds - {0})) - 1]


def permute(x: np.ndarray, count: Any, key: np.ndarray) -> np.ndarray:
    """Returns the images of `x` under a random permutation of 0 .. count-1, one for each key.

    This is the swap-or-not shuffle (Hoang, Morris and Rogaway 2012): in each round every number has
    one partner, and a hash of the larger of the two decides whether both are swapped.

    Arguments:
        x: (b,) integers in [0, count).
        count: an integer, or (b,) of them.
        key: (b,) or (1,) uint64.

    Returns:
        (b,) int64

    Example:
        >>> sorted(permute(np.arange(7), 7, scramble(1, 2)).tolist())
        [0, 1, 2, 3, 4, 5, 6]
    """
    x, count = x.astype(np.uint64), np.asarray(count, np.uint64)
    keys = scramble(key, np.arange(ROUNDS)[:, None])
    for round_key, pivot in zip(keys, scramble(keys, 1) % count, strict=True):
        partner = (pivot + count - x) % count
        swap = _mix(np.maximum(x, partner) ^ round_key) & np.uint64(1)
        x = np.where(swap == 1, partner, x)
    return x.astype(np.int64)


def scramble(*words: Any) -> np.ndarray:
    """Returns a hash of integers, or of arrays of them that broadcast: uint64, at least one axis.

    Example:
        >>> scramble(1, [2, 3]).shape
        (2,)
    """
    value = np.zeros(1, np.uint64)
    for word in words:
        word = np.asarray(word)
        word = word if word.dtype == np.uint64 else word.astype(np.int64).view(np.uint64)
        value = _mix((value ^ word) + np.uint64(0x9E3779B97F4A7C15))
    return value


def uniform(numbers: np.ndarray, width: int, use: int) -> np.ndarray:
    """Returns (b, width) random numbers in [0, 1) from (b,) random integers, others for each use.

    Example:
        >>> uniform(scramble([1, 2]), 3, use=0).shape
        (2, 3)
    """
    bits = scramble(numbers[:, None], use, np.arange(width))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the mixing function of SplitMix64 (Steele et al. 2014), in Stafford's variant 13."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shard_rows(rows: tuple[int, int], index: Any, count: Any) -> tuple[int, int]:
    """Returns the part of `rows` that belongs to process `index` of `count`."""
    check_size(count=count)
    first, last = rows
    if isinstance(index, bool) or not isinstance(index, int | np.integer):
        raise ValueError(f"index must be an integer, such as jax.process_index(), got {index!r}.")
    if not 0 <= index < count:
        raise ValueError(f"index must be from 0 to {count - 1}, one of {count}, got {index}.")
    if (last - first) % count:
        raise ValueError(
            f"a batch of {last - first} rows does not divide into {count} equal parts. "
            "Choose a batch_size that is a multiple of the number of processes."
        )
    size = (last - first) // count
    return first + int(index) * size, first + (int(index) + 1) * size


def check_seed(seed: Any) -> None:
    """Raises an error unless `seed` is an integer from 0 to 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}.")


def check_index(i: Any) -> int:
    """Returns the number of a batch as an int, or raises an error."""
    if isinstance(i, bool) or not isinstance(i, int | np.integer) or i < 0:
        raise ValueError(
            f"batches are numbered 0, 1, 2, ... without end, got {i!r}. For every example once, "
            "use in_order()."
        )
    return int(i)
