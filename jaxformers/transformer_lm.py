"""The decoder-only language model."""

from collections.abc import Sequence
from typing import Any, Unpack

import equinox as eqx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Integer, PRNGKeyArray

from jaxformers.calls import read_text, with_targets
from jaxformers.checks import (
    check_key,
    check_seq_length,
    check_size,
    explain_options,
)
from jaxformers.decoder import Cache, Decoder
from jaxformers.embedding import TransformerEmbedding
from jaxformers.generation.generate import generate
from jaxformers.generation.options import AllOptions, Options
from jaxformers.generation.request import gather
from jaxformers.generation.sampling import Keys, Numbers
from jaxformers.generation.scoring import score
from jaxformers.generation.stream import TokenStream, stream
from jaxformers.hf.methods import loads, save_pretrained
from jaxformers.ids import Tokens
from jaxformers.layers import split_key
from jaxformers.log_probs import log_probs_of, log_softmax
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.one_program import TokenRows, one_program
from jaxformers.origin import Origin
from jaxformers.output import OutputLayer, check_output
from jaxformers.pieces import Pieces, build_embedding, build_output, check_pieces
from jaxformers.row_lengths import follow
from jaxformers.sites import scope


class TransformerLM(eqx.Module):
    """A decoder-only language model: each token is predicted from those before it.

    The shape of GPT-2 and Llama (Radford et al. 2019).

    Arguments:
        vocab_size: number of tokens v.
        d_model: width of the residual stream, 512.
        num_heads: attention heads, 8.
        num_layers: decoder layers, 6.
        d_ff: width inside the feed-forwards, 2048.
        max_seq_length: longest sequence of the sinusoids or the learned table, 512.
        dropout_rate: dropout on the embeddings and on what each sublayer writes, 0.1.
        learnable_pos: a learned table of positions instead of sinusoids.
        tie_embeddings: whether the output layer uses the token table (Press and Wolf 2017).
        embedding_scale: factor on the token vectors; None is `sqrt(d_model)`, as in the paper.
        final_norm: whether a norm ends the stack; None is unless the layers are post-norm.
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
    output: OutputLayer | None
    origin: Origin | None = eqx.field(static=True)

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
        sizes = d_model, max_seq_length, learnable_pos, dropout_rate, embedding_scale
        self.embedding, stack_pieces = build_embedding(vocab_size, *sizes, embedding_key, **pieces)
        self.decoder = Decoder(
            num_layers,
            d_model,
            num_heads,
            d_ff,
            dropout_rate,
            cross_attention=False,
            final_norm=final_norm,
            key=decoder_key,
            **stack_pieces,
        )
        self.output = build_output(
            d_model, self.embedding.table.shape, tie_embeddings, output_key, **pieces
        )
        self.origin = None

    @property
    def vocab_size(self) -> int:
        return self.embedding.vocab_size

    @property
    def max_seq_length(self) -> int | None:
        """The longest sequence the position scheme knows; None if there is no limit."""
        return self.embedding.max_seq_length

    @explain_options
    def __call__(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
        positions: Int[Array, "*b t"] | None = None,
        segment_ids: Int[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t v"]:
        """Returns log-probabilities of the next token at each position, in float32.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            mask: booleans (True = may attend) that broadcast to `(b, num_heads, t, t)`, or an
                `AttentionMask`; and-ed with the causal mask.
            key: PRNG key for dropout while training; None means inference.
            padding_mask: shape of `tokens`, True where a token is real. Positions are counted
                over the real tokens, so left and right padding give the same.
            positions: integers of the shape of `tokens`, -1 for padding; instead of a padding mask.
            segment_ids: integers of the shape of `tokens`, the document of each token in packed
                rows. A token sees its own document, whose positions begin with 0 if not given.

        Returns:
            `(b, t, vocab_size)`, or `(t, vocab_size)` for tokens without a batch axis.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, are empty or too long, or a
                mask has the wrong shape or type; or the model has no output layer.
        """
        check_output(self)  # said before anything is computed
        places = dict(padding_mask=padding_mask, positions=positions, segment_ids=segment_ids)
        rows = read_text(self, tokens, mask, None, **places)
        return one_program(_log_probs, self, rows, key=key)

    @explain_options
    def logits(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
        positions: Int[Array, "*b t"] | None = None,
        segment_ids: Int[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t v"]:
        """Returns the logits of the next token; `__call__` gives their log-softmax."""
        check_output(self)
        places = dict(padding_mask=padding_mask, positions=positions, segment_ids=segment_ids)
        rows = read_text(self, tokens, mask, None, **places)
        return one_program(_logits, self, rows, key=key)

    @explain_options
    def log_probs_of(
        self,
        tokens: Int[Array, "*b t"],
        targets: Integer[ArrayLike, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
        positions: Int[Array, "*b t"] | None = None,
        segment_ids: Int[Array, "*b t"] | None = None,
    ) -> Float[Array, "*b t"]:
        """Returns the log-probability of each target, for a loss of your own.

        These are the entries of `model(tokens)` for the targets, without the rest. So they take
        less time and memory, above all under a gradient. Rows of a long text and a large vocabulary
        are taken in chunks, whose logits a gradient computes twice.

        Arguments as for `__call__`, and:
            targets: the token that follows each of `tokens`, in their shape; -100 for none.

        Returns:
            float32, shape of `targets`; 0 for targets of -100 and of padding.

        Raises:
            ValueError: as `__call__` does, or if a target is not in the vocabulary. Under `jit`,
                where values are not known, such a target has the log-probability NaN.

        Example:
            >>> def loss(model):
            ...     return -model.log_probs_of(tokens[:, :-1], tokens[:, 1:]).mean()
            >>> value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)
            >>> print(value.shape, gradient.output.w.shape)
            () (16, 65)
        """
        check_output(self)
        places = dict(padding_mask=padding_mask, positions=positions, segment_ids=segment_ids)
        rows = read_text(self, tokens, mask, None, **places)
        rows = with_targets(rows, targets, self.vocab_size)
        return one_program(_log_probs_of, self, rows, key=key)

    @explain_options
    def forward(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        *,
        padding_mask: Bool[Array, "*b t"] | None = None,
        positions: Int[Array, "*b t"] | None = None,
        segment_ids: Int[Array, "*b t"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        """Returns the hidden states before the output layer, and the cache with these tokens.

        Arguments as for `__call__`, and:
            cache: from `init_cache` or the call before, if `tokens` follow tokens already seen. It
                keeps no booleans of a mask: tokens that `LongScaling` has read again attend to all
                tokens before them. Its rows are one document each, so it goes with no segments.
        """
        places = dict(padding_mask=padding_mask, positions=positions, segment_ids=segment_ids)
        rows = read_text(self, tokens, mask, cache, **places)
        if cache is None:
            return one_program(_hidden, self, rows, key=key), None
        return self._forward(rows.tokens, rows.mask, key, follow(self, cache, rows.mask))

    def logits_of(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Returns the logits that hidden states give, or raises if there is no output layer."""
        output = check_output(self)
        return output.logits(hidden, self.embedding.table if output.tied else None)

    def init_cache(self, batch_size: int, slots: int) -> Cache:
        """Returns an empty cache for `slots` tokens in each of `batch_size` sequences."""
        check_size(batch_size=batch_size, slots=slots)
        check_seq_length(slots, self.max_seq_length, "a cache")
        return self.decoder.init_cache(batch_size, slots)

    from_pretrained, save_pretrained = loads("lm"), save_pretrained

    @explain_options
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
        """Returns the prompt and `max_new_tokens` tokens that continue it.

        Arguments:
            prompt: ids, `(b, t)` or `(t,)`.
            max_new_tokens: how many tokens to add.
            end_token: a row ends with this token (one or several ids); None is that of the
                checkpoint the model came from, `[]` is none.
            temperature: what logits are divided by before sampling, above 0. Near 0 the most
                probable token is certain; for 0 itself leave out `key`.
            top_k: sample from the k most probable tokens.
            top_p: sample from the fewest tokens that hold this much probability, in (0, 1]. Tokens
                tied with the last one are kept as well; transformers keeps some of those.
            padding_mask: shape of `prompt`, True where a token is real; padding may be anywhere.
            key: PRNG key to sample with, or one per row; None takes the most probable token.
                A row's tokens depend on its key (of one key: on `fold_in(key, row)`), never on
                the other rows.
            **options: see `Options`. Special tokens that are not given are those of the checkpoint
                the model came from, if it came from one.

        Numbers for sampling may be arrays of one per row.

        Returns:
            int32, `(b, t + max_new_tokens)`, or `(t + max_new_tokens,)` for a prompt without a
            batch axis. A `Generation` with more if an option asks for that.

        Raises:
            ValueError: if an option is out of its range or would be without effect, or the new
                tokens go beyond `max_seq_length`.
            FloatingPointError: if the logits are NaN.

        Warns:
            UserWarning: once, if rows begin or end with padding and there is no mask; if rows grow
                beyond the length that the model's checkpoint was trained with; or if the checkpoint
                asks for beams, sampling or penalties of which the call says nothing.
        """
        given = gather(end_token, temperature, top_k, top_p, key, dict(options))
        return generate(self, prompt, max_new_tokens, given, padding_mask)

    @explain_options
    def stream(
        self,
        prompt: Tokens,
        max_new_tokens: int,
        *,
        padding_mask: ArrayLike | None = None,
        **options: Unpack[AllOptions],
    ) -> TokenStream:
        """Returns the new tokens of `generate` for the same arguments, one by one as they come.

        Returns:
            An iterator of int32, `(b,)`, or `()` for a prompt without a batch axis; until all rows
            have ended. Its attributes `cache` and `finish_reason` are explained at `TokenStream`.

        Example:
            >>> [token.shape for token in model.stream(prompt, 3)]
            [(1,), (1,), (1,)]
        """
        return stream(self, prompt, max_new_tokens, dict(options), padding_mask)

    @explain_options
    def score(self, tokens: Tokens, padding_mask: ArrayLike | None = None) -> Float[Array, "*b t"]:
        """Returns the log-probability of each token given those before it.

        Each row is read once, so that positions whose angles depend on how long a row is
        (`LongScaling`, `DynamicScaling`) have those of the whole row for all its tokens. Beyond the
        original length that is not what `generate(..., return_scores=True)` gives, which knew of
        each token only those before it.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            padding_mask: shape of `tokens`, True where a token is real.

        Returns:
            float32, shape of `tokens`; 0 for padding and for the first token of each row.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, or too long.
        """
        return score(self, tokens, padding_mask)

    def _forward(
        self,
        tokens: Int[Array, "*b t"],
        mask: AttentionMask,
        key: PRNGKeyArray | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        embedding_key, decoder_key = split_key(key, 2)
        with scope("embedding"):
            x = self.embedding(tokens, embedding_key, positions=mask.q_positions)
        return self.decoder.forward(x, None, mask, as_mask(None), decoder_key, cache, tokens)


def _hidden(
    model: TransformerLM, rows: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t d"]:
    return model._forward(rows.tokens, rows.mask, key, None)[0]


def _logits(
    model: TransformerLM, rows: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t v"]:
    return model.logits_of(_hidden(model, rows, key=key))


def _log_probs(
    model: TransformerLM, rows: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t v"]:
    return log_softmax(_logits(model, rows, key=key))


def _log_probs_of(
    model: TransformerLM, rows: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t"]:
    hidden = _hidden(model, rows, key=key)
    return log_probs_of(model.logits_of, hidden, rows.targets)  # type: ignore[arg-type]
