"""What a model asks of a job."""

from collections.abc import Sequence
from typing import Any

from jaxformers.files.json_file import shorten
from jaxformers.serving.job import Job
from jaxformers.transformer import Transformer


def check_job(job: Job, model: Any, context: int) -> None:
    """Checks that a job can be decoded.

    Arguments:
        job: a request for one row.
        model: a `TransformerLM` or a `Transformer`.
        context: the most tokens of a row.

    Raises:
        ValueError: if it has no prompt, tokens that the model does not have, more of them than the
            context has room for, or a source exactly where it must not.
    """
    total = len(job.prompt) + job.max_new_tokens
    if not job.prompt or job.max_new_tokens < 1 or total > context:
        raise ValueError(
            f"a prompt and its new tokens must be at least one token each and at most "
            f"{context} together, got {len(job.prompt)} and {job.max_new_tokens}."
        )
    _check_ids(job.prompt, model.vocab_size, "a prompt")
    is_pair = isinstance(model, Transformer)
    if not job.source if is_pair else job.source is not None:
        raise ValueError(
            "source must be at least one id for an encoder-decoder, and None for other models, "
            f"got {shorten(job.source)}."
        )
    if job.source is None:
        return
    _check_ids(job.source, model.src_vocab_size, "source")
    limit = model.src_embedding.max_seq_length
    if limit is not None and len(job.source) > limit:
        raise ValueError(
            f"source must be at most the {limit} tokens that the encoder has positions for, "
            f"got {len(job.source)}."
        )


def _check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raises if there are ids beyond the vocabulary, such as of another model's tokenizer."""
    wrong = [x for x in (min(ids), max(ids)) if not 0 <= x < vocab_size]
    if wrong:
        raise ValueError(
            f"{name} must have ids from 0 to {vocab_size - 1}, the tokens of the model, "
            f"got {wrong[0]}."
        )
