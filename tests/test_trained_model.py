"""From the checkpoints of a training to its model, without building it by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
from jaxformers import (
    AdamW,
    Averaged,
    Checkpoints,
    FeedForward,
    LayerNorm,
    TransformerLM,
    digest,
    fit,
    from_pretrained,
    language_model_loss,
    load,
    save,
)
from jaxformers.checkpoint import migration, names

pytest.importorskip("safetensors")


def lm(key=None, **options):
    key = jax.random.key(4) if key is None else key
    sizes: Any = {"num_heads": 3, "head_dim": 4, "d_ff": 10, "max_seq_length": 9}
    return TransformerLM(13, 6, num_layers=2, dropout_rate=0.0, **sizes, **options, key=key)


@pytest.fixture(params=["Checkpoints", "OrbaxCheckpoints"])
def checkpoints(request, tmp_path):
    """Both kinds, whose directories are loaded alike."""
    if request.param == "OrbaxCheckpoints":
        pytest.importorskip("orbax.checkpoint")
    made = getattr(jaxformers, request.param)(tmp_path / "run", every=2)
    yield made
    made.wait()


def same(loaded, model):
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        assert type(x) is type(y) and getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert hasattr(x, "dtype") or x == y
    assert digest(loaded) == digest(model)


def moved(tree, by):
    """All arrays elsewhere."""
    return jax.tree.map(lambda x: x + by if eqx.is_inexact_array(x) else x, tree)


def test_the_model_of_fit(checkpoints):
    optimizer = Averaged(AdamW(1e-2), 0.5)
    batch = {"tokens": np.arange(8).reshape(2, 4), "targets": np.arange(1, 9).reshape(2, 4)}
    training = fit(
        lm(tie_embeddings=True, learnable_pos=True),
        optimizer,
        [batch],
        loss=language_model_loss,
        steps=3,
        key=jax.random.key(1),
        checkpoint=checkpoints,
        progress=False,
    )
    before = sorted(Path(checkpoints.directory).rglob("*"))
    averaged = optimizer.averaged(training.model, training.optimizer_state)
    same(load(checkpoints.directory), averaged)
    same(load(str(checkpoints.directory), averaged=False), training.model)
    assert digest(averaged) != digest(training.model)
    assert sorted(Path(checkpoints.directory).rglob("*")) == before
    prompt = jnp.asarray([[1, 2]])
    assert (load(checkpoints.directory).generate(prompt, 3) == averaged.generate(prompt, 3)).all()


class Own(NamedTuple):
    model: Any
    rest: Any


@pytest.mark.parametrize(
    "pack",
    [
        lambda model, state: {"state": state, "model": model, "step": 3},
        lambda model, state: (state, model),
        lambda model, state: [AdamW(1e-3), model, state],
        lambda model, state: Own(model, state),
        lambda model, state: model,
    ],
    ids=["dict", "tuple", "list", "named tuple", "model"],
)
def test_the_model_in_a_state_of_ones_own(pack, checkpoints):
    model = lm()
    checkpoints.save(pack(model, AdamW(1e-3).init(model)), 1)
    checkpoints.wait()
    same(load(checkpoints.directory), model)


class Odd(eqx.Module):
    """A module with a leaf of each kind."""

    shared: list
    key: jax.Array
    numpy: np.ndarray
    scalar: Any
    numbers: tuple
    empty: jax.Array
    half: jax.Array
    norm: Any


def odd():
    w = jnp.arange(6.0).reshape(2, 3)
    key = jax.random.split(jax.random.key(3, impl="rbg"), 2)
    half = jnp.arange(5, dtype=jnp.bfloat16)
    numbers = (True, 2**70, 0.25, None, jnp.float32(3))
    rest = jnp.zeros((0, 2)), half, LayerNorm(4)
    return Odd([w, {"again": w}], key, np.arange(3.0), np.float32(0.1), numbers, *rest)


def test_leaves_of_each_kind_and_classes_of_ones_own(checkpoints):
    model = odd()
    checkpoints.save({"model": model, "more": {"w": jnp.ones(3)}}, 5)
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"test_trained_model:Odd.*known=\[...\]"):
        load(checkpoints.directory)
    loaded = load(checkpoints.directory, known=[Odd])
    same(loaded, model)
    assert loaded.shared[0] is loaded.shared[1]["again"]
    restored, step = checkpoints.restore({"model": odd(), "more": {"w": jnp.zeros(3)}})
    assert step == 5  # which needs no class to be known
    same(restored["model"], model)


def test_arrays_go_where_they_are_told(checkpoints):
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P()))
    model, state = lm(), moved(lm(), 1)
    checkpoints.save({"model": model, "state": state}, 1)
    checkpoints.wait()
    seen = {}

    def spread(path, shape):
        seen[path] = shape.shape
        return rows if shape.shape[0] % 2 == 0 and "wq" in path else everywhere

    loaded = load(checkpoints.directory, sharding=spread)
    same(loaded, model)
    assert seen["decoder.layers.1.self_attention.wq"] == (6, 3, 4)
    assert len(seen) == len(jax.tree.leaves(model))
    assert loaded.decoder.layers[1].self_attention.wq.sharding == rows
    assert loaded.output.w.sharding == everywhere
    same(load(checkpoints.directory, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[1])), model)  # fmt: skip # noqa: E501
    assert not load(checkpoints.directory).output.w.committed
    with pytest.raises(ValueError, match="cannot be laid out as sharding= says"):
        load(checkpoints.directory, sharding=rows)
    with pytest.raises(ValueError, match="sharding must be a"):
        load(checkpoints.directory, sharding=lambda path, shape: "x")


def test_an_average_has_the_types_of_the_weights(checkpoints):
    model = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": jnp.arange(4)}
    optimizer = Averaged(AdamW(1e-2), 0.5)
    state = moved(optimizer.init(model), 0.3)
    checkpoints.save({"model": model, "state": state}, 1)
    checkpoints.wait()
    loaded = load(checkpoints.directory)
    same(loaded, optimizer.averaged(model, state))
    assert loaded["w"].dtype == jnp.bfloat16 and (loaded["w"] != model["w"]).all()


def test_the_averages_of_another_model_are_not_taken(checkpoints):
    first, second = lm(), {"w": jnp.ones(3)}
    optimizer = Averaged(AdamW(1e-2), 0.5)
    states = [moved(optimizer.init(model), 1) for model in (second, first)]
    checkpoints.save({"model": first, "beside": second, "states": states[:1]}, 1)
    checkpoints.wait()
    same(load(checkpoints.directory), first)
    checkpoints.save({"model": first, "beside": second, "states": states}, 2)
    checkpoints.wait()
    same(load(checkpoints.directory), moved(first, 1))


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"w": jnp.ones(3)}, "nothing in it is called model"),
        ((jnp.ones(3), {"model": 1}), "nothing in it is called model"),
        ({"model": FeedForward(3, 5, lambda x: x, key=jax.random.key(1))}, "<lambda>.*top level"),
        ({"model": [object()], "w": jnp.ones(3)}, "builtins.object, which cannot be saved"),
    ],
    ids=["a tree", "a tuple", "a lambda", "an object"],
)
def test_a_model_that_cannot_be_described_is_saved_all_the_same(training, says, checkpoints):
    checkpoints.save(training, 1)
    checkpoints.wait()
    with pytest.raises(ValueError, match=f"does not say how its model is built: .*{says}") as error:
        load(checkpoints.directory)
    assert "restore(like)" in str(error.value)
    assert checkpoints.restore(training)[1] == 1


def damage(path):
    """Break all files of a checkpoint."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and "commit" not in file.name:
            file.write_bytes(file.read_bytes()[:-9])


def test_of_a_damaged_one_the_one_before_is_taken(checkpoints):
    for step in (3, 4):
        checkpoints.save(moved(lm(), step), step)
    checkpoints.wait()
    directory = Path(checkpoints.directory)
    paths = sorted(path for path in directory.iterdir() if path.name[-1:] in "34s")
    first, second = (path for path in paths if path.name != "lock")
    damage(second)
    with pytest.warns(UserWarning, match="a checkpoint is skipped: .*4"):
        same(load(directory), moved(lm(), 3))
    damage(first)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="steps 3, 4, and"):
        load(directory)


def test_the_training_may_go_on_meanwhile(tmp_path, monkeypatch):
    """Another process has the directory, and the file that was found has gone."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(lm(), 1)
    checkpoints.wait()
    program = "import sys, jaxformers; print(jaxformers.digest(jaxformers.load(sys.argv[1])))"
    root = Path(jaxformers.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, cwd=root
    )
    assert run.stdout.strip() == digest(lm()), run.stderr

    module = sys.modules["jaxformers.checkpoint.load"]  # the package's `load` is the function
    read = module.read_description

    def slow(path):
        if "000001" in path.name:
            checkpoints.save(moved(lm(), 1), 2)
            checkpoints.wait()
        return read(path)

    monkeypatch.setattr(module, "read_description", slow)
    same(load(tmp_path), moved(lm(), 1))


def test_directories_that_are_something_else(tmp_path):
    Checkpoints(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(ValueError, match=f"{name} is a directory without checkpoints.*fit has"):
            load(tmp_path / name)
    save(tmp_path / "files" / "model.safetensors", LayerNorm(3))
    with pytest.raises(ValueError, match="Pass the file .*files/model.safetensors'"):
        load(tmp_path / "files")
    with pytest.raises(ValueError, match="nowhere is missing or no regular file"):
        load(tmp_path / "nowhere")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf is a checkpoint in the format.*from_pretrained\('"):
        load(tmp_path / "hf")


def test_the_other_way_round(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(lm(), 1)
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"states of a training.*jaxformers.load\('"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a state of a training. load\('"):
        load(tmp_path / "step-000000001.safetensors")


def test_averaged_is_for_trainings(tmp_path, no_shape_checker):
    save(tmp_path / "model.safetensors", LayerNorm(3))
    with pytest.raises(ValueError, match="averaged=False is for the directory of a training"):
        load(tmp_path / "model.safetensors", averaged=False)
    with pytest.raises(ValueError, match="averaged must be True or False, got 'no'"):
        load(tmp_path, averaged="no")


def test_a_forged_description_finds_no_other_arrays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    text = {"average": None, "model": {"dict": [["w", {"array": "elsewhere", "as": "jax"}]]}}
    monkeypatch.setattr(
        "jaxformers.checkpoint.directory.describe_model", lambda training: json.dumps(text)
    )
    for step, path in enumerate(("elsewhere", "number", "")):
        text["model"]["dict"][0][1]["array"] = path
        checkpoints.save({"w": jnp.ones(3), "number": 3}, step)
        checkpoints.wait()
        with pytest.raises(ValueError, match=f"the array '{path}' of its model is missing"):
            load(tmp_path)
    text["model"] = {"name": "os:system"}
    checkpoints.save({"w": jnp.ones(3)}, 9)
    checkpoints.wait()
    with pytest.raises(ValueError, match="'os:system', which is not looked for"):
        load(tmp_path)


class Old(eqx.Module):
    attention: Any


class New(eqx.Module):
    self_attention: Any
    more: int = 3


def test_what_was_renamed_since_is_brought_up(checkpoints, monkeypatch):
    monkeypatch.setitem(names.OURS, "Layer", Old)
    model = Old(jnp.arange(3.0))
    checkpoints.save({"model": model, "state": Averaged(AdamW(1e-2)).init(model)}, 1)
    checkpoints.wait()
    monkeypatch.setitem(names.OURS, "Layer", New)
    monkeypatch.setitem(migration.RENAMED, "Layer", {"attention": "self_attention"})
    same(load(checkpoints.directory), New(model.attention))
