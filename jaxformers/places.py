"""Which positions tokens have, and which document they are of: one rule for all models.

Callers say it by a padding mask, by positions, by the ids of packed documents, or by an
`AttentionMask` that has these. Each fact is given once:

- `padding_mask` or `positions`, never both: positions are -1 for padding, and without them they are
  counted from 0 over the real tokens.
- `segment_ids` with either of them or alone: a token attends to those of its own segment. Positions
  that are not given begin with 0 in each segment, whose tokens are next to each other.
- A mask with positions or segments of its own goes with none of these that it already has.
"""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Int

from jaxformers.checks import check_padding_mask, is_known, least_and_most
from jaxformers.masks import AttentionMask, Mask, as_mask, padding_to_positions


class TextPlaces(TypedDict, total=False):
    """Where the tokens of an encoder are, and of which type; every name may be left out.

    Arguments:
        padding_mask: boolean, shape of `tokens`, True where a token is real.
        positions: integers, shape of `tokens`, -1 for padding; instead of a padding mask.
        segment_ids: integers, shape of `tokens`, the document of each token in packed rows.
        token_types: integers, shape of `tokens`, the segment of each token (BERT).
    """

    padding_mask: ArrayLike | None
    positions: ArrayLike | None
    segment_ids: ArrayLike | None
    token_types: ArrayLike | None


class SourcePlaces(TypedDict, total=False):
    """Where the tokens of a source are; every name may be left out.

    Arguments:
        src_padding_mask: boolean, shape of `src`, True where a token is real.
        src_positions: integers, shape of `src`, -1 for padding; instead of a padding mask.
        src_segment_ids: integers, shape of `src`, the document of each token in packed rows.
    """

    src_padding_mask: ArrayLike | None
    src_positions: ArrayLike | None
    src_segment_ids: ArrayLike | None


class PairPlaces(SourcePlaces, total=False):
    """Where the tokens of a source and of a target are; every name may be left out.

    Arguments:
        src_padding_mask, src_positions, src_segment_ids: as in `SourcePlaces`.
        tgt_padding_mask, tgt_positions, tgt_segment_ids: the same of shape `tgt`. Segments of both
            sides go together: a target attends to the source with the same id.
    """

    tgt_padding_mask: ArrayLike | None
    tgt_positions: ArrayLike | None
    tgt_segment_ids: ArrayLike | None


class TargetPlaces(SourcePlaces, total=False):
    """Where the tokens that a decoder reads are, and those of their source.

    Arguments:
        padding_mask, positions, segment_ids: of the tokens, as in `TransformerLM`.
        src_padding_mask, src_positions, src_segment_ids: as in `SourcePlaces`.
    """

    padding_mask: ArrayLike | None
    positions: ArrayLike | None
    segment_ids: ArrayLike | None


def of_source(places: PairPlaces | TargetPlaces) -> SourcePlaces:
    """Returns where the tokens of the source are."""
    return {
        "src_padding_mask": places.get("src_padding_mask"),
        "src_positions": places.get("src_positions"),
        "src_segment_ids": places.get("src_segment_ids"),
    }


def of_target(places: PairPlaces) -> TargetPlaces:
    """Returns the places of a pair, by the names that they have for the tokens of a decoder."""
    return {
        **of_source(places),
        "padding_mask": places.get("tgt_padding_mask"),
        "positions": places.get("tgt_positions"),
        "segment_ids": places.get("tgt_segment_ids"),
    }


def place(
    mask: Mask | None,
    shape: tuple[int, ...],
    padding_mask: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    *,
    seen: Int[Array, " b"] | None = None,
    limit: int | None = None,
    prefix: str = "",
) -> AttentionMask:
    """Returns the mask of a sequence over itself, with its positions; none where they are 0 .. t-1.

    Arguments:
        mask: as the caller gave it; one with positions keeps them.
        shape: of the tokens, `(b, t)` or `(t,)`.
        padding_mask, positions, segment_ids: see this module.
        seen: how many tokens each row already has in the cache.
        limit: how many positions the model knows; None is no limit.
        prefix: what comes before the names of the arguments in errors, "src_" or "tgt_".

    Raises:
        ValueError: if one of them has the wrong shape or type, or they say the same thing twice.
    """
    mask, name = as_mask(mask), f"{prefix}padding_mask"
    real = check_padding_mask(padding_mask, shape, name)
    positions = _check_integers(positions, shape, f"{prefix}positions", -1, limit)
    segments = _check_integers(segment_ids, shape, f"{prefix}segment_ids", None, None)
    _check_cache(shape, seen, segments, prefix)
    _check_once(mask, real, positions, segments, prefix)
    if segments is not None:
        mask = mask.replace(q_segments=segments, k_segments=segments)
    if mask.q_positions is not None:
        keys = mask.q_positions if mask.k_positions is None else mask.k_positions
        mask = mask.replace(k_positions=keys)
        mask.check_positions(shape[:-1], shape[-1], keys.shape[-1])
        return mask
    if positions is None:
        if real is None and seen is None and segments is None:
            return mask
        positions = _count(jnp.ones(shape, jnp.bool_) if real is None else real, segments, seen)
    return mask.replace(q_positions=positions, k_positions=positions)


def place_source(
    mask: Mask | None,
    shape: tuple[int, ...] | None,
    tgt_segment_ids: ArrayLike | None,
    *,
    src_padding_mask: ArrayLike | None = None,
    src_positions: ArrayLike | None = None,
    src_segment_ids: ArrayLike | None = None,
) -> AttentionMask:
    """Returns the mask of a target over its source.

    Arguments:
        mask: as the caller gave it.
        shape: of the source; None if it is in a cache.
        tgt_segment_ids: those of the target.
        src_padding_mask, src_positions, src_segment_ids: see `SourcePlaces`.
    """
    mask = as_mask(mask)
    if (tgt_segment_ids is None) != (src_segment_ids is None):
        raise ValueError(
            "src_segment_ids and tgt_segment_ids say together which documents belong to each "
            "other, got one of them. Give both, or neither."
        )
    given = src_padding_mask, src_positions, src_segment_ids
    name = "src_padding_mask" if src_positions is None else "src_positions"
    first = next((x for x in given if x is not None), None)
    if first is None:
        return mask
    if mask.k_positions is not None:
        raise ValueError(
            "src_tgt_mask with k_positions already says which source tokens are padding, "
            f"got {name} as well. Give one of the two."
        )
    shape = jnp.shape(first) if shape is None else shape
    source = place(None, shape, *given, prefix="src_")
    if src_segment_ids is not None:
        target = jnp.asarray(tgt_segment_ids)
        mask = mask.replace(q_segments=target, k_segments=source.k_segments)
    return mask.replace(k_positions=source.k_positions)


def _check_integers(
    x: ArrayLike | None, shape: tuple[int, ...], name: str, least: int | None, limit: int | None
) -> Int[Array, "*b t"] | None:
    """Returns integers of the tokens' shape as an array, or raises; None stays None."""
    if x is None:
        return None
    array: Any = x if isinstance(x, jax.Array) else np.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != shape:
        raise ValueError(
            f"{name} must be integers with the tokens' shape {shape}, got an array of dtype "
            f"{array.dtype} and shape {array.shape}."
        )
    if is_known(array):
        low, high = least_and_most(array)
        short = least is not None and low < least
        if short or (limit is not None and high >= limit):
            top = "" if limit is None else f" and less than max_seq_length = {limit}"
            raise ValueError(
                f"{name} must be at least 0{top}, or -1 for padding, got {low if short else high}."
            )
        info = jnp.iinfo(jnp.int32)
        if low < info.min or high > info.max:
            raise ValueError(f"{name} must fit in 32 bits, got {low if low < info.min else high}.")
    return jnp.asarray(array, jnp.int32)


def _check_cache(
    shape: tuple[int, ...], seen: Array | None, segments: Array | None, prefix: str
) -> None:
    """Raises unless tokens fit the rows of a cache, if there is one."""
    if seen is None:
        return
    if seen.shape != shape[:-1]:
        raise ValueError(
            f"tokens must have shape (batch, t) with the cache's batch, {len(seen)}, got {shape}."
        )
    if segments is not None:
        raise ValueError(
            f"{prefix}segment_ids do not go with a cache, whose rows are one document each, got "
            "both. Give each document a row."
        )


def _check_once(mask: AttentionMask, real: Any, positions: Any, segments: Any, prefix: str) -> None:
    """Raises if two arguments say the same thing."""
    if mask.q_positions is None and mask.k_positions is not None:
        raise ValueError(
            "the mask of a sequence over itself needs q_positions where it has k_positions, got "
            "k_positions alone. Give q_positions: the keys' are the same unless you say otherwise."
        )
    name = f"{prefix}padding_mask" if positions is None else f"{prefix}positions"
    if mask.q_positions is not None and (real is not None or positions is not None):
        raise ValueError(
            "an AttentionMask with q_positions already says what is padding (position -1), "
            f"got {name} as well. Give one of the two."
        )
    if real is not None and positions is not None:
        raise ValueError(
            f"{prefix}positions already say what is padding (position -1), got "
            f"{prefix}padding_mask as well. Give one of the two."
        )
    if mask.q_segments is not None and segments is not None:
        raise ValueError(
            f"an AttentionMask with q_segments already says what is together, got "
            f"{prefix}segment_ids as well. Give one of the two."
        )


def _count(
    real: Bool[Array, "*b t"], segments: Int[Array, "*b t"] | None, seen: Int[Array, " b"] | None
) -> Int[Array, "*b t"]:
    """Returns positions counted over the real tokens, in each segment if there are several."""
    positions = padding_to_positions(real)
    if segments is not None:
        begins = jnp.concatenate(
            [jnp.ones_like(real[..., :1]), segments[..., 1:] != segments[..., :-1]], axis=-1
        )
        before = jnp.cumsum(real, axis=-1, dtype=jnp.int32) - real.astype(jnp.int32)
        start = lax.cummax(jnp.where(begins, before, 0), axis=real.ndim - 1)
        return jnp.where(real, positions - start, -1)
    return positions if seen is None else jnp.where(real, positions + seen[:, None], -1)
