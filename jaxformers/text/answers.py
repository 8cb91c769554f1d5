"""The texts that a model generates for a call."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxformers.checks import check_flag, check_size
from jaxformers.generation.prompts import read_source
from jaxformers.generation.targets import begin_target
from jaxformers.generation.warm_up import compile_generate
from jaxformers.one_program import sizes_up_to
from jaxformers.progress import progress_bar
from jaxformers.text.batches import longest_first
from jaxformers.text.call import Call, TextGeneration, read_call
from jaxformers.text.stop_table import stop_table
from jaxformers.text.stream import TextStream
from jaxformers.tokenizers.rows import stack
from jaxformers.tokenizers.tokenizer import Tokenizer
from jaxformers.transformer import Transformer


def answer(
    model: Any,
    tokenizer: Tokenizer,
    call: Call,
    is_single: bool,
    batch_size: int,
    progress: bool | None,
) -> Any:
    """Returns the texts of a call, in the form of what was given.

    Arguments:
        model, tokenizer: of the generator.
        call: checked.
        is_single: whether one prompt was given, and no list.
        batch_size, progress: as for `TextGenerator.__call__`.
    """
    check_size(batch_size=batch_size)
    if progress is not None:
        check_flag(progress=progress)
    found: list[list[TextGeneration]] = [[]] * len(call.rows)
    order = list(range(len(call.rows)))
    if len(order) > batch_size:
        order = longest_first([len(row) for row in call.rows]).tolist()
    elif progress is None:
        progress = False
    with progress_bar(len(order), "text", progress) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            texts = generate(model, tokenizer, call.part(part))
            for i, text in zip(part, texts, strict=True):
                found[i] = text
            bar.update(len(part))
    results: list[Any] = [x for texts in found for x in texts]
    if not call.options.get("return_scores", False):
        results = [x.text for x in results]
    return results[0] if is_single and len(results) == 1 else results


def generate(model: Any, tokenizer: Tokenizer, call: Call) -> list[list[TextGeneration]]:
    """Returns the texts of each prompt of one batch."""
    texts = read_out(model, tokenizer, call, with_stops(model, tokenizer, call))
    # Where a tokenizer changes the text of a token, a row may go on after the bytes of a string.
    return texts or read_out(model, tokenizer, call, call.options)


def read_out(
    model: Any, tokenizer: Tokenizer, call: Call, options: dict[str, Any]
) -> list[list[TextGeneration]]:
    """Returns the texts of each prompt; none if the loop ended a row where its text goes on."""
    options = {**options, "return_scores": True}
    begin = max(map(len, call.rows))
    if isinstance(model, Transformer):
        begin = 1  # the start token
    tokens, mask = as_tokens(model, call.rows)
    out = model.generate(tokens, most_tokens(model, call), **mask, **options)
    tokens, log_probs = np.asarray(out.tokens)[:, begin:], np.asarray(out.log_probs)
    finished, times = np.asarray(out.finished), len(tokens) // len(call.rows)
    texts = []
    for i, row in enumerate(call.row_texts(model, tokenizer, times)):
        for token in tokens[i].tolist():
            row.add(token)
        row.finish()
        kept = log_probs[i, : len(row.tokens)]
        # The filling after the end of a row has 0.
        if call.stop and finished[i] and not row.is_stopped and kept[-1] == 0:
            return []
        score = float(out.scores[i] if options.get("num_beams", 1) > 1 else kept.sum())
        given = row.text, str(row.finish_reason), row.tokens, kept, score
        texts.append(TextGeneration(*given, len(call.rows[i // times])))
    return [texts[i : i + times] for i in range(0, len(texts), times)]


def with_stops(model: Any, tokenizer: Tokenizer, call: Call) -> dict[str, Any]:
    """Returns the options of a call, by which the compiled loop ends rows with stop strings."""
    table = stop_table(call.stop, tokenizer, model.vocab_size) if call.stop else None
    if table is None:
        return call.options
    return {**call.options, "processors": [*(call.options.get("processors") or []), table]}


def stream(model: Any, tokenizer: Tokenizer, call: Call, is_single: bool) -> TextStream:
    """Returns the texts of a call as they come."""
    tokens, mask = as_tokens(model, call.rows)
    columns = model.stream(tokens, most_tokens(model, call), **mask, **call.options)
    return TextStream(columns, call.row_texts(model, tokenizer), is_single)


def as_tokens(model: Any, rows: list[list[int]]) -> tuple[Int[np.ndarray, "b t"], dict[str, Any]]:
    """Returns rows padded on the left, and the mask by its name.

    The mask is always given, since a text may begin with the token that is padding elsewhere.
    """
    real = stack([[1] * len(row) for row in rows], 0, "left") == 1
    name = "src_padding_mask" if isinstance(model, Transformer) else "padding_mask"
    return stack(rows, 0, "left"), {name: real}


def most_tokens(model: Any, call: Call) -> int:
    """Returns the number that the model's `generate` takes, of an encoder-decoder the length."""
    return call.max_new_tokens + isinstance(model, Transformer)


def compile_ahead(
    model: Any,
    tokenizer: Tokenizer,
    prompt_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    streams: bool,
    stop: str | Sequence[str] | None,
    options: Mapping[str, Any],
) -> float:
    """Compiles the programs of calls, and returns the seconds that it took.

    Arguments as for `TextGenerator.warm_up`.
    """
    begin = time.perf_counter()
    for count in sizes_up_to(batch_size, smallest=1):
        for length in sizes_up_to(prompt_tokens, model.max_seq_length):
            rows = [[0] * length] * count
            given = max_new_tokens, stop, True, options
            call = read_call(model, tokenizer, rows, rows, *given)
            asked = with_stops(model, tokenizer, call)
            if streams:
                columns = stream(model, tokenizer, call, False).columns
                for _ in range(2):  # the first column, and one after it
                    next(columns, None)
            elif isinstance(model, Transformer):
                source = read_source(model, rows, None)
                target = begin_target(model, source, None, None, None)
                compile_generate(model, target, max_new_tokens, asked, source)
            else:
                compile_generate(model, rows, max_new_tokens, asked)
    return time.perf_counter() - begin
