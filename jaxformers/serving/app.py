"""The routes of the server."""

import asyncio
import contextlib
import hmac
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from jaxformers.serving.answering import Reply
from jaxformers.serving.body import Gone, Receive, read_body
from jaxformers.serving.chat import complete_chat
from jaxformers.serving.completions import complete
from jaxformers.serving.embeddings import Embedder
from jaxformers.serving.errors import Refused, closing, show
from jaxformers.serving.events import Events, to_json
from jaxformers.serving.fields import Fields
from jaxformers.serving.generator import Generator

LOG = logging.getLogger(__name__)
Send = Callable[[Any], Awaitable[None]]
CLIENT_GONE = 499  # the status in the log of a request whose client went away
HEALTH = "/health"  # the only route without a key


class Record:
    """What the log tells of a request."""

    def __init__(self, method: str, path: str):
        self.method, self.path, self.begin = method, path, time.perf_counter()
        self.status, self.is_complete, self.is_cut = 0, False, False
        self.is_read = method in ("GET", "HEAD")  # whether the body has been read
        self.prompt_tokens = 0
        self.reply: Reply | None = None

    def line(self) -> str:
        """Returns its line, which has no text of users but the path."""
        path = "".join(x if x.isascii() and x.isprintable() else "?" for x in self.path[:100])
        new = 0 if self.reply is None else self.reply.answers.new_tokens
        seconds = time.perf_counter() - self.begin
        status = CLIENT_GONE if self.is_cut else self.status
        return (
            f"{self.method} {path} {status} {self.prompt_tokens} prompt tokens, {new} new tokens, "
            f"{seconds:.3f} s"
        )


class App:
    """The server as an application of ASGI.

    Arguments:
        generator: what answers chats and completions; None for none.
        embedder: what gives vectors; None for none.
        key: what clients have to send; None for no key.
        log: hears of every request.
    """

    def __init__(
        self,
        generator: Generator | None,
        embedder: Embedder | None,
        key: str | None = None,
        log: Callable[[str], None] | None = None,
    ):
        self._generator, self._embedder = generator, embedder
        self._key, self._log = key, log or write_line
        self._created = int(time.time())
        self.is_closing = False
        self.working = 0  # requests whose answer is being computed, but for the rest of streams
        self._routes = Router(
            [
                Route(HEALTH, self._health, methods=["GET"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._model, methods=["GET"]),
                Route("/v1/chat/completions", Post(self, self._chat), methods=["POST"]),
                Route("/v1/completions", Post(self, self._complete), methods=["POST"]),
                Route("/v1/embeddings", Post(self, self._embed), methods=["POST"]),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, got {scope['type']}")
        record = Record(scope["method"], scope["path"])
        scope |= {"record": record, "app": self}  # an app, since routes raise errors in one

        async def watched(message: Any) -> None:
            record.status = message.get("status", record.status)
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)
            record.is_complete |= is_last

        try:
            await self._answer(scope, receive, watched)
        except Gone:
            record.is_cut = True
        finally:
            if record.reply is not None:
                record.reply.answers.cancel()
            self._log(record.line())

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] != HEALTH:
                self._check_key(Request(scope).headers.get("authorization", ""))
            await self._routes(scope, receive, send)
        except Gone:
            raise
        except (Refused, HTTPException) as error:
            response = refuse(error, scope)
            if not scope["record"].is_read:
                response.headers["connection"] = "close"
            await response(scope, receive, send)
        except Exception:
            LOG.exception("a request failed")
            if scope["record"].status == 0:
                await refuse(Refused("the server failed.", 500), scope)(scope, receive, send)
            else:
                raise

    @property
    def names(self) -> list[str]:
        """The names of the models."""
        return [x.name for x in (self._generator, self._embedder) if x is not None]

    @property
    def engine(self) -> Any:
        """The engine that decodes, None without a generator."""
        return None if self._generator is None else self._generator.engine

    def close(self) -> None:
        """Ends the threads of the models, but for that of the engine."""
        for part in (self._generator, self._embedder):
            if part is not None:
                part.close()

    def _check_key(self, header: str) -> None:
        if self._key is None:
            return
        kind, _, given = header.partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self._key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise Refused(
                "Incorrect API key provided. Send the header Authorization: Bearer KEY.",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _health(self, request: Request) -> Response:
        counts = {} if self.engine is None else self.engine.counts()
        status = "closing" if self.is_closing else "ok"
        return write({"status": status} | counts, 503 if self.is_closing else 200)

    async def _models(self, request: Request) -> Response:
        return write({"object": "list", "data": [self._describe(x) for x in self.names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.names:
            raise unknown_model(name, self.names)
        return write(self._describe(name))

    async def _chat(self, fields: Fields) -> Reply:
        return await complete_chat(self._generator_of(fields), fields)

    async def _complete(self, fields: Fields) -> Reply:
        return await complete(self._generator_of(fields), fields)

    async def _embed(self, fields: Fields) -> dict[str, Any]:
        name = self._read_model(fields)
        if self._embedder is None or name != self._embedder.name:
            raise Refused(
                f"the model {show(name)} gives no embeddings. "
                + (
                    "Start the server with --embedder PATH, a model of embeddings."
                    if self._embedder is None
                    else f"Ask for {self._embedder.name}."
                ),
                param="model",
            )
        return await self._embedder.embed(fields)

    def _generator_of(self, fields: Fields) -> Generator:
        name = self._read_model(fields)
        if self._generator is None or name != self._generator.name:
            raise Refused(
                f"the model {show(name)} gives embeddings alone and generates no text.",
                param="model",
            )
        return self._generator

    def _read_model(self, fields: Fields) -> str:
        name = fields.string("model", 1024, required=True)
        if name not in self.names:
            raise unknown_model(name, self.names)
        return str(name)

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "jaxformers"}


class Post:
    """A route whose requests have a JSON object.

    Arguments:
        app: that the route belongs to.
        handle: a function from the fields to a `Reply`, or to what is written as JSON.
    """

    def __init__(self, app: App, handle: Callable[[Fields], Coroutine[Any, Any, Any]]):
        self._app, self._handle = app, handle

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if self._app.is_closing:
            raise closing()
        body = await read_body(Request(scope).headers, receive)
        scope["record"].is_read = True
        await until_gone(
            self._respond(Fields(body), scope, receive, send), receive, scope["record"]
        )

    async def _respond(self, fields: Fields, scope: Any, receive: Receive, send: Send) -> None:
        record = scope["record"]
        self._app.working += 1
        try:
            response = await self._compute(fields, record)
        finally:
            self._app.working -= 1
        await response(scope, receive, send)

    async def _compute(self, fields: Fields, record: Record) -> Response | Events:
        result = await self._handle(fields)
        if not isinstance(result, Reply):
            record.prompt_tokens = result["usage"]["prompt_tokens"]
            return write(result)
        record.reply, record.prompt_tokens = result, result.prompt_tokens
        return result.events() if result.options.streams else write(await result.whole())


async def until_gone(work: Coroutine[Any, Any, None], receive: Receive, record: Record) -> None:
    """Runs the rest of a request, which is cancelled when the client goes away.

    Raises:
        Gone: in that case.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not record.is_complete:
            raise Gone
        await working
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)


def unknown_model(name: Any, known: list[str]) -> Refused:
    """Returns the error that there is no such model."""
    return Refused(
        f"The model {show(name)} does not exist here. This server has {', '.join(known)}.",
        404,
        "model",
        "model_not_found",
    )


def write(value: Any, status: int = 200) -> Response:
    """Returns a response of JSON."""
    return Response(to_json(value), status, media_type="application/json")


def refuse(error: Refused | HTTPException, scope: Any) -> Response:
    """Returns the response of a request that is refused."""
    if isinstance(error, HTTPException):
        said = show(f"{scope['method']} {scope['path']}")
        message = f"This server has no route {said}. Those of OpenAI begin with /v1."
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"This route does not take {said}. Use {allowed}."
        error = Refused(message, error.status_code, code="unknown_url", headers=error.headers)
    response = write(error.body, error.status)
    response.headers.update(error.headers)
    return response


def write_line(line: str) -> None:
    """Writes a line of the log to standard error, which may be closed."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
