"""The command line: `jaxformers COMMAND`, or `python -m jaxformers COMMAND`."""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxformers.cli.chat import add_chat
from jaxformers.cli.convert import add_convert
from jaxformers.cli.embed import add_embed
from jaxformers.cli.finetune import add_finetune
from jaxformers.cli.generate import add_generate
from jaxformers.cli.inspect import add_inspect
from jaxformers.cli.tokenize import add_tokenize
from jaxformers.cli.train_tokenizer import add_train_tokenizer
from jaxformers.cli.verify import add_verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status.

    It is 0; 1 if a check failed or nothing ran; 2 for wrong arguments; 130 after Ctrl-C; 141 if
    whoever reads the output went away.
    """
    options = make_parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is still to be written at the end of the process would fail in the same way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(prog="jaxformers", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in ADD:
        add(commands)
    return parser


ADD = (
    *(add_generate, add_chat, add_embed, add_inspect, add_convert),
    *(add_verify, add_tokenize, add_train_tokenizer, add_finetune),
)


if __name__ == "__main__":
    sys.exit(main())
