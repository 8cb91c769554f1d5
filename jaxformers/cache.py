"""The cache, which is a decoder's memory of the tokens it has seen."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxformers.attention import KV
from jaxformers.checks import is_known
from jaxformers.masks import AttentionMask

# Rolling slots beyond the window: so many tokens at a time are written in place, and may be taken
# back by `rewind` without a loss of older ones that are still in view.
SPARE = 16
# A long text goes through a model in so many columns at a time, so that its activations take memory
# for these alone. On a CPU 512 are as fast as the whole text; 256 take a fifth longer.
CHUNK = 512


class LayerCache(NamedTuple):
    """The memory of one decoder layer: its own keys and values, and those of the encoder.

    A layer with a sliding window needs no more slots than the window: there the token at position
    p is in slot `p % slots`, and `positions` says which one is. So it is in all layers of a cache
    `by_rows`. Otherwise slots are the cache's.
    """

    own: KV
    cross: KV | None
    positions: Int[Array, "b r"] | None = None


class Cache(eqx.Module):
    """The tokens decoded so far with their keys and values; `forward` takes it and extends it.

    All layers share the slots: the next token of every sequence is written to slot `length`.
    Sequences of different length differ in `positions` alone, where -1 marks an unused slot or
    padding, so that nobody attends to it. (Layers with a sliding window keep their own slots.)
    `tokens` are the ids, which mean nothing where the position is -1. Where the angles of a model's
    positions depend on how long a row is, `rotated_for` says for which length its keys are rotated.
    `source_positions` are those of an encoder's tokens, -1 for padding; None hides none of them.

    In a cache `by_rows` the sequences share no slots, and `length` is None: the token at position p
    of a sequence is in slot p, so that each goes on, and begins anew, independently of the others.

    Example:
        >>> cache = model.init_cache(batch_size=1, slots=8)
        >>> hidden, cache = model.forward(jnp.array([[1, 2, 3]]), cache=cache)
        >>> hidden, cache = model.forward(jnp.array([[4]]), cache=cache)
        >>> print(cache.length, cache.positions, cache.tokens)
        4 [[ 0  1  2  3 -1 -1 -1 -1]] [[1 2 3 4 0 0 0 0]]
    """

    layers: tuple[LayerCache, ...]
    tokens: Int[Array, "b s"]
    positions: Int[Array, "b s"]
    length: Int[Array, ""] | None
    rotated_for: Int[Array, " b"] | None = None
    source_positions: Int[Array, "b source"] | None = None

    @property
    def slots(self) -> int:
        return self.positions.shape[1]

    @property
    def columns(self) -> Int[Array, ""]:
        """How many slots are in use.

        Raises:
            ValueError: if the cache is `by_rows`.
        """
        if self.length is None:
            raise ValueError(
                "cache must be one whose rows share their slots, got one `by_rows`. That is for "
                "forward alone. Pass one from init_cache or from an earlier call."
            )
        return self.length

    @property
    def token_counts(self) -> Int[Array, " b"]:
        """The number of real tokens of each sequence, which is the position of its next token."""
        return jnp.max(self.positions, axis=1) + 1

    def extend(
        self, positions: Int[Array, "b t"], tokens: Int[Array, "b t"] | None = None
    ) -> "Cache":
        """Returns the cache with t more tokens and their positions; layers write with `remember`.

        A decoder that is used without a model knows no ids, and writes none.

        Raises:
            ValueError: if fewer than t slots are left (JAX would overwrite the last ones).
        """
        t = positions.shape[1]
        tokens = jnp.zeros_like(positions) if tokens is None else tokens
        if self.length is None:
            rows = jnp.arange(positions.shape[0])[:, None]
            where = jnp.where(positions >= 0, positions, self.slots)
            kept_tokens, kept_positions = (
                old.at[rows, where].set(new, mode="drop")
                for old, new in ((self.tokens, tokens), (self.positions, positions))
            )
            return dataclasses.replace(self, tokens=kept_tokens, positions=kept_positions)
        if is_known(self.length) and int(self.length) + t > self.slots:
            raise ValueError(
                f"the cache has {self.slots} slots, {int(self.length)} of them in use, and cannot "
                f"take {t} more tokens. Make it with more slots."
            )
        kept_tokens, kept_positions = (
            lax.dynamic_update_slice_in_dim(old, new, self.length, axis=1)
            for old, new in ((self.tokens, tokens), (self.positions, positions))
        )
        return dataclasses.replace(
            self, tokens=kept_tokens, positions=kept_positions, length=self.length + t
        )

    def by_rows(self) -> "Cache":
        """Returns an empty cache whose sequences have slots of their own, see `Cache`."""

        def apart(layer: LayerCache) -> LayerCache:
            if layer.positions is not None:
                return layer
            return layer._replace(positions=jnp.full_like(self.positions, -1))

        return dataclasses.replace(self, layers=tuple(map(apart, self.layers)), length=None)

    def rewind(self, columns: Int[Array, ""]) -> "Cache":
        """Returns the cache without its last `columns` slots (at most `SPARE` real tokens)."""
        length = self.columns - columns
        kept = jnp.where(jnp.arange(self.slots) < length, self.positions, -1)
        shorter = dataclasses.replace(self, positions=kept, length=length)
        return shorter.first_tokens(shorter.token_counts)

    def first_tokens(self, counts: Int[Array, " b"]) -> "Cache":
        """Returns the cache with so many tokens of each sequence; later ones become padding.

        Like `rewind` it may take back at most `SPARE` tokens.
        """

        def forget(positions: Int[Array, "b r"]) -> Int[Array, "b r"]:
            return jnp.where(positions < counts[:, None], positions, -1)

        layers = tuple(
            x if x.positions is None else x._replace(positions=forget(x.positions))
            for x in self.layers
        )
        return dataclasses.replace(self, layers=layers, positions=forget(self.positions))

    def resize(self, slots: int, own_slots: Sequence[int] | None = None) -> "Cache":
        """Returns the cache with `slots` slots: more, or fewer if those are not in use.

        Arguments:
            slots: of the cache, whose layers with fewer keep theirs.
            own_slots: how many each layer has instead, in a cache `by_rows`.
        """
        if own_slots is None:
            known = (layer.positions for layer in self.layers)
            own_slots = [slots if x is None else x.shape[1] for x in known]

        def resize(layer: LayerCache, size: int) -> LayerCache:
            more = size - layer.own.keys.shape[2]
            if more == 0:
                return layer
            width = ((0, 0, 0), (0, 0, 0), (0, more, 0), (0, 0, 0))
            own = (lax.pad(x, jnp.zeros((), x.dtype), width) for x in layer.own)
            positions = layer.positions
            if positions is not None:
                positions = lax.pad(positions, jnp.int32(-1), (width[0], width[2]))
            return layer._replace(own=KV(*own), positions=positions)

        width = ((0, 0, 0), (0, slots - self.slots, 0))
        return dataclasses.replace(
            self,
            layers=tuple(map(resize, self.layers, own_slots)),
            tokens=lax.pad(self.tokens, jnp.int32(0), width),
            positions=lax.pad(self.positions, jnp.int32(-1), width),
        )

    def take(self, rows: Int[Array, " r"]) -> "Cache":
        """Returns the cache with the given rows, in place of rows with the same source."""
        # The source's keys and values, which can be most of the cache, stay where they are.
        own = [layer._replace(cross=None) for layer in self.layers]
        per_row = own, self.tokens, self.positions, self.rotated_for
        own, tokens, positions, rotated_for = jax.tree.map(lambda x: x[rows], per_row)
        layers = [new._replace(cross=old.cross) for new, old in zip(own, self.layers, strict=True)]
        return dataclasses.replace(
            self,
            layers=tuple(layers),
            tokens=tokens,
            positions=positions,
            rotated_for=rotated_for,
        )

    def repeat(self, times: int) -> "Cache":
        """Returns the cache with each row `times` times, one below the other."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, self)

    def emptied(self, slots: int) -> "Cache":
        """Returns a cache of the same kind with `slots` slots, which holds no tokens yet."""

        def empty(layer: LayerCache) -> LayerCache:
            if layer.positions is not None:
                return layer._replace(positions=jnp.full_like(layer.positions, -1))
            shape = *layer.own.keys.shape[:2], slots, layer.own.keys.shape[3]
            own = (jnp.zeros(shape, x.dtype) for x in layer.own)
            return layer._replace(own=KV(*own))

        shape = self.positions.shape[0], slots
        return dataclasses.replace(
            self,
            layers=tuple(map(empty, self.layers)),
            tokens=jnp.zeros(shape, jnp.int32),
            positions=jnp.full(shape, -1, jnp.int32),
            length=None if self.length is None else jnp.zeros((), jnp.int32),
        )


def empty_layer(
    batch_size: int, heads: int, slots: int, head_dim: int, dtype, window: int | None
) -> LayerCache:
    """Returns a layer's cache that holds no keys and values yet."""
    own_slots = slots if window is None else min(slots, window + SPARE)
    shape = batch_size, heads, own_slots, head_dim
    # Two arrays: one that stood in both places could not be donated.
    own = KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    positions = jnp.full((batch_size, own_slots), -1, jnp.int32) if own_slots < slots else None
    return LayerCache(own, None, positions)


def remember(
    cache: LayerCache, kv: KV, mask: AttentionMask, slot: Int[Array, ""] | int | None
) -> tuple[LayerCache, KV, AttentionMask]:
    """Writes `kv` into a layer's cache; returns that, and the keys, values and mask to use.

    `slot` is None for a cache `by_rows`, whose layers have positions of their own.
    """
    if cache.positions is not None:
        return _roll(cache, cache.positions, kv, mask)
    own = KV(*(_write(old, new, slot) for old, new in zip(cache.own, kv, strict=True)))
    return cache._replace(own=own), own, mask


def narrow(state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns arrays without their axes of size 1, and the function that gives these axes back.

    XLA drops such axes before a product. If a loop or a branch carried them, it would hold a cache
    in both shapes, and write and copy both for every token.
    """
    shapes = jax.tree.map(lambda x: x.shape, state)

    def widen(state: Any) -> Any:
        return jax.tree.map(lambda x, shape: x.reshape(shape), state, shapes)

    return jax.tree.map(lambda x: x.reshape([n for n in x.shape if n != 1]), state), widen


def _write(
    old: Float[Array, "b g s h"], new: Float[Array, "b g t h"], slot: Any
) -> Float[Array, "b g s h"]:
    """Writes `new` into `old` from `slot` on, without axes of size 1 (see `narrow`)."""
    *leading, _, h = (n for i, n in enumerate(old.shape) if i > 1 or n > 1)
    flat, update = (x.reshape(*leading, -1, h) for x in (old, new.astype(old.dtype)))
    written = lax.dynamic_update_slice_in_dim(flat, update, slot, axis=len(leading))
    return written.reshape(old.shape)


def _roll(
    cache: LayerCache, old_positions: Int[Array, "b r"], kv: KV, mask: AttentionMask
) -> tuple[LayerCache, KV, AttentionMask]:
    """Does the same as `remember` where slots are used again once out of the window."""
    t, slots = kv.keys.shape[2], cache.own.keys.shape[2]
    kv = KV(*(new.astype(old.dtype) for old, new in zip(cache.own, kv, strict=True)))
    positions = mask.query_positions(t)
    # Padding is not written, nor what would be overwritten within this very call.
    last = positions > positions.max(axis=1, keepdims=True) - slots
    where = jnp.where((positions >= 0) & last, positions % slots, slots)
    rows = jnp.arange(positions.shape[0])[:, None]
    own = [
        old.at[rows, :, where].set(jnp.swapaxes(new, 1, 2), mode="drop")
        for old, new in zip(cache.own, kv, strict=True)
    ]
    written = old_positions.at[rows, where].set(positions, mode="drop")
    new = LayerCache(KV(*own), cache.cross, written)
    if t <= SPARE:
        return new, new.own, mask.replace(k_positions=written)
    # A long chunk overwrites what its first tokens must still see, so it attends to both.
    both = KV(*(jnp.concatenate(pair, axis=2) for pair in zip(cache.own, kv, strict=True)))
    seen = jnp.concatenate([old_positions, positions], axis=1)
    return new, both, mask.replace(k_positions=seen)
