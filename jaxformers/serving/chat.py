"""The route /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any

from jaxformers.serving.answering import Form, Reply
from jaxformers.serving.errors import Refused
from jaxformers.serving.fields import Fields
from jaxformers.serving.formats import read_format
from jaxformers.serving.generator import Generator
from jaxformers.serving.job import MOST_TOP
from jaxformers.serving.options import MOST_NUMBER, read_options
from jaxformers.serving.text_job import Piece, TextJob
from jaxformers.serving.token_text import TokenTexts
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
    options = read_options(fields, generator.engine.vocab_size, _read_top(fields))
    fields.accept(REFUSED)
    messages = read_messages(fields)
    name, most = _read_most(fields)
    format_ = read_format(fields)
    fields.finish()
    follower = await generator.formats.follower(format_)
    prompts = [await generator.read_messages(messages)]
    new = generator.most_new(prompts, most, DEFAULT_NEW_TOKENS, ("messages", name))
    form = ChatForm(generator.token_texts, options.lists)
    return Reply(generator, prompts, new, options, form, follower)


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Returns the messages of a conversation, whose contents are text."""
    given = fields.take("messages")
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MOST_MESSAGES} messages", given)
    messages = []
    for i, one in enumerate(given):
        message = fields.part(one, f"messages[{i}]", "an object with a role and a content")
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
        part = message.part(one, f"content[{i}]", 'an object {"type": "text", "text": ...}')
        kind = part.take("type")
        if kind != "text":
            wanted = "text, since this server reads no pictures, sounds or files"
            raise part.wrong("type", wanted, kind, "unsupported_parameter")
        texts.append(str(part.string("text", required=True)))
        part.accept({"prompt_cache_breakpoint": ()})
        part.finish()
    return "\n".join(texts)


def _read_most(fields: Fields) -> tuple[str, int | None]:
    """Returns the most new tokens, and the name of the field that says it; None is the usual."""
    name, older = "max_completion_tokens", "max_tokens"
    most, other = (fields.whole(x, None, 1, MOST_NUMBER) for x in (name, older))
    if most is not None and other is not None:
        raise Refused(f"{name} and {older} say the same, got both. Pass one.", param=older)
    return (older, other) if most is None else (name, most)


def _read_top(fields: Fields) -> int | None:
    """Returns of how many alternatives log-probabilities are asked for; None is of no token."""
    lists, top = fields.flag("logprobs"), fields.whole("top_logprobs", None, 0, MOST_TOP)
    if top is not None and not lists:
        raise Refused("top_logprobs needs logprobs = true.", param="top_logprobs")
    return top or 0 if lists else None


class ChatForm(Form):
    """The form of chat completions.

    Arguments:
        texts: of the tokens.
        lists: whether log-probabilities are told.
    """

    prefix, names = "chatcmpl-", ("chat.completion", "chat.completion.chunk")

    def __init__(self, texts: TokenTexts, lists: bool):
        self._texts, self._lists = texts, lists

    def whole(self, job: TextJob) -> dict[str, Any]:
        message = {"role": "assistant", "content": job.row.text, "refusal": None}
        return self._choice(job, "message", message, job.listed, job.row.finish_reason)

    def begin(self, job: TextJob) -> dict[str, Any]:
        return self._choice(job, "delta", {"role": "assistant", "content": ""})

    def piece(self, piece: Piece, job: TextJob) -> Iterator[dict[str, Any]]:
        if piece.text or piece.listed:
            yield self._choice(job, "delta", {"content": piece.text}, piece.listed)
        if piece.is_last:
            yield self._choice(job, "delta", {}, None, job.row.finish_reason)

    def _choice(
        self, job: TextJob, name: str, content: Any, listed: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        tells = self._lists and listed is not None
        told = {"content": self._texts.chat(listed), "refusal": None} if tells else None
        return {"index": job.index, name: content, "logprobs": told, "finish_reason": reason}
