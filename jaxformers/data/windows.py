"""Windows of a long text, for language models."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from jaxformers.checks import check_size
from jaxformers.data.order import OFFSET, Picked, Shuffled, scramble
from jaxformers.data.source import Source
from jaxformers.data.tokens import open_tokens


class Windows(Source):
    """Batches of windows of a text, each with the tokens that follow, in shuffled order.

    In each epoch the windows tile the text one after the other from a random offset. Each window
    comes exactly once. At both ends together less than two windows are left out. `in_order()`
    starts at the beginning and leaves nothing out: its last batch may be one shorter window.

    Memory does not grow with the text, and any batch is computed directly.

    Arguments:
        tokens: a token file, a `.npy` file or a 1-D array of ids, see `open_tokens`.
        length: the number of tokens in a window, t.
        batch_size: the number of windows in a batch, b. A batch larger than an epoch repeats
            windows.
        seed: the seed of the order and the offsets, an integer from 0 on; default 0.

    Batches:
        `tokens` and `targets`, both int32 `(b, t)`.

    Raises:
        ValueError: if the text has fewer than `length + 1` tokens; and as `open_tokens` does.

    Example:
        >>> windows = Windows(np.arange(100), length=8, batch_size=3, seed=0)
        >>> batch = windows[0]
        >>> batch["tokens"].shape
        (3, 8)
        >>> np.array_equal(batch["targets"], batch["tokens"] + 1)
        True
    """

    order: Shuffled

    def __init__(self, tokens: Any, length: int, batch_size: int, seed: int = 0):
        check_size(length=length)
        self.tokens, self.length = open_tokens(tokens), length
        targets = len(self.tokens) - 1
        if targets < length:
            raise ValueError(
                f"a text must have at least length + 1 = {length + 1} tokens, got "
                f"{len(self.tokens)}. Choose a smaller length, or a longer text."
            )
        # This is one window less than would fit, so that every offset has the same number of them.
        count = max(1, len(self.tokens) // length - 1)
        self.order = Shuffled(count, batch_size, seed)
        self._spare = targets - count * length

    def collect(self, picked: Picked) -> dict[str, np.ndarray]:
        (length,) = picked.shape or (self.length,)
        offsets = scramble(self.order.seed, OFFSET, picked.epochs) % np.uint64(self._spare + 1)
        starts = np.where(picked.epochs < 0, 0, offsets.astype(np.int64))
        starts = starts + picked.examples * self.length
        text, _ = self.tokens.rows(starts, np.full_like(starts, length + 1), length + 1)
        return {"tokens": text[:, :-1], "targets": text[:, 1:]}

    def picks(self) -> Iterator[Picked]:
        count, rest = divmod(len(self.tokens) - 1, self.length)
        order = replace(self.order, count=count + (rest > 0))
        for examples, epochs, numbers, _ in order.in_order():
            full = examples < count
            if full.any():
                yield Picked(examples[full], epochs[full], numbers[full])
            if not full.all():
                yield Picked(examples[~full], epochs[~full], numbers[~full], (rest,))
