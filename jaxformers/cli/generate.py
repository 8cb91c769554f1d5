"""The command `jaxformers generate PATH PROMPT`."""

import argparse
import sys

from jaxformers.cli.speed import Speed
from jaxformers.cli.text_model import (
    add_generation_options,
    add_model_options,
    first_messages,
    generation_options,
    load_text,
    to_json,
)

EXAMPLES = """examples:
  jaxformers generate HuggingFaceTB/SmolLM2-135M-Instruct "Once upon a time" --max-new-tokens 40
  jaxformers generate HuggingFaceTB/SmolLM2-135M-Instruct "Name a color." --chat \
--temperature 0.8 --seed 1
  jaxformers generate HuggingFaceTB/SmolLM2-135M-Instruct "Name a color." --chat --quantize int8 \
--adapter lora
  jaxformers generate HuggingFaceTB/SmolLM2-135M-Instruct "Anna is 34." --chat \
--schema person.json --json
  echo "The capital of France is" | jaxformers generate HuggingFaceTB/SmolLM2-135M-Instruct - \
--max-new-tokens 8
"""


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Adds the command `generate PATH PROMPT`."""
    parser = commands.add_parser(
        "generate",
        help="continue a text, or answer it",
        description="Write the text that continues PROMPT to standard output, as it comes.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="a text; - is standard input")
    parser.add_argument(
        "--chat", action="store_true", help="answer PROMPT as the message of a user"
    )
    parser.add_argument(
        "--json", action="store_true", help="write one JSON object with text, tokens and more"
    )
    add_generation_options(parser)
    parser.set_defaults(run=run_generate)


def run_generate(options: argparse.Namespace) -> int:
    if options.system is not None and not options.chat:
        raise ValueError("--system is the first message of a chat, got no --chat. Pass --chat.")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    text = load_text(options)
    arguments, speed = generation_options(options, text), Speed()
    messages = first_messages(options)
    messages.append({"role": "user", "content": prompt})
    call, given = (text.chat, messages) if options.chat else (text, prompt)
    if options.json:
        result = call(given, return_scores=True, **arguments)
        kept = result._asdict() | {"log_probs": result.log_probs.tolist()}
        print(to_json(kept))
        tokens = len(result.tokens)
    else:
        stream = (text.chat_stream if options.chat else text.stream)(given, **arguments)
        for piece in stream:
            speed.piece(len(stream.tokens))
            print(piece, end="", flush=True)
        print()
        tokens = len(stream.tokens)
    if options.verbose:
        print(speed.said(tokens), file=sys.stderr)
    return 0
