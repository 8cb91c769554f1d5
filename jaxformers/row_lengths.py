"""Angles that depend on how long a row is, where only a part of the row is at hand.

`LongScaling` and `DynamicScaling` rotate all tokens of a row by the length of that row. A call with
a cache sees the row's last tokens alone, and the keys before them are rotated already. So a part of
a row is read at the length of the whole (`at_lengths`), and a row that outgrows the angles of its
keys is read again from the tokens that the cache holds (`reread`).
"""

import dataclasses
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxformers.attention import KV
from jaxformers.cache import CHUNK, Cache, LayerCache, narrow
from jaxformers.checks import is_known
from jaxformers.layer_stack import unroll_layers
from jaxformers.masks import AttentionMask
from jaxformers.positions.length_scaling import DynamicScaling, LongScaling
from jaxformers.positions.scaling import Frequencies, RotaryScaling

BY_LENGTH = DynamicScaling, LongScaling


class _AtLength(eqx.Module):
    """A scaling as it is for rows of the given lengths, whatever part of them a call holds."""

    scaling: RotaryScaling
    lengths: Int[Array, " b"]

    def frequencies(self, theta: float, dim: int, positions: Int[Array, "*b t"]) -> Frequencies:
        return self.scaling.frequencies(theta, dim, self.lengths[:, None] - 1)


def scalings_of(decoder: Any, kinds: Any = BY_LENGTH) -> list[DynamicScaling | LongScaling]:
    """Returns the scalings of these kinds in a decoder's layers."""

    def is_one(x: Any) -> bool:
        return isinstance(x, kinds)

    return [x for x in jax.tree.leaves(decoder, is_leaf=is_one) if is_one(x)]


def at_lengths(model: Any, lengths: Int[Array, " b"]) -> Any:
    """Returns the model with the angles of rows of given lengths; others stay as they are."""
    if not scalings_of(model.decoder):
        return model

    def is_one(x: Any) -> bool:
        return isinstance(x, BY_LENGTH)

    decoder = jax.tree.map(  # lengths are of rows, so they cannot be stacked as layers are
        lambda x: _AtLength(x, lengths) if is_one(x) else x,
        unroll_layers(model.decoder),
        is_leaf=is_one,
    )
    return eqx.tree_at(lambda x: x.decoder, model, decoder)


def same_until(model: Any, lengths: Int[Array, " b"]) -> Int[Array, " b"] | None:
    """Returns the longest rows with the angles of rows of these lengths; None is no limit."""
    limits = [scaling.same_until(lengths) for scaling in scalings_of(model.decoder)]
    return reduce(jnp.minimum, limits) if limits else None


def follow(
    model: Any, cache: Cache, mask: AttentionMask, cross: AttentionMask | None = None
) -> Cache:
    """Returns the cache before tokens are read, with keys rotated for the length with these tokens.

    With `DynamicScaling` every token would change all angles: keys stay as they are.

    Arguments:
        model: the model whose cache it is.
        cache: what it holds so far.
        mask: of the tokens to come, with their positions.
        cross: theirs over the source; tokens that are read again have that of the last of them.
    """
    if cache.rotated_for is None or mask.q_positions is None:
        return cache
    lengths = jnp.maximum(cache.token_counts, mask.q_positions.max(axis=1) + 1)
    cache = reread(model, cache, lengths, mask, cross, LongScaling)
    return dataclasses.replace(cache, rotated_for=lengths)


def reread(
    model: Any,
    cache: Cache,
    lengths: Int[Array, " b"],
    mask: AttentionMask,
    cross: AttentionMask | None = None,
    kinds: Any = BY_LENGTH,
) -> Cache:
    """Returns the cache with the keys and values that its tokens have in rows of the given lengths.

    Arguments:
        model: the model whose cache it is.
        cache: it may hold rows that are rotated for other lengths.
        lengths: how long each row becomes, the tokens to come included.
        mask: what holds for all tokens of a row; what it says of single ones is not used.
        cross: that over the source, for a model with an encoder.
        kinds: the scalings whose angles are followed.
    """
    scalings = scalings_of(model.decoder, kinds)
    old = cache.rotated_for
    # A short cache never holds a row that is beyond the original length.
    if old is None or not any(cache.slots > x.original_length for x in scalings):
        return cache
    outgrown = reduce(or_, (x.same_until(old) != x.same_until(lengths) for x in scalings))
    outgrown = outgrown & (cache.token_counts > 0)
    if is_known(outgrown) and not outgrown.any():
        return cache
    # Rows that become long were short, and only with `DynamicScaling` also change beyond that.
    longest = max(x.original_length for x in scalings)
    dynamic = any(isinstance(x, DynamicScaling) for x in scalings)
    columns = cache.slots if dynamic else min(longest, cache.slots)
    model = at_lengths(model, lengths)
    # Booleans and segments are those of the tokens to come.
    over_source = () if cross is None else (_last_query(cross),)
    alike = mask.replace(explicit=None, q_segments=None, k_segments=None, k_positions=None)
    start, widen = narrow(cache)

    def read_more(tokens: Array, positions: Array, cache: Cache) -> Cache:
        alike_here = alike.replace(q_positions=positions)
        return model._forward(tokens, alike_here, None, cache, *over_source)[1]

    def read_again(cache: Any) -> Any:
        return narrow(_read_again(widen(cache), outgrown, columns, read_more))[0]

    return widen(lax.cond(outgrown.any(), read_again, lambda cache: cache, start))


def _last_query(cross: AttentionMask) -> AttentionMask:
    """Returns the mask over the source that the last of its queries has."""
    if cross.explicit is None or cross.explicit.ndim < 2:
        return cross
    return cross.replace(explicit=cross.explicit[..., -1:, :])


def _read_again(
    cache: Cache, rows: Bool[Array, " b"], columns: int, read: Callable[..., Any]
) -> Cache:
    """Returns the cache with some rows computed anew from their first `columns` tokens."""
    size = min(columns, CHUNK)
    chunks = -(-columns // size)
    # The real tokens of each row, moved together to the left.
    real = cache.positions >= 0
    order = jnp.argsort(~real, axis=1, stable=True)[:, :columns]
    width = ((0, 0), (0, chunks * size - columns))
    tokens, positions = (
        jnp.pad(jnp.take_along_axis(x, order, axis=1), width, constant_values=fill)
        for x, fill in ((cache.tokens, 0), (jnp.where(real, cache.positions, -1), -1))
    )

    def read_chunk(i: Any, new: Cache) -> Cache:
        part, places = (
            lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in (tokens, positions)
        )
        return read(part, places, new)

    new = lax.fori_loop(0, chunks, read_chunk, cache.emptied(chunks * size))
    # Where each slot's token has been read to.
    there = jnp.clip(jnp.cumsum(real, axis=1) - 1, 0, columns - 1)

    def choose(old: LayerCache, new: LayerCache) -> LayerCache:
        own = new.own
        if new.positions is None:
            own = KV(*(jnp.take_along_axis(x, there[:, None, :, None], axis=2) for x in own))
        chosen = jax.tree.map(
            lambda new, old: jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            (own, new.positions),
            (old.own, old.positions),
        )
        return old._replace(own=chosen[0], positions=chosen[1])

    layers = tuple(map(choose, cache.layers, new.layers))
    return dataclasses.replace(cache, layers=layers)
