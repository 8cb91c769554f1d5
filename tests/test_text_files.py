"""The files of sentence-transformers: their older and newer spellings, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import TextClassifier, TextEmbedder
from jaxformers.files.hub import write_tensors
from jaxformers.heads import unit_length
from jaxformers.text.sentence_transformers import POOLINGS, READING, describe

pytest.importorskip("safetensors")
PLACE = "sentence_transformers.models"


def write(directory, kinds=("Transformer", "Pooling"), **files):
    """Writes the files by name, those of modules in their folders, and returns the directory."""
    listed = []
    for i, kind in enumerate(kinds):
        path = "" if i == 0 else f"{i}_{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": f"{PLACE}.{kind}"})
        (directory / path).mkdir(exist_ok=True)
    (directory / "modules.json").write_text(json.dumps(listed))
    for name, content in files.items():
        path = directory / name.replace("__", "/")
        path = path / "config.json" if path.is_dir() else path.with_name(path.name + ".json")
        path.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("theirs", POOLINGS)
def test_spellings_of_pooling(tmp_path, theirs):
    older = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
    older |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "lasttoken": "lasttoken"}
    flag = f"pooling_mode_{older.get(theirs, 'weightedmean_tokens')}"
    flags = {"word_embedding_dimension": 12, "pooling_mode_mean_tokens": False, flag: True}
    for settings in (
        flags,
        {"embedding_dimension": 12, "pooling_mode": theirs},
        {"embedding_dimension": 12, "pooling_mode": [theirs]},
        {"pooling_mode": theirs, "pooling_mode_mean_tokens": True, "include_prompt": False},
    ):
        described = describe(write(tmp_path, **{"1_Pooling": settings}))
        assert described.pooling == (POOLINGS[theirs],)
        assert described.include_prompt is settings.get("include_prompt", True)


def test_several_poolings_are_joined_in_their_order(tmp_path):
    flags = dict.fromkeys(("pooling_mode_mean_tokens", "pooling_mode_cls_token"), True)
    assert describe(write(tmp_path, **{"1_Pooling": flags})).pooling == ("first", "mean")
    modes = {"pooling_mode": ["mean", "cls"]}
    assert describe(write(tmp_path, **{"1_Pooling": modes})).pooling == ("mean", "first")
    assert describe(write(tmp_path, **{"1_Pooling": {}})).pooling == ("mean",)


@pytest.mark.parametrize("name", READING)
def test_how_texts_are_read(tmp_path, name):
    write(tmp_path, **{name.removesuffix(".json"): {"max_seq_length": 77, "do_lower_case": True}})
    described = describe(tmp_path)
    assert (described.max_seq_length, described.do_lower_case) == (77, True)


def test_settings_of_the_newest_version(tmp_path):
    reading = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "last_hidden_state"}
        },
        "module_output_name": "token_embeddings",
        "unpad_inputs": False,
        "processor_kwargs": {"padding_side": "left", "model_max_length": 55},
        "model_kwargs": {"torch_dtype": "bfloat16", "add_pooling_layer": False},
    }
    model = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "find: ", "document": None},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
        "truncate_dim": 5,
    }
    write(tmp_path, sentence_bert_config=reading, config_sentence_transformers=model)
    described = describe(tmp_path)
    assert described.max_seq_length == 55
    assert described.prompts == {"query": "find: ", "document": ""}
    assert (described.default_prompt, described.similarity) == ("query", "dot")
    assert described.truncate_dim == 5


MODULES, BERT, SETTINGS = "modules", "sentence_bert_config", "config_sentence_transformers"
REFUSED = [
    ("must list Transformer and Pooling first, got Transformer", {}, ("Transformer",)),
    ("StaticEmbedding, Normalize", {}, ("StaticEmbedding", "Normalize")),
    ("holds a CNN, which is not handled", {}, ("Transformer", "Pooling", "CNN")),
    ("holds a Router", {}, ("Transformer", "Pooling", "Router")),
    ("holds a Pooling, which", {}, ("Transformer", "Pooling", "Pooling")),
    ("must be a list of modules", {MODULES: {}}, ()),
    ("must be a list of modules", {MODULES: []}, ()),
    ("must be a list of modules", {MODULES: [3]}, ()),
    ("whose code is elsewhere", {MODULES: [{"type": "custom_st.Transformer", "path": ""}]}, ()),
    ("path must name a folder", {MODULES: [{"type": f"{PLACE}.Pooling", "path": "../x"}]}, ()),
    ("path must name a folder", {MODULES: [{"type": f"{PLACE}.Pooling", "path": "/etc"}]}, ()),
    ("path must name a folder", {MODULES: [{"type": f"{PLACE}.Pooling"}]}, ()),
    ("pooling_mode must be of cls", {"1_Pooling": {"pooling_mode": "median"}}, None),
    ("pooling_mode must be of cls", {"1_Pooling": {"pooling_mode": [["cls"]]}}, None),
    ("pooling_mode must be of cls", {"1_Pooling": {"pooling_mode": 3}}, None),
    ("include_prompt must be true or false", {"1_Pooling": {"include_prompt": "no"}}, None),
    ("not handled: .'attention_pooling'", {"1_Pooling": {"attention_pooling": 1}}, None),
    ("max_seq_length must be a number above 0", {BERT: {"max_seq_length": -3}}, None),
    ("max_seq_length must be a number above 0", {BERT: {"max_seq_length": "many"}}, None),
    ("do_lower_case must be true or false", {BERT: {"do_lower_case": 1}}, None),
    ("setting that is not handled: chunking = 3", {BERT: {"chunking": 3}}, None),
    ("query_expansion must be None", {BERT: {"query_expansion": {"length": 32}}}, None),
    ("transformer_task must be", {BERT: {"transformer_task": "fill-mask"}}, None),
    ("modality_config must be", {BERT: {"modality_config": {"message": {}}}}, None),
    ("model_kwargs that are not handled", {BERT: {"model_args": {"num_layers": 3}}}, None),
    ("processor_kwargs must be an object", {BERT: {"tokenizer_args": [3]}}, None),
    ("prompts must be an object of texts", {SETTINGS: {"prompts": {"query": 3}}}, None),
    ("default_prompt_name must be one of", {SETTINGS: {"default_prompt_name": "query"}}, None),
    ("similarity_fn_name must be one of", {SETTINGS: {"similarity_fn_name": "maxsim"}}, None),
    ("truncate_dim must be a number above 0", {SETTINGS: {"truncate_dim": 0}}, None),
    ("TextClassifier reads it", {SETTINGS: {"model_type": "CrossEncoder"}}, None),
    ("Nothing here reads it", {SETTINGS: {"model_type": "SparseEncoder"}}, None),
]


@pytest.mark.parametrize(("message", "files", "modules"), REFUSED)
def test_what_is_refused(tmp_path, message, files, modules):
    write(tmp_path, modules or ("Transformer", "Pooling"), **files)
    with pytest.raises(ValueError, match=message):
        describe(tmp_path)


def dense(directory, tensors, **settings):
    """Writes a directory with a dense layer."""
    write(directory, ("Transformer", "Pooling", "Dense"), **{"2_Dense": settings})
    arrays = {name: jnp.full(shape, 0.5) for name, shape in tensors.items()}
    write_tensors(
        directory / "2_Dense",
        [(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()],
    )
    return directory


def test_dense_layers(tmp_path):
    x, sizes = jnp.ones((1, 4)), {"in_features": 4, "out_features": 3}
    both = {"linear.weight": (3, 4), "linear.bias": (3,)}
    [layer] = describe(dense(tmp_path, both, **sizes)).layers
    np.testing.assert_allclose(layer(x), np.tanh(np.full((1, 3), 2.5)), rtol=1e-6)
    plain = {"activation_function": "torch.nn.modules.linear.Identity"}
    [layer] = describe(dense(tmp_path, both, **sizes, **plain)).layers
    np.testing.assert_allclose(layer(x), np.full((1, 3), 2.5), rtol=1e-6)
    added = {**both, "residual.weight": (3, 4)}
    [layer] = describe(dense(tmp_path, added, **sizes, **plain, use_residual=True)).layers
    np.testing.assert_allclose(layer(x), np.full((1, 3), 4.5), rtol=1e-6)
    for tensors, settings, message in (
        (both, {"bias": False}, "must have the tensors"),
        ({"linear.weight": (3, 4)}, {}, "must have the tensors"),
        (both, {"use_residual": True}, "must have the tensors"),
        (both, {"activation_function": "my.Act"}, "activation_function must be one of Identity"),
        (both, {"activation_function": 3}, "activation_function must be one of Identity"),
        (both, {"module_input_name": "token_embeddings"}, "must be sentence_embedding"),
        (both, {"rank": 3}, "not handled: .'rank'"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(dense(tmp_path, tensors, **sizes, **settings))


def test_layers_before_and_after_normalizing(tmp_path):
    write(tmp_path, ("Transformer", "Pooling", "Normalize", "Dropout"))
    assert describe(tmp_path).layers == (unit_length,)


@pytest.mark.usefixtures("no_shape_checker")
def test_no_directory_and_no_model(tmp_path):
    for reader in (TextEmbedder, TextClassifier):
        with pytest.raises(ValueError, match="config.json"):
            reader.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="there is no directory"):
            reader.from_pretrained("./nowhere/at/all")
        with pytest.raises(ValueError, match="must be a directory or a name"):
            reader.from_pretrained(3)
        with pytest.raises(ValueError, match="Did you mean 'max_seq_length'"):
            reader.from_pretrained(tmp_path, max_length=3)
