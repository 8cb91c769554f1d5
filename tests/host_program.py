"""A program that one of several hosts runs, started by `test_hosts.py` and `.ci/slow`.

`python host_program.py INDEX COUNT PORT DIRECTORY CHECK ...` is host INDEX of COUNT, each
with 8 / COUNT virtual devices. It prints a line of JSON for each check.
"""

import json
import os
import sys
import time

from quick import xla_flags

os.environ["XLA_FLAGS"] = xla_flags()

import jax
import numpy as np

from jaxformers import (
    AdamW,
    GatedFeedForward,
    KeepBest,
    OrbaxCheckpoints,
    RMSNorm,
    RotaryPositionalEncoding,
    TransformerLM,
    evaluate,
    fit,
    from_pretrained,
    language_model_loss,
    load,
    scan_layers,
    train_step,
)
from jaxformers.data import Windows
from jaxformers.sharding import (
    collect,
    host_rows,
    join_batch,
    join_hosts,
    make_mesh,
    shard,
    shard_batch,
)
from jaxformers.training.batches import check_alike

jax.config.update("jax_numpy_dtype_promotion", "strict")
TEXT = np.random.default_rng(5).integers(0, 72, 2000)
MESHES = {"fsdp": (1, 8), "all": (2, 2, 2), "tensor": (1, 1, 8), "positions": (2, 1, 1, 4)}


def model():
    llama = dict(
        norm=RMSNorm,
        feed_forward=GatedFeedForward,
        position=RotaryPositionalEncoding(),
        use_bias=False,
        tie_embeddings=True,
        embedding_scale=1.0,
    )
    return scan_layers(TransformerLM(72, 32, 8, 2, 48, 64, 0.1, **llama, key=jax.random.key(3)))


def source():
    return Windows(TEXT, length=12, batch_size=16, seed=1)


class Slow:
    """Batches that take a while, so that a signal comes in between."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, i):
        time.sleep(0.05)
        return self.batches[i]


def run(mesh, steps, batches=None, **options):
    """The losses of a run from its first step on, and the trained state."""
    losses = []
    training = fit(
        model(),
        AdamW(1e-2),
        source() if batches is None else batches,
        loss=language_model_loss,
        steps=steps,
        key=jax.random.key(9),
        mesh=None if mesh is None else make_mesh(*MESHES[mesh]),
        eval_every=1,
        callbacks=[lambda report: losses.append(report.metrics["loss"])],
        progress=False,
        **options,
    )
    return losses, training


def check_losses(directory):
    """The losses of three steps on several meshes, and an evaluation with a smaller last batch."""
    found = {}
    for name in MESHES:
        found[name] = run(name, 3)[0]
    batches = list(source().in_order())[:3]
    batches.append({name: x[:3] for name, x in batches[0].items()})
    spread = shard(model(), make_mesh(*MESHES["all"]))
    return found | {"evaluation": float(evaluate(spread, batches, loss=language_model_loss))}


def check_rows(directory):
    """Hosts that make rows of their own, in a loop of their own."""
    found = {}
    rows = {"tokens": np.arange(32).reshape(2, 16), "targets": None}
    check_alike(rows)
    joined = join_batch(rows, make_mesh(sequence=8))  # each host has all positions of its rows
    assert np.array_equal(collect(joined)["tokens"], rows["tokens"])
    for name in os.environ.get("MESH", "fsdp").split():
        mesh = make_mesh(*MESHES[name])
        own = source().shard(*host_rows(mesh))
        spread, optimizer = shard(model(), mesh), AdamW(1e-2)
        state, losses = optimizer.init(spread), []
        for i in range(2):
            key = jax.random.fold_in(jax.random.key(9), i)
            spread, state, value = train_step(
                spread,
                state,
                join_batch(own[i], mesh),
                optimizer=optimizer,
                loss=language_model_loss,
                key=key,
            )
            losses.append(float(value))
        found[name] = losses
    return found


def check_generation(directory):
    spread, prompt = shard(model(), make_mesh(*MESHES["all"])), TEXT[:20].reshape(4, 5)
    ways = [dict(), dict(num_beams=3), dict(temperature=0.8, key=jax.random.key(1))]
    found = [np.asarray(spread.generate(prompt, 6, **way)).tolist() for way in ways]
    placed = shard_batch(prompt, make_mesh(*MESHES["all"]))
    got = collect(spread.generate(placed, 6)).tolist()
    return [*found, got == found[0]]


def check_files(directory):
    """A model that is trained on several hosts is saved by one, and read by each in parts."""
    best = KeepBest(f"{directory}/best.safetensors")
    trained = run("fsdp", 2, eval_batches=[source()[7]], **{})[1].model
    best(type("Report", (), dict(metrics={"eval_loss": 1.0}, step=2, begun=0, model=trained)))
    whole = collect(trained)
    if jax.process_index() == 0:
        whole.save_pretrained(f"{directory}/checkpoint")
    barrier()
    mesh = make_mesh(*MESHES["all"])
    found = []
    for other in (
        load(f"{directory}/best.safetensors", sharding=mesh),
        scan_layers(from_pretrained(f"{directory}/checkpoint", sharding=mesh)),
    ):
        pairs = zip(jax.tree.leaves(collect(other)), jax.tree.leaves(whole), strict=True)
        found.append(all(np.array_equal(x, y) for x, y in pairs))
    try:
        trained.save_pretrained(f"{directory}/not")
    except ValueError as error:
        found.append(str(error))
    return found


def check_different(directory):
    """Batches that differ between hosts are refused on each of them."""
    other = Windows(TEXT, length=12, batch_size=16, seed=jax.process_index())
    try:
        run("fsdp", 2, other)
    except ValueError as error:
        return str(error)


def check_train(directory):
    """A run with checkpoints, as long as the variable STEPS says, on the mesh that MESH says."""
    checkpoint = OrbaxCheckpoints(f"{directory}/run", every=2)
    steps = int(os.environ["STEPS"])
    losses, training = run(os.environ["MESH"], steps, Slow(source()), checkpoint=checkpoint)
    return {"losses": losses, "step": int(training.step)}


def check_broken(directory):
    """A loader that fails on one host."""

    class Broken:
        def __getitem__(self, i):
            if jax.process_index() == 1 and i == 2:
                raise OSError("this loader is broken")
            return source()[i]

    run("fsdp", 5, Broken())


def barrier():
    from jax.experimental.multihost_utils import sync_global_devices

    sync_global_devices("files")


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in dict(globals()).items()
    if name.startswith("check_")
}

if __name__ == "__main__":
    index, count, port, directory, *names = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    if int(count) > 1:
        join_hosts(f"localhost:{port}", int(count), int(index))
    for name in names:
        print(json.dumps([name, CHECKS[name](directory)]), flush=True)
