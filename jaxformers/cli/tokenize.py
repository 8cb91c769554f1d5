"""`python -m jaxformers tokenize FILE ... --out DIR --tokenizer NAME`."""

import argparse
import sys
from pathlib import Path

from jaxformers.data.tokenize import tokenize
from jaxformers.files.json_file import read_json


def add_tokenize(commands: "argparse._SubParsersAction") -> None:
    """`tokenize FILE ... --out DIR --tokenizer DIR`"""
    parser = commands.add_parser(
        "tokenize",
        help="make a token file of text files",
        description="Write the token ids of text files to a directory that "
        "jaxformers.data.open_tokens reads. Each text file (UTF-8) is a document, and so is each "
        "line of a .jsonl file. If it is stopped, the same command goes on where it was.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="text")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help='directory of a tokenizer, or "bytes", or "characters"',
    )
    parser.add_argument("--field", default="text", help="of a JSON line (default: text)")
    parser.add_argument(
        "--end-token", metavar="TEXT", help="ends a document (default: the tokenizer's)"
    )
    parser.add_argument("--no-end-token", action="store_true", help="nothing ends a document")
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
        return 130  # as shells say it
    print(tokens)
    if empty := read_json(options.out / "tokens.json")["empty"]:
        print(f"note: {empty} documents without a token were left out", file=sys.stderr)
    return 0
