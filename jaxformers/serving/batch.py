"""The memory of the decoding engine: a batch of rows, as long as the longest of them needs.

Every size of it has programs of its own. The sizes are few: powers of two up to the context.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxformers.cache import SPARE
from jaxformers.generation.prompts import put
from jaxformers.serving.job import Sampling
from jaxformers.serving.rows import (
    Chosen,
    Rows,
    Rules,
    at_the_right,
    begin,
    insert,
    new_row,
    read_chunk,
    read_rules,
    repeat,
    resize,
    step,
    take,
)
from jaxformers.transformer import Transformer

# The least sizes, of rows and of what an encoder has read.
SLOTS, SOURCE_SLOTS = 256, 64


class Batch:
    """Some rows of a model, of which some are in use, and one whose prompt is being read.

    Arguments:
        model: that of the engine.
        count: how many rows there are.
        context: the most tokens of a row.
    """

    def __init__(self, model: Any, count: int, context: int):
        self.model, self.count, self.context = model, count, context
        self.is_pair = isinstance(model, Transformer)
        windows = [layer.self_attention.window for layer in model.decoder.layers]
        self._windows = [None if x is None else x + SPARE for x in windows]  # slots of each layer
        self._slots = self._size(1, SLOTS, context)
        self._source_slots = self._size(1, SOURCE_SLOTS, self.source_limit)
        self._rows: Any = None
        # The only row in use: its number, and its state, which is newer than that in the batch.
        self._alone: Any = None
        self._read: Any = None  # the row whose prompt is being read
        self._no_bias: dict[int, Array] = {}

    @property
    def source_limit(self) -> int | None:
        """The most tokens that the encoder has positions for; None if no limit, or no encoder."""
        return self.model.src_embedding.max_seq_length if self.is_pair else None

    @staticmethod
    def _size(length: int, least: int, limit: int | None) -> int:
        """Returns the smallest size for so many tokens."""
        size = max(least, 1 << (length - 1).bit_length())
        return size if limit is None else min(size, limit)

    def clear(self) -> None:
        """Forgets everything, such as after an error, whose program has lost its arguments."""
        self._rows = self._alone = self._read = None

    def fit(self, length: int, source_length: int = 1, shrink: bool = False) -> None:
        """Makes room for rows of so many tokens.

        Arguments:
            length: of the longest row, with its next token.
            source_length: of the longest source.
            shrink: whether rows may become shorter. What longer ones held is lost, so those in use
                must not be longer.
        """
        slots = self._size(length, SLOTS, self.context)
        source = self._size(source_length, SOURCE_SLOTS, self.source_limit)
        # From size to next size, since each pair of sizes is a program.
        while self._slots < slots:
            self._resize(self._size(self._slots + 1, SLOTS, self.context), self._source_slots)
        while shrink and self._slots > slots:
            self._resize(self._size(-(-self._slots // 2), SLOTS, self.context), self._source_slots)
        if self._source_slots < source:
            self._resize(self._slots, source)

    def _resize(self, slots: int, source_slots: int) -> None:
        """Gives all rows another size."""
        self._slots, self._source_slots = slots, source_slots
        size = slots, self._own_slots, source_slots if self.is_pair else None
        if self._rows is not None:
            self._rows = resize(self._rows, *size)
        if self._alone is not None:
            self._alone = self._alone[0], resize(self._alone[1], *size)
        if self._read is not None:
            self._read = resize(self._read, *size)

    @property
    def _own_slots(self) -> tuple[int, ...]:
        """How many tokens each layer keeps; one with a window uses its slots again and again."""
        return tuple(self._slots if x is None else min(self._slots, x) for x in self._windows)

    @property
    def _intact(self) -> int:
        """The longest rows of which no layer has lost a token."""
        return min((x for x in self._windows if x is not None), default=self.context)

    def kept(self, memory: list[int], longest: int) -> list[int]:
        """Returns the tokens that a row still has after rows became shorter.

        Arguments:
            memory: its tokens.
            longest: the most tokens that it or the row that it was copied from has had.
        """
        if len(memory) <= self._slots:
            return memory
        return memory[: self._slots] if longest <= self._intact else []

    def reusable(self, memory: Sequence[int], longest: int, prompt: Sequence[int]) -> int:
        """Returns how many tokens of a prompt a row has read already; see `kept`."""
        if self._rows is None or self.is_pair or self._rows.cache.rotated_for is not None:
            return 0
        most = min(len(memory), len(prompt) - 1, self._slots)
        same = next((i for i in range(most) if memory[i] != prompt[i]), most)
        is_lost = longest > self._intact and longest - same > SPARE
        return 0 if is_lost else same

    def open(self, source: Sequence[int] | None, place: int, count: int) -> None:
        """Begins to read a prompt.

        Arguments:
            source: the tokens of the encoder, if the model has one.
            place: a row that has read the first `count` tokens of the prompt, which are copied.
            count: how many these are; with 0 the row begins anew.
        """
        if source is not None or self._rows is None:
            self._read = self._new(source or [0])
            return
        from_alone = self._alone is not None and self._alone[0] == place
        rows, at = (self._alone[1], 0) if from_alone else (self._rows, place)
        self._read = take(rows, put(at), put(count))

    def _new(self, source: Sequence[int]) -> Rows:
        """Returns a row that holds nothing but a source."""
        if not self.is_pair:
            return new_row(self.model, self._slots, None, None)
        padded = np.zeros((1, self._source_slots), np.int32)
        padded[0, : len(source)] = source
        real = np.arange(self._source_slots)[None] < len(source)
        return new_row(self.model, self._slots, *jax.device_put((padded, real)))

    def read(self, tokens: Sequence[int], size: int, length: int) -> Float[Array, "1 d"]:
        """Reads more of the prompt, and returns the hidden state of the last of its tokens.

        Arguments:
            tokens: at most `size` ids.
            size: that of the program.
            length: that of the whole prompt.
        """
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        numbers = jax.device_put((padded, np.int32(len(tokens)), np.array([length], np.int32)))
        self._read, hidden = read_chunk((self.model, *numbers), self._read)
        return hidden

    def begin(
        self,
        place: int,
        hidden: Float[Array, "1 d"],
        prompt: Sequence[int],
        rules: Rules,
        bias: Float[np.ndarray, "1 v"] | None,
    ) -> Chosen:
        """Puts the row that has been read into the batch, and returns its first new token.

        Arguments:
            place: the number of the row.
            hidden: of the last token of its prompt.
            prompt, rules: of the job.
            bias: what is added to its logits.
        """
        given = at_the_right(prompt, self._slots), put(np.array([len(prompt)]))
        fixed = self.model, hidden, self._bias(bias, 1)
        row, chosen = begin(fixed, self._read, *given, rules)
        self._read = None
        if self._rows is None:
            self._rows = repeat(row, self.count)
        self.put_back()
        self._rows = insert((row, put(place)), self._rows)
        return jax.device_get(chosen)

    def give_up(self) -> None:
        """Forgets the row that is being read."""
        self._read = None

    def step(self, active: Sequence[int], bias: Float[np.ndarray, "r v"] | None) -> Chosen:
        """Takes a step with the rows in use, and returns the new tokens of these rows.

        Arguments:
            active: the numbers of the rows.
            bias: what is added to the logits of each of them; None is nothing.
        """
        if len(active) == 1:
            (place,) = active
            if self._alone is None or self._alone[0] != place:
                self.put_back()
                self._alone = place, take(self._rows, put(place), put(self._slots))
            fixed = self.model, jax.device_put(np.ones(1, np.bool_)), self._bias(bias, 1)
            row, chosen = step(fixed, self._alone[1])
            self._alone = place, row
            return jax.device_get(chosen)
        self.put_back()
        live = np.zeros(self.count, np.bool_)
        live[list(active)] = True
        if bias is not None:
            wide = np.zeros((self.count, bias.shape[1]), np.float32)
            wide[list(active)] = bias
            bias = wide
        fixed = self.model, jax.device_put(live), self._bias(bias, self.count)
        self._rows, chosen = step(fixed, self._rows)
        return Chosen(*(x[list(active)] for x in jax.device_get(chosen)))

    def put_back(self) -> None:
        """Puts a row that took steps alone back into the batch."""
        if self._alone is not None:
            place, row = self._alone
            self._rows = insert((row, put(place)), self._rows)
            self._alone = None

    def warm_up(self, chunks: Sequence[int], longest: int) -> None:
        """Compiles the programs for rows of up to so many tokens, and for the chunks of prompts."""
        slots = 0
        while slots < longest:
            slots = self._size(slots + 1, SLOTS, self.context)
            self.fit(slots)
            for _ in range(2):  # the second row begins as a copy of the first
                self.open([0] if self.is_pair else None, 0, 0)
                for size in chunks:
                    hidden = self.read([0], size, 1)
                self.begin(0, hidden, [0], read_rules(Sampling()), None)
            if self.count > 1:
                self.step([0, 1], None)
            self.step([0], None)  # at the end, so that a row alone grows, too
        self.fit(1, shrink=True)
        self.clear()

    def _bias(self, bias: Float[np.ndarray, "r v"] | None, rows: int) -> Float[Array, "r v"]:
        """Returns what is added to the logits of so many rows."""
        if bias is not None:
            return jax.device_put(bias)
        if rows not in self._no_bias:
            shape = rows, self.model.vocab_size
            self._no_bias[rows] = jax.device_put(np.zeros(shape, np.float32))
        return self._no_bias[rows]
