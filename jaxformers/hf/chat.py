"""Chat templates: a conversation as the text that a model was trained on.

A template is a small program in the jinja language that comes with a checkpoint, so nobody has
read it: it runs in jinja2's sandbox and sees plain data only.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The text that a chat template makes of messages.

    Arguments:
        template: text of the template.
        messages: the conversation, such as `{"role": "user", "content": "Hello"}`, in order.
        variables: what else the template may read.

    Raises:
        ValueError: if the messages are none, the template refuses them, or it is broken.
        ImportError: if the `jinja2` package is missing.

    Example:
        >>> render_chat("{{ greeting }} {{ messages[0].content }}",
        ...             [{"role": "user", "content": "there"}], {"greeting": "Hello"})
        'Hello there'
    """
    if not (
        isinstance(messages, Sequence)
        and messages
        and all(isinstance(message, Mapping) for message in messages)
    ):
        raise ValueError(
            'messages must be a list like [{"role": "user", "content": "Hello"}], '
            f"got {messages!r:.200}."
        )
    # Templates ask whether a key is there, not whether it is None.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        plain = json.loads(json.dumps({**variables, "messages": messages}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"a chat template takes plain data (strings, numbers, lists, dicts), got what is not: "
            f"{error}. Pass tools as JSON schemas, and pictures as their place in the text."
        ) from None
    compiled = _compile(template)
    try:
        return compiled.render(plain)
    except Exception as error:  # whatever a program that nobody has read may raise
        raise ValueError(f"the chat template could not write these messages: {error}") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """The program of a template, in an environment as templates for `transformers` expect it."""
    try:
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        raise ImportError(
            "chat templates need the jinja2 package: pip install 'jaxformers[hf]'."
        ) from None

    def refuse(message: str) -> None:
        raise ValueError(message)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the model's own words for training; here they are just text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own one escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except Exception as error:  # a syntax error, or one of Python's compiler
        raise ValueError(f"the chat template is broken: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
