"""From a request that is read to its answers, whole or as events."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from jaxformers.serving.events import Events
from jaxformers.serving.formats import FormatFollower
from jaxformers.serving.generator import Generator
from jaxformers.serving.options import Options
from jaxformers.serving.text_job import Piece, Prompt, TextJob


class Form:
    """The JSON of one answer, a choice as OpenAI calls it; a route has one of its own."""

    prefix: str  # of the ids of its replies
    names: tuple[str, str]  # of the objects: of a whole reply, and of an event

    def whole(self, job: TextJob) -> dict[str, Any]:
        """Returns an answer that has ended."""
        raise NotImplementedError

    def begin(self, job: TextJob) -> dict[str, Any] | None:
        """Returns what comes before the text of an answer; None is nothing."""
        raise NotImplementedError

    def piece(self, piece: Piece, job: TextJob) -> Iterator[dict[str, Any]]:
        """Yields a piece of an answer, in an event for each dict."""
        raise NotImplementedError


class Reply:
    """The answers to the prompts of a request, which the engine begins at once.

    Arguments:
        generator: the model.
        prompts: of the request.
        most: the most new tokens of each answer.
        options: of the request.
        form: in which answers are written.
        follower: of the format of answers; None if they are free.

    Raises:
        Refused: as `Generator.begin`.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: list[Prompt],
        most: int,
        options: Options,
        form: Form,
        follower: FormatFollower | None = None,
    ):
        self.answers = generator.begin(prompts, most, options, follower)
        self.prompt_tokens = sum(prompt.length for prompt in prompts)
        self.options, self._form, self._model = options, form, generator.name
        self._id, self._created = f"{form.prefix}{secrets.token_hex(12)}", int(time.time())

    async def whole(self) -> dict[str, Any]:
        """Returns the answers when they have ended."""
        await self.answers.wait()
        choices = [self._form.whole(job) for job in self.answers.jobs]
        return self._object(self._form.names[0], choices) | {"usage": self._usage()}

    def events(self) -> Events:
        """Returns the answers as events."""
        return Events(self._events())

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        for job in self.answers.jobs:
            choice = self._form.begin(job)
            if choice is not None:
                yield self._event([choice])
        async for piece in self.answers.pieces():
            for choice in self._form.piece(piece, self.answers.jobs[piece.answer]):
                yield self._event([choice])
        if self.options.tells_usage:
            yield self._event([], self._usage())

    def _event(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """Returns an event; all have the field `usage` if the last one tells it."""
        told = {"usage": usage} if self.options.tells_usage else {}
        return self._object(self._form.names[1], choices) | told

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "object": name, "created": self._created, "model": self._model}
        return head | {"choices": choices}

    def _usage(self) -> dict[str, int]:
        """Returns the numbers of tokens so far."""
        prompt, new = self.prompt_tokens, self.answers.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
