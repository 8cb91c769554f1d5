"""Checkpoints that are wrong, by malice or by mistake; saving what cannot be saved; loaded models.

Whatever a config.json says, loading ends with a `ValueError` that says what is wrong, or with the
model that transformers makes of it: quickly, and without memory for sizes that no tensor has.
"""

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from hf_checkpoints import load as load_reference  # noqa: E402

from jaxformers import (  # noqa: E402
    AdamW,
    GatedFeedForward,
    LayerNorm,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    from_pretrained,
)
from jaxformers.files.hub import TensorFiles, write_tensors  # noqa: E402
from jaxformers.hf.architecture.describe import describe  # noqa: E402
from jaxformers.hf.config.harmless import HARMLESS  # noqa: E402
from jaxformers.kernels.plain import dot_product_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
torch.set_num_threads(1)

FAMILIES = ["llama", "gpt2", "bert", "t5", "bart", "mixtral", "gemma3", "modernbert", "albert"]
TOKENS = np.array([[8, 9, 30, 12, 25, 33, 41, 50, 11], [13, 14, 52, 44, 20, 19, 18, 9, 23]])
WRONG = ["x", [], [[None]], {"a": 1}, -1, 0, 10**18, 10**9, 1e308, 0.5, True, None]
MEGABYTE = 2**20


@pytest.fixture
def changed(made, tmp_path):
    """A function that gives a copy of a checkpoint with other settings and other tensors.

    Settings are added to config.json. `edit` changes a dictionary of arrays in place.
    """
    count = iter(range(10**9))

    def directory(name, settings=None, edit=None):
        path = tmp_path / str(next(count))
        shutil.copytree(made(name), path)
        entries = json.loads((path / "config.json").read_text()) | (settings or {})
        (path / "config.json").write_text(json.dumps(entries))
        if edit is not None:
            files = TensorFiles(path)
            arrays = {key: files.read(key) for key in files.names}
            edit(arrays)
            tensors = [(key, x.shape, x.dtype, lambda x=x: x) for key, x in arrays.items()]
            write_tensors(path, tensors)
        return path

    return directory


def outputs(model):
    """Log-probabilities, or the states or classes of an encoder without them."""
    if isinstance(model, TransformerLM):
        return np.asarray(model(TOKENS))
    if isinstance(model, Transformer):
        return np.asarray(model(TOKENS, TOKENS[:, :5]))
    if model.output is not None:
        return np.asarray(jax.nn.log_softmax(model.logits(TOKENS)))
    return np.asarray(model(TOKENS) if model.classifier is None else model.classify(TOKENS))


def reference_outputs(name, directory):
    """The same under transformers, None where it takes no such checkpoint."""
    try:
        with torch.no_grad():
            model = load_reference(name, directory)
            tokens = {"input_ids": torch.tensor(TOKENS)}
            if model.config.is_encoder_decoder:
                tokens["decoder_input_ids"] = tokens["input_ids"][:, :5]
            first = model(**tokens)[0].float()
    except Exception:
        return None
    is_over_tokens = first.shape[-1] == model.config.vocab_size
    return (first.log_softmax(-1) if is_over_tokens else first).numpy()


@contextlib.contextmanager
def cheap(seconds=10, megabytes=200):
    """Neither much time nor much memory is used, which is measured where Linux tells."""
    peak = partial(_memory, "VmHWM")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = _memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert peak() - before < megabytes * MEGABYTE


def _memory(entry):
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(entry):
                return int(line.split()[1]) * 1024
    return 0


def try_to_load(directory):
    """The model, or what is wrong with its checkpoint, told at a readable length."""
    try:
        return from_pretrained(directory)
    except ValueError as error:
        assert 20 < len(str(error)) < 3000
        assert any(word in str(error) for word in ("config.json", "tensor")), error
        return str(error)


def assert_right(name, model, usual, directory):
    """A model that was loaded is the usual one, or that of transformers, or there is none there."""
    if describe(model) != describe(usual):
        wanted = reference_outputs(name, directory)
        if wanted is not None:
            np.testing.assert_allclose(outputs(model), wanted, atol=2e-4, rtol=0)


# config.json.


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_settings_of_wrong_types(name, made, changed):
    """Each setting that means something gets each wrong value."""
    usual, directory = from_pretrained(made(name)), changed(name)
    entries = json.loads((directory / "config.json").read_text())
    keys = [k for k in entries if k not in HARMLESS or k.endswith("token_id")]
    kept = {}
    with cheap(seconds=60):
        for key in keys:
            for value in WRONG:
                (directory / "config.json").write_text(json.dumps(entries | {key: value}))
                model = try_to_load(directory)
                if not isinstance(model, str):
                    kept[key, str(value)] = model
                    assert_right(name, model, usual, directory)
    assert len(kept) < 0.4 * len(keys) * len(WRONG)


@pytest.mark.parametrize(
    "name, key, value, expected",
    [
        ("llama", "hidden_size", "24", "an integer from 1"),
        ("llama", "num_hidden_layers", 2.0, "an integer from 1 to 1024"),
        ("llama", "attention_bias", 1, "true or false"),
        ("llama", "hidden_act", "swiglu", "one of 'relu'"),
        ("llama", "hidden_act", ["silu"], "one of 'relu'"),
        ("llama", "rms_norm_eps", 1e308, "a number above 0 and below 3.4e"),
        ("gemma3", "layer_types", "full_attention", "a list"),
        ("gemma3", "rope_parameters", [1], "an object"),
        ("t5", "feed_forward_proj", ["relu"], "a string"),
        ("bart", "scale_embedding", "true", "true or false"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(name, key, value, expected, changed):
    came = repr(value).replace("[", r"\[").replace("+", r"\+")
    with pytest.raises(ValueError, match=rf"config.json: {key} must be {expected}.*got {came}"):
        from_pretrained(changed(name, {key: value}))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_random_settings(name, made, changed):
    """Values anywhere in config.json and generation_config.json, replaced at random."""
    usual, directory = from_pretrained(made(name)), changed(name)
    paths = [directory / "config.json", directory / "generation_config.json"]
    paths = [path for path in paths if path.exists()]
    contents = [json.loads(path.read_text()) for path in paths]
    loaded = 0
    for seed in range(40):
        rng = random.Random(f"{name} {seed}")
        for path, content in zip(paths, contents, strict=True):
            path.write_text(json.dumps(mutated(content, rng)))
        with cheap():
            model = try_to_load(directory)
        if not isinstance(model, str):
            loaded += 1
            assert_right(name, model, usual, directory)
    assert 0 < loaded < 40


def mutated(content, rng):
    """A copy with one to three values, at any depth, replaced, removed or under another name."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        place = content
        key = rng.choice(list(place))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        match rng.randrange(6):
            case 0 if isinstance(place, dict) and len(place) > 1:
                del place[key]
            case 1 if isinstance(place, dict):
                place[f"{key}_2"] = place[key]
            case 2 if isinstance(place[key], int | float):
                place[key] = place[key] * rng.choice([2, -1, 0.5, 10**12])
            case _:
                place[key] = copy.deepcopy(rng.choice(WRONG))
    return content


NOT_JSON = {
    b"": "empty",
    b"[1, 2]": "object",
    b"null": "object",
    b'{"a": "\xe9"}': "utf-8",
    b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}": "nested",
    b'{"a":' * 10**5 + b"1" + b"}" * 10**5: "recursion",
    b'{"a": 1, "a": 2}': "more than once",
    b'{"a": NaN}': "finite",
    b'{"a": ' + b"9" * 5000 + b"}": "digits",
    b'{"a": [' + b"1," * 3 * 10**6 + b"1]}": "values",
    b"<html>": "web page",
    b'{"model_type": "llama"': "not valid JSON",
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content, word", NOT_JSON.items(), ids=NOT_JSON.values())
def test_files_that_are_no_json(file, content, word, changed):
    directory = changed("llama")
    (directory / file).write_bytes(content)
    with cheap(), pytest.raises(ValueError, match=f"(?s){file}.*{word}"):
        from_pretrained(directory)


def test_missing_files(changed):
    directory = changed("llama")
    (directory / "generation_config.json").unlink()  # it need not be there
    assert from_pretrained(directory).origin.special_tokens.end_token == (7,)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        from_pretrained(directory)


@pytest.mark.parametrize("name", ["Llama", "llama2", "", None, 3, ["llama"], {"a": 1}])
def test_unknown_family(name, changed):
    with pytest.raises(ValueError, match="model_type must be one of .*bert.*llama"):
        from_pretrained(changed("llama", {"model_type": name}))


FEATURES = {
    "llama": {"attn_logit_softcapping": 30.0, "sliding_window": 4, "alien_attention": "x"},
    "gpt2": {"add_cross_attention": True, "rope_theta": 1e4, "num_key_value_heads": 2},
    "bert": {"is_decoder": True, "position_embedding_type": "relative_key", "alibi": True},
    "t5": {"encoder_layers": 2, "is_gated_act": True, "dense_act_fn": "elu"},
    "mixtral": {"norm_topk_prob": True, "shared_expert_intermediate_size": 8, "n_group": 2},
    "gemma3": {"use_bidirectional_attention": True, "attn_logit_softcapping": 50.0},
    "modernbert": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "moe_layers": [1]},
    "albert": {"inner_group_num": 2, "rope_theta": 1e4, "head_dim": 4},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_refused_by_name(name, changed):
    for key, value in FEATURES[name].items():
        with pytest.raises(ValueError, match=f"config.json.*{key}"):
            from_pretrained(changed(name, {key: value}))


def test_many_unknown_settings_are_told_shortly(changed):
    settings = {f"{'x' * 10**4}{i}": list(range(10**4)) for i in range(100)}
    with pytest.raises(ValueError, match="and 92 more") as caught:
        from_pretrained(changed("llama", settings))
    assert len(str(caught.value)) < 2000


def scaled(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 50.0, **more}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
CONTRADICTIONS = [
    ("llama", {"num_hidden_layers": 3}, "16 missing"),
    ("llama", {"num_hidden_layers": 1}, "16 surplus"),
    ("llama", {"num_hidden_layers": 1000}, "1000 layers, the file has 35 tensors"),
    ("llama", {"num_attention_heads": 5}, "multiple of num_kv_heads"),
    ("llama", {"num_key_value_heads": 4}, "multiple of num_kv_heads"),
    ("llama", {"head_dim": 9}, "even"),
    ("llama", {"head_dim": None}, "another shape"),
    ("gpt2", {"n_head": 7}, "another shape"),
    ("gpt2", {"n_head": 4096}, "head_dim"),
    ("gemma3", {"layer_types": ["full_attention"]}, "layer_types must name"),
    ("gemma3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must name"),
    ("gemma3", {"sliding_window": 0}, "sliding_window"),
    ("gemma3", {"sliding_window": None}, "there is no sliding_window"),
    ("gemma3", {"rope_parameters": {"rope_theta": 5.0}}, "types of layers"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "types of layers"),
    ("llama", scaled("spiral"), "one of default, linear"),
    ("llama", scaled(["default"]), "one of default, linear"),
    ("llama", scaled("linear"), "needs factor"),
    ("llama", scaled("linear", factor=0.5), "at least 1"),
    ("llama", scaled("linear", factor=10**400), "factor of the rope"),
    ("llama", scaled("linear", factor=2.0, beta_fast=3.0), "beta_fast"),
    ("llama", scaled("llama3", **LLAMA3), "high_frequency_factor must be above"),
    ("llama", scaled("yarn", factor=4.0, truncate="no"), "truncate"),
    ("llama", scaled("yarn", factor=4.0, beta_fast=1.0, beta_slow=2.0), "beta_fast must be above"),
    ("llama", scaled("longrope", short_factor=[1.0], long_factor=[1.0]), "each of the 5 pairs"),
    ("llama", scaled("longrope", short_factor="x", long_factor=[1.0]), "short_factor"),
    ("mixtral", {"num_experts_per_tok": 9}, "at most num_experts = 5"),
    ("mixtral", {"num_local_experts": 4}, "6 surplus"),
    ("t5", {"relative_attention_max_distance": 3}, "above num_buckets / 2"),
    ("albert", {"num_hidden_groups": 4}, "3 layers"),
    ("modernbert", {"local_attention": None}, "no local_attention"),
]


@pytest.mark.parametrize("name, settings, words", CONTRADICTIONS)
def test_contradictions(name, settings, words, changed):
    with pytest.raises(ValueError, match=f"(?s)config.json.*{words}|tensors in .*{words}"):
        from_pretrained(changed(name, settings))


@pytest.mark.parametrize(
    "name, key",
    [
        ("llama", "head_dim"),
        ("llama", "vocab_size"),
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_positions"),
        ("gpt2", "n_embd"),
        ("bart", "max_position_embeddings"),
        ("mixtral", "num_local_experts"),
        ("t5", "relative_attention_max_distance"),
        ("t5", "relative_attention_num_buckets"),
        ("albert", "num_hidden_layers"),
        ("bert", "type_vocab_size"),
    ],
)
@pytest.mark.parametrize("size", [10**6, 10**9, 2**31 - 1])
def test_sizes_that_no_tensor_has(name, key, size, changed):
    """They are held against the file before anything of that size is made."""
    with cheap(megabytes=80), pytest.raises(ValueError, match=r"config\.json"):
        from_pretrained(changed(name, {key: size}))


# generation_config.json, and the ids of config.json.

IDS = ["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"]
IDS += ["forced_bos_token_id", "forced_eos_token_id"]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", IDS)
def test_ids_of_wrong_types(file, key, changed):
    directory = changed("bart")
    entries = json.loads((directory / file).read_text())
    for value in ["x", 1.0, True, [None], [[1]], {"a": 1}, [1, "x"]]:
        (directory / file).write_text(json.dumps(entries | {key: value}))
        with pytest.raises(ValueError, match=f"^{file}: {key} must be a token id"):
            from_pretrained(directory)


@pytest.mark.parametrize("words", ["x", 3, {"a": 1}, [1], [[]], [["x"]], [[True]], [[1.0]], 0])
def test_bad_words_of_wrong_types(words, changed):
    with pytest.raises(ValueError, match="bad_words_ids must be lists of token ids"):
        from_pretrained(changed("bart", {"bad_words_ids": words}))


def test_ids_that_the_vocabulary_does_not_have(changed):
    """They cannot come up: Llama's files say -1 where there is no padding."""
    directory = changed("bart", {"bad_words_ids": [[3], [61], [4, -1], [5, 6]]})
    special = {"pad_token_id": -1, "eos_token_id": [7, 10**18, 7, 9, -5], "bos_token_id": 61}
    (directory / "generation_config.json").write_text(json.dumps(special))
    tokens = from_pretrained(directory).origin.special_tokens
    assert (tokens.pad_token, tokens.end_token) == (None, (7, 9))
    assert tokens.bad_words == ((3,), (5, 6))


# Tensors.

Q = "model.layers.0.self_attn.q_proj.weight"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def replace(name, function):
    def edit(arrays):
        arrays[name] = np.asarray(function(arrays[name]))

    return edit


def rename(old, new):
    def edit(arrays):
        for name in list(arrays):
            arrays[name.replace(old, new)] = arrays.pop(name)

    return edit


FAULTS = [
    (lambda arrays: arrays.pop(Q), f"1 missing: {Q}"),
    (lambda arrays: arrays.update(more=arrays[Q]), "1 surplus: more"),
    (rename("q_proj", "query"), "(?s)4 missing: .*q_proj.*4 surplus: .*query"),
    (replace(Q, lambda x: x.T), rf"1 of another shape .*{Q} \(24, 60\) for \(60, 24\)"),
    (replace(Q, lambda x: x[None]), r"\(1, 60, 24\) for \(60, 24\)"),
    (replace(Q, lambda x: x[:0]), r"\(0, 24\) for \(60, 24\)"),
    (replace(Q, lambda x: x[0, 0]), r"\(\) for \(60, 24\)"),
    (replace(Q, lambda x: x.astype(np.int8)), f"not of float32, .*: {Q} int8"),
    (replace(Q, lambda x: x.astype(jnp.float8_e4m3fn)), f"{Q} float8_e4m3fn"),
    (replace(Q, lambda x: x.astype(np.complex64)), f"{Q} complex64"),
    (replace(Q, lambda x: x * np.float32("nan")), f"{Q} holds numbers that are NaN"),
    (replace(Q, lambda x: np.where(x == x[3, 4], np.float32("inf"), x)), f"{Q} holds .* infinite"),
    (lambda arrays: arrays.update({Q[6:]: arrays[Q]}), f"two tensors for {Q}"),
    (rename("layers.1", "layers.7"), "(?s)16 missing.*layers.1.*16 surplus.*layers.7"),
    (rename("layers.1", "layers.01"), "(?s)16 missing.*layers.1.*16 surplus.*layers.01"),
]


@pytest.mark.parametrize("edit, words", FAULTS, ids=[words[:30] for _, words in FAULTS])
def test_faults_of_tensors(edit, words, changed):
    with pytest.raises(ValueError, match=words):
        from_pretrained(changed("llama", edit=edit))


def test_all_faults_are_told_at_once(changed):
    def edit(arrays):
        del arrays[Q]
        arrays["more"] = arrays[HEAD] = arrays[HEAD].T
        arrays[TABLE] = arrays[TABLE].astype(np.int8)

    with pytest.raises(ValueError, match="(?s)1 missing.*1 surplus.*1 of another shape.*1 not of"):
        from_pretrained(changed("llama", edit=edit))


def test_headers_with_very_many_names(changed):
    """A header may be what is hostile: nothing is done for each name that takes long."""
    empty = np.zeros(0, np.float32)
    many = {f"model.layers.{i}.self_attn.q_proj.weights": empty for i in range(10000)}
    directory = changed("bart", edit=lambda arrays: arrays.update(many))
    with cheap(seconds=5), pytest.raises(ValueError, match="10000 surplus") as caught:
        from_pretrained(directory)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("settings", [{"num_hidden_layers": 500}, {"num_local_experts": 9000}])
def test_settings_and_headers_that_agree_on_very_much(settings, changed):
    """As many names as config.json asks for, of tensors that take no room."""
    many = {f"x{i}": np.zeros(0, np.float32) for i in range(10000)}
    directory = changed("mixtral", settings, lambda arrays: arrays.update(many))
    with cheap(), pytest.raises(ValueError, match="experts in all layers|surplus"):
        from_pretrained(directory)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_prefixes_of_names(prefix, changed):
    """Llama's names may lack their prefix; a second one is none of them."""
    directory = changed("llama", edit=rename("model.", prefix))
    np.testing.assert_array_equal(
        outputs(from_pretrained(directory)), outputs(from_pretrained(changed("llama")))
    )


def with_head(make_head):
    def edit(arrays):
        arrays[HEAD] = np.asarray(make_head(arrays[TABLE]))

    return edit


HEADS = {
    "missing": (lambda arrays: arrays.pop(HEAD), True, ValueError),
    "equal": (with_head(lambda x: x), True, False),
    "different": (with_head(lambda x: 2 * x), False, False),
    "of another type": (with_head(lambda x: x.astype(jnp.bfloat16)), False, False),
    "instead of the table": (lambda arrays: arrays.pop(TABLE), True, ValueError),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("says", [True, False])
def test_heads_and_tables(head, says, changed):
    """What is in the file decides, except that a tensor may only be missing where it is tied."""
    edit, *tied = HEADS[head]
    directory = changed("llama", {"tie_word_embeddings": says}, edit)
    if tied[not says] is ValueError:
        with pytest.raises(ValueError, match="1 missing"):
            from_pretrained(directory)
        return
    model = from_pretrained(directory)
    assert model.output.tied == tied[not says]
    np.testing.assert_allclose(
        outputs(model), reference_outputs("llama", directory), atol=1e-4, rtol=0
    )


def cast_all(dtype):
    def edit(arrays):
        arrays.update({name: x.astype(dtype) for name, x in arrays.items()})

    return edit


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("asked", [None, "float32", jnp.bfloat16, np.dtype("float16")])
def test_types_of_weights(stored, asked, changed):
    directory = changed("llama", edit=cast_all(jnp.dtype(stored)))
    model = from_pretrained(directory, dtype=asked)
    usual = "float32" if stored == "float64" else stored  # as all arrays of JAX
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(asked or usual)}
    wanted = reference_outputs("llama", directory)
    worst = np.abs(np.asarray(outputs(model), np.float32) - wanted).max()
    assert worst < (1e-4 if model.output.w.dtype == jnp.float32 else 0.5)


def test_mixed_types_of_weights_become_the_widest(changed):
    model = from_pretrained(changed("llama", edit=replace(Q, lambda x: x.astype(jnp.bfloat16))))
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "dtype, words",
    [
        *[(x, "floating-point type") for x in (jnp.int32, "int8", bool, object, [], "S3")],
        *[(x, "must be a type such as") for x in ("x", 3, 1.0, "", np.ones(3))],
        *[(x, "jax_enable_x64") for x in (float, jnp.float64, "f8")],
        (jnp.float8_e4m3fn, "floating-point type of 16 bits"),
    ],
)
def test_types_that_make_no_sense(dtype, words, made):
    with pytest.raises(ValueError, match=words):
        from_pretrained(made("llama"), dtype=dtype)


def test_numbers_too_large_for_a_type(changed):
    """They would be infinities, which no warning says."""
    directory = changed("llama", edit=replace(Q, lambda x: 1e6 * x))
    with pytest.raises(ValueError, match=f"{Q} holds numbers that are too large for float16"):
        from_pretrained(directory, dtype="float16")
    assert np.isfinite(outputs(from_pretrained(directory, dtype=jnp.bfloat16))).all()


# Where arrays and files are.

SHARDING = "sharding must be a"


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()), ("x",))


def spread(mesh, path, x):
    """Along the first axis that can be."""
    even = [size % 2 == 0 for size in x.shape]
    axis = even.index(True) if any(even) else None
    names = [] if axis is None else [None] * axis + ["x"]
    return NamedSharding(mesh, PartitionSpec(*names))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_sharding(name, made, mesh):
    usual = outputs(from_pretrained(made(name)))
    everywhere = from_pretrained(made(name), sharding=NamedSharding(mesh, PartitionSpec()))
    spread_out = from_pretrained(made(name), sharding=partial(spread, mesh))
    second = from_pretrained(made(name), sharding=SingleDeviceSharding(jax.devices()[1]))
    for model in (everywhere, spread_out, second):
        np.testing.assert_allclose(outputs(model), usual, atol=3e-5, rtol=0)
    paths, _ = jax.tree_util.tree_flatten_with_path(spread_out)
    for path, x in paths:
        assert x.sharding == spread(mesh, path, x), path
    assert {x.devices().pop() for x in jax.tree.leaves(second)} == {jax.devices()[1]}


@pytest.mark.parametrize("wrong", ["gpu", 3, True, [1], {}, PartitionSpec("x"), NamedSharding])
def test_sharding_that_makes_no_sense(wrong, made):
    with pytest.raises(ValueError, match=SHARDING):
        from_pretrained(made("llama"), sharding=wrong)
    if not isinstance(wrong, type):
        with pytest.raises(ValueError, match=f"{SHARDING}.* function for embedding"):
            from_pretrained(made("llama"), sharding=lambda path, x: wrong)


def test_sharding_that_does_not_fit(made, mesh):
    with pytest.raises(ValueError, match="2 devices along its axis 'x', over which no rule"):
        from_pretrained(made("llama"), sharding=mesh)
    along_x = NamedSharding(mesh, PartitionSpec("x"))
    with pytest.raises(ValueError, match=r"embedding.weight \(61, 24\) cannot be laid out"):
        from_pretrained(made("llama"), sharding=along_x)


@pytest.mark.parametrize("path", [None, 3, b"x", [], "", "x" * 5000, "\0", "a/b/c/d", "../../x"])
def test_paths_that_are_none(path):
    with pytest.raises(ValueError, match="directory"):
        from_pretrained(path)


def test_wrong_class_for_a_checkpoint(made):
    for cls in (Transformer, TransformerEncoder):
        with pytest.raises(ValueError, match=f"which {cls.__name__} is not"):
            cls.from_pretrained(made("llama"))


# Saving.


def save_and_load(model, directory):
    model.save_pretrained(directory)
    return from_pretrained(directory)


def assert_kept(model, directory):
    again = save_and_load(model, directory)
    np.testing.assert_array_equal(outputs(again), outputs(model))
    assert describe(again) == describe(model)
    assert again.origin.special_tokens == model.origin.special_tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral", "albert", "bert_classify"])
def test_a_trained_model_is_saved(name, made, tmp_path):
    before = from_pretrained(made(name))
    model = train(before, 1)[0]
    assert_kept(model, tmp_path)
    moved = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(before), strict=True)
    ]
    assert all(moved) or name == "bert_classify"  # whose embeddings are not all used
    reference = reference_outputs(name, tmp_path)
    np.testing.assert_allclose(outputs(model), reference, atol=1e-4, rtol=0)


def train(model, steps):
    optimizer = AdamW(1e-2)

    def loss(model):
        if isinstance(model, TransformerEncoder):
            return -jax.nn.log_softmax(
                model.logits(TOKENS) if model.output is not None else model.classify(TOKENS)
            )[..., 0].mean()
        arguments = (TOKENS, TOKENS) if isinstance(model, Transformer) else (TOKENS,)
        log_probs = model(*arguments)[:, :-1]
        return -jnp.take_along_axis(log_probs, jnp.asarray(TOKENS)[:, 1:, None], -1).mean()

    traces, losses = [], []

    @eqx.filter_jit
    def step(model, state):
        traces.append(0)
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        return *optimizer.update(gradient, state, model), value

    state = optimizer.init(model)
    for _ in range(steps):
        model, state, value = step(model, state)
        losses.append(float(value))
    return model, losses, len(traces)


def layers(model):
    return model.decoder.layers


def grown(model, vocab_size):
    """With a table, and a head, of another size."""
    table = model.embedding.token_embedding.weight
    new = jnp.resize(table, (vocab_size, table.shape[1]))
    model = eqx.tree_at(lambda m: m.embedding.token_embedding.weight, model, new)
    if model.output.w is not None:
        w = jnp.resize(model.output.w, (table.shape[1], vocab_size))
        model = eqx.tree_at(lambda m: m.output.w, model, w)
    return model


def with_activation(model, activation):
    return eqx.tree_at(
        lambda m: [layer.feed_forward.activation for layer in layers(m)],
        model,
        [activation] * len(layers(model)),
    )


KEPT_SURGERY = {
    "a larger vocabulary": lambda m: grown(m, 70),
    "a smaller vocabulary": lambda m: grown(m, 55),
    "a layer less": lambda m: eqx.tree_at(layers, m, layers(m)[:1]),
    "another activation": lambda m: with_activation(m, jax.nn.relu),
    "bfloat16": lambda m: jax.tree.map(lambda x: x.astype(jnp.bfloat16), m),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("surgery", KEPT_SURGERY)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_surgery_is_saved(surgery, name, made, tmp_path):
    model = KEPT_SURGERY[surgery](from_pretrained(made(name)))
    assert_kept(model, tmp_path)
    says = json.loads((tmp_path / "config.json").read_text())
    assert (says["dtype"], says["num_hidden_layers" if name == "llama" else "n_layer"]) == (
        str(model.embedding.table.dtype),
        len(layers(model)),
    )
    if surgery != "bfloat16":
        reference = reference_outputs(name, tmp_path)
        np.testing.assert_allclose(outputs(model), reference, atol=1e-4, rtol=0)


class HalfNorm(eqx.Module):
    gain: jax.Array

    def __call__(self, x):
        return 0.5 * self.gain * x


def own_attention(query, keys, values, mask, **options):
    return dot_product_attention(query, keys, values, mask, **options)


def own_activation(x):
    return x


def at(where, new):
    return lambda m: eqx.tree_at(where, m, new, is_leaf=lambda x: x is None)


def first(m):
    return layers(m)[0]


LOST_SURGERY = {
    "its own kernel": (at(lambda m: first(m).self_attention.attention_fn, own_attention), "kernel"),
    "its own norm": (at(lambda m: m.decoder.norm, HalfNorm(jnp.ones(24))), "norm HalfNorm"),
    "its own activation": (lambda m: with_activation(m, own_activation), "own_activation"),
    "a layer norm at the end": (at(lambda m: m.decoder.norm, LayerNorm(24)), "norms"),
    "no norm at the end": (at(lambda m: m.decoder.norm, None), "llama.*final_norm is False"),
    "no layers": (at(layers, ()), "without layers"),
    "one bias less": (at(lambda m: first(m).self_attention.bq, None), "biases"),
    "an activation of one layer": (
        at(lambda m: first(m).feed_forward.activation, jax.nn.relu),
        "differ in their feed-forwards",
    ),
    "a narrow layer": (
        at(lambda m: first(m).feed_forward, GatedFeedForward(24, 30, key=jax.random.key(0))),
        "differ in their feed-forwards|arrays are not those",
    ),
    "a larger table alone": (
        at(lambda m: m.embedding.token_embedding.weight, jnp.ones((70, 24))),
        r"output.w \(24, 61\) for \(24, 70\)",
    ),
    "NaN": (at(lambda m: m.output.w, jnp.full((24, 61), jnp.nan)), "output.w: .* NaN"),
    "two types": (lambda m: at(lambda m: m.output.w, m.output.w.astype(jnp.float16))(m), "float16"),
    "integers": (lambda m: jax.tree.map(lambda x: x.astype(jnp.int8), m), "int8"),
    "8 bits": (lambda m: jax.tree.map(lambda x: x.astype(jnp.float8_e5m2), m), "float8_e5m2"),
    "a stack of models": (lambda m: jax.tree.map(lambda x: jnp.stack([x, x]), m), "one by one"),
    "shapes alone": (lambda m: eqx.filter_eval_shape(lambda: m), "are numbers"),
    "no arrays": (lambda m: eqx.partition(m, eqx.is_array)[1], "are numbers"),
}


@pytest.mark.parametrize("surgery", LOST_SURGERY)
def test_surgery_that_no_checkpoint_holds(surgery, made, tmp_path):
    """The error says what, and nothing is written over what was there."""
    from_pretrained(made("llama")).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change, words = LOST_SURGERY[surgery]
    model = change(from_pretrained(made("llama")))
    with pytest.raises(ValueError, match=words) as caught:
        model.save_pretrained(tmp_path)
    assert len(str(caught.value)) < 800
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("transformation", ["jit", "vmap", "grad"])
def test_tracers_are_not_saved(transformation, made, tmp_path):
    model = from_pretrained(made("llama"))

    def save(model):
        model.save_pretrained(tmp_path)
        return model.output.w.sum()

    with pytest.raises(ValueError, match="outside of jit, grad and vmap"):
        match transformation:
            case "jit":
                eqx.filter_jit(save)(model)
            case "vmap":
                eqx.filter_vmap(save)(jax.tree.map(lambda x: x[None], model))
            case "grad":
                eqx.filter_grad(save)(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first, second", [("llama", "bert"), ("bert", "t5"), ("t5", "gpt2")])
def test_saving_over_another_checkpoint(first, second, made, tmp_path):
    from_pretrained(made(first)).save_pretrained(tmp_path, max_shard_bytes=3000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_kept(from_pretrained(made(second)), tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_saving_over_its_own_checkpoint_in_shards(made, tmp_path):
    model = from_pretrained(made("t5"))
    model.save_pretrained(tmp_path, max_shard_bytes=4000)
    again = from_pretrained(tmp_path)
    assert_kept(again, tmp_path)
    np.testing.assert_array_equal(outputs(again), outputs(model))


def test_places_that_cannot_be_written_to(made, tmp_path):
    model = from_pretrained(made("gpt2"))
    for path in (None, 3, "", b"x"):
        with pytest.raises(ValueError, match="saved in a directory"):
            model.save_pretrained(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "locked").mkdir(mode=0o500)
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        with pytest.raises(PermissionError):
            model.save_pretrained(tmp_path / "locked")
    for size in (0, -1, 1e9, "5GB", True):
        with pytest.raises(ValueError, match="max_shard_bytes"):
            model.save_pretrained(tmp_path / "new", max_shard_bytes=size)


def test_a_checkpoint_without_generation_config_keeps_its_ids(changed, tmp_path):
    """In transformers too, which reads no ids of config.json where there is another file."""
    directory = changed("marian", {"forced_eos_token_id": 9})
    (directory / "generation_config.json").unlink()
    from_pretrained(directory).save_pretrained(tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    expected = {"bos": 1, "eos": 7, "pad": 3, "decoder_start": 5, "forced_eos": 9}
    assert written == {f"{name}_token_id": value for name, value in expected.items()}


# Models built here.

SIZES = (61, 16, 2, 2, 24, 40, 0.0)
LIKE_LLAMA = {
    "norm": RMSNorm,
    "feed_forward": GatedFeedForward,
    "use_bias": False,
    "position": RotaryPositionalEncoding(),
    "embedding_scale": 1.0,
}
STRANGERS = [
    (TransformerLM, SIZES, {}, "gpt2: position is 'sinusoid', not 'learned'"),
    (TransformerLM, SIZES, LIKE_LLAMA | {"softcap": 5.0}, "llama: softcap is 5.0, not None"),
    (TransformerLM, SIZES, LIKE_LLAMA | {"norm_first": False}, "placement is 'post', not 'pre'"),
    (
        TransformerLM,
        SIZES,
        LIKE_LLAMA | {"per_layer": lambda i: {"attention_scale": 1 / (i + 1)}},
        r"llama: attention_scale is \(1.0, 0.5\)",
    ),
    (Transformer, (61, *SIZES[:3], 2, *SIZES[3:]), {}, "marian: placement is 'pre', not 'post'"),
    (TransformerEncoder, SIZES, {"learnable_pos": True, "norm_first": False}, "bert: embedding_"),
]


@pytest.mark.few(3)
@pytest.mark.parametrize("model, sizes, options, words", STRANGERS)
def test_models_of_no_family(model, sizes, options, words, tmp_path):
    """Only the nearest families are told, of each what is different."""
    built = model(*sizes, **options, key=jax.random.key(0))
    with pytest.raises(ValueError, match=words) as caught:
        built.save_pretrained(tmp_path / "new")
    assert str(caught.value).count("\n") == 3 and len(str(caught.value)) < 900
    assert not (tmp_path / "new").exists()


# What one does with a model that was loaded.


def test_equal_models_are_compiled_once(made, changed):
    traces = []

    @eqx.filter_jit
    def apply(model, tokens):
        traces.append(0)
        return model(tokens)

    models = [from_pretrained(path) for path in (made("llama"), made("llama"), changed("llama"))]
    wanted = [apply(model, jnp.asarray(TOKENS)) for model in models]
    assert len(traces) == 1
    assert all((x == wanted[0]).all() for x in wanted)
    structures = [jax.tree.structure(model) for model in models]
    assert structures[0] == structures[1] == structures[2]
    assert len(set(map(hash, structures))) == 1
    mean = jax.tree.map(lambda *x: sum(x) / 3, *models)  # the average of checkpoints
    np.testing.assert_allclose(outputs(mean), wanted[0], atol=1e-4, rtol=0)


def test_other_special_tokens_make_another_structure(made, changed):
    """A compiled `generate` must not end with another checkpoint's token."""
    directory = changed("llama")
    (directory / "generation_config.json").write_text('{"eos_token_id": 9}')
    one, other = (jax.tree.structure(from_pretrained(x)) for x in (made("llama"), directory))
    assert one != other


def test_origin_holds_no_tokenizer(changed):
    directory = changed("llama")
    (directory / "tokenizer.json").write_text(json.dumps({"a": "x" * MEGABYTE}))
    model = from_pretrained(directory)
    assert len(pickle.dumps(model.origin)) < 5000
    assert len(repr(model)) < 20000 and "rms_norm_eps" not in repr(model)


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gemma3", "mixtral", "albert"])
def test_copies_of_loaded_models(name, made):
    model = from_pretrained(made(name))
    with tempfile.TemporaryFile() as file:
        eqx.tree_serialise_leaves(file, model)
        file.seek(0)
        zeros = jax.tree.map(jnp.zeros_like, model)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            eqx.tree_deserialise_leaves(file, zeros),
        ]
    for same in copies:
        assert jax.tree.structure(same) == jax.tree.structure(model)
        np.testing.assert_array_equal(outputs(same), outputs(model))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral", "gemma3", "bert"])
def test_training_of_loaded_models(name, made):
    model, losses, traces = train(from_pretrained(made(name)), 8)
    assert traces == 1
    assert losses[-1] < 0.5 * losses[0]
    assert model.origin == from_pretrained(made(name)).origin


def test_vmap_over_loaded_models(made):
    models = [from_pretrained(made("llama")), train(from_pretrained(made("llama")), 1)[0]]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    both = eqx.filter_vmap(lambda model: model(jnp.asarray(TOKENS)))(stacked)
    for got, model in zip(both, models, strict=True):
        np.testing.assert_allclose(got, outputs(model), atol=1e-4, rtol=0)


def test_generate_ends_as_the_checkpoint_says(made, changed):
    new, length = 8, TOKENS.shape[1]
    endless = np.asarray(from_pretrained(made("llama")).generate(TOKENS, new, end_token=[]))
    end = int(endless[0, length + 3])
    stop = list(endless[0, length:]).index(end) + 1
    directory = changed("llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, end]}))
    model = from_pretrained(directory)
    ended = np.asarray(model.generate(TOKENS, new))[0, length:]
    assert list(ended) == [*endless[0, length : length + stop], *[3] * (new - stop)]
    streamed = [int(token[0]) for token in model.stream(TOKENS, new)]
    assert streamed == list(ended[: len(streamed)])
    np.testing.assert_array_equal(model.generate(TOKENS, new, end_token=[]), endless)
    other = int(endless[0, length])
    assert (
        list(np.asarray(model.generate(TOKENS, new, end_token=other))[0, length + 1 :]) == [3] * 7
    )


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_ways_to_generate(name, made):
    """Streams, beams and scores agree with what is generated and with the model."""
    model = from_pretrained(made(name))
    given, length = (TOKENS.shape[1], 5) if isinstance(model, TransformerLM) else (1, 6)
    greedy = np.asarray(model.generate(TOKENS, length, end_token=[]))
    stream = np.stack(list(model.stream(TOKENS, length, end_token=[])), 1)
    np.testing.assert_array_equal(stream, greedy[:, given:])
    sampled = model.generate(TOKENS, length, end_token=[], temperature=1e-3, key=jax.random.key(0))
    np.testing.assert_array_equal(sampled, greedy)
    beams = model.generate(TOKENS, length, end_token=[], num_beams=3, length_penalty=0.0)
    sequences = np.stack([greedy, beams])
    score = model.score if given > 1 else partial(model.score, TOKENS)
    greedy_score, beams_score = (np.asarray(score(x))[:, given:].sum(-1) for x in sequences)
    assert (beams_score > greedy_score - 1e-4).all()
    if given > 1:
        log_probs = np.asarray(model(greedy))[:, :-1]
        picked = np.take_along_axis(log_probs, greedy[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(score(greedy)[:, 1:], picked, atol=1e-4, rtol=0)
