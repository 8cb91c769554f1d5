"""Models spread over meshes of devices: the checks on 8 devices run in processes of their own."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from programs import trace

from jaxformers import (
    AdamW,
    TransformerLM,
    dot_product_attention,
    fit,
    language_model_loss,
    scan_layers,
    sharding,
)
from jaxformers.inspect import patch as replace_values
from jaxformers.layers import Function
from jaxformers.sharding import RULES, layout, make_mesh, shard, shard_batch, zigzag
from jaxformers.training import notices
from jaxformers.training.notices import warn_of_separate_layers
from jaxformers.training.objectives import count_targets
from jaxformers.training.row_order import ordered

HERE = Path(__file__).parent
# Those of one row are run by one process, one after another.
GRADIENTS = [  # `mesh_matrix.py` has them on all meshes
    ("gradients_default", "gradients_llama", "gradients_translation", "gradients_masked"),
    ("gradients_rematerialized", "gradients_packed", "gradients_adapters", "gradients_experts"),
]
GROUPS = [
    *GRADIENTS,
    ("traffic", "memory", "gather", "rules", "experts", "ring", "zigzag", "steps", "optimizers"),
    ("fit", "checkpoints", "pretrained", "generation", "decoding_memory", "plan"),
]


@pytest.fixture(scope="module")
def results():
    """A function that gives the result of a check, whose group runs when the first is asked for."""
    found = {}

    def result(name):
        if name not in found:
            (group,) = (group for group in GROUPS if name in group)
            command = [sys.executable, "-W", "error", str(HERE / "sharded_checks.py"), *group]
            paths = os.pathsep.join([str(HERE.parent), str(HERE)])
            run = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                cwd=HERE.parent,
            )
            lines = (line for line in run.stdout.splitlines() if line.startswith("["))
            found.update(dict.fromkeys(group, run.stderr), **dict(map(json.loads, lines)))
        return found[name]

    return result


CHECKS = [
    pytest.param(name, marks=pytest.mark.thorough if group in GRADIENTS else ())
    for group in GROUPS
    for name in group
]


@pytest.mark.parametrize("name", CHECKS)
def test_eight_devices(results, name):
    assert results(name) == "ok", results(name)


@pytest.fixture
def model():
    return TransformerLM(18, 8, 4, 2, 12, 16, 0.0, num_kv_heads=2, key=jax.random.key(0))


@pytest.fixture
def mesh():
    return make_mesh(fsdp=2)


def test_a_mesh_has_all_devices():
    assert dict(make_mesh(data=2).shape) == {"data": 2, "fsdp": 1, "tensor": 1, "sequence": 1}
    with pytest.raises(ValueError, match=r"number of devices, 2, got data 1 x .* = 1. Pass data=2"):
        make_mesh()
    with pytest.raises(ValueError, match=r"tensor 3 .* = 3. Choose sizes whose product divides 2"):
        make_mesh(tensor=3)
    with pytest.raises(ValueError, match="fsdp must be an integer of at least 1, got 0"):
        make_mesh(fsdp=0)


def test_layouts_follow_the_names_of_axes(model):
    def specs(mesh, **rules):
        found = layout(model, mesh, RULES | rules)
        attention = found.decoder.layers[0].self_attention
        arrays = found.embedding.token_embedding.weight, attention.wo, attention.bq
        return [tuple(x.spec) for x in arrays]

    assert specs(make_mesh(fsdp=2)) == [(None, "fsdp"), (None, None, "fsdp"), ()]
    assert specs(make_mesh(tensor=2)) == [("tensor",), ("tensor",), ("tensor",)]
    assert specs(make_mesh(tensor=2), v=None)[0] == ()
    assert specs(make_mesh(data=2)) == [(), (), ()]


def test_a_size_that_does_not_divide(model):
    odd = eqx.tree_at(lambda x: x.output.b, model, jnp.ones(17))
    with pytest.raises(ValueError, match=r"output.b has 17 along its axis 'v', .* over tensor=2"):
        layout(odd, make_mesh(tensor=2))
    with pytest.raises(ValueError, match=r"Use make_mesh\(data=2\), or .*=RULES \| {'v': None}"):
        shard(odd, make_mesh(tensor=2))
    whole = shard(odd, make_mesh(tensor=2), RULES | {"v": None})
    assert whole.output.b.sharding.is_fully_replicated


def test_rows_that_do_not_divide(mesh):
    with pytest.raises(ValueError, match=r"tokens \(3, 5\) has 3 rows, .* fsdp=2. Pass a multiple"):
        shard_batch({"tokens": np.ones((3, 5))}, mesh)
    batch = {"tokens": np.ones((4, 5)), "weight": 0.5, "name": "a", "none": None}
    placed = shard_batch(batch, mesh)
    assert tuple(placed["tokens"].sharding.spec) == ("fsdp",)
    assert placed["weight"].sharding.is_fully_replicated
    assert (placed["name"], placed["none"]) == ("a", None)


def test_zigzag_order():
    mesh = make_mesh(sequence=2)
    real = np.array([[False, True, True, True], [True, True, True, False]])
    batch = {"tokens": np.arange(8).reshape(2, 4), "padding_mask": real, "rows": np.ones(2)}
    found = zigzag(batch, mesh)
    assert set(found) == {"tokens", "rows", "positions", "segment_ids"}
    np.testing.assert_array_equal(found["tokens"], [[0, 3, 1, 2], [4, 7, 5, 6]])
    np.testing.assert_array_equal(found["positions"], [[-1, 2, 0, 1], [0, -1, 1, 2]])
    assert not found["segment_ids"].any() and found["rows"] is batch["rows"]
    assert zigzag(batch, make_mesh(data=2)) == batch
    with pytest.raises(
        ValueError, match=r"sequence=2 needs .* a multiple of 4, got \(2, 6\). Pass"
    ):
        zigzag({"tokens": np.ones((2, 6))}, mesh)
    with pytest.raises(ValueError, match="both positions and segment_ids, got segment_ids alone"):
        zigzag({"tokens": np.ones((2, 4)), "segment_ids": np.ones((2, 4))}, mesh)


def roll(x):
    return jnp.roll(x, 1, axis=-2)


class Neighbors(eqx.Module):
    """A part of the user's own, which looks at the order in a row."""

    def __call__(self, x):
        return roll(x)


def test_fit_orders_what_knows_its_positions_alone(model):
    """Anything that may look at neighbors keeps its order."""
    mesh, batch = make_mesh(sequence=2), {"tokens": np.ones((2, 4)), "targets": np.ones((2, 4))}
    sizes, options = (18, 8, 4, 2, 12, 16), dict(num_kv_heads=2, key=jax.random.key(0))

    def is_ordered(
        batch=batch, loss=language_model_loss, model=model, mesh=mesh, count=count_targets
    ):
        found = ordered(batch, loss, count, model, mesh)
        assert "positions" in found or found is batch
        return "positions" in found

    assert is_ordered() and is_ordered(loss=partial(language_model_loss, z_loss=1e-4))
    assert not is_ordered(loss=lambda model, batch, key: jnp.zeros(()))
    assert not is_ordered(count=lambda batch: 8)
    assert not is_ordered(mesh=make_mesh(data=2))
    assert not is_ordered(batch=shard_batch(batch, mesh))
    assert not is_ordered(batch={name: x[:, :3] for name, x in batch.items()})
    assert not is_ordered(model=TransformerLM(*sizes, 0.1, **options))
    own = eqx.tree_at(lambda x: x.decoder.layers[0].feed_forward.activation, model, Function(roll))
    assert not is_ordered(model=own)
    kernel = dict(attention_fn=dot_product_attention)
    assert not is_ordered(model=TransformerLM(*sizes, 0.0, **kernel, **options))
    assert not is_ordered(model=eqx.tree_at(lambda x: x.decoder.norm, model, Neighbors()))
    assert not is_ordered(model=replace_values(model, {"embedding.embedded": roll}))


def test_what_is_no_mesh(model, no_shape_checker):
    with pytest.raises(ValueError, match=r"mesh must be a mesh .* got 'fsdp'"):
        shard(model, "fsdp")


def test_a_mesh_with_other_names(model):
    """It needs rules; without them all its devices would do the same."""
    other = jax.make_mesh((2,), ("mine",), (jax.sharding.AxisType.Auto,))
    for spread in (shard, layout):
        with pytest.raises(ValueError, match=r"2 devices along its axis 'mine', .* Use make_mesh"):
            spread(model, other)
    with pytest.raises(ValueError, match=r"such as rules=RULES \| {'b': 'mine'}"):
        shard_batch({"tokens": np.ones((4, 6))}, other)
    rules = RULES | {"d": "mine", "b": "mine"}
    wq = layout(model, other, rules).decoder.layers[0].self_attention.wq
    assert tuple(wq.spec) == ("mine",)
    assert tuple(shard_batch(np.ones((4, 6)), other, rules).sharding.spec) == ("mine",)


def test_explicit_meshes(model):
    """One that is passed works; under one that is set the error says what to do."""
    explicit = jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Explicit,))
    spread = shard(model, explicit)
    kinds = spread.output.w.sharding.mesh.axis_types
    assert kinds == (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"Explicit .* Leave jax.set_mesh"):
        shard(model, explicit)


def test_a_copy_shares_no_memory(model, mesh):
    def pointers(tree):
        return {
            part.data.unsafe_buffer_pointer()
            for x in jax.tree.leaves(tree)
            if eqx.is_array(x)
            for part in x.addressable_shards
        }

    spread = shard(model, mesh)
    assert not pointers(model) & pointers(spread)
    assert not pointers(spread) & pointers(shard(spread, mesh))


def test_an_array_that_is_there_twice_stays_one(mesh):
    x = jnp.ones((4, 6))
    first, second = shard([x, x], mesh)
    assert first is second


def test_one_device_gets_the_program_without_constraints(model):
    """There is nothing of meshes in it: no constraint, no copy, nothing that is gathered again."""
    batch = {name: np.ones((2, 5), np.int32) for name in ("tokens", "targets")}
    for one in (model, scan_layers(model)):
        steps = trace(eqx.filter_value_and_grad(language_model_loss), one, batch)
        names = {step.primitive.name for step in steps}
        assert "dot_general" in names
        assert not {x for x in names if "sharding" in x or "checkpoint" in x or "remat" in x}


def test_without_a_mesh_of_ours_nothing_is_constrained(model):
    """Arrays on a mesh with other names are left to XLA."""
    other = jax.make_mesh((2,), ("mine",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(other, jax.P("mine"))
    batch = {name: jnp.ones((2, 5), jnp.int32) for name in ("tokens", "targets")}
    steps = trace(language_model_loss, model, jax.device_put(batch, rows))
    assert "sharding_constraint" not in {step.primitive.name for step in steps}


def test_fit_takes_a_mesh(mesh):
    model = TransformerLM(18, 8, 4, 2, 12, 16, 0.0, use_bias=False, key=jax.random.key(0))
    rows = np.random.default_rng(0).integers(0, 18, (2, 6))
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    options = dict(loss=language_model_loss, steps=2, key=jax.random.key(1), progress=False)
    training = fit(model, AdamW(1e-2), [batch], mesh=mesh, eval_batches=[batch], **options)
    assert tuple(training.model.output.w.sharding.spec) == ("fsdp",)
    assert len(training.step.devices()) == 2
    alone = fit(model, AdamW(1e-2), [batch], **options)
    pairs = zip(jax.tree.leaves(training.model), jax.tree.leaves(alone.model), strict=True)
    for x, y in pairs:
        if eqx.is_array(x):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_large_models_with_separate_layers_are_warned_of(model, mesh):
    with patch.object(notices, "LARGE", 1000):
        with pytest.warns(UserWarning, match=r"not scanned, .* of each device .* scan_layers"):
            warn_of_separate_layers(model, mesh)
        for fine in (scan_layers(model), model.output):
            warn_of_separate_layers(fine, mesh)
        warn_of_separate_layers(model, make_mesh(data=2))
    warn_of_separate_layers(model, mesh)


def test_the_counter_of_bytes_counts():
    """A loop of three turns, with a gather in each."""
    mesh = make_mesh(fsdp=2)
    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("fsdp"), jax.P()))

    def body(x, _):
        y = jax.lax.with_sharding_constraint(jnp.sin(x), whole)
        return jax.lax.with_sharding_constraint(jnp.cos(y[::-1]), rows), None

    program = jax.jit(lambda x: jax.lax.scan(body, x, None, length=3)[0], out_shardings=rows)
    x = jax.device_put(jnp.ones((4, 6)), rows)
    found = collectives(program.lower(x).compile().as_text())
    assert ("all-gather", 96, (4, 6), 3) in found


def test_everything_is_exported():
    names = "RULES collect host_rows join_batch join_hosts layout make_mesh shard shard_batch"
    assert sharding.__all__ == [*names.split(), "zigzag"]
