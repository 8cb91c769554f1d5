"""The options of `generate` as the arrays that the compiled program reads."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxformers.checks import check_size, is_known
from jaxformers.generation.constraints import read_constraint
from jaxformers.generation.processors import History, Processor
from jaxformers.generation.processors.processor import begin, process, sequences
from jaxformers.generation.prompts import check_ids, put
from jaxformers.generation.sampling import (
    COUNT,
    FRACTION,
    POSITIVE,
    Keys,
    Warper,
    draw,
    first_highest,
    per_row,
    row_keys,
)
from jaxformers.generation.short_forms import read_processors


class Plan(eqx.Module):
    """The rules for logits and ends of rows; numbers are arrays, so new ones compile nothing."""

    start: Int[Array, ""]  # the column of the first new token
    limit: Int[Array, ""]  # one past the column of the last
    keys: Key[Array, " b"] | None  # None is greedy
    warper: Warper
    processors: tuple[Processor, ...]
    end_tokens: Int[Array, " e"]
    stop_sequences: Int[Array, "p w"] | None
    pad_token: Int[Array, ""]
    given: Int[Array, ""]  # how many rows the call has; the program may have more (`rows_for`)
    batch_size: int = eqx.field(static=True)  # how many the program has

    def history(
        self, tokens: Int[Array, "b s"], first: Int[Array, " b"], length: Int[Array, ""]
    ) -> History:
        """Returns the tokens of the columns before `length`."""
        sizes = self.limit, self.end_tokens, self.batch_size
        return History(tokens, first, self.start, length, *sizes)

    def begin(self, history: History) -> tuple[Any, ...]:
        """Returns the states of the processors before the first new token."""
        return begin(self.processors, history)

    def warp(
        self, states: tuple[Any, ...], logits: Float[Array, "b v"], history: History
    ) -> tuple[tuple[Any, ...], Float[Array, "b v"]]:
        """Returns the processors' states, and the logits that a token is chosen from."""
        states, logits = process(self.processors, states, logits, history)
        return states, logits if self.keys is None else self.warper(logits)

    def choose(
        self, states: tuple[Any, ...], logits: Float[Array, "b v"], history: History
    ) -> tuple[tuple[Any, ...], Int[Array, " b"], Bool[Array, " b"]]:
        """Returns the processors' states, the next token of each row, and where none was left."""
        states, logits = self.warp(states, logits, history)
        none_left = (logits == -jnp.inf).all(-1)
        if self.keys is None:
            return states, first_highest(logits), none_left
        return states, draw(logits, self.keys, history.new_count), none_left

    def ends(self, states: tuple[Any, ...], history: History) -> Bool[Array, " b"]:
        """Returns whether each row's last token ends it.

        `states` are those of the processors before that token.
        """
        ends = (history.last[:, None] == self.end_tokens).any(-1)
        if self.stop_sequences is not None:
            new = history._replace(first=jnp.maximum(history.first, self.start))
            ends = ends | new.ends_with(self.stop_sequences).any(-1)
        both = [*zip(self.processors, states, strict=True)]
        for processor, state in both:
            ends = ends | processor.ends(state, history)
        for processor, state in both:
            ends = ends & processor.may_end(state, history)
        return ends

    def after(self, columns: Int[Array, ""]) -> "Plan":
        """Returns the same for tokens that follow so many columns."""
        return dataclasses.replace(self, start=self.start + columns, limit=self.limit + columns)

    def repeat(self, times: int) -> "Plan":
        """Returns the same for each row `times` times over.

        Keys stay one per row, and so do the numbers of processors: `History.each_row` repeats them.
        """
        fields: dict[str, Any] = {
            field.name: jnp.repeat(value, times)
            for field in dataclasses.fields(self.warper)
            if eqx.is_array(value := getattr(self.warper, field.name))
        }
        warper = dataclasses.replace(self.warper, **fields)
        return dataclasses.replace(self, warper=warper)


# The limit of the temperature is no division.
LIMIT = (
    " Its limit at 0 is greedy decoding: leave out key, or pass top_k=1 (for some rows of several "
    "an array, as top_k=[1, 50])."
)
SAMPLING = {
    "temperature": (*POSITIVE, LIMIT),
    "top_k": COUNT,
    "top_p": FRACTION,
    "min_p": (np.float32, lambda x: (x >= 0) & (x <= 1), "a number in [0, 1]"),
    "typical_p": FRACTION,
}


def make_plan(
    batch_size: int,
    vocab_size: int,
    start: int,
    max_new_tokens: int,
    options: dict[str, Any],
    rows: int | None = None,
) -> Plan:
    """Returns the options as a `Plan`, checked.

    `rows` is how many rows the program has, if not `batch_size`.

    Raises:
        ValueError: if an option is out of its range or would be without effect.
    """
    key, num_beams = options.get("key"), options.get("num_beams", 1)
    check_size(num_beams=num_beams)
    end_tokens = check_ids("end_token", options.get("end_token"), vocab_size)
    pad = check_ids("pad_token", options.get("pad_token"), vocab_size)
    check_effect(key, max_new_tokens, options)
    # With beams, one token more than there are end tokens has to survive the cuts.
    keep = 1 if num_beams == 1 else len(end_tokens) + 1
    stops, rows = options.get("stop_sequences"), batch_size if rows is None else rows
    return Plan(
        start=put(start),
        limit=put(start + max_new_tokens),
        keys=row_keys(key, batch_size, rows),
        warper=Warper()
        if key is None
        else Warper(**_rows(SAMPLING, options, batch_size, rows), keep=keep),
        processors=(
            *read_processors(batch_size, vocab_size, end_tokens, options, rows),
            *read_constraint(batch_size, vocab_size, end_tokens, options, rows),
        ),
        end_tokens=put(end_tokens),
        stop_sequences=None if stops is None else sequences("stop_sequences", stops, vocab_size),
        pad_token=put([*pad, *end_tokens, 0][0]),
        given=put(batch_size),
        batch_size=rows,
    )


def check_effect(key: Keys | None, max_new_tokens: int, options: dict[str, Any]) -> None:
    """Raises for an option that would be without effect."""
    given = [name for name in SAMPLING if options.get(name) is not None]
    one = options.get("temperature")
    if isinstance(one, int | float) and one == 1:
        given.remove("temperature")  # the default, which greedy decoding does not contradict
    if key is None and given:
        raise ValueError(
            f"{' and '.join(given)} can only matter when sampling, got no key, which means greedy "
            "decoding. Pass key=jax.random.key(0) to sample, or leave them out."
        )
    least = options.get("min_new_tokens")
    if least is not None and is_known(least) and np.max(least) > max_new_tokens:
        raise ValueError(
            f"min_new_tokens must be at most max_new_tokens, got {least!r} and {max_new_tokens}."
        )


def _rows(
    numbers: dict, options: dict[str, Any], batch_size: int, rows: int
) -> dict[str, Array | None]:
    return {
        name: per_row(name, options.get(name), batch_size, *range_, rows=rows)
        for name, range_ in numbers.items()
    }
