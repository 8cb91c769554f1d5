"""Ends of rows by their text."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformers.generation.processors.processor import History, Processor


class StopTable(Processor):
    """Ends a row once its new tokens contain a text, which may begin and end within tokens.

    It changes no logits. `jaxformers.text.stop_table` makes its tables from stop strings and a
    tokenizer.

    Arguments:
        class_of: int32, `(v,)`, the column of each token.
        next: int32, `(s, c)`, the state after a token of a column. The state at the beginning is 0.
            A token that completes a text leads to a state plus s.

    Example:
        >>> class_of = jnp.zeros(65, int).at[5].set(1).at[7].set(2)
        >>> next = jnp.array([[0, 1, 0], [0, 1, 2]])  # 5 and then 7 end the row
        >>> model.generate(prompt, 8, processors=[StopTable(class_of, next)]).shape
        (1, 12)
    """

    class_of: Int[Array, " v"]
    next: Int[Array, "s c"]

    def __init__(self, class_of, next):
        self.class_of, self.next = jnp.asarray(class_of), jnp.asarray(next)

    def init_state(self, history: History) -> Int[Array, " r"]:
        return jnp.zeros(history.tokens.shape[0], self.next.dtype)

    def __call__(
        self, state: Int[Array, " r"], logits: Float[Array, "r v"], history: History
    ) -> tuple[Int[Array, " r"], Float[Array, "r v"]]:
        moved = self._after(state, history) % self.next.shape[0]
        return jnp.where(history.new_count == 0, state, moved), logits

    def ends(self, state: Int[Array, " r"], history: History) -> Bool[Array, " r"]:
        return self._after(state, history) >= self.next.shape[0]

    def _after(self, state: Int[Array, " r"], history: History) -> Any:
        return self.next[state, self.class_of[history.last]]
