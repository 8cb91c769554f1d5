"""The checkpoints of every Hugging Face family that loading is tried with: data only.

Sizes differ pairwise and switches are on. `off` names settings whose change must show in what the
model says, so that a comparison that passes has compared something.
"""

from functools import partial
from typing import Any, NamedTuple

V, D, N, G, H, F, L, MAX, WINDOW = 61, 24, 6, 2, 10, 34, 2, 40, 3
SPECIAL = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 7}


class Case(NamedTuple):
    """How a checkpoint is made."""

    architecture: str  # the class of transformers
    config: dict[str, Any]  # arguments of its configuration
    off: tuple[dict[str, Any], ...]  # other values of settings: each must change the outputs
    json: dict[str, Any]  # replaces entries of config.json, as older files spell them; None: none
    renames: dict[str, str]  # replaces parts of the tensors' names, likewise
    added: dict[str, Any]  # tensors that older files have too: copies by name, zeros by shape
    dtype: str
    untied: bool  # the output layer gets weights of its own, though the class ties them
    options: dict[str, Any]  # arguments of the class beside the configuration


FIRST: dict[str, Case] = {}
SECOND: dict[str, Case] = {}
EXTRAS: dict[str, Case] = {}
HEADLESS: dict[str, Case] = {}
REFUSED: dict[str, Case] = {}


# fmt: off
def case(group, name, architecture, *settings, off=(), json=None, renames=None, added=None,
         dtype="float32", untied=False, options=None, **last):
    """Add a case to a group; later settings override earlier ones."""
    config = dict(SPECIAL)
    for more in (*settings, last):
        config |= more
    group[name] = Case(architecture, config, tuple(off), json or {}, renames or {}, added or {},
                       dtype, untied, options or {})
# fmt: on


def rope(kind="default", theta=50.0, **scaling):
    """The rotary settings as transformers 5 spells them."""
    return {"rope_type": kind, "rope_theta": theta, **scaling}


def ropes(kind="default", theta=50.0, **scaling):
    return {"rope_parameters": rope(kind, theta, **scaling)}


# Sizes by the usual names: heads of 4 features, 6 for queries and 2 for keys; of 10; 3 heads of 8.
SIZES = {"vocab_size": V, "hidden_size": D, "num_attention_heads": N, "intermediate_size": F,
         "num_hidden_layers": L, "max_position_embeddings": MAX}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": G}
HEADS = GROUPED | {"head_dim": H}
EIGHT = SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1}
SLIDING, FULL = "sliding_attention", "full_attention"
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
NO_WINDOW, ALL_FULL = {"sliding_window": None}, {"layer_types": [FULL] * L}
LOCAL_GLOBAL = {"layer_types": [SLIDING, FULL], "sliding_window": WINDOW}
OTHER_THETA, PLAIN = ropes(theta=7.0), ropes()
YARN = {"kind": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
        "original_max_position_embeddings": MAX}  # fmt: skip
MSCALE = YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}
FOUR_TIMES = {"max_position_embeddings": 4 * MAX}
TWO_ROPES = {SLIDING: rope(theta=20.0), FULL: rope("linear", theta=90.0, factor=3.0)}


def longrope(original):
    """Of a model that was first trained for sequences of `original` tokens."""
    scaling = {"short_factor": [1.1, 1.7], "long_factor": [2.3, 4.1],
               "original_max_position_embeddings": original}  # fmt: skip
    parameters = ropes("longrope", partial_rotary_factor=0.5, **scaling)
    return parameters | {"original_max_position_embeddings": original}


# fmt: off


def decoders(add):
    """The decoder-only families of the first wave."""
    gpt2 = {"vocab_size": V, "n_positions": MAX, "n_embd": D, "n_layer": L, "n_head": N,
            "n_inner": F}  # fmt: skip
    add("gpt2", "GPT2LMHeadModel", gpt2, scale_attn_by_inverse_layer_idx=True,
        off=[{"scale_attn_by_inverse_layer_idx": False}, {"activation_function": "relu"}])
    add("gpt2_untied", "GPT2LMHeadModel", gpt2, UNTIED, scale_attn_weights=False, n_inner=None,
        activation_function="relu", off=[{"scale_attn_weights": True}])
    mask = {"attn.bias": (1, 1, MAX, MAX), "attn.masked_bias": ()}
    add("gpt2_without_prefix", "GPT2LMHeadModel", gpt2, renames={"transformer.": ""},
        added={f"h.{i}.{name}": shape for i in range(L) for name, shape in mask.items()})
    add("gpt2_bare", "GPT2Model", gpt2)
    add("gpt2_older_file", "GPT2LMHeadModel", gpt2,
        added={f"transformer.h.{i}.{name}": shape for i in range(L) for name, shape in mask.items()}
        | {"lm_head.weight": "transformer.wte.weight"})

    llama = "LlamaForCausalLM"
    add("llama", llama, HEADS, BIASES, PLAIN, off=[OTHER_THETA])
    add("llama_tied", llama, GROUPED, TIED, rms_norm_eps=0.3, off=[{"rms_norm_eps": 1e-6}])
    blend = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": MAX}
    add("llama_llama3", llama, HEADS, FOUR_TIMES, ropes("llama3", factor=4.0, **blend), off=[PLAIN])
    add("llama_linear", llama, HEADS, ropes("linear", factor=4.0), off=[PLAIN])
    add("llama_dynamic", llama, HEADS, ropes("dynamic", factor=3.0), max_position_embeddings=8,
        off=[PLAIN])
    add("llama_yarn", llama, HEADS, FOUR_TIMES, ropes(**YARN), off=[PLAIN])
    add("llama_yarn_mscale", llama, HEADS, FOUR_TIMES, ropes(**MSCALE),
        off=[PLAIN, ropes(**YARN), ropes(**MSCALE | {"truncate": True})])
    add("llama_bfloat16", llama, GROUPED, dtype="bfloat16")
    add("llama_older_file", llama, HEADS, ropes("linear", factor=4.0),
        added={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (H // 2,) for i in range(L)},
        json={"rope_parameters": None, "rope_theta": 50.0,
              "rope_scaling": {"type": "linear", "factor": 4.0}})

    mistral = "MistralForCausalLM"
    add("mistral", mistral, HEADS, sliding_window=WINDOW,
        off=[NO_WINDOW, {"sliding_window": WINDOW + 1}])
    add("mistral_full", mistral, GROUPED, TIED, NO_WINDOW, hidden_act="gelu",
        off=[{"hidden_act": "relu"}])

    second_slides = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    add("qwen2", "Qwen2ForCausalLM", GROUPED, second_slides,
        off=[ALL_FULL, {"layer_types": [SLIDING] * L}])
    add("qwen2_tied", "Qwen2ForCausalLM", GROUPED, TIED)
    add("qwen3", "Qwen3ForCausalLM", HEADS, second_slides, attention_bias=True, off=[ALL_FULL])
    add("qwen3_tied", "Qwen3ForCausalLM", HEADS, TIED, FOUR_TIMES, ropes(**YARN), off=[PLAIN])

    add("gemma", "GemmaForCausalLM", HEADS, attention_bias=True, off=[OTHER_THETA])
    add("gemma_one_key_head", "GemmaForCausalLM", HEADS, num_key_value_heads=1,
        json={"hidden_act": "gelu"}, off=[{"hidden_act": "relu"}])
    add("gemma2", "Gemma2ForCausalLM", HEADS, LOCAL_GLOBAL, attention_bias=True,
        attn_logit_softcapping=1.5, final_logit_softcapping=3.0, query_pre_attn_scalar=7,
        off=[ALL_FULL, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None},
             {"query_pre_attn_scalar": H}])
    add("gemma2_uncapped", "Gemma2ForCausalLM", HEADS, LOCAL_GLOBAL,
        attn_logit_softcapping=None, final_logit_softcapping=None)
    add("gemma3", "Gemma3ForCausalLM", HEADS, LOCAL_GLOBAL, attention_bias=True,
        rope_parameters=TWO_ROPES, query_pre_attn_scalar=7,
        off=[ALL_FULL, {"query_pre_attn_scalar": H},
             {"rope_parameters": TWO_ROPES | {FULL: rope(theta=90.0)}},
             {"rope_parameters": TWO_ROPES | {SLIDING: rope(theta=90.0)}}])
    add("gemma3_older_file", "Gemma3ForCausalLM", HEADS, LOCAL_GLOBAL, rope_parameters=TWO_ROPES,
        json={"rope_parameters": None, "layer_types": None, "sliding_window_pattern": 2,
              "rope_theta": 90.0, "rope_local_base_freq": 20.0,
              "rope_scaling": {"rope_type": "linear", "factor": 3.0}})

    phi3, half = "Phi3ForCausalLM", ropes(partial_rotary_factor=0.5)
    add("phi3", phi3, EIGHT, half, sliding_window=WINDOW, off=[NO_WINDOW, PLAIN])
    add("phi3_longrope_short", phi3, EIGHT, TIED, NO_WINDOW, longrope(30), off=[longrope(8), half])
    add("phi3_longrope_long", phi3, EIGHT, NO_WINDOW, longrope(2), off=[longrope(30), half])

    neox = "GPTNeoXForCausalLM"
    add("gpt_neox", neox, SIZES, ropes(partial_rotary_factor=0.5), num_attention_heads=3,
        off=[{"use_parallel_residual": False}, OTHER_THETA])
    buffers = {"bias": (1, 1, MAX, MAX), "masked_bias": (), "rotary_emb.inv_freq": (1,)}
    add("gpt_neox_sequential", neox, SIZES, TIED, ropes(partial_rotary_factor=0.25),
        num_attention_heads=3, use_parallel_residual=False, attention_bias=False,
        json={"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 50.0},
        added={f"gpt_neox.layers.{i}.attention.{name}": shape
               for i in range(L) for name, shape in buffers.items()})


T5 = {"vocab_size": V, "d_model": D, "d_kv": H, "d_ff": F, "num_layers": 2, "num_decoder_layers": 3,
      "num_heads": N, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9,
      "decoder_start_token_id": 5}
BART = {"vocab_size": V, "d_model": D, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": N, "decoder_attention_heads": 4, "encoder_ffn_dim": F,
        "decoder_ffn_dim": 38, "max_position_embeddings": MAX, "decoder_start_token_id": 5,
        "forced_eos_token_id": None}
SCALED = {"scale_embedding": True}


def encoder_decoders(add):
    """The encoder-decoder families of the first wave."""
    other_buckets = {"relative_attention_max_distance": 30}
    add("t5", "T5ForConditionalGeneration", T5, off=[other_buckets])
    names = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"
    cross = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    add("t5_older_file", "T5ForConditionalGeneration", T5,
        added={name: "shared.weight" for name in names} | {cross: (8, N)})
    gated = T5 | {"feed_forward_proj": "gated-gelu"}
    add("t5_gated", "T5ForConditionalGeneration", gated, UNTIED, untied=True,
        off=[other_buckets, {"dense_act_fn": "relu"}, {"scale_decoder_outputs": True}])
    add("t5_gated_older_file", "T5ForConditionalGeneration", gated, untied=True,
        json={"tie_word_embeddings": False, "scale_decoder_outputs": None, "dense_act_fn": None,
              "is_gated_act": None})
    add("mt5", "MT5ForConditionalGeneration", T5, off=[other_buckets])
    add("mt5_untied", "MT5ForConditionalGeneration", T5, untied=True, json=UNTIED)

    add("bart", "BartForConditionalGeneration", BART, SCALED, off=[{"scale_embedding": False}])
    add("bart_unscaled", "BartForConditionalGeneration", BART, activation_function="relu",
        off=[{"activation_function": "silu"}])
    names = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    add("bart_bare", "BartModel", BART,
        added={name: "shared.weight" for name in names})
    add("marian", "MarianMTModel", BART, SCALED, activation_function="swish",
        decoder_vocab_size=53, share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
        off=[{"scale_embedding": False}])
    add("marian_shared", "MarianMTModel", BART, SCALED, activation_function="relu",
        added={f"model.{stack}.embed_{name}.weight": source.format(stack)
               for stack in ("encoder", "decoder")
               for name, source in {"tokens": "model.shared.weight",
                                    "positions": "model.{}.embed_positions.weight"}.items()})
    add("marian_target_tied", "MarianMTModel", BART, SCALED, decoder_vocab_size=53,
        share_encoder_decoder_embeddings=False)


def encoders(add):
    """The encoder-only families of the first wave."""
    bert = SIZES | {"type_vocab_size": 2}
    add("bert", "BertForMaskedLM", bert, layer_norm_eps=0.1, off=[{"layer_norm_eps": 1e-12}])
    add("bert_relu", "BertForMaskedLM", bert, hidden_act="relu",
        off=[{"hidden_act": "silu"}])
    add("bert_pooler", "BertModel", bert)
    add("bert_without_pooler", "BertModel", bert, options={"add_pooling_layer": False})
    add("bert_pretraining", "BertForPreTraining", bert,
        renames={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
        added={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
               "cls.predictions.decoder.bias": "cls.predictions.bias",
               "bert.embeddings.position_ids": (1, MAX)})
    add("bert_classify", "BertForSequenceClassification", bert, num_labels=5)
    add("bert_classify_tokens", "BertForTokenClassification", bert, num_labels=5)
    roberta = SIZES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    add("roberta", "RobertaForMaskedLM", roberta)
    add("roberta_without_pooler", "RobertaModel", roberta, options={"add_pooling_layer": False})
    add("roberta_classify", "RobertaForSequenceClassification", roberta, num_labels=5)
    add("xlm_roberta", "XLMRobertaForMaskedLM", roberta)
    add("xlm_roberta_pooler", "XLMRobertaModel", roberta)
    add("xlm_roberta_classify_tokens", "XLMRobertaForTokenClassification", roberta, num_labels=5)
    distilbert = {"vocab_size": V, "max_position_embeddings": MAX, "dim": D, "hidden_dim": F,
                  "n_layers": L, "n_heads": N}
    add("distilbert", "DistilBertForMaskedLM", distilbert)
    add("distilbert_sinusoids", "DistilBertModel", distilbert, sinusoidal_pos_embds=True,
        activation="relu")
    add("distilbert_classify", "DistilBertForSequenceClassification", distilbert, num_labels=5)


def decoders_second(add):
    """The decoder-only families of the second wave."""
    gptj = {"vocab_size": V, "n_positions": MAX, "n_embd": D, "n_layer": L, "n_inner": F,
            "n_head": 3, "rotary_dim": 4}
    add("gptj", "GPTJForCausalLM", gptj, off=[{"activation_function": "relu"}])
    add("gptj_all_turn", "GPTJForCausalLM", gptj, rotary_dim=8, n_inner=None)
    add("gpt_neo", "GPTNeoForCausalLM", vocab_size=V, max_position_embeddings=MAX, hidden_size=D,
        num_layers=L, attention_types=[[["global", "local"], 1]], num_heads=N, window_size=WINDOW,
        intermediate_size=F, off=[{"window_size": WINDOW + 1}])
    opt = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    opt |= {"ffn_dim": F, "word_embed_proj_dim": 16}
    add("opt", "OPTForCausalLM", opt, off=[{"activation_function": "silu"}])
    add("opt_post_norm", "OPTForCausalLM", opt, do_layer_norm_before=False)
    add("opt_without_biases", "OPTForCausalLM", opt, word_embed_proj_dim=D, enable_bias=False,
        layer_norm_elementwise_affine=False)
    bloom = {"vocab_size": V, "hidden_size": D, "n_layer": L, "n_head": N}
    add("bloom", "BloomForCausalLM", bloom)
    phi = ropes(partial_rotary_factor=0.5)
    add("phi", "PhiForCausalLM", EIGHT, phi,
        off=[{"hidden_act": "relu"}, ropes(theta=7.0, partial_rotary_factor=0.5)])
    add("phi_qk_norm", "PhiForCausalLM", EIGHT, phi, qk_layernorm=True)
    add("olmo2", "Olmo2ForCausalLM", HEADS, PLAIN, attention_bias=True, off=[OTHER_THETA])
    add("smollm3", "SmolLM3ForCausalLM", HEADS, BIASES, PLAIN, no_rope_layers=[1, 0],
        use_sliding_window=True, sliding_window=WINDOW,
        off=[ALL_FULL, {"no_rope_layers": [1, 1]}, {"no_rope_layers": [0, 0]}])
    add("smollm3_untied", "SmolLM3ForCausalLM", GROUPED, UNTIED, no_rope_layer_interval=2)
    multipliers = {"embedding_multiplier": 1.9, "logits_scaling": 0.6, "residual_multiplier": 0.7,
                   "attention_multiplier": 0.8}
    add("granite", "GraniteForCausalLM", HEADS, BIASES, multipliers,
        off=[{key: 1.0} for key in multipliers])
    add("cohere", "CohereForCausalLM", GROUPED, PLAIN, attention_bias=True, logit_scale=0.6,
        off=[{"logit_scale": 1.0}, OTHER_THETA])
    add("cohere_qk_norm", "CohereForCausalLM", GROUPED, UNTIED, use_qk_norm=True, logit_scale=0.6)
    add("starcoder2", "Starcoder2ForCausalLM", GROUPED, sliding_window=WINDOW,
        off=[NO_WINDOW, {"hidden_act": "relu"}])
    add("starcoder2_untied", "Starcoder2ForCausalLM", GROUPED, UNTIED, NO_WINDOW, use_bias=False)
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_experts": 5}
    add("mixtral", "MixtralForCausalLM", HEADS, experts, intermediate_size=36,
        sliding_window=WINDOW,
        off=[NO_WINDOW, {"num_experts_per_tok": 3}])


def encoder_decoders_second(add):
    """The encoder-decoder families of the second wave."""
    add("mbart", "MBartForConditionalGeneration", BART, SCALED, off=[{"scale_embedding": False}])
    add("mbart_unscaled", "MBartForConditionalGeneration", BART, activation_function="relu")
    add("pegasus", "PegasusForConditionalGeneration", BART, SCALED, activation_function="relu",
        off=[{"scale_embedding": False}, {"activation_function": "silu"}],
        added={f"model.{stack}.embed_positions.weight": f"model.{stack}.embed_positions.weight"
               for stack in ("encoder", "decoder")})


def encoders_second(add):
    """The encoder-only families of the second wave."""
    small = SIZES | {"type_vocab_size": 2, "embedding_size": 16}
    add("electra", "ElectraForMaskedLM", small)
    add("electra_same_size", "ElectraModel", small, embedding_size=D)
    add("electra_classify", "ElectraForSequenceClassification", small, num_labels=5)
    add("albert", "AlbertForMaskedLM", small, num_hidden_layers=3, off=[{"num_hidden_layers": 2}])
    add("albert_pooler", "AlbertModel", small, num_hidden_layers=3)
    add("albert_groups", "AlbertForMaskedLM", small, num_hidden_layers=4, num_hidden_groups=2)
    add("albert_classify", "AlbertForSequenceClassification", small, num_labels=5)
    modern = SIZES | {"num_hidden_layers": 3, "norm_bias": True, "local_attention": 6,
                      "layer_types": [FULL, SLIDING, FULL], **BIASES,
                      "rope_parameters": {SLIDING: rope(theta=20.0), FULL: rope(theta=90.0)}}
    add("modernbert", "ModernBertForMaskedLM", modern,
        off=[{"layer_types": [FULL] * 3}, {"local_attention": 4}])
    add("modernbert_plain", "ModernBertModel", SIZES, num_hidden_layers=4, local_attention=4,
        json={"rope_parameters": None, "layer_types": None, "global_rope_theta": 160000.0,
              "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3})
    add("modernbert_classify", "ModernBertForSequenceClassification", modern, num_labels=5,
        classifier_bias=True)
    add("modernbert_classify_mean", "ModernBertForSequenceClassification", modern, num_labels=5,
        classifier_pooling="mean", off=[{"classifier_pooling": "cls"}])
    add("modernbert_classify_tokens", "ModernBertForTokenClassification", modern, num_labels=5)


def extras(add):
    """Families beyond the two waves."""
    mpt = {"vocab_size": V, "d_model": D, "n_heads": N, "n_layers": L, "max_seq_len": MAX}
    add("mpt", "MptForCausalLM", mpt)
    add("mpt_clipped", "MptForCausalLM", mpt,
        attn_config={"clip_qkv": 0.9, "softmax_scale": 0.8},
        off=[{"attn_config": {"clip_qkv": 0.9}}, {"attn_config": {"softmax_scale": 0.8}}])
    add("olmo", "OlmoForCausalLM", GROUPED, attention_bias=True, clip_qkv=0.9,
        off=[{"clip_qkv": None}])
    moe = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    add("qwen3_moe", "Qwen3MoeForCausalLM", HEADS, moe, norm_topk_prob=True, attention_bias=True,
        off=[{"norm_topk_prob": False}])
    add("qwen2_moe", "Qwen2MoeForCausalLM", GROUPED, moe, shared_expert_intermediate_size=28,
        off=[{"norm_topk_prob": True}])
    add("cohere2", "Cohere2ForCausalLM", GROUPED, LOCAL_GLOBAL, PLAIN, attention_bias=True,
        logit_scale=0.6, off=[ALL_FULL, {"logit_scale": 1.0}])
    add("glm", "GlmForCausalLM", HEADS, ropes(partial_rotary_factor=0.5), head_dim=8,
        attention_bias=True, off=[ropes(theta=7.0, partial_rotary_factor=0.5)])
    add("exaone4", "Exaone4ForCausalLM", HEADS, LOCAL_GLOBAL, PLAIN, sliding_window_pattern=2,
        off=[ALL_FULL])
    add("olmo3", "Olmo3ForCausalLM", HEADS, LOCAL_GLOBAL, FOUR_TIMES, attention_bias=True,
        rope_parameters={SLIDING: rope(), FULL: rope(**YARN)},
        off=[ALL_FULL, {"rope_parameters": {SLIDING: rope(), FULL: rope()}}])
    stable = EIGHT | ropes(partial_rotary_factor=0.5)
    add("stablelm", "StableLmForCausalLM", stable, use_qkv_bias=True, qk_layernorm=True)
    add("stablelm_parallel", "StableLmForCausalLM", stable, use_parallel_residual=True)
    add("nemotron", "NemotronForCausalLM", HEADS, BIASES, ropes(partial_rotary_factor=0.5),
        head_dim=8)
    add("helium", "HeliumForCausalLM", GROUPED, BIASES, PLAIN, head_dim=4)
    nomic = SIZES | {"type_vocab_size": 2}
    add("nomic_bert", "NomicBertForMaskedLM", nomic, off=[OTHER_THETA])
    add("nomic_bert_plain", "NomicBertModel", nomic, PLAIN, off=[OTHER_THETA])
    add("arcee", "ArceeForCausalLM", HEADS, BIASES, PLAIN)
    add("seed_oss", "SeedOssForCausalLM", HEADS, PLAIN, attention_bias=True, mlp_bias=True,
        attention_out_bias=True)
    add("ministral", "MinistralForCausalLM", HEADS, LOCAL_GLOBAL, PLAIN)
    falcon = {"vocab_size": V, "hidden_size": D, "num_attention_heads": N, "num_hidden_layers": L,
              "max_position_embeddings": MAX}
    add("falcon", "FalconForCausalLM", falcon, PLAIN, off=[OTHER_THETA])
    add("falcon_grouped", "FalconForCausalLM", falcon, PLAIN, new_decoder_architecture=True,
        num_kv_heads=2, bias=True, ffn_hidden_size=F)
    add("m2m_100", "M2M100ForConditionalGeneration", BART)
    add("camembert", "CamembertForMaskedLM", SIZES, type_vocab_size=1)
    add("mpnet", "MPNetForMaskedLM", SIZES, pad_token_id=1)
    add("eurobert", "EuroBertForMaskedLM", HEADS, BIASES, PLAIN)
    add("albert_pretraining", "AlbertForPreTraining", SIZES, type_vocab_size=2, embedding_size=16)
    add("electra_pretraining", "ElectraForPreTraining", SIZES, type_vocab_size=2,
        embedding_size=16, hidden_act="relu")


# One case of each family of decoders, and the class of transformers without the output layer.
BARE = {"llama": "LlamaModel", "mistral": "MistralModel", "ministral": "MinistralModel",
        "qwen2": "Qwen2Model", "qwen3": "Qwen3Model", "gemma": "GemmaModel",
        "gemma2": "Gemma2Model", "gemma3": "Gemma3TextModel", "phi3": "Phi3Model",
        "olmo2": "Olmo2Model", "smollm3": "SmolLM3Model", "granite": "GraniteModel",
        "cohere": "CohereModel", "starcoder2": "Starcoder2Model", "seed_oss": "SeedOssModel",
        "arcee": "ArceeModel", "nemotron": "NemotronModel", "olmo": "OlmoModel",
        "olmo3": "Olmo3Model", "cohere2": "Cohere2Model", "exaone4": "Exaone4Model",
        "glm": "GlmModel", "helium": "HeliumModel", "stablelm": "StableLmModel",
        "mixtral": "MixtralModel", "qwen2_moe": "Qwen2MoeModel", "qwen3_moe": "Qwen3MoeModel",
        "gpt2": "GPT2Model", "gpt_neox": "GPTNeoXModel", "gptj": "GPTJModel",
        "gpt_neo": "GPTNeoModel", "phi": "PhiModel", "opt_without_biases": "OPTModel",
        "bloom": "BloomModel", "mpt": "MptModel", "falcon": "FalconModel"}


def headless(add):
    """Models without an output layer, and encoders of encoder-decoders."""
    for name, architecture in BARE.items():
        add(f"{name}_headless", architecture, CASES[name].config, UNTIED)
    gated = T5 | {"feed_forward_proj": "gated-gelu"}
    add("t5_encoder", "T5EncoderModel", T5)
    add("t5_encoder_gated", "T5EncoderModel", gated, UNTIED,
        added={"encoder.embed_tokens.weight": "shared.weight"})
    add("mt5_encoder", "MT5EncoderModel", T5)
    add("t5_headless", "T5Model", gated, UNTIED)
    add("mt5_headless", "MT5Model", T5)
    add("marian_headless", "MarianModel", CASES["marian"].config)


def refused(add):
    """What transformers has and we do not: by the word that the error must have."""
    add("apply_residual_connection_post_layernorm", "BloomForCausalLM", vocab_size=V,
        hidden_size=D, n_layer=L, n_head=N, apply_residual_connection_post_layernorm=True)
    add("mlp_only_layers", "Qwen3MoeForCausalLM", HEADS, num_experts=5, mlp_only_layers=[0])
    add("add_cross_attention", "GPT2LMHeadModel", n_embd=D, n_head=N, add_cross_attention=True)
    add("inner_group_num", "AlbertForMaskedLM", SIZES, embedding_size=16, inner_group_num=2)
    add("is_decoder", "BertForMaskedLM", SIZES, is_decoder=True)
    add("hidden_act", "LlamaForCausalLM", SIZES, hidden_act="hardswish")
    add("umt5", "UMT5ForConditionalGeneration", T5)


# fmt: on
for fill in (decoders, encoder_decoders, encoders):
    fill(partial(case, FIRST))
for fill in (decoders_second, encoder_decoders_second, encoders_second):
    fill(partial(case, SECOND))
extras(partial(case, EXTRAS))
refused(partial(case, REFUSED))
CASES = FIRST | SECOND | EXTRAS
headless(partial(case, HEADLESS))
