"""How probable given text is under a model."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxformers.checks import check_size
from jaxformers.generation.prompts import bucket, read_source, read_text
from jaxformers.ids import Tokens, as_ids
from jaxformers.origin import Origin


def score(
    step: Any,
    tokens: Tokens,
    padding_mask: ArrayLike | None,
    *,
    vocab_size: int,
    max_seq_length: int | None,
    origin: Origin | None = None,
    name: str = "tokens",
) -> Float[Array, "*b t"]:
    """The log-probability of each token given those before; see the models' own `score`."""
    text = read_text(tokens, padding_mask, vocab_size, max_seq_length, name, origin)
    t = text.tokens.shape[1]
    log_probs = _score(step, *text.to_bucket(bucket(t, max_seq_length)))
    return text.place(text.cut(log_probs, 0, t))


def score_with_source(
    make_step: Callable[..., Any],
    src: Tokens,
    tgt: Tokens,
    src_padding_mask: ArrayLike | None,
    tgt_padding_mask: ArrayLike | None,
    *,
    src_vocab_size: int,
    max_source_length: int | None,
    origin: Origin | None = None,
    **sizes: Any,
) -> Float[Array, "*b t"]:
    """`score` of a target given a source."""
    _, arrays = read_source(src, src_padding_mask, src_vocab_size, max_source_length, origin)
    return score(make_step(*arrays), tgt, tgt_padding_mask, **sizes, origin=origin, name="tgt")


@eqx.filter_jit
def _score(step: Any, tokens: Int[Array, "b t"], real: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    columns = jnp.arange(tokens.shape[1])
    # The column of the last real token before each one, wherever padding stands; -1 if none.
    last = jax.lax.cummax(jnp.where(real, columns, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    hidden = jnp.take_along_axis(step.full(tokens, real), jnp.maximum(before, 0)[..., None], axis=1)
    log_probs = jax.nn.log_softmax(step.project(hidden))
    log_probs = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(real & (before >= 0), log_probs, 0.0)


def perplexity(
    model: Any, tokens: Tokens, stride: int | None = None, context: int | None = None
) -> float:
    """The exponential of the mean negative log-probability per token, of a text of any length.

    The text is read in windows of `context` tokens that begin `stride` apart; in each, the tokens
    that no window before has scored are scored, so that all but the text's first are, once, with
    at least `context - stride` tokens before them (but for the beginning of the text).

    Arguments:
        model: a `TransformerLM`.
        tokens: the text, `(t,)`, or several of one length, `(b, t)`.
        stride: how far windows are apart, less than `context`; small is better and slower. Default
            half of it.
        context: the longest window; default `model.max_seq_length`, or the whole text if there is
            no such limit.

    Raises:
        ValueError: if there are fewer than two tokens, or a number is out of its range.

    Example:
        >>> perplexity(model, jnp.arange(50), stride=8) > 1.0
        True
    """
    tokens = np.atleast_2d(np.asarray(as_ids(tokens, "tokens")))
    t = tokens.shape[-1]
    if t < 2:
        raise ValueError(f"tokens must be at least 2, to score one from another, got {t}.")
    limit = model.max_seq_length
    context = min(t, limit or t) if context is None else context
    check_size(context=context)
    if context < 2 or (limit is not None and context > limit):
        raise ValueError(
            f"context must be from 2 to max_seq_length = {limit} tokens, got {context}."
        )
    stride = max(1, context // 2) if stride is None else stride
    check_size(stride=stride)
    if stride >= context and t > context:
        raise ValueError(
            f"stride must be less than the context of {context} tokens, got {stride}: the first "
            "token of a window has nothing before it to be scored from."
        )
    total, scored = 0.0, 1  # the text's first token cannot be scored
    for begin in range(0, t, stride):
        end = min(begin + context, t)
        log_probs = model.score(tokens[:, begin:end])
        total += float(np.asarray(log_probs)[:, scored - begin :].sum(dtype=np.float64))
        scored = end
        if end == t:
            break
    return math.exp(-total / ((t - 1) * tokens.shape[0]))
