"""What is saved reads the same in versions 4 and 5 of transformers, and by config.json alone.

`hf_readers.py` compares outputs in both versions. Here stands what config.json must say for that.
"""

import json
import math
import shutil
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from hf_cases import CASES, FULL, MAX, SLIDING, WINDOW, D  # noqa: E402
from hf_checkpoints import load  # noqa: E402
from hf_readers import forget, outputs, part, repeat, table_of, tie, untie  # noqa: E402

from jaxformers import TransformerLM, YarnScaling, from_pretrained  # noqa: E402
from jaxformers.files.hub import TensorFiles  # noqa: E402
from jaxformers.hf.architecture.describe import describe  # noqa: E402
from jaxformers.hf.architecture.output import Tied  # noqa: E402
from jaxformers.hf.architecture.rope import OLDER_KEYS  # noqa: E402
from jaxformers.hf.families import FAMILIES  # noqa: E402
from jaxformers.hf.load import read_settings  # noqa: E402
from jaxformers.hf.tensors import FileTensors  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
torch.set_num_threads(1)
TOKENS = np.array([[8, 9, 30, 12, 25, 33, 41, 50, 11], [13, 14, 52, 44, 20, 19, 18, 9, 23]])


@pytest.fixture
def changed(made, tmp_path):
    """A function that gives a copy of a checkpoint with other settings; None takes one away."""

    def directory(name, **settings):
        path = tmp_path / "changed"
        shutil.copytree(made(name), path)
        entries = json.loads((path / "config.json").read_text()) | settings
        entries = {key: x for key, x in entries.items() if x is not None}
        (path / "config.json").write_text(json.dumps(entries))
        return path

    return directory


def save(model, directory):
    """The config.json that is written, and the tensors' names."""
    model.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text()), TensorFiles(directory).names


def same(a, b):
    """Whether two models are the same but for the files that they came from."""
    return bool(eqx.tree_equal(forget(a), forget(b)))


def one_token_more(model):
    """The same for a larger vocabulary, which no entry but its size says."""
    table = model.embedding.token_embedding.weight
    new = jnp.concatenate([table, table[:1]])
    model = eqx.tree_at(lambda m: m.embedding.token_embedding.weight, model, new)
    if model.output.w is not None:
        w = jnp.concatenate([model.output.w, model.output.w[:, :1]], 1)
        model = eqx.tree_at(lambda m: m.output.w, model, w)
    if model.output.b is not None:
        b = jnp.concatenate([model.output.b, model.output.b[:1]])
        model = eqx.tree_at(lambda m: m.output.b, model, b)
    return model


# Rotary positions and windows.

PLAIN = {"rope_type": "default", "rope_theta": 50.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": MAX}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
        "original_max_position_embeddings": MAX}  # fmt: skip
YARN_FACTOR = 0.1 * math.log(4) + 1
MSCALE_FACTOR = (0.15 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
LONG = {"short_factor": [1.1, 1.7], "long_factor": [2.3, 4.1]}
HALF = {"partial_rotary_factor": 0.5}
THETA = {"rope_theta": 50.0}

# By case: what config.json must say, in both spellings; {...} are parts of what an entry holds.
WORDS = {
    "llama": THETA | {"rope_parameters": PLAIN, "rope_scaling": None},
    "llama_linear": THETA | {"rope_parameters": LINEAR | THETA, "rope_scaling": LINEAR},
    "llama_dynamic": THETA
    | {"rope_parameters": DYNAMIC, "rope_scaling": DYNAMIC, "max_position_embeddings": 8},
    "llama_llama3": THETA | {"rope_parameters": LLAMA3 | THETA, "rope_scaling": LLAMA3},
    "llama_yarn": THETA
    | {"rope_parameters": YARN, "rope_scaling": YARN | {"attention_factor": YARN_FACTOR}},
    "llama_yarn_mscale": THETA
    | {"rope_scaling": YARN | {"attention_factor": MSCALE_FACTOR, "truncate": False}},
    "qwen3_tied": THETA | {"rope_scaling": YARN},
    "phi3": THETA | HALF | {"rope_parameters": PLAIN | HALF},
    "phi3_longrope_long": THETA
    | HALF
    | {"rope_parameters": LONG | HALF, "original_max_position_embeddings": 2},
    "gpt_neox": {"rotary_emb_base": 50.0, "rotary_pct": 0.5, "rope_parameters": PLAIN | HALF},
    **{
        name: THETA | HALF | {"rope_parameters": PLAIN | HALF}
        for name in ("phi", "glm", "stablelm", "nemotron")
    },
    **{
        name: THETA | {"rope_parameters": PLAIN}
        for name in ("falcon", "cohere", "cohere2", "helium", "smollm3", "ministral", "exaone4")
    },
    "olmo3": THETA
    | {"rope_scaling": YARN, "rope_parameters": {FULL: YARN | THETA, SLIDING: PLAIN}},
    "gemma3": {
        "rope_theta": 90.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 90.0},
            SLIDING: {"rope_type": "default", "rope_theta": 20.0},
        },
        "sliding_window_pattern": 2,
        "sliding_window": WINDOW,
    },
    "qwen2": {"max_window_layers": 1, "sliding_window": WINDOW, "use_sliding_window": True},
}
ENCODER_WORDS = {
    "modernbert": {
        "global_rope_theta": 90.0,
        "local_rope_theta": 20.0,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 90.0},
            SLIDING: {"rope_type": "default", "rope_theta": 20.0},
        },
        "global_attn_every_n_layers": 2,
        "local_attention": 6,
    },
    "nomic_bert": {"rope_theta": 1000.0, "rope_parameters": {"rope_theta": 1000.0}},
}
OTHER_WORDS = {
    "qwen3_moe": {"num_experts": 5, "num_local_experts": 5},
    "gemma_one_key_head": {"hidden_act": "gelu_pytorch_tanh"},
}
# Spelled as by version 4: its words stay, and those of version 5 come to them.
OLDER = {
    "llama_older_file": THETA
    | {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": LINEAR | THETA},
    "gemma3_older_file": WORDS["gemma3"] | {"layer_types": [SLIDING, FULL]},
    "gpt_neox_sequential": {
        "rotary_emb_base": 50.0,
        "rotary_pct": 0.25,
        "rope_parameters": PLAIN | {"partial_rotary_factor": 0.25},
    },
    "modernbert_plain": {
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "global_attn_every_n_layers": 3,
        "layer_types": [FULL, SLIDING, SLIDING, FULL],
        "rope_parameters": {FULL: {"rope_theta": 160000.0}, SLIDING: {"rope_theta": 10000.0}},
    },
}


def assert_says(config, words):
    for key, value in words.items():
        if isinstance(value, dict):
            assert config[key].keys() >= value.keys(), key
            assert_says(config[key], value)
        elif isinstance(value, float):
            assert config[key] == pytest.approx(value, rel=1e-12), key
        else:
            assert config.get(key) == value, key


ALL_WORDS = WORDS | ENCODER_WORDS | OTHER_WORDS | OLDER


@pytest.mark.parametrize("name", ALL_WORDS)
def test_both_spellings_are_written(name, made, tmp_path):
    config, _ = save(from_pretrained(made(name)), tmp_path)
    assert_says(config, ALL_WORDS[name])
    assert config["dtype"] == config["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", WORDS | OTHER_WORDS)
def test_both_spellings_are_written_of_a_changed_model(name, made, tmp_path):
    config, _ = save(one_token_more(from_pretrained(made(name))), tmp_path)
    assert config["vocab_size"] == 62
    assert_says(config, ALL_WORDS[name])


@pytest.mark.parametrize("name", CASES)
def test_either_spelling_alone_tells_the_model(name, made, tmp_path):
    """And whether config.json says tied is whether the file has no tensor for the output layer."""
    model = from_pretrained(made(name))
    config, names = save(model, tmp_path)
    family = FAMILIES[config["model_type"]]
    for keys in (family.newer, OLDER_KEYS, ()):
        entries = {key: x for key, x in config.items() if key not in keys}
        stored = FileTensors(family, TensorFiles(tmp_path))
        assert read_settings(family, entries, stored) == describe(model), keys
    if model.output is not None and name != "eurobert":  # which knows no tied output layers
        [head] = {x.head for x in family.settings if isinstance(x, Tied)} or {"lm_head.weight"}
        assert config["tie_word_embeddings"] is (head not in names)


def test_phi3_says_long_scalings_in_three_words(made, tmp_path):
    """transformers 4 takes no fourth; the factor on the scores follows from the lengths."""
    expected = LONG | {"type": "longrope"}
    model = from_pretrained(made("phi3_longrope_long"))
    for x in (model, one_token_more(model), forget(model)):
        config, _ = save(x, tmp_path)
        assert config["rope_scaling"] == expected
        assert (config["original_max_position_embeddings"], config["model_type"]) == (2, "phi3")
        assert config["max_position_embeddings"] == MAX


def test_stale_words_of_the_other_spelling_are_mended(changed, tmp_path):
    """Version 5 does not look at the older words, which may be left over from another model."""
    stale = {"rope_theta": 7.0, "rope_scaling": None}
    config, _ = save(from_pretrained(changed("llama_linear", **stale)), tmp_path / "saved")
    assert_says(config, WORDS["llama_linear"])


def test_spellings_that_contradict_each_other(changed):
    with pytest.raises(ValueError, match="rope_scaling .* rope_parameters says something else"):
        from_pretrained(changed("gemma3", rope_scaling={"rope_type": "linear", "factor": 2.0}))


def test_the_lengths_that_version_4_reads_of_long_scalings(made, tmp_path):
    """It looks for the original length outside of the dictionary, in any family."""
    long = {"rope_type": "longrope", "rope_theta": 50.0, "short_factor": [1.0] * 5,
            "long_factor": [2.0] * 5, "original_max_position_embeddings": 10}  # fmt: skip
    shutil.copytree(made("llama"), tmp_path / "long")
    path = tmp_path / "long" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": long}))
    config, _ = save(from_pretrained(tmp_path / "long"), tmp_path / "saved")
    assert config["original_max_position_embeddings"] == 10
    factor = math.sqrt(1 + math.log(4) / math.log(10))  # of 40 tokens for 10
    assert_says(config["rope_scaling"], {"attention_factor": factor, "short_factor": [1.0] * 5})


def test_what_version_4_has_no_words_for_is_told(changed, made, tmp_path):
    scaled = {FULL: PLAIN, SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 20.0}}
    model = from_pretrained(changed("gemma3", rope_parameters=scaled))
    with pytest.warns(UserWarning, match="before version 5.* gemma3_text for another .*: rope is"):
        model.save_pretrained(tmp_path / "scaled")
    types = [SLIDING, FULL, SLIDING]
    shutil.rmtree(tmp_path / "changed")
    model = from_pretrained(changed("modernbert", layer_types=types))
    with pytest.warns(UserWarning, match="modernbert for another .*: window is"):
        model.save_pretrained(tmp_path / "types")
    model = eqx.tree_at(lambda m: m.output.b, model, None)  # another path to the file
    with pytest.warns(UserWarning, match="modernbert for another"):
        config, _ = save(model, tmp_path / "types")
    assert "global_attn_every_n_layers" not in config and not config["decoder_bias"]


def test_a_model_built_here_says_both(tmp_path):
    position = {"scaling": YarnScaling(4.0, 10, attention_factor=1.25)}
    model = built_like_llama(position)
    config, _ = save(model, tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25}
    assert_says(config, {"rope_theta": 10000.0, "rope_scaling": yarn, "rope_parameters": yarn})
    assert config["tie_word_embeddings"] is False


def built_like_llama(position):
    from jaxformers import GatedFeedForward, RMSNorm, RotaryPositionalEncoding

    return TransformerLM(
        *(61, 16, 2, 2, 24, 40, 0.0),
        norm=RMSNorm,
        feed_forward=GatedFeedForward,
        use_bias=False,
        position=RotaryPositionalEncoding(**position),
        embedding_scale=1.0,
        key=jax.random.key(0),
    )


def test_files_of_version_4_with_both_words_for_windows(changed, made):
    """Cohere 2's from version 4.57 repeat the pattern that their layer_types say."""
    model = from_pretrained(changed("cohere2", _sliding_window_pattern=2))
    assert describe(model) == describe(from_pretrained(made("cohere2")))


def test_positions_without_words_are_kept_as_the_file_has_them(changed, tmp_path):
    """A SmolLM3 none of whose layers rotates, whose base nobody can know from the model."""
    model = from_pretrained(changed("smollm3", no_rope_layers=[0, 0]))
    config, _ = save(model, tmp_path / "saved")
    assert config["no_rope_layers"] == [0, 0]
    assert same(from_pretrained(tmp_path / "saved"), model)


def test_olmo3_of_version_4_has_one_base(changed):
    older = {"rope_parameters": None, "rope_theta": 50.0, "rope_scaling": YARN}
    model = from_pretrained(changed("olmo3", **older))
    sliding, full = (layer.self_attention.position for layer in model.decoder.layers)
    assert (sliding.theta, sliding.scaling, full.theta) == (50.0, None, 50.0)
    assert full.scaling.factor == 4.0


# Output layers that are tied or not.

TIED = [
    *("gpt2", "gpt_neo", "opt", "opt_post_norm", "bloom", "mpt", "falcon", "llama_tied"),
    *("gpt_neox_sequential", "gemma_one_key_head", "smollm3", "cohere", "starcoder2"),
    *("t5", "mt5", "bart", "mbart", "marian_shared", "pegasus", "m2m_100"),
    *("bert", "bert_pretraining", "roberta", "distilbert", "electra", "albert", "mpnet"),
    *("modernbert", "nomic_bert"),
]
HEADS = {
    "gpt_neox_sequential": "embed_out.weight",
    "bert": "cls.predictions.decoder.weight",
    "bert_pretraining": "cls.predictions.decoder.weight",
    "nomic_bert": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
    "mpnet": "lm_head.decoder.weight",
    "albert": "predictions.decoder.weight",
    "distilbert": "vocab_projector.weight",
    "electra": "generator_lm_head.weight",
    "modernbert": "decoder.weight",
}
# What readers that tie nothing look for beside it.
TABLES = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
BESIDE = {
    **dict.fromkeys(("bart", "mbart", "marian_shared", "pegasus", "m2m_100"), TABLES),
    **dict.fromkeys(("bert", "bert_pretraining", "nomic_bert"), ["cls.predictions.bias"]),
    **dict.fromkeys(("roberta", "mpnet"), ["lm_head.bias"]),
    "albert": ["predictions.bias"],
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_that_got_a_head_is_saved_as_untied(name, made, tmp_path):
    model = untie(from_pretrained(made(name)))
    config, names = save(model, tmp_path)
    head = HEADS.get(name, "lm_head.weight")
    assert config["tie_word_embeddings"] is False and head in names
    assert set(BESIDE.get(name, ())) <= set(names)
    if name == "t5":
        return  # whose weights hold the scale: see below
    again = from_pretrained(tmp_path)
    assert bool(eqx.tree_equal(again.output, model.output)) and describe(again) == describe(model)
    np.testing.assert_array_equal(table_of(again), table_of(model))
    np.testing.assert_array_equal(TensorFiles(tmp_path).read(head).T, model.output.w)


@pytest.mark.parametrize("name", ["gpt2", "t5", "mt5", "bart", "marian_shared", "bert", "albert"])
def test_untied_models_read_the_same_in_transformers(name, made, tmp_path):
    model = untie(from_pretrained(made(name)))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        tokens = {"input_ids": torch.tensor(TOKENS)}
        reference = load(name, tmp_path)
        if reference.config.is_encoder_decoder:
            tokens["decoder_input_ids"] = tokens["input_ids"][:, :5]
        wanted = reference(**tokens)[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(outputs(model), wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(outputs(from_pretrained(tmp_path)), wanted, atol=1e-4, rtol=0)


def test_the_scale_of_t5_goes_into_a_head_of_its_own(made, tmp_path):
    """Version 4 of transformers scales the logits if, and only if, config.json says tied."""
    model = untie(from_pretrained(made("t5")))
    assert model.output.scale == D**-0.5
    config, _ = save(model, tmp_path)
    assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (False, False)
    again = from_pretrained(tmp_path)
    assert again.output.scale == 1.0 and not again.output.tied
    np.testing.assert_allclose(again.output.w, model.output.w * D**-0.5, rtol=1e-6)


def test_a_tied_head_of_t5_without_the_scale_is_written(made, tmp_path):
    for name in ("t5_gated", "mt5_untied", "mt5"):
        model = from_pretrained(made(name))
        model = model if model.output.tied else tie(model)
        config, names = save(model, tmp_path)
        assert config["tie_word_embeddings"] is False and "lm_head.weight" in names, name
        files = TensorFiles(tmp_path)
        np.testing.assert_array_equal(files.read("lm_head.weight"), files.read("shared.weight"))
        again = from_pretrained(tmp_path)
        assert again.output.tied and same(again, model)


UNTIED = ["llama", "gpt2_untied", "gptj", "phi", "t5_gated", "mt5_untied", "starcoder2_untied"]


@pytest.mark.parametrize("name", UNTIED)
def test_a_head_that_equals_the_table_stays_one(name, made, tmp_path):
    """It is trained apart from the table, so that it is not merged where the file says untied."""
    model = repeat(from_pretrained(made(name)))
    config, names = save(model, tmp_path)
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in names
    again = from_pretrained(tmp_path)
    # T5's files of version 5 never say untied, so that there an equal head is a tied one.
    assert again.output.tied == (name in ("t5_gated", "mt5_untied"))
    np.testing.assert_array_equal(table_of(again).T, model.output.w)


@pytest.mark.parametrize("name", ["llama", "gpt2_untied", "gptj", "starcoder2_untied"])
def test_an_untied_model_that_is_tied_is_saved_as_tied(name, made, tmp_path):
    model = tie(from_pretrained(made(name)))
    config, names = save(model, tmp_path)
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in names
    assert same(from_pretrained(tmp_path), model)


def test_files_that_say_tied_and_hold_two(changed, tmp_path):
    """As version 5 writes them: what is in the file decides, and is told when it is saved again."""
    model = from_pretrained(changed("llama", tie_word_embeddings=True))
    assert not model.output.tied
    config, names = save(model, tmp_path / "saved")
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in names


def test_marian_with_two_tables(made, tmp_path):
    """Whether the tables are shared and whether the output layer is tied are two things."""
    model = from_pretrained(made("marian_shared"))
    for x, tied, shared in [
        (model, True, True),
        (untie(model), False, True),
        (part(model), True, False),
        (untie(part(model)), False, False),
    ]:
        config, names = save(x, tmp_path)
        said = (config["tie_word_embeddings"], config["share_encoder_decoder_embeddings"])
        assert said == (tied, shared)
        assert ("model.shared.weight" in names) == shared
        assert same(from_pretrained(tmp_path), x)


def test_a_trained_head_is_saved_as_untied(made, tmp_path):
    """Training leaves the config of the origin behind, which says that it is tied."""
    model = untie(from_pretrained(made("gemma_one_key_head")))
    trained = jax.tree.map(lambda x: 0.9 * x - 0.01, model)
    config, _ = save(trained, tmp_path)
    assert config["tie_word_embeddings"] is False and same(from_pretrained(tmp_path), trained)
    assert json.loads(trained.origin.config).get("tie_word_embeddings", True) is True


def test_nothing_is_said_where_all_versions_agree(made, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        for name in ("llama", "gemma3", "modernbert", "t5"):
            from_pretrained(made(name)).save_pretrained(tmp_path / name)
    assert not caught
