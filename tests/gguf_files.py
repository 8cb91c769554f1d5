"""GGUF files, written by the `gguf` package from tiny checkpoints as llama.cpp's converter does.

    write(directory, path)

The names of tensors are those of the package's own tables.
"""

from pathlib import Path

import gguf
import numpy as np
from hf_cases import (
    BIASES,
    EIGHT,
    FOUR_TIMES,
    FULL,
    GROUPED,
    HEADS,
    LOCAL_GLOBAL,
    MAX,
    NO_WINDOW,
    PLAIN,
    SIZES,
    SLIDING,
    SPECIAL,
    TIED,
    UNTIED,
    WINDOW,
    YARN,
    D,
    F,
    H,
    L,
    N,
    V,
    longrope,
    rope,
    ropes,
)
from hf_checkpoints import randomize

from jaxformers.files.hub import TensorFiles
from jaxformers.files.json_file import read_json

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"vocab_size": V, "n_positions": MAX, "n_embd": D, "n_layer": L, "n_head": N, "n_inner": F}
HALF = ropes(partial_rotary_factor=0.5)
BARE = {"add_pooling_layer": False}

# Architecture in GGUF files, class of transformers, settings.
CASES = {
    "llama": ("llama", "LlamaForCausalLM", HEADS | BIASES | PLAIN),
    "llama_tied": ("llama", "LlamaForCausalLM", GROUPED | TIED | {"rms_norm_eps": 0.3}),
    "llama_linear": ("llama", "LlamaForCausalLM", HEADS | ropes("linear", factor=4.0)),
    "llama_yarn": ("llama", "LlamaForCausalLM", HEADS | FOUR_TIMES | ropes(**YARN)),
    "llama_llama3": (
        *("llama", "LlamaForCausalLM"),
        HEADS | ropes("llama3", 5e5, **LLAMA3, original_max_position_embeddings=8192),
    ),
    "mistral": ("llama", "MistralForCausalLM", HEADS | {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", GROUPED | PLAIN),
    "qwen2_tied": ("qwen2", "Qwen2ForCausalLM", GROUPED | TIED | FOUR_TIMES | ropes(**YARN)),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", HEADS | UNTIED),
    "gemma": ("gemma", "GemmaForCausalLM", HEADS | {"attention_bias": True}),
    "gemma2": (
        *("gemma2", "Gemma2ForCausalLM"),
        HEADS | LOCAL_GLOBAL | {"query_pre_attn_scalar": H, "attn_logit_softcapping": 1.5},
    ),
    "gemma3": (
        *("gemma3", "Gemma3ForCausalLM"),
        HEADS | LOCAL_GLOBAL
        | {"query_pre_attn_scalar": H, "num_hidden_layers": 3}
        | {"layer_types": [SLIDING, FULL, SLIDING]}
        | {"rope_parameters": {SLIDING: rope(theta=20.0), FULL: rope("linear", 90.0, factor=3.0)}},
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", EIGHT | HALF | {"sliding_window": WINDOW}),
    "phi3_longrope": ("phi3", "Phi3ForCausalLM", EIGHT | TIED | NO_WINDOW | longrope(30)),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "gpt2_untied": ("gpt2", "GPT2LMHeadModel", GPT2 | UNTIED),
    "bert": ("bert", "BertModel", SIZES | {"type_vocab_size": 2, "layer_norm_eps": 0.1}),
    "bert_one_type": ("bert", "BertModel", SIZES | {"type_vocab_size": 1}),
    "nomic": ("nomic-bert", "NomicBertModel", SIZES | {"type_vocab_size": 2} | PLAIN),
}  # fmt: skip


def make(name, directory):
    """Writes the checkpoint of a case and its GGUF file, whose path is returned."""
    import torch
    import transformers

    _, cls, _ = CASES[name]
    architecture, config = of(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, cls)(config, **BARE if "BertM" in cls else {})
        randomize(model)
    model.save_pretrained(directory)
    path = Path(directory) / "gguf" / "model.gguf"
    path.parent.mkdir()
    write(directory, path, architecture, config)
    return path


def of(name):
    """The architecture of a case in GGUF files, and its configuration in transformers."""
    import transformers

    architecture, cls, settings = CASES[name]
    return architecture, getattr(transformers, cls).config_class(**SPECIAL | settings)


def write(directory, path, architecture, config, pack=None, edit=None):
    """Writes a GGUF file from a checkpoint.

    `pack(name, x)` returns the type of a tensor, F32 by default; `edit(writer)` adds to the file.
    """
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, architecture, config)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    files = TensorFiles(directory)
    untied = read_json(Path(directory) / "config.json").get("tie_word_embeddings", True) is False
    for name in files.names:
        module, _, suffix = name.rpartition(".")
        new = names.get_name(module)
        if new is None or (module == "lm_head" and not untied):
            continue
        x = as_converted(architecture, f"{new}.{suffix}", files.read(name), config)
        dtype = gguf.GGMLQuantizationType.F32 if pack is None else pack(f"{new}.{suffix}", x)
        writer.add_tensor(f"{new}.{suffix}", gguf.quantize(x, dtype), raw_dtype=dtype)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_converted(architecture, name, x, config):
    """The tensor as llama.cpp's converter writes it."""
    if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        halves = x.reshape(heads, 2, -1, *x.shape[1:])
        x = halves.swapaxes(1, 2).reshape(x.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        x = x + 1
    conv1d = "qkv", "attn_output", "ffn_up", "ffn_down"
    if architecture == "gpt2" and x.ndim == 2 and any(part in name for part in conv1d):
        x = x.T
    return np.ascontiguousarray(x)


def add_metadata(writer, architecture, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "n_inner", 0) or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (("bos", 1), ("eos", 7), ("pad", 3)):
        getattr(writer, f"add_{key}_token_id")(value)
    if "gpt2" in architecture or "bert" in architecture:
        older = getattr(config, "layer_norm_epsilon", None)
        writer.add_layer_norm_eps(config.layer_norm_eps if older is None else older)
    if "bert" in architecture:
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    if architecture == "nomic-bert":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "gpt2" not in architecture and "bert" not in architecture:
        add_decoder(writer, architecture, config)


def add_decoder(writer, architecture, config):
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            getattr(writer, f"add_{name}")(getattr(config, name))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        writer.add_rope_freq_base_swa(parameters[SLIDING]["rope_theta"])
        writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
        parameters = parameters[FULL]
    writer.add_rope_freq_base(parameters["rope_theta"])
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)
    kind = parameters["rope_type"]
    original = parameters.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)
        for name in ("beta_fast", "beta_slow"):
            getattr(writer, f"add_rope_scaling_yarn_{name}")(parameters[name])
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(original)
        for length in ("long", "short"):
            factors = np.array(parameters[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(parameters, head_dim, original))


def divisors(parameters, head_dim, original):
    """The tensor that stands for the scaling of Llama 3, as the converter computes it."""
    factor, low, high = (parameters[x] for x in LLAMA3)
    freqs = 1.0 / parameters["rope_theta"] ** (np.arange(0, head_dim, 2, np.float32) / head_dim)
    found = []
    for wave in 2 * np.pi / freqs:
        smooth = (original / wave - low) / (high - low)
        blend = 1 / ((1 - smooth) / factor + smooth)
        found.append(1 if wave < original / high else factor if wave > original / low else blend)
    return np.array(found, np.float32)
