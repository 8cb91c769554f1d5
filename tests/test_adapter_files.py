"""Files of adapters: how they find their model, and what is wrong with a damaged one."""

import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")

from safetensors.numpy import load_file, save_file  # noqa: E402

from jaxformers import (  # noqa: E402
    Dora,
    TransformerLM,
    from_pretrained,
    load_adapter,
    lora,
    save_adapter,
    unload,
)

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def is_attention(path, weight):
    return "attention" in path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A GPT-2 that was built here, and the directory in which it is saved."""
    options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
    model = TransformerLM(17, 12, 2, 1, 20, 14, 0.0, **options, key=KEY)
    directory = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(directory)
    return from_pretrained(directory), directory


@pytest.fixture
def changed(base, tmp_path):
    """A function that gives the directory of an adapter with other entries and tensors."""
    save_adapter(lora(base[0], 3, where=is_attention, key=KEY), tmp_path / "good")

    def directory(entries=None, tensors=None):
        path = tmp_path / "changed"
        shutil.copytree(tmp_path / "good", path)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | (entries or {})))
        found = load_file(path / "adapter_model.safetensors")
        for name, x in (tensors or {}).items():
            found |= {f"base_model.model.transformer.h.0.attn.{name}": x}
        found = {name: x for name, x in found.items() if x is not None}
        save_file(found, path / "adapter_model.safetensors")
        return path

    return directory


def test_an_adapter_finds_its_model(base, tmp_path, monkeypatch):
    """By its directory, by a path beside the adapter, and not by chance."""
    model, directory = base
    adapted = lora(model, 3, kind=Dora, key=KEY)
    place = directory.parent / "adapter"
    save_adapter(adapted, place)
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(directory)
    assert (config["task_type"], config["use_dora"]) == ("CAUSAL_LM", True)
    for name in (str(directory), "../base"):
        (place / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": name})
        )
        for load in (from_pretrained, TransformerLM.from_pretrained):
            again = load(place)
            assert again.decoder.layers[0].self_attention.wq.a.shape[-1] == 9
            bare = unload(again)
            for x, y in zip(jax.tree.leaves(bare), jax.tree.leaves(model), strict=True):
                np.testing.assert_array_equal(x, y)
    for entries, words in [
        ({"base_model_name_or_path": None}, r"names no model in .*load_adapter\(model, "),
        ({"base_model_name_or_path": "./gone"}, "there is no directory 'gone'"),
        ({"revision": "v2"}, "is for the revision 'v2' of"),
    ]:
        (place / "adapter_config.json").write_text(json.dumps(config | entries))
        with pytest.raises(ValueError, match=words):
            from_pretrained(place)


def test_scales_and_names(base, changed):
    model, path = base[0], changed()
    both = load_adapter(load_adapter(model, path), path, name="fr", scale=0.5)
    wq = both.decoder.layers[0].self_attention.wq
    assert (wq.name, wq.base.name) == ("fr", "default") and wq.scale == wq.base.scale / 2
    with pytest.raises(ValueError, match="wq has an adapter 'fr' already"):
        load_adapter(both, path, name="fr")
    with pytest.raises(ValueError, match=r"adapters \('default', 'fr'\): pass name="):
        save_adapter(both, path)
    save_adapter(both, path, name="fr")
    assert load_adapter(model, path).decoder.layers[0].self_attention.wq.scale == wq.scale


A, B = "c_attn.lora_A.weight", "c_attn.lora_B.weight"
ZEROS = np.zeros
TENSORS = {
    "a half is missing": ({A: None}, "1 without the other half: 'transformer.h.0.attn.c_attn'"),
    "a module is missing": ({A: None, B: None}, "1 missing for modules that target_modules names"),
    "another rank": ({A: ZEROS((4, 12), "f4")}, r"shape: .*c_attn A \(4, 12\) for \(9, 12\)"),
    "another width": ({B: ZEROS((9, 9), "f4")}, r"c_attn B \(9, 9\) for \(36, 9\)"),
    "integers": ({A: ZEROS((9, 12), "i4")}, "c_attn A is of int32"),
    "not finite": ({A: np.full((9, 12), np.nan, "f4")}, "NaN or infinite"),
    "unknown": (
        {"x.lora_A.weight": ZEROS((3, 12), "f4")},
        "1 for modules that this model does not",
    ),
    "magnitudes": ({"c_attn.lora_magnitude_vector": ZEROS(36, "f4")}, "where use_dora is false"),
    "a bias": (
        {"c_attn.base_layer.bias": ZEROS(36, "f4")},
        "neither in modules_to_save nor a bias",
    ),
    "a whole": ({"c_proj.weight": ZEROS((12, 12), "f4")}, "neither in modules_to_save nor a bias"),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("what", TENSORS)
def test_damaged_tensors(what, base, changed):
    tensors, words = TENSORS[what]
    with pytest.raises(ValueError, match=words):
        load_adapter(base[0], changed(None, tensors))


ENTRIES = [
    ({"peft_type": "IA3"}, "peft_type = 'IA3' is not read"),
    ({"r": 0}, "r = 0 must be a rank"),
    ({"r": 2**40}, "r = 1099511627776 must be a rank"),
    ({"r": "8"}, "r = '8' must be a rank"),
    ({"r": True}, "r = True must be a rank"),
    ({"r": 4, "rank_pattern": {}}, r"c_attn A \(9, 12\) for \(4, 12\)"),
    ({"lora_alpha": -1}, "lora_alpha = -1 must be a number above 0"),
    ({"lora_alpha": 1e300}, "lora_alpha = 1e[+]300 must be"),
    ({"rank_pattern": {"c_attn": "x"}}, "rank_pattern = .* must be a rank"),
    ({"rank_pattern": [1]}, "rank_pattern = .* must be an object"),
    ({"alpha_pattern": {"(": 1}}, "alpha_pattern = .* is no regular expression"),
    ({"target_modules": None}, "target_modules = None must name the modules"),
    ({"target_modules": [1]}, "target_modules = .* must be a list of names or a regular"),
    ({"target_modules": "(.*)*x"}, "target_modules = .* could take for ever"),
    ({"target_modules": "((a+))+"}, "target_modules = .* could take for ever"),
    ({"target_modules": "([a-z._0-9]*-?)*X"}, "target_modules = .* could take for ever"),
    ({"rank_pattern": {"(.+|..)*X": 2}}, "rank_pattern = .* could take for ever"),
    ({"layers_to_transform": [0], "layers_pattern": ["("]}, "layers_pattern = .* no regular expr"),
    ({"modules_to_save": ["ln_f"]}, "1 missing for modules_to_save: 'ln_f'"),
    ({"target_modules": ["c_fc"]}, "2 for modules that target_modules does not name"),
    ({"exclude_modules": ["c_proj"]}, "1 for modules that target_modules does not name"),
    ({"layers_to_transform": [1], "layers_pattern": ["h"]}, "2 for modules that target_modules"),
    ({"layers_to_transform": ["a"]}, "layers_to_transform = .* must be numbers of layers"),
    ({"bias": "some"}, "bias = 'some' must be one of 'none', 'all', 'lora_only'"),
    ({"use_dora": True}, "2 with magnitudes where use_dora is false, or without"),
    ({"use_dora": "yes"}, "use_dora = 'yes' must be one of False, True"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
    ({"lora_bias": True}, "lora_bias = True is not handled"),
    ({"target_parameters": ["w"]}, "target_parameters = .* is not handled"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices = .* is not handled"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens = .* is not handled"),
    ({"of_the_future": 1}, "of_the_future = 1 is not handled"),
]


@pytest.mark.parametrize("entries, words", ENTRIES)
def test_settings_that_are_refused(entries, words, base, changed):
    with pytest.raises(ValueError, match=words):
        load_adapter(base[0], changed(entries))


def test_settings_that_change_nothing(base, changed):
    entries = {
        "fan_in_fan_out": False,
        "lora_dropout": 0.1,
        "megatron_core": "x",
        "eva_config": None,
    }
    load_adapter(base[0], changed(entries | {"peft_version": "9", "qalora_group_size": 16}))


def test_files_that_are_none(base, changed, tmp_path):
    path = changed()
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(base[0], base[1])
    data = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_adapter(base[0], path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="and no adapter_model.safetensors"):
        load_adapter(base[0], path)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        from_pretrained(path)


def test_tables_that_the_output_layer_shares(base, tmp_path):
    """PEFT changes the table or the output layer alone, so that neither can be said of both."""
    model = base[0]
    adapted = lora(model, 2, where=lambda path, w: "token_embedding" in path, key=KEY)
    with pytest.raises(ValueError, match="is shared with the output layer"):
        save_adapter(adapted, tmp_path)
    whole = lora(model, 2, also=lambda path, x: "token_embedding" in path, key=KEY)
    save_adapter(whole, tmp_path)
    again = load_adapter(model, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "transformer.wte"]
    found = load_file(tmp_path / "adapter_model.safetensors")
    del found["base_model.model.lm_head.weight"]
    save_file(found, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 for a table that the output layer shares"):
        load_adapter(model, tmp_path)
