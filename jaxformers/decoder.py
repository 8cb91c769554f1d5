"""The decoder: a stack of layers, with or without attention to an encoder."""

import dataclasses
from collections.abc import Callable
from typing import Unpack

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.attention import KV, MultiHeadAttention
from jaxformers.cache import Cache, LayerCache, empty_layer, remember
from jaxformers.checks import (
    check_activations,
    check_flag,
    check_key,
    check_same_batch,
    check_size,
)
from jaxformers.layer_stack import Rematerialization, ScannedLayers, run_layers
from jaxformers.layers import as_module, split_key
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.pieces import (
    MODEL_PIECES,
    STACK_PIECES,
    Pieces,
    build_cross_attention,
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
from jaxformers.row_lengths import scalings_of
from jaxformers.sites import scope, site


class DecoderLayer(eqx.Module):
    """Self-attention, attention to the encoder, then a feed-forward, each joined to the stream.

    Arguments:
        d_model: width of the residual stream.
        num_heads: attention heads.
        d_ff: width inside the feed-forward.
        dropout_rate: dropout on what each sublayer writes.
        cross_attention: False leaves out the attention to an encoder (decoder-only models).
        key: PRNG key, required.
        **pieces: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> layer = DecoderLayer(64, 8, 256, key=jax.random.key(0))
        >>> x, encoder_output = jnp.ones((2, 10, 64)), jnp.ones((2, 12, 64))
        >>> layer(x, encoder_output, create_causal_mask(10)).shape
        (2, 10, 64)
    """

    self_attention: MultiHeadAttention
    self_attention_residual: Joint
    cross_attention: MultiHeadAttention | None
    cross_attention_residual: Joint | None
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
        cross_attention: bool = True,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_pieces(pieces, type(self), STACK_PIECES)
        check_flag(cross_attention=cross_attention)
        self_key, cross_key, feed_forward_key = split_key(check_key(key), 3)
        self.self_attention = build_self_attention(d_model, num_heads, self_key, **pieces)
        self.self_attention_residual = build_residual(d_model, dropout_rate, **pieces)
        self.cross_attention = self.cross_attention_residual = None
        if cross_attention:
            self.cross_attention = build_cross_attention(d_model, num_heads, cross_key, **pieces)
            self.cross_attention_residual = build_residual(d_model, dropout_rate, **pieces)
        self.feed_forward = build_feed_forward(d_model, d_ff, feed_forward_key, **pieces)
        self.parallel = read_parallel(**pieces)
        self.feed_forward_residual = build_residual(d_model, dropout_rate, self.parallel, **pieces)
        if self.parallel and cross_attention:
            raise ValueError(
                "parallel is for layers without cross-attention, got both. Leave one out."
            )

    def __call__(
        self,
        x: Float[Array, "*b t d"],
        encoder_output: Float[Array, "*b s d"] | None = None,
        self_attn_mask: Mask | None = None,
        cross_attn_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns the residual stream after this layer.

        Arguments:
            x: `(b, t, d_model)`, or `(t, d_model)`.
            encoder_output: `(b, s, d_model)`; None for a layer without cross-attention.
            self_attn_mask: an `AttentionMask`, or booleans that broadcast to
                `(b, num_heads, t, t)`, True where a query may attend. Without a mask, queries see
                later tokens too.
            cross_attn_mask: the same for `(b, num_heads, t, s)`.
            key: PRNG key for dropout while training; None is inference.

        Raises:
            ValueError: if shapes or types do not fit, if cross-attention gets no encoder output, or
                if there is an encoder output and no cross-attention.
        """
        masks = as_mask(self_attn_mask), as_mask(cross_attn_mask)
        return self.forward(x, encoder_output, *masks, key)[0]

    def forward(
        self,
        x: Float[Array, "*b t d"],
        encoder_output: Float[Array, "*b s d"] | None,
        mask: AttentionMask,
        cross_mask: AttentionMask,
        key: PRNGKeyArray | None = None,
        cache: LayerCache | None = None,
        slot: Int[Array, ""] | int | None = 0,
    ) -> tuple[Float[Array, "*b t d"], LayerCache | None]:
        """Returns the stream after this layer, and the cache with the new keys and values.

        Training, prefill and decoding share this body. With a cache, `x` holds the tokens from
        `slot` on; without one, it holds all tokens.
        """
        check_activations(x, self.self_attention.d_model)
        check_same_batch(x=x, encoder_output=encoder_output)
        weights_key, self_key, cross_weights_key, cross_key, feed_forward_key = split_key(key, 5)

        with scope("self_attention"):
            before, seen = x, self.self_attention_residual.read(x)
            positions = mask.query_positions(x.shape[-2])
            q, kv = self.self_attention.project_all(seen, positions, positions)
            if cache is not None:
                cache, kv, mask = remember(cache, kv, mask, slot)
            y = self.self_attention.attend(q, kv, mask, key=weights_key)
            x = write(self.self_attention_residual, x, y, self_key)
        x = site(x, "residual_between")

        with scope("cross_attention"):
            cross_kv = self.project_cross(encoder_output) if cache is None else cache.cross
            if self.cross_attention and self.cross_attention_residual and cross_kv:
                read = self.cross_attention_residual.read(x)
                positions = cross_mask.query_positions(x.shape[-2])
                q = self.cross_attention.project_queries(read, positions)
                y = self.cross_attention.attend(q, cross_kv, cross_mask, key=cross_weights_key)
                x = write(self.cross_attention_residual, x, y, cross_key)
        x = site(x, "residual_between_2") if self.cross_attention and cross_kv else x

        with scope("feed_forward"):
            source = x if self.parallel is None else self.parallel.source(before, seen)
            y = self.feed_forward(self.feed_forward_residual.read(source))
            x = write(self.feed_forward_residual, x, y, feed_forward_key)
        return site(x, "residual_after"), cache

    def project_cross(self, encoder_output: Float[Array, "*b s d"] | None) -> KV | None:
        """Returns the keys and values that this layer makes of the encoder's output."""
        if self.cross_attention is None and encoder_output is None:
            return None
        if self.cross_attention is None or encoder_output is None:
            have = "no cross-attention" if self.cross_attention is None else "cross-attention"
            got = "none" if encoder_output is None else f"one of shape {encoder_output.shape}"
            raise ValueError(
                f"this decoder has {have}, and was given as encoder_output {got}. "
                "Build it with cross_attention=True exactly when there is an encoder."
            )
        check_activations(encoder_output, self.cross_attention.d_model, "encoder_output")
        positions = jnp.arange(encoder_output.shape[-2])
        return self.cross_attention.project(encoder_output, encoder_output, positions)


class Decoder(eqx.Module):
    """A stack of decoder layers, with a norm at its end unless the layers are post-norm.

    Arguments:
        num_layers: how many layers.
        d_model: width of the residual stream.
        num_heads: attention heads.
        d_ff: width inside the feed-forwards.
        dropout_rate: dropout on what each sublayer writes.
        cross_attention: False leaves out the attention to an encoder (decoder-only models).
        final_norm: whether there is a norm at the end; by default there is one, except after
            `PostNorm` and `NoNorm`.
        key: PRNG key, required.
        **pieces: see `Pieces`.

    Raises:
        ValueError: if sizes do not fit, an option is unknown, or there is no key.

    Example:
        >>> decoder = Decoder(6, 64, 8, 256, key=jax.random.key(0))
        >>> x, encoder_output = jnp.ones((2, 10, 64)), jnp.ones((2, 12, 64))
        >>> decoder(x, encoder_output, create_causal_mask(10)).shape
        (2, 10, 64)
    """

    layers: tuple[DecoderLayer, ...] | ScannedLayers
    norm: Callable | None
    score_bias: BiasPosition | None
    rematerialization: Rematerialization | None

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout_rate: float = 0.1,
        *,
        cross_attention: bool = True,
        final_norm: bool | None = None,
        key: PRNGKeyArray | None = None,
        **pieces: Unpack[Pieces],
    ):
        check_size(num_layers=num_layers)
        check_pieces(pieces, type(self), MODEL_PIECES)
        self.score_bias, pieces = take_score_bias(pieces)
        sizes = d_model, num_heads, d_ff, dropout_rate
        self.layers = tuple(
            DecoderLayer(
                *sizes, cross_attention=cross_attention, key=layer_key, **layer_pieces(pieces, i)
            )
            for i, layer_key in enumerate(split_key(check_key(key), num_layers))
        )
        self.norm = build_final_norm(d_model, final_norm, **pieces)
        self.rematerialization = None

    def __call__(
        self,
        x: Float[Array, "*b t d"],
        encoder_output: Float[Array, "*b s d"] | None = None,
        self_attn_mask: Mask | None = None,
        cross_attn_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*b t d"]:
        """Returns the decoded sequence; arguments and errors are those of `DecoderLayer`."""
        masks = as_mask(self_attn_mask), as_mask(cross_attn_mask)
        return self.forward(x, encoder_output, *masks, key)[0]

    @scope("decoder")
    def forward(
        self,
        x: Float[Array, "*b t d"],
        encoder_output: Float[Array, "*b s d"] | None,
        mask: AttentionMask,
        cross_mask: AttentionMask,
        key: PRNGKeyArray | None = None,
        cache: Cache | None = None,
        tokens: Int[Array, "*b t"] | None = None,
    ) -> tuple[Float[Array, "*b t d"], Cache | None]:
        """Returns the decoded sequence and the cache with the new keys and values.

        Training, prefill and decoding share this body.

        Arguments:
            x: `(b, t, d_model)`. With a cache, it holds the tokens that follow those in the cache.
            encoder_output: `(b, s, d_model)`. A cache has its keys and values already.
            mask: the mask of self-attention. With a cache, it must have `q_positions`.
            cross_mask: the mask of cross-attention.
            key: PRNG key for dropout while training; None is inference.
            cache: the keys and values of earlier tokens, from `init_cache`. Keys in it stay rotated
                as they are, so models read a row again where `LongScaling` changes its rotation.
            tokens: the ids that `x` was made from, which the cache keeps.
        """
        mask = mask.biased_by(self.score_bias)
        slot: Int[Array, ""] | int | None = 0
        caches: tuple[LayerCache, ...] | None = None
        if cache is not None:
            slot, caches = cache.length, cache.layers
            cache = cache.extend(mask.query_positions(x.shape[-2]), tokens)
            mask = mask.replace(k_positions=cache.positions)
            if cross_mask.k_positions is None:
                cross_mask = cross_mask.replace(k_positions=cache.source_positions)

        def step(layer, x, key, layer_cache):
            return layer.forward(x, encoder_output, mask, cross_mask, key, layer_cache, slot)

        x, written = run_layers(self.layers, step, x, key, caches, self.rematerialization)
        x = site(x if self.norm is None else self.norm(x), "hidden")
        if cache is not None and written is not None:
            cache = dataclasses.replace(cache, layers=written)
        return x, cache

    def init_cache(
        self,
        batch_size: int,
        slots: int,
        encoder_output: Float[Array, "b s d"] | None = None,
        source_positions: Int[Array, "b s"] | None = None,
    ) -> Cache:
        """Returns an empty cache for `slots` tokens, with the keys and values of the encoder.

        Arguments:
            batch_size: number of sequences.
            slots: how many tokens each may have, prompt, padding and new ones together.
            encoder_output: `(batch_size, s, d_model)` for a decoder with cross-attention.
            source_positions: `(batch_size, s)`, -1 where a token of the encoder is padding; None if
                there is none.
        """
        check_size(batch_size=batch_size, slots=slots)

        def empty(layer: DecoderLayer) -> LayerCache:
            heads = layer.self_attention
            sizes = batch_size, heads.num_kv_heads, slots, heads.head_dim
            cache = empty_layer(*sizes, heads.wk.dtype, heads.window)
            return cache._replace(cross=layer.project_cross(encoder_output))

        return Cache(
            layers=tuple(map(empty, self.layers)),
            tokens=jnp.zeros((batch_size, slots), jnp.int32),
            positions=jnp.full((batch_size, slots), -1, jnp.int32),
            length=jnp.zeros((), jnp.int32),
            rotated_for=jnp.zeros(batch_size, jnp.int32) if scalings_of(self) else None,
            source_positions=source_positions,
        )
