"""Answers as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from jaxformers.serving.errors import Refused

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Events:
    """A response of events, each of which is a JSON object, and the word [DONE].

    An error after its beginning is an event too, and the last one.

    Arguments:
        events: the objects.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]]):
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            async for event in self._events:
                await send(_body(to_json(event)))
            await send(_body(b"[DONE]"))
        except Refused as error:
            await send(_body(to_json(error.body)))
        await send({"type": "http.response.body", "body": b""})


def to_json(value: Any) -> bytes:
    """Returns a value as JSON in ASCII, in which no reader of lines finds other ends of lines."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _body(data: bytes) -> dict[str, Any]:
    content = b"data: " + data + b"\n\n"
    return {"type": "http.response.body", "body": content, "more_body": True}
