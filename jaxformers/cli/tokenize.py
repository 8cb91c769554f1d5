"""The command `jaxformers tokenize FILE ... --out DIR --tokenizer NAME`."""

import argparse
import sys
from pathlib import Path

from jaxformers.data.tokenize import tokenize
from jaxformers.files.json_file import read_json

EXAMPLES = """examples:
  jaxformers tokenize book.txt --out tokens --tokenizer SmolLM2-135M-Instruct
  jaxformers tokenize articles.jsonl --field body --out bytes --tokenizer bytes --no-end-token
"""


def add_tokenize(commands: argparse._SubParsersAction) -> None:
    """Adds the command `tokenize FILE ... --out DIR --tokenizer DIR`."""
    parser = commands.add_parser(
        "tokenize",
        help="make a token file of text files",
        description="Write the token ids of text files to a directory that "
        "jaxformers.data.open_tokens reads. Each text file (UTF-8) is a document, and so is each "
        "line of a .jsonl file. If the command is stopped, the same command goes on from there.",
        epilog=EXAMPLES,
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="a text file")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the directory to write"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help='the directory of a tokenizer, or "bytes", or "characters"',
    )
    parser.add_argument(
        "--field", default="text", help="the field of a JSON line with the text (default: text)"
    )
    parser.add_argument(
        "--end-token",
        metavar="TEXT",
        help="the token that ends a document (default: the tokenizer's end token)",
    )
    parser.add_argument(
        "--no-end-token", action="store_true", help="do not end documents with a token"
    )
    parser.set_defaults(run=run_tokenize)


def run_tokenize(options: argparse.Namespace) -> int:
    try:
        tokens = tokenize(
            options.inputs,
            options.out,
            options.tokenizer,
            field=options.field,
            end_token=options.end_token,
            add_end=not options.no_end_token,
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130  # the status that a shell reports after Ctrl-C
    print(tokens)
    if empty := read_json(options.out / "tokens.json")["empty"]:
        print(f"note: {empty} documents without a token were left out", file=sys.stderr)
    return 0
