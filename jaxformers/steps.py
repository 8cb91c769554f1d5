"""How the decoding loop drives a model: one small adapter per shape of model.

The loop (`generation.py`) knows no model. It asks an adapter for an empty cache, hands it tokens,
and gets hidden states and the longer cache back. A cache is any pytree whose arrays, where they
have axes, have the rows as the first one.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformers.decoder import Cache


class LMStep(eqx.Module):
    """Drives a decoder-only model."""

    model: Any

    def start(self, batch_size: int, slots: int) -> Cache:
        """An empty cache of `slots` columns."""
        # Not the model's own init_cache: columns of padding do not count against its context.
        return self.model.decoder.init_cache(batch_size, slots)

    def __call__(
        self, tokens: Int[Array, "b t"], real: Bool[Array, "b t"], cache: Cache
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Hidden states of `tokens`, which follow those in the cache, and the longer cache."""
        return self.model.forward(tokens, padding_mask=real, cache=cache)

    def project(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits from hidden states."""
        return self.model.project(hidden)

    def rewind(self, cache: Cache, length: Int[Array, ""]) -> Cache:
        """The cache with only its first `length` columns in use."""
        return rewind(cache, length)


class Seq2SeqCache(NamedTuple):
    """What the target side remembers: its cache, and which source tokens are real."""

    target: Cache
    src_padding_mask: Bool[Array, "b s"] | None


class Seq2SeqStep(eqx.Module):
    """Drives an encoder-decoder: the source is encoded once, when the cache is made."""

    model: Any
    src: Int[Array, "b s"]
    src_padding_mask: Bool[Array, "b s"] | None

    def start(self, batch_size: int, slots: int) -> Seq2SeqCache:
        """A cache of `slots` columns with the encoder's keys and values."""
        memory = self.model.encode(self.src, src_padding_mask=self.src_padding_mask)
        target = self.model.decoder.init_cache(batch_size, slots, memory)
        return Seq2SeqCache(target, self.src_padding_mask)

    def __call__(
        self, tokens: Int[Array, "b t"], real: Bool[Array, "b t"], cache: Seq2SeqCache
    ) -> tuple[Float[Array, "b t d"], Seq2SeqCache]:
        """Hidden states of `tokens`, which follow those in the cache, and the longer cache."""
        hidden, target = self.model.forward(
            tokens,
            src_padding_mask=cache.src_padding_mask,
            tgt_padding_mask=real,
            cache=cache.target,
        )
        return hidden, cache._replace(target=target)

    def project(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits from hidden states."""
        return self.model.project(hidden)

    def rewind(self, cache: Seq2SeqCache, length: Int[Array, ""]) -> Seq2SeqCache:
        """The cache with only its first `length` columns in use."""
        return cache._replace(target=rewind(cache.target, length))


def rewind(cache: Cache, length: Int[Array, ""]) -> Cache:
    """The cache with only its first `length` columns in use."""
    used = jnp.arange(cache.slots) < length
    return Cache(cache.layers, jnp.where(used, cache.positions, -1), length)
