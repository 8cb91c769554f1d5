"""The body of a request, read up to a limit."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from jaxformers.files.json_file import parse_json
from jaxformers.serving.errors import Refused, one_line, show

Receive = Callable[[], Awaitable[Any]]
# The most bytes of a body. So many more are thrown away before the connection is closed, so that
# most clients read the reason.
MOST, THROWN_AWAY = 8 * 2**20, 32 * 2**20
# The longest pause within a body, and the longest time for all of it, in seconds.
PAUSE, LONGEST = 20.0, 120.0
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Gone(Exception):
    """The client has gone away."""


async def read_body(headers: Mapping[str, str], receive: Receive) -> dict[str, Any]:
    """Returns the JSON object in the body of a request.

    Raises:
        Refused: if it is too large, too slow, or no such object.
        Gone: if the client goes away before its end.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(
            f"the body must be JSON, got {show(kind)}. Send the header Content-Type: "
            "application/json.",
            415,
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused("the body must not be compressed.", 415)
    try:
        async with asyncio.timeout(LONGEST):
            data = await _read(receive)
    except TimeoutError:
        raise Refused("the body did not come in time.", 408) from None
    return parse(data)


def parse(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in a body.

    Example:
        >>> parse(b'{"n": 1}')
        {'n': 1}
    """
    if not data.strip():
        raise Refused("the body must be a JSON object, got an empty body.")
    try:
        body = parse_json(data, "the body")
        if SURROGATE.search(data):
            _check_text(body)
    except ValueError as error:
        raise Refused(one_line(error)) from None
    return body


def _check_text(value: Any) -> None:
    """Raises if a text holds half of a character of UTF-16, which no text may."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the body must be valid Unicode, got a lone surrogate in {show(value)}."
            ) from None
    elif isinstance(value, dict):
        for name, x in value.items():
            _check_text(name)
            _check_text(x)
    elif isinstance(value, list):
        for x in value:
            _check_text(x)


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while size <= MOST + THROWN_AWAY:
        async with asyncio.timeout(PAUSE):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        size += len(part)
        if size <= MOST:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False):
            break
    if size > MOST:
        raise Refused(f"the body must have at most {MOST} bytes.", 413)
    return b"".join(parts)
