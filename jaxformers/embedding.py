"""Token embeddings, and the sum of tokens and positions that enters a stack."""

from collections.abc import Callable
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from jaxformers.axes import Letters
from jaxformers.checks import (
    check_flag,
    check_key,
    check_positive,
    check_rate,
    check_seq_length,
    check_size,
    check_tokens,
    is_known,
)
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import Dense, as_module, construct, dropout, split_key
from jaxformers.positions.absolute import (
    LearnablePositionalEncoding,
    SinusoidalPositionalEncoding,
)
from jaxformers.positions.scheme import (
    AbsolutePosition,
    PositionScheme,
    acts_as,
)
from jaxformers.precision import add
from jaxformers.sites import site
from jaxformers.weights import Weight, lookup


class TokenEmbedding(eqx.Module):
    """A trained vector per token of the vocabulary.

    Arguments:
        vocab_size: number of tokens v.
        d_model: width of a vector.
        init: how the table is drawn, Xavier-uniform unless told otherwise.
        key: PRNG key, required.

    Example:
        >>> TokenEmbedding(65, 64, key=jax.random.key(0))(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    weight: Float[Weight, "v d"]

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(vocab_size=vocab_size, d_model=d_model)
        self.weight = init(check_key(key), (vocab_size, d_model), vocab_size, d_model)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def __call__(self, tokens: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """Returns the vectors of the tokens.

        Raises:
            ValueError: if tokens are not integer ids within the vocabulary. Under `jit`, where
                values cannot be looked at, the vector of an id that does not exist is NaN.
        """
        ids = check_tokens(tokens, self.vocab_size)
        # A negative index would count from the end. Under `jit` ids are not checked.
        ids = jnp.where(ids < 0, self.vocab_size, ids)
        return lookup(self.weight, ids)


class TransformerEmbedding(eqx.Module):
    """The sum of token, position and type vectors that enters a stack, with norm and dropout.

    Arguments:
        vocab_size: number of tokens v.
        d_model: width of a vector.
        max_seq_length: the longest sequence of the sinusoids or of the trained table.
        learnable_pos: whether positions have a trained table instead of sinusoids, False.
        dropout_rate: dropout on the sum while training, 0.1.
        position: a position scheme instead of these two. One that acts elsewhere (rotary, ALiBi)
            adds nothing here.
        scale: factor on the token vectors; None is `sqrt(d_model)`, which lifts Xavier-sized
            vectors to the size of the sinusoids (Vaswani et al. 2017, section 3.4).
        num_token_types: rows of a table of token types, added too (BERT's two segments); None is
            no such table.
        norm: constructor of a norm on the sum (BERT, BLOOM); None is no norm.
        embedding_dim: width m of the token vectors, which a `Dense` then projects to `d_model`;
            None is `d_model` and no projection.
        project_tokens: True projects before the positions are added, without a bias (OPT). False
            projects at the end, with a bias (ALBERT).
        init: how the tables are drawn.
        key: PRNG key, required.

    Example:
        >>> embedding = TransformerEmbedding(65, 64, 128, key=jax.random.key(0))
        >>> embedding(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    token_embedding: Annotated[TokenEmbedding | None, Letters(d="m")]
    position: Annotated[AbsolutePosition | None, Letters(d="m")]
    type_embedding: Annotated[TokenEmbedding | None, Letters(v="y", d="m")]
    norm: Annotated[Callable | None, Letters(d="m")]
    projection: Annotated[Dense | None, Letters(i="m", o="d")]
    project_tokens: bool = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        max_seq_length: int,
        learnable_pos: bool = False,
        dropout_rate: float = 0.1,
        *,
        position: PositionScheme | None = None,
        scale: float | None = None,
        num_token_types: int | None = None,
        norm: Callable | None = None,
        embedding_dim: int | None = None,
        project_tokens: bool = False,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_rate(dropout_rate=dropout_rate)
        check_size(d_model=d_model, max_seq_length=max_seq_length)
        scale = d_model**0.5 if scale is None else scale
        check_positive(scale=scale)
        check_flag(project_tokens=project_tokens)
        token_key, position_key, type_key, projection_key = split_key(check_key(key), 4)
        self.projection = None
        width, d_token = d_model, d_model if embedding_dim is None else embedding_dim
        self.token_embedding = TokenEmbedding(vocab_size, d_token, init=init, key=token_key)
        if embedding_dim is not None:
            width = d_model if project_tokens else embedding_dim
            self.projection = Dense(
                d_token, d_model, use_bias=not project_tokens, init=init, key=projection_key
            )
        self.type_embedding = None
        if num_token_types is not None:
            check_size(num_token_types=num_token_types)
            self.type_embedding = TokenEmbedding(num_token_types, width, init=init, key=type_key)
        self.norm = None if norm is None else as_module(construct("norm", norm, {"d_model": width}))
        self.project_tokens = project_tokens
        _check_position(position, learnable_pos)
        if learnable_pos:
            position = LearnablePositionalEncoding(
                max_seq_length, width, init=init, key=position_key
            )
        elif position is None:
            position = SinusoidalPositionalEncoding(max_seq_length, width)
        self.position = position if acts_as(position, AbsolutePosition) else None
        _check_width(self.position, width)
        self.dropout_rate = float(dropout_rate)
        self.scale = float(scale)

    @property
    def vocab_size(self) -> int:
        return self._tokens.vocab_size

    @property
    def table(self) -> Float[Weight, "v m"]:
        """The token table, which a tied output layer uses as well."""
        return self._tokens.weight

    @property
    def d_model(self) -> int:
        """The width of the result."""
        return (
            self._tokens.weight.shape[1] if self.projection is None else self.projection.w.shape[1]
        )

    @property
    def max_seq_length(self) -> int | None:
        """The longest sequence that the position scheme allows; None if there is no limit."""
        return None if self.position is None else self.position.max_seq_length

    def with_tokens(self, token_embedding: TokenEmbedding | None) -> "TransformerEmbedding":
        """Returns the same embedding with another token table, or without one (None).

        Models with one table for several embeddings keep it in one of them alone.
        """
        return eqx.tree_at(
            lambda x: x.token_embedding, self, token_embedding, is_leaf=lambda x: x is None
        )

    def __call__(
        self,
        tokens: Int[Array, "*b t"],
        key: PRNGKeyArray | None = None,
        *,
        positions: Int[Array, "*#b t"] | None = None,
        token_types: ArrayLike | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns the embedded sequence, `(b, t, d_model)` or `(t, d_model)`.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            key: PRNG key for dropout while training; None means inference.
            positions: position of each token, -1 for padding; None is 0 .. t-1.
            token_types: type of each token, in the shape of `tokens`; None is 0.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, there are more of them than the
                position scheme allows, or there are types but no table for them.
        """
        x = self._tokens(tokens) * self.scale
        x = self.projection(x) if self.projection is not None and self.project_tokens else x
        if self.position is not None:
            positions = self._check_positions(positions, x.shape[-2])
            x = add(x, self.position.embed(positions))
        x = self._add_types(x, token_types)
        x = x if self.norm is None else self.norm(x)
        x = x if self.projection is None or self.project_tokens else self.projection(x)
        return site(dropout(x, self.dropout_rate, key), "embedded")

    def _check_positions(
        self, positions: Int[Array, "*#b t"] | None, t: int
    ) -> Int[Array, "*#b t"]:
        """Returns the positions, 0 .. t-1 if there are none, after checking them.

        Columns of padding do not count, so that there may be more columns than positions.
        """
        limit = self.max_seq_length
        if positions is None:
            check_seq_length(t, limit)
            return jnp.arange(t)
        if is_known(positions):
            with jax.ensure_compile_time_eval():
                longest = int(positions.max()) + 1
            check_seq_length(longest, limit)
        elif limit is not None and t > limit:
            message = f"a sequence has more tokens than max_seq_length = {limit}. Shorten it."
            positions = eqx.error_if(positions, (positions >= limit).any(), message)
        return positions

    def check_types(
        self, token_types: ArrayLike | None, shape: tuple[int, ...]
    ) -> Int[Array, "*b t"] | None:
        """Returns the types of tokens as ids, or None, and raises unless they fit the tokens.

        Arguments:
            token_types: as the caller gave them.
            shape: of the tokens.
        """
        if token_types is None:
            return None
        if self.type_embedding is None:
            raise ValueError("token_types needs a model with num_token_types, got one without.")
        ids = check_tokens(token_types, self.type_embedding.vocab_size, "token_types")
        if ids.shape != shape:
            raise ValueError(f"token_types must have the tokens' shape {shape}, got {ids.shape}.")
        return ids

    def _add_types(
        self, x: Float[Array, "*b t e"], token_types: ArrayLike | None
    ) -> Float[Array, "*b t e"]:
        """Returns `x` plus the vectors of the types; without types, all are 0."""
        ids = self.check_types(token_types, x.shape[:-1])
        if self.type_embedding is None:
            return x
        if ids is None:
            return add(x, lookup(self.type_embedding.weight, jnp.int32(0)))
        return add(x, self.type_embedding(ids))

    @property
    def _tokens(self) -> TokenEmbedding:
        if self.token_embedding is None:
            raise ValueError("this embedding shares another's token table: use with_tokens first.")
        return self.token_embedding


def _check_position(position: PositionScheme | None, learnable_pos: bool) -> None:
    """Checks that there is one position scheme, or none."""
    check_flag(learnable_pos=learnable_pos)
    if position is None:
        return
    if isinstance(position, type):
        name = position.__name__
        raise ValueError(f"position must be a scheme, got a class. Write position={name}().")
    if not acts_as(position, PositionScheme):
        raise ValueError(
            "position must be a position scheme such as RotaryPositionalEncoding(), or in "
            f"models a function `key -> scheme`, got {position!r}."
        )
    if learnable_pos:
        raise ValueError(
            "learnable_pos=True is itself a position scheme, got position= as well: "
            f"{position!r}. Give one of the two."
        )


def _check_width(position: AbsolutePosition | None, width: int) -> None:
    """Checks that the vectors of the positions have the width of those of the tokens."""
    if position is None:
        return
    vector = jax.eval_shape(position.embed, jnp.zeros(1, jnp.int32))
    if vector.shape != (1, width):
        raise ValueError(
            f"position must embed into d_model = {width} features, got {vector.shape[-1]}. Build "
            f"it with d_model={width}."
        )
