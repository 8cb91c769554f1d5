"""Models in one file: each kind comes back as it was, and hostile files are refused."""

import dataclasses
import errno
import json
import os
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
from jaxformers import (
    ALiBi,
    Classifier,
    Dense,
    GatedFeedForward,
    LayerNorm,
    MixtureOfExperts,
    PerHeadNorm,
    RMSNorm,
    RotaryPositionalEncoding,
    T5PositionBias,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    YarnScaling,
    digest,
    load,
    save,
    warmup_cosine,
)
from jaxformers.files.safetensors_file import Unsaved, write_sealed_file

TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SIZES = {"d_model": 12, "num_heads": 6, "d_ff": 20, "max_seq_length": 17}


def gpt(key):
    return TransformerLM(
        31, **SIZES, num_layers=2, learnable_pos=True, tie_embeddings=True, key=key
    )


def llama(key):
    return TransformerLM(
        31,
        **SIZES,
        num_layers=2,
        position=RotaryPositionalEncoding(100.0, scaling=YarnScaling(4.0, 8)),
        norm=partial(RMSNorm, eps=1e-5),
        feed_forward=partial(GatedFeedForward, activation=jax.nn.gelu),
        qk_norm=partial(PerHeadNorm, LayerNorm),
        num_kv_heads=3,
        head_dim=4,
        softcap=30.0,
        per_layer=lambda i: {"window": 2} if i else {},
        attention_fn=jaxformers.flash_attention,
        key=key,
    )


def experts(key):
    feed_forward = partial(MixtureOfExperts, num_experts=3, top_k=2, activation=jnp.tanh)
    return TransformerLM(
        31, **SIZES, num_layers=1, feed_forward=feed_forward, position=ALiBi(), key=key
    )


def t5(key):
    return Transformer(
        31,
        31,
        **SIZES,
        num_encoder_layers=2,
        num_decoder_layers=1,
        position=lambda key: T5PositionBias(6, 8, 16, key=key),
        share_embeddings=True,
        tie_embeddings=True,
        key=key,
    )


def bert(key):
    return TransformerEncoder(
        31,
        **SIZES,
        num_layers=2,
        norm_first=False,
        pooler=partial(Dense, activation=jnp.tanh),
        classifier=partial(Classifier, num_labels=4, pooling="pooler"),
        key=key,
    )


def scanned(key):
    return jaxformers.rematerialize(jaxformers.scan_layers(gpt(key)), keep=("queries",))


def half(key):
    return jaxformers.cast_floating(t5(key), jnp.bfloat16)


MODELS = [gpt, llama, experts, t5, bert, scanned, half]


def same(loaded, saved):
    """In every array, every static field and every type."""
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert type(x) is type(y) and getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert hasattr(x, "dtype") or x == y
    assert digest(loaded) == digest(saved)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.few(4)
@pytest.mark.parametrize("make", MODELS)
def test_a_model_comes_back(make, path, getkey):
    model = make(getkey())
    save(path, model)
    loaded = load(path)
    same(loaded, model)
    inputs = (TOKENS, TOKENS[:, ::-1]) if isinstance(model, Transformer) else (TOKENS,)
    programs = []

    @eqx.filter_jit
    def call(model):
        programs.append(model)
        return model.classify(*inputs) if make is bert else model(*inputs)

    assert (call(loaded) == call(model)).all()
    assert len(programs) == 1  # a loaded model needs no program of its own
    if make is gpt:
        assert (loaded.generate(TOKENS, 4) == model.generate(TOKENS, 4)).all()


def test_a_checkpoint_of_hugging_face_comes_back_with_its_origin(path, tmp_path, getkey):
    options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
    TransformerLM(31, **SIZES, num_layers=2, **options, key=getkey()).save_pretrained(tmp_path)
    model = jaxformers.from_pretrained(tmp_path)
    save(path, model)
    loaded = load(path)
    same(loaded, model)
    assert loaded.origin == model.origin and loaded.origin.directory == model.origin.directory
    loaded.save_pretrained(tmp_path / "again")
    same(jaxformers.from_pretrained(tmp_path / "again"), model)


def test_a_changed_model_comes_back_changed(path, getkey):
    model = gpt(getkey())
    weights = np.asarray(model.decoder.layers[0].feed_forward.w_in)
    model = eqx.tree_at(lambda m: m.decoder.layers[0].feed_forward.w_in, model, weights)
    model = eqx.tree_at(lambda m: m.decoder.layers[1].feed_forward, model, RMSNorm(12))
    save(path, model)
    same(load(path), model)


class Mine(eqx.Module):
    """A user's own, with a piece of each kind in it."""

    layer: Any
    activation: Any
    odd: Any
    name: str = eqx.field(static=True, default="mine")


@dataclasses.dataclass
class Settings:
    rate: float
    table: np.ndarray


def my_activation(x):
    return x * 3


KNOWN = [Mine, Settings, my_activation]


def mine(key):
    odd = {
        "numbers": (True, -(2**70), 0.1, 1e-320, -0.0, float("-inf"), None, "\u2603 \ud800"),
        "nested": [[], (), {}, [(1,)], {3: {"a.b": 1}}, {(1, "x"): 2.0}],
        "schedule": warmup_cosine(1e-3, 3, 9),
        "partials": (partial(my_activation), jax.tree_util.Partial(jnp.clip, max=2.0)),
        "types": (np.dtype("int8"), jnp.dtype(jnp.bfloat16), jnp.bfloat16, LayerNorm),
        "settings": Settings(0.5, np.arange(3.0)),
        "keys": (jax.random.split(key, 2), jax.random.key(3, impl="rbg"), jax.random.PRNGKey(4)),
        "dtypes": [jnp.ones(3, t) for t in ("bool", "int8", "complex64", "float8_e4m3fn")],
        "numpy": [np.float32(0.1), np.bool(True), np.ones((2, 0, 3)), np.eye(3)[:, ::2]],
        "eqx": (eqx.nn.MLP(3, 4, 5, 1, key=key), eqx.nn.Lambda(jax.nn.silu)),
    }  # fmt: skip
    return Mine(LayerNorm(3), my_activation, odd)


def test_a_module_of_ones_own_comes_back(path, getkey):
    model = mine(getkey())
    save(path, model)
    with pytest.raises(ValueError, match=r"test_model_files:Mine.*known=\[...\]"):
        load(path)
    with pytest.raises(ValueError, match="activation.*test_model_files:my_activation.*known="):
        load(path, known=[Mine])
    loaded = load(path, known=KNOWN)
    odd, was = loaded.odd, model.odd
    assert repr(odd["numbers"]) == repr(was["numbers"])
    assert loaded.activation is my_activation and odd["schedule"] == was["schedule"]
    assert odd["nested"] == was["nested"] and odd["types"] == was["types"]
    assert type(odd["types"][0]) is type(was["types"][0])
    assert odd["settings"].rate == 0.5 and (odd["settings"].table == np.arange(3)).all()
    first, second = odd["partials"]
    assert type(first) is partial and first.func is my_activation
    assert type(second) is jax.tree_util.Partial and second(jnp.ones(1) * 5) == 2
    for name in ("keys", "dtypes", "numpy", "eqx"):
        same(odd[name], was[name])
    assert [x.dtype for x in odd["keys"]] == [x.dtype for x in was["keys"]]


@pytest.mark.parametrize(
    "x", [LayerNorm(3), [], {"a": 1}, None, 5, jnp.arange(3), np.ones(2), jax.random.key(1)]
)
def test_single_things_come_back(x, path):
    save(path, x)
    same(load(path), x)


def test_an_array_at_two_places_stays_one(path):
    shared = jnp.arange(5.0)
    tree = {"a": shared, "b": [shared, shared + 0], "a'": 1}
    save(path, tree | {"n": np.ones(3)})
    loaded = load(path)
    assert loaded["a"] is loaded["b"][0] and loaded["a"] is not loaded["b"][1]


def test_paths_that_read_alike_stay_apart(path):
    tree = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(3)}, "__metadata__": jnp.ones(4)}
    save(path, tree)
    assert eqx.tree_equal(load(path), tree)


def test_a_tensor_has_the_path_of_its_array(path, getkey):
    from safetensors.numpy import load_file

    model = gpt(getkey())
    save(path, model)
    theirs = load_file(path)
    assert (theirs["decoder.layers.1.self_attention.wq"] == model.decoder.layers[1].self_attention.wq).all()  # fmt: skip # noqa: E501
    assert len(theirs) == len(jax.tree.leaves(model))


def test_sharding(path, getkey):
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())

    def spread(name, x):
        wide = x.ndim > 1 and x.shape[0] % 2 == 0
        return jax.NamedSharding(mesh, jax.P("x")) if wide else everywhere

    model = {"model": gpt(getkey()), "key": jax.random.key(1)}
    save(path, model)
    loaded = load(path, sharding=spread)
    same(loaded, model)
    assert not loaded["model"].decoder.layers[0].self_attention.wq.sharding.is_fully_replicated
    assert loaded["key"].sharding.is_fully_replicated and len(loaded["key"].devices()) == 2
    save(path, loaded)  # spread over the devices of one host
    same(load(path, sharding=everywhere), model)
    with pytest.raises(ValueError, match="sharding must be a"):
        load(path, sharding=lambda name, x: "x")


# What cannot be saved.


def local_function(x):
    return lambda x: x


class Slow:
    pass


@dataclasses.dataclass
class MoreThanFields:
    x: int

    def __post_init__(self):
        self.y = 3


def endless():
    inner: list = []
    inner.append({"again": inner})
    return inner


def deep(levels):
    x: list = []
    for _ in range(levels):
        x = [x]
    return x


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda x: x, "'odd.1' is made of .*<lambda>.*top level of a module"),
        (local_function(1), "'odd.1' is made of .*<locals>.*top level"),
        (jax.jit(my_activation), "'odd.1' is made of .*my_activation.*no other program finds"),
        (Slow(), "'odd.1' is a test_model_files.Slow, which cannot be saved"),
        (MoreThanFields(1), "'odd.1' has the attributes y beside the fields"),
        (b"bytes", "'odd.1' is a builtins.bytes"),
        (endless(), "'odd.1.0.again' holds itself"),
        (np.array(["text"]), "'odd.1' has the dtype <U4"),
        (np.ones(3, "complex128"), "'odd.1' has the dtype complex128"),
        (np.ones(3, object), "'odd.1' has the dtype object"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "ShapeDtypeStruct, which cannot be saved"),
        (jnp.ones(3, jnp.int4), "'odd.1' has the dtype int4"),
        (deep(5000), "nested too deeply"),
        (deep(80), "nested more than 64 levels"),
    ],
)
def test_what_cannot_be_saved_is_named(value, says, path):
    path.write_text("the one before")
    with pytest.raises(ValueError, match=says):
        save(path, {"odd": [0, value], "w": np.ones(2)})
    assert path.read_text() == "the one before"
    assert os.listdir(path.parent) == [path.name]


def test_nothing_is_saved_inside_of_a_transformation(path):
    with pytest.raises(ValueError, match="'w' has no numbers inside of jit"):
        jax.jit(lambda x: save(path, {"w": x}))(jnp.ones(3))


def test_places_that_cannot_be_written_to(path, tmp_path, monkeypatch, no_shape_checker):
    with pytest.raises(ValueError, match="is a directory. Pass the file"):
        save(tmp_path, LayerNorm(3))
    for wrong in ("", None, 3):
        with pytest.raises(ValueError, match="path must be that of a file"):
            save(wrong, LayerNorm(3))
    save(path, LayerNorm(3))
    before = path.read_bytes()
    with pytest.raises(OSError):
        save(path / "below", LayerNorm(3))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="model.safetensors cannot be written: No space left"):
        save(path, LayerNorm(4))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


# Files that were not written by `save`.


def forge(path, construction, tensors=None, **metadata):
    """A file whose digest is right."""
    unsaved = [
        Unsaved(name, x.shape, x.dtype, partial(np.asarray, x))
        for name, x in (tensors or {}).items()
    ]
    text = construction if isinstance(construction, str) else json.dumps({"object": construction})
    write_sealed_file(path, unsaved, {"format": "jaxformers 1", "construction": text, **metadata})


W = {"w": np.arange(6, dtype=np.uint32).reshape(3, 2)}
NORM = {"eps": 1e-5, "gain_offset": 0.0, "gain": None}


def test_the_forger_writes_what_is_loaded(path):
    """Or the tests below would see nothing."""
    forge(
        path,
        {"class": "jaxformers:RMSNorm", "fields": NORM | {"gain": {"array": "w", "as": "jax"}}},
        W,
    )
    assert (load(path).gain == W["w"]).all()


def ref(name, kind="jax"):
    return {"array": name, "as": kind}


def record(name, **fields):
    return {"class": name, "fields": fields}


@pytest.mark.parametrize(
    ("construction", "says"),
    [
        ({"name": "os:system"}, "'os:system', which is not looked for"),
        ([{"name": "builtins:eval"}], "'0' is or is made of 'builtins:eval'"),
        ({"name": "numpy:load"}, "not looked for"),
        ({"name": "jax.numpy:load"}, "not looked for"),
        ({"name": "jaxformers:save"}, "not looked for"),
        ({"name": "jaxformers:from_pretrained"}, "not looked for"),
        (record("jaxformers.files.safetensors_file:Unsaved"), "not looked for"),
        ({"name": "jaxformers.checkpoint:os"}, "not looked for"),
        ({"name": "jaxformers:__builtins__"}, "not looked for"),
        ({"name": "antigravity"}, "not looked for"),
        ({"name": ""}, "not looked for"),
        (record("subprocess:Popen", args="true"), "not looked for"),
        (record("jax.nn:relu"), "no class of modules"),
        (record("jaxformers:RMSNorm", **NORM, axes=3), "not known here 'axes'.*another version"),
        (record("jaxformers:RMSNorm", gain=None, eps=1e-5), "missing there gain_offset"),
        (record("jaxformers:RMSNorm", **NORM, __class__=3), "not known here '__class__'"),
        (record("jaxformers:Optimizer"), "cannot be a jaxformers:Optimizer"),
        ({"class": "jaxformers:RMSNorm", "fields": [1]}, "not understood"),
        ({"class": ["jaxformers:RMSNorm"], "fields": {}}, "not understood"),
        ({"class": "jaxformers:RMSNorm", "fields": NORM, "more": 1}, "not understood"),
        ({"pickle": "gASVCgAAAAAAAACMBG9zLnM="}, "not understood"),
        ({"tuple": 3}, "not understood"),
        ({"float": "1e5"}, "not understood"),
        ({"dtype": "O"}, "not understood"),
        ({"dtype": 3}, "not understood"),
        ({}, "not understood"),
        ({"dict": [1]}, "must be a dict in pairs"),
        ({"dict": [["a"]]}, "must be a dict in pairs"),
        ({"dict": [[[], 1]]}, "a key that no dict can have"),
        ({"partial": 3, "of": "functools", "args": [], "keywords": {"dict": []}}, "no partial"),
        ({"partial": {"name": "jax.nn:relu"}, "of": "os", "args": [], "keywords": {"dict": []}},
         "no partial"),
        ({"partial": {"name": "jax.nn:relu"}, "of": "jax", "args": [],
          "keywords": {"dict": [[3, 4]]}}, "no partial"),
        (ref("v"), "the tensor 'v' is missing"),
        ([ref("w"), 1, {"array": 3, "as": "jax"}], "'2' is described by"),
        (ref("w", "pickle"), "'w' is to be 'pickle', but it is uint32"),
        (ref("w", "scalar"), "'w' is to be 'scalar'"),
        (ref("w", "key nonsense"), "'w' holds no PRNG keys"),
        (ref("w", "key rbg"), "'w' holds no PRNG keys"),
        ([], "the tensors 'w' belong nowhere"),
        (deep(70), "nested more than 64 levels"),
        ('{"object":' + "[" * 10**5 + "]" * 10**5 + "}", "not valid JSON"),
        ('{"object":NaN}', "not a finite number"),
        ('{"object":1,"object":2}', "more than once"),
        ('{"object":1,"more":2}', "must describe one object"),
        ("[]", "must hold a JSON object"),
        ("", "not valid JSON"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused(construction, says, path):
    forge(path, construction, W)
    with pytest.raises(ValueError, match=says) as error:
        load(path)
    assert path.name in str(error.value) and len(str(error.value)) < 2000


def test_nothing_is_imported(path):
    import sys

    sys.modules.pop("this", None)
    forge(path, {"name": "this:s"})
    with pytest.raises(ValueError, match="not looked for"):
        load(path)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "known", [["Mine"], [np.ones(3)], [LayerNorm(3)], [Mine, type("Mine", (), {})]]
)
def test_known_that_makes_no_sense(known, path):
    save(path, LayerNorm(3))
    with pytest.raises(ValueError, match="known (must be|has two)"):
        load(path, known=known)


def test_other_files_are_told_apart(path, tmp_path, getkey):
    from safetensors.numpy import save_file

    with pytest.raises(ValueError, match="is missing or no regular file"):
        load(path)
    gpt2 = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
    TransformerLM(31, **SIZES, num_layers=1, **gpt2, key=getkey()).save_pretrained(tmp_path / "hf")
    save_file({"w": np.ones(3)}, tmp_path / "theirs")
    for other in (tmp_path / "hf" / "model.safetensors", tmp_path / "theirs"):
        with pytest.raises(ValueError, match="not one of jaxformers.save.*from_pretrained"):
            load(other)
    forge(path, [], format="jaxformers 2")
    with pytest.raises(ValueError, match="'jaxformers 2'.*'jaxformers 1'.*newer version"):
        load(path)
    save_file({}, path, metadata={"format": "jaxformers 1", "construction": '{"object":[]}'})
    with pytest.raises(ValueError, match="does not begin with a digest"):
        load(path)


def test_wide_numbers_are_not_narrowed(path):
    forge(path, ref("w"), {"w": np.ones(3)})
    with pytest.raises(ValueError, match="float64, which needs .*jax_enable_x64"):
        load(path)
    with jax.enable_x64(True):
        assert load(path).dtype == jnp.float64


def test_damage_is_noticed(path, getkey):
    rng = np.random.default_rng(5)
    save(path, gpt(getkey()))
    whole = path.read_bytes()
    for at in [0, 8, 30, 60, 200, len(whole) - 1, *rng.integers(0, len(whole), 12)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        for damaged in (bytes(flipped), whole[:at]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="model.safetensors"):
                load(path)
