"""Attention masks as descriptions, from which booleans are computed late.

A dense boolean mask rules out the fast kernels. So the attention function receives a description:
whether the mask is causal, a window, the positions of queries and keys. Padding has position -1.
"""

import dataclasses
import functools
import operator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxformers.checks import check_flag, check_size
from jaxformers.positions.scheme import (
    BiasPosition,
    acts_as,
)


class AttentionMask(eqx.Module):
    """A description of which queries may attend to which keys; `AttentionMask()` hides nothing.

    A query attends to the keys that satisfy all conditions. A query that may attend to no key gets
    zeros, not NaN.

    Arguments:
        causal: whether a query sees only keys at its own position and before.
        window: a query sees the last `window` positions, its own included; without `causal` it
            sees keys less than `window` positions away on both sides.
        explicit: boolean, True = may attend, broadcastable to `(batch, heads, t, s)`.
        q_positions: integer positions of the queries, `(batch, t)` or `(t,)`; None is 0 .. t-1.
        k_positions: positions of the keys; -1 hides a key from all queries.
        q_segments, k_segments: document numbers of packed sequences; a query sees only the keys of
            its own document.
        bias: a position scheme that adds a bias to the scores, such as `ALiBi()`.

    Example:
        >>> AttentionMask(causal=True).materialize(3, 3).astype(int)
        Array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]], dtype=int32)
    """

    causal: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    explicit: Bool[Array, "..."] | None
    q_positions: Int[Array, "*#b t"] | None
    k_positions: Int[Array, "*#b s"] | None
    q_segments: Int[Array, "*#b t"] | None
    k_segments: Int[Array, "*#b s"] | None
    bias: BiasPosition | None

    def __init__(
        self,
        causal: bool = False,
        window: int | None = None,
        explicit: Bool[Array, "..."] | None = None,
        q_positions: Int[Array, "*#b t"] | None = None,
        k_positions: Int[Array, "*#b s"] | None = None,
        q_segments: Int[Array, "*#b t"] | None = None,
        k_segments: Int[Array, "*#b s"] | None = None,
        bias: BiasPosition | None = None,
    ):
        if window is not None:
            check_size(window=window)
        if (q_segments is None) != (k_segments is None):
            raise ValueError("give q_segments and k_segments together, or neither.")
        explicit = None if explicit is None else jnp.asarray(explicit)
        if explicit is not None and explicit.dtype != jnp.bool_:
            raise ValueError(
                f"a mask must be boolean, True where a query may attend, got dtype "
                f"{explicit.dtype}. For 0/1 numbers write mask != 0."
            )
        check_flag(causal=causal)
        if bias is not None and not acts_as(bias, BiasPosition):
            raise ValueError(f"bias must be a scheme that biases scores, as ALiBi(), got {bias!r}.")
        self.causal = bool(causal)
        self.window = None if window is None else int(window)
        self.explicit = explicit
        self.q_positions = _as_integers("q_positions", q_positions)
        self.k_positions = _as_integers("k_positions", k_positions)
        self.q_segments = _as_integers("q_segments", q_segments)
        self.k_segments = _as_integers("k_segments", k_segments)
        self.bias = bias

    def replace(self, **changes) -> "AttentionMask":
        """Returns the same description with some fields changed."""
        return dataclasses.replace(self, **changes)

    def biased_by(self, bias: BiasPosition | None) -> "AttentionMask":
        """Returns the mask with the bias of a stack's position scheme, if there is one.

        Raises:
            ValueError: if the mask has another bias already.
        """
        if bias is not None and self.bias is not None and self.bias is not bias:
            raise ValueError(
                f"this model biases scores by {bias!r}, got a mask with the bias {self.bias!r} as "
                "well. Give one of the two."
            )
        return self if bias is None else self.replace(bias=bias)

    def query_positions(self, t: int) -> Int[Array, "*b {t}"]:
        """Returns the positions of `t` queries, counted from 0 where none were given."""
        return jnp.arange(t) if self.q_positions is None else self.q_positions

    def key_positions(self, s: int) -> Int[Array, "*b {s}"]:
        """Returns the positions of `s` keys, counted from 0 where none were given."""
        return jnp.arange(s) if self.k_positions is None else self.k_positions

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` unless the mask fits scores of this shape, `(batch, heads, t, s)`."""
        self.check_positions(shape[:-3], *shape[-2:])
        have = () if self.explicit is None else self.explicit.shape
        pairs = zip(reversed(have), reversed(shape), strict=False)
        # A mask of shape (1, s) is probably one row of padding, and would apply to the whole batch.
        padding = len(shape) == 4 and have == (1, shape[-1]) and shape[-2] > 1
        misfit = any(size not in (1, want) for size, want in pairs)
        if len(have) > len(shape) or misfit or padding:
            axes = "(batch, heads, t, s)" if len(shape) == 4 else "(heads, t, s)"
            raise ValueError(
                f"a mask must broadcast to {axes} = {shape}, got {have}. A mask per sequence has "
                "shape (batch, 1, t, s): write mask[:, None]. For padding, models take "
                "padding_mask=."
            )

    def check_positions(self, batch: tuple[int, ...], t: int, s: int) -> None:
        """Raises `ValueError` unless each query and each key has one position and one segment."""
        for name, length in dict(q_positions=t, k_positions=s, q_segments=t, k_segments=s).items():
            array = getattr(self, name)
            if array is not None and array.shape not in ((length,), (*batch, length)):
                raise ValueError(
                    f"{name} of a mask must have shape {(*batch, length)} or {(length,)}, "
                    f"got {array.shape}."
                )

    def block(self, i: Any, t: int, j: Any, s: int) -> "AttentionMask":
        """Returns the description of `t` queries from `i` on and `s` keys from `j` on."""

        def part(x: Array | None, start: Any, size: int) -> Array | None:
            return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis=-1)

        q, k = part(self.q_positions, i, t), part(self.k_positions, j, s)
        if self.causal or self.window is not None or self.bias is not None:
            q, k = (i + jnp.arange(t) if q is None else q), (j + jnp.arange(s) if k is None else k)
        explicit = self.explicit
        for axis, start, size in ((-2, i, t), (-1, j, s)):
            if explicit is not None and explicit.ndim >= -axis and explicit.shape[axis] > 1:
                explicit = lax.dynamic_slice_in_dim(explicit, start, size, axis=axis)
        return self.replace(
            explicit=explicit,
            q_positions=q,
            k_positions=k,
            q_segments=part(self.q_segments, i, t),
            k_segments=part(self.k_segments, j, s),
        )

    def pad(self, t: int, more_q: int, s: int, more_k: int) -> "AttentionMask":
        """Returns the description with more queries at the end, and more keys that are hidden."""

        def pad(x: Array | None, more: int, value: int = 0) -> Array | None:
            widths = [(0, 0)] * (0 if x is None else x.ndim - 1) + [(0, more)]
            return None if x is None else jnp.pad(x, widths, constant_values=value)

        explicit = self.explicit
        for axis, more in ((-2, more_q), (-1, more_k)):
            if explicit is not None and explicit.ndim >= -axis and explicit.shape[axis] > 1:
                widths = [(0, 0)] * explicit.ndim
                widths[axis] = (0, more)
                explicit = jnp.pad(explicit, widths)
        hides = more_k > 0 or self.k_positions is not None
        return self.replace(
            explicit=explicit,
            q_positions=pad(self.q_positions, more_q),
            k_positions=pad(self.key_positions(s), more_k, -1) if hides else None,
            q_segments=pad(self.q_segments, more_q),
            k_segments=pad(self.k_segments, more_k),
        )

    def reach(self, start: int, stop: int, s: int) -> tuple[int, int]:
        """Returns the bounds of the keys that the queries `start` to `stop` may see."""
        if self.q_positions is not None or self.k_positions is not None:
            return 0, s
        first, last = 0, s
        if self.causal:
            last = min(s, stop)
        if self.window is not None:
            first = max(0, start - self.window + 1)
            last = min(last, stop - 1 + self.window)
        # The bounds hold at least one key, so that no block is empty.
        return min(first, s - 1), max(last, min(first, s - 1) + 1)

    def materialize(self, t: int, s: int) -> Bool[Array, "..."] | None:
        """Returns the mask as booleans for `t` queries and `s` keys, or None if nothing is hidden.

        The shape broadcasts to `(batch, heads, t, s)`. It is `(t, s)` if the mask is the same for
        all sequences, and `(batch, 1, t, s)` if positions or segments differ between them.
        """
        conditions = []
        q = self.query_positions(t)[..., :, None]
        k = self.key_positions(s)[..., None, :]
        if self.k_positions is not None:
            conditions.append(k >= 0)
        if self.causal:
            conditions.append(k <= q)
        if self.window is not None:
            conditions.append(k > q - self.window)
            if not self.causal:
                conditions.append(k < q + self.window)
        if self.q_segments is not None and self.k_segments is not None:
            conditions.append(self.q_segments[..., :, None] == self.k_segments[..., None, :])
        # Batched conditions get an axis of heads here; the explicit mask already has one.
        allowed = [c[:, None] if c.ndim == 3 else c for c in conditions]
        if self.explicit is not None:
            allowed.append(self.explicit)
        return functools.reduce(operator.and_, allowed) if allowed else None

    def score_bias(self, t: int, s: int, num_heads: int) -> Float[Array, "*b n t s"] | None:
        """Returns the bias that the position scheme adds to the scores, in float32, or None."""
        if self.bias is None:
            return None
        positions = self.query_positions(t), self.key_positions(s)
        return self.bias.bias(*positions, num_heads, self.causal)


def _as_integers(name: str, x: ArrayLike | None) -> Int[Array, "*b t"] | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim not in (1, 2):
        raise ValueError(
            f"{name} of a mask must be integers of shape (batch, t) or (t,), got dtype {x.dtype} "
            f"and shape {x.shape}."
        )
    return x if x.dtype == jnp.int32 else x.astype(jnp.int32)  # unsigned types have no -1


# Booleans are True where a query may attend, and broadcast to (batch, heads, t, s).
Mask = AttentionMask | Bool[Array, "..."]


def as_mask(mask: Mask | None) -> AttentionMask:
    """Returns the description of a mask; None hides nothing, and an array becomes `explicit`."""
    if isinstance(mask, AttentionMask):
        return mask
    return AttentionMask(explicit=None if mask is None else jnp.asarray(mask))


def create_causal_mask(seq_length: int) -> Bool[Array, "t t"]:
    """Returns the lower triangle, True where a query (row) may attend to a key (column).

    Models create their own causal mask; this function is for layers that are used alone.

    Raises:
        ValueError: if `seq_length` is not a positive integer.

    Example:
        >>> create_causal_mask(2)
        Array([[ True, False],
               [ True,  True]], dtype=bool)
    """
    check_size(seq_length=seq_length)
    return jnp.tril(jnp.ones((seq_length, seq_length), jnp.bool_))


def create_padding_mask(tokens: Int[Array, "*b t"], pad_token: int) -> Bool[Array, "*b t"]:
    """Returns the `padding_mask` of models: True for real tokens, False for `pad_token`.

    Example:
        >>> create_padding_mask(jnp.array([5, 7, 0, 0]), pad_token=0)
        Array([ True,  True, False, False], dtype=bool)
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must hold integer ids, got dtype {tokens.dtype}. Cast them first."
        )
    return tokens != pad_token


def padding_to_positions(padding_mask: Bool[Array, "*b t"]) -> Int[Array, "*b t"]:
    """Returns the positions of the real tokens, counted from 0, and -1 for padding.

    The padding may be anywhere in a row.

    Example:
        >>> padding_to_positions(jnp.array([False, True, True, False]))
        Array([-1,  0,  1, -1], dtype=int32)
    """
    counts = jnp.cumsum(padding_mask, axis=-1, dtype=jnp.int32)
    return jnp.where(padding_mask, counts - 1, -1)
