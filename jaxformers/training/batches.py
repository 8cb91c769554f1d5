"""The path of batches to the device: they are checked, converted and fetched one step ahead."""

import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxformers.training.interrupt import Stopped
from jaxformers.training.objectives import Batch, Loss, check_ids


def on_device(batch: Any) -> Any:
    """Returns a batch on the device. It is copied, since a loader may overwrite its arrays."""
    return jax.device_put(batch, may_alias=False)


def prepared(
    batch: Any, name: str, loss: Loss, model: Any, put: Callable = on_device
) -> dict[str, Any]:
    """Returns a batch of any loader as arrays where `put` puts them, after a check of its ids."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"{name} must be a dict of arrays, got {type(batch).__name__}.")
    arrays = {key: _as_array(x) for key, x in batch.items() if x is not None}
    for key, x in arrays.items():
        if isinstance(x, np.ndarray) and x.dtype.kind in "OSTUMm":
            raise ValueError(
                f"{name} must have numbers alone, got {key!r} of type {x.dtype}. Leave it out of "
                "the batch, or make numbers of it."
            )
    check_ids(loss, model, arrays)
    return put(arrays)


def check_alike(batch: Any) -> None:
    """Raises an error on every host if one of them has another batch."""
    if jax.process_count() == 1 or not isinstance(batch, Mapping):
        return
    sums = 0
    for name, x in sorted(batch.items()):
        if x is not None and not isinstance(x, jax.Array):
            x = np.ascontiguousarray(x)
            sums = zlib.crc32(x.tobytes(), zlib.crc32(f"{name} {x.shape}".encode(), sums))
    found = multihost_utils.process_allgather(np.array([sums], np.uint32))
    if len(set(found.ravel().tolist())) > 1:
        raise ValueError(
            "the first batch must be the same on all hosts, each of which takes its rows of it. "
            "If each host makes rows of its own, pass join_batch(rows, mesh) of "
            "jaxformers.sharding."
        )


def as_dict(batch: Any) -> Any:
    """Returns the batch of a step with arrays that JAX knows, if it is a mapping.

    Tensors of torch and lists of numbers become NumPy arrays. Everything else stays as it is.
    """
    if not isinstance(batch, Mapping):
        return batch

    def known(x: Any) -> Any:
        numbers = isinstance(x, list | tuple) and all(
            isinstance(y, bool | int | float)
            for y in jax.tree.leaves(x, is_leaf=lambda y: y is None)
        )
        foreign = hasattr(x, "__array__") and not isinstance(x, jax.Array | np.ndarray | np.generic)
        return _as_array(x) if numbers or foreign else x

    return {name: known(x) for name, x in batch.items()}


def in_order(batches: Any) -> Iterator[Batch]:
    """Returns an iterator over all batches of an evaluation, each of them once."""
    own = getattr(batches, "in_order", None)
    return own() if callable(own) else iter(batches)  # torch's loaders have a flag of that name


class Feed:
    """A stream of batches that begins at a position.

    Arguments:
        batches: an object with `batches[i]`, or an iterable. Both start again at their end. One
            with `in_order`, as the sources of `jaxformers.data`, has no end. One that can be
            iterated and has no length is not indexed.
        position: the number of the first batch.
        prepare: function `(batch, name) -> arrays` that makes a batch ready for the device.
        fetch: function that calls the function it is given, or raises `Stopped` after a signal.
    """

    def __init__(
        self,
        batches: Any,
        position: int,
        prepare: Callable[[Any, str], dict[str, Any]],
        fetch: Callable[[Callable[[], Any]], Any],
    ):
        gives = hasattr(batches, "__getitem__") or hasattr(batches, "__iter__")
        if not gives or isinstance(batches, Mapping | type):
            raise ValueError(
                "batches must give one dict of arrays a step, as a list, an iterable or a source "
                f"with batches[i], got {batches!r:.80}. For one batch pass [batch]."
            )
        self.batches, self.position, self.ended = batches, position, False
        self._prepare, self._fetch = prepare, fetch
        self.batch: dict[str, Any] = {}
        self._iterator = None if _by_index(batches) else self._iterate(position)

    def advance(self) -> bool:
        """Prepares the next batch. Returns False if there is none, or after a signal."""
        iterator = self._iterator
        try:
            batch = self._fetch(lambda: next(iterator) if iterator else self._at(self.position))
        except StopIteration:
            self.ended = True
            return False
        except Stopped:
            return False
        except Exception as error:
            error.add_note(f"Batch {self.position} raised this error when it was fetched.")
            raise
        if not self.batch:
            check_alike(batch)
        self.batch = self._prepare(batch, f"batch {self.position}")
        self.position += 1
        return True

    def close(self) -> None:
        """Closes the iterator, which ends the worker processes of a loader."""
        if self._iterator is not None:
            self._iterator.close()

    def _at(self, position: int) -> Any:
        size = _length(self.batches)
        if size == 0:
            raise ValueError("batches must not be empty. Pass at least one batch.")
        return self.batches[position if size is None else position % size]

    def _iterate(self, skip: int) -> Generator[Any, None, None]:
        """Yields the batches without the first `skip`, and repeats them if they can be repeated."""
        while True:
            empty = True
            for batch in self.batches:
                empty = False
                if skip:
                    skip -= 1
                else:
                    yield batch
            if isinstance(self.batches, Iterator):
                return
            if empty:
                raise ValueError("batches must not be empty. Pass at least one batch.")


def _by_index(batches: Any) -> bool:
    """Returns whether `batches[i]` is a batch. A stream of `datasets` has columns as its items."""
    stream = hasattr(batches, "__iter__") and not hasattr(batches, "__len__")
    return hasattr(batches, "__getitem__") and not stream


def _length(batches: Any) -> int | None:
    """Returns the number of batches after which they start again, None for sources without end."""
    endless = callable(getattr(batches, "in_order", None)) or not hasattr(batches, "__len__")
    return None if endless else len(batches)


def _as_array(x: Any) -> Any:
    """Returns a loader's array, with integers of 64 bits as int32 if their values fit."""
    if isinstance(x, jax.Array):
        return x
    x = np.asarray(x)
    fits = x.dtype == np.int64 and abs(x).max(initial=0) < 2**31
    return x.astype(np.int32) if fits else x
