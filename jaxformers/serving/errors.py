"""Requests that are refused, and errors in the form that OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

# The most characters of what a client sent that an error repeats.
SHOWN = 80


class Refused(Exception):
    """A request that is not answered, with the reason for its client.

    Arguments:
        message: what was expected, what came, and what to do.
        status: of HTTP.
        param: the name of the field that is wrong.
        code: a word for programs.
        headers: of the answer.
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
        return error_body(self.message, self.status, self.param, self.code)


def error_body(
    message: str, status: int = 500, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Returns an error in OpenAI's form.

    Example:
        >>> error_body("n must be at least 1, got 0.", 400, "n")["error"]["type"]
        'invalid_request_error'
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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


QUOTES = "'\""
