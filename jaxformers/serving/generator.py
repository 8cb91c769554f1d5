"""A generative model behind the server: prompts, limits and rows."""

import asyncio
import contextlib
from typing import Any

from jaxformers.mistakes import special_of
from jaxformers.serving.errors import Refused, busy, closing, one_line, too_long
from jaxformers.serving.fields import check_ids
from jaxformers.serving.followers import CheckpointRules, both
from jaxformers.serving.formats import FormatFollower, Formats
from jaxformers.serving.job import Closed, Follower, QueueFull
from jaxformers.serving.options import Options
from jaxformers.serving.text_job import Piece, Prompt, TextJob
from jaxformers.serving.token_text import TokenTexts
from jaxformers.serving.workers import Workers
from jaxformers.text.call import BEFORE, encode_rows, render
from jaxformers.text.generator import TextGenerator
from jaxformers.text.row_text import RowText, WholeCharacters
from jaxformers.text.scores import start_of
from jaxformers.transformer import Transformer

READERS, WAITING = 2, 64  # threads that make tokens of texts, and the requests that wait for them


class Generator:
    """A model with its tokenizer and its engine.

    Arguments:
        name: what clients call it.
        text: the model and its tokenizer.
        engine: decodes with the model; see `jaxformers.serving.engine`.
        most_jobs: the most answers of one request.
    """

    def __init__(self, name: str, text: TextGenerator, engine: Any, most_jobs: int):
        self.name, self.text, self.engine, self.most_jobs = name, text, engine, most_jobs
        self.special = special_of(text.model.origin)
        own = text.tokenizer.end_token
        self.ends = frozenset(self.special.end_token or ([] if own is None else [own]))
        self.formats = Formats(text.tokenizer, engine.vocab_size, self.ends)
        self.token_texts = TokenTexts(text.tokenizer)
        self.is_pair = isinstance(text.model, Transformer)
        self._start = start_of(text.model) if self.is_pair else None
        self._workers = Workers("prompts", READERS, WAITING)
        longest = max(map(len, text.tokenizer.backend.get_vocab()), default=1)
        self._most_characters = max(engine.context * longest, 4096)

    def close(self) -> None:
        """Ends the threads that make tokens of texts."""
        self._workers.close()
        self.formats.close()

    async def read_text(self, text: str) -> Prompt:
        """Returns a text as a prompt."""
        self._check_characters(len(text), "prompt")
        return await self._workers.run(self._encode, text, True, "prompt")

    async def read_messages(self, messages: list[dict[str, Any]]) -> Prompt:
        """Returns a conversation as a prompt, by the chat template."""
        characters = sum(len(x["content"]) for x in messages)
        self._check_characters(characters, "messages")
        return await self._workers.run(self._render, messages)

    async def read_ids(self, ids: list[Any]) -> Prompt:
        """Returns token ids as a prompt."""
        model: Any = self.text.model
        most = model.src_vocab_size if self.is_pair else self.engine.vocab_size
        check_ids(ids, most, "prompt", "prompt")
        self._check_prompt(len(ids), "prompt")
        return await self._workers.run(self._of_ids, ids)

    def most_new(
        self, prompts: list[Prompt], asked: int | None, usual: int, names: tuple[str, str]
    ) -> int:
        """Returns the most new tokens of each prompt.

        Arguments:
            prompts: of the request.
            asked: what the request says, None for the usual number or what there is room for.
            usual: that number.
            names: of the fields with the prompts and with the number.
        """
        longest = max(len(x.ids) for x in prompts)
        self._check_prompt(max(x.length for x in prompts), names[0])
        self._check_length(longest, asked or 1, names[1])
        return asked or min(usual, self.engine.context - longest)

    def row(self, prompt: Prompt, stop: tuple[str, ...]) -> RowText:
        """Returns the text of a row, empty so far."""
        tokenizer = self.text.tokenizer

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids))

        return RowText(WholeCharacters(decode, prompt.before), stop, [[x] for x in self.ends])

    def rules(self, prompt: Prompt, most: int, format_: FormatFollower | None) -> Follower | None:
        """Returns what says which tokens may come in a row."""
        vocab_size = self.engine.vocab_size
        own = CheckpointRules.of(self.special, vocab_size, prompt.ids, most)
        return both(None if format_ is None else format_.of_one_row(), own)

    def begin(
        self, prompts: list[Prompt], most: int, options: Options, format_: FormatFollower | None
    ) -> "Answers":
        """Returns the answers to prompts, `options.n` to each, which the engine begins.

        Arguments:
            prompts: of a request.
            most: the most new tokens of each answer.
            options: of the request.
            format_: what follows the format of answers; None if they are free.

        Raises:
            Refused: if too many wait, or the server is about to end.
        """
        count = len(prompts) * options.n
        if count > self.most_jobs:
            raise Refused(
                f"a request may ask for at most {self.most_jobs} answers, n for each prompt, got "
                f"{count}. Ask for fewer.",
                param="n",
            )
        answers = Answers()
        for index in range(count):
            prompt = prompts[index // options.n]
            rules, row = self.rules(prompt, most, format_), self.row(prompt, options.stop)
            given = index, prompt, most, options, rules
            answers.jobs.append(TextJob(*given, row, self.ends, answers.tell))
        try:
            self.engine.submit(answers.jobs)
        except QueueFull:
            raise busy("too many requests wait for this model") from None
        except Closed:
            raise closing() from None
        except ValueError as error:
            raise Refused(one_line(error)) from None
        return answers

    def _encode(self, text: str, adds_special: bool, param: str) -> Prompt:
        try:
            [ids] = encode_rows(self.text.tokenizer, [text], adds_special)
        except ValueError as error:
            raise Refused(f"{param}: {one_line(error)}", param=param) from None
        return self._prompt(ids, text)

    def _render(self, messages: list[dict[str, Any]]) -> Prompt:
        try:
            text = render(self.text.tokenizer, messages, None)
        except ValueError as error:
            raise Refused(one_line(error), param="messages") from None
        return self._encode(text, False, "messages")._replace(before=[])

    def _of_ids(self, ids: list[int]) -> Prompt:
        return self._prompt(ids, str(self.text.tokenizer.decode(ids)))

    def _prompt(self, ids: list[int], text: str) -> Prompt:
        """Returns a prompt for the decoder, or for the encoder if there is one."""
        if self._start is not None:
            return Prompt([self._start], [], ids, text)
        return Prompt(ids, ids[-BEFORE:], None, text)

    def _check_characters(self, count: int, param: str) -> None:
        """Raises if a text is too long to make tokens of it first."""
        if count > self._most_characters:
            raise too_long(
                f"{param} must have at most {self._most_characters} characters, since this model's "
                f"maximum context length is {self.engine.context} tokens, got {count}.",
                param,
            )

    def _check_prompt(self, length: int, param: str) -> None:
        """Raises if a prompt leaves no room for a token, or a source is too long."""
        self._check_length(length, 0 if self.is_pair else 1, param)

    def _check_length(self, prompt: int, new: int, param: str) -> None:
        context = self.engine.context
        if prompt + new > context:
            raise too_long(
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{prompt + new} tokens ({prompt} in the prompt, {new} in the completion). Shorten "
                "the prompt or ask for fewer tokens.",
                param,
            )


class Answers:
    """The jobs of one request, and what they tell."""

    def __init__(self) -> None:
        self.jobs: list[TextJob] = []
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()

    def tell(self, piece: Piece) -> None:
        """Takes a piece; the engine calls it in its thread."""
        with contextlib.suppress(RuntimeError):  # where the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def pieces(self) -> Any:
        """Yields the pieces of all answers as they come, and the last one of each.

        Raises:
            Refused: if something goes wrong in the engine.
        """
        running = len(self.jobs)
        while running:
            piece = await self._queue.get()
            if piece.error is not None:
                raise Refused(f"the answer failed: {one_line(piece.error)}", 500) from piece.error
            if piece.is_last and self.jobs[piece.answer].is_cancelled:
                raise closing()
            running -= piece.is_last
            yield piece

    async def wait(self) -> None:
        """Returns when all answers have ended."""
        async for _ in self.pieces():
            pass

    def cancel(self) -> None:
        """Gives up what has not ended, so that its rows are free."""
        for job in self.jobs:
            job.cancel()

    @property
    def new_tokens(self) -> int:
        """The number of new tokens of all answers so far."""
        return sum(len(job.row.tokens) for job in self.jobs)
