"""Tokens that an automaton allows, such as those of a pattern or of a JSON schema."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformers.generation.processors.processor import History, Processor, ban

# The column of tokens that end a row, which are legal where it may end.
END = 1


class Automaton(Processor):
    """Bans the tokens that do not go on in the automaton of their row; the option `constraint`.

    The state of a row is one integer, 0 before its first new token.

    Arguments:
        class_of: int32, `(k, v)`, the column of each token, for k automata.
        next: int32, `(k, s, c)`, the state after a token of a column, -1 where it is illegal.
        which: int32, one number or one per row: the automaton of a row, -1 of a free one.

    Example:
        >>> next = jnp.array([[[-1, 0, 1, -1], [-1, -1, -1, 0]]])  # illegal, end, 5, 7
        >>> class_of = jnp.zeros((1, 65), int).at[0, jnp.array([5, 7])].set(jnp.array([2, 3]))
        >>> model.generate(prompt, 4, processors=[Automaton(class_of, next)])[0, 4:]
        Array([5, 7, 5, 7], dtype=int32)
    """

    class_of: Int[Array, "k v"]
    next: Int[Array, "k s c"]
    which: Int[Array, ""] | Int[Array, " b"]

    def __init__(self, class_of, next, which=0):
        self.class_of, self.next = jnp.asarray(class_of), jnp.asarray(next)
        self.which = jnp.asarray(which)

    def init_state(self, history: History) -> Int[Array, " r"]:
        return jnp.zeros(history.tokens.shape[0], self.next.dtype)

    def __call__(
        self, state: Int[Array, " r"], logits: Float[Array, "r v"], history: History
    ) -> tuple[Int[Array, " r"], Float[Array, "r v"]]:
        which = history.each_row(self.which)
        moved = self.after(which, state, history.last[:, None])[:, 0]
        # Rows that have ended are given filling, which may be illegal.
        state = jnp.where(history.new_count == 0, state, jnp.maximum(moved, 0))
        legal = jax.vmap(lambda k, x: (self.next[k, x] >= 0)[self.class_of[k]])(which, state)
        return state, ban(~legal & (which >= 0)[:, None], logits)

    def after(
        self, which: Int[Array, " r"], state: Int[Array, " r"], tokens: Int[Array, "r p"]
    ) -> Int[Array, "r p"]:
        """Returns the states after each of some tokens, -1 where it is illegal."""
        which, state = which[:, None], state[:, None]
        return self.next[which, state, self.class_of[which, tokens]]

    def may_end(self, state: Int[Array, " r"], history: History) -> Bool[Array, " r"]:
        """Returns the rows whose text is complete with their last token, and the free ones.

        So neither does a stop sequence end a row within its text.
        """
        which = history.each_row(self.which)
        after = self.after(which, state, history.last[:, None])[:, 0]
        return (which < 0) | ((after >= 0) & (self.next[which, jnp.maximum(after, 0), END] >= 0))
