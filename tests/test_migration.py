"""Files name objects by names that never change; what earlier versions wrote is brought up."""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, KNOWN, outputs, train, unpack

import jaxformers
from jaxformers import Checkpoints, LayerNorm, RMSNorm, load, save
from jaxformers.checkpoint import migration, names
from jaxformers.checkpoint.construction import Decoder
from jaxformers.checkpoint.names import is_record
from jaxformers.layers import as_module, split_key
from jaxformers.residual import NoNorm, Residual

pytest.importorskip("safetensors")

# For ever: a name may be added, and none may be taken out or changed.
PUBLIC_NAMES = """
Adafactor AdamW Addition ALiBi AllHeadsNorm AttentionMask Averaged AveragedState BadSteps Blocks
Cache Choice Classifier Decoder DecoderLayer Dense Dora DynamicScaling Encoder EncoderLayer
FeedForward Function GatedFeedForward Gradients Groups Guard HostKey KV LayerCache LayerNorm Layout
LeafwiseOptimizer LearnablePositionalEncoding LinearScaling Lion Llama3Scaling LongScaling LowRank
MixtureOfExperts MultiHeadAttention Muon NoNorm OneNorm Optax Optimizer Origin OrthogonalMomentum
OutputLayer OutputNorm PerHeadNorm PostNorm PreNorm ProportionalScaling Quantized Rematerialization
Replaced Report Residual RMSNorm RotaryPositionalEncoding Sandwich ScannedLayers Schedule
SinusoidalPositionalEncoding SpecialTokens State T5PositionBias TokenEmbedding Training Transformer
TransformerEmbedding TransformerEncoder TransformerLM TwoNorms YarnScaling

alibi_slopes as_optimizer attention_scores attention_weights blockwise_attention choose_attention
chunked_cross_entropy clip_by_global_norm cross_entropy default_decay_mask default_layout
depth_scaled dot_product_attention fast_attention flash_attention freeze gelu gelu_tanh global_norm
inverse_square_root is_hidden_matrix match match_adamw match_width mix normal orthogonalize
positional_encoding quick_gelu relative_step relu relu_squared scaled_dot_product_attention silu
sinusoid t5_buckets tanh warmup_cosine warmup_linear warmup_stable_decay xavier_uniform

schedules.constant schedules.cosine schedules.join schedules.linear

formulas.cosine_ramp formulas.inverse_root formulas.joined formulas.ramp formulas.relative_step
""".split()


def test_every_public_name_is_there_and_names_one_object():
    missing = set(PUBLIC_NAMES) - names.OURS.keys()
    assert not missing, f"files have the names {missing}, and a name never changes"
    new = names.OURS.keys() - set(PUBLIC_NAMES)
    assert not new, f"{new} are new names, and from now on never change: list them here"
    assert len({id(x) for x in names.OURS.values()}) == len(names.OURS)
    assert not any(":" in name for name in names.OURS)


def modules():
    """All modules that hold parts of models, optimizers and trainings."""
    outside = ("cli", "data", "files", "generation", "hf", "text", "tokenizers", "__main__")
    for found in pkgutil.walk_packages(jaxformers.__path__, "jaxformers."):
        if found.name.split(".")[1] not in outside:
            yield importlib.import_module(found.name)


def test_every_object_that_can_be_saved_has_a_public_name():
    """Records, wherever they are defined, and the functions that users find in the package."""
    known = {id(x) for x in names.OURS.values()}
    unnamed = {
        f"{module.__name__}.{name}"
        for module in modules()
        for name, x in vars(module).items()
        if is_record(x) and x.__module__ == module.__name__
        if not name.startswith("_") and id(x) not in known
    }
    # What a run, its files and a call are made with is in none; the state of a training is.
    inside = (
        "axes",
        "checkpoint",
        "constraints",
        "finetuning",
        "inspect",
        "one_program",
        "quantization.rounding",
        "serving",
        "sharding",
        "sites",
        "text",
        "training",
    )
    inside += (
        "adapters.modules",
        "adapters.peft_config",
        "adapters.peft_load",
        "adapters.peft_save",
    )
    machinery = tuple(f"jaxformers.{x}." for x in inside)
    states = "jaxformers.training.step."
    unnamed = {x for x in unnamed if not x.startswith(machinery) or x.startswith(states)}
    assert not unnamed, f"give {unnamed} public names in {names.__file__}"
    exported = [jaxformers, jaxformers.activations, jaxformers.schedules, jaxformers.optim]
    kinds = ("activations", "initializers", "kernels", "losses", "optim", "schedules")
    functions = {
        f"{x.__module__}.{name}"
        for module in exported
        for name, x in vars(module).items()
        if inspect.isfunction(x) and not name.startswith("_")
        if x.__module__.split(".")[1:2] and x.__module__.split(".")[1] in kinds
        if id(x) not in known and not name.startswith("check_")
    }
    assert not functions, f"give {functions} public names in {names.__file__}"


def test_the_names_of_older_files_mean_one_object_each():
    """A name after the colon is that of another object nowhere in the package."""
    assert set(names.OLDER.values()) <= names.OURS.keys()
    for module in modules():
        for name, x in vars(module).items():
            current = names.public_name(f"{module.__name__}:{name}")
            # What writes and reads files has an Encoder and a Decoder of its own.
            if current in names.OURS and not module.__name__.startswith("jaxformers.checkpoint"):
                assert names.OURS[current] is x, f"{module.__name__}:{name}"


def described(path: Path) -> list[str]:
    """What a file names."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    def find(x):
        if isinstance(x, dict):
            for key in ("name", "class"):
                if isinstance(x.get(key), str):
                    yield x[key]
        for item in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            yield from find(item)

    return list(find(json.loads(header["__metadata__"]["construction"])))


@pytest.mark.parametrize("name", ["bert", "gemma", "hf-gpt2", "parts", "optimizers", "training"])
def test_what_is_written_has_public_names_only(name, tmp_path):
    loaded = load(unpack(GOLDEN / "objects" / f"{name}.safetensors.gz", tmp_path), known=KNOWN)
    save(tmp_path / "again", loaded)
    found = set(described(tmp_path / "again"))
    theirs = ("jax.", "equinox.nn:", "golden_cases:")
    assert {x for x in found if not x.startswith(theirs)} <= set(PUBLIC_NAMES)
    assert {"parts": "Decoder", "optimizers": "AdamW", "training": "Training"}.get(
        name, "Function"
    ) in found
    again = load(tmp_path / "again", known=KNOWN)
    assert jax.tree.structure(again) == jax.tree.structure(loaded)


# A change, as someone will make it.


class NewLayer(eqx.Module):
    """An encoder's layer after its field `attention` became `mixer`, and others moved."""

    mixer: Any
    mixer_residual: Residual
    feed_forward: Callable = eqx.field(converter=as_module)
    feed_forward_residual: Residual
    parallel: str | None = eqx.field(static=True)

    def __init__(self, old):
        self.mixer = old.self_attention
        self.mixer_residual = old.self_attention_residual
        self.feed_forward = old.feed_forward
        self.feed_forward_residual = old.feed_forward_residual
        self.parallel = old.parallel

    def __call__(self, x, mask=None, key=None):
        keys = split_key(key, 3)
        seen = self.mixer_residual.read(x)
        attended = self.mixer(seen, mask=mask, key=keys[0])
        x = self.mixer_residual.write(x, attended, keys[1])
        y = self.feed_forward(self.feed_forward_residual.read(x))
        return self.feed_forward_residual.write(x, y, keys[2])


LINES = {
    "attention": "mixer",
    "attention_residual": "mixer_residual",
    "self_attention": "mixer",
    "self_attention_residual": "mixer_residual",
}


@pytest.fixture
def renamed(monkeypatch):
    """The package after the change: another class under the name, and a line in one table."""
    monkeypatch.setitem(names.OURS, "EncoderLayer", NewLayer)
    monkeypatch.setitem(migration.RENAMED, "EncoderLayer", LINES)


@pytest.mark.parametrize("name", ["bert", "albert", "t5", "marian"])
def test_renamed_fields_of_a_moved_class(name, renamed, tmp_path):
    loaded = load(unpack(GOLDEN / "objects" / f"{name}.safetensors.gz", tmp_path))
    layers = loaded.encoder.layers
    assert isinstance(layers.stacked if name == "marian" else layers[0], NewLayer)
    with np.load(GOLDEN / "objects" / f"{name}.npz") as expected:
        for key, value in outputs(name, loaded).items():
            assert np.max(np.abs(value - expected[key])) <= 2e-5, key
    save(tmp_path / "new", loaded)  # and from there on under the new names
    assert "mixer" in str((tmp_path / "new").read_bytes()[:9999])
    assert eqx.tree_equal(load(tmp_path / "new"), loaded)


def changed(tree: Any) -> Any:
    """The same with the new layers, in a model and in what an optimizer keeps of it."""
    old = jaxformers.EncoderLayer
    return jax.tree.map(
        lambda x: NewLayer(x) if isinstance(x, old) else x,
        tree,
        is_leaf=lambda x: isinstance(x, old),
    )


def test_the_state_of_a_training_with_renamed_paths(request, tmp_path):
    (saved,) = (GOLDEN / "trainings" / "encoder").glob("step-*.gz")
    unpack(saved, tmp_path)
    checkpoints = Checkpoints(tmp_path)
    before = train("encoder", 1, None)
    old, _ = checkpoints.restore(before)
    request.getfixturevalue("renamed")
    restored, step = checkpoints.restore(changed(before))
    assert step == 3
    wq = restored.model.encoder.layers[0].mixer.wq
    assert (wq == old.model.encoder.layers[0].self_attention.wq).all()
    assert eqx.tree_equal(changed(old), restored)
    checkpoints.save(restored, 4)
    assert eqx.tree_equal(checkpoints.restore(changed(before))[0], restored)


def test_without_the_line_it_says_what_differs(monkeypatch, tmp_path):
    monkeypatch.setitem(names.OURS, "EncoderLayer", NewLayer)
    with pytest.raises(ValueError, match="missing there mixer, .*not known here 'self_att"):
        load(unpack(GOLDEN / "objects" / "bert.safetensors.gz", tmp_path))
    (saved,) = (GOLDEN / "trainings" / "encoder").glob("step-*.gz")
    unpack(saved, tmp_path)
    with pytest.raises(ValueError, match="mixer.wq: nothing there, float32"):
        Checkpoints(tmp_path).restore(changed(train("encoder", 1, None)))


# Fields that are new or gone, in each kind of record.


class Version1(eqx.Module):
    w: jax.Array
    scale: float = eqx.field(static=True)
    part: Any


class Version2(eqx.Module):
    w: jax.Array
    part: Any
    new: int = eqx.field(static=True, default=7)
    converted: Callable = eqx.field(default=jax.nn.relu, converter=as_module)
    listed: list = eqx.field(default_factory=lambda: [3])


class Pair1(NamedTuple):
    left: Any
    gone: Any = None


class Pair2(NamedTuple):
    left: Any
    right: int = 4


class Part(eqx.Module):
    gain: jax.Array
    width: int = eqx.field(static=True)


@pytest.fixture
def becomes(monkeypatch, tmp_path):
    """A function that writes an object as one version does, and loads it as the next."""

    def write_and_load(name, old, new, value, **tables):
        monkeypatch.setitem(names.OURS, name, old)
        save(tmp_path / "file", value)
        monkeypatch.setitem(names.OURS, name, new)
        for table, entry in tables.items():
            monkeypatch.setitem(getattr(migration, table.upper()), name, entry)
        return load(tmp_path / "file", known=[Part])

    return write_and_load


W = jnp.arange(6.0).reshape(2, 3)


def test_a_name_of_a_newer_version(monkeypatch, tmp_path):
    monkeypatch.setitem(names.OURS, "Fancy", Part)
    save(tmp_path / "new", Part(W, 3))
    monkeypatch.delitem(names.OURS, "Fancy")
    with pytest.raises(ValueError, match="'Fancy'.*no such name.*newer"):
        load(tmp_path / "new", known=[Part])


def test_a_new_field_has_its_declared_default(becomes):
    value = Version1(W, 2.0, (LayerNorm(5), None))
    loaded = becomes("Norm", Version1, Version2, value, removed={"scale": 2.0})
    assert (loaded.w == W).all() and isinstance(loaded.part[0], LayerNorm)
    assert (loaded.new, loaded.listed) == (7, [3])
    assert loaded.converted == as_module(jax.nn.relu)
    assert not hasattr(loaded, "scale")


def test_what_older_files_mean_comes_before_the_default(becomes):
    value = Version1(W, 2.0, None)
    tables = {"added": {"new": 1}, "removed": {"scale": 2.0}}
    assert becomes("Norm", Version1, Version2, value, **tables).new == 1


def test_a_new_field_without_a_default_is_missing(becomes):
    with pytest.raises(ValueError, match="is a Norm, which has other fields.*missing there width"):
        becomes("Norm", Version1, Part, Version1(W, 2.0, None), renamed={"w": "gain"})


@pytest.mark.parametrize(
    ("gone", "neutral"),
    [(0.5, 1.0), (None, 3), ("a", "b"), (W, 0.0), (np.ones(2), 0), (RMSNorm(3), None), ((1,), ())],
)
def test_a_field_that_is_gone_must_not_have_had_an_effect(gone, neutral, becomes):
    with pytest.raises(ValueError, match="the field gone of the Pair at 'a' is .*had no effect"):
        becomes("Pair", Pair1, Pair2, {"a": Pair1(3, gone)}, removed={"gone": neutral})


@pytest.mark.parametrize(
    ("gone", "neutral"),
    [(1, 1.0), (None, None), (W * 0, 0.0), (np.ones((2, 0)), 5), (jax.nn.relu, jax.nn.relu)],
)
def test_a_field_that_is_gone_and_had_no_effect(gone, neutral, becomes):
    found = becomes("Pair", Pair1, Pair2, [Pair1(3, gone)], removed={"gone": neutral})
    assert found == [Pair2(3, 4)]


def test_a_word_that_became_an_object(becomes, monkeypatch):
    def joined(fields):
        made = {"class": f"{__name__}:Part", "fields": {"gain": fields["w"], "width": 3}}
        return "Pair", {"left": made if fields["scale"] == 2.0 else None}

    monkeypatch.setitem(names.OURS, "Pair", Pair2)
    found = becomes("Norm", Version1, Version2, Version1(W, 2.0, None), converted=joined)
    assert eqx.tree_equal(found, Pair2(Part(W, 3), 4))


@pytest.mark.parametrize("changes", [{"placement": "middle"}, {"placement": ["pre"]}, {"new": 1}])
def test_a_record_that_cannot_be_converted_is_refused(changes):
    fields = {"norm": None, "output_norm": None, "dropout_rate": 0.1, "scale": 1.0}
    record = {"class": "Residual", "fields": fields | {"placement": "none"}}
    assert type(Decoder(lambda name, kind: None).decode(record)) is NoNorm
    record["fields"] |= changes
    with pytest.raises(ValueError, match="the whole: Residual is no class"):
        Decoder(lambda name, kind: None).decode(record)


def test_a_field_that_is_gone_without_a_line_is_not_known(becomes):
    with pytest.raises(ValueError, match="not known here 'gone'"):
        becomes("Pair", Pair1, Pair2, Pair1(3, None))


class Outer1(eqx.Module):
    part: Any
    gain: Any


class Outer2(eqx.Module):
    inner: Any


class Inner1(eqx.Module):
    b: Any


class Inner2(eqx.Module):
    b: Any
    gain: Any


def moved_versions(monkeypatch):
    """A field moves into a part, whose own name changes as well."""
    monkeypatch.setitem(names.OURS, "Outer", Outer2)
    monkeypatch.setitem(names.OURS, "Inner", Inner2)
    monkeypatch.setitem(migration.RENAMED, "Outer", {"part": "inner", "gain": "inner.gain"})


def test_a_field_moves_into_a_part_and_out_of_it(monkeypatch, tmp_path):
    monkeypatch.setitem(names.OURS, "Outer", Outer1)
    monkeypatch.setitem(names.OURS, "Inner", Inner1)
    save(tmp_path / "old", [Outer1(Inner1(W + 1), W)])
    moved_versions(monkeypatch)
    new = [Outer2(Inner2(W + 1, W))]
    assert eqx.tree_equal(load(tmp_path / "old"), new)
    save(tmp_path / "new", new)
    monkeypatch.setitem(names.OURS, "Outer", Outer1)
    monkeypatch.setitem(names.OURS, "Inner", Inner1)
    line = {"inner.gain": "gain", "inner": "part"}
    monkeypatch.setitem(migration.RENAMED, "Outer", line)
    assert eqx.tree_equal(load(tmp_path / "new"), [Outer1(Inner1(W + 1), W)])


@pytest.fixture(params=["Checkpoints", "OrbaxCheckpoints"])
def checkpoints(request, tmp_path):
    if request.param == "OrbaxCheckpoints":
        pytest.importorskip("orbax.checkpoint")
    made = getattr(jaxformers, request.param)(tmp_path / "run")
    yield made
    made.wait()


def test_paths_of_what_moved_is_new_or_is_gone(checkpoints, monkeypatch):
    state = {
        "model": [Outer1(Inner1(W + 1), W), 3],
        "moments": (Outer1(Inner1(None), W * 2),),
        "record": Version1(W, 2.0, jnp.arange(4)),
        "key": jax.random.key(3),
    }
    checkpoints.save(state, 2)
    moved_versions(monkeypatch)
    monkeypatch.setitem(names.OURS, "Norm", Part)
    monkeypatch.setitem(migration.RENAMED, "Norm", {"w": "gain"})
    like = {
        "model": [Outer2(Inner2(W * 0, W * 0)), 0],
        "moments": (Outer2(Inner2(None, jax.ShapeDtypeStruct((2, 3), jnp.float32))),),
        "record": Part(W * 0, 5),
        "key": jax.random.key(0),
    }
    with pytest.raises(ValueError, match=r"record.part: int32 \(4,\) there, nothing here"):
        checkpoints.restore(like)
    monkeypatch.setitem(migration.REMOVED, "Norm", {"part": 0})
    with pytest.raises(ValueError, match="record.part in .* is int32 .*had no effect"):
        checkpoints.restore(like)
    monkeypatch.setitem(migration.REMOVED, "Norm", {"part": jnp.arange(4)})
    restored, step = checkpoints.restore(like)
    assert step == 2 and restored["model"][1] == 3
    assert (restored["model"][0].inner.b == W + 1).all()
    assert (restored["model"][0].inner.gain == W).all()
    assert (restored["moments"][0].inner.gain == W * 2).all()
    assert (restored["record"].gain == W).all()
    assert (jax.random.key_data(restored["key"]) == jax.random.key_data(state["key"])).all()


def test_a_new_array_of_a_state_needs_a_line(checkpoints, monkeypatch):
    checkpoints.save({"state": Pair1(W)}, 1)
    monkeypatch.setitem(names.OURS, "Pair", Pair2)
    like = {"state": Pair2(W * 0, jnp.ones(5, jnp.int8))}
    with pytest.raises(ValueError, match="state.right: nothing there"):
        checkpoints.restore(like)
    monkeypatch.setitem(migration.ADDED, "Pair", {"right": 6})
    restored, _ = checkpoints.restore(like)
    assert (restored["state"].left == W).all()
    right = restored["state"].right
    assert right.dtype == jnp.int8 and right.tolist() == [6] * 5
    restored, _ = checkpoints.restore({"state": Pair2(W * 0, 0)})
    assert restored["state"].right == 6


def test_tables_contradict_neither_themselves_nor_the_classes():
    """A line for a class that is not there, or a name that is taken anew, would do nothing."""
    tables = migration.RENAMED, migration.CONVERTED, migration.ADDED, migration.REMOVED
    for table in tables:
        assert table.keys() <= names.OURS.keys()
    for name, line in migration.RENAMED.items():
        fields = names.field_names(names.OURS[name])
        assert {new.split(".")[0] for new in line.values()} <= set(fields), name
        assert not line.keys() & set(fields), f"{name}: a name that was given up is taken again"
    for name, line in migration.ADDED.items():
        assert line.keys() <= set(names.field_names(names.OURS[name])), name
    for name, line in migration.REMOVED.items():
        assert not line.keys() & set(names.field_names(names.OURS[name])), name
