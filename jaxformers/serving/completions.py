"""The route /v1/completions."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxformers.serving.answering import Form, Reply, answer, stamp
from jaxformers.serving.errors import Refused
from jaxformers.serving.fields import Fields
from jaxformers.serving.generator import Generator
from jaxformers.serving.options import MOST_NUMBER, read_options
from jaxformers.serving.text_job import Piece, Prompt, TextJob

MOST_PROMPTS = 128
MOST_LOG_PROBS = 5
NEW_TOKENS = 16  # the most of an answer where a request says nothing, as OpenAI's


async def complete(generator: Generator, fields: Fields) -> Reply:
    """Returns the continuations of prompts.

    Arguments:
        generator: the model.
        fields: of the request, of which the model is known already.
    """
    options = read_options(fields, generator.engine.vocab_size)
    best_of = fields.whole("best_of", None, 1, MOST_NUMBER)
    if best_of not in (None, options.n):
        raise Refused(
            f"best_of must be n, which is {options.n}, or left out: this server ranks no answers, "
            f"got {best_of}.",
            param="best_of",
            code="unsupported_parameter",
        )
    top = fields.whole("logprobs", None, 0, MOST_LOG_PROBS)
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
    given = _read_prompts(fields)
    fields.finish()
    prompts = [await _read(generator, one) for one in given]
    new = generator.most_new(prompts, most, NEW_TOKENS, ("prompt", "max_tokens"))
    options = options._replace(sampling=replace(options.sampling, top=top or 0))
    begins = [x.text if echoes else "" for x in prompts for _ in range(options.n)]
    form = CompletionForm(generator, begins, top is not None, options.tells_usage)
    return answer(generator, prompts, new, options, None, top is not None, form)


def _read_prompts(fields: Fields) -> list[Any]:
    """Returns the prompts, each of which is a text or a list of ids."""
    given = fields.take("prompt")
    wanted = f"a text, a list of token ids, or a list of up to {MOST_PROMPTS} of those"
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise fields.wrong("prompt", wanted, given)
    if all(type(x) is int for x in given):
        return [given]
    kinds = {type(x) for x in given}
    if len(given) > MOST_PROMPTS or kinds not in ({str}, {list}):
        raise fields.wrong("prompt", wanted, given)
    return given


async def _read(generator: Generator, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return await generator.read_text(prompt, "prompt")
    return await generator.read_ids(prompt, "prompt")


class CompletionForm(Form):
    """The form of completions.

    Arguments:
        generator: the model.
        begins: the text before each answer.
        lists: whether log-probabilities are told.
        tells_usage: whether the last event tells the number of tokens.
    """

    def __init__(self, generator: Generator, begins: list[str], lists: bool, tells_usage: bool):
        self._texts, self._begins, self._lists = generator.token_texts, begins, lists
        self._tells_usage = tells_usage
        self._head = stamp("cmpl-", generator.name) | {"object": "text_completion"}

    def whole(self, jobs: list[TextJob], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            self._choice(job, self._begins[job.index] + job.row.text, job.listed) for job in jobs
        ]
        return self._head | {"choices": choices, "usage": usage}

    def begin(self, job: TextJob) -> dict[str, Any] | None:
        begin = self._begins[job.index]
        return self._event([self._choice(job, begin, [], False)], None) if begin else None

    def piece(self, piece: Piece, job: TextJob) -> Iterator[dict[str, Any]]:
        if piece.text or piece.listed or piece.is_last:
            choice = self._choice(job, piece.text, piece.listed, piece.is_last)
            yield self._event([choice], None)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._event([], usage)

    def _choice(self, job: TextJob, text: str, listed: Any, is_last: bool = True) -> dict[str, Any]:
        log_probs = self._texts.completion(listed) if self._lists else None
        reason = job.row.finish_reason if is_last else None
        return {"index": job.index, "text": text, "logprobs": log_probs, "finish_reason": reason}

    def _event(self, choices: list[Any], usage: Any) -> dict[str, Any]:
        return self._head | {"choices": choices} | ({"usage": usage} if self._tells_usage else {})
