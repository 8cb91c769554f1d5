"""Measures a checkpoint with weights of eight and four bits beside its float32 weights.

    python benchmarks/quantized.py CHECKPOINT TEXT ["batch 1" ...] [--contenders ...] [--json FILE]

CHECKPOINT is a directory, or a GGUF file, whose own blocks are then a contender as well ("kept").
TEXT is a file. Perplexity is that of its first 2,000 tokens in windows of 500 tokens that begin 250
apart. A step continues prompts of 64 tokens by 64 tokens, greedily, and includes the pass over the
prompt. "weights" are the bytes of all arrays of the model; "by hand" is the same from the numbers
of inputs, outputs and groups of each weight.
"""

from functools import partial
from pathlib import Path

import contest
import numpy as np

PROMPT, NEW, TEXT = 64, 64, 2000
KINDS = {
    "float32": None,
    "int8": dict(bits=8),
    "int8, groups of 32": dict(bits=8, group_size=32),
    "int4, groups of 32": dict(bits=4, group_size=32),
    "int4, groups of 64": dict(bits=4, group_size=64),
}


def bytes_by_hand(path, weight, options):
    """Returns the bytes of a weight, given its number of inputs and outputs."""
    inputs, outputs = sizes_of(path, weight)
    bits, size = options["bits"], options.get("group_size") or inputs
    scales = (2 if bits == 4 else 1) * (4 if size == inputs else 2)  # bytes per group
    return outputs * (inputs * bits // 8 + inputs // size * scales)


def sizes_of(path, weight):
    """Returns the inputs and the outputs of a weight; a table of tokens is (outputs, inputs)."""
    split = 2 if path.endswith(".wo") else 1
    first, last = (int(np.prod(x)) for x in (weight.shape[:split], weight.shape[split:]))
    return (last, first) if "embedding" in path else (first, last)


def all_bytes(model, options, chosen):
    """Returns the bytes of a model's arrays as computed by hand."""
    import jax

    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if hasattr(x, "nbytes"):
            total += bytes_by_hand(name, x, options) if name in chosen else x.nbytes
    return total


def contender(config, options=None, kept=False):
    """Returns the step, and the perplexity and the bytes of the weights."""
    import jax

    import jaxformers as jf

    checkpoint = config["checkpoint"]
    model = jf.from_pretrained(checkpoint, **({"quantized": True} if kept else {}))
    model = model if kept else jf.cast_floating(model, "float32")
    text = Path(config["text"]).read_text()[: 8 * TEXT]
    tokens = np.asarray(jf.load_tokenizer(checkpoint).encode(text, add_special_tokens=False)[0])
    chosen: set[str] = set()
    plain = model
    if options is not None:
        model = jf.quantize(model, **options, where=lambda path, weight: chosen.add(path) or True)
    by_hand = all_bytes(plain, options, chosen)
    measured = sum(x.nbytes for x in jax.tree.leaves(model) if hasattr(x, "nbytes"))
    prompts = np.resize(tokens, (config["batch"], PROMPT))

    def step():
        return model.generate(prompts, NEW, end_token=[]).block_until_ready()

    def check():
        figure = jf.perplexity(model, tokens[:TEXT], stride=250, context=500)
        return [figure, measured, by_hand]

    del plain
    return step, check


def remark(config, row):
    perplexity, measured, by_hand = row["check"]
    return (
        f"{config['batch'] * NEW / row['seconds']:7.1f} tokens/s, perplexity {perplexity:.3f}, "
        f"weights {measured / 1e6:.2f} MB, by hand {by_hand / 1e6:.2f} MB"
    )


def arguments(parser):
    parser.add_argument("checkpoint")
    parser.add_argument("text")


def prepare(options):
    kept = options.checkpoint.endswith(".gguf")
    given = {"checkpoint": options.checkpoint, "text": options.text}
    return given | {"without": () if kept else ("kept",)}


CONTENDERS = {name: partial(contender, options=options) for name, options in KINDS.items()}
CONTENDERS["kept"] = partial(contender, kept=True)


if __name__ == "__main__":
    contest.main(
        __doc__,
        CONTENDERS,
        {f"batch {batch}": {"batch": batch} for batch in (1, 4, 8)},
        tolerance=float("inf"),  # the figures of contenders differ: they are what is measured
        remark=remark,
        arguments=arguments,
        prepare=prepare,
    )
