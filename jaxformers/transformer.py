"""The three models: decoder-only, encoder-decoder and encoder-only."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from jaxformers.checks import (
    check_key,
    check_padding_mask,
    check_seq_length,
    check_size,
    check_tokens,
)
from jaxformers.decoder import Cache, Decoder
from jaxformers.embedding import TransformerEmbedding
from jaxformers.encoder import Encoder
from jaxformers.generation import gather, generate, generate_from_source, stream
from jaxformers.layers import split_key
from jaxformers.masks import Mask, as_mask, padding_to_positions, place
from jaxformers.output import OutputLayer
from jaxformers.pieces import Pieces, build_embedding, build_output, check_pieces
from jaxformers.plan import AllOptions, Options
from jaxformers.prompts import Tokens
from jaxformers.sampling import Keys, Numbers
from jaxformers.scoring import score, score_with_source
from jaxformers.steps import LMStep, Seq2SeqStep


class TransformerLM(eqx.Module):
    """A decoder-only language model: each token is predicted from those before it.

    Arguments:
        vocab_size: number of tokens v.
        d_model: width of the residual stream.
        num_heads: attention heads.
        num_layers: decoder layers.
        d_ff: width inside the feed-forwards.
        max_seq_length: longest sequence of the sinusoids or the learned table.
        dropout_rate: dropout on the embeddings and on what each sublayer writes.
        learnable_pos: a learned table of positions instead of sinusoids.
        tie_embeddings: whether the output layer uses the token table.
        embedding_scale: factor on the token vectors; None is `sqrt(d_model)`, as in the paper.
        final_norm: whether a norm ends the stack; None follows `norm_first`.
        key: PRNG key, required.
        **pieces: norms, feed-forwards, positions, heads and so on: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> model = TransformerLM(65, 64, 4, 2, 256, 128, key=jax.random.key(0))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> model(tokens).shape
        (1, 3, 65)
        >>> model.generate(tokens, 5).shape
        (1, 8)
    """

    embedding: TransformerEmbedding
    decoder: Decoder
    output: OutputLayer

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
        tie_embeddings: bool = False,
        embedding_scale: float | None = None,
        final_norm: bool | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self))
        embedding_key, decoder_key, output_key = split_key(check_key(key), 3)
        self.embedding, pieces = build_embedding(
            vocab_size,
            d_model,
            max_seq_length,
            learnable_pos,
            dropout_rate,
            embedding_scale,
            embedding_key,
            **pieces,
        )
        self.decoder = Decoder(
            num_layers,
            d_model,
            num_heads,
            d_ff,
            dropout_rate,
            cross_attention=False,
            final_norm=final_norm,
            key=decoder_key,
            **pieces,
        )
        self.output = build_output(d_model, vocab_size, tie_embeddings, output_key, **pieces)

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
    ) -> Float[Array, "*b t v"]:
        """Log-probabilities of the next token at each position, in float32.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            mask: booleans (True = may attend) that broadcast to `(b, num_heads, t, t)`, or an
                `AttentionMask`; and-ed with the causal mask.
            key: PRNG key for dropout while training; None means inference.
            padding_mask: shape of `tokens`, True where a token is real. Positions are counted
                over the real tokens, so left and right padding give the same.

        Returns:
            `(b, t, vocab_size)`, or `(t, vocab_size)` for tokens without a batch axis.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, are empty or too long, or a
                mask has the wrong shape or type.
        """
        return jax.nn.log_softmax(self.logits(tokens, mask, key, padding_mask=padding_mask))

    def logits(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t v"]:
        """What `__call__` gives, before the log-softmax."""
        return self.project(self.forward(tokens, mask, key, padding_mask=padding_mask)[0])

    def forward(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        """The hidden states before the output layer, and the cache extended by these tokens.

        Arguments as for `__call__`, and:
            cache: from `init_cache` or the call before, if `tokens` follow tokens already seen.
        """
        return _decode(
            self.embedding,
            self.decoder,
            tokens,
            None,
            mask,
            as_mask(None),
            key,
            padding_mask,
            cache,
        )

    def project(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Logits from hidden states."""
        return _project(self.output, self.embedding, hidden)

    def init_cache(self, batch_size: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens in each of `batch_size` sequences."""
        return _init_cache(self.embedding, self.decoder, batch_size, slots)

    def generate(
        self,
        prompt: Tokens,
        max_new_tokens: int,
        *,
        end_token: int | Sequence[int] | None = None,
        temperature: Numbers = 1.0,
        top_k: Numbers | None = None,
        top_p: Numbers | None = None,
        padding_mask: ArrayLike | None = None,
        key: Keys | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """The prompt and `max_new_tokens` tokens that continue it.

        Arguments:
            prompt: ids, `(b, t)` or `(t,)`.
            max_new_tokens: how many tokens to add.
            end_token: a row ends with this token (one or several ids) and is filled with it then.
            temperature: what logits are divided by before sampling, above 0.
            top_k: sample from the k most probable tokens.
            top_p: sample from the fewest tokens that hold this much probability, in (0, 1].
            padding_mask: shape of `prompt`, True where a token is real; padding may be anywhere.
            key: PRNG key to sample with, or one per row; None takes the most probable token.
                A row's tokens depend on its key (of one key: on `fold_in(key, row)`), never on
                the other rows.
            **options: see `Options`.

        Numbers for sampling may be arrays of one per row.

        Returns:
            int32, `(b, t + max_new_tokens)`, or `(t + max_new_tokens,)` for a prompt without a
            batch axis. A `Generation` with more if an option asks for that.

        Raises:
            ValueError: if an option is out of its range or would be without effect, or the new
                tokens go beyond `max_seq_length`.
            FloatingPointError: if the logits are NaN.
        """
        return generate(
            LMStep(self),
            prompt,
            max_new_tokens,
            vocab_size=self.vocab_size,
            max_seq_length=self.max_seq_length,
            padding_mask=padding_mask,
            options=gather(end_token, temperature, top_k, top_p, key, dict(options)),
        )

    def stream(
        self,
        prompt: Tokens,
        max_new_tokens: int,
        *,
        padding_mask: ArrayLike | None = None,
        **options: Unpack[AllOptions],
    ) -> Iterator[Int[Array, "*b"]]:
        """The new tokens that `generate` gives for the same arguments, one by one as they come.

        Yields:
            int32, `(b,)`, or `()` for a prompt without a batch axis; until all rows have ended.

        Example:
            >>> [token.shape for token in model.stream(prompt, 3)]
            [(1,), (1,), (1,)]
        """
        return stream(
            LMStep(self),
            prompt,
            max_new_tokens,
            vocab_size=self.vocab_size,
            max_seq_length=self.max_seq_length,
            padding_mask=padding_mask,
            options=dict(options),
        )

    def score(self, tokens: Tokens, padding_mask: ArrayLike | None = None) -> Float[Array, "*b t"]:
        """The log-probability of each token given those before it.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            padding_mask: shape of `tokens`, True where a token is real.

        Returns:
            float32, shape of `tokens`; 0 for padding and for the first token of each row.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, or too long.
        """
        return score(
            LMStep(self),
            tokens,
            padding_mask,
            vocab_size=self.vocab_size,
            max_seq_length=self.max_seq_length,
        )


class Transformer(eqx.Module):
    """The encoder-decoder: target tokens are predicted from those before and from the source.

    Arguments:
        src_vocab_size: number of source tokens.
        tgt_vocab_size: number of target tokens v.
        d_model: width of the residual stream.
        num_heads: attention heads.
        num_encoder_layers: encoder layers.
        num_decoder_layers: decoder layers.
        d_ff: width inside the feed-forwards.
        max_seq_length: longest sequence of the sinusoids or the learned tables.
        dropout_rate: dropout on the embeddings and on what each sublayer writes.
        learnable_pos: learned tables of positions instead of sinusoids.
        tie_embeddings: whether the output layer uses the target's token table.
        share_embeddings: whether source and target use one token table; with `tie_embeddings`
            all three are one, as in the paper.
        embedding_scale: factor on the token vectors; None is `sqrt(d_model)`, as in the paper.
        final_norm: whether norms end the stacks; None follows `norm_first`.
        key: PRNG key, required.
        **pieces: norms, feed-forwards, positions, heads and so on: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> model = Transformer(30, 40, 64, 4, 2, 2, 256, 128, key=jax.random.key(0))
        >>> src, tgt = jnp.array([[1, 2, 3]]), jnp.array([[4, 5]])
        >>> model(src, tgt).shape
        (1, 2, 40)
        >>> model.generate(src, max_length=6, start_token=0, end_token=1).shape
        (1, 6)
    """

    src_embedding: TransformerEmbedding
    encoder: Encoder
    tgt_embedding: TransformerEmbedding
    decoder: Decoder
    output: OutputLayer

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        d_model: int = 512,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        d_ff: int = 2048,
        max_seq_length: int = 512,
        dropout_rate: float = 0.1,
        learnable_pos: bool = False,
        *,
        tie_embeddings: bool = False,
        share_embeddings: bool = False,
        embedding_scale: float | None = None,
        final_norm: bool | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self))
        src_key, encoder_key, tgt_key, decoder_key, output_key = split_key(check_key(key), 5)
        if jax.tree.leaves(eqx.filter(pieces.get("position"), eqx.is_array)):
            raise ValueError(
                "encoder and decoder cannot share a position scheme with weights of its own. Pass "
                "a function `key -> scheme`, so that each draws one."
            )
        width = d_model, max_seq_length, learnable_pos, dropout_rate, embedding_scale
        self.src_embedding, encoder_pieces = build_embedding(
            src_vocab_size, *width, src_key, **pieces
        )
        self.tgt_embedding, decoder_pieces = build_embedding(
            tgt_vocab_size, *width, tgt_key, **pieces
        )
        if share_embeddings:
            if src_vocab_size != tgt_vocab_size:
                raise ValueError(
                    "share_embeddings=True needs one vocabulary, got src_vocab_size "
                    f"{src_vocab_size} and tgt_vocab_size {tgt_vocab_size}."
                )
            self.src_embedding = self.src_embedding.with_tokens(None)
        sizes = d_model, num_heads, d_ff, dropout_rate
        self.encoder = Encoder(
            num_encoder_layers, *sizes, final_norm=final_norm, key=encoder_key, **encoder_pieces
        )
        self.decoder = Decoder(
            num_decoder_layers, *sizes, final_norm=final_norm, key=decoder_key, **decoder_pieces
        )
        self.output = build_output(d_model, tgt_vocab_size, tie_embeddings, output_key, **pieces)

    @property
    def src_vocab_size(self) -> int:
        return self._source_embedding.vocab_size

    @property
    def tgt_vocab_size(self) -> int:
        return self.tgt_embedding.vocab_size

    @property
    def max_seq_length(self) -> int | None:
        """The longest sequence the position scheme knows; None if there is no limit."""
        return self.tgt_embedding.max_seq_length

    def __call__(
        self,
        src: Int[Array, "*b s"],
        tgt: Int[Array, "*b t"],
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
        tgt_padding_mask: Bool[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t v"]:
        """Log-probabilities of the next target token at each position, in float32.

        Arguments:
            src: source ids, `(b, s)` or `(s,)`.
            tgt: target ids so far, beginning with the start token, `(b, t)` or `(t,)`.
            src_mask: booleans (True = may attend) that broadcast to `(b, num_heads, s, s)`, or an
                `AttentionMask`.
            tgt_mask: the same for `(b, num_heads, t, t)`; and-ed with the causal mask.
            src_tgt_mask: the same for `(b, num_heads, t, s)`.
            key: PRNG key for dropout while training; None means inference.
            src_padding_mask: shape of `src`, True where a token is real.
            tgt_padding_mask: shape of `tgt`, True where a token is real.

        Returns:
            `(b, t, tgt_vocab_size)`, or `(t, tgt_vocab_size)` without a batch axis.

        Raises:
            ValueError: if tokens are not ids within the vocabularies, are empty or too long, or a
                mask has the wrong shape or type.
        """
        masks = src_mask, tgt_mask, src_tgt_mask
        padding = {"src_padding_mask": src_padding_mask, "tgt_padding_mask": tgt_padding_mask}
        return jax.nn.log_softmax(self.logits(src, tgt, *masks, key, **padding))

    def logits(
        self,
        src: Int[Array, "*b s"],
        tgt: Int[Array, "*b t"],
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
        tgt_padding_mask: Bool[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t v"]:
        """What `__call__` gives, before the log-softmax."""
        src_key, tgt_key = split_key(key, 2)
        memory = self.encode(src, src_mask, src_key, src_padding_mask=src_padding_mask)
        hidden = self.decode(
            tgt,
            memory,
            tgt_mask,
            src_tgt_mask,
            tgt_key,
            src_padding_mask=src_padding_mask,
            tgt_padding_mask=tgt_padding_mask,
        )
        return self.project(hidden)

    def encode(
        self,
        src: Int[Array, "*b s"],
        src_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
    ) -> Float[Array, "*b s d"]:
        """The encoder's output; arguments as for `__call__`."""
        embedding = self._source_embedding
        return _encode(embedding, self.encoder, src, src_mask, key, src_padding_mask, "src")

    def decode(
        self,
        tgt: Int[Array, "*b t"],
        encoder_output: Float[Array, "*b s d"],
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
        tgt_padding_mask: Bool[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t d"]:
        """The hidden states of the target before the output layer; arguments as for `__call__`."""
        return self.forward(
            tgt,
            encoder_output,
            tgt_mask,
            src_tgt_mask,
            key,
            src_padding_mask=src_padding_mask,
            tgt_padding_mask=tgt_padding_mask,
        )[0]

    def forward(
        self,
        tgt: Int[Array, "*b t"],
        encoder_output: Float[Array, "*b s d"] | None = None,
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
        tgt_padding_mask: Bool[Array, "*b t"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        """What `decode` gives, and the cache extended by these tokens.

        With a cache (from `init_cache` or the call before) the encoder's output is not needed.
        """
        cross = as_mask(src_tgt_mask)
        if src_padding_mask is not None:
            source = src_padding_mask.shape if encoder_output is None else encoder_output.shape[:-1]
            check_padding_mask(src_padding_mask, source, "src_padding_mask")
            if cross.k_positions is not None:
                raise ValueError(
                    "src_tgt_mask with k_positions already says which source tokens are padding, "
                    "got src_padding_mask as well. Give one of the two."
                )
            cross = cross.replace(k_positions=padding_to_positions(jnp.asarray(src_padding_mask)))
        return _decode(
            self.tgt_embedding,
            self.decoder,
            tgt,
            encoder_output,
            tgt_mask,
            cross,
            key,
            tgt_padding_mask,
            cache,
            "tgt",
        )

    def project(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Logits from hidden states."""
        return _project(self.output, self.tgt_embedding, hidden)

    def init_cache(self, encoder_output: Float[Array, "b s d"], slots: int) -> Cache:
        """An empty cache for `slots` target tokens, with the encoder's keys and values."""
        batch_size = encoder_output.shape[0]
        return _init_cache(self.tgt_embedding, self.decoder, batch_size, slots, encoder_output)

    def generate(
        self,
        src: Tokens,
        max_length: int,
        start_token: int,
        end_token: int | Sequence[int] | None,
        temperature: Numbers = 1.0,
        key: Keys | None = None,
        *,
        top_k: Numbers | None = None,
        top_p: Numbers | None = None,
        src_padding_mask: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Target sequences for the source, beginning with `start_token`.

        Arguments:
            src: source ids, `(b, s)` or `(s,)`.
            max_length: length of the result, the start token included.
            start_token: the first target token.
            end_token: a row ends with this token (one or several ids) and is filled with it then.
            temperature, key, top_k, top_p, **options: as for `TransformerLM.generate`.
            src_padding_mask: shape of `src`, True where a token is real.

        Returns:
            int32, `(b, max_length)`, or `(max_length,)` for a source without a batch axis.

        Raises:
            ValueError: if an option is out of its range or would be without effect, or
                `max_length` is beyond `max_seq_length`.
            FloatingPointError: if the logits are NaN.
        """
        return generate_from_source(
            partial(Seq2SeqStep, self),
            src,
            max_length,
            start_token,
            src_padding_mask,
            src_vocab_size=self.src_vocab_size,
            max_source_length=self.src_embedding.max_seq_length,
            vocab_size=self.tgt_vocab_size,
            max_seq_length=self.max_seq_length,
            options=gather(end_token, temperature, top_k, top_p, key, dict(options)),
        )

    def stream(
        self,
        src: Tokens,
        max_length: int,
        start_token: int,
        *,
        src_padding_mask: ArrayLike | None = None,
        **options: Unpack[AllOptions],
    ) -> Iterator[Int[Array, "*b"]]:
        """The tokens that `generate` gives after `start_token`, one by one as they come.

        Yields:
            int32, `(b,)`, or `()` for a source without a batch axis; until all rows have ended.
        """
        return generate_from_source(
            partial(Seq2SeqStep, self),
            src,
            max_length,
            start_token,
            src_padding_mask,
            src_vocab_size=self.src_vocab_size,
            max_source_length=self.src_embedding.max_seq_length,
            vocab_size=self.tgt_vocab_size,
            max_seq_length=self.max_seq_length,
            options=dict(options),
            decode=stream,
        )

    def score(
        self,
        src: Tokens,
        tgt: Tokens,
        src_padding_mask: ArrayLike | None = None,
        tgt_padding_mask: ArrayLike | None = None,
    ) -> Float[Array, "*b t"]:
        """The log-probability of each target token given those before it and the source.

        Returns:
            float32, shape of `tgt`; 0 for padding and for the first token of each row.

        Raises:
            ValueError: if tokens are not ids within the vocabularies, or too long.
        """
        return score_with_source(
            partial(Seq2SeqStep, self),
            src,
            tgt,
            src_padding_mask,
            tgt_padding_mask,
            src_vocab_size=self.src_vocab_size,
            max_source_length=self.src_embedding.max_seq_length,
            vocab_size=self.tgt_vocab_size,
            max_seq_length=self.max_seq_length,
        )

    @property
    def _source_embedding(self) -> TransformerEmbedding:
        # With share_embeddings the target's table is the only one.
        if self.src_embedding.token_embedding is not None:
            return self.src_embedding
        return self.src_embedding.with_tokens(self.tgt_embedding.token_embedding)


class TransformerEncoder(eqx.Module):
    """An encoder-only model: hidden states in which every token has seen every other.

    Arguments as for `TransformerLM`, without an output layer.

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
        return _encode(self.embedding, self.encoder, tokens, mask, key, padding_mask)


def _encode(embedding, encoder, tokens, mask, key, padding_mask, name="tokens"):
    """Embed and encode: the side of the source."""
    tokens = check_tokens(tokens, embedding.vocab_size, name)
    mask = place(mask, tokens.shape, padding_mask, name=_padding_name(name))
    embedding_key, encoder_key = split_key(key, 2)
    x = embedding(tokens, embedding_key, positions=mask.q_positions)
    return encoder(x, mask, encoder_key)


def _decode(
    embedding,
    decoder,
    tokens,
    encoder_output,
    mask,
    cross_mask,
    key,
    padding_mask,
    cache,
    name="tokens",
):
    """Embed and decode: the side of the target."""
    tokens = check_tokens(tokens, embedding.vocab_size, name)
    if cache is not None and tokens.shape[:-1] != cache.positions.shape[:-1]:
        raise ValueError(
            f"{name} must have shape (batch, t) with the batch of the cache, "
            f"{cache.positions.shape[0]}, got {tokens.shape}."
        )
    seen = None if cache is None else cache.token_counts
    mask = place(mask, tokens.shape, padding_mask, seen, _padding_name(name)).replace(causal=True)
    embedding_key, decoder_key = split_key(key, 2)
    x = embedding(tokens, embedding_key, positions=mask.q_positions)
    return decoder.forward(x, encoder_output, mask, cross_mask, decoder_key, cache)


def _padding_name(name: str) -> str:
    return "padding_mask" if name == "tokens" else f"{name}_padding_mask"


def _project(output, embedding, hidden):
    return output.logits(hidden, embedding.token_embedding.weight if output.w is None else None)


def _init_cache(embedding, decoder, batch_size, slots, encoder_output=None) -> Cache:
    check_size(batch_size=batch_size, slots=slots)
    check_seq_length(slots, embedding.max_seq_length, "a cache")
    return decoder.init_cache(batch_size, slots, encoder_output)
