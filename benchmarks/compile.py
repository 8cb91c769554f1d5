"""Measures the time to the first step of training: building a model, tracing and compiling.

    python benchmarks/compile.py [12 48 96] [--contenders ours scanned ...] [--json FILE]

Each measurement runs in its own process, because a process compiles a program only once. The models
are decoders of equal shape. They are narrow, so that computing takes hardly any time. A step is
forward, backward and AdamW. `build` is the time to make the model and the optimizer's state. `first
step` is the time to trace, compile and run the step once, and `compiled` is the part of it in the
compiler. Each contender is measured without JAX's persistent compilation cache, with an empty one,
and with a filled one. Imports do not count. Contenders whose packages are not installed are left
out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contest

VOCAB, D, HEADS, T, BATCH = 65, 128, 4, 64, 8
CACHES = ("none", "empty", "filled")
Run = Callable[[], Any]


def ours(layers: int, change: Callable = lambda model: model) -> tuple[Run, Run]:
    import jax

    import jaxformers

    def build():
        sizes = VOCAB, D, HEADS, layers, 4 * D, T
        options = dict(dropout_rate=0.0, learnable_pos=True, tie_embeddings=True)
        model = change(jaxformers.TransformerLM(*sizes, **options, key=jax.random.key(0)))
        return model, optimizer.init(model)

    def step(model, state):
        batch = dict(zip(("tokens", "targets"), text(), strict=True))
        options = dict(loss=jaxformers.language_model_loss, key=jax.random.key(1))
        return jaxformers.train_step(model, state, batch, optimizer=optimizer, **options)

    optimizer = jaxformers.AdamW(1e-3)
    return build, step


def scanned(layers: int) -> tuple[Run, Run]:
    from jaxformers import scan_layers

    return ours(layers, scan_layers)


def flax_nnx(layers: int) -> tuple[Run, Run]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm_1, self.norm_2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norm_1(x), mask=mask)
            return x + self.down(jax.nn.relu(self.up(self.norm_2(x))))

    class Decoder(nnx.Module):
        def __init__(self, rngs):
            self.tokens, self.positions = (nnx.Embed(n, D, rngs=rngs) for n in (VOCAB, T))
            self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
            self.norm = nnx.LayerNorm(D, rngs=rngs)

        def __call__(self, tokens):
            x = self.tokens(tokens) + self.positions(jnp.arange(T))
            mask = nnx.make_causal_mask(tokens)
            for block in self.blocks:
                x = block(x, mask)
            return self.tokens.attend(self.norm(x))

    def build():
        model = Decoder(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, state):
        def loss(model):
            tokens, targets = text()
            losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets)
            return losses.mean()

        value, grads = nnx.value_and_grad(loss)(model)
        state.update(model, grads)
        return value

    return build, step


def equinox_nn(layers: int) -> tuple[Run, Run]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    class Block(eqx.Module):
        norm_1: eqx.nn.LayerNorm
        norm_2: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            biases = {f"use_{x}_bias": True for x in ("query", "key", "value", "output")}
            self.norm_1, self.norm_2 = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
            self.attention = eqx.nn.MultiheadAttention(HEADS, D, **biases, key=keys[0])
            self.up = eqx.nn.Linear(D, 4 * D, key=keys[1])
            self.down = eqx.nn.Linear(4 * D, D, key=keys[2])

        def __call__(self, x, mask):
            y = jax.vmap(self.norm_1)(x)
            x = x + self.attention(y, y, y, mask)
            y = jax.vmap(self.up)(jax.vmap(self.norm_2)(x))
            return x + jax.vmap(self.down)(jax.nn.relu(y))

    class Decoder(eqx.Module):
        tokens: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        blocks: list[Block]
        norm: eqx.nn.LayerNorm

        def __init__(self, key):
            token_key, position_key, *keys = jax.random.split(key, 2 + layers)
            self.tokens = eqx.nn.Embedding(VOCAB, D, key=token_key)
            self.positions = eqx.nn.Embedding(T, D, key=position_key)
            self.blocks = [Block(key) for key in keys]
            self.norm = eqx.nn.LayerNorm(D)

        def __call__(self, tokens):
            x = jax.vmap(self.tokens)(tokens) + self.positions.weight
            mask = jnp.tril(jnp.ones((T, T), bool))
            for block in self.blocks:
                x = block(x, mask)
            return jax.vmap(self.norm)(x) @ self.tokens.weight.T

    optimizer = optax.adamw(1e-3)

    def build():
        model = Decoder(jax.random.key(0))
        return model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def step(model, state):
        def loss(model):
            tokens, targets = text()
            logits = jax.vmap(model)(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    return build, step


def text():
    import jax.numpy as jnp
    import numpy as np

    rows = np.random.default_rng(1).integers(0, VOCAB, (BATCH, T + 1))
    return jnp.array(rows[:, :-1]), jnp.array(rows[:, 1:])


def measure(name: str, layers: int) -> dict[str, float]:
    """Returns the times of one model up to its first step, in this process."""
    import jax

    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    build, step = CONTENDERS[name](layers)
    jax.devices()
    start = time.perf_counter()
    model, state = jax.block_until_ready(build())
    built, in_build = time.perf_counter(), len(compiling)
    parameters = sum(x.size for x in jax.tree.leaves(model) if hasattr(x, "size"))
    begun = time.perf_counter()
    jax.block_until_ready(step(model, state))
    return {
        "parameters": int(parameters),
        "build_seconds": built - start,
        "first_step_seconds": time.perf_counter() - begun,
        "compiled_seconds": sum(compiling[in_build:]),
    }


def child(name: str, layers: int, cache: Path | None) -> dict[str, float]:
    """Returns the result of `measure` in a new process."""
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, __file__, str(layers), "--child", name]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compete(names: list[str], layers: int, rounds: int) -> dict[str, dict]:
    """Returns medians by contender and cache, over rounds in which each is measured once."""
    turns: dict[str, list[dict]] = {f"{name}, {cache}": [] for name in names for cache in CACHES}
    for i in range(rounds):
        for name in names if i % 2 else names[::-1]:
            with tempfile.TemporaryDirectory() as directory:
                for cache in CACHES:
                    where = None if cache == "none" else Path(directory)
                    turns[f"{name}, {cache}"].append(child(name, layers, where))
    sizes = {turn["parameters"] for row in turns.values() for turn in row}
    if len(sizes) > 1:
        raise SystemExit(f"the models differ in size: {sizes} parameters.")
    return {
        name: {key: statistics.median(turn[key] for turn in row) for key in row[0]}
        for name, row in turns.items()
    }


def show(layers: int, results: dict[str, dict]) -> None:
    print(f"\n{layers} layers, seconds")
    print(f"{'contender, cache':24} {'build':>7} {'first step':>11} {'compiled':>9} {'sum':>7}")
    for name, row in results.items():
        build, step = row["build_seconds"], row["first_step_seconds"]
        compiled = row["compiled_seconds"]
        print(
            f"{name:24} {build:7.2f} {step:11.2f} {compiled:9.2f} {build + step:7.2f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layers", nargs="*", type=int, default=[12, 48, 96])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.layers[0])))
        return
    record: dict[str, Any] = {
        "machine": contest.machine(),
        "versions": contest.versions(),
        "results": {},
    }
    print(record["machine"], *(f"{k} {v}" for k, v in record["versions"].items()), sep=", ")
    for layers in options.layers:
        results = compete(options.contenders, layers, options.rounds)
        show(layers, results)
        record["results"][str(layers)] = results
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")


CONTENDERS = {"ours": ours, "scanned": scanned}
if contest.installed("flax", "optax"):
    CONTENDERS["Flax NNX"] = flax_nnx
if contest.installed("optax"):
    CONTENDERS["Equinox"] = equinox_nn

if __name__ == "__main__":
    main()
