"""The architectures of GGUF files: how their metadata and tensors relate to a family's.

The families' own tables are in `jaxformers.hf.families`. In names, `{i}` stands for a layer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxformers.hf.gguf import changes, settings
from jaxformers.hf.gguf.metadata import Metadata


class GgufArchitecture(NamedTuple):
    """One `general.architecture`.

    Arguments:
        settings: a function from the metadata to the entries of a config.json.
        modules: the names of modules in GGUF files, and in checkpoints of Hugging Face.
        changes: how the tensor of a module in the file becomes the checkpoint's, if not as it is.
    """

    settings: Callable[[Metadata], dict[str, Any]]
    modules: Mapping[str, str]
    changes: Mapping[str, Callable] = {}


BLOCK, LAYER = "blk.{i}", "model.layers.{i}"

ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {
    f"{BLOCK}.attn_q": f"{LAYER}.self_attn.q_proj",
    f"{BLOCK}.attn_k": f"{LAYER}.self_attn.k_proj",
    f"{BLOCK}.attn_v": f"{LAYER}.self_attn.v_proj",
    f"{BLOCK}.attn_output": f"{LAYER}.self_attn.o_proj",
}
FEED_FORWARD = {
    f"{BLOCK}.ffn_gate": f"{LAYER}.mlp.gate_proj",
    f"{BLOCK}.ffn_up": f"{LAYER}.mlp.up_proj",
    f"{BLOCK}.ffn_down": f"{LAYER}.mlp.down_proj",
}
NORMS = {
    f"{BLOCK}.attn_norm": f"{LAYER}.input_layernorm",
    f"{BLOCK}.ffn_norm": f"{LAYER}.post_attention_layernorm",
}
QK_NORMS = {
    f"{BLOCK}.attn_q_norm": f"{LAYER}.self_attn.q_norm",
    f"{BLOCK}.attn_k_norm": f"{LAYER}.self_attn.k_norm",
}
SANDWICH_NORMS = {
    f"{BLOCK}.attn_norm": f"{LAYER}.input_layernorm",
    f"{BLOCK}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
    f"{BLOCK}.ffn_norm": f"{LAYER}.pre_feedforward_layernorm",
    f"{BLOCK}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
}
DECODER = ENDS | ATTENTION | FEED_FORWARD | NORMS
SANDWICH = ENDS | ATTENTION | FEED_FORWARD | SANDWICH_NORMS


def without_one(modules: Mapping[str, str]) -> dict[str, Callable]:
    """Returns the changes of Gemma's norms."""
    return {name: changes.minus_one for name in modules if name.endswith("norm")}


GPT2_LAYER = "transformer.h.{i}"
GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    f"{BLOCK}.attn_norm": f"{GPT2_LAYER}.ln_1",
    f"{BLOCK}.attn_qkv": f"{GPT2_LAYER}.attn.c_attn",
    f"{BLOCK}.attn_output": f"{GPT2_LAYER}.attn.c_proj",
    f"{BLOCK}.ffn_norm": f"{GPT2_LAYER}.ln_2",
    f"{BLOCK}.ffn_up": f"{GPT2_LAYER}.mlp.c_fc",
    f"{BLOCK}.ffn_down": f"{GPT2_LAYER}.mlp.c_proj",
}

BERT_LAYER = "bert.encoder.layer.{i}"
BERT = {
    "token_embd": "bert.embeddings.word_embeddings",
    "position_embd": "bert.embeddings.position_embeddings",
    "token_types": "bert.embeddings.token_type_embeddings",
    "token_embd_norm": "bert.embeddings.LayerNorm",
    f"{BLOCK}.attn_q": f"{BERT_LAYER}.attention.self.query",
    f"{BLOCK}.attn_k": f"{BERT_LAYER}.attention.self.key",
    f"{BLOCK}.attn_v": f"{BERT_LAYER}.attention.self.value",
    f"{BLOCK}.attn_output": f"{BERT_LAYER}.attention.output.dense",
    f"{BLOCK}.attn_output_norm": f"{BERT_LAYER}.attention.output.LayerNorm",
    f"{BLOCK}.ffn_up": f"{BERT_LAYER}.intermediate.dense",
    f"{BLOCK}.ffn_down": f"{BERT_LAYER}.output.dense",
    f"{BLOCK}.layer_output_norm": f"{BERT_LAYER}.output.LayerNorm",
}

NOMIC_LAYER = "nomic_bert.encoder.layers.{i}"
NOMIC = {
    "token_embd": "nomic_bert.embeddings.word_embeddings",
    "token_types": "nomic_bert.embeddings.token_type_embeddings",
    "token_embd_norm": "nomic_bert.emb_ln",
    f"{BLOCK}.attn_qkv": f"{NOMIC_LAYER}.attn.Wqkv",
    f"{BLOCK}.attn_output": f"{NOMIC_LAYER}.attn.out_proj",
    f"{BLOCK}.attn_output_norm": f"{NOMIC_LAYER}.norm1",
    f"{BLOCK}.ffn_up": f"{NOMIC_LAYER}.mlp.fc11",
    f"{BLOCK}.ffn_gate": f"{NOMIC_LAYER}.mlp.fc12",
    f"{BLOCK}.ffn_down": f"{NOMIC_LAYER}.mlp.fc2",
    f"{BLOCK}.layer_output_norm": f"{NOMIC_LAYER}.norm2",
}

ARCHITECTURES = {
    "llama": GgufArchitecture(
        settings.llama,
        DECODER,
        {
            f"{BLOCK}.attn_q": changes.queries_in_halves,
            f"{BLOCK}.attn_k": changes.keys_in_halves,
        },
    ),
    "qwen2": GgufArchitecture(settings.qwen2, DECODER),
    "qwen3": GgufArchitecture(settings.qwen3, DECODER | QK_NORMS),
    "gemma": GgufArchitecture(settings.gemma, DECODER, without_one(DECODER)),
    "gemma2": GgufArchitecture(settings.gemma2, SANDWICH, without_one(SANDWICH)),
    "gemma3": GgufArchitecture(
        settings.gemma3, SANDWICH | QK_NORMS, without_one(SANDWICH | QK_NORMS)
    ),
    "phi3": GgufArchitecture(
        settings.phi3,
        {
            **ENDS,
            **NORMS,
            f"{BLOCK}.attn_qkv": f"{LAYER}.self_attn.qkv_proj",
            f"{BLOCK}.attn_output": f"{LAYER}.self_attn.o_proj",
            f"{BLOCK}.ffn_up": f"{LAYER}.mlp.gate_up_proj",
            f"{BLOCK}.ffn_down": f"{LAYER}.mlp.down_proj",
        },
    ),
    "gpt2": GgufArchitecture(
        settings.gpt2,
        GPT2,
        {
            f"{BLOCK}.{name}": changes.transposed
            for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        },
    ),
    "bert": GgufArchitecture(settings.bert, BERT, {"token_types": changes.table}),
    "nomic-bert": GgufArchitecture(settings.nomic_bert, NOMIC, {"token_types": changes.table}),
}
