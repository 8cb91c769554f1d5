"""How the decoding loop drives a model: one small adapter per shape of model.

The loop (`loop.py`) knows no model. It asks an adapter for an empty cache, hands it tokens, and
gets hidden states and the longer cache back. A cache is any pytree whose arrays, where they have
axes, have the rows as the first one; `held` gives the `Cache` in it, which knows its tokens.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformers.cache import Cache
from jaxformers.checks import check_usable
from jaxformers.row_lengths import at_lengths, same_until


class LMStep(eqx.Module):
    """Drives a decoder-only model."""

    model: Any

    def __check_init__(self) -> None:
        check_usable(model=self.model)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def drive(self, model: Any) -> "LMStep":
        """The same for another model."""
        return LMStep(model)

    def at_lengths(self, lengths: Int[Array, " b"]) -> "LMStep":
        """The same for parts of rows that have these lengths as a whole."""
        return self.drive(at_lengths(self.model, lengths))

    def same_until(self, lengths: Int[Array, " b"]) -> Int[Array, " b"] | None:
        """The longest rows with the angles of rows of these lengths; None is no limit."""
        return same_until(self.model, lengths)

    def reread(self, cache: Cache, lengths: Int[Array, " b"]) -> Cache:
        """The cache with the keys that its tokens have in rows of these lengths."""
        return self.model.reread(cache, lengths)

    def start(self, batch_size: int, slots: int) -> Cache:
        """An empty cache of `slots` columns."""
        # Not the model's own init_cache: columns of padding do not count against its context.
        return self.model.decoder.init_cache(batch_size, slots)

    def held(self, cache: Cache) -> Cache:
        """What the cache holds of the tokens so far."""
        return cache

    def __call__(
        self, tokens: Int[Array, "b t"], real: Bool[Array, "b t"], cache: Cache
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Hidden states of `tokens`, which follow those in the cache, and the longer cache."""
        return self.model.forward(tokens, padding_mask=real, cache=cache)

    def full(self, tokens: Int[Array, "b t"], real: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """Hidden states of whole sequences, without a cache."""
        return self.model.forward(tokens, padding_mask=real)[0]

    def project(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits from hidden states."""
        return self.model.project(hidden)

    def rewind(self, cache: Cache, columns: Int[Array, ""]) -> Cache:
        """The cache without its last `columns`."""
        return cache.rewind(columns)

    def take(self, cache: Cache, rows: Int[Array, " b"]) -> Cache:
        """The cache with the rows that `rows` names."""
        return cache.take(rows)

    def repeat(self, cache: Cache, times: int) -> Cache:
        """The cache with each row `times` times over."""
        return repeat(cache, times)

    def resize(self, cache: Cache, slots: int) -> Cache:
        """The cache with `slots` columns."""
        return cache.resize(slots)


class Seq2SeqCache(NamedTuple):
    """What the target side remembers: its cache, and which source tokens are real."""

    target: Cache
    src_padding_mask: Bool[Array, "b s"] | None


class Seq2SeqStep(eqx.Module):
    """Drives an encoder-decoder: the source is encoded once, when the cache is made."""

    model: Any
    src: Int[Array, "b s"]
    src_padding_mask: Bool[Array, "b s"] | None

    def __check_init__(self) -> None:
        check_usable(model=self.model)

    @property
    def vocab_size(self) -> int:
        return self.model.tgt_vocab_size

    def drive(self, model: Any) -> "Seq2SeqStep":
        """The same for another model."""
        return Seq2SeqStep(model, self.src, self.src_padding_mask)

    def at_lengths(self, lengths: Int[Array, " b"]) -> "Seq2SeqStep":
        """The same for parts of rows that have these lengths as a whole."""
        return self.drive(at_lengths(self.model, lengths))

    def same_until(self, lengths: Int[Array, " b"]) -> Int[Array, " b"] | None:
        """The longest rows with the angles of rows of these lengths; None is no limit."""
        return same_until(self.model, lengths)

    def start(self, batch_size: int, slots: int) -> Seq2SeqCache:
        """A cache of `slots` columns with the encoder's keys and values."""
        memory = self.model.encode(self.src, src_padding_mask=self.src_padding_mask)
        target = self.model.decoder.init_cache(batch_size, slots, memory)
        return Seq2SeqCache(target, self.src_padding_mask)

    def held(self, cache: Seq2SeqCache) -> Cache:
        """What the cache holds of the target's tokens so far."""
        return cache.target

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

    def full(self, tokens: Int[Array, "b t"], real: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """Hidden states of whole sequences, without a cache."""
        padding = {"src_padding_mask": self.src_padding_mask}
        memory = self.model.encode(self.src, **padding)
        return self.model.decode(tokens, memory, tgt_padding_mask=real, **padding)

    def project(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits from hidden states."""
        return self.model.project(hidden)

    def rewind(self, cache: Seq2SeqCache, columns: Int[Array, ""]) -> Seq2SeqCache:
        """The cache without its last `columns`."""
        return cache._replace(target=cache.target.rewind(columns))

    def resize(self, cache: Seq2SeqCache, slots: int) -> Seq2SeqCache:
        """The cache with `slots` columns."""
        return cache._replace(target=cache.target.resize(slots))

    def take(self, cache: Seq2SeqCache, rows: Int[Array, " b"]) -> Seq2SeqCache:
        """The cache with the rows that `rows` names, which must have the same sources."""
        return cache._replace(target=cache.target.take(rows))

    def repeat(self, cache: Seq2SeqCache, times: int) -> Seq2SeqCache:
        """The cache with each row `times` times over."""
        return repeat(cache, times)


def repeat(cache: Any, times: int) -> Any:
    """The cache with each row `times` times over."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, cache)
