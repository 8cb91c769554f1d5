"""The option `constraint` of `generate` as a processor."""

from typing import Any

import jax
import numpy as np

from jaxformers.constraints import Constraint, LarkGrammar
from jaxformers.generation.processors import Automaton, Followed
from jaxformers.generation.processors.followed import register
from jaxformers.one_program import bucket

# The least sizes of the tables, so that small constraints share a program.
STATES, COLUMNS = 512, 256


def read_constraint(
    batch_size: int, vocab_size: int, end_tokens: np.ndarray, options: dict[str, Any], rows: int
) -> list[Automaton | Followed]:
    """Returns the processor of the constraints of a call, if there are any.

    They are checked for `batch_size` rows; more `rows` of the program are free.

    Raises:
        ValueError: if they are no constraints, or there is no token to end with.
    """
    given = options.get("constraint")
    of_row = list(given) if isinstance(given, list | tuple) else [given] * batch_size
    known = all(x is None or isinstance(x, Constraint | LarkGrammar) for x in of_row)
    if len(of_row) != batch_size or not known:
        raise ValueError(
            "constraint must be one constraint, such as Regex('[0-9]+', tokenizer), or a list of "
            f"one per row, {batch_size} of them, with None for a free row, got {given!r:.200}."
        )
    if all(x is None for x in of_row):
        return []
    if not len(end_tokens):
        raise ValueError(
            "constraint needs a token that ends a row where the text is complete, got no "
            "end_token. Pass end_token=, such as tokenizer.end_token."
        )
    made = frozenset(end_tokens.tolist())
    of_row += [None] * (rows - batch_size)
    kinds = (Constraint, _automaton), (LarkGrammar, _followed)
    found = []
    for kind, build in kinds:
        own = [x if isinstance(x, kind) else None for x in of_row]
        if any(x is not None for x in own):
            found.append(build(own, vocab_size, made))
    return found


def _automaton(of_row: list[Any], vocab_size: int, end_tokens: frozenset[int]) -> Automaton:
    """Returns the processor of constraints with tables, of which each row has one or None."""
    constraints = list(dict.fromkeys(x for x in of_row if x is not None))
    tables = [x.tables(vocab_size, end_tokens) for x in constraints]
    count = 1 << (len(tables) - 1).bit_length()
    states, columns = (
        bucket(max(x.next.shape[axis] for x in tables), smallest=least)
        for axis, least in ((0, STATES), (1, COLUMNS))
    )
    class_of = np.zeros((count, vocab_size), np.int32)
    next_ = np.full((count, states, columns), -1, np.int32)
    for i, table in enumerate(tables):
        class_of[i] = table.class_of
        next_[i, : table.next.shape[0], : table.next.shape[1]] = table.next
    which = [-1 if x is None else constraints.index(x) for x in of_row]
    return Automaton(*map(jax.device_put, (class_of, next_, np.array(which, np.int32))))


def _followed(of_row: list[Any], vocab_size: int, end_tokens: frozenset[int]) -> Followed:
    """Returns the processor of grammars that the host follows."""
    which = [-1 if x is None else register(x.follower(vocab_size, end_tokens)) for x in of_row]
    return Followed(jax.device_put(np.array(which, np.int32)))
