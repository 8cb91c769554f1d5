"""An eager call of a model as one compiled program.

Outside `jit`, JAX compiles and runs every operation by itself. For a model these are some seventy
small programs for each new shape, and together they take several times as long as one program of
them all. The public methods of the models check their arguments first, while the values can still
be read, and hand the rest to `one_program`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxformers.checks import is_known
from jaxformers.log_probs import IGNORED
from jaxformers.masks import AttentionMask
from jaxformers.sites import is_watched

# Calls with more tokens are not padded.
MOST_PADDED = 8192


class TokenRows(eqx.Module):
    """The tokens of a call, and what is said of each of them.

    Arguments:
        tokens: ids, `(b, t)` or `(t,)`.
        mask: which tokens may attend to which tokens of the same row, with their positions.
        cross: which of them may attend to which tokens of the source; None without a source.
        token_types: the segment of each token, in the shape of `tokens`; None if not given.
        targets: the target of each token, -100 where none counts; None if not given.
        limit: how many positions the model knows; None if there is no limit.
    """

    tokens: Int[Array, "*b t"]
    mask: AttentionMask
    cross: AttentionMask | None = None
    token_types: Int[Array, "*b t"] | None = None
    targets: Int[Array, "*b t"] | None = None
    limit: int | None = eqx.field(static=True, default=None)

    def to_bucket(self, source: "TokenRows | None") -> "TokenRows":
        """Returns the rows with padding up to the next size that programs are compiled for.

        Arguments:
            source: what `cross` is about.
        """
        *batch, t = self.tokens.shape
        more = [bucket(b, smallest=1) - b for b in batch] + [self._more]
        mask, cross = self.mask, self.cross
        if any(more):
            if mask.q_positions is None:  # also under a causal mask: some parts look at the length
                positions = jax.device_put(np.arange(t, dtype=np.int32))
                mask = mask.replace(q_positions=positions, k_positions=positions)
            mask = _pad_mask(mask, more, more)
        if cross is not None and source is not None:
            s, more_keys = source.tokens.shape[-1], [*more[:-1], source._more]
            if source._more and cross.k_positions is None:
                cross = cross.replace(k_positions=jax.device_put(np.arange(s, dtype=np.int32)))
            cross = _pad_mask(cross, more, more_keys)
        tokens, types = (_pad(x, more, 0) for x in (self.tokens, self.token_types))
        given = dict(token_types=types, targets=_pad(self.targets, more, IGNORED))
        return dataclasses.replace(self, tokens=tokens, mask=mask, cross=cross, **given)

    @property
    def can_be_padded(self) -> bool:
        """Whether padding may be added: to few tokens without booleans of a mask, on one device."""
        booleans = self.mask.explicit, None if self.cross is None else self.cross.explicit
        if self.tokens.size > MOST_PADDED or booleans != (None, None):
            return False
        return len(self.tokens.sharding.device_set) == 1

    @property
    def positions(self) -> Int[Array, "*b t"]:
        """The position of each token, -1 for padding."""
        shape = self.tokens.shape
        return jnp.broadcast_to(self.mask.query_positions(shape[-1]), shape)

    @property
    def _more(self) -> int:
        """The number of columns up to the next size."""
        t = self.tokens.shape[-1]
        return bucket(t, self.limit) - t


def one_program(
    body: Callable[..., Array],
    model: Any,
    *texts: TokenRows,
    key: PRNGKeyArray | None = None,
    per_token: bool = True,
    keep_shapes: bool = False,
) -> Array:
    """Returns `body(model, *texts, key=key)`, computed by one compiled program.

    Inside a transformation of JAX (`jit`, `grad`, `vmap`) the body is only traced. Otherwise the
    texts get padding up to the next of a few sizes, so that most new lengths and batch sizes
    compile nothing. Some calls keep their shapes: those with a key, whose dropout would be drawn
    for other shapes, those with booleans of a mask, those whose tokens are spread over devices,
    those of patched models, whose values would have other shapes, and long ones, where the padding
    would cost more than a compilation.

    Arguments:
        body: a function that is the same object in every call.
        model: any pytree.
        texts: what the model reads; of two the first is the source of the second.
        key: PRNG key for dropout; None means inference.
        per_token: whether the result begins with the axes `(b, t)` of the last text, True, or with
            `(b,)` alone.
        keep_shapes: whether no padding may be added, False.
    """
    if not all(map(is_known, jax.tree.leaves((model, texts, key)))):
        return body(model, *texts, key=key)
    keep_shapes = keep_shapes or key is not None or is_watched(model)
    if keep_shapes or not all(x.can_be_padded for x in texts):
        return _run(body, model, texts, key)
    source = texts[0] if len(texts) > 1 else None
    with jax.ensure_compile_time_eval():  # inside someone's `jit` constants would be a part of it
        padded = tuple(x.to_bucket(source) for x in texts)
    shape = texts[-1].tokens.shape
    return _cut(_run(body, model, padded, None), shape if per_token else shape[:-1])


@eqx.filter_jit
def _run(body: Callable[..., Array], model: Any, texts: tuple[TokenRows, ...], key: Any) -> Array:
    return body(model, *texts, key=key)


def bucket(size: int, cap: int | None = None, smallest: int = 16) -> int:
    """Returns `size` rounded up to a size that programs are compiled for.

    These are 16, 24, 32, 48, 64, 96 and so on; where `smallest` is less, smaller ones as well.

    Arguments:
        size: at least 1.
        cap: no more than this, unless `size` itself is more; None is no limit.
        smallest: the least size, a power of two.

    Example:
        >>> [bucket(size) for size in (1, 17, 25, 50, 65)]
        [16, 24, 32, 64, 96]
    """
    power = max(smallest, 1 << (size - 1).bit_length())
    rounded = power * 3 // 4 if power > max(smallest, 2) and size <= power * 3 // 4 else power
    return rounded if cap is None else max(min(rounded, cap), size)


def sizes_up_to(size: int, cap: int | None = None, smallest: int = 16) -> list[int]:
    """Returns all sizes that programs are compiled for, up to that of `size`.

    Arguments are those of `bucket`.

    Example:
        >>> sizes_up_to(50), sizes_up_to(3, smallest=1)
        ([16, 24, 32, 48, 64], [1, 2, 3])
    """
    return sorted({bucket(n, cap, smallest) for n in range(1, size + 1)})


def _pad(x: Array | None, more: list[int], value: Any) -> Any:
    """Returns `x` with so many more entries at the end of its last axes, compiling nothing."""
    if x is None or not any(more):
        return x
    widths = [(0, n) for n in more[-x.ndim :]]
    widths = [(0, 0)] * (x.ndim - len(widths)) + widths
    padded = np.pad(np.asarray(x), widths, constant_values=value)
    return jax.device_put(padded, x.sharding if x.committed else None)


def _pad_mask(mask: AttentionMask, queries: list[int], keys: list[int]) -> AttentionMask:
    """Returns the mask with more rows, queries and keys; the new keys have position -1.

    Arguments:
        mask: that of a sequence over itself has positions.
        queries, keys: the numbers of rows and of columns that are added to each.
    """
    return mask.replace(
        q_positions=_pad(mask.q_positions, queries, -1),
        k_positions=_pad(mask.k_positions, keys, -1),
        q_segments=_pad(mask.q_segments, queries, -1),
        k_segments=_pad(mask.k_segments, keys, -1),
    )


def _cut(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns `x` without the entries that belong to padding."""
    here = tuple(slice(n) for n in shape[: x.ndim])
    if all(size == part.stop for size, part in zip(x.shape, here, strict=False)):
        return x
    if not is_known(x) or len(x.devices()) > 1 or next(iter(x.devices())).platform != "cpu":
        return x[here]
    # On a CPU a view costs nothing, and for `x[here]` each new length would compile a program.
    return jax.device_put(np.asarray(x)[here], x.sharding if x.committed else None)
