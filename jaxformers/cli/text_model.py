"""The options of the commands that generate, and the model that they name."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

CHECKPOINT = "a checkpoint: directory, GGUF or hub name"
DTYPE = "the type of the weights, such as bfloat16 (default: the file's)"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint and how it is read."""
    parser.add_argument("path", metavar="PATH", help=CHECKPOINT)
    parser.add_argument("--dtype", metavar="NAME", help=DTYPE)
    parser.add_argument(
        "--quantize", choices=list(BITS), help="keep the weights in integers of so many bits"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="an adapter of PEFT (LoRA) for the checkpoint"
    )


BITS = {"int8": 8, "int4": 4}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of one answer."""
    for name, kind, metavar, text in GENERATION:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--schema", metavar="FILE", help="a JSON Schema that the text keeps to")
    parser.add_argument("--regex", metavar="PATTERN", help="a pattern that the text matches")
    parser.add_argument(
        "--verbose", action="store_true", help="say on standard error how long it took"
    )


GENERATION = (
    ("system", str, "TEXT", "the message of the system, which begins a chat"),
    ("max-new-tokens", int, "N", "the most new tokens (default: 256)"),
    ("temperature", float, "X", "0 takes the likeliest token (default: 0)"),
    ("top-k", int, "N", "sample from the N likeliest tokens"),
    ("top-p", float, "X", "sample from the likeliest tokens that hold this probability"),
    ("repetition-penalty", float, "X", "above 1 discourages tokens that came before"),
    ("seed", int, "N", "the seed of sampling (default: 0)"),
)


def first_messages(options: argparse.Namespace) -> list[dict[str, str]]:
    """Returns the message of the system, if there is one."""
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def load_text(options: argparse.Namespace) -> Any:
    """Returns the `TextGenerator` that the options name."""
    from jaxformers.text.generator import TextGenerator

    begin = time.perf_counter()
    text = load_as(TextGenerator, options)
    if options.verbose:
        print(f"loaded in {time.perf_counter() - begin:.2f} s", file=sys.stderr)
    return text


def load_as(kind: Any, options: argparse.Namespace) -> Any:
    """Returns what a class reads from a checkpoint, with the options of `add_model_options`."""
    from jaxformers.adapters.peft_load import load_adapter
    from jaxformers.compilation_cache import keep_compiled_programs
    from jaxformers.quantization.quantize import quantize

    keep_compiled_programs()
    found = kind.from_pretrained(options.path, dtype=options.dtype)
    if options.adapter is not None:
        found.model = load_adapter(found.model, options.adapter)
    if options.quantize is not None:
        found.model = quantize(found.model, bits=BITS[options.quantize])
    return found


def generation_options(options: argparse.Namespace, text: Any) -> dict[str, Any]:
    """Returns the arguments of a call of a `TextGenerator`."""
    import jax

    from jaxformers.constraints.constraint import Regex
    from jaxformers.constraints.json_schema import JSONSchema

    names = "max_new_tokens", "top_k", "top_p", "repetition_penalty", "stop"
    given = {name: getattr(options, name) for name in names}
    found: dict[str, Any] = {name: x for name, x in given.items() if x is not None}
    samples = (options.temperature or 0) != 0
    if samples:
        found |= {"temperature": options.temperature, "key": jax.random.key(options.seed or 0)}
    elif options.seed is not None:
        raise ValueError("--seed is for sampling, got temperature 0. Pass --temperature 0.8.")
    if options.schema is not None and options.regex is not None:
        raise ValueError("--schema and --regex both say what the text is, got both. Pass one.")
    if options.schema is not None:
        try:
            found["constraint"] = JSONSchema(read_text(options.schema), text.tokenizer)
        except ValueError as error:
            raise ValueError(f"{options.schema}: {error}") from error
    if options.regex is not None:
        found["constraint"] = Regex(options.regex, text.tokenizer)
    return found


def read_text(name: str) -> str:
    """Returns the text in a file."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8: {error}. Convert the file to UTF-8.") from None


def to_json(value: Any) -> str:
    """Returns one line of JSON."""
    return json.dumps(value, ensure_ascii=False)
