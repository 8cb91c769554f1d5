"""Checkpoints without an output layer: hidden states as under transformers, and the files back."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

from hf_cases import BARE, HEADLESS, SPECIAL, H, V  # noqa: E402

import jaxformers  # noqa: E402
from jaxformers import (  # noqa: E402
    GatedFeedForward,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    from_pretrained,
)
from jaxformers.cli.compare import table, verify  # noqa: E402
from jaxformers.cli.reference import (  # noqa: E402
    Batch,
    load_reference,
    torch_without_gradients,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("quick_compilation")
# A whole row, one with padding on the left and one with padding on the right.
TOKENS = np.array([[8, 9, 30, 12, 25, 33], [3, 3, 13, 14, 52, 44], [20, 19, 18, 9, 3, 3]])
REAL = TOKENS != SPECIAL["pad_token_id"]


def hidden(model):
    tokens, real = jnp.asarray(TOKENS), jnp.asarray(REAL)
    if isinstance(model, TransformerEncoder):
        return np.asarray(model(tokens, padding_mask=real))
    return np.asarray(model.forward(tokens, padding_mask=real)[0])


def reference(directory, model):
    """What transformers reads, with its hidden states."""
    with torch_without_gradients():
        theirs = load_reference(directory, model, "float32")
        if theirs.kind is not TransformerEncoder and model.output is not None:
            theirs = theirs._replace(model=theirs.model.base_model)
        return theirs, theirs([Batch(TOKENS, REAL)])["hidden states"]


def assert_same_hidden(model, directory):
    theirs, wanted = reference(directory, model)
    np.testing.assert_allclose(hidden(model)[REAL], wanted[REAL], rtol=1e-5, atol=1e-5)
    return theirs


def read(directory):
    """The tensors of a checkpoint, and the classes that its config.json names."""
    config = json.loads((directory / "config.json").read_text())
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    return tensors, config.get("architectures")


def assert_saved_as_it_came(model, path, directory, ignored=()):
    model.save_pretrained(directory)
    (wanted, classes), (got, written) = read(path), read(directory)
    assert got.keys() == wanted.keys() - set(ignored) and written == classes
    for name, x in got.items():
        assert x.dtype == wanted[name].dtype and torch.equal(x, wanted[name]), name


@pytest.mark.few(14)
@pytest.mark.parametrize("name", [x for x in HEADLESS if f"{x}".removesuffix("_headless") in BARE])
def test_decoders_give_hidden_states_and_are_saved_as_they_came(name, made, tmp_path):
    model = from_pretrained(made(name))
    assert isinstance(model, TransformerLM) and model.output is None
    theirs = assert_same_hidden(model, made(name))
    assert type(theirs.model).__name__ == HEADLESS[name].architecture
    assert_saved_as_it_came(model, made(name), tmp_path)
    assert theirs.changed(reference(tmp_path, model)[0]) == []
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("name", ["t5_encoder", "t5_encoder_gated", "mt5_encoder"])
def test_encoders_of_encoder_decoders(name, made, tmp_path):
    model = TransformerEncoder.from_pretrained(made(name))
    assert_same_hidden(model, made(name))
    assert_saved_as_it_came(model, made(name), tmp_path, HEADLESS[name].added)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == name.partition("_")[0]
    assert_same_hidden(from_pretrained(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="of shape 'encoder', which Transformer is not"):
        Transformer.from_pretrained(made(name))


@pytest.mark.parametrize("name", ["gpt2_headless", "t5_headless", "marian_headless"])
def test_verify_compares_hidden_states(name, made):
    rows = verify(made(name), sixteen_bits=name == "gpt2_headless")
    assert [row.name.split(",")[0] for row in rows[:3]] == ["hidden states"] * 3
    assert len(rows) >= 5
    assert all(row.passed for row in rows), f"\n{table(rows)}"


# Which model a file holds: with or without the prefix, tied or not, by the class in config.json.


@pytest.fixture
def variant(made, tmp_path):
    """A function that gives a Qwen3 whose file is spelled in another way."""

    def respelled(tied, prefix, architecture, head=False, entries=None):
        path = made("qwen3_tied" if tied else "qwen3")
        tensors, _ = read(path)
        tensors = {x: y for x, y in tensors.items() if head or not x.startswith("lm_head")}
        tensors = {x if prefix else x.removeprefix("model."): y for x, y in tensors.items()}
        config = json.loads((path / "config.json").read_text()) | (entries or {})
        config["architectures"] = [architecture]
        if architecture is None:
            del config["architectures"]
        target = tmp_path / "variant"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        safetensors_torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    return respelled


WHOLE, BASE = "Qwen3ForCausalLM", "Qwen3Model"


@pytest.mark.parametrize("architecture", [WHOLE, BASE, None])
@pytest.mark.parametrize("prefix", [True, False])
def test_tied_files_hold_language_models(prefix, architecture, variant, tmp_path):
    """Also where the class has no output layer: nothing of it is missing."""
    path = variant(True, prefix, architecture)
    model = from_pretrained(path)
    assert model.output.tied
    assert_same_hidden(model, path)
    assert_saved_as_it_came(model, path, tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").output.tied


@pytest.mark.parametrize(
    "prefix, architecture", [(True, BASE), (False, BASE), (False, WHOLE), (False, None)]
)
def test_untied_files_without_the_layer_hold_bare_models(prefix, architecture, variant, tmp_path):
    path = variant(False, prefix, architecture)
    model = from_pretrained(path)
    assert model.output is None
    assert_same_hidden(model, path)
    assert_saved_as_it_came(model, path, tmp_path / "saved")
    assert_same_hidden(from_pretrained(tmp_path / "saved"), tmp_path / "saved")


@pytest.mark.parametrize("architecture", [WHOLE, None])
def test_a_language_model_whose_layer_is_missing_is_refused(architecture, variant):
    with pytest.raises(ValueError, match=r'(?s)missing: lm_head.weight\n.*: \["Qwen3Model"\]'):
        from_pretrained(variant(False, True, architecture))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_layer_that_is_there_is_read(prefix, variant, tmp_path):
    """Whatever the class; what is saved is a file of the whole model then."""
    model = from_pretrained(variant(False, prefix, BASE, head=True))
    assert model.output.w.shape == (24, V)
    model.save_pretrained(tmp_path / "saved")
    tensors, classes = read(tmp_path / "saved")
    assert classes == [WHOLE] and {"lm_head.weight", "model.norm.weight"} < tensors.keys()
    again, tokens = from_pretrained(tmp_path / "saved"), jnp.asarray(TOKENS)
    np.testing.assert_array_equal(model(tokens), again(tokens))


def test_a_layer_with_a_bias_is_not_there_though_config_says_tied(made, tmp_path):
    """GPT-J's class has it, and its bare class has none."""
    path = tmp_path / "tied"
    path.mkdir()
    tensors, classes = read(made("gptj_headless"))
    config = json.loads((made("gptj_headless") / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    safetensors_torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = from_pretrained(path)
    assert model.output is None
    assert_saved_as_it_came(model, path, tmp_path / "saved")


def test_classifiers_and_projections_on_decoders_are_refused(made, tmp_path):
    path = tmp_path / "classifier"
    path.mkdir()
    tensors, _ = read(made("qwen3_headless"))
    tensors = {f"model.{name}": x for name, x in tensors.items()} | {"score.weight": torch.ones(2)}
    config = json.loads((made("qwen3_headless") / "config.json").read_text())
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (path / "config.json").write_text(json.dumps(config))
    safetensors_torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"(?s)lm_head.weight\n.*surplus: score.weight"):
        from_pretrained(path)


def test_generation_settings_of_a_bare_model_are_kept(variant, tmp_path):
    path = variant(False, False, BASE)
    (path / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 5}')
    from_pretrained(path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved == {"eos_token_id": 7, "top_k": 5}


# The encoder of a whole encoder-decoder.


@pytest.mark.parametrize("name", ["t5", "t5_gated", "mt5_headless"])
def test_the_encoder_of_a_whole_model(name, made, tmp_path):
    whole = from_pretrained(made(name))
    model = TransformerEncoder.from_pretrained(made(name))
    wanted = whole.encode(jnp.asarray(TOKENS), src_padding_mask=jnp.asarray(REAL))
    np.testing.assert_allclose(hidden(model)[REAL], np.asarray(wanted)[REAL], rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    tensors, classes = read(tmp_path)
    assert classes == ["MT5EncoderModel" if name.startswith("mt5") else "T5EncoderModel"]
    assert not any(x.startswith(("decoder", "lm_head")) for x in tensors)
    assert_same_hidden(from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("kept", [{"architectures": ["T5EncoderModel"]}, {"model_type": "t5"}])
def test_an_encoder_is_found_by_its_class_or_by_its_tensors(kept, made, tmp_path):
    config = json.loads((made("t5_encoder") / "config.json").read_text())
    del config["architectures"], config["model_type"]
    tensors, _ = read(made("t5_encoder"))
    (tmp_path / "config.json").write_text(json.dumps(config | kept))
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = from_pretrained(tmp_path)
    assert isinstance(model, TransformerEncoder)
    np.testing.assert_array_equal(hidden(model), hidden(from_pretrained(made("t5_encoder"))))


def test_a_whole_model_without_its_decoder_is_refused(made, tmp_path):
    config = json.loads((made("t5") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, _ = read(made("t5_encoder"))
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: decoder\.block"):
        from_pretrained(tmp_path)
    assert isinstance(TransformerEncoder.from_pretrained(tmp_path), TransformerEncoder)


# Models that were built here, or changed.

LLAMA = dict(
    num_kv_heads=2,
    head_dim=H,
    norm=RMSNorm,
    feed_forward=GatedFeedForward,
    use_bias=False,
    position=RotaryPositionalEncoding(),
    embedding_scale=1.0,
    dropout_rate=0.0,
)


def test_a_bare_model_that_was_built_here_is_saved(getkey, tmp_path):
    model = TransformerLM(V, 24, 6, 3, 34, output=None, key=getkey(), **LLAMA)
    model.save_pretrained(tmp_path)
    tensors, classes = read(tmp_path)
    assert classes == ["LlamaModel"] and "layers.2.mlp.up_proj.weight" in tensors
    theirs = assert_same_hidden(model, tmp_path)
    assert type(theirs.model) is transformers.LlamaModel
    np.testing.assert_array_equal(hidden(from_pretrained(tmp_path)), hidden(model))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "bart", "t5"])
def test_an_output_layer_can_be_taken_away(name, made, tmp_path):
    whole = from_pretrained(made(name))
    model = eqx.tree_at(lambda m: m.output, whole, None)
    model.save_pretrained(tmp_path)
    assert read(tmp_path)[1][0].endswith("Model")
    again = from_pretrained(tmp_path)
    assert again.output is None
    if isinstance(model, TransformerLM):
        np.testing.assert_array_equal(hidden(again), hidden(model))
        assert_same_hidden(model, tmp_path)
        return
    source, target = TOKENS[:1, ::-1], TOKENS[:1]
    pair = jnp.asarray(source), jnp.asarray(target)
    got, read_again = (x.decode(pair[1], x.encode(pair[0])) for x in (model, again))
    np.testing.assert_array_equal(got, read_again)
    with torch_without_gradients():
        wanted = load_reference(tmp_path, model, "float32")([Batch(source.copy()), Batch(target)])
    np.testing.assert_allclose(got, wanted["hidden states"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("built", [False, True])
def test_what_needs_an_output_layer_says_so_at_the_door(built, made, getkey, variant):
    model = TransformerLM(V, 24, 6, 1, 34, output=None, key=getkey(), **LLAMA)
    words = "no output layer: it gives hidden states, by model.forward"
    if not built:
        model = from_pretrained(variant(False, False, BASE))
        words = r"no output layer \(LM head\), because its checkpoint has none: .* model.forward"
    tokens = jnp.array([[8, 9, 30]])
    whole = from_pretrained(made("qwen3"))
    batch = {"tokens": tokens, "targets": tokens}
    calls = [
        lambda: model(tokens),
        lambda: model.logits(tokens),
        lambda: model.logits_of(jnp.ones((1, 2, 24))),
        lambda: model.generate(tokens, 2),
        lambda: model.generate(tokens, 2, num_beams=2),
        lambda: model.stream(tokens, 2),
        lambda: model.score(tokens),
        lambda: jaxformers.perplexity(model, tokens),
        lambda: whole.generate(tokens, 2, draft_model=model),
        lambda: jaxformers.language_model_loss(model, batch),
        lambda: jaxformers.evaluate(model, [batch], loss=jaxformers.language_model_loss),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_encoder_decoders_say_so_too(made):
    model = from_pretrained(made("t5_headless"))
    tokens = jnp.array([[8, 9, 30]])
    batch = {"src": tokens, "tgt": tokens, "targets": tokens}
    calls = [
        lambda: model(tokens, tokens),
        lambda: model.logits(tokens, tokens),
        lambda: model.generate(tokens, 4),
        lambda: model.stream(tokens, 4, 5),
        lambda: model.score(tokens, tokens),
        lambda: jaxformers.sequence_to_sequence_loss(model, batch),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no output layer .* model.decode"):
            call()


@pytest.mark.parametrize("model", [TransformerLM, TransformerEncoder])
def test_options_of_an_output_layer_that_is_not_there_are_errors(model, getkey):
    for options in ({"tie_embeddings": True}, {"use_logits_bias": False}):
        with pytest.raises(ValueError, match="for an output layer, got none"):
            model(9, 8, 2, 1, 12, output=None, key=getkey(), **options)


def test_a_native_file_holds_a_bare_model(made, tmp_path):
    path = made("qwen3_headless")
    model = from_pretrained(path)
    jaxformers.save(tmp_path / "model.safetensors", model)
    again = jaxformers.load(tmp_path / "model.safetensors")
    assert again.output is None and again.origin == model.origin
    np.testing.assert_array_equal(hidden(again), hidden(model))
    assert_saved_as_it_came(again, path, tmp_path / "saved")


def test_bare_models_are_adapted_quantized_and_scanned(made, tmp_path, getkey):
    path = made("llama_headless")
    model = from_pretrained(path)
    scanned = jaxformers.scan_layers(jaxformers.rematerialize(model))
    assert_saved_as_it_came(scanned, path, tmp_path / "scanned")
    adapted = jaxformers.lora(model, rank=2, key=getkey())
    np.testing.assert_allclose(hidden(adapted), hidden(model), rtol=1e-5, atol=1e-5)
    adapted.save_pretrained(tmp_path / "adapted")
    assert read(tmp_path / "adapted")[1] == ["LlamaModel"]
    quantized = hidden(jaxformers.quantize(model))
    assert 0 < np.abs(quantized - hidden(model)).max() < 0.5
