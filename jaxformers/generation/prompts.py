"""A user's prompt, checked and brought into the shapes that the program is compiled for.

Sizes are rounded up to buckets, so that a new length inside a bucket compiles nothing. That is done
in NumPy: in JAX, cutting or padding to each new length would itself compile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, ArrayLike, Bool, Int

from jaxformers.cache import Cache, LayerCache
from jaxformers.checks import check_padding_mask, check_tokens, is_known
from jaxformers.ids import Tokens, as_rows, stack
from jaxformers.mistakes import special_of, warn_of_length, warn_of_padding
from jaxformers.one_program import MOST_PADDED, bucket
from jaxformers.origin import Origin, SpecialTokens
from jaxformers.sharding.hosts import to_numpy


class Prompt(NamedTuple):
    """A prompt as a NumPy array, or as the tracer it is under `jit` and `vmap`."""

    tokens: Any  # (b, t), int32
    real: Any  # (b, t), True where a token is real
    batched: bool  # False for a prompt that came as (t,)
    sharding: Sharding | None  # where the result goes; None is the default device

    def to_bucket(
        self, columns: int, rows: int | None = None
    ) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
        """Returns the tokens in `columns` columns and `rows` rows, and which of them are real.

        Rows that are added have the tokens of the last one, so that nothing about them is special.
        """
        b, t = self.tokens.shape
        xp, width = np if is_known(self.tokens) else jnp, ((0, 0), (0, columns - t))
        tokens, real = (xp.pad(x, width) for x in (self.tokens, self.real))
        if rows is not None and rows > b:
            tokens, real = (np.pad(x, ((0, rows - b), (0, 0)), "edge") for x in (tokens, real))
        return self._put(tokens), self._put(real)

    def begin(self, token: int) -> "Prompt":
        """Returns a prompt of the same rows, each of which is `token` alone."""
        tokens = np.full((self.tokens.shape[0], 1), token, np.int32)
        return self._replace(tokens=tokens, real=np.ones(tokens.shape, np.bool_))

    def repeat(self, times: int) -> "Prompt":
        """Returns the prompt with each row `times` times over."""
        xp = np if is_known(self.tokens) else jnp
        tokens, real = (xp.repeat(x, times, axis=0) for x in (self.tokens, self.real))
        return Prompt(tokens, real, self.batched or times > 1, self.sharding)

    def cut(self, columns: Array, start: int, stop: int) -> Any:
        """Columns `start` to `stop` of the prompt's rows, in NumPy where that is possible."""
        return self.own(columns)[:, start:stop]

    def own(self, rows: Any) -> Any:
        """The prompt's rows without those that were added, in NumPy where that is possible."""
        return (to_numpy(rows) if is_known(rows) else rows)[: self.tokens.shape[0]]

    def join(self, tokens: Int[Array, "b s"], start: int, stop: int) -> Int[Array, "*b t"]:
        """Returns the prompt as it came, followed by columns `start` to `stop` of `tokens`."""
        new = self.cut(tokens, start, stop)
        xp = np if isinstance(self.tokens, np.ndarray) and isinstance(new, np.ndarray) else jnp
        return self.place(xp.concatenate([self.tokens, new], axis=1))

    def place(self, rows: Any) -> Array:
        """Puts a result with an entry per row on the prompt's devices, unbatched if it was."""
        return self._put(rows if self.batched else rows[0])

    @property
    def can_be_padded(self) -> bool:
        """Whether rows may be added: to tokens that are known, and on one device."""
        on_one = self.sharding is None or len(self.sharding.device_set) == 1
        return on_one and is_known(self.tokens) and is_known(self.real)

    def _put(self, x: Any) -> Array:
        """Puts `x` where the prompt came from, its rows spread over the devices in the same way."""
        if not is_known(x):
            return x
        where = self.sharding
        if isinstance(where, NamedSharding):
            rows = where.spec[:1] if self.batched else ()
            where = NamedSharding(where.mesh, PartitionSpec(*rows))
        return jax.device_put(x, where)


class Source(NamedTuple):
    """The tokens that an encoder reads."""

    tokens: Int[Array, "b s"]
    real: Bool[Array, "b s"]


_MASK_NAMES = {"src": "src_padding_mask", "tgt": "tgt_padding_mask"}


def read_prompt(
    prompt: Tokens, padding_mask: ArrayLike | None, vocab_size: int, name: str = "prompt"
) -> Prompt:
    """Checks a prompt and returns it; rows of different length are padded on the left.

    Raises:
        ValueError: if it holds no ids of the vocabulary, or a row has no token.
    """
    mask_name = _MASK_NAMES.get(name, "padding_mask")
    given, padding_mask = _fill_ragged(prompt, padding_mask, name, mask_name)
    committed = isinstance(given, jax.Array) and is_known(given) and given.committed
    sharding = given.sharding if committed else None
    tokens: Any = check_tokens(to_numpy(given) if is_known(given) else given, vocab_size, name)
    real: Any = check_padding_mask(padding_mask, tokens.shape, mask_name)
    if is_known(tokens):
        tokens = np.asarray(tokens)
    if real is None:
        real = np.ones(tokens.shape, np.bool_)
    elif is_known(real):
        real = np.asarray(real)
        if not real.any(-1).all():
            raise ValueError(
                f"{name} must have at least one real token in every row, got a row without any. "
                "Begin it with a start token, or leave it out."
            )
    batched = tokens.ndim == 2
    if not batched:
        tokens, real = tokens[None], real[None]
    return Prompt(tokens, real, batched, sharding)


def read_text(
    tokens: Tokens,
    padding_mask: ArrayLike | None,
    vocab_size: int,
    max_length: int | None,
    name: str,
    origin: Origin | None,
) -> Prompt:
    """Checks text that is to be read, and warns of mistakes that are allowed."""
    text = read_prompt(tokens, padding_mask, vocab_size, name)
    check_length(name, text, max_length)
    warn_of_unmasked(text, padding_mask, name, special_of(origin))
    if is_known(text.real):
        warn_of_length(int(_lengths(text).max()), origin, max_length, f"{name} has rows that reach")
    return text


def read_source(model: Any, src: Tokens, padding_mask: ArrayLike | None) -> Prompt:
    """Checks what the encoder of a `Transformer` is to read, and returns it."""
    limit = model.src_embedding.max_seq_length
    return read_text(src, padding_mask, model.src_vocab_size, limit, "src", model.origin)


def to_source(model: Any, text: Prompt, rows: int | None = None) -> Source:
    """Returns the encoder's tokens in their bucket, and in so many rows."""
    limit = model.src_embedding.max_seq_length
    return Source(*text.to_bucket(bucket(text.tokens.shape[1], limit), rows))


def rows_for(prompt: Prompt, columns: int, source: Prompt | None = None) -> int:
    """Returns the number of rows that a program for a prompt is compiled for.

    Where it is more than those of the prompt, rows are added that are done from the beginning.
    Calls of many tokens get none, since these would cost more than a compilation.

    Arguments:
        prompt: what a call was given.
        columns: how many tokens each row may have.
        source: the encoder's tokens, if the model has an encoder.
    """
    given = prompt.tokens.shape[0]
    texts = [x for x in (prompt, source) if x is not None]
    rows = bucket(given, smallest=1)
    many = rows * (columns + sum(x.tokens.shape[1] for x in texts[1:])) > MOST_PADDED
    return given if many or not all(x.can_be_padded for x in texts) else rows


def warn_of_unmasked(
    prompt: Prompt, padding_mask: ArrayLike | None, name: str, special: SpecialTokens
) -> None:
    """Warns of padding in a prompt that was given no mask, and does not say itself what is real."""
    if padding_mask is None and is_known(prompt.real) and prompt.real.all():
        warn_of_padding(prompt.tokens, name, _MASK_NAMES.get(name, "padding_mask"), special)


def _fill_ragged(
    prompt: Any, padding_mask: ArrayLike | None, name: str, mask_name: str
) -> tuple[Any, Any]:
    """Returns rows of different length as one array padded on the left, and its padding mask."""
    rows, lengths = as_rows(prompt, name)
    if lengths is None:
        return rows, padding_mask
    if len(set(lengths)) == 1:
        return stack(rows), padding_mask
    if padding_mask is not None:
        raise ValueError(
            f"{mask_name} must be left out where {name} is a list of rows of different length, "
            "which says itself how long each is."
        )
    longest = max(lengths)
    pads = [(longest - length, 0) for length in lengths]
    padded = [
        (np if is_known(row) else jnp).pad(row, pad) for row, pad in zip(rows, pads, strict=True)
    ]
    return stack(padded), np.arange(longest) >= np.array(pads)[:, :1]


def put(numbers: ArrayLike) -> Array:
    """Returns integers as an int32 array, without compiling anything."""
    return jax.device_put(np.asarray(numbers, np.int32))


def check_room(
    prompt: Prompt, max_new_tokens: int, max_seq_length: int | None, cache: Any = None
) -> int:
    """Returns the length of rows with their new tokens; raises if the model is too short."""
    lengths = _lengths(prompt)
    if cache is not None:
        rows, wanted = cache.positions.shape[0], prompt.tokens.shape[0]
        if rows != wanted:
            raise ValueError(f"cache must have the prompt's {wanted} rows, got {rows}.")
        if is_known(cache.positions):
            lengths = lengths + np.asarray(cache.positions).max(-1) + 1
    longest = int(lengths.max())
    if max_seq_length is not None and longest + max_new_tokens > max_seq_length:
        raise ValueError(
            f"max_new_tokens must leave room for the prompt within max_seq_length = "
            f"{max_seq_length}, got {max_new_tokens} beside a prompt of {longest} tokens. Ask for "
            "fewer tokens, shorten the prompt, build the model with a larger max_seq_length, or "
            "use position=RotaryPositionalEncoding(), which has no limit."
        )
    return longest + max_new_tokens


def check_cache(model: Any, cache: Any) -> None:
    """Raises unless a cache is None, or one of this model."""
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache must be a Cache, got a {type(cache).__name__}. Pass that of an earlier call: "
            "out = model.generate(..., return_cache=True), and then cache=out.cache."
        )
    empty = jax.eval_shape(partial(_empty_cache, model.decoder))
    got, wanted = ([_describe(x) for x in x.layers] for x in (cache, empty))
    if len(got) != len(wanted):
        odd = f"{len(got)} layers instead of {len(wanted)}"
    else:
        pairs = enumerate(zip(got, wanted, strict=True))
        odd = next(
            (f"layer {i} has {a} instead of {b}" for i, (a, b) in pairs if not a.fits(b)), ""
        )
    if odd:
        raise ValueError(
            f"cache must be one of this model, got one of another model: {odd}. Pass what this "
            "model returned, or read the tokens again."
        )


_MANY = 2**24  # slots, more than any window has


def _empty_cache(decoder: Any) -> Cache:
    """Returns a cache of the kind that a decoder has, for one row and one token of a source."""
    attention = next(iter(decoder.layers)).cross_attention
    if attention is None:
        return decoder.init_cache(1, _MANY)
    source = jnp.zeros((1, 1, attention.d_model), attention.wk.dtype)
    return decoder.init_cache(1, _MANY, source)


class _Kind(NamedTuple):
    """The properties of a layer's cache that all caches of its model share."""

    heads: int
    head_dim: int
    cross_attention: bool
    window_slots: int | None

    def fits(self, wanted: "_Kind") -> bool:
        """Returns whether it may be of such a model; few slots need none for the window."""
        return self[:3] == wanted[:3] and self.window_slots in (None, wanted.window_slots)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items())


def _describe(layer: LayerCache) -> _Kind:
    _, heads, _, head_dim = layer.own.keys.shape
    slots = None if layer.positions is None else layer.positions.shape[1]
    return _Kind(heads, head_dim, layer.cross is not None, slots)


def check_length(name: str, prompt: Prompt, max_seq_length: int | None) -> None:
    """Raises if a row has more tokens than the model knows positions; padding does not count."""
    longest = int(_lengths(prompt).max())
    if max_seq_length is not None and longest > max_seq_length:
        raise ValueError(
            f"{name} may have at most max_seq_length = {max_seq_length} tokens, got {longest}. "
            "Cut it, or build the model with a larger max_seq_length."
        )


def _lengths(prompt: Prompt) -> np.ndarray:
    """Returns how many tokens each row has, or may have where that is not known."""
    return prompt.real.sum(-1) if is_known(prompt.real) else np.array(prompt.real.shape[1])


def check_ids(name: str, ids: Any, vocab_size: int | None = None) -> np.ndarray:
    """Returns token ids, one or several or none, as an array; without a vocabulary any will do."""
    ids = [] if ids is None else np.ravel(np.asarray(ids)).tolist()
    for token in ids:
        if vocab_size is None:
            if not isinstance(token, int) or token < 0:
                raise ValueError(f"{name} must be ids of at least 0, got {token!r}.")
        elif not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} must be ids from 0 to {vocab_size - 1} (the vocabulary has {vocab_size}), "
                f"got {token!r}."
            )
    return np.asarray(ids, np.int32)
