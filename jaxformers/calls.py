"""The arguments of a call of a model, checked while their values can still be read.

A model is given as it is: each function reads the sizes, positions and tables that the call needs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, PRNGKeyArray

from jaxformers.cache import Cache
from jaxformers.checks import check_seq_length, check_tokens, check_usable, is_known, least_and_most
from jaxformers.ids import Tokens, as_ids
from jaxformers.log_probs import IGNORED, check_targets, differ
from jaxformers.masks import AttentionMask, Mask
from jaxformers.mistakes import warn_of_text
from jaxformers.one_program import TokenRows
from jaxformers.places import (
    PairPlaces,
    SourcePlaces,
    TargetPlaces,
    of_source,
    of_target,
    place,
    place_source,
)


def read_text(
    model: Any, tokens: ArrayLike, mask: Mask | None, cache: Cache | None, **places: Any
) -> TokenRows:
    """Returns the tokens of a decoder-only model.

    Arguments:
        model: a `TransformerLM`.
        tokens, mask, cache: as the caller gave them.
        **places: `padding_mask`, `positions`, `segment_ids`.
    """
    check_usable(model=model)
    tokens = check_tokens(tokens, model.vocab_size)
    seen, limit = None if cache is None else cache.token_counts, model.max_seq_length
    mask = place(mask, tokens.shape, **places, seen=seen, limit=limit).replace(causal=True)
    _check_mask(mask, tokens.shape, limit)
    return TokenRows(tokens, mask, limit=limit)


def read_encoded(
    model: Any,
    tokens: ArrayLike,
    mask: Mask | None,
    key: PRNGKeyArray | None,
    token_types: ArrayLike | None = None,
    **places: Any,
) -> TokenRows:
    """Returns the tokens of an encoder-only model, and warns of padding without a mask.

    Arguments:
        model: a `TransformerEncoder`.
        tokens, mask, key, token_types: as the caller gave them.
        **places: `padding_mask`, `positions`, `segment_ids`.
    """
    check_usable(model=model)
    tokens = check_tokens(tokens, model.vocab_size)
    given = mask, places.get("padding_mask"), places.get("positions")
    limit = model.max_seq_length
    mask = place(mask, tokens.shape, **places, limit=limit)
    _check_mask(mask, tokens.shape, limit)
    if key is None:  # warnings are for inference alone
        is_masked = any(x is not None for x in given)
        warn_of_text(tokens, is_masked, mask.q_positions, model.origin, limit)
    types = model.embedding.check_types(token_types, tokens.shape)
    return TokenRows(tokens, mask, token_types=types, limit=limit)


def read_source(
    model: Any, src: ArrayLike, mask: Mask | None, key: PRNGKeyArray | None, places: SourcePlaces
) -> TokenRows:
    """Returns the source of an encoder-decoder, and warns of padding without a mask."""
    check_usable(model=model)
    src = check_tokens(src, model.src_vocab_size, "src")
    real, positions = places.get("src_padding_mask"), places.get("src_positions")
    limit, is_masked = model.src_embedding.max_seq_length, mask is not None
    given = real, positions, places.get("src_segment_ids")
    mask = place(mask, src.shape, *given, limit=limit, prefix="src_")
    _check_mask(mask, src.shape, limit)
    if key is None:  # warnings are for inference alone
        is_masked = is_masked or real is not None or positions is not None
        names = "src", "src_padding_mask"
        warn_of_text(src, is_masked, mask.q_positions, model.origin, limit, *names)
    return TokenRows(src, mask, limit=limit)


def read_target(
    model: Any,
    tgt: ArrayLike,
    mask: Mask | None,
    src_tgt_mask: Mask | None,
    source: tuple[int, ...] | None,
    cache: Cache | None,
    places: TargetPlaces,
) -> TokenRows:
    """Returns the target of an encoder-decoder.

    Arguments:
        model: a `Transformer`.
        tgt, mask, src_tgt_mask, cache, places: as the caller gave them.
        source: the shape of the source's tokens; None if the source is in the cache.
    """
    check_usable(model=model)
    tgt = check_tokens(tgt, model.tgt_vocab_size, "tgt")
    segments, limit = places.get("segment_ids"), model.max_seq_length
    cross = place_source(src_tgt_mask, source, segments, **of_source(places))
    given = places.get("padding_mask"), places.get("positions"), segments
    seen = None if cache is None else cache.token_counts
    mask = place(mask, tgt.shape, *given, seen=seen, limit=limit, prefix="tgt_")
    _check_mask(mask, tgt.shape, limit)
    if source is not None:
        cross.check_positions(tgt.shape[:-1], tgt.shape[-1], source[-1])
    return TokenRows(tgt, mask.replace(causal=True), cross, limit=limit)


def read_pair(
    model: Any,
    src: ArrayLike,
    tgt: ArrayLike,
    masks: tuple[Mask | None, Mask | None, Mask | None],
    key: PRNGKeyArray | None,
    places: PairPlaces,
) -> tuple[TokenRows, TokenRows]:
    """Returns source and target of an encoder-decoder.

    Arguments:
        model: a `Transformer`.
        src, tgt, key, places: as the caller gave them.
        masks: of the source, of the target, and of the target over the source.
    """
    source = read_source(model, src, masks[0], key, of_source(places))
    shape = source.tokens.shape
    return source, read_target(model, tgt, *masks[1:], shape, None, of_target(places))


def with_targets(rows: TokenRows, targets: Tokens, vocab_size: int) -> TokenRows:
    """Returns the tokens of a call with the target of each of them, -100 for padding.

    Arguments:
        rows: the tokens.
        targets: as the caller gave them.
        vocab_size: the number of tokens that the model predicts.

    Raises:
        ValueError: if targets are no integers, have another shape than the tokens, or one that
            counts is outside the vocabulary.
    """
    targets, positions = as_ids(targets, "targets"), rows.mask.q_positions
    if targets.shape != rows.tokens.shape:
        raise ValueError(
            f"targets must have the shape of the tokens, {rows.tokens.shape}, got {targets.shape}. "
            "The target of a token is the one that follows it, or -100."
        )
    ids: Any
    if _is_here(targets) and (positions is None or _is_here(positions)):
        ids, where = np.asarray(targets), getattr(targets, "sharding", None)
        counted = differ(ids) & (True if positions is None else np.asarray(positions) >= 0)
        check_targets(ids[counted], vocab_size)
        ids = jax.device_put(np.where(counted, ids.astype(np.int32), IGNORED), where)
    else:
        counted = differ(targets) & (True if positions is None else positions >= 0)
        ids = targets.astype(jnp.int32)
        ids = jnp.where(ids == IGNORED, -1, ids)  # a cast may have made it -100
        ids = jnp.where(counted, ids, IGNORED)
    return dataclasses.replace(rows, targets=ids)


def _is_here(x: Any) -> bool:
    """Returns whether the values of an array are known to this process."""
    return is_known(x) and getattr(x, "is_fully_addressable", True)


def _check_mask(mask: AttentionMask, shape: tuple[int, ...], limit: int | None) -> None:
    """Raises unless positions and segments fit the tokens, and the model knows the positions.

    Arguments:
        mask: of the tokens over themselves.
        shape: of the tokens.
        limit: how many positions the model knows; None is no limit.
    """
    mask.check_positions(shape[:-1], shape[-1], shape[-1])
    positions = mask.q_positions
    if limit is not None and positions is not None and is_known(positions):
        check_seq_length(least_and_most(positions)[1] + 1, limit)
