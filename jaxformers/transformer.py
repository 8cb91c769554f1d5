"""The encoder-decoder."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from jaxformers.checks import (
    check_activations,
    check_flag,
    check_key,
    check_padding_mask,
    check_seq_length,
    check_size,
    check_tokens,
    check_usable,
    explain_options,
)
from jaxformers.decoder import Cache, Decoder
from jaxformers.embedding import TransformerEmbedding
from jaxformers.encoder import Encoder
from jaxformers.generation.generate import generate, stream
from jaxformers.generation.options import AllOptions, Options
from jaxformers.generation.prompts import begin_target, read_source
from jaxformers.generation.request import gather
from jaxformers.generation.sampling import Keys, Numbers
from jaxformers.generation.scoring import score
from jaxformers.hf.load import load
from jaxformers.hf.save import save
from jaxformers.ids import Tokens
from jaxformers.layers import split_key
from jaxformers.masks import AttentionMask, Mask, as_mask, padding_to_positions, place
from jaxformers.mistakes import warn_of_text
from jaxformers.origin import Origin
from jaxformers.output import OutputLayer
from jaxformers.pieces import Pieces, build_embedding, build_output, check_pieces
from jaxformers.row_lengths import follow


class Transformer(eqx.Module):
    """The encoder-decoder: target tokens are predicted from those before and from the source.

    Vaswani et al. 2017, Attention Is All You Need.

    Arguments:
        src_vocab_size: number of source tokens.
        tgt_vocab_size: number of target tokens v.
        d_model: width of the residual stream, 512.
        num_heads: attention heads, 8.
        num_encoder_layers: encoder layers, 6.
        num_decoder_layers: decoder layers, 6.
        d_ff: width inside the feed-forwards, 2048.
        max_seq_length: longest sequence of the sinusoids or the learned tables, 512.
        dropout_rate: dropout on the embeddings and on what each sublayer writes, 0.1.
        learnable_pos: learned tables of positions instead of sinusoids.
        tie_embeddings: whether the output layer uses the target's token table.
        share_embeddings: whether source and target use one token table; with `tie_embeddings`
            all three are one, as in the paper.
        decoder_num_heads: attention heads of the decoder; None is `num_heads`.
        decoder_d_ff: width inside the decoder's feed-forwards; None is `d_ff`.
        embedding_scale: factor on the token vectors; None is `sqrt(d_model)`, as in the paper.
        final_norm: whether norms end the stacks; None is unless the layers are post-norm.
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
    origin: Origin | None = eqx.field(static=True)

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
        decoder_num_heads: int | None = None,
        decoder_d_ff: int | None = None,
        embedding_scale: float | None = None,
        final_norm: bool | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self))
        check_flag(share_embeddings=share_embeddings)
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
        decoder_sizes = (
            d_model,
            num_heads if decoder_num_heads is None else decoder_num_heads,
            d_ff if decoder_d_ff is None else decoder_d_ff,
            dropout_rate,
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
            num_decoder_layers,
            *decoder_sizes,
            final_norm=final_norm,
            key=decoder_key,
            **decoder_pieces,
        )
        self.output = build_output(
            d_model, self.tgt_embedding.table.shape, tie_embeddings, output_key, **pieces
        )
        self.origin = None

    @property
    def src_vocab_size(self) -> int:
        return self._source_embedding.vocab_size

    @property
    def tgt_vocab_size(self) -> int:
        return self.tgt_embedding.vocab_size

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary that the model predicts, the target's."""
        return self.tgt_vocab_size

    @property
    def max_seq_length(self) -> int | None:
        """The longest sequence the position scheme knows; None if there is no limit."""
        return self.tgt_embedding.max_seq_length

    @explain_options
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

    @explain_options
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
        return self.logits_of(hidden)

    @explain_options
    def encode(
        self,
        src: Int[Array, "*b s"],
        src_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
    ) -> Float[Array, "*b s d"]:
        """The encoder's output; arguments as for `__call__`."""
        check_usable(model=self)
        src = check_tokens(src, self.src_vocab_size, "src")
        is_masked = src_mask is not None or src_padding_mask is not None
        mask = place(src_mask, src.shape, src_padding_mask, name="src_padding_mask")
        if key is None:  # of training nobody is warned
            limit, names = self.src_embedding.max_seq_length, ("src", "src_padding_mask")
            warn_of_text(src, is_masked, mask.q_positions, self.origin, limit, *names)
        embedding_key, encoder_key = split_key(key, 2)
        x = self._source_embedding(src, embedding_key, positions=mask.q_positions)
        return self.encoder(x, mask, encoder_key)

    @explain_options
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
        masks = tgt_mask, src_tgt_mask
        real = tgt_padding_mask
        return self.forward(
            tgt, encoder_output, *masks, key, padding_mask=real, src_padding_mask=src_padding_mask
        )[0]

    @explain_options
    def forward(
        self,
        tokens: Int[Array, "*b t"],
        encoder_output: Float[Array, "*b s d"] | None = None,
        mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
        src_padding_mask: Bool[Array, "*b s"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        """Returns the hidden states of target tokens, and the cache extended by these tokens.

        Arguments:
            tokens: ids of the target, `(b, t)` or `(t,)`.
            encoder_output: what `encode` gave; a cache has its keys and values already.
            mask, src_tgt_mask, key: as for `__call__`.
            padding_mask: shape of `tokens`, True where a token is real.
            src_padding_mask: shape of the source, True where a token is real; None is that of the
                cache.
            cache: from `init_cache` or the call before. It keeps no booleans of masks: tokens that
                `LongScaling` has read again attend to all tokens before them, and to the source as
                the last of these tokens does.
        """
        check_usable(model=self)
        tokens = check_tokens(tokens, self.tgt_vocab_size, "tgt")
        source = None if encoder_output is None else encoder_output.shape[:-1]
        cross = _hide_padding(as_mask(src_tgt_mask), src_padding_mask, source)
        seen = None if cache is None else cache.token_counts
        mask = place(mask, tokens.shape, padding_mask, seen, "tgt_padding_mask")
        mask = mask.replace(causal=True)
        if cache is not None:
            cache = follow(self, cache, mask, partial(_read, _last_query(cross)))
        return self._forward(tokens, mask, key, cache, encoder_output, cross)

    def logits_of(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Returns the logits that hidden states give."""
        return self.output.logits(hidden, self.tgt_embedding.table if self.output.tied else None)

    def init_cache(
        self,
        encoder_output: Float[Array, "b s d"],
        slots: int,
        *,
        src_padding_mask: Bool[Array, "b s"] | None = None,
    ) -> Cache:
        """Returns an empty cache for `slots` target tokens, with the source's keys and padding."""
        check_size(slots=slots)
        check_activations(encoder_output, self.tgt_embedding.d_model, "encoder_output")
        check_seq_length(slots, self.max_seq_length, "a cache")
        shape = encoder_output.shape[:-1]
        real = check_padding_mask(src_padding_mask, shape, "src_padding_mask")
        return self.decoder.init_cache(shape[0], slots, encoder_output, real)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_name: str | os.PathLike,
        *,
        dtype: Any = None,
        sharding: Sharding | Callable | None = None,
    ) -> "Transformer":
        """The model of a Hugging Face checkpoint; see `jaxformers.from_pretrained`.

        Raises:
            ValueError: if the checkpoint holds a model of another shape; and as there.
        """
        return load(path_or_hub_name, {"seq2seq": cls}, dtype, sharding)

    def save_pretrained(self, path: str | os.PathLike, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write the model as a checkpoint that transformers loads.

        The directory gets config.json, generation_config.json, the weights as safetensors, and the
        tokenizer's files if the model was loaded from a checkpoint that has them. A model that was
        built here gets the format of the family whose options it has.

        Arguments:
            path: directory, made if it is not there.
            max_shard_bytes: the most bytes of weights in one file.

        Raises:
            ValueError: if the model has a part that no family of transformers has, or its arrays
                are of different types.
            ImportError: if the `safetensors` package is missing.
        """
        save(self, path, max_shard_bytes)

    @explain_options
    def generate(
        self,
        src: Tokens,
        max_length: int,
        start_token: int | None = None,
        end_token: int | Sequence[int] | None = None,
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
            start_token: the first target token; None is that of the checkpoint the model came from.
            end_token: a row ends with this token (one or several ids); None is that of the
                checkpoint the model came from, `[]` is none.
            temperature, key, top_k, top_p, **options: as for `TransformerLM.generate`.
            src_padding_mask: shape of `src`, True where a token is real.

        Returns:
            int32, `(b, max_length)`, or `(max_length,)` for a source without a batch axis.

        Raises:
            ValueError: if an option is out of its range or would be without effect, or
                `max_length` is beyond `max_seq_length`.
            FloatingPointError: if the logits are NaN.
        """
        prompt, source = begin_target(self, src, max_length, start_token, src_padding_mask)
        given = gather(end_token, temperature, top_k, top_p, key, dict(options))
        return generate(self, prompt, max_length - 1, given, source=source)

    @explain_options
    def stream(
        self,
        src: Tokens,
        max_length: int,
        start_token: int | None = None,
        *,
        src_padding_mask: ArrayLike | None = None,
        **options: Unpack[AllOptions],
    ) -> Iterator[Int[Array, "*b"]]:
        """The tokens that `generate` gives after `start_token`, one by one as they come.

        Yields:
            int32, `(b,)`, or `()` for a source without a batch axis; until all rows have ended.
        """
        prompt, source = begin_target(self, src, max_length, start_token, src_padding_mask)
        return stream(self, prompt, max_length - 1, dict(options), source=source)

    @explain_options
    def score(
        self,
        src: Tokens,
        tgt: Tokens,
        src_padding_mask: ArrayLike | None = None,
        tgt_padding_mask: ArrayLike | None = None,
    ) -> Float[Array, "*b t"]:
        """The log-probability of each target token given those before it and the source.

        Angles that depend on how long a row is are those of the whole row, as in
        `TransformerLM.score`.

        Returns:
            float32, shape of `tgt`; 0 for padding and for the first token of each row.

        Raises:
            ValueError: if tokens are not ids within the vocabularies, or too long.
        """
        return score(self, tgt, tgt_padding_mask, read_source(self, src, src_padding_mask)[1])

    def _forward(
        self,
        tokens: Int[Array, "*b t"],
        mask: AttentionMask,
        key: PRNGKeyArray | None,
        cache: Cache | None,
        encoder_output: Float[Array, "*b s d"] | None,
        cross: AttentionMask,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        embedding_key, decoder_key = split_key(key, 2)
        x = self.tgt_embedding(tokens, embedding_key, positions=mask.q_positions)
        return self.decoder.forward(x, encoder_output, mask, cross, decoder_key, cache, tokens)

    @property
    def _source_embedding(self) -> TransformerEmbedding:
        # With share_embeddings the target's table is the only one.
        if self.src_embedding.token_embedding is not None:
            return self.src_embedding
        return self.src_embedding.with_tokens(self.tgt_embedding.token_embedding)


def _hide_padding(
    cross: AttentionMask, padding_mask: ArrayLike | None, source: tuple[int, ...] | None
) -> AttentionMask:
    """Returns the mask over the source with its padding hidden; `source` is its shape if known."""
    if padding_mask is None:
        return cross
    padding_mask = jnp.asarray(padding_mask)
    check_padding_mask(padding_mask, source or padding_mask.shape, "src_padding_mask")
    if cross.k_positions is not None:
        raise ValueError(
            "src_tgt_mask with k_positions already says which source tokens are padding, "
            "got src_padding_mask as well. Give one of the two."
        )
    return cross.replace(k_positions=padding_to_positions(padding_mask))


def _last_query(cross: AttentionMask) -> AttentionMask:
    """Returns the mask over the source that the last of its queries has."""
    if cross.explicit is None or cross.explicit.ndim < 2:
        return cross
    return cross.replace(explicit=cross.explicit[..., -1:, :])


def _read(
    cross: AttentionMask,
    model: Transformer,
    tokens: Int[Array, "b t"],
    mask: AttentionMask,
    cache: Cache,
) -> Cache | None:
    """Returns the cache extended by tokens that have the positions of `mask`."""
    return model._forward(tokens, mask, None, cache, None, cross)[1]
