"""The command `jaxformers finetune MODEL FILE --out DIR`."""

import argparse
import dataclasses
import sys
from typing import Any

from jaxformers.cli.text_model import CHECKPOINT, DTYPE

EXAMPLES = """examples:
  jaxformers finetune HuggingFaceTB/SmolLM2-135M-Instruct chats.jsonl --out tuned --lora 8 \
--steps 20
  jaxformers finetune HuggingFaceTB/SmolLM2-135M-Instruct book.txt --out tuned-book --epochs 3 \
--dtype bfloat16
"""


def add_finetune(commands: argparse._SubParsersAction) -> None:
    """Adds the command `finetune MODEL FILE --out DIR`."""
    parser = commands.add_parser(
        "finetune",
        help="train a checkpoint on chats, answers or text",
        description="Train the decoder of a checkpoint on examples. FILE has a JSON object per "
        'line (.jsonl): a chat {"messages": [...]}, of which the assistant\'s answers count; '
        '{"prompt": ..., "completion": ...}, of which the completion counts; or {"text": ...}. '
        "Any other file is plain text. If the command is stopped, the same command goes on from "
        "there.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=CHECKPOINT)
    parser.add_argument("data", metavar="FILE", help="the examples")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory of the results")
    for name, kind, text in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, metavar=METAVARS[kind], help=text)
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="keep the integers of a quantized checkpoint below the adapter",
    )
    parser.add_argument(
        "--merge", action="store_true", help="also write the model with the adapter merged"
    )
    parser.set_defaults(run=run_finetune)


OPTIONS = (
    ("lora", int, "train an adapter of this rank alone (default: train all weights)"),
    ("alpha", float, "the numerator of the adapter's scale (default: twice the rank)"),
    ("epochs", int, "how often each example comes (default: 1)"),
    ("steps", int, "the number of steps, instead of --epochs"),
    ("batch-size", int, "the number of rows in a batch (default: 8)"),
    ("length", int, "the number of tokens in a row, which holds several examples (default: 1024)"),
    ("learning-rate", float, "the highest rate (default: 5e-4 for an adapter, else 2e-5)"),
    ("eval-data", str, "a file of examples to evaluate on, instead of --eval-share"),
    ("eval-share", float, "the share of the lines that is held out to evaluate (default: 0.05)"),
    ("eval-every", int, "the number of steps between evaluations (default: 100)"),
    ("save-every", int, "the number of steps between checkpoints (default: 100)"),
    ("seed", int, "the seed of all that is drawn (default: 0)"),
    ("dtype", str, DTYPE),
)
METAVARS = {int: "N", float: "X", str: "NAME"}
FIELDS = {"lora": "rank", "merge": "merged"}  # those with other names than the options


def run_finetune(options: argparse.Namespace) -> int:
    from jaxformers.compilation_cache import keep_compiled_programs
    from jaxformers.finetuning import FineTuning, finetune

    given = {FIELDS.get(name, name): x for name, x in vars(options).items() if x is not None}
    known = {field.name for field in dataclasses.fields(FineTuning)}
    settings: dict[str, Any] = {name: x for name, x in given.items() if name in known}
    keep_compiled_programs()
    result = finetune(FineTuning(**settings), progress=sys.stderr.isatty())
    for line in result.summary:
        print(line)
    if not result.done:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130  # the status that a shell reports after Ctrl-C
    for directory in result.written:
        print(f"written: {directory}")
    return 0
