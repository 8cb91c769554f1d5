"""Measures the memory of a step of training, with one way to save memory after the other.

    python benchmarks/memory.py [--sequence 1024 --batch 4 ...] [--contenders ...] [--json FILE]

The model is a decoder of nanoGPT's shape, by default of the size of the smallest GPT-2. A step is
forward, backward and AdamW. Each row of ours also has the options of the rows above it:

    plain      makes all attention weights and all logits
    attention  the default kernel
    chunks     the default loss, which makes logits for some rows at a time
    again      computes layers again in the backward pass (`rematerialize`)
    scanned    does so in a loop (`scan_layers`), which makes the buffers of one layer at a time
    bfloat16   computes in 16 bits with weights in 32 bits

One more row has the options of `chunks` alone:

    parts      as `chunks`, with the rows of the batch one after another (`accumulate`)

Every row is measured in its own process. The table has the memory of the compiled program
(arguments and temporary buffers), and the peak of the process or the accelerator, minus the memory
after importing. The losses of the first step must agree.

A long text on a CPU: --sequence 16384 --batch 1 --contenders scanned
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import contest
import train
import train_task as task
import train_torch

SIZES = dict(vocab=50304, d_model=768, layers=12, heads=12, sequence=1024, batch=4)
TOLERANCE = 0.02


def all_logits(model, batch, key):
    """Returns the loss, computed without chunks."""
    import jaxformers

    return jaxformers.cross_entropy(model.logits(batch["tokens"], None, key), batch["targets"])


def ours(config, plain=False, chunks=False, again=False, scanned=False, dtype=None, parts=1):
    import jax
    import jax.numpy as jnp

    import jaxformers
    from jaxformers.training.step import Gradients, _train_step

    pieces = {"attention_fn": jaxformers.dot_product_attention} if plain else {}
    model = train.our_decoder(config, **pieces)
    model = jaxformers.scan_layers(model) if scanned else model
    model = jaxformers.rematerialize(model) if again else model
    rows = jnp.array(task.decoder_text(config))
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    optimizer = jaxformers.AdamW(task.RATE, task.B1, task.B2, task.EPS, task.DECAY)
    loss = jaxformers.language_model_loss if chunks else all_logits
    gradients = Gradients(loss, dtype, parts, jaxformers.training.count_targets)
    kept, state = (gradients, optimizer, batch, jax.random.key(0)), optimizer.init(model)
    program = _train_step.lower(kept, model, state).compile()
    needed = program.compiled.memory_analysis()

    def step():
        nonlocal model, state
        model, state, value = program(kept, model, state)
        return float(value)

    return step, needed.argument_size_in_bytes + needed.temp_size_in_bytes


def torch_eager(config, again=False):
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Again(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model = train_torch.decoder(config)
    if again:
        model.blocks = nn.ModuleList(map(Again, model.blocks))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, rows = model.to(device), torch.from_numpy(task.decoder_text(config)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.RATE, fused=True)

    def step():
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, None


def parts(config, **options):
    """Builds a step that computes each row of the batch by itself."""
    return ours(config, parts=config["batch"], **options)


CONTENDERS = {
    "plain": partial(ours, plain=True),
    "attention": ours,
    "chunks": partial(ours, chunks=True),
    "again": partial(ours, chunks=True, again=True),
    "scanned": partial(ours, chunks=True, again=True, scanned=True),
    "bfloat16": partial(ours, chunks=True, again=True, scanned=True, dtype="bfloat16"),
    "parts": partial(parts, chunks=True),
}
if contest.installed("torch"):
    CONTENDERS |= {"torch": torch_eager, "torch again": partial(torch_eager, again=True)}


def measure(name: str, config: dict) -> dict:
    """Returns a row of the table, from two steps; the first one allocates the memory."""
    __import__("torch" if name.startswith("torch") else "jaxformers")
    before = contest.peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    step, program_bytes = CONTENDERS[name](config)
    loss = step()
    start = time.perf_counter()
    step()
    return {
        "seconds": time.perf_counter() - start,
        "program_bytes": program_bytes,
        "peak_bytes": contest.peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before,
        "check": [loss],
    }


def measure_apart(name: str, config: dict) -> dict:
    """Returns a row of the table, measured in a fresh process."""
    command = [sys.executable, sys.argv[0], "--child", name, "--config-json", json.dumps(config)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        return {"failed": f"ended with code {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--config-json", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, json.loads(options.config_json))))
        return
    config = {name: getattr(options, name) for name in SIZES}
    config["t"] = config.pop("sequence")
    record = {"machine": contest.machine(), "versions": contest.versions(), "config": config}
    print(record["machine"], *(f"{k} {v}" for k, v in record["versions"].items()), sep=", ")
    print(f"\n{config}\n{'':12} {'program GB':>10} {'peak GB':>8} {'seconds':>8} {'loss':>8}")
    results: dict[str, dict] = {}
    for name in options.contenders:
        row = results[name] = measure_apart(name, config)
        program = f"{row['program_bytes'] / 1e9:.2f}" if row.get("program_bytes") else ""
        print(
            f"{name:12} {row['failed']}"
            if "failed" in row
            else f"{name:12} {program:>10} {row['peak_bytes'] / 1e9:8.2f} {row['seconds']:8.2f} "
            f"{row['check'][0]:8.4f}",
            flush=True,
        )
        if options.json:
            text = json.dumps(record | {"results": results}, indent=1)
            options.json.write_text(text + "\n")
    losses = [row["check"][0] for row in results.values() if "check" in row]
    if losses and max(losses) - min(losses) > TOLERANCE:
        raise SystemExit(f"the contenders do not compute the same: {losses}.")


if __name__ == "__main__":
    main()
