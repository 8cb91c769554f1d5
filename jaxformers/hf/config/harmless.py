"""Entries of a config.json that change no number of a model at inference.

An entry that is neither here nor in the family's table is refused, because a model that ignored it
could give other numbers. An entry belongs here only if every tool that reads it takes it for names,
ids, bookkeeping, training, or a way to compute the same.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_ABOUT_TEXT = """
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id eos_token_ids
    bos_token eos_token pad_token sep_token cls_token mask_token unk_token additional_special_tokens
    tokenizer_class tokenizer_name tokenizer_name_or_path tokenizer_file tokenizer_model_max_length
    tokenizer_padding_side padding_side truncation_side do_lower_case add_bos_token add_eos_token
    add_prefix_space vocab_file chat_template language model_max_length max_sequence_length
    max_seq_length max_seq_len max_len max_input_length seq_length n_ctx
    id2label label2id num_labels _num_labels num_choices problem_type prefix
"""
# `generate` has a table of the entries that change its tokens.
_OF_GENERATION = """
    bad_words_ids suppress_tokens begin_suppress_tokens max_length max_new_tokens
    remove_invalid_values low_memory use_cache cache_implementation cache_config
    output_scores output_logits return_dict_in_generate return_legacy_cache
"""
_BOOKKEEPING = """
    _name_or_path architectures auto_map model_type transformers_version torch_dtype dtype
    is_encoder_decoder is_llama_config finetuning_task task_specific_params name model_name model_id
    model_name_or_path base_model base_model_name base_model_name_or_path model_version
    library_name license author description tags revision config_version
    custom_pipelines pipeline_tag adapters adapter_fusion_models fusion_models
    sentence_transformers sbert_ce_default_activation_function _commit_hash
    transformers.js_config onnx_export onnx_opset_version xla_device torch_version
    optimum_version mlx_version
"""
_OF_TRAINING = """
    initializer_range initializer_factor initializer_std init_std init_method_std layer_norm_init
    gradient_checkpointing gradient_checkpointing_kwargs recompute_grad fp16 bf16 tf32 seed
    label_smoothing label_smoothing_factor neftune_noise_alpha loss_type ignore_index
    mlm_probability save_step replacing_rate output_past router_aux_loss_coef router_z_loss_coef
    output_router_logits router_jitter_noise aux_loss_coef use_liger_kernel use_xentropy
"""
_OF_HEADS_WE_LACK = """
    classifier_dropout classifier_dropout_prob summary_type summary_use_proj summary_activation
    summary_first_dropout summary_last_dropout summary_proj_to_labels
"""
_WAYS_TO_COMPUTE = """
    return_dict use_return_dict output_hidden_states output_attentions torchscript tf_legacy_loss
    use_bfloat16 chunk_size_feed_forward attn_implementation attention_implementation
    reference_compile deterministic_flash_attn static_position_embeddings torch_compile
    keys_to_ignore_at_inference
"""
HARMLESS = frozenset(
    " ".join(
        (_ABOUT_TEXT, _OF_GENERATION, _BOOKKEEPING, _OF_TRAINING, _OF_HEADS_WE_LACK)
        + (_WAYS_TO_COMPUTE,)
    ).split()
)
# Rates of dropout, kernels of attention and of fused steps, and notes of Unsloth.
_HARMLESS_NAMES = re.compile(
    r"(\w+_)?(dropout|pdrop|layerdrop)(_prob|_rate|_p)?|_attn_implementation\w*|_?(use_)?flash_(attn|attention)\w*"
    r"|(use_)?(sdpa|xformers|memory_efficient)_attention|(use_)?fused_\w+|unsloth_\w+"
)

# Entries that repeat a size under the name that it has in other families, with our field.
REDUNDANT = {
    **dict.fromkeys(("embedding_size", "emb_size", "n_embd", "n_embed"), "d_model"),
    **dict.fromkeys(("hidden_size", "d_model", "dim"), "d_model"),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "n_heads"), "attention.num_heads"
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), "num_layers"),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), "attention.num_kv_heads"),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"), "feed_forward.d_ff"
    ),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), "norm.eps"),
}

# Keys by which tools say that weights have fewer than 16 bits.
QUANTIZED = (
    *("quantization_config", "quantization", "compression_config", "sparsity_config"),
    *("quantize_config", "quant_config"),
)


def is_harmless(entries: Mapping[str, Any], key: str) -> bool:
    """Returns whether an entry that no table has may be ignored."""
    value = entries[key]
    if value is None or value is False or value in ("", [], {}) or key in HARMLESS:
        return True
    if (
        key in ("sliding_window", "max_window_layers")
        and entries.get("use_sliding_window") is False
    ):
        return True
    return _HARMLESS_NAMES.fullmatch(key) is not None


def check_not_quantized(entries: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Raises if weights have fewer bits than are read here, or would get fewer when loaded.

    Arguments:
        entries: the entries of config.json.
        known: the methods of quantization that are read, for the error.
    """
    key = next((key for key in QUANTIZED if entries.get(key) not in (None, False, {})), None)
    if key is None:
        return
    value = entries[key]
    method = value.get("quant_method") if isinstance(value, dict) else None
    by = f", by {method}" if isinstance(method, str) else ""
    base = entries.get("_name_or_path")
    base = f" (perhaps {base!r:.80})" if isinstance(base, str) and base else ""
    read = f" (read are {', '.join(known)})" if known else ""
    raise ValueError(
        f"config.json: {key} = {value!r:.200} says that the weights are quantized{by:.40}, which "
        f"is not read{read}. Pass the checkpoint that it was made of{base}. Where the weights are "
        "whole all the same, remove this entry."
    )
