"""The encoder: a stack of layers, each with self-attention and a feed-forward."""

from collections.abc import Callable, Sequence
from typing import Unpack

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.attention import MultiHeadAttention
from jaxformers.checks import check_activations, check_key, check_size
from jaxformers.layer_stack import Rematerialization, ScannedLayers, run_layers
from jaxformers.layers import as_module, split_key
from jaxformers.masks import Mask, as_mask
from jaxformers.pieces import (
    MODEL_PIECES,
    STACK_PIECES,
    Pieces,
    build_feed_forward,
    build_final_norm,
    build_residual,
    build_self_attention,
    check_pieces,
    layer_pieces,
    read_parallel,
    take_score_bias,
)
from jaxformers.positions.scheme import BiasPosition
from jaxformers.residual import Joint, Parallel, write
from jaxformers.sites import scope, site


class EncoderLayer(eqx.Module):
    """Self-attention, then a feed-forward, each joined to the residual stream.

    Arguments:
        d_model: width of the residual stream.
        num_heads: attention heads.
        d_ff: width inside the feed-forward.
        dropout_rate: dropout on what each sublayer writes.
        key: PRNG key, required.
        **pieces: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> layer = EncoderLayer(64, 8, 256, key=jax.random.key(0))
        >>> layer(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    self_attention: MultiHeadAttention
    self_attention_residual: Joint
    feed_forward: Callable = eqx.field(converter=as_module)
    feed_forward_residual: Joint
    parallel: Parallel | None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout_rate: float = 0.1,
        *,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self), STACK_PIECES)
        attention_key, feed_forward_key = split_key(check_key(key), 2)
        self.self_attention = build_self_attention(d_model, num_heads, attention_key, **pieces)
        self.self_attention_residual = build_residual(d_model, dropout_rate, **pieces)
        self.feed_forward = build_feed_forward(d_model, d_ff, feed_forward_key, **pieces)
        self.parallel = read_parallel(**pieces)
        self.feed_forward_residual = build_residual(d_model, dropout_rate, self.parallel, **pieces)

    def __call__(
        self,
        x: Float[Array, "*b t d"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns the residual stream after this layer.

        Arguments:
            x: `(b, t, d_model)`, or `(t, d_model)`.
            mask: an `AttentionMask`, or booleans that broadcast to `(b, num_heads, t, t)`, True
                where a query may attend.
            key: PRNG key for dropout while training; None means inference.

        Raises:
            ValueError: if shapes or types do not fit.
        """
        check_activations(x, self.self_attention.d_model)
        weights_key, attention_key, feed_forward_key = split_key(key, 3)
        with scope("self_attention"):
            before, seen = x, self.self_attention_residual.read(x)
            y = self.self_attention(seen, mask=mask, key=weights_key)
            x = write(self.self_attention_residual, x, y, attention_key)
        x = site(x, "residual_between")

        with scope("feed_forward"):
            source = x if self.parallel is None else self.parallel.source(before, seen)
            y = self.feed_forward(self.feed_forward_residual.read(source))
            x = write(self.feed_forward_residual, x, y, feed_forward_key)
        return site(x, "residual_after")


class Encoder(eqx.Module):
    """A stack of encoder layers, with a norm at its end unless the layers are post-norm.

    Arguments:
        num_layers: how many layers.
        d_model: width of the residual stream.
        num_heads: attention heads.
        d_ff: width inside the feed-forwards.
        dropout_rate: dropout on what each sublayer writes.
        final_norm: whether there is a norm at the end; by default there is one, except after
            `PostNorm` and `NoNorm`.
        layer_order: the order in which the layers run. A layer may run more than once, as in
            `[0] * 12` (ALBERT, Lan et al. 2020). By default each layer runs once.
        key: PRNG key, required.
        **pieces: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> encoder = Encoder(6, 64, 8, 256, key=jax.random.key(0))
        >>> encoder(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    layers: tuple[EncoderLayer, ...] | ScannedLayers
    norm: Callable | None
    score_bias: BiasPosition | None
    rematerialization: Rematerialization | None
    layer_order: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout_rate: float = 0.1,
        *,
        final_norm: bool | None = None,
        layer_order: Sequence[int] | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_size(num_layers=num_layers)
        check_pieces(pieces, type(self), MODEL_PIECES)
        self.score_bias, pieces = take_score_bias(pieces)
        self.layers = tuple(
            EncoderLayer(
                d_model, num_heads, d_ff, dropout_rate, key=layer_key, **layer_pieces(pieces, i)
            )
            for i, layer_key in enumerate(split_key(check_key(key), num_layers))
        )
        self.norm = build_final_norm(d_model, final_norm, **pieces)
        self.rematerialization = None
        self.layer_order = order = None if layer_order is None else tuple(layer_order)
        whole = order is None or all(type(i) is int for i in order)
        if order is not None and not (whole and set(order) == set(range(num_layers))):
            raise ValueError(
                f"layer_order must name each of the {num_layers} layers, 0 to {num_layers - 1}, at "
                f"least once and no other, got {layer_order!r}."
            )

    @scope("encoder")
    def __call__(
        self,
        x: Float[Array, "*b t d"],
        mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns the encoded sequence; arguments and errors are those of `EncoderLayer`."""
        mask = as_mask(mask).biased_by(self.score_bias)
        order, layers = self.layer_order, self.layers
        layers = layers if order is None else tuple(layers[i] for i in order)

        def step(layer, x, key, cache):
            return layer(x, mask, key), cache

        x, _ = run_layers(layers, step, x, key, rematerialization=self.rematerialization)
        return site(x if self.norm is None else self.norm(x), "hidden")
