"""The command `jaxformers inspect PATH`."""

import argparse
import dataclasses
import math
from typing import Any

from jaxformers.cli.text_model import CHECKPOINT, to_json

EXAMPLES = """examples:
  jaxformers inspect HuggingFaceTB/SmolLM2-135M-Instruct
  jaxformers inspect HuggingFaceTB/SmolLM2-135M-Instruct --parameters
  jaxformers inspect SmolLM2-135M-Instruct.Q4_1.gguf --json
"""


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Adds the command `inspect PATH`."""
    parser = commands.add_parser(
        "inspect",
        help="the sizes of a checkpoint, without reading its weights",
        description="Print the parameters of a checkpoint by part, the memory of its weights and "
        "of its cache, and the operations for a token.",
        epilog=EXAMPLES,
    )
    parser.add_argument("path", metavar="PATH", help=CHECKPOINT)
    parser.add_argument(
        "--parameters",
        action="store_true",
        help="print each parameter: path, shape, axes, type and number, equal layers as one row",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.set_defaults(run=run_inspect)


def run_inspect(options: argparse.Namespace) -> int:
    from jaxformers.hf.load import outline
    from jaxformers.inspect import describe
    from jaxformers.transformer import Transformer
    from jaxformers.transformer_encoder import TransformerEncoder
    from jaxformers.transformer_lm import TransformerLM

    classes = {"lm": TransformerLM, "seq2seq": Transformer, "encoder": TransformerEncoder}
    model = outline(options.path, classes)
    if options.parameters:
        described = describe(model)
        rows = [dataclasses.asdict(row) for row in described.rows]
        print(to_json({"class": described.kind, "rows": rows}) if options.json else described)
        return 0
    found = sizes(model)
    print(to_json(found) if options.json else "\n".join(table(found)))
    return 0


def sizes(model: Any) -> dict[str, Any]:
    """Returns the sizes of a model, whose arrays may be shapes alone."""
    from jaxformers.inspect import describe
    from jaxformers.operations import attention_operations, map_operations

    described = describe(model)
    parts = {name: part.number for name, part in described.parts.items()}
    found: dict[str, Any] = {
        "class": described.kind,
        "parameters": described.number,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "bytes": described.bytes,
        "dtypes": sorted({row.dtype for row in described.rows}),
        "max_seq_length": model.max_seq_length,
        "trained_length": None if model.origin is None else model.origin.trained_length,
        "operations_per_token": map_operations(model),
    }
    if hasattr(model, "decoder"):
        found["operations_per_token_of_context"] = attention_operations(model.decoder)
        found["cache_bytes_per_token"] = cache_bytes(model)
    return found


def cache_bytes(model: Any) -> int:
    """Returns the bytes that one more token takes in a cache of a decoder."""
    import jax

    def size(slots: int) -> int:
        cache = jax.eval_shape(lambda: model.decoder.init_cache(1, slots))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))

    return size(2) - size(1)


def table(found: dict[str, Any]) -> list[str]:
    """Returns the sizes in lines for a reader."""
    context = found["max_seq_length"] or found["trained_length"]
    lines = [
        f"{found['class']}, {', '.join(found['dtypes'])}",
        f"{found['parameters']:>16,} parameters, {found['bytes'] / 1e6:,.1f} MB",
    ]
    lines += [f"{count:>16,} {name}" for name, count in found["parts"].items()]
    lines += [f"{found['operations_per_token']:>16,} operations for a token"]
    if "cache_bytes_per_token" in found:
        more = found["operations_per_token_of_context"]
        lines += [
            f"{more:>16,} more for each token that it attends to",
            f"{found['cache_bytes_per_token']:>16,} bytes of cache for a token",
        ]
    return lines + ([f"{context:>16,} tokens of context"] if context else [])
