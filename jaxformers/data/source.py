"""The base classes of all sources of batches."""

import abc
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxformers.data.order import Bucketed, Picked, Shuffled


class Source(abc.ABC):
    """Batches by number: `source[i]` for any i from 0 on, without end.

    Batch i depends only on the arguments of the constructor and on i. So a run that was stopped
    resumes with the next number, and there is no state to save.

    `len(source)` is the number of batches in an epoch. Where the examples do not fill the last of
    them, it is rounded up, and the batch also holds examples of the next epoch, or empty rows in
    sources with buckets. Batches go on after that number, so an index is not taken modulo it.

    A subclass sets `order` and defines `collect`.

    Example:
        >>> class Squares(Source):
        ...     def __init__(self, count, batch_size, seed=0):
        ...         self.order = Shuffled(count, batch_size, seed)
        ...     def collect(self, picked):
        ...         return {"x": picked.examples**2}
        >>> [batch["x"].tolist() for batch in Squares(5, 2).in_order()]
        [[0, 1], [4, 9], [16]]
        >>> len(Squares(5, 2))
        3
    """

    order: Shuffled | Bucketed

    @abc.abstractmethod
    def collect(self, picked: Picked) -> dict[str, np.ndarray]:
        """Returns the batch of these examples."""

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:
        return self.collect(self.pick(i))

    def __len__(self) -> int:
        return len(self.order)

    def in_order(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields every example exactly once, for evaluation. The last batch may be smaller."""
        return map(self.collect, self.picks())

    def pick(self, i: Any) -> Picked:
        """Returns the examples of batch i."""
        return self.order[i]

    def picks(self) -> Iterator[Picked]:
        """Yields the examples of the batches of `in_order`."""
        return self.order.in_order()

    def shard(self, index: int, count: int) -> "Source":
        """Returns a source of the rows of process `index` of `count`; other rows cost nothing.

        On many hosts each host can make its own rows: `source.shard(*host_rows(mesh))[i]`, which
        `join_batch` of `jaxformers.sharding` joins. The rows of all processes in order are the
        whole batch.

        Raises:
            ValueError: if `index` is not below `count`, or `batch_size` is not a multiple of
                `count`.
        """
        part = copy.copy(self)
        part.order = self.order.shard(index, count)
        return part


class Changed(Source):
    """The batches of another source, each changed by `change`.

    Example:
        >>> from jaxformers.data.windows import Windows
        >>> class Reversed(Changed):
        ...     def change(self, batch, numbers):
        ...         return {"tokens": batch["tokens"][:, ::-1]}
        >>> backwards = Reversed(Windows(np.arange(10), length=3, batch_size=2))
        >>> next(backwards.in_order())["tokens"].tolist()
        [[2, 1, 0], [5, 4, 3]]
    """

    def __init__(self, source: Any):
        if not isinstance(source, Source):
            raise ValueError(
                f"source must be a source of batches, as Windows(...), got {source!r}."
            )
        self.source = source

    @abc.abstractmethod
    def change(self, batch: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the batch, changed with the help of one random number per row, (b,) uint64."""

    def collect(self, picked: Picked) -> dict[str, np.ndarray]:
        return self.change(self.source.collect(picked), picked.numbers)

    def __len__(self) -> int:
        return len(self.source)

    def pick(self, i: Any) -> Picked:
        return self.source.pick(i)

    def picks(self) -> Iterator[Picked]:
        return self.source.picks()

    def shard(self, index: int, count: int) -> "Source":
        part = copy.copy(self)
        part.source = self.source.shard(index, count)
        return part
