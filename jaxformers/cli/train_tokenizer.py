"""The command `jaxformers train-tokenizer FILE ... --out DIR --vocab-size N`."""

import argparse
import sys
from pathlib import Path

from jaxformers.data.text_files import check_inputs, texts_of
from jaxformers.tokenizers.training import END, check_new, save_new, train_bpe

ROLES = ("end", "start", "pad", "mask")  # the roles of special tokens on the command line
NAMES = {"end": "eos_token", "start": "bos_token", "pad": "pad_token", "mask": "mask_token"}

EXAMPLES = """examples:
  jaxformers train-tokenizer book.txt --out tokenizer --vocab-size 8000
  jaxformers train-tokenizer articles.jsonl --field body --out mine --vocab-size 300 \
--special-tokens "<|user|>" "<|assistant|>"
"""


def add_train_tokenizer(commands: argparse._SubParsersAction) -> None:
    """Adds the command `train-tokenizer FILE ... --out DIR --vocab-size N`."""
    parser = commands.add_parser(
        "train-tokenizer",
        help="train a byte-level BPE tokenizer",
        usage="%(prog)s FILE ... [OPTIONS]",
        description="Train a byte-level BPE tokenizer on text files (UTF-8) or JSON lines "
        "(.jsonl), and save it for load_tokenizer and for AutoTokenizer of transformers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="a text file")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the directory to write"
    )
    parser.add_argument(
        "--vocab-size",
        required=True,
        type=int,
        metavar="N",
        help="the largest number of tokens, special tokens included",
    )
    parser.add_argument(
        "--field", default="text", help="the field of a JSON line with the text (default: text)"
    )
    parser.add_argument(
        "--min-frequency",
        type=int,
        default=2,
        metavar="N",
        help="how often a pair must occur to become a token (default: 2)",
    )
    for role in ROLES:
        default = END if role == "end" else None
        parser.add_argument(
            f"--{role}-token",
            default=default,
            metavar="TEXT",
            help=f"the {role} token (default: {default or 'none'})",
        )
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="TEXT", help="more special tokens"
    )
    parser.set_defaults(run=run_train_tokenizer)


def run_train_tokenizer(options: argparse.Namespace) -> int:
    check_inputs(options.inputs)
    check_new(options.out)  # before the training, which may take long
    given = {NAMES[role]: getattr(options, f"{role}_token") for role in ROLES}
    tokenizer = train_bpe(
        texts_of(options.inputs, options.field),
        options.vocab_size,
        special_tokens={name: token for name, token in given.items() if token is not None},
        others=options.special_tokens,
        min_frequency=options.min_frequency,
        progress=sys.stderr.isatty(),
    )
    save_new(tokenizer, options.out)
    print(f"{options.out}: {tokenizer.vocab_size} tokens")
    if tokenizer.vocab_size < options.vocab_size:
        print(
            f"note: not {options.vocab_size} tokens, because no more pairs occur "
            f"{options.min_frequency} times",
            file=sys.stderr,
        )
    return 0
