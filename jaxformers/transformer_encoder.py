"""The encoder-only model."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Unpack

import equinox as eqx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from jaxformers.axes import Letters
from jaxformers.calls import read_encoded
from jaxformers.checks import (
    check_callable,
    check_choice,
    check_flag,
    check_key,
    explain_options,
)
from jaxformers.embedding import TransformerEmbedding
from jaxformers.encoder import Encoder
from jaxformers.heads import POOLED, Classifier, pool, unit_length
from jaxformers.hf.methods import loads_encoder, save_pretrained
from jaxformers.layers import as_module, construct, split_key
from jaxformers.masks import Mask, as_mask
from jaxformers.one_program import TokenRows, one_program
from jaxformers.origin import Origin
from jaxformers.output import OutputLayer
from jaxformers.pieces import Pieces, build_embedding, build_output, check_pieces
from jaxformers.places import TextPlaces
from jaxformers.sites import scope


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
        final_norm: whether a norm ends the stack; None is unless the layers are post-norm.
        layer_order: which layer runs when, see `Encoder`.
        tie_embeddings: whether the output layer, if there is one, uses the token table.
        pooler: constructor `pooler(d_model, d_model, key=key)` of a module on the first token's
            hidden state, such as `partial(Dense, activation=jnp.tanh)` (BERT); None is none.
        classifier: constructor `classifier(d_model, key=key)`, such as
            `partial(Classifier, num_labels=3)`; None is none.
        key: PRNG key, required.
        **pieces: norms, feed-forwards, positions, heads and so on: see `Pieces`. An output layer
            is built only if there is one among them, `output=OutputLayer`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> model = TransformerEncoder(65, 64, 4, 2, 256, 128, key=jax.random.key(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    embedding: TransformerEmbedding
    encoder: Encoder
    output: OutputLayer | None
    pooler: Annotated[Callable | None, Letters(i="d", o="d")]
    classifier: Classifier | None
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
        embedding_scale: float | None = None,
        final_norm: bool | None = None,
        layer_order: Sequence[int] | None = None,
        tie_embeddings: bool = False,
        pooler: Callable | None = None,
        classifier: Callable | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self))
        embedding_key, encoder_key, output_key, head_key = split_key(check_key(key), 4)
        width = d_model, max_seq_length, learnable_pos, dropout_rate, embedding_scale
        self.embedding, stack_pieces = build_embedding(vocab_size, *width, embedding_key, **pieces)
        sizes = d_model, num_heads, d_ff, dropout_rate
        self.encoder = Encoder(
            num_layers,
            *sizes,
            final_norm=final_norm,
            layer_order=layer_order,
            key=encoder_key,
            **stack_pieces,
        )
        self.pooler = self.classifier = self.origin = None
        with_output = Pieces(output=None) | pieces
        self.output = build_output(
            d_model, self.embedding.table.shape, tie_embeddings, output_key, **with_output
        )
        given = {"pooler": pooler, "classifier": classifier}.items()
        check_callable(**{name: x for name, x in given if x is not None})
        pooler_key, classifier_key = split_key(head_key, 2)
        if pooler is not None:
            widths = {"d_in": d_model, "d_out": d_model}
            self.pooler = as_module(construct("pooler", pooler, widths, key=pooler_key))
        if classifier is not None:
            widths = {"d_model": d_model}
            self.classifier = construct("classifier", classifier, widths, key=classifier_key)
            if not isinstance(self.classifier, Classifier):
                raise ValueError(
                    "classifier must be a constructor of a Classifier, such as "
                    f"partial(Classifier, num_labels=3), got {classifier!r}."
                )
            if self.classifier.pooling == "pooler" and self.pooler is None:
                raise ValueError('a classifier that reads the "pooler" needs pooler=, got none.')

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
        token_types: ArrayLike | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns the hidden state of each token.

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            mask: booleans (True = may attend) that broadcast to `(b, num_heads, t, t)`, or an
                `AttentionMask`.
            key: PRNG key for dropout while training; None means inference.
            padding_mask: shape of `tokens`, True where a token is real.
            positions: integers of the shape of `tokens`, -1 for padding; instead of a padding mask.
            segment_ids: integers of the shape of `tokens`, the document of each token in packed
                rows. A token sees its own document, whose positions begin with 0 if not given.
            token_types: shape of `tokens`, the segment of each (BERT); None is 0.

        Raises:
            ValueError: if tokens are not ids within the vocabulary, are empty or too long, or a
                mask has the wrong shape or type.
        """
        places = dict(padding_mask=padding_mask, positions=positions, segment_ids=segment_ids)
        rows = read_encoded(self, tokens, mask, key, token_types, **places)
        return one_program(_hidden, self, rows, key=key)

    @explain_options
    def logits(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[TextPlaces],
    ) -> Float[Array, "*b t v"]:
        """Returns logits over the vocabulary for each token, of a masked language model.

        Arguments as for `__call__`.

        Raises:
            ValueError: if the model has no output layer; and as for `__call__`.
        """
        self._head("output", self.output)  # said before anything is computed
        rows = read_encoded(self, tokens, mask, key, **places)
        return one_program(_logits, self, rows, key=key)

    def logits_of(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Returns the logits that hidden states give, or raises if there is no output layer."""
        output = self._head("output", self.output)
        return output.logits(hidden, self.embedding.table if output.tied else None)

    @explain_options
    def pooled(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[TextPlaces],
    ) -> Float[Array, "*b d"]:
        """Returns the pooler's vector for the first real token.

        Arguments and errors as for `logits`; rows must be one document each.
        """
        self._head("pooler", self.pooler)  # said before anything is computed
        _check_unpacked(mask, places.get("segment_ids"))
        rows = read_encoded(self, tokens, mask, key, **places)
        return one_program(_pooled, self, rows, key=key, per_token=False)

    @explain_options
    def classify(
        self,
        tokens: Int[Array, "*b t"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        **places: Unpack[TextPlaces],
    ) -> Float[Array, "*b c"] | Float[Array, "*b t c"]:
        """Returns logits over the classes, for each sequence or each token as the classifier says.

        Arguments and errors as for `logits`; where sequences are classified, a row must be one.
        """
        classifier = self._head("classifier", self.classifier)
        if not (per_token := classifier.pooling == "none"):
            _check_unpacked(mask, places.get("segment_ids"))
        rows = read_encoded(self, tokens, mask, key, **places)
        return one_program(_classes, self, rows, key=key, per_token=per_token)

    @explain_options
    def embed(
        self,
        tokens: Int[Array, "*b t"],
        padding_mask: Bool[Array, "*b t"] | None = None,
        *,
        pooling: str = "mean",
        normalize: bool = True,
        positions: Int[Array, "*b t"] | None = None,
        token_types: ArrayLike | None = None,
    ) -> Float[Array, "*b d"]:
        """Returns one vector per sequence, for search and clustering (Reimers and Gurevych 2019).

        Arguments:
            tokens: ids, `(b, t)` or `(t,)`.
            padding_mask: shape of `tokens`, True where a token is real.
            pooling: "mean" over the real tokens, "first", "last", "max", "mean_sqrt" or
                "weighted_mean" (see `heads.pool`), or what the "pooler" gives.
            normalize: whether to scale the vectors to length 1, so that their product is the
                cosine.
            positions: integers of the shape of `tokens`, -1 for padding; instead of a padding mask.
            token_types: shape of `tokens`, the segment of each (BERT); None is 0.

        Raises:
            ValueError: if tokens, mask or pooling are not of this kind.

        Example:
            >>> model = TransformerEncoder(65, 64, 4, 2, 256, 128, key=jax.random.key(0))
            >>> model.embed(jnp.array([[1, 2, 3]])).shape
            (1, 64)
        """
        check_choice((*POOLED, "pooler"), pooling=pooling)
        check_flag(normalize=normalize)
        if pooling == "pooler":
            self._head("pooler", self.pooler)
        places = dict(padding_mask=padding_mask, positions=positions)
        rows = read_encoded(self, tokens, None, None, token_types, **places)
        return one_program(_embedding_of(pooling, normalize), self, rows, per_token=False)

    from_pretrained, save_pretrained = loads_encoder(), save_pretrained

    def _pool(
        self, hidden: Float[Array, "*b t d"], positions: Int[Array, "*#b t"], pooling: str
    ) -> Float[Array, "*b d"]:
        """Returns one vector per sequence, of `pool` or of the pooler."""
        if pooling != "pooler":
            return pool(hidden, positions, pooling)
        return self._head("pooler", self.pooler)(pool(hidden, positions, "first"))

    def _head(self, name: str, head: Any) -> Any:
        if head is None:
            what = "output layer (masked-LM head)" if name == "output" else name
            raise ValueError(
                f"this model has no {what}. Build it with {name}=, or load one that has."
            )
        return head


def _check_unpacked(mask: Mask | None, segment_ids: ArrayLike | None) -> None:
    if as_mask(mask).q_segments is not None or segment_ids is not None:
        raise ValueError(
            "one answer per row is for one document per row, got a mask with segments of several. "
            "Give each document a row."
        )


def _hidden(
    model: TransformerEncoder, rows: TokenRows, *, key: PRNGKeyArray | None = None
) -> Float[Array, "*b t d"]:
    embedding_key, encoder_key = split_key(key, 2)
    places = {"positions": rows.mask.q_positions, "token_types": rows.token_types}
    with scope("embedding"):
        x = model.embedding(rows.tokens, embedding_key, **places)
    return model.encoder(x, rows.mask, encoder_key)


def _logits(
    model: TransformerEncoder, rows: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b t v"]:
    return model.logits_of(_hidden(model, rows, key=key))


def _pooled(
    model: TransformerEncoder,
    rows: TokenRows,
    *,
    key: PRNGKeyArray | None = None,
    pooling: str = "pooler",
) -> Float[Array, "*b d"]:
    return model._pool(_hidden(model, rows, key=key), rows.positions, pooling)


def _classes(
    model: TransformerEncoder, rows: TokenRows, *, key: PRNGKeyArray | None
) -> Float[Array, "*b c"] | Float[Array, "*b t c"]:
    classifier: Any = model.classifier
    if classifier.pooling == "none":
        return classifier(_hidden(model, rows, key=key))
    if classifier.pooling == "late":
        return pool(classifier(_hidden(model, rows, key=key)), rows.positions, "mean")
    return classifier(_pooled(model, rows, key=key, pooling=classifier.pooling))


@functools.cache
def _embedding_of(pooling: str, normalize: bool) -> Callable[..., Array]:
    """Returns the body of `embed`, the same object whenever the arguments are the same."""

    def vectors(
        model: TransformerEncoder, rows: TokenRows, *, key: PRNGKeyArray | None
    ) -> Float[Array, "*b d"]:
        pooled = _pooled(model, rows, key=key, pooling=pooling)
        return unit_length(pooled) if normalize else pooled

    return vectors
