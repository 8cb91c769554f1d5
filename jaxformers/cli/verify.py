"""The command `python -m jaxformers verify PATH`."""

import argparse
import sys


def add_verify(commands: argparse._SubParsersAction) -> None:
    """Adds the command `verify PATH`."""
    parser = commands.add_parser(
        "verify",
        help="compare a checkpoint with transformers and torch",
        description="Compare a checkpoint under transformers and torch with the same one here: "
        "its outputs with and without padding, generated tokens, its outputs with weights of 16 "
        "bits, and the checkpoint after saving it. The exit status is 1 if a difference is larger "
        "than allowed.",
    )
    parser.add_argument("path", metavar="PATH", help="the directory of the checkpoint")
    parser.add_argument(
        "--seed", type=int, default=0, help="the seed of the random tokens (default: 0)"
    )
    parser.add_argument(
        "--no-generation", action="store_true", help="do not compare generated tokens"
    )
    parser.add_argument(
        "--no-16-bits",
        action="store_false",
        dest="sixteen_bits",
        help="do not compare with weights of 16 bits",
    )
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    from jaxformers.cli.compare import table, verify
    from jaxformers.compilation_cache import keep_compiled_programs

    try:
        note = f"compiled programs are kept in {keep_compiled_programs()}"
    except ValueError as error:
        note = f"compiled programs are not kept: {error}"
    print(note, file=sys.stderr)  # standard output has only the table
    rows = verify(
        options.path,
        seed=options.seed,
        generate=not options.no_generation,
        sixteen_bits=options.sixteen_bits,
    )
    print(table(rows))
    return int(not all(row.passed for row in rows))
