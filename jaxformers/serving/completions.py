"""The route /v1/completions."""

from collections.abc import Iterator
from typing import Any

from jaxformers.serving.answering import Form, Reply
from jaxformers.serving.errors import Refused
from jaxformers.serving.fields import Fields
from jaxformers.serving.generator import Generator
from jaxformers.serving.options import MOST_NUMBER, read_options
from jaxformers.serving.text_job import Piece, Prompt, TextJob
from jaxformers.serving.token_text import TokenTexts

MOST_PROMPTS = 128
MOST_LOG_PROBS = 5
NEW_TOKENS = 16  # the most of an answer where a request says nothing, as OpenAI's


async def complete(generator: Generator, fields: Fields) -> Reply:
    """Returns the continuations of prompts.

    Arguments:
        generator: the model.
        fields: of the request, of which the model is known already.
    """
    top = fields.whole("logprobs", None, 0, MOST_LOG_PROBS)
    options = read_options(fields, generator.engine.vocab_size, top)
    best_of = fields.whole("best_of", None, 1, MOST_NUMBER)
    if best_of not in (None, options.n):
        raise Refused(
            f"best_of must be n, which is {options.n}, or left out: this server ranks no answers, "
            f"got {best_of}.",
            param="best_of",
            code="unsupported_parameter",
        )
    echoes = fields.flag("echo")
    if echoes and top is not None:
        raise Refused(
            "echo with logprobs is not supported by this server, which tells the "
            "log-probabilities of new tokens alone. Leave one of them out.",
            param="echo",
            code="unsupported_parameter",
        )
    most = fields.whole("max_tokens", None, 1, MOST_NUMBER)
    fields.accept({"suffix": ("",)})
    given = fields.inputs("prompt", MOST_PROMPTS)
    fields.finish()
    prompts = [await _read(generator, one) for one in given]
    new = generator.most_new(prompts, most, NEW_TOKENS, ("prompt", "max_tokens"))
    begins = [x.text if echoes else "" for x in prompts for _ in range(options.n)]
    form = CompletionForm(generator.token_texts, begins, options.lists)
    return Reply(generator, prompts, new, options, form)


async def _read(generator: Generator, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return await generator.read_text(prompt)
    return await generator.read_ids(prompt)


class CompletionForm(Form):
    """The form of completions.

    Arguments:
        texts: of the tokens.
        begins: the text before each answer.
        lists: whether log-probabilities are told.
    """

    prefix, names = "cmpl-", ("text_completion", "text_completion")

    def __init__(self, texts: TokenTexts, begins: list[str], lists: bool):
        self._texts, self._begins, self._lists = texts, begins, lists

    def whole(self, job: TextJob) -> dict[str, Any]:
        return self._choice(job, self._begins[job.index] + job.row.text, job.listed)

    def begin(self, job: TextJob) -> dict[str, Any] | None:
        begin = self._begins[job.index]
        return self._choice(job, begin, [], False) if begin else None

    def piece(self, piece: Piece, job: TextJob) -> Iterator[dict[str, Any]]:
        if piece.text or piece.listed or piece.is_last:
            yield self._choice(job, piece.text, piece.listed, piece.is_last)

    def _choice(self, job: TextJob, text: str, listed: Any, is_last: bool = True) -> dict[str, Any]:
        log_probs = self._texts.completion(listed) if self._lists else None
        reason = job.row.finish_reason if is_last else None
        return {"index": job.index, "text": text, "logprobs": log_probs, "finish_reason": reason}
