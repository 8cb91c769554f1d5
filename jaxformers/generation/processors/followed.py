"""Tokens that the host allows, for constraints that no table can hold."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformers.generation.processors.processor import History, Processor, ban

# What says which tokens are legal, by a number that is an array of the compiled program, so that
# another one compiles nothing.
KNOWN: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(follower: Any) -> int:
    """Returns the number of a follower.

    Its `legal(new_tokens)` gives booleans `(v,)`, and `may_end(new_tokens)` one.
    """
    number = next((n for n, x in KNOWN.items() if x is follower), None)
    if number is None:
        number = next(_numbers)
        KNOWN[number] = follower
    return number


class Followed(Processor):
    """Bans the tokens that the follower of a row does not allow; the option `constraint`.

    Before each token the program asks the host. The answer depends on the new tokens alone.

    Arguments:
        which: int32, one number or one per row: that of `register`, -1 for a free row.
    """

    which: Int[Array, ""] | Int[Array, " b"]

    def __init__(self, which):
        self.which = jnp.asarray(which)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        ask = partial(_legal, logits.shape[1])
        legal = self._answer(ask, jax.ShapeDtypeStruct(logits.shape, jnp.bool_), history)
        return None, ban(~legal, logits)

    def may_end(self, state: None, history: History) -> Bool[Array, " r"]:
        rows = history.tokens.shape[:1]
        return self._answer(_may_end, jax.ShapeDtypeStruct(rows, jnp.bool_), history)

    def _answer(self, ask: Callable, shape: Any, history: History) -> Array:
        where = history.tokens, history.start, history.length
        which = history.each_row(self.which)
        return jax.pure_callback(ask, shape, which, *where, vmap_method="sequential")


def _legal(vocab_size: int, *where: Any) -> np.ndarray:
    """Returns which tokens are legal in each row, `(r, v)`."""
    rows = _followed_rows(*where)
    legal = np.ones((len(rows), vocab_size), np.bool_)
    for i, row in enumerate(rows):
        if row is not None:
            legal[i] = row[0].legal(row[1])
    return legal


def _may_end(*where: Any) -> np.ndarray:
    """Returns whether the text of each row is complete, `(r,)`."""
    rows = _followed_rows(*where)
    return np.array([row is None or row[0].may_end(row[1]) for row in rows], np.bool_)


def _followed_rows(which: Any, tokens: Any, start: Any, length: Any) -> list[Any]:
    """Returns the follower and the new tokens of each row, None of a free one."""
    new = np.asarray(tokens)[:, int(start) : int(length)].tolist()
    numbers = np.asarray(which).tolist()
    return [
        None if number < 0 else (KNOWN[number], tuple(row))
        for number, row in zip(numbers, new, strict=True)
    ]
