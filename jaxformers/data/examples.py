"""Batches of the examples of any data set that has a length and an index."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxformers.checks import check_callable
from jaxformers.data.order import Picked, Shuffled
from jaxformers.data.source import Source

Collate = Callable[[list[Any]], dict[str, Any]]


def stack(examples: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns the batch of some examples: dicts of arrays or numbers, whose shapes are equal.

    Raises:
        ValueError: if an example is no dict, or the examples have other names or shapes.

    Example:
        >>> stack([{"tokens": [1, 2]}, {"tokens": [3, 4]}])["tokens"].tolist()
        [[1, 2], [3, 4]]
    """
    if not all(isinstance(x, Mapping) and x.keys() == examples[0].keys() for x in examples):
        raise ValueError(
            "examples must be dicts with the same names to become a batch, got "
            f"{examples[0]!r:.80}. Pass collate=, a function that makes a dict of arrays of a list "
            "of them."
        )
    batch = {}
    for name in examples[0]:
        arrays = [np.asarray(x[name]) for x in examples]
        shapes = sorted({x.shape for x in arrays})
        if len(shapes) > 1:
            raise ValueError(
                f"the examples of a batch must have {name!r} of one shape, got {shapes[:3]}. Pass "
                "collate= to pad them, or use PaddedTexts or PackedDocuments."
            )
        batch[name] = np.stack(arrays)
    return batch


class Examples(Source):
    """Batches of the examples of any data set with `len(data)` and `data[i]`, in shuffled order.

    Such data sets are a list, a `datasets.Dataset` of Hugging Face, a data set of torch in the
    style of a map, and a `MapDataset` or a data source of Grain. Each example comes exactly once
    per epoch. Batch i depends only on the seed and on i, so a resumed run reads no earlier batch,
    and the data set needs no order, batches or repetitions of its own.

    Arguments:
        data: the data set. If it has `__getitems__`, as a `datasets.Dataset`, this method gives the
            examples of a batch at once.
        batch_size: the number of examples in a batch, b.
        seed: the seed of the order, an integer from 0 on; default 0.
        collate: function that makes a dict of arrays of a list of examples. The default stacks
            the arrays of each name, see `stack`.

    Raises:
        ValueError: if the data set has no length or no index, as a stream, or is empty.

    Example:
        >>> rows = [{"tokens": [i, i + 1], "targets": [i + 1, i + 2]} for i in range(5)]
        >>> source = Examples(rows, batch_size=2)
        >>> source[10**6]["tokens"].shape, len(source)
        ((2, 2), 3)
        >>> [batch["tokens"][:, 0].tolist() for batch in source.in_order()]
        [[0, 1], [2, 3], [4]]
    """

    order: Shuffled

    def __init__(self, data: Any, batch_size: int, seed: int = 0, *, collate: Collate = stack):
        check_callable(collate=collate)
        indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        if not indexed or isinstance(data, type | Mapping | str):
            raise ValueError(
                f"data must have a length and examples data[i], got {data!r:.80}. Pass a stream "
                "of batches to fit as it is, with steps=."
            )
        if len(data) == 0:
            raise ValueError("data must have at least one example, got none.")
        self.data, self._collate = data, collate
        self.order = Shuffled(len(data), batch_size, seed)

    def collect(self, picked: Picked) -> dict[str, Any]:
        numbers = picked.examples.tolist()
        together = getattr(self.data, "__getitems__", None)
        examples = [self.data[i] for i in numbers] if together is None else together(numbers)
        return self._collate(list(examples))
