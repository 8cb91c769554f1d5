"""The encoder-decoder."""

from typing import Unpack

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, Float, Int, Integer, PRNGKeyArray

from jaxformers.calls import read_pair, read_source, read_target, with_targets
from jaxformers.checks import (
    check_activations,
    check_flag,
    check_key,
    check_seq_length,
    check_size,
    explain_options,
)
from jaxformers.decoder import Cache, Decoder
from jaxformers.embedding import TransformerEmbedding
from jaxformers.encoder import Encoder
from jaxformers.generation.targets import generate_target, score_target, stream_target
from jaxformers.hf.methods import loads, save_pretrained
from jaxformers.layers import split_key
from jaxformers.log_probs import log_probs_of, log_softmax
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.one_program import TokenRows, one_program
from jaxformers.origin import Origin
from jaxformers.output import OutputLayer, check_output
from jaxformers.pieces import Pieces, build_embedding, build_output, check_pieces
from jaxformers.places import (
    PairPlaces,
    SourcePlaces,
    TargetPlaces,
    of_target,
    place_source,
)
from jaxformers.row_lengths import follow
from jaxformers.sites import scope


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
    output: OutputLayer | None
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
        sizes = num_encoder_layers, d_model, num_heads, d_ff, dropout_rate
        self.encoder = Encoder(*sizes, final_norm=final_norm, key=encoder_key, **encoder_pieces)
        heads = num_heads if decoder_num_heads is None else decoder_num_heads
        width_within = d_ff if decoder_d_ff is None else decoder_d_ff
        sizes = num_decoder_layers, d_model, heads, width_within, dropout_rate
        self.decoder = Decoder(*sizes, final_norm=final_norm, key=decoder_key, **decoder_pieces)
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
        **places: Unpack[PairPlaces],
    ) -> Float[Array, "*b t v"]:
        """Returns log-probabilities of the next target token at each position, in float32.

        Arguments:
            src: source ids, `(b, s)` or `(s,)`.
            tgt: target ids so far, beginning with the start token, `(b, t)` or `(t,)`.
            src_mask: booleans (True = may attend) that broadcast to `(b, num_heads, s, s)`, or an
                `AttentionMask`.
            tgt_mask: the same for `(b, num_heads, t, t)`; and-ed with the causal mask.
            src_tgt_mask: the same for `(b, num_heads, t, s)`.
            key: PRNG key for dropout while training; None means inference.
            **places: `src_padding_mask` and `tgt_padding_mask`, True where a token is real;
                positions and segment ids: see `PairPlaces`.

        Returns:
            `(b, t, tgt_vocab_size)`, or `(t, tgt_vocab_size)` without a batch axis.

        Raises:
            ValueError: if tokens are not ids within the vocabularies, are empty or too long, or a
                mask has the wrong shape or type; or the model has no output layer.
        """
        check_output(self)  # said before anything is computed
        texts = read_pair(self, src, tgt, (src_mask, tgt_mask, src_tgt_mask), key, places)
        return one_program(_log_probs, self, *texts, key=key)

    @explain_options
    def logits(
        self,
        src: Int[Array, "*b s"],
        tgt: Int[Array, "*b t"],
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[PairPlaces],
    ) -> Float[Array, "*b t v"]:
        """Returns the logits of the next target token; `__call__` gives their log-softmax."""
        check_output(self)
        texts = read_pair(self, src, tgt, (src_mask, tgt_mask, src_tgt_mask), key, places)
        return one_program(_logits, self, *texts, key=key)

    @explain_options
    def log_probs_of(
        self,
        src: Int[Array, "*b s"],
        tgt: Int[Array, "*b t"],
        targets: Integer[ArrayLike, "*b t"],
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[PairPlaces],
    ) -> Float[Array, "*b t"]:
        """Returns the log-probability of each target, for a loss of your own.

        See `TransformerLM.log_probs_of`. Arguments as for `__call__`, and:
            targets: the token that follows each of `tgt`, in their shape; -100 for none.

        Example:
            >>> model = Transformer(9, 9, 16, 2, 1, 1, 32, 8, key=jax.random.key(0))
            >>> src, answer = jnp.array([[3, 4, 5]]), jnp.array([[1, 5, 4, 3, 2]])
            >>> model.log_probs_of(src, answer[:, :-1], answer[:, 1:]).shape
            (1, 4)
        """
        check_output(self)
        texts = read_pair(self, src, tgt, (src_mask, tgt_mask, src_tgt_mask), key, places)
        rows = with_targets(texts[1], targets, self.vocab_size)
        return one_program(_log_probs_of, self, texts[0], rows, key=key)

    @explain_options
    def encode(
        self,
        src: Int[Array, "*b s"],
        src_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[SourcePlaces],
    ) -> Float[Array, "*b s d"]:
        """Returns the encoder's output; arguments as for `__call__`."""
        return one_program(_memory, self, read_source(self, src, src_mask, key, places), key=key)

    @explain_options
    def decode(
        self,
        tgt: Int[Array, "*b t"],
        encoder_output: Float[Array, "*b s d"],
        tgt_mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[PairPlaces],
    ) -> Float[Array, "*b t d"]:
        """Returns the hidden states of the target; arguments as for `__call__`."""
        masks = tgt_mask, src_tgt_mask
        return self.forward(tgt, encoder_output, *masks, key, **of_target(places))[0]

    @explain_options
    def forward(
        self,
        tokens: Int[Array, "*b t"],
        encoder_output: Float[Array, "*b s d"] | None = None,
        mask: Mask | None = None,
        src_tgt_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        cache: Cache | None = None,
        **places: Unpack[TargetPlaces],
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        """Returns the hidden states of target tokens, and the cache with these tokens.

        Arguments:
            tokens: ids of the target, `(b, t)` or `(t,)`.
            encoder_output: from `encode`; a cache has its keys and values already.
            mask, src_tgt_mask, key: as for `__call__`.
            cache: from `init_cache` or the call before. It keeps no booleans of masks: tokens that
                `LongScaling` has read again attend to all tokens before them, and to the source as
                the last of these tokens does.
            **places: `padding_mask`, `positions` and `segment_ids` as for `TransformerLM`, and
                those of the source, whose padding a cache has already: see `TargetPlaces`.
        """
        source = None if encoder_output is None else encoder_output.shape[:-1]
        rows = read_target(self, tokens, mask, src_tgt_mask, source, cache, places)
        if cache is None:
            given = self, encoder_output
            return one_program(_hidden, given, rows, key=key, keep_shapes=True), None
        cross = as_mask(rows.cross)
        cache = follow(self, cache, rows.mask, cross)
        return self._forward(rows.tokens, rows.mask, key, cache, cross, encoder_output)

    def logits_of(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Returns the logits that hidden states give, or raises if there is no output layer."""
        output = check_output(self)
        return output.logits(hidden, self.tgt_embedding.table if output.tied else None)

    def init_cache(
        self,
        encoder_output: Float[Array, "b s d"],
        slots: int,
        **places: Unpack[SourcePlaces],
    ) -> Cache:
        """Returns an empty cache for `slots` target tokens, with the source's keys and padding.

        Arguments:
            encoder_output: `(b, s, d_model)`, from `encode`.
            slots: how many tokens each target may have, padding included.
            **places: `src_padding_mask` or `src_positions` as they were given to `encode`.
        """
        check_size(slots=slots)
        check_activations(encoder_output, self.tgt_embedding.d_model, "encoder_output")
        check_seq_length(slots, self.max_seq_length, "a cache")
        shape = encoder_output.shape[:-1]
        source = place_source(None, shape, None, **places)
        return self.decoder.init_cache(shape[0], slots, encoder_output, source.k_positions)

    from_pretrained, save_pretrained = loads("seq2seq"), save_pretrained

    generate, stream, score = generate_target, stream_target, score_target

    def _forward(
        self,
        tokens: Int[Array, "*b t"],
        mask: AttentionMask,
        key: PRNGKeyArray | None,
        cache: Cache | None,
        cross: AttentionMask,
        encoder_output: Float[Array, "*b s d"] | None = None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        embedding_key, decoder_key = split_key(key, 2)
        with scope("tgt_embedding"):
            x = self.tgt_embedding(tokens, embedding_key, positions=mask.q_positions)
        return self.decoder.forward(x, encoder_output, mask, cross, decoder_key, cache, tokens)

    @property
    def _source_embedding(self) -> TransformerEmbedding:
        # With share_embeddings the target's table is the only one.
        if self.src_embedding.token_embedding is not None:
            return self.src_embedding
        return self.src_embedding.with_tokens(self.tgt_embedding.token_embedding)


def _memory(
    model: Transformer, src: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b s d"]:
    embedding_key, encoder_key = split_key(key, 2)
    with scope("src_embedding"):
        x = model._source_embedding(src.tokens, embedding_key, positions=src.mask.q_positions)
    return model.encoder(x, src.mask, encoder_key)


def _hidden(
    given: tuple[Transformer, Float[Array, "*b s d"] | None],
    tgt: TokenRows,
    *,
    key: PRNGKeyArray | None,
) -> Float[Array, "*b t d"]:
    model, memory = given
    return model._forward(tgt.tokens, tgt.mask, key, None, as_mask(tgt.cross), memory)[0]


def _hidden_of_pair(
    model: Transformer, src: TokenRows, tgt: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t d"]:
    src_key, tgt_key = split_key(key, 2)
    return _hidden((model, _memory(model, src, key=src_key)), tgt, key=tgt_key)


def _logits(
    model: Transformer, src: TokenRows, tgt: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t v"]:
    return model.logits_of(_hidden_of_pair(model, src, tgt, key=key))


def _log_probs(
    model: Transformer, src: TokenRows, tgt: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t v"]:
    return log_softmax(_logits(model, src, tgt, key=key))


def _log_probs_of(
    model: Transformer, src: TokenRows, tgt: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t"]:
    hidden = _hidden_of_pair(model, src, tgt, key=key)
    return log_probs_of(model.logits_of, hidden, tgt.targets)  # type: ignore[arg-type]
