"""Chat templates, which write a conversation as text in the form that a model was trained on.

A template is a small program in the jinja language that comes with a checkpoint. It is not
trusted: it runs in jinja2's sandbox and gets only plain data.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxformers.checks import OptionError, check_options
from jaxformers.elsewhere import CHAT_OPTIONS


def choose_template(
    templates: Mapping[str, str], template: str | None, variables: Mapping[str, Any]
) -> str:
    """Returns the text of the template to use, after a check that it reads the variables.

    Arguments:
        templates: the tokenizer's templates by name.
        template: the name of one of them, the text of another one, or None for the default.
        variables: the variables that the user passed for the template.

    Raises:
        ValueError: if there is no such template, or no template of the tokenizer reads a variable.
        ImportError: if the `jinja2` package is missing.

    Example:
        >>> choose_template({"default": "{{ messages }}"}, None, {})
        '{{ messages }}'
    """
    if template is None:
        for_tools = variables.get("tools") is not None and "tool_use" in templates
        template = "tool_use" if for_tools else "default"
    if template not in templates and not (isinstance(template, str) and "{" in template):
        raise ValueError(
            f"this tokenizer has no chat template {template!r}, it has "
            f"{sorted(templates) or 'none'}. Base models have none. Put a template beside "
            "tokenizer.json as chat_template.jinja, or pass its text as template=."
        )
    chosen = templates.get(template, template)
    _check_variables(variables, chosen, templates)
    return chosen


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Returns the text that a chat template makes of messages.

    Arguments:
        template: the text of the template.
        messages: dicts such as `{"role": "user", "content": "Hello"}`, in order.
        variables: other variables of the template.

    Raises:
        ValueError: if there are no messages, or the template refuses them or is broken.
        ImportError: if the `jinja2` package is missing.

    Example:
        >>> render_chat("{{ greeting }} {{ messages[0].content }}",
        ...             [{"role": "user", "content": "there"}], {"greeting": "Hello"})
        'Hello there'
    """
    _check_messages(messages)
    # Templates test whether a key exists, not whether its value is None.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        plain = json.loads(json.dumps({**variables, "messages": messages}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"a chat template takes plain data (strings, numbers, lists, dicts), got other data: "
            f"{error}. Pass tools as JSON schemas, and pictures as their place in the text."
        ) from None
    compiled, _ = _compile(template)
    try:
        return compiled.render(plain)
    except Exception as error:  # a template may raise any error
        raise ValueError(f"the chat template could not write these messages: {error}") from error


def continue_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Returns the text that a chat template makes of messages, up to the end of the final message.

    A mark is added to the end of the final message, and the text from the mark on is left out. If
    the template strips messages, the trailing whitespace of the final one is left out as well. The
    template must write the same text for the message without the mark.

    Raises:
        ValueError: if the final message has no text, or the template does not write all of it
            unchanged and once; and as `render_chat` does.
        ImportError: if the `jinja2` package is missing.

    Example:
        >>> continue_chat("{% for m in messages %}<{{ m.content }}>{% endfor %}",
        ...               [{"role": "user", "content": "Hi"},
        ...                {"role": "assistant", "content": "You"}], {})
        '<Hi><You'
    """
    _check_messages(messages)
    mark = "MARK"
    while mark in str(messages) + str(variables) + template:
        mark += "S"
    # The space after the mark is missing in the text if the template strips messages.
    final, said = _marked(messages[-1], f"{mark} ")
    text = render_chat(template, [*messages[:-1], final], variables)
    before, found, after = text.rpartition(mark)
    if not found or said.strip() not in before:
        raise ValueError(
            "the final message can be continued only if the chat template writes all of it, got "
            f"{text.replace(mark, '')!r:.200} for {said!r:.200}. Leave out "
            "continue_final_message, or the text that the template drops."
        )
    # If the message is blank, the template may leave it out without the mark.
    blank = not said.strip()
    if not blank and not after.startswith(" "):
        before = before[: len(before) - (len(said) - len(said.rstrip()))]
    same = blank or render_chat(template, messages, variables).startswith(before)
    if mark in before or not same:
        raise ValueError(
            "the final message can be continued only if the chat template writes it once, and "
            f"nothing that depends on its end before it, got {text.replace(mark, '')!r:.200}. "
            "Leave out continue_final_message, or pass template= with another template."
        )
    return before


def _check_variables(
    variables: Mapping[str, Any], chosen: str, templates: Mapping[str, str]
) -> None:
    """Raises an error if no template of the tokenizer reads a variable."""
    given = {
        name
        for name, value in variables.items()
        # Every template may read these two, which are None if they are not passed.
        if name not in ("tools", "documents") or not (value is None or value in ([], ()))
    }
    unread = sorted(given - _read_names(chosen))
    if not unread:
        return
    known = _read_names(chosen)
    for other in templates.values():
        try:
            known |= _read_names(other)
        except ValueError:  # this template is broken, but it was not asked for
            continue
    for name in unread:
        if name in CHAT_OPTIONS and name not in known:
            raise OptionError(f"apply_chat_template has no option {name!r}. {CHAT_OPTIONS[name]}")
    check_options(
        unread,
        known - {"messages"} | {"add_generation_prompt", "continue_final_message", "template"},
        "apply_chat_template with the chat templates of this tokenizer",
    )


def _read_names(template: str) -> frozenset[str]:
    """Returns the names of the variables that a template reads."""
    return _compile(template)[1]


def _marked(message: Mapping[str, Any], mark: str) -> tuple[dict[str, Any], str]:
    """Returns a message with a mark at the end of its text, and that text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + mark}, content
    parts = list(content) if isinstance(content, Sequence) else []
    for k in reversed(range(len(parts))):
        if isinstance(parts[k], Mapping) and isinstance(parts[k].get("text"), str):
            text = parts[k]["text"]
            parts[k] = {**parts[k], "text": text + mark}
            return {**message, "content": parts}, text
    raise ValueError(
        f"the final message has no text that could be continued, got {message!r:.200}. Pass one "
        "whose content is a string, or a list with a part that has a text."
    )


def _check_messages(messages: Any) -> None:
    if not (
        isinstance(messages, Sequence)
        and messages
        and all(isinstance(message, Mapping) for message in messages)
    ):
        raise ValueError(
            'messages must be a list like [{"role": "user", "content": "Hello"}], '
            f"got {messages!r:.200}."
        )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> tuple[Any, frozenset[str]]:
    """Returns the compiled template, in an environment like transformers', and its variables."""
    try:
        import jinja2.ext
        import jinja2.meta
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError:
        raise ImportError(
            "chat templates need the jinja2 package: pip install 'jaxformers[hf]'."
        ) from None

    def refuse(message: str) -> None:
        raise ValueError(message)

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}`, which marks answers for training and has no effect here."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own filter escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
        return environment.from_string(template), frozenset(names)
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
