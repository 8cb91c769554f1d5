"""What is done with the golden files: outputs of what was saved, trainings that go on.

The files themselves are in `golden/` and were made by `golden/write.py`.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxformers
from jaxformers import (
    Adafactor,
    AdamW,
    Averaged,
    BadSteps,
    Classifier,
    Dense,
    GatedFeedForward,
    Groups,
    Lion,
    Muon,
    OutputLayer,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    freeze,
    language_model_loss,
    masked_language_model_loss,
    schedules,
    sequence_to_sequence_loss,
    warmup_cosine,
    warmup_stable_decay,
)

GOLDEN = Path(__file__).parent / "golden"
SUMS = GOLDEN / "SHA256SUMS"

VOCAB, SOURCE_VOCAB = 13, 11
SIZES = {"d_model": 6, "num_heads": 3, "head_dim": 4, "d_ff": 10, "max_seq_length": 9}
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 12]])
REAL = np.array([[True] * 5, [False, False, True, True, True]])
SOURCE = np.array([[2, 7, 1, 8, 2, 8, 10], [3, 0, 4, 5, 9, 0, 1]])
LABELS = 5


def sums() -> dict[str, str]:
    """What every file has to be, by its path below `golden/`."""
    lines = SUMS.read_text().splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(path: Path, directory: Path) -> Path:
    """A file as it was saved; under version control it is compressed."""
    target = directory / path.name.removesuffix(".gz")
    target.write_bytes(gzip.decompress(path.read_bytes()))
    return target


class Shifted(eqx.Module):
    """A user's own norm, which files name and `load` is handed."""

    shift: jax.Array
    scale: float = eqx.field(static=True)

    def __call__(self, x):
        return (x - x.mean(-1, keepdims=True)) * self.scale + self.shift


def doubled_tanh(x):
    """A user's own activation."""
    return 2 * jnp.tanh(x)


KNOWN = [Shifted, doubled_tanh]


# What a loaded thing gives.


def vectors(*shape: int) -> jax.Array:
    """The same numbers on every machine and in every version."""
    return jnp.asarray(np.cos(np.arange(np.prod(shape)) * 0.7).reshape(shape), jnp.float32)


def outputs(name: str, x: Any) -> dict[str, np.ndarray]:
    """What a golden object gives, in float32."""
    make: Callable[[Any], Mapping[str, Any]] = OUTPUTS.get(name, of_model)
    run = make if name in NOT_COMPILED else eqx.filter_jit(make)
    return {key: np.asarray(value, np.float32) for key, value in run(x).items()}


def of_model(model: Any) -> dict[str, Any]:
    if isinstance(model, Transformer):
        source = jnp.asarray(SOURCE) % model.src_vocab_size
        return {"log_probs": model(source, jnp.asarray(TOKENS))}
    if isinstance(model, TransformerLM):
        log_probs = model(jnp.asarray(TOKENS))
        padded = model(jnp.asarray(TOKENS), padding_mask=jnp.asarray(REAL))
        return {"log_probs": log_probs, "padded": jnp.where(REAL[..., None], padded, 0)}
    found = {"hidden": model(jnp.asarray(TOKENS))}
    if model.output is not None:
        found["logits"] = model.logits(jnp.asarray(TOKENS))
    if model.pooler is not None:
        found["pooled"] = model.pooled(jnp.asarray(TOKENS))
    if model.classifier is not None:
        found["classes"] = model.classify(jnp.asarray(TOKENS))
    return found


def of_ensemble(models: TransformerLM) -> dict[str, Any]:
    return {"log_probs": eqx.filter_vmap(lambda model: model(jnp.asarray(TOKENS)))(models)}


def of_activations(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part(vectors(2, 3, 6)) for name, part in parts.items()}


def of_norms(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: part(vectors(2, 3, 5, 4) if "head" in name else vectors(2, 5, 6))
        for name, part in parts.items()
    }


def of_positions(parts: dict[str, Any]) -> dict[str, Any]:
    positions = jnp.asarray([[0, 1, 2, 7, 8], [-1, -1, 0, 1, 2]])
    return {
        name: part.rotate(vectors(2, 3, 5, 8), positions)
        if hasattr(part, "rotate")
        else part.bias(positions, positions, 3, True)
        if hasattr(part, "bias")
        else part.embed(positions)
        for name, part in parts.items()
    }


def of_parts(parts: dict[str, Any]) -> dict[str, Any]:
    x, memory = vectors(2, 5, 6), vectors(2, 7, 6)
    arguments = {
        "attention": (x, memory),
        "encoder layer": (x,),
        "decoder layer": (x, memory),
        "encoder": (x,),
        "decoder": (x, memory),
        "token embedding": (jnp.asarray(TOKENS),),
        "embedding": (jnp.asarray(TOKENS),),
        "output": (x,),
        "tied output": (x, vectors(VOCAB, 6)),
        "classifier": (x[:, 0],),
        "feed forward": (x,),
        "gated": (x,),
        "mixture": (x,),
        "dense": (x,),
        "own norm": (x,),
        "own activation": (x,),
        "multilayer perceptron": (x[0, 0],),
    }
    found = {name: part(*arguments[name]) for name, part in parts.items() if name in arguments}
    residual = parts["residual"]
    return found | {"residual": residual.write(x, 0.5 * residual.read(x), None)}


def of_kernels(kernels: dict[str, Any]) -> dict[str, Any]:
    q, k, v = vectors(2, 6, 5, 4), vectors(2, 3, 7, 4), 1 - vectors(2, 3, 7, 4)
    mask = jnp.arange(7) <= jnp.arange(5)[:, None] + 1
    return {name: kernel(q, k, v, mask) for name, kernel in kernels.items()}


def of_numbers(x: dict[str, Any]) -> dict[str, Any]:
    return {"drawn": jax.random.normal(x["key"], (3,)), "keys": jax.random.key_data(x["keys"])}


def of_schedules(schedules: dict[str, Any]) -> dict[str, Any]:
    steps = jnp.arange(12)
    return {name: schedule(steps) for name, schedule in schedules.items()}


def of_functions(functions: dict[str, Any]) -> dict[str, Any]:
    """Initializers draw, losses are computed; the others are run as parts of an optimizer."""
    key, logits = jax.random.key(3), vectors(2, 5, VOCAB)
    return {
        "xavier uniform": functions["xavier uniform"](key, (3, 2), 3, 2),
        "cross entropy": functions["cross entropy"](logits, jnp.asarray(TOKENS)),
        "global norm": functions["global norm"]([logits]),
        "match adamw": functions["match adamw"](400, 100),
        "match width": functions["match width"](100, 400),
        "positional encoding": functions["positional encoding"](5, 6),
    }


def of_optimizers(optimizers: dict[str, Any]) -> dict[str, Any]:
    """The weights after two updates by each, and the averages that it keeps."""
    found = {}
    for name, optimizer in optimizers.items():
        model = {"w": vectors(6, 4), "more": {"b": vectors(5), "u": 1 - vectors(3, 7)}}
        state = optimizer.init(model)
        for _ in range(2):
            grads = jax.tree.map(lambda x: jnp.sin(3 * x), model)
            model, state = optimizer.update(grads, state, model)
        averaged = optimizer.averaged(model, state)
        leaves = jax.tree.leaves((model, averaged))
        found[name] = jnp.concatenate([x.ravel() for x in leaves])
    return found


def of_training(training: Any) -> dict[str, Any]:
    return of_model(training.model)


def of_mask(saved: dict[str, Any]) -> dict[str, Any]:
    x = vectors(2, 5, 6)
    return {"attended": saved["attention"](x, mask=saved["mask"])}


OUTPUTS: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    "ensemble": of_ensemble,
    "activations": of_activations,
    "norms": of_norms,
    "positions": of_positions,
    "parts": of_parts,
    "kernels": of_kernels,
    "numbers": of_numbers,
    "schedules": of_schedules,
    "functions": of_functions,
    "optimizers": of_optimizers,
    "training": of_training,
    "mask": of_mask,
}
NOT_COMPILED = ("numbers", "functions", "schedules")


# Trainings, of which a checkpoint after 3 steps is kept and what 2 more steps make of it. Of a bias
# of keys the gradient is 0 but for rounding, which AdamW and Lion make much of: there are none.

SAVED, END = 3, 5
PIECES = {**SIZES, "use_qkv_bias": False, "dropout_rate": 0.0}


def decoder(**options: Any) -> TransformerLM:
    sizes: dict[str, Any] = {**PIECES, **options}
    return TransformerLM(VOCAB, **{"num_layers": 1, **sizes}, key=jax.random.key(1))


def llama(**options: Any) -> TransformerLM:
    pieces: dict[str, Any] = dict(norm=RMSNorm, feed_forward=GatedFeedForward, use_bias=False)
    return decoder(num_kv_heads=1, position=RotaryPositionalEncoding(), **pieces, **options)


def scanned() -> Any:
    return jaxformers.rematerialize(jaxformers.scan_layers(decoder(num_layers=2)))


def seq2seq() -> Transformer:
    options: Any = {**PIECES, "tie_embeddings": True, "norm_first": False}
    return Transformer(
        SOURCE_VOCAB,
        VOCAB,
        num_encoder_layers=1,
        num_decoder_layers=1,
        **options,
        key=jax.random.key(1),
    )


def encoder() -> TransformerEncoder:
    transform = partial(OutputLayer, transform=partial(Dense, activation=jax.nn.gelu))
    options: Any = {**PIECES, "learnable_pos": True, "tie_embeddings": True}
    return TransformerEncoder(
        VOCAB,
        num_layers=1,
        output=transform,
        classifier=partial(Classifier, num_labels=LABELS),
        **options,
        key=jax.random.key(1),
    )


def batches() -> list[dict[str, np.ndarray]]:
    """One for each step."""
    tokens = [(np.arange(24).reshape(3, 8) * (i + 2) + i) % VOCAB for i in range(END)]
    return [{"tokens": x[:, :-1], "targets": x[:, 1:]} for x in tokens]


def pairs() -> list[dict[str, np.ndarray]]:
    return [
        {
            "src": x["tokens"][:, ::-1] % SOURCE_VOCAB,
            "tgt": x["tokens"][:, :6],
            "targets": x["targets"][:, :6],
        }
        for x in batches()
    ]


def masked() -> list[dict[str, np.ndarray]]:
    return [
        {
            "tokens": np.where(x["tokens"] % 3 == 1, 0, x["tokens"]),
            "targets": x["tokens"],
            "loss_mask": x["tokens"] % 3 == 1,
        }
        for x in batches()
    ]


def is_norm(path: str, array: Any) -> bool:
    return path.endswith("gain")


def is_embedding(path: str, array: Any) -> bool:
    return "embedding" in path


def is_first_layer(path: str, array: Any) -> bool:
    return "layers.0" in path


def optax(name: str) -> Any:
    import optax

    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 6)
    if name == "chain":
        return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=0.1))
    if name == "inject":
        return optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2, momentum=0.9)
    return optax.MultiSteps(optax.lion(1e-3), every_k_schedule=2).gradient_transformation()


def of_training_with(model: Callable, optimizer: Callable, **options: Any) -> dict[str, Any]:
    rest = {"loss": language_model_loss, "batches": batches}
    return {"model": model, "optimizer": optimizer, **rest, **options}


TRAININGS = {
    "adamw": of_training_with(
        partial(decoder, dropout_rate=0.1),
        lambda: AdamW(warmup_cosine(1e-2, 2, 6), max_grad_norm=0.5),
    ),
    "lion": of_training_with(llama, lambda: Lion(1e-3, max_grad_norm=1.0)),
    "adafactor": of_training_with(decoder, Adafactor),
    "muon": of_training_with(llama, lambda: Muon(warmup_stable_decay(1e-2, 1, 2, 3))),
    "muon-lion": of_training_with(
        partial(llama, tie_embeddings=True),
        lambda: Muon(1e-2, rest=Lion(1e-3), max_grad_norm=0.7, nesterov=False),
    ),
    "groups": of_training_with(
        partial(decoder, num_layers=2),
        lambda: Groups(
            [(is_norm, AdamW(1e-3)), (is_embedding, Adafactor(1e-3)), (is_first_layer, None)],
            rest=Lion(1e-3),
            max_grad_norm=1.0,
        ),
    ),
    "freeze": of_training_with(llama, lambda: freeze(AdamW(1e-2), is_embedding)),
    "averaged": of_training_with(decoder, lambda: Averaged(AdamW(1e-2), 0.9)),
    "averaged-frozen": of_training_with(
        partial(llama, num_layers=2),
        lambda: Averaged(freeze(Muon(1e-2), is_first_layer), schedules.constant(0.7)),
    ),
    "groups-averaged": of_training_with(
        decoder, lambda: Groups([(is_norm, Averaged(AdamW(1e-2)))], rest=AdamW(1e-3))
    ),
    "optax": of_training_with(decoder, lambda: optax("chain")),
    "optax-inject": of_training_with(llama, lambda: optax("inject")),
    "optax-multisteps": of_training_with(llama, lambda: freeze(optax("multi"), is_norm)),
    "optax-averaged": of_training_with(llama, lambda: Averaged(optax("chain"), 0.5)),
    "bad-steps": of_training_with(
        decoder, lambda: AdamW(1e-2), bad_steps=BadSteps(allowed=4, spike=3.0), spoilt=(1,)
    ),
    "accumulated-bfloat16": of_training_with(
        llama, lambda: AdamW(1e-2), compute_dtype=jnp.bfloat16, accumulate=3
    ),
    "scanned": of_training_with(scanned, lambda: Muon(1e-2)),
    "seq2seq": of_training_with(
        seq2seq, lambda: AdamW(1e-2), loss=sequence_to_sequence_loss, batches=pairs
    ),
    "encoder": of_training_with(
        encoder, lambda: AdamW(1e-2), loss=masked_language_model_loss, batches=masked
    ),
}


def poisoned(loss: Callable, spoilt: tuple[int, ...]) -> Callable:
    """A loss that is no number for the batches that begin with a token of -1 instead."""
    if not spoilt:
        return loss

    def poison(model, batch, key):
        bad = jnp.asarray(batch["spoilt"]).any()
        rest = {name: x for name, x in batch.items() if name != "spoilt"}
        return loss(model, rest, key) * jnp.where(bad, jnp.nan, 1.0)

    return poison


def train(name: str, steps: int, checkpoint: Any, log: Any = None) -> Any:
    """Train, or go on, until there are so many steps."""
    case = dict(TRAININGS[name])
    spoilt = case.pop("spoilt", ())
    made = case.pop("batches")()
    if spoilt:
        made = [x | {"spoilt": np.full(3, i in spoilt)} for i, x in enumerate(made)]
    return jaxformers.fit(
        case.pop("model")(),
        case.pop("optimizer")(),
        made,
        loss=poisoned(case.pop("loss"), spoilt),
        steps=steps,
        key=jax.random.key(2),
        checkpoint=checkpoint,
        log=log,
        progress=False,
        **case,
    )


def result(name: str, training: Any) -> dict[str, np.ndarray]:
    """The weights of a training and, if it keeps them, their averages, one after another."""
    optimizer = jaxformers.as_optimizer(TRAININGS[name]["optimizer"]())
    averaged = optimizer.averaged(training.model, training.optimizer_state)
    counts = [training.step, training.skipped, training.guard.seen]
    found = {"weights": flat(training.model), "counts": np.asarray(counts, np.float32)}
    return found if averaged is training.model else found | {"averaged": flat(averaged)}


def losses(directory: Path) -> np.ndarray:
    """The losses of the last steps, as the log has them."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    found = {x["step"]: x["loss"] for x in map(json.loads, lines) if "loss" in x}
    return np.asarray([found[step] for step in range(SAVED + 1, END + 1)], np.float32)


def plain_state() -> dict[str, Any]:
    """A state of a user's own training loop."""
    return {
        "w": jnp.arange(6.0).reshape(2, 3),
        "half": jnp.arange(4, dtype=jnp.bfloat16),
        "key": jax.random.key(5, impl="rbg"),
        "host": [np.arange(3), np.float32(0.1), True, 2**70, 0.25],
        "weak": jnp.asarray(2.0),
        "optimizer": AdamW(1e-2).init({"w": jnp.ones(3)}),
    }


def flat(model: Any) -> np.ndarray:
    """All numbers of a model one after another, whatever their names."""
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in arrays])
