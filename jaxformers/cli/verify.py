"""The command `jaxformers verify PATH`."""

import argparse

from jaxformers.cli.text_model import to_json

EXAMPLES = """examples:
  jaxformers verify SmolLM2-135M-Instruct
  jaxformers verify SmolLM2-135M-Instruct --no-generation --no-16-bits --json
"""


def add_verify(commands: argparse._SubParsersAction) -> None:
    """Adds the command `verify PATH`."""
    parser = commands.add_parser(
        "verify",
        help="compare a checkpoint with transformers and torch",
        description="Compare a checkpoint under transformers and torch with the same one here: "
        "its outputs with and without padding, generated tokens, its outputs with weights of 16 "
        "bits, and the checkpoint after saving it. The exit status is 1 if a difference is larger "
        "than allowed.",
        epilog=EXAMPLES,
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
    parser.add_argument("--json", action="store_true", help="write a line of JSON per comparison")
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    from jaxformers.cli.compare import table, verify
    from jaxformers.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    rows = verify(
        options.path,
        seed=options.seed,
        generate=not options.no_generation,
        sixteen_bits=options.sixteen_bits,
    )
    if options.json:
        for row in rows:
            found = {"name": row.name, "difference": row.difference, "allowed": row.allowed}
            print(to_json(found | {"passed": row.passed}))
    else:
        print(table(rows))
    return int(not all(row.passed for row in rows))
