"""Checkpoints of older and neighboring tools, and what lies where a checkpoint should be."""

import json
import shutil
import zipfile
from pathlib import Path

import equinox as eqx
import huggingface_hub as hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")


import jaxformers  # noqa: E402
from jaxformers import TransformerLM, from_pretrained, load_tokenizer  # noqa: E402
from jaxformers.files.hub import TensorFiles, write_tensors  # noqa: E402
from jaxformers.hf.architecture.describe import describe  # noqa: E402
from jaxformers.hf.config.harmless import HARMLESS  # noqa: E402
from jaxformers.hf.families import FAMILIES  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker")
torch.set_num_threads(1)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def changed(made, tmp_path):
    """A function that gives a copy of a checkpoint with other entries; `...` takes one away."""
    count = iter(range(10**9))

    def directory(name, entries=None, renamed=()):
        path = tmp_path / f"changed {next(count)}"
        shutil.copytree(made(name), path)
        config = json.loads((path / "config.json").read_text())
        config = {dict(renamed).get(key, key): x for key, x in config.items()} | (entries or {})
        config = {key: x for key, x in config.items() if x is not ...}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return directory


def assert_same(directory, original):
    """The checkpoint is read as if its config.json had nothing unusual in it."""
    model, usual = from_pretrained(directory), from_pretrained(original)
    assert describe(model) == describe(usual)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(usual), strict=True)
    )
    return model


# Entries that change no number. Those of a family are of checkpoints that people use.

OF_ALL = {
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_attn_implementation_internal": "sdpa",
    "_commit_hash": "0123abc",
    "_flash_attn_2_enabled": True,
    "_name_or_path": "somebody/something",
    "adapters": {"adapters": {"ner": "b1017368d7a97b11"}, "config_map": {}, "fusions": {}},
    "attn_implementation": "eager",
    "auto_map": {"AutoModel": "somebody/something--modeling.Model"},
    "bad_words_ids": [[3]],
    "chunk_size_feed_forward": 4,
    "classifier_dropout": 0.1,
    "custom_pipelines": {"text-generation": {"impl": "instruct_pipeline.Pipeline", "pt": ["A"]}},
    "do_sample": True,
    "embd_pdrop": 0.1,
    "eos_token_ids": [7],
    "finetuning_task": "sst-2",
    "flash_attn": True,
    "fused_mlp": True,
    "gradient_checkpointing": True,
    "id2label": {"0": "no", "1": "yes"},
    "initializer_range": 0.02,
    "keys_to_ignore_at_inference": ["past_key_values"],
    "label2id": {"no": 0, "yes": 1},
    "language": "english",
    "layerdrop": 0.1,
    "max_length": 20,
    "model_max_length": 512,
    "model_name": "something",
    "name": "Roberta",
    "neftune_noise_alpha": 5,
    "output_past": True,
    "penalty_alpha": 0.6,
    "pre_trained": "",
    "problem_type": "single_label_classification",
    "pruned_heads": {},
    "quantization_config": None,
    "structure": [],
    "summary_type": "cls_index",
    "task_specific_params": {"summarization": {"num_beams": 4}},
    "tokenizer_class": "BertTokenizer",
    "torchscript": True,
    "training": "",
    "transformers.js_config": {"dtype": "q4"},
    "transformers_version": "2.3.0",
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
    "use_bfloat16": True,
    "use_cache": False,
    "use_flash_attention_2": True,
    "use_mrope": False,
    "xla_device": True,
}
OF_A_FAMILY = {
    "bert": {
        **{"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12},
        **{"pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "is_decoder": False},
        **{"pooler_type": "first_token_transform", "embedding_size": 24, "emb_size": 24},
        **{"cell": {}, "num_key_value_heads": 6},
    },
    "roberta": {"embedding_size": 24, "_num_labels": 3, "num_labels": 2},
    "gpt2": {
        **{"n_ctx": 1024, "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2},
        **{"max_position_embeddings": 40, "predict_special_tokens": None, "is_decoder": True},
        "reorder_and_upcast_attn": True,
    },
    "llama": {
        **{"pretraining_tp": 2, "is_llama_config": True, "rope_interleaved": False},
        **{"max_sequence_length": 2048, "use_sliding_window": False, "sliding_window": 4},
        **{"max_window_layers": 28, "hidden_dropout": 0.1, "is_decoder": True},
        **{"attn_logit_softcapping": None, "query_pre_attn_scalar": None},
    },
    "mistral": {"partial_rotary_factor": 1.0, "use_flash_attn": True},
    "bloom": {
        **{"n_embed": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "seq_length": 2048},
        **{"offset_alibi": 100, "skip_bias_add": True, "max_position_embeddings": 2048},
    },
    "t5": {
        **{"n_positions": 512, "hidden_size": 24, "num_attention_heads": 6, "head_dim": 10},
        **{"num_hidden_layers": 2, "embd_pdrop": 0.1},
    },
    "bart": {
        **{"add_bias_logits": False, "add_final_layer_norm": False, "classif_dropout": 0.0},
        **{"normalize_before": False, "normalize_embedding": True, "save_step": 37},
        **{"extra_pos_embeddings": 2, "static_position_embeddings": False, "hidden_size": 24},
        **{"num_hidden_layers": 2, "num_attention_heads": 6},
    },
    "distilbert": {"tie_weights_": True, "hidden_size": 24, "num_attention_heads": 6},
    "albert": {"layers_to_keep": [], "net_structure_type": 0, "gap_size": 0, "n_embd": 24},
    "falcon": {"n_embed": 24, "apply_residual_connection_post_layernorm": False},
    "modernbert": {"reference_compile": False, "position_embedding_type": "absolute"},
    "mpt": {"verbose": 0, "learned_pos_emb": True, "embedding_fraction": 1.0, "hidden_size": 24},
    "opt": {"learned_embeddings": True, "scale_embeddings": False, "prefix": "</s>"},
    "llama_older_file": {
        "rope_scaling": {"type": "linear", "factor": 4.0, "finetuned": True},
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "phi3": {"embd_pdrop": 0.0, "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize("name", OF_A_FAMILY)
def test_entries_of_other_tools(name, changed, made):
    assert_same(changed(name, OF_ALL | OF_A_FAMILY[name]), made(name))


REFUSED = {
    "bert": {
        "embedding_size": 16,
        "emb_size": True,
        "num_key_value_heads": 2,
        "is_decoder": True,
        "pruned_heads": {"0": [1]},
        "glyph_embedding_dim": 1728,
        "use_cls_token": 1,
    },
    "gpt2": {
        "hidden_size": 32,
        "num_hidden_layers": 12,
        "max_position_embeddings": 1024,
        "rotary": True,
        "tie_encoder_decoder": True,
    },
    "llama": {
        "sliding_window": 4,
        "rope_interleaved": True,
        "layer_norm_eps": 1e-5,
        "block_configs": [{}, {"no_op": True}],
        "residual_multiplier": 0.22,
        "dropout_free_scaling": 2.0,
    },
    "t5": {"num_hidden_layers": 3, "head_dim": 4, "tie_encoder_decoder": True},
    "bart": {"num_hidden_layers": 12, "hidden_size": 1024},
}


@pytest.mark.parametrize("name", REFUSED)
def test_entries_that_can_change_numbers_are_refused(name, changed):
    for key, value in REFUSED[name].items():
        with pytest.raises(ValueError, match=f"config.json.*{key}"):
            from_pretrained(changed(name, {key: value}))


QUANTIZED = [
    (
        {"quantization_config": {"quant_method": "hqq", "bits": 4}},
        "quantization_config.*quantized, by hqq",
    ),
    (
        {"quantization_config": {"load_in_4bit": True}},
        "quantization_config.*load_in_4bit.*are quantized",
    ),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization = .*group_size"),
    ({"compression_config": {"format": "dense"}}, "compression_config"),
    ({"quantization_config": "fp8"}, "quantization_config = 'fp8'"),
]


@pytest.mark.parametrize("entries, words", QUANTIZED)
def test_quantized_weights_are_refused_by_name(entries, words, changed):
    path = changed("llama", {**entries, "_name_or_path": "somebody/whole"})
    with pytest.raises(ValueError, match=f"(?s){words}.*perhaps 'somebody/whole'"):
        from_pretrained(path)


def test_harmless_entries_are_in_no_table(made):
    """Else a table could not read what is left aside."""
    tables = {
        setting.key
        for family in FAMILIES.values()
        for setting in family.settings
        if hasattr(setting, "key") and isinstance(setting.key, str)
    }
    assert not HARMLESS & tables - {"pad_token_id", "max_seq_len"}


def test_names_from_before_transformers_had_the_family(changed, made, tmp_path):
    """Nomic's own names; what is saved has those that transformers knows, and them alone."""
    older = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
    }
    own = {
        **{"activation_function": "swiglu", "hidden_act": ..., "rotary_emb_base": 50.0},
        **{"rope_parameters": ..., "causal": False, "dense_seq_output": True},
        **{"fused_bias_fc": True, "fused_dropout_add_ln": True, "prenorm": False},
        **{"qkv_proj_bias": False, "mlp_fc1_bias": False, "use_rms_norm": False},
        **{"rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "use_xentropy": True},
        **{"rotary_scaling_factor": None, "scale_attn_weights": True, "use_flash_attn": True},
        **{"max_trained_positions": 2048, "pad_vocab_size_multiple": 64, "attn_pdrop": 0.1},
        **{"parallel_block": False, "summary_type": "cls_index", "resid_pdrop": 0.1},
    }
    path = changed("nomic_bert_plain", own, older.items())
    model = assert_same(path, made("nomic_bert_plain"))
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not set(older.values()) & config.keys() and "rotary_emb_base" not in config
    assert (config["hidden_size"], config["rope_theta"], config["hidden_act"]) == (24, 50.0, "silu")
    assert_same(tmp_path / "saved", made("nomic_bert_plain"))
    for key, value in {"rotary_scaling_factor": 2, "prenorm": True, "hidden_size": 3}.items():
        with pytest.raises(ValueError, match=key):
            from_pretrained(changed("nomic_bert_plain", own | {key: value}, older.items()))


def test_sizes_that_are_said_again_follow_the_model(changed, tmp_path):
    """A layer less: transformers would read the entry that was left as it was."""
    repeated = {"embedding_size": 24, "n_layer": 2, "num_hidden_layers": 2}
    model = from_pretrained(changed("bert", repeated))
    model = eqx.tree_at(lambda m: m.encoder.layers, model, model.encoder.layers[:1])
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["n_layer"], config["embedding_size"]) == (1, 1, 24)
    model = from_pretrained(changed("bart", {"num_hidden_layers": 2}))
    model = eqx.tree_at(lambda m: m.encoder.layers, model, model.encoder.layers[:1])
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["encoder_layers"] == config.get("num_hidden_layers", 1) == 1


# No model_type.


def without(changed, name, architectures=False, **entries):
    entries |= {"model_type": ...}
    return changed(name, entries if architectures else entries | {"architectures": ...})


UNIQUE = ["gpt2_without_prefix", "bert", "qwen2", "bart", "distilbert", "opt", "modernbert", "phi3"]


@pytest.mark.parametrize("name", UNIQUE)
def test_a_family_that_only_tensors_tell(name, changed, made, tmp_path):
    model = assert_same(without(changed, name), made(name))
    model.save_pretrained(tmp_path / "saved")
    usual, config = (
        json.loads((path / "config.json").read_text())["model_type"]
        for path in (made(name), tmp_path / "saved")
    )
    assert config == usual


@pytest.mark.parametrize("name", ["llama", "t5_gated", "roberta", "bert_pooler", "helium"])
def test_a_family_that_the_class_tells(name, changed, made):
    assert_same(without(changed, name, architectures=True), made(name))


@pytest.mark.parametrize(
    "name, families",
    [
        ("llama", "llama, smollm3"),
        ("t5_gated", "t5, mt5"),
        ("roberta", "roberta, xlm-roberta, camembert"),
        ("bert_pooler", "bert, roberta, xlm-roberta, camembert"),
    ],
)
def test_several_families_could_be_it(name, families, changed):
    first = families.split(",")[0]
    words = rf'no model_type.*those of {families}\. Add .* "model_type": "{first}"\.'
    with pytest.raises(ValueError, match=words):
        from_pretrained(without(changed, name))


def test_no_family_can_be_it(changed):
    """What stands against the one that it is is told when it is named."""
    path = without(changed, "bert", hidden_size=25)
    words = r"no model_type.*'bert\.embeddings.*not those of one family.*\"model_type\": \"llama\""
    with pytest.raises(ValueError, match=words):
        from_pretrained(path)
    with pytest.raises(ValueError, match="those of one family"):
        TransformerLM.from_pretrained(without(changed, "bert"))


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"model_type": "xlm_roberta"}, "Did you mean 'xlm-roberta'"),
        ({"model_type": "LLaMA", "architectures": ...}, "Did you mean 'llama'"),
        ({"model_type": "openelm"}, 'a class of \'llama\': write "model_type": "llama" if it is'),
        ({"model_type": 3, "architectures": ["Strange"]}, "got 3.$"),
    ],
)
def test_a_wrong_model_type_gets_a_hint(entries, words, changed):
    name = "xlm_roberta" if entries["model_type"] == "xlm_roberta" else "llama"
    entries = entries | ({"architectures": ["Strange"]} if name == "xlm_roberta" else {})
    with pytest.raises(ValueError, match=f"model_type must be one of .*{words}"):
        from_pretrained(changed(name, entries))


# An index that lists more than its shards hold.


def shard(directory, listed=None):
    """Split a checkpoint into shards, whose index lists these names as well."""
    files = TensorFiles(directory)
    arrays = {name: files.read(name) for name in files.names}
    write_tensors(
        directory, [(k, x.shape, x.dtype, lambda x=x: x) for k, x in arrays.items()], 9000
    )
    index = json.loads((directory / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    index["weight_map"] |= {name: shards[-1] for name in listed or ()}
    (directory / INDEX).write_text(json.dumps(index))
    return shards


@pytest.mark.parametrize(
    "name, listed",
    [
        ("llama_tied", ["lm_head.weight"]),
        ("t5", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]),
        ("bart", ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]),
        ("bert", ["bert.embeddings.position_ids", "cls.predictions.decoder.weight"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_an_index_that_lists_a_table_that_is_not_needed(name, listed, changed, made):
    path = changed(name)
    shard(path, listed)
    assert_same(path, made(name))


def test_an_index_that_lists_what_is_needed(changed):
    path = changed("llama_tied")
    shards = shard(path)
    (path / shards[-1]).unlink()
    words = f"(?s)missing: .*The index lists .* in {shards[-1]}: was everything downloaded"
    with pytest.raises(ValueError, match=words):
        from_pretrained(path)
    with pytest.raises(ValueError, match=f"{shards[-1]} is missing"):
        TensorFiles(path)


# What is no checkpoint.

PEFT = json.dumps({"base_model_name_or_path": "somebody/base", "peft_type": "LORA"})
FOUND = {
    "diffusers' adapter": ({"pytorch_lora_weights.safetensors": ""}, "An adapter has to be merged"),
    "ggml": (
        {"ggml-model.bin": "", "README.md": ""},
        r"It has 'ggml-model.bin'\. GGUF files.* Other formats of llama.cpp are not read",
    ),
    "onnx": ({"model.onnx": "", "config.json": "{}"}, r"'model.onnx'\. An exported graph .*ONNX"),
    "onnx in a folder": ({"onnx/model.onnx": ""}, "'onnx/model.onnx'. An exported graph"),
    "openvino": ({"openvino_model.bin": "", "openvino_model.xml": ""}, "An exported graph"),
    "a tokenizer": (
        {"spiece.model": "", "tokenizer_config.json": "{}"},
        "'spiece.model', 'tokenizer_config.json': files of a tokenizer, without the model's",
    ),
    "spm": ({"source.spm": "", "target.spm": "", "vocab.json": "{}"}, "'source.spm', 'target.spm'"),
    "a pickle": ({"model.pt": "", "config.json": "{}"}, "A pickle is read only as pytorch_model"),
    "a checkpoint of Lightning": ({"epoch=3.ckpt": ""}, "A pickle is read only as"),
    "flax": ({"flax_model.msgpack": "", "config.json": "{}"}, "from_flax=True"),
    "flax in shards": ({"flax_model-00001-of-00002.msgpack": ""}, "from_flax=True"),
    "keras": ({"tf_model.h5": "", "config.json": "{}"}, "from_tf=True"),
    "tensorflow 1": ({"bert_model.ckpt.index": "", "vocab.txt": ""}, "of TensorFlow, which is not"),
    "shards without an index": (
        {"model-00001-of-00002.safetensors": "", "config.json": "{}"},
        "shards need their index",
    ),
    "the authors' format": (
        {"consolidated.00.pth": "", "params.json": "{}"},
        "'consolidated.00.pth', 'params.json'. It is the format of the model's authors",
    ),
    "deepspeed": ({"global_step500/mp_rank_00_model_states.pt": ""}, "python zero_to_fp32.py"),
    "fsdp": ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "accelerate merge-weights"),
    "orbax": ({"_CHECKPOINT_METADATA": "{}"}, "of orbax.*jaxformers.load"),
    "an archive": ({"model.tar.gz": ""}, "Unpack the archive"),
    "numpy": ({"weights.npz": ""}, "Arrays of NumPy are not read"),
    "sentence-transformers": (
        {
            **{"modules.json": "[]", "1_Pooling/config.json": "{}"},
            **{"0_Transformer/config.json": "{}", "0_Transformer/model.safetensors": ""},
        },
        r"checkpoints in its folders '0_Transformer': pass one of those, such as 0_Transformer\.",
    ),
    "a run of the Trainer": (
        {
            f"checkpoint-{n}/{name}": "{}"
            for n in (500, 1500, 1000)
            for name in ("config.json", "pytorch_model.bin", "optimizer.pt")
        },
        "'checkpoint-1000', 'checkpoint-1500', 'checkpoint-500': pass .* such as checkpoint-1500",
    ),
    "diffusers": (
        {
            **{"model_index.json": "{}", "unet/config.json": "{}"},
            **{"text_encoder/config.json": "{}", "text_encoder/model.safetensors": ""},
        },
        "a pipeline of diffusers.*folders 'text_encoder'",
    ),
    "the hub's cache": (
        {"snapshots/0123/config.json": "{}", "refs/main": "", "blobs/9": ""},
        "an entry of the cache of huggingface_hub",
    ),
    "weights alone": ({"model.safetensors": ""}, "copy their config.json from where they came"),
    "nothing": ({}, r"\.$"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_is_found_is_named(what, tmp_path):
    files, words = FOUND[what]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lacks = "no model.safetensors" if "config.json" in files else "config.json is missing"
    with pytest.raises(ValueError, match=rf"(?s){lacks}.*{words}") as caught:
        from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1200


def test_a_directory_of_very_many_files(tmp_path):
    for i in range(3000):
        (tmp_path / f"{i}.onnx").touch()
    with pytest.raises(ValueError, match="and 1995 more.*ONNX") as caught:
        from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1200


def test_an_adapter_beside_a_model_is_not_applied_in_silence(changed, made):
    path = changed("llama")
    (path / "adapter_config.json").write_text(PEFT)
    with pytest.warns(
        UserWarning, match="adapter_config.json.*not applied.*load_adapter.*merge_and_unload"
    ):
        from_pretrained(path)


@pytest.mark.parametrize(
    "name, words",
    [
        ("x.llamafile", "GGUF files, of llama.cpp"),
        ("x.onnx", "An exported graph"),
        ("x.zip", "Unpack the archive"),
        ("x.bin", "A pickle is read only as"),
        ("notes.txt", r"config.json lies\.$"),
    ],
)
def test_a_file_in_place_of_a_directory(name, words, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"is a file. Pass the directory in which .*{words}"):
        from_pretrained(tmp_path / name)


def test_a_file_of_a_checkpoint_and_a_file_of_ours(made, tmp_path):
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match=f"That may be '{made('llama')}'"):
            from_pretrained(made("llama") / name)
    jaxformers.save(tmp_path / "own.safetensors", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="jaxformers.save. Read it with jaxformers.load"):
        from_pretrained(tmp_path / "own.safetensors")


def test_a_repository_without_a_checkpoint(monkeypatch, tmp_path):
    """Of which nothing was fetched: the hub is asked what it has."""
    names = ["README.md", "model.Q8_0.gguf", "onnx/model.onnx"]
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(hub, "list_repo_files", lambda name: names)
    with pytest.raises(ValueError, match="config.json is missing.*'model.Q8_0.gguf'.*GGUF"):
        from_pretrained("somebody/something-GGUF")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="has no model.safetensors.*GGUF"):
        from_pretrained("somebody/something-GGUF")

    def unreachable(name):
        raise OSError("no connection")

    monkeypatch.setattr(hub, "list_repo_files", unreachable)
    with pytest.raises(ValueError, match=r"has no model.safetensors and no .*index.json\.$"):
        from_pretrained("somebody/something-GGUF")


@pytest.mark.parametrize(
    "files, passed, words",
    [
        (["x.gguf"], "", "x.gguf is no GGUF file, or a damaged one"),
        (["x.gguf"], "x.gguf", "x.gguf is no GGUF file, or a damaged one"),
        (["adapter_config.json"], "", "no tokenizer.json in .*An adapter has to be merged"),
        (["model.onnx"], "", "no tokenizer.json in .*An exported graph"),
        ([], "", "Is this the directory of the tokenizer"),
        (["spiece.model"], "spiece.model", "only spiece.model. Convert it once .* compare"),
        (["qwen.tiktoken"], "qwen.tiktoken", "only qwen.tiktoken. Convert it once .* compare"),
        (["source.spm", "tokenizer.json"], "source.spm", "source.spm is not read, and .*r.json is"),
    ],
)
def test_what_is_found_in_place_of_a_tokenizer(files, passed, words, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=words):
        load_tokenizer(tmp_path / passed)


def test_converting_a_tokenizer_has_to_be_checked(tmp_path):
    (tmp_path / "spiece.model").touch()
    with pytest.raises(ValueError, match="AutoTokenizer.*Then compare what both give"):
        load_tokenizer(tmp_path)
    (tmp_path / "source.spm").touch()
    with pytest.raises(ValueError, match="MarianTokenizer.*has to be compared"):
        load_tokenizer(tmp_path)


def test_an_archive_under_the_name_of_the_weights(changed):
    path = changed("llama")
    with zipfile.ZipFile(path / "model.safetensors", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(ValueError, match="model.safetensors is no safetensors file"):
        from_pretrained(path)
    assert Path(path / "config.json").exists()
