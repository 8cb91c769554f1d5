"""From a request that is read to its answer, whole or as events."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

from jaxformers.serving.errors import Refused
from jaxformers.serving.events import Events
from jaxformers.serving.fields import Fields
from jaxformers.serving.formats import Followers
from jaxformers.serving.generator import Answers, Generator
from jaxformers.serving.options import Options, usage
from jaxformers.serving.text_job import Piece, Prompt, TextJob


class Form:
    """The JSON in which answers are written."""

    def whole(self, jobs: list[TextJob], usage: dict[str, int]) -> dict[str, Any]:
        """Returns all answers, which have ended."""
        raise NotImplementedError

    def begin(self, job: TextJob) -> dict[str, Any] | None:
        """Returns the first event of an answer, if there is one before its text."""
        raise NotImplementedError

    def piece(self, piece: Piece, job: TextJob) -> Iterator[dict[str, Any]]:
        """Yields the events of a piece of an answer."""
        raise NotImplementedError

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Returns the event that tells the number of tokens."""
        raise NotImplementedError


class Reply(NamedTuple):
    """The answers to a request, which the engine has begun.

    Arguments:
        answers: their jobs.
        prompt_tokens: how many tokens the prompts have.
        options: of the request.
        form: in which they are written.
    """

    answers: Answers
    prompt_tokens: int
    options: Options
    form: Form

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens so far."""
        return usage(self.prompt_tokens, self.answers.new_tokens)

    async def whole(self) -> dict[str, Any]:
        """Returns the answers when they have ended."""
        await self.answers.wait()
        return self.form.whole(self.answers.jobs, self.usage)

    def events(self) -> Events:
        """Returns the answers as events."""
        return Events(self._events())

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        for job in self.answers.jobs:
            event = self.form.begin(job)
            if event is not None:
                yield event
        async for piece in self.answers.pieces():
            for event in self.form.piece(piece, self.answers.jobs[piece.answer]):
                yield event
        if self.options.tells_usage:
            yield self.form.usage(self.usage)


def answer(
    generator: Generator,
    prompts: list[Prompt],
    most: int,
    options: Options,
    format_: Followers | None,
    lists: bool,
    form: Form,
) -> Reply:
    """Returns the answers to prompts, which the engine begins.

    Arguments:
        generator: the model.
        prompts, most: what they continue, and the most new tokens of each.
        options, format_: how tokens are chosen.
        lists: whether their log-probabilities are told.
        form: in which they are written.
    """
    given = prompts, options.n, most, options.sampling, options.stop, format_
    answers = generator.begin(*given, options.streams, lists)
    return Reply(answers, sum(x.length for x in prompts), options, form)


def stamp(prefix: str, model: str) -> dict[str, Any]:
    """Returns the fields that every answer begins with."""
    number = secrets.token_hex(12)
    return {"id": f"{prefix}{number}", "object": "", "created": int(time.time()), "model": model}


def one_of(fields: Fields, name: str, other: str, most: int) -> tuple[str, int | None]:
    """Returns the number that one of two fields holds, with its name."""
    first, second = (fields.whole(x, None, 1, most) for x in (name, other))
    if first is not None and second is not None:
        raise Refused(f"{name} and {other} say the same, got both. Pass one.", param=other)
    return (other, second) if first is None else (name, first)
