"""The protocol of processors, and the history of the rows that they read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformers.checks import is_known
from jaxformers.generation.prompts import check_ids


class History(NamedTuple):
    """The tokens so far, as arrays of the compiled loop.

    Rows are those of the prompt, or with beams `num_beams` of them for each row of the prompt. All
    rows share their columns, and each row's last token is in the last column.

    Arguments:
        tokens: int32, `(r, s)`; the columns from `first` to `length` hold tokens of a row.
        first: `(r,)`, the first column of each row.
        start: `()`, the column of the first new token, or one per row.
        length: `()`, how many columns are in use, which is the column of the next token.
        limit: `()`, one past the last column that a new token may have.
        end_tokens: `(e,)`, the ids that end a row.
        batch_size: how many rows the prompt has; None is r.
    """

    tokens: Int[Array, "r s"]
    first: Int[Array, " r"]
    start: Int[Array, ""] | Int[Array, " r"]
    length: Int[Array, ""]
    limit: Int[Array, ""] | None = None
    end_tokens: Int[Array, " e"] | None = None
    batch_size: int | None = None

    @property
    def real(self) -> Bool[Array, "r s"]:
        """Returns which columns hold tokens of the row."""
        columns = jnp.arange(self.tokens.shape[1])
        return (columns >= self.first[:, None]) & (columns < self.length)

    @property
    def new(self) -> Bool[Array, "r s"]:
        """Returns which columns hold tokens that this call has generated."""
        return self.real & (jnp.arange(self.tokens.shape[1]) >= self.start[..., None])

    @property
    def new_count(self) -> Int[Array, ""] | Int[Array, " r"]:
        """How many tokens this call has generated, in the shape of `start`."""
        return self.length - self.start

    @property
    def last(self) -> Int[Array, " r"]:
        """The last token of each row."""
        return jnp.take(self.tokens, self.length - 1, axis=1)

    def ends_with(self, patterns: Int[Array, "p w"]) -> Bool[Array, "r p"]:
        """Returns which rows end with which patterns; -1 in a pattern fits anything."""
        columns = self.length - patterns.shape[1] + jnp.arange(patterns.shape[1])
        tail = jnp.take(self.tokens, jnp.maximum(columns, 0), axis=1)
        tail = jnp.where(columns >= self.first[:, None], tail, -2)
        return ((tail[:, None] == patterns) | (patterns == -1)).all(-1)

    def counts(self, where: Bool[Array, "r s"], vocab_size: int) -> Int[Array, "r v"]:
        """Returns how often each row has each token of the vocabulary in the columns `where`."""
        rows = jnp.arange(self.tokens.shape[0])[:, None]
        zeros = jnp.zeros((self.tokens.shape[0], vocab_size), jnp.int32)
        return zeros.at[rows, self.tokens].add(where.astype(jnp.int32))

    def each_row(self, numbers: Array) -> Array:
        """Returns an entry for each row `(r,)` of one number `()`, or of one per prompt `(b,)`."""
        rows = self.tokens.shape[0]
        batch_size = rows if self.batch_size is None else self.batch_size
        if numbers.shape not in ((), (batch_size,)):
            raise ValueError(
                "a number of a processor must be one, or an array of one per row, shape "
                f"({batch_size},), got shape {numbers.shape}."
            )
        if numbers.ndim == 0:
            return jnp.broadcast_to(numbers, (rows,))
        return jnp.repeat(numbers, rows // batch_size)


class Processor(eqx.Module):
    """Changes the logits before a token is chosen: a penalty, a ban, a grammar.

    It runs inside the compiled program, for greedy decoding, sampling, beams, drafts and streaming
    alike. Its arrays are traced, so that other numbers in them compile nothing. Everything else in
    it is part of the program.

    A processor may remember something of each row, its state: any pytree of arrays whose first axis
    is that of the rows. The loop carries it. Beams take the state of the beam that they extend, and
    a guess of a draft that is refused leaves no trace.

    Arguments of `__call__`, which a class of your own defines:
        state: as `init_state` or the call before returned it.
        logits: float32, `(r, v)`.
        history: the tokens so far. The calls see one token more each, `history.last`; the first
            call sees the prompt.
    It returns the new state, of the same shapes and types, and the new logits. Logits of -inf are
    tokens that do not come; at least one has to be left.

    Example:
        >>> class OnlyAfter(Processor):  # a token may come only after another one has come
        ...     token: Array = eqx.field(converter=jnp.asarray)
        ...     opener: Array = eqx.field(converter=jnp.asarray)
        ...
        ...     def init_state(self, history):
        ...         return (history.real & (history.tokens == self.opener)).any(axis=1)
        ...
        ...     def __call__(self, state, logits, history):
        ...         state = state | (history.last == self.opener)
        ...         is_token = jnp.arange(logits.shape[1]) == self.token
        ...         return state, jnp.where(is_token & ~state[:, None], -jnp.inf, logits)
        >>> out = model.generate(prompt, 8, processors=[OnlyAfter(token=5, opener=7)])
    """

    def init_state(self, history: History) -> Any:
        """Returns the state of each row before the first call; None if there is none.

        `history` is that of the prompt without its last token, which the first call sees.
        """
        return None

    def __call__(
        self, state: Any, logits: Float[Array, "r v"], history: History
    ) -> tuple[Any, Float[Array, "r v"]]:
        """Returns the state after the last token, and the logits of the next one."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    def ends(self, state: Any, history: History) -> Bool[Array, " r"] | bool:
        """Returns whether the last token ends each row; end tokens do so in any case.

        `state` is that before the last token. By default no other token ends a row.
        """
        return False

    def may_end(self, state: Any, history: History) -> Bool[Array, " r"] | bool:
        """Returns whether each row may end with its last token, as by default it always may."""
        return True

    def check(self, batch_size: int, vocab_size: int) -> None:
        """Raises if the processor does not fit a call of `generate`; by default it always does."""


def begin(processors: Sequence[Processor], history: History) -> tuple[Any, ...]:
    """Returns the states before the first new token, whose columns `history` has."""
    before = history._replace(length=history.length - 1)
    states = tuple(processor.init_state(before) for processor in processors)
    states = jax.tree.map(jnp.asarray, states)
    rows = history.tokens.shape[0]
    for processor, state in zip(processors, states, strict=True):
        shapes = [x.shape for x in jax.tree.leaves(state)]
        if any(shape[:1] != (rows,) for shape in shapes):
            raise ValueError(
                f"the state of {type(processor).__name__} must be arrays whose first axis is that "
                f"of the {rows} rows, got shapes {shapes}."
            )
    return states


def process(
    processors: Sequence[Processor],
    states: tuple[Any, ...],
    logits: Float[Array, "r v"],
    history: History,
) -> tuple[tuple[Any, ...], Float[Array, "r v"]]:
    """Returns the states and the logits after all processors, in their order."""
    after = []
    for processor, state in zip(processors, states, strict=True):
        new, changed = processor(state, logits, history)
        given, got = (jax.tree.map(_kind, x) for x in ((state, logits), (new, changed)))
        if given != got:
            raise ValueError(
                f"{type(processor).__name__} must return a state and logits of the shapes and "
                f"types that it was given, {given}, got {got}."
            )
        after.append(new)
        logits = changed
    return tuple(after), logits


def _kind(x: Any) -> str:
    """Returns the type and the shape of an array in words."""
    return f"{jnp.result_type(x)} {jnp.shape(x)}"


def ban(banned: Bool[Array, "#r v"], logits: Float[Array, "r v"]) -> Float[Array, "r v"]:
    """Returns the logits with -inf where a token is banned."""
    return jnp.where(banned, -jnp.inf, logits)


def mark(
    tokens: Int[Array, " p"], where: Bool[Array, "r p"], vocab_size: int
) -> Bool[Array, "r v"]:
    """Returns True at `tokens` in the rows where `where` says so."""
    return jnp.zeros((where.shape[0], vocab_size), jnp.bool_).at[:, tokens].max(where)


def check_known_ids(name: str, ids: Array, vocab_size: int) -> None:
    """Raises unless ids are of the vocabulary; -1, which fills short sequences, is none."""
    if is_known(ids):
        array = np.asarray(ids)
        check_ids(name, array[array != -1], vocab_size)


def sequences(name: str, given: Any, vocab_size: int | None = None) -> Int[Array, "p w"]:
    """Returns token sequences as the rows of one array, filled with -1 on the left.

    Raises:
        ValueError: if they are no list of sequences, or have ids that the vocabulary does not have.
    """
    is_nested = isinstance(given, list | tuple) and all(
        isinstance(line, list | tuple | np.ndarray) and len(line) for line in given
    )
    if not is_nested or not given:
        raise ValueError(
            f"{name} must be a list of token sequences such as [[5], [7, 8]], got {given!r}."
        )
    longest = max(map(len, given))
    lines = [check_ids(name, line, vocab_size) for line in given]
    lines = [np.pad(line, (longest - len(line), 0), constant_values=-1) for line in lines]
    return jax.device_put(np.stack(lines))
