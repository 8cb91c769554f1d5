"""The route /v1/chat/completions."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxformers.serving.answering import Form, Reply, answer, one_of, stamp
from jaxformers.serving.errors import Refused
from jaxformers.serving.fields import Fields
from jaxformers.serving.formats import read_format
from jaxformers.serving.generator import Generator
from jaxformers.serving.job import MOST_TOP
from jaxformers.serving.options import MOST_NUMBER, read_options
from jaxformers.serving.text_job import Piece, TextJob
from jaxformers.text.call import DEFAULT_NEW_TOKENS

ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES = 4096
# Fields of OpenAI that are refused by name, with the values that change nothing.
REFUSED: dict[str, Any] = {
    **dict.fromkeys(("audio", "prediction", "web_search_options", "moderation", "verbosity"), ()),
    **dict.fromkeys(("function_call", "tool_choice"), ("none",)),
    **{"functions": ([],), "tools": ([],), "parallel_tool_calls": (True, False)},
    **{"modalities": (["text"],), "reasoning_effort": ("none",), "prompt_cache_options": ()},
}
OF_MESSAGES: dict[str, Any] = {
    **dict.fromkeys(("name", "audio", "function_call", "refusal", "tool_call_id"), ()),
    **{"tool_calls": ([],), "annotations": ([],)},
}


async def complete_chat(generator: Generator, fields: Fields) -> Reply:
    """Returns the answer to a conversation.

    Arguments:
        generator: the model.
        fields: of the request, of which the model is known already.
    """
    options = read_options(fields, generator.engine.vocab_size)
    fields.accept(REFUSED)
    messages = read_messages(fields)
    name, most = one_of(fields, "max_completion_tokens", "max_tokens", MOST_NUMBER)
    lists, top = _read_log_probs(fields)
    format_ = read_format(fields)
    fields.finish()
    follower = await generator.formats.follower(format_)
    prompts = [await generator.read_messages(messages)]
    new = generator.most_new(prompts, most, DEFAULT_NEW_TOKENS, ("messages", name))
    options = options._replace(sampling=replace(options.sampling, top=top))
    form = ChatForm(generator, lists, options.tells_usage)
    return answer(generator, prompts, new, options, follower, lists, form)


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Returns the messages of a conversation, whose contents are text."""
    given = fields.take("messages")
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MOST_MESSAGES} messages", given)
    messages = []
    for i, one in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(one, dict):
            raise Refused(f"{where} must be an object with a role and a content.", param=where)
        message = Fields(one, f"{where}.")
        role = message.choice("role", ROLES, required=True)
        content = _read_content(message)
        message.accept(OF_MESSAGES)
        message.finish()
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


def _read_content(message: Fields) -> str:
    """Returns the text of a message; its parts are on lines of their own."""
    given = message.take("content")
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise message.wrong("content", "a text, or a list of parts with text", given)
    texts = []
    for i, one in enumerate(given):
        where = f"{message.name('content')}[{i}]"
        if not isinstance(one, dict):
            raise Refused(f'{where} must be {{"type": "text", "text": ...}}.', param=where)
        part = Fields(one, f"{where}.")
        if part.take("type") != "text":
            raise Refused(
                f"{where}.type must be text: this server reads no pictures, sounds or files.",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        texts.append(str(part.string("text", required=True)))
        part.accept({"prompt_cache_breakpoint": ()})
        part.finish()
    return "\n".join(texts)


def _read_log_probs(fields: Fields) -> tuple[bool, int]:
    """Returns whether log-probabilities are asked for, and of how many alternatives."""
    lists, top = fields.flag("logprobs"), fields.whole("top_logprobs", None, 0, MOST_TOP)
    if top is not None and not lists:
        raise Refused("top_logprobs needs logprobs = true.", param="top_logprobs")
    return lists, top or 0


class ChatForm(Form):
    """The form of chat completions.

    Arguments:
        generator: the model.
        lists: whether log-probabilities are told.
        tells_usage: whether the last event tells the number of tokens.
    """

    def __init__(self, generator: Generator, lists: bool, tells_usage: bool):
        self._texts, self._lists, self._tells_usage = generator.token_texts, lists, tells_usage
        self._stamp = stamp("chatcmpl-", generator.name)

    def whole(self, jobs: list[TextJob], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": job.index,
                "message": {"role": "assistant", "content": job.row.text, "refusal": None},
                "logprobs": self._log_probs(job.listed),
                "finish_reason": job.row.finish_reason,
            }
            for job in jobs
        ]
        head = self._stamp | {"object": "chat.completion"}
        return head | {"choices": choices, "usage": usage}

    def begin(self, job: TextJob) -> dict[str, Any]:
        return self._chunk(job.index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, piece: Piece, job: TextJob) -> Iterator[dict[str, Any]]:
        listed = self._log_probs(piece.listed)
        if piece.text or piece.listed:
            yield self._chunk(job.index, {"content": piece.text}, listed, None)
        if piece.is_last:
            yield self._chunk(job.index, {}, None, job.row.finish_reason)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._event([], usage)

    def _log_probs(self, listed: Any) -> Any:
        return {"content": self._texts.chat(listed), "refusal": None} if self._lists else None

    def _chunk(self, index: int, delta: Any, log_probs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return self._event([choice], None)

    def _event(self, choices: list[Any], usage: Any) -> dict[str, Any]:
        head = self._stamp | {"object": "chat.completion.chunk", "choices": choices}
        return head | ({"usage": usage} if self._tells_usage else {})
