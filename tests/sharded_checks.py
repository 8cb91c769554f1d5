"""Checks on 8 virtual devices, run as a program of their own by `test_sharding.py`.

`python sharded_checks.py NAME ...` runs these checks and prints a line for each: its name and "ok",
or the error.
"""

import json
import os
import sys
import tempfile
import traceback
from functools import partial
from unittest.mock import patch

from quick import xla_flags

os.environ["XLA_FLAGS"] = xla_flags()

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from collectives import collectives, moved

from jaxformers import (
    Adafactor,
    AdamW,
    Averaged,
    Checkpoints,
    FeedForward,
    GatedFeedForward,
    Groups,
    Lion,
    LowRank,
    MixtureOfExperts,
    Muon,
    OutputLayer,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    chunks,
    fit,
    freeze,
    from_pretrained,
    language_model_loss,
    load,
    lora,
    masked_language_model_loss,
    quantize,
    rematerialize,
    save,
    scan_layers,
    sequence_to_sequence_loss,
    train_step,
)
from jaxformers.checkpoint import model_file
from jaxformers.kernels.flash import _visible
from jaxformers.kernels.ring import blocks_of
from jaxformers.masks import AttentionMask
from jaxformers.optim.optimizer import as_optimizer
from jaxformers.sharding import RULES, layout, make_mesh, shard, shard_batch, zigzag
from jaxformers.sharding.mesh import mesh_in
from jaxformers.sharding.plan import Plan
from jaxformers.sharding.spread import places_of, replicate
from jaxformers.sharding.workload import Workload
from jaxformers.training.gradients import Gradients
from jaxformers.training.objectives import count_targets
from jaxformers.training.step import _train_step

jax.config.update("jax_num_cpu_devices", 64 if "plan_64" in sys.argv else 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

KEY = jax.random.key(7)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
# Those that divide positions, beside rows or beside all else.
SEQUENCES = {"positions": (2, 1, 1, 4), "everything": (1, 2, 2, 2)}
V, D, H, F, B, T = 72, 32, 8, 48, 16, 12
LLAMA = dict(
    norm=RMSNorm,
    feed_forward=GatedFeedForward,
    position=RotaryPositionalEncoding(),
    use_bias=False,
    tie_embeddings=True,
    embedding_scale=1.0,
)


def mesh_of(name):
    return make_mesh(*(MESHES | SEQUENCES)[name])


def decoder(layers=2, d_ff=F, dropout=0.0, width=D, **options):
    sizes = V, width, H, layers, d_ff, 64, dropout
    return TransformerLM(*sizes, **options, key=jax.random.key(3))


def rows(seed=0, b=B, t=T):
    return np.random.default_rng(seed).integers(1, V, (b, t)).astype(np.int32)


def text(b=B, t=T):
    found = rows(b=b, t=t + 1)
    return {"tokens": found[:, :-1], "targets": found[:, 1:]}


def case(name):
    """A model, its loss and a batch."""
    # A ReLU has another gradient where another order of sums carries its input across zero.
    smooth = dict(feed_forward=partial(FeedForward, activation=jax.nn.gelu))
    if name == "default":
        return decoder(**smooth), language_model_loss, text()
    if name == "llama":
        return scan_layers(decoder(**LLAMA)), language_model_loss, text()
    if name == "rematerialized":
        model = rematerialize(scan_layers(decoder(**smooth)), keep=("queries",))
        return model, language_model_loss, text()
    if name == "packed":
        places = np.tile(np.r_[0:5, 0:7], (B, 1)), np.tile(np.r_[[1] * 5, [2] * 7], (B, 1))
        positions, segments = (x.astype(np.int32) for x in places)
        batch = text() | {"positions": positions, "segment_ids": segments}
        return decoder(1, **LLAMA), language_model_loss, batch
    if name == "adapters":
        model = lora(quantize(decoder(**LLAMA), 8), 4, key=KEY)

        # The second factors are zero at first, and so would be the gradients of the first.
        def adapted(x):
            if not isinstance(x, LowRank):
                return x
            b = 0.1 * jnp.cos(jnp.arange(x.b.size, dtype=jnp.float32))
            return eqx.tree_at(lambda x: x.b, x, b.reshape(x.b.shape))

        model = jax.tree.map(adapted, model, is_leaf=lambda x: isinstance(x, LowRank))
        return model, language_model_loss, text()
    if name == "quantized":
        return quantize(decoder(**smooth), 4), language_model_loss, text()
    if name == "experts":
        experts = partial(MixtureOfExperts, num_experts=4, top_k=2)
        return decoder(1, feed_forward=experts, use_bias=False), language_model_loss, text()
    if name == "translation":
        tables = dict(tie_embeddings=True, share_embeddings=True)
        model = Transformer(V, V, D, H, 1, 2, F, 64, 0.0, **tables, **smooth, key=KEY)
        batch = {"src": rows(1, t=20), "tgt": text()["tokens"], "targets": text()["targets"]}
        return scan_layers(model), sequence_to_sequence_loss, batch
    model = TransformerEncoder(V, D, H, 2, F, 64, 0.0, output=OutputLayer, **smooth, key=KEY)
    loss_mask = np.random.default_rng(4).random((B, T)) < 0.3
    return model, masked_language_model_loss, text() | {"loss_mask": loss_mask}


@eqx.filter_jit
def value_and_gradients(gradients, optimizer, model, batch, places):
    return gradients(optimizer, model, batch, KEY, places)


def gradients_of(model, loss, batch, **options):
    gradients = Gradients(loss, None, options.get("accumulate", 1), count_targets)
    optimizer = as_optimizer(AdamW(1e-3))
    return value_and_gradients(gradients, optimizer, model, batch, places_of(mesh_in(model), model))


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]


def distance(a, b):
    return max(abs(x - y).max() for x, y in zip(arrays(a), arrays(b), strict=True))


def check_gradients(name, meshes=tuple(MESHES), **options):
    compare(*case(name), meshes, **options)


def compare(model, loss, batch, meshes, rules=RULES, order=lambda batch, mesh: batch):
    """Compares the loss and its gradients with those of one device."""
    value, expected = gradients_of(model, loss, batch)
    assert max(abs(x).max() for x in arrays(expected)) > 1e-3
    for mesh in meshes:
        spread = shard(model, mesh_of(mesh), rules)
        placed = shard_batch(order(batch, mesh_of(mesh)), mesh_of(mesh), rules)
        got, found = gradients_of(spread, loss, placed)
        assert abs(got - value) < 1e-5, (mesh, got, value)
        assert distance(found, expected) < 1e-5, (mesh, distance(found, expected))
        same = jax.tree.map(
            lambda g, w: g is None or g.sharding == w.sharding,
            found,
            spread,
            is_leaf=lambda x: x is None,
        )
        assert all(jax.tree.leaves(same)), mesh


def check_rules():
    """Values are the same under rules that are unlike those of the constraints in a program."""
    kind = case("llama")
    compare(*kind, ("all",), RULES | {"b": "data", "d": "tensor", "n": None, "f": "fsdp"})
    compare(*kind, ("positions",), RULES | {"t": None, "v": "sequence", "d": "data"})


def step_program(model, mesh, batch, loss=language_model_loss):
    """The compiled step of a training, and the bytes of the parameters."""
    optimizer = as_optimizer(AdamW(1e-2))
    model = shard(model, mesh)
    state = optimizer.init(model)
    gradients = Gradients(loss, None, 1, count_targets)
    places = places_of(mesh, model), places_of(mesh, (model, state))
    kept = gradients, optimizer, shard_batch(batch, mesh), replicate(KEY, mesh), None, places
    size = sum(x.nbytes for x in arrays(model))
    return _train_step.lower(kept, model, state).compile().compiled, size


def arguments(model, mesh, batch):
    """The bytes of a step's arguments on one device: weights, two moments, the batch."""
    shards = jax.tree.map(
        lambda x, where: np.prod(where.shard_shape(x.shape)) * 4,
        eqx.filter(model, eqx.is_inexact_array),
        layout(eqx.filter(model, eqx.is_inexact_array), mesh),
    )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return 3 * sum(jax.tree.leaves(shards)) + sum(x.nbytes for x in batch.values()) // parts


def check_traffic():
    """A step moves what it must, with parameters much larger than activations."""
    batch = text(8, 4)
    model = decoder(2, 256, **LLAMA, width=64)
    for mesh in MESHES:
        program, size = step_program(model, mesh_of(mesh), batch)
        traffic, memory = moved(program.as_text()), program.memory_analysis()
        expected = arguments(model, mesh_of(mesh), batch)
        assert abs(memory.argument_size_in_bytes - expected) < 0.001 * expected + 64, mesh
        gathered, reduced = traffic["all-gather"] / size, traffic["all-reduce"] / size
        limits = {"data": (0, 1.1), "fsdp": (1.02, 1.1), "tensor": (0.02, 0.4), "all": (0.52, 0.7)}
        assert gathered <= limits[mesh][0] and reduced <= limits[mesh][1], (mesh, traffic, size)
        assert traffic["all-to-all"] == 0


def check_gather():
    """Where a weight is not gathered, in a layer or outside of all, more is sent."""
    model, batch = decoder(1, 96, **LLAMA, width=64), text(8, 4)

    def sent():
        program, _ = step_program(model, mesh_of("all"), batch, partial(language_model_loss))
        return sum(moved(program.as_text()).values())

    least = sent()
    for module in ("layer_stack", "training.gradients"):
        with patch(f"jaxformers.{module}.gather", lambda tree, **_: tree):
            more = sent()
        assert more > 1.05 * least, (module, more, least)


def check_memory():
    """Divided over fsdp, scanned layers are whole one at a time, in both directions."""
    batch, mesh = text(8, 4), mesh_of("fsdp")
    scanned = scan_layers(decoder(8, 256, **LLAMA, width=64))
    layer = sum(x.nbytes for x in arrays(scanned.decoder.layers)) / 8
    for model in (scanned, rematerialize(scanned)):
        program, size = step_program(model, mesh, batch)
        assert program.memory_analysis().temp_size_in_bytes < 0.6 * size
        found = collectives(program.as_text())
        assert sum(n * times for kind, n, _, times in found if kind == "all-gather") < 2.02 * size
        inside = [n for kind, n, _, times in found if kind == "all-gather" and times == 8]
        assert 0.9 * 2 * layer < sum(inside) < 2.02 * layer
        # No activations of the whole batch are anywhere.
        assert not any(dims[:2] == (8, 4) and n > 200 for _, n, dims, _ in found)


def check_experts():
    """Each device sorts its own tokens alone: the work is divided, and no token is sent."""
    experts = partial(MixtureOfExperts, num_experts=4, top_k=2)
    model, batch = decoder(1, feed_forward=experts, use_bias=False), text(32, 64)
    one, size = step_program(model, make_mesh(devices=jax.devices()[:1]), batch)
    for mesh in ("data", "fsdp"):
        program, _ = step_program(model, mesh_of(mesh), batch)
        traffic, memory = moved(program.as_text()), program.memory_analysis()
        gathered = 1.02 * size if mesh == "fsdp" else 0
        assert traffic["all-gather"] <= gathered, (mesh, traffic, size)
        assert traffic["all-reduce"] <= 1.02 * size, (mesh, traffic, size)
        allowed = one.memory_analysis().temp_size_in_bytes / 5
        assert memory.temp_size_in_bytes < allowed, (mesh, memory.temp_size_in_bytes, allowed)


def check_ring():
    """No device has the activations of all positions: weights alone are gathered."""
    model, batch = decoder(**LLAMA), text(16, 64)
    size = sum(x.nbytes for x in arrays(model))
    adapted = lora(quantize(model, 8), 4, key=KEY)
    limits = {"positions": 0.01, "everything": 0.6}
    ways = [("positions", model, 1024), ("everything", model, 1024)]
    ways += [("positions", adapted, 1024), ("positions", model, 8)]
    for mesh, model, chunk in ways:  # rows of a chunk on each device
        loss = partial(language_model_loss)  # another one, which is traced anew
        with patch.multiple(chunks, CHUNK_ROWS=chunk, CHUNK_LOGITS={"cpu": chunk * V}):
            program, _ = step_program(model, mesh_of(mesh), batch, loss)
        traffic = moved(program.as_text())
        assert traffic["all-gather"] < limits[mesh] * size, (mesh, chunk, traffic, size)
        assert traffic["all-to-all"] == 0
        assert traffic["collective-permute"] > 0


def blocks_seen(positions, devices, limit):
    """How many blocks of scores each device of a ring computes."""
    parts = jnp.asarray(positions).reshape(devices, -1)
    length = parts.shape[1]
    sizes = blocks_of(length, length, (limit, limit))

    @jax.jit
    def seen(q, k):
        mask = AttentionMask(True, q_positions=q, k_positions=k)
        first, last = _visible(mask, length, length, sizes)
        return jnp.maximum(last - first, 0).sum()

    return [sum(int(seen(q, k)) for k in parts) for q in parts]


def check_zigzag():
    """Zigzag order divides the work evenly and changes no value."""
    mesh = mesh_of("positions")
    batch = {"tokens": np.zeros((1, 64), np.int32)}
    orders = np.arange(64), zigzag(batch, mesh)["positions"]
    assert [blocks_seen(x, 4, limit=4) for x in orders] == [[10, 26, 42, 58], [34] * 4]
    # No block is as long as what a device has, which would be of both of its chunks.
    assert [blocks_seen(x, 4, limit=16) for x in orders] == [[3, 7, 11, 15], [9] * 4]
    batch = text(t=16)
    lengths = np.arange(B) % 9 + 8
    padded = batch | {"padding_mask": np.arange(16) < lengths[:, None]}
    documents = np.tile(np.r_[0:9, 0:7], (B, 1)), np.tile(np.r_[[1] * 9, [2] * 7], (B, 1))
    positions, segments = (x.astype(np.int32) for x in documents)
    packed = batch | {"positions": positions, "segment_ids": segments}
    # The loss is computed in chunks, whose rows are of all devices.
    with patch.multiple(chunks, CHUNK_ROWS=8, CHUNK_LOGITS={"cpu": 8 * V}):
        for one, mesh in ((padded, "positions"), (packed, "everything")):
            model = decoder(1, **LLAMA)
            assert np.array_equal(count_targets(one), count_targets(zigzag(one, mesh_of(mesh))))
            compare(model, language_model_loss, one, (mesh,), order=zigzag)


def planned(model, batch, sizes, allowed):
    """Compares a step's arguments and what it moves, as compiled, with the plan; prints both."""
    again = model.decoder.rematerialization is not None
    plan = Plan(Workload(model, *batch["tokens"].shape, "float32"), sizes, again)
    # The loss of the other model is computed in chunks.
    most = 2 * V if again else 2**28
    limits = dict(CHUNK_ROWS=2, CHUNK_LOGITS={"cpu": most}, CHUNK_LOGITS_ELSEWHERE=most)
    with patch.multiple(chunks, **limits):
        program, _ = step_program(model, make_mesh(**sizes), batch)
        expected = plan.traffic() | {"arguments": plan.memory.arguments}
        assert plan.chunks > 1 or not again
    found = dict(moved(program.as_text()))
    found["arguments"] = program.memory_analysis().argument_size_in_bytes
    shown = {kind: (x, round(expected.get(kind, 0))) for kind, x in sorted(found.items())}
    temporaries = program.memory_analysis().temp_size_in_bytes, round(plan.memory.temporaries)
    print(sizes, "layers twice" if again else "layers once", shown, temporaries, file=sys.stderr)
    for kind in found.keys() | expected.keys():
        right = expected.get(kind, 0)
        assert abs(found.get(kind, 0) - right) < allowed * right + 64, (sizes, kind, shown)


def check_plan(meshes, both):
    """What a plan says without devices is in the programs that XLA compiles for them."""
    options = dict(num_kv_heads=4, norm=RMSNorm, feed_forward=GatedFeedForward, use_bias=False)
    options |= dict(position=RotaryPositionalEncoding(), layers=3, d_ff=64, width=64)
    tied = scan_layers(decoder(**options, tie_embeddings=True, embedding_scale=1.0))
    again = rematerialize(scan_layers(decoder(**options)))
    for i, shape in enumerate(meshes):
        sizes = dict(zip(("data", "fsdp", "tensor", "sequence"), shape, strict=True))
        batch = text(64, 16)
        if sizes["sequence"] > 1:
            places = np.tile(np.arange(16, dtype=np.int32), (64, 1))
            batch |= {"positions": places, "segment_ids": np.zeros_like(places)}
        for model in (tied, again) if both else (tied, again)[i : i + 1]:
            planned(model, batch, sizes, 0.001)


def check_plan_of_other_models():
    """Experts, biases, and layers that are not scanned."""
    experts = dict(feed_forward=partial(MixtureOfExperts, num_experts=4, top_k=2), use_bias=False)
    scanned, separate = scan_layers(decoder(2, **experts)), rematerialize(decoder(3, **LLAMA))
    for model in (scanned, rematerialize(scanned), separate, decoder(2)):
        planned(model, text(64, 16), {"data": 2, "fsdp": 4}, 0.001)
    for model in (separate, scan_layers(decoder(2))):
        planned(model, text(64, 16), {"fsdp": 4, "tensor": 2}, 0.001)


def check_steps():
    """Layouts stay as they are, and the second step is the program of the first."""
    model, loss, batch = case("llama")
    for mesh in ("fsdp", "all"):
        spread, placed = shard(model, mesh_of(mesh)), shard_batch(batch, mesh_of(mesh))
        optimizer = AdamW(1e-2)
        state, programs = optimizer.init(spread), []
        before = [x.sharding for x in jax.tree.leaves((spread, state)) if eqx.is_array(x)]
        for _ in range(3):
            spread, state, _ = train_step(
                spread, state, placed, optimizer=optimizer, loss=loss, key=KEY
            )
            programs.append(_train_step._cached._cache_size())
            after = [x.sharding for x in jax.tree.leaves((spread, state)) if eqx.is_array(x)]
            assert before == after
        assert len(set(programs)) == 1, programs
    assert distance(model, case("llama")[0]) == 0  # the step has overwritten the copy alone


def optimizers():
    def is_norm(path, array):
        return "norm" in path

    yield AdamW(1e-2)
    yield Lion(1e-3)
    yield Adafactor()
    yield Muon(1e-2)
    yield Averaged(AdamW(1e-2), 0.9)
    yield Groups([(is_norm, AdamW(1e-3))], Lion(1e-3))
    yield freeze(AdamW(1e-2), lambda path, array: "embedding" in path)


def check_optimizers():
    """Every moment lies like its weight, and the steps are those of one device."""
    model, loss, batch = decoder(1, **LLAMA), language_model_loss, text()
    mesh = mesh_of("all")
    for optimizer in optimizers():
        one, many = model, shard(model, mesh)
        places = {x.shape: x.sharding for x in jax.tree.leaves(many) if eqx.is_array(x)}
        states = [optimizer.init(x) for x in (one, many)]
        if not isinstance(optimizer, Adafactor):
            for x in jax.tree.leaves(states[1]):
                assert x.ndim == 0 or x.sharding == places[x.shape], type(optimizer).__name__
        for x in jax.tree.leaves(states[1]):
            assert len(x.devices()) == 8
        for _ in range(2):
            copy = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, (one, states[0]))
            options = dict(optimizer=optimizer, loss=loss, key=KEY)
            one, states[0], first = train_step(*copy, batch, **options)
            many, states[1], second = train_step(
                many, states[1], shard_batch(batch, mesh), **options
            )
            assert abs(first - second) < 2e-5, type(optimizer).__name__


def check_fit():
    """A run of 20 steps is that of one device, but for the order of sums."""
    model, loss, _ = case("llama")
    batches = [text() | {"tokens": rows(i), "targets": rows(i + 50)} for i in range(3)]
    options = dict(loss=loss, steps=20, key=KEY, progress=False)
    one = fit(model, AdamW(1e-3), batches, **options).model
    other = fit(model, AdamW(1e-3), batches, accumulate=2, **options).model  # another order
    allowed = 4 * distance(one, other)
    for name in ("all", "fsdp"):
        accumulate = 2 if name == "fsdp" else 1
        got = fit(
            model, AdamW(1e-3), batches, mesh=mesh_of(name), accumulate=accumulate, **options
        ).model
        assert distance(got, one) < allowed, (name, distance(got, one), allowed)


def check_checkpoints():
    """What was saved on one mesh goes on, and is loaded, on another."""
    model, loss, batch = case("llama")
    options = dict(loss=loss, key=KEY, progress=False)
    whole = fit(model, AdamW(1e-2), [batch], steps=4, mesh=mesh_of("fsdp"), **options)
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory, every=2)
        for steps, mesh in ((2, "fsdp"), (4, "all")):
            options |= dict(checkpoint=checkpoints, steps=steps, mesh=mesh_of(mesh))
            training = fit(model, AdamW(1e-2), [batch], **options)
        assert distance(training.model, whole.model) < 1e-5
        found = load(directory, sharding=mesh_of("tensor"))
        assert distance(found, training.model) == 0
        assert_laid_out(found, "tensor")
        save(f"{directory}/model.safetensors", training.model)
        # What is divided is read in parts, by each device its own.
        with patch.object(model_file, "read_tensor", wraps=model_file.read_tensor) as read:
            found = load(f"{directory}/model.safetensors", sharding=mesh_of("all"))
        whole = [x for x in jax.tree.leaves(found) if x.sharding.is_fully_replicated]
        assert sorted(x.args[0].shape for x in read.call_args_list) == sorted(
            x.shape for x in whole
        )
        assert distance(found, training.model) == 0
        assert_laid_out(found, "all")


def assert_laid_out(model, mesh):
    places = layout(model, mesh_of(mesh))
    same = jax.tree.map(lambda where, x: x.sharding == where, places, model)
    assert all(jax.tree.leaves(same))


def check_pretrained():
    """Each device's parts alone are read from the file."""
    from jaxformers.hf import arrays as reader

    sizes, check = [], reader.check_finite
    reader.check_finite = lambda name, x: sizes.append(x.size) or check(name, x)
    for options in (LLAMA, dict(learnable_pos=True, tie_embeddings=True, embedding_scale=1.0)):
        model = decoder(**options)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            for mesh in MESHES:
                sizes.clear()
                found = from_pretrained(directory, sharding=mesh_of(mesh))
                assert distance(found, model) == 0
                assert_laid_out(found, mesh)
                parts = {id(x): x.size for x in jax.tree.leaves(model) if eqx.is_array(x)}
                assert sum(sizes) == sum(parts.values())  # each number once
                here = [x for x in jax.tree.leaves(found) if eqx.is_array(x)]
                assert max(sizes) == max(x.addressable_data(0).size for x in here)
            try:
                from_pretrained(directory, sharding=make_mesh(fsdp=3, devices=jax.devices()[:3]))
            except ValueError as error:
                assert "cannot be divided over fsdp=3" in str(error)
            else:
                raise AssertionError("no error")


def check_generation():
    """All ways of decoding give the tokens of one device."""
    model, prompt = decoder(1, **LLAMA), rows(9, 4, 5)
    draft = decoder(1)
    ways = [
        dict(),
        dict(key=KEY, temperature=0.8),
        dict(num_beams=3),
        dict(draft_model=draft, draft_length=3),
    ]
    expected = [np.asarray(model.generate(prompt, 6, **way)) for way in ways]
    for mesh in ("fsdp", "tensor", "all"):
        spread = shard(model, mesh_of(mesh))
        for way, tokens in zip(ways, expected, strict=True):
            if "draft_model" in way:
                way = way | {"draft_model": shard(draft, mesh_of(mesh))}
            assert np.array_equal(spread.generate(prompt, 6, **way), tokens), (mesh, way)
    placed = shard_batch(prompt, make_mesh(2, 2, 2))
    assert np.array_equal(spread.generate(placed, 6), expected[0])
    source, target = case("translation")[0], rows(2, 4, 6)
    tokens = source.generate(target, 5, start_token=1, num_beams=2)
    spread = shard(source, mesh_of("all"))
    assert np.array_equal(spread.generate(target, 5, start_token=1, num_beams=2), tokens)


def check_decoding_memory():
    """Decoding gathers no weights: its temporaries are small beside the parameters."""
    model = shard(decoder(8, 256, **LLAMA, width=64), mesh_of("fsdp"))
    prompt = jnp.asarray(rows(9, 2, 4))
    program = eqx.filter_jit(lambda model, prompt: model.generate(prompt, 8))
    compiled = program.lower(model, prompt).compile().compiled
    assert compiled.memory_analysis().temp_size_in_bytes < sum(x.nbytes for x in arrays(model))


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in dict(globals()).items()
    if name.startswith("check_") and name not in ("check_gradients", "check_plan")
}
for name in ("default", "llama", "translation", "masked", "experts"):
    CHECKS[f"gradients_{name}"] = partial(check_gradients, name, (*MESHES, "everything"))
CHECKS["gradients_rematerialized"] = partial(check_gradients, "rematerialized", ("fsdp", "all"))
CHECKS["gradients_adapters"] = partial(check_gradients, "adapters", ("fsdp", "all", "everything"))
CHECKS["gradients_packed"] = partial(check_gradients, "packed", ("all", *SEQUENCES))
# `.ci/slow plan` runs the last two, in which each mesh has both models.
PLANNED = {
    "plan": ((2, 2, 2, 1), (1, 2, 1, 4)),
    "plan_8": ((1, 8, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2), (1, 2, 1, 4), (8, 1, 1, 1), (1, 1, 4, 2)),
    "plan_64": ((4, 4, 4, 1), (1, 16, 4, 1), (8, 8, 1, 1), (2, 4, 2, 4), (1, 64, 1, 1)),
}
for name, meshes in PLANNED.items():
    CHECKS[name] = partial(check_plan, meshes, both=name != "plan")


def run(checks, names):
    """Runs checks, prints their results, and returns whether one failed."""
    failed = False
    for name in names:
        try:
            checks[name]()
            print(json.dumps([name, "ok"]), flush=True)
        except Exception:
            failed = True
            print(json.dumps([name, traceback.format_exc()]), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(run(CHECKS, sys.argv[1:]))
