"""The command `jaxformers embed PATH FILE ...`."""

import argparse
import sys

from jaxformers.cli.text_model import add_model_options, load_as, read_text, to_json

EXAMPLES = """examples:
  jaxformers embed sentence-transformers/all-MiniLM-L6-v2 sentences.txt --out vectors.npy
  echo "A cat sleeps." | jaxformers embed sentence-transformers/all-MiniLM-L6-v2 - --json
"""


def add_embed(commands: argparse._SubParsersAction) -> None:
    """Adds the command `embed PATH FILE ...`."""
    parser = commands.add_parser(
        "embed",
        help="the vectors of texts",
        description="Write a vector for each line of the files: numbers with spaces between them, "
        "a line of JSON, or with --out the rows of a file of NumPy.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="text; - is standard input")
    parser.add_argument("--prompt", metavar="NAME", help="the name of a prompt, such as query")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--json", action="store_true", help="write JSON with text and vector")
    parser.add_argument("--out", metavar="FILE.npy", help="write the vectors to a file of NumPy")
    parser.set_defaults(run=run_embed)


def run_embed(options: argparse.Namespace) -> int:
    import numpy as np

    from jaxformers.text.embedder import TextEmbedder

    if options.out is not None and (options.json or not options.out.endswith(".npy")):
        raise ValueError(f"--out is a file of NumPy (.npy) without --json, got {options.out}.")
    texts = [line for name in options.files for line in read_lines(name)]
    embedder = load_as(TextEmbedder, options)
    vectors = embedder(texts, batch_size=options.batch_size, prompt_name=options.prompt)
    if options.out is not None:
        np.save(options.out, vectors)
        print(f"{len(texts)} vectors of {vectors.shape[1]} numbers: {options.out}")
        return 0
    for text, vector in zip(texts, vectors, strict=True):
        if options.json:
            print(to_json({"text": text, "vector": vector.tolist()}))
        else:
            print(*(f"{x:.6g}" for x in vector.tolist()))
    return 0


def read_lines(name: str) -> list[str]:
    """Returns the lines of a file, or of standard input for -."""
    return (sys.stdin.read() if name == "-" else read_text(name)).splitlines()
