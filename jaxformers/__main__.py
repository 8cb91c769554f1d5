"""The command line: `python -m jaxformers COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from jaxformers.cli.finetune import add_finetune
from jaxformers.cli.tokenize import add_tokenize
from jaxformers.cli.train_tokenizer import add_train_tokenizer
from jaxformers.cli.verify import add_verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, or 1 if a check failed or nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m jaxformers", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_verify(commands)
    add_tokenize(commands)
    add_train_tokenizer(commands)
    add_finetune(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
