"""How probable given text is under a model."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxformers.checks import check_seq_length, check_size, check_usable
from jaxformers.generation.loop import begin_cache, read
from jaxformers.generation.prompts import (
    Prompt,
    Source,
    put,
    read_prompt,
    read_source,
    read_text,
    rows_for,
    to_source,
)
from jaxformers.ids import Tokens, as_ids
from jaxformers.log_probs import IGNORED, log_probs_of
from jaxformers.one_program import bucket
from jaxformers.output import check_output
from jaxformers.row_lengths import at_lengths


def score(
    model: Any, tokens: Tokens, padding_mask: ArrayLike | None, source: Prompt | None = None
) -> Float[Array, "*b t"]:
    """Returns the log-probability of each token given those before it; see the models' `score`.

    Arguments:
        model: a `TransformerLM` or a `Transformer`.
        tokens: of a text, or of a target that has a source.
        padding_mask: shape of `tokens`, True where a token is real.
        source: the encoder's tokens, for a model that has one.
    """
    check_usable(model=model)
    check_output(model)
    limit, name = model.max_seq_length, "tokens" if source is None else "tgt"
    text = read_text(tokens, padding_mask, model.vocab_size, limit, name, model.origin)
    t = text.tokens.shape[1]
    columns = bucket(t, limit)
    rows = rows_for(text, columns, source)
    read = None if source is None else to_source(model, source, rows)
    log_probs = _score(model, *text.to_bucket(columns, rows), read)
    return text.place(text.cut(log_probs, 0, t))


@eqx.filter_jit
def _score(
    model: Any, tokens: Int[Array, "b t"], real: Bool[Array, "b t"], source: Source | None
) -> Float[Array, "b t"]:
    given: dict[str, Any] = {}
    if source is not None:
        memory = model.encode(source.tokens, src_padding_mask=source.real)
        given = {"encoder_output": memory, "src_padding_mask": source.real}
    hidden, _ = model.forward(tokens, padding_mask=real, **given)
    columns = jnp.arange(tokens.shape[1])
    # The column of the last real token before each one, wherever padding stands; -1 if none.
    last = jax.lax.cummax(jnp.where(real, columns, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(before, 0)[..., None], axis=1)
    targets = jnp.where(real & (before >= 0), tokens, IGNORED)
    return log_probs_of(model.logits_of, hidden, targets)


def score_continuations(
    model: Any,
    prompt: list[int],
    continuations: list[list[int]],
    source: list[list[int]] | None = None,
) -> Float[np.ndarray, " n"]:
    """Returns the log-probability of each continuation of a prompt, which is read once.

    Arguments:
        model: a `TransformerLM` or a `Transformer`.
        prompt: at least one token; of a `Transformer` the beginning of the target.
        continuations: n rows of at least one token each.
        source: the encoder's tokens in one row, for a model that has one.
    """
    check_usable(model=model)
    check_output(model)
    limit, vocab_size = model.max_seq_length, model.vocab_size
    begin = read_prompt([prompt], None, vocab_size)
    n, t, u = len(continuations), len(prompt), max(map(len, continuations))
    check_seq_length(t + u, limit, "a prompt with its continuation")
    columns = bucket(t, limit)
    rows, width = bucket(n, smallest=1), bucket(u)
    answers, real = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.bool_)
    for i, row in enumerate(continuations):
        answers[i, : len(row)], real[i, : len(row)] = row, True
    encoded = None if source is None else to_source(model, read_source(model, source, None))
    given = begin.to_bucket(columns), put(t), jax.device_put((answers, real)), encoded
    return np.asarray(_score_continuations(model, *given))[:n]


@eqx.filter_jit
def _score_continuations(
    model: Any,
    prompt: tuple[Int[Array, "1 t"], Bool[Array, "1 t"]],
    columns: Int[Array, ""],
    continuations: tuple[Int[Array, "n u"], Bool[Array, "n u"]],
    source: Source | None,
) -> Float[Array, " n"]:
    tokens, real = continuations
    n, u = tokens.shape
    t = prompt[0].shape[1]
    cache = begin_cache(model, 1, t, source)
    last, cache = read(at_lengths(model, columns[None]), *prompt, columns, cache)
    cache = cache.resize(t + u).repeat(n)
    hidden, _ = model.forward(tokens, padding_mask=real, cache=cache)
    hidden = jnp.concatenate([jnp.repeat(last, n, axis=0), hidden[:, :-1]], axis=1)
    return log_probs_of(model.logits_of, hidden, jnp.where(real, tokens, IGNORED)).sum(-1)


def perplexity(
    model: Any, tokens: Tokens, stride: int | None = None, context: int | None = None
) -> float:
    """Returns the exponential of a text's mean negative log-probability per token.

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
