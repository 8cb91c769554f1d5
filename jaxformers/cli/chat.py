"""The command `jaxformers chat PATH`."""

import argparse
import re
import sys
import time
from typing import Any

from jaxformers.cli.speed import Speed
from jaxformers.cli.terminal import Terminal
from jaxformers.cli.text_model import (
    add_generation_options,
    add_model_options,
    first_messages,
    generation_options,
    load_text,
)

COMMANDS = "/reset", "/help", "/exit"
HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"
EXAMPLES = """examples:
  jaxformers chat HuggingFaceTB/SmolLM2-135M-Instruct
  jaxformers chat HuggingFaceTB/SmolLM2-135M-Instruct --system "Answer in one word." \
--temperature 0.7
"""


def add_chat(commands: argparse._SubParsersAction) -> None:
    """Adds the command `chat PATH`."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description=f"Talk to a model, which remembers the conversation. {HELP}.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    add_generation_options(parser)
    parser.set_defaults(run=run_chat)


def run_chat(options: argparse.Namespace) -> int:
    text = load_text(options)
    messages = first_messages(options)
    arguments = generation_options(options, text)
    most = arguments.pop("max_new_tokens", None)
    talk = text.conversation(messages, **arguments)
    with Terminal(COMMANDS) as terminal:
        if terminal.is_terminal:
            print(HELP, file=sys.stderr)
        return converse(talk, terminal, most, options.verbose)


def converse(talk: Any, terminal: Terminal, max_new_tokens: int | None, verbose: bool) -> int:
    """Answers message after message. Returns the exit status.

    Whoever sits at a terminal reads an error and goes on; without one, an error ends the chat.
    """
    while True:
        try:
            message = terminal.read("> ")
            if message is None or message.strip() == "/exit":
                if message is None and terminal.is_terminal:
                    print(file=sys.stderr)  # the prompt of the shell gets a line of its own
                return 0
            if message.strip() == "/reset":
                talk.reset()
            elif message.strip() == "/help":
                print(HELP, file=sys.stderr)
            elif terminal.is_terminal and re.fullmatch(r"/[a-z?]+", message.strip()):
                print(f"there is no command {message.strip()}: {HELP}", file=sys.stderr)
            elif message.strip():
                answer(talk, message, terminal, max_new_tokens, verbose)
        except KeyboardInterrupt:
            if not terminal.is_terminal:
                raise
            print(file=sys.stderr)
        except ValueError as error:
            if not terminal.is_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def answer(
    talk: Any, message: str, terminal: Terminal, max_new_tokens: int | None, verbose: bool
) -> None:
    """Writes the answer to a message as it comes, until Ctrl-C."""
    speed = Speed(time.perf_counter())
    with talk.stream(message, max_new_tokens) as stream:
        for piece in stream:
            speed.piece(len(stream.tokens))
            print(piece, end="", flush=True)
            if terminal.asked:
                break
    print(flush=True)
    if verbose:
        print(speed.said(len(stream.tokens)), file=sys.stderr)
