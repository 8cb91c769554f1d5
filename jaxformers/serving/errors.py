"""Requests that are refused, and errors in the form that OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

# The most characters that an error repeats: of what a client sent, and of another error.
SHOWN, SAID = 80, 600
QUOTES = "'\""


class Refused(Exception):
    """A request that is not answered, with the reason for its client.

    Arguments:
        message: what was expected, what came, and what to do.
        status: of HTTP.
        param: the name of the field that is wrong.
        code: a word for programs.
        headers: of the answer.

    Example:
        >>> Refused("n must be at least 1, got 0.", param="n").body["error"]["type"]
        'invalid_request_error'
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        found = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": found}


def too_long(message: str, param: str) -> Refused:
    """Returns the error that there is no room for what a request asks."""
    return Refused(message, param=param, code="context_length_exceeded")


def busy(why: str) -> Refused:
    """Returns the error that a client should come again."""
    return Refused(
        f"{why}. Try again in a moment.",
        429,
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def closing() -> Refused:
    """Returns the error of a server that is about to end."""
    return Refused("the server is about to end and takes no more requests.", 503)


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:SAID]


def show(value: Any) -> str:
    """Returns what a client sent, shortened and without characters that break lines.

    Example:
        >>> show("a" * 100)[-8:], show(True), show({"a": 1})
        ("aaaa...'", 'true', 'an object')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = ascii(value[: SHOWN + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1] * (text[0] in QUOTES)}"
