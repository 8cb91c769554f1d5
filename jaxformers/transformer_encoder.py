"""The encoder-only model."""

from typing import Unpack

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxformers.checks import (
    check_key,
    check_tokens,
)
from jaxformers.embedding import TransformerEmbedding
from jaxformers.encoder import Encoder
from jaxformers.layers import split_key
from jaxformers.masks import Mask, place
from jaxformers.pieces import Pieces, build_embedding, check_pieces


class TransformerEncoder(eqx.Module):
    """An encoder-only model: hidden states in which every token has seen every other.

    The shape of BERT (Devlin et al. 2019).

    Arguments:
        vocab_size: number of tokens.
        d_model: width of the residual stream, 512.
        num_heads: attention heads, 8.
        num_layers: encoder layers, 6.
        d_ff: width inside the feed-forwards, 2048.
        max_seq_length: longest sequence of the sinusoids or the learned table, 512.
        dropout_rate: dropout on the embeddings and on what each sublayer writes, 0.1.
        learnable_pos: a learned table of positions instead of sinusoids, False.
        embedding_scale: factor on the token vectors; None is `sqrt(d_model)`, as in the paper.
        final_norm: whether a norm ends the stack; None follows `norm_first`.
        key: PRNG key, required.
        **pieces: norms, feed-forwards, positions, heads and so on: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> model = TransformerEncoder(65, 64, 4, 2, 256, 128, key=jax.random.key(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    embedding: TransformerEmbedding
    encoder: Encoder

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        num_heads: int = 8,
        num_layers: int = 6,
        d_ff: int = 2048,
        max_seq_length: int = 512,
        dropout_rate: float = 0.1,
        learnable_pos: bool = False,
        *,
        embedding_scale: float | None = None,
        final_norm: bool | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self))
        embedding_key, encoder_key = split_key(check_key(key), 2)
        sizes = d_model, max_seq_length, learnable_pos, dropout_rate, embedding_scale
        self.embedding, pieces = build_embedding(vocab_size, *sizes, embedding_key, **pieces)
        self.encoder = Encoder(
            num_layers,
            d_model,
            num_heads,
            d_ff,
            dropout_rate,
            final_norm=final_norm,
            key=encoder_key,
            **pieces,
        )

    @property
    def vocab_size(self) -> int:
        return self.embedding.vocab_size

    @property
    def max_seq_length(self) -> int | None:
        """The longest sequence the position scheme knows; None if there is no limit."""
        return self.embedding.max_seq_length

    def __call__(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t d"]:
        """The hidden state of each token.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            mask: booleans (True = may attend) that broadcast to `(b, num_heads, t, t)`, or an
                `AttentionMask`.
            key: PRNG key for dropout while training; None means inference.
            padding_mask: shape of `tokens`, True where a token is real.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, are empty or too long, or a
                mask has the wrong shape or type.
        """
        tokens = check_tokens(tokens, self.vocab_size)
        mask = place(mask, tokens.shape, padding_mask)
        embedding_key, encoder_key = split_key(key, 2)
        x = self.embedding(tokens, embedding_key, positions=mask.q_positions)
        return self.encoder(x, mask, encoder_key)
