"""The metadata of a GGUF file in the words of a config.json: a function for each architecture.

The facts are those of llama.cpp's converter (convert_hf_to_gguf.py) and of its models.
"""

from typing import Any

from jaxformers.hf.architecture.window import FULL, SLIDING
from jaxformers.hf.gguf.metadata import Metadata
from jaxformers.hf.gguf.rope import scaling

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}


def llama(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Llama, or of Mistral if there is a window."""
    config = decoder(metadata, "llama") | attention_bias(metadata)
    config["mlp_bias"] = "blk.0.ffn_up.bias" in metadata.file.tensors
    window = metadata.number("attention.sliding_window")
    if not window:
        return config
    if config.pop("attention_bias") or config.pop("mlp_bias"):
        raise metadata.error("attention.sliding_window", "is not handled beside biases", window)
    return config | {"model_type": "mistral", "sliding_window": window}


def qwen2(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Qwen 2."""
    return decoder(metadata, "qwen2")


def qwen3(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Qwen 3."""
    return decoder(metadata, "qwen3") | attention_bias(metadata)


def gemma(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of the first Gemma."""
    return decoder(metadata, "gemma") | attention_bias(metadata)


def gemma2(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Gemma 2. Its largest model, of 46 layers, has another scale."""
    return {
        **decoder(metadata, "gemma2"),
        **attention_bias(metadata),
        **windows(metadata, 2),
        "query_pre_attn_scalar": query_size(metadata, 46),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def gemma3(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Gemma 3. Its largest model, of 62 layers, has another scale."""
    return {
        **decoder(metadata, "gemma3_text"),
        **attention_bias(metadata),
        **windows(metadata, 6),
        "query_pre_attn_scalar": query_size(metadata, 62),
        "final_logit_softcapping": metadata.number("final_logit_softcapping"),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10000.0),
    }


def phi3(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Phi-3, where a window of 0 is none."""
    window = metadata.number("attention.sliding_window") or None
    return decoder(metadata, "phi3") | {"sliding_window": window}


def gpt2(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of GPT-2."""
    config = common(metadata, "gpt2") | {
        "layer_norm_epsilon": metadata.needed("attention.layer_norm_epsilon"),
        **tied(metadata),
    }
    config["n_inner"] = config.pop("intermediate_size")
    metadata.only("attention.head_count_kv", config["num_attention_heads"])
    return config


def bert(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of BERT. How its states are pooled is the user's."""
    metadata.only("attention.causal", False)
    metadata.used.add(f"{metadata.architecture}.pooling_type")
    types = metadata.file.tensors.get("token_types.weight")
    return common(metadata, "bert") | {
        "layer_norm_eps": metadata.needed("attention.layer_norm_epsilon"),
        "type_vocab_size": 1 if types is None or len(types.shape) < 2 else types.shape[0],
    }


def nomic_bert(metadata: Metadata) -> dict[str, Any]:
    """Returns the entries of Nomic BERT."""
    return bert(metadata) | {
        "model_type": "nomic_bert",
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
    }


def common(metadata: Metadata, model_type: str) -> dict[str, Any]:
    """Returns the sizes, which all architectures have, and checks what none of them may have."""
    config = {theirs: metadata.needed(key) for key, theirs in SIZES.items()}
    table = metadata.file.tensors.get("token_embd.weight")
    rows = 0 if table is None else table.shape[0]
    metadata.only("vocab_size", rows)
    metadata.only("expert_count", 0)
    metadata.only("expert_used_count", 0)
    return {"model_type": model_type, "vocab_size": rows, **config}


def decoder(metadata: Metadata, model_type: str) -> dict[str, Any]:
    """Returns the entries that the decoders with rotary positions share."""
    config = common(metadata, model_type)
    heads = config["num_attention_heads"]
    metadata.only("attention.causal", True)
    head_dim = head_size(metadata)
    config |= {
        "num_key_value_heads": metadata.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.needed("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        **tied(metadata),
    }
    rotated = metadata.number("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    return config | scaling(metadata, config, head_dim)


def head_size(metadata: Metadata) -> int:
    """Returns the number of features of a head."""
    heads, width = metadata.needed("attention.head_count"), metadata.needed("embedding_length")
    usual = width // heads if isinstance(heads, int) and heads > 0 else 0
    size = metadata.number("attention.key_length", usual)
    metadata.only("attention.value_length", size)
    if not isinstance(size, int) or size < 1:
        raise metadata.error("attention.key_length", "must be a whole number above 0", repr(size))
    return size


def query_size(metadata: Metadata, layers: int) -> int:
    """Returns the number whose inverse root is the scale of Gemma's scores.

    It is the size of a head, except in the largest model, which has this number of layers.
    """
    heads, width = metadata.needed("attention.head_count"), metadata.needed("embedding_length")
    return width // heads if metadata.needed("block_count") == layers else head_size(metadata)


def attention_bias(metadata: Metadata) -> dict[str, Any]:
    """Returns the entry that says whether attention has biases."""
    return {"attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors}


def tied(metadata: Metadata) -> dict[str, Any]:
    """Returns the entry that says whether the output layer is the table of embeddings."""
    return {"tie_word_embeddings": "output.weight" not in metadata.file.tensors}


def windows(metadata: Metadata, every: int) -> dict[str, Any]:
    """Returns the entries about windows, which all layers have but each n-th.

    Files may have the number n, or a list that says of each layer whether it has a window.
    """
    layers = metadata.needed("block_count")
    if not isinstance(layers, int) or not 0 < layers <= 1024:
        raise metadata.error("block_count", "must be a whole number up to 1024", repr(layers))
    key = "attention.sliding_window_pattern"
    listed = metadata.numbers(key) if metadata.is_list(key) else None
    if listed is None:
        every = metadata.number(key, every)
        if not isinstance(every, int) or every < 1:
            raise metadata.error(key, "must be a whole number above 0", repr(every))
        listed = [(i + 1) % every for i in range(layers)]
    types = [SLIDING if slides else FULL for slides in listed]
    return {"sliding_window": metadata.needed("attention.sliding_window"), "layer_types": types}
