"""The command `python -m jaxformers chat PATH`."""

import argparse
import contextlib
import select
import sys
from typing import Any

from jaxformers.cli.help import Help
from jaxformers.cli.text_model import (
    Speed,
    add_generation_options,
    add_model_options,
    generation_options,
    load_text,
)

HELP = "/reset begins anew, /exit or the end of the input ends, Ctrl-C stops an answer"
EXAMPLES = """examples:
  jaxformers chat SmolLM2-135M-Instruct
  jaxformers chat SmolLM2-135M-Instruct --system "Answer in one word." --temperature 0.7
"""


def add_chat(commands: argparse._SubParsersAction) -> None:
    """Adds the command `chat PATH`."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description=f"Talk to a model, which remembers the conversation. {HELP}.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the first message, of the system")
    add_generation_options(parser)
    parser.set_defaults(run=run_chat)


def run_chat(options: argparse.Namespace) -> int:
    text = load_text(options)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    arguments = generation_options(options, text)
    most = arguments.pop("max_new_tokens", None)
    talk = text.conversation(messages, **arguments)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - with it, the arrow keys edit the line
        print(HELP, file=sys.stderr)
    while True:
        try:
            message = read_message("> " if is_terminal else "", is_terminal)
            if message is None or message.strip() == "/exit":
                return 0
            if message.strip() == "/reset":
                talk.reset()
            elif message.strip() == "/help":
                print(HELP, file=sys.stderr)
            elif message.strip():
                answer(talk, message, most, options.verbose)
        except KeyboardInterrupt:  # at the prompt, or before the first word of an answer
            print(file=sys.stderr)


def answer(talk: Any, message: str, max_new_tokens: int | None, verbose: bool) -> None:
    """Writes the answer to a message as it comes; Ctrl-C stops it, and an error is said."""
    speed = Speed()
    try:
        stream = talk.stream(message, max_new_tokens)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    with stream, contextlib.suppress(KeyboardInterrupt):
        for piece in stream:
            speed.piece()
            print(piece, end="", flush=True)
    print(flush=True)
    if verbose:
        print(speed.said(len(stream.tokens)), file=sys.stderr)


def read_message(prompt: str, is_terminal: bool) -> str | None:
    """Returns the next message, None at the end of the input.

    Lines that are there at once, as after a paste, are one message.
    """
    try:
        lines = [input(prompt)]
    except EOFError:
        return None
    while is_terminal and select.select([sys.stdin], [], [], 0.02)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)
