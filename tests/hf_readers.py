"""Whether what is saved here reads the same in other versions of transformers.

    python tests/hf_readers.py write DIRECTORY

needs jaxformers and transformers 5. It saves every case of `hf_cases.py`, as it is and after each
of the `SURGERIES`, with what the model says. Then

    python tests/hf_readers.py read DIRECTORY

needs transformers and torch, and nothing of jaxformers, so that it runs in an environment with
transformers 4.57 as well. It loads each checkpoint by the class that config.json names, compares,
and ends with status 1 if any differs.
"""

import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np

TOLERANCE = 2e-4  # of log-probabilities in float32; settings that are lost make tenths
BFLOAT16_TOLERANCE = 0.2  # they are rounded at other places
TOKENS = np.array([[8, 9, 30, 12, 25, 33, 41, 50, 11], [13, 14, 52, 44, 20, 19, 18, 9, 23]])
# A class has these whether or not a checkpoint does, or computes them.
NEEDLESS = r"pooler\.dense|embed_positions\.weight$"
# transformers 4 gives source and target of Marian tables of one size.
TWO_SIZES = re.compile(r"marian(_target_tied)?, ")


# With jaxformers. What is changed is a leaf of the model or None.


def write(directory):
    """Save each case, as it is and after each surgery, with what the model says."""
    from hf_cases import CASES
    from hf_checkpoints import make

    from jaxformers import from_pretrained

    for name in CASES:
        source = directory / "sources" / name
        if not source.exists():
            make(name, source)
        model = from_pretrained(source)
        for surgery, change in SURGERIES.items():
            changed = change(model)
            if changed is None:
                continue
            try:
                save(changed, directory / f"{name}, {surgery}")
            except ValueError as error:
                print(f"{name}, {surgery} is not saved: {error}", flush=True)


def save(model, directory):
    model.save_pretrained(directory)
    np.save(directory / "expected.npy", outputs(model))


def outputs(model):
    """Log-probabilities, or the states or classes of an encoder without them."""
    import jax

    from jaxformers import Transformer, TransformerLM

    if isinstance(model, TransformerLM):
        return np.asarray(model(TOKENS))
    if isinstance(model, Transformer):
        return np.asarray(model(TOKENS, TOKENS[:, :5]))
    if model.output is not None:
        return np.asarray(jax.nn.log_softmax(model.logits(TOKENS)))
    return np.asarray(model(TOKENS) if model.classifier is None else model.classify(TOKENS))


def replace(where, model, new):
    import equinox as eqx

    return eqx.tree_at(where, model, new, is_leaf=lambda x: x is None)


def with_head(model, w):
    return replace(lambda m: m.output.w, model, w)


def table_of(model):
    return (model.tgt_embedding if hasattr(model, "tgt_embedding") else model.embedding).table


def moved(x):
    """Other values of the same size."""
    noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    return (0.7 * x + 0.2 * noise).astype(x.dtype)


def untie(model):
    """A head of its own for what is tied."""
    if model.output is None or not model.output.tied:
        return None
    return with_head(model, moved(table_of(model).T))


def repeat(model):
    """A head of its own that equals the table."""
    return None if model.output is None else with_head(model, table_of(model).T)


def tie(model):
    """No head for what has one of its own."""
    if model.output is None or model.output.tied:
        return None
    return with_head(model, None)


def part(model):
    """Tables for source and target where they share one."""
    if getattr(model, "tgt_embedding", None) is None:
        return None
    if model.src_embedding.token_embedding is not None:
        return None
    table = model.tgt_embedding.token_embedding
    table = replace(lambda x: x.weight, table, moved(table.weight))
    return replace(lambda m: m.src_embedding.token_embedding, model, table)


def shorten(model):
    """A layer less."""

    def layers(model):
        return (model.decoder if hasattr(model, "decoder") else model.encoder).layers

    return replace(layers, model, layers(model)[:-1])


def forget(model):
    """The same without its origin, as if it had been built here."""
    import jax

    model = jax.tree.map(lambda x: x, model)
    object.__setattr__(model, "origin", None)
    return model


SURGERIES = {
    "as it is": lambda model: model,
    "untied": untie,
    "a head like the table": repeat,
    "tied": tie,
    "two tables": part,
    "a layer less": shorten,
    "without origin": forget,
    "without origin, untied": lambda model: untie(forget(model)),
}


# With transformers alone.


def read(directory):
    """Compare all; how many differ."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    version_4 = transformers.__version__.startswith("4.")
    faults, left_out, count = 0, [], 0
    for path in sorted(path.parent for path in directory.glob("*/expected.npy")):
        config = json.loads((path / "config.json").read_text())
        architecture = getattr(transformers, config["architectures"][0], None)
        if architecture is None or (version_4 and TWO_SIZES.match(path.name)):
            left_out.append(path.name)
            continue
        fault = compare(architecture, path, config)
        count += 1
        if fault:
            faults += 1
            print(f"{path.name}: {fault}", flush=True)
    print(f"transformers {transformers.__version__}: {count} compared, {faults} differ")
    if left_out:
        print(f"{len(left_out)} that this version cannot hold: {'; '.join(left_out)}")
    if not count:
        raise SystemExit(f"there is nothing to compare in {directory}: run `write` first.")
    return faults


def compare(architecture, path, config):
    """What is different, or None."""
    try:
        model, info = architecture.from_pretrained(
            path, attn_implementation="eager", output_loading_info=True
        )
        first = answer(model)
    except Exception as error:  # whatever it is, this version does not read the checkpoint
        return f"{type(error).__name__}: {error}"[:500]
    expected = np.load(path / "expected.npy").astype(np.float32)
    if first.shape != expected.shape:
        return f"shape {first.shape} for {expected.shape}"
    worst = np.abs(first - expected).max()
    lost = [key for key in info["missing_keys"] if not re.search(NEEDLESS, key)]
    lost += list(info["mismatched_keys"])
    bound = TOLERANCE if config["dtype"] == "float32" else BFLOAT16_TOLERANCE
    return f"{worst:.2g} {lost or ''}" if lost or not worst < bound else None


def answer(model, exact=False):
    """What the torch model says of the tokens, in float32 or, without rounding, in float64."""
    import torch

    tokens = {"input_ids": torch.tensor(TOKENS)}
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = tokens["input_ids"][:, :5]
    with torch.no_grad():
        first = (model.double() if exact else model.float())(**tokens)[0]
    if type(model).__name__ == "ElectraForPreTraining":
        first = first[..., None]
    head = model.get_output_embeddings()
    return (first if head is None else first.log_softmax(-1)).numpy()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", place]:
            write(Path(place))
        case ["read", place]:
            sys.exit(int(read(Path(place)) > 0))
        case _:
            sys.exit(__doc__)
