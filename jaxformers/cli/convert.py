"""The command `jaxformers convert PATH OUT`."""

import argparse
from pathlib import Path

from jaxformers.cli.text_model import CHECKPOINT, DTYPE

EXAMPLES = """examples:
  jaxformers convert SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-copy
  jaxformers convert HuggingFaceTB/SmolLM2-135M-Instruct one.safetensors --dtype bfloat16
  jaxformers convert HuggingFaceTB/SmolLM2-135M-Instruct merged --adapter lora
"""


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Adds the command `convert PATH OUT`."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in another format",
        description="Read a checkpoint (safetensors, pytorch_model.bin, GGUF, or an adapter with "
        "its base) and write it to OUT: a directory in the format of transformers with the "
        "tokenizer, or a file .safetensors for jaxformers.load.",
        epilog=EXAMPLES,
    )
    parser.add_argument("path", metavar="PATH", help=CHECKPOINT)
    parser.add_argument("out", metavar="OUT", help="a directory, or a file .safetensors")
    parser.add_argument("--dtype", metavar="NAME", help=DTYPE)
    parser.add_argument("--adapter", metavar="DIR", help="an adapter of PEFT, which is merged")
    parser.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> int:
    from jaxformers.adapters.peft_load import load_adapter
    from jaxformers.checkpoint.model_file import save
    from jaxformers.compilation_cache import keep_compiled_programs
    from jaxformers.pretrained import from_pretrained
    from jaxformers.weights import merge

    out = Path(options.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"OUT must not be there yet, or be an empty directory, got {out}.")
    keep_compiled_programs()
    model = from_pretrained(options.path, dtype=options.dtype)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
    model = merge(model)
    if out.suffix == ".safetensors":
        save(out, model)
    else:
        model.save_pretrained(out)
    print(f"written: {out}")
    return 0
