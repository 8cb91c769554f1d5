"""The command line: `jaxformers COMMAND`, or `python -m jaxformers COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from jaxformers.cli.chat import add_chat
from jaxformers.cli.convert import add_convert
from jaxformers.cli.embed import add_embed
from jaxformers.cli.finetune import add_finetune
from jaxformers.cli.generate import add_generate
from jaxformers.cli.help import Parser
from jaxformers.cli.inspect import add_inspect
from jaxformers.cli.plan import add_plan
from jaxformers.cli.process import drop_output, failed, process
from jaxformers.cli.serve import add_serve
from jaxformers.cli.tokenize import add_tokenize
from jaxformers.cli.train_tokenizer import add_train_tokenizer
from jaxformers.cli.verify import add_verify
from jaxformers.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status.

    It is 0; 1 if a check failed or nothing ran; 2 for wrong arguments; 130 after Ctrl-C; 141 if
    whoever reads the output went away.
    """
    with process():
        try:
            options = make_parser().parse_args(arguments)
            status = options.run(options)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            drop_output()
            return 141
        except KeyboardInterrupt:
            return 130
        except MemoryError as error:
            return failed(f"the memory does not suffice. {error}")
        except OSError as error:
            is_of_file = error.filename is not None and error.strerror is not None
            return failed(f"{error.filename}: {error.strerror}" if is_of_file else error)
        except (ImportError, ValueError, FloatingPointError) as error:
            return failed(error)
        except RuntimeError as error:
            if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
                raise  # a mistake of ours, whose place is worth knowing
            return failed(error)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = Parser(
        prog="jaxformers",
        description="Transformers in JAX: generate text, chat, embed, convert and train. "
        "jaxformers COMMAND --help shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"jaxformers {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in ADD:
        add(commands)
    return parser


ADD = (
    *(add_generate, add_chat, add_embed, add_inspect, add_convert),
    add_serve,
    *(add_verify, add_tokenize, add_train_tokenizer, add_finetune, add_plan),
)


if __name__ == "__main__":
    sys.exit(main())
