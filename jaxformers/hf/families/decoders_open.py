"""Decoder-only families that set out to be an open GPT-3."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.families.decoders import ATTENTION, FEED_FORWARD, LAYER, TABLE
from jaxformers.hf.families.decoders_classic import FOUR_TIMES, QKV, H
from jaxformers.hf.family import Family, fused, linear, norm, rules, same, when
from jaxformers.hf.rope_settings import Rotary
from jaxformers.hf.settings import Derived, Fixed, Inside, Kept, Named, Only, Setting, Tied
from jaxformers.hf.special_settings import FalconLayers

OPT_LAYER = "model.decoder.layers.{i}"
# Zhang et al. 2022.
OPT = Family(
    model_type="opt",
    shape="lm",
    classes={"output": "OPTForCausalLM", "base": "OPTModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50272),
        Setting("max_position_embeddings", "max_seq_length", 2048),
        Setting("hidden_size", "d_model", 768),
        Setting("num_hidden_layers", "num_layers", 12, "layers"),
        Setting("num_attention_heads", "num_heads", 12),
        Setting("ffn_dim", "d_ff", 3072),
        Named("activation_function", "activation", "relu", ACTIVATION_NAMES),
        Setting("dropout", "dropout", 0.1, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Fixed({"position": "learned", "position_offset": 2}),
        # A table of another width is mapped into the stream, and what leaves it back.
        Setting("word_embed_proj_dim", "embedding_dim", None, optional=True),
        Derived("project_tokens", lambda f: f["embedding_dim"] not in (None, f["d_model"])),
        Derived("embedding_dim", lambda f: f["embedding_dim"] if f["project_tokens"] else None),
        Derived("transform", lambda f: "linear" if f["project_tokens"] else None),
        Derived("transform_bias", lambda f: not f["project_tokens"]),
        Named("do_layer_norm_before", "placement", True, {True: "pre", False: "post"}),
        Named("_remove_final_layer_norm", "final_norm", False, {False: True, True: False}),
        Derived("final_norm", lambda f: f["final_norm"] and f["placement"] == "pre"),
        Setting("layer_norm_elementwise_affine", "norm_gain", True, "flag"),
        Derived("norm_bias", lambda f: f["norm_gain"]),
        Setting("enable_bias", "qkv_bias", True, "flag"),
        Derived("out_bias", lambda f: f["qkv_bias"]),
        Derived("ff_bias", lambda f: f["qkv_bias"]),
        Kept(("activation_dropout", "layerdrop", "learned_embeddings")),
        Tied(True, table="model.decoder.embed_tokens.weight"),
    ),
    weights=rules(
        same(TABLE, "model.decoder.embed_tokens.weight"),
        same("embedding.position.weight", "model.decoder.embed_positions.weight"),
        linear("embedding.projection.w", "model.decoder.project_in"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{OPT_LAYER}.self_attn_layer_norm"),
        *(linear(f"{ATTENTION}.w{x}", f"{OPT_LAYER}.self_attn.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{OPT_LAYER}.self_attn.out_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{OPT_LAYER}.final_layer_norm"),
        linear(f"{FEED_FORWARD}.w_in", f"{OPT_LAYER}.fc1"),
        linear(f"{FEED_FORWARD}.w_out", f"{OPT_LAYER}.fc2"),
        norm("decoder.norm", "model.decoder.final_layer_norm"),
        linear("output.transform.w", "model.decoder.project_out"),
        linear("output.w", "lm_head"),
    ),
    prefix="model.",
    ignored=(r"decoder\.version$",),
    special={"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
)

# BigScience 2022.
BLOOM = Family(
    model_type="bloom",
    shape="lm",
    classes={"output": "BloomForCausalLM", "base": "BloomModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 250880),
        Setting("hidden_size", "d_model", 64, alias="n_embed"),
        Setting("n_layer", "num_layers", 2, "layers", alias="num_hidden_layers"),
        Setting("n_head", "num_heads", 8, alias="num_attention_heads"),
        Fixed({"d_ff": None, "activation": "gelu_tanh"}),
        FOUR_TIMES,
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        Only("apply_residual_connection_post_layernorm", (False,), False),
        Fixed({"position": "alibi", "embedding_norm": True}),
        Fixed({"qkv_bias": True, "out_bias": True, "ff_bias": True}),
        # How to compute the same.
        Kept(("pretraining_tp", "slow_but_exact", "attention_softmax_in_fp32", "offset_alibi")),
        Kept(("bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "seq_length")),
        Kept(("skip_bias_add", "skip_bias_add_qkv", "max_position_embeddings")),
        Tied(True, table="transformer.word_embeddings.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.word_embeddings.weight"),
        norm("embedding.norm", "transformer.word_embeddings_layernorm"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.input_layernorm"),
        fused(QKV, f"{H}.self_attention.query_key_value", "linear heads"),
        linear(f"{ATTENTION}.wo", f"{H}.self_attention.dense"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.post_attention_layernorm"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.dense_h_to_4h"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.dense_4h_to_h"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    special={"bos_token_id": 1, "eos_token_id": 2},
)

MPT_LAYER = "transformer.blocks.{i}"
# MosaicML 2023.
MPT = Family(
    model_type="mpt",
    shape="lm",
    classes={"output": "MptForCausalLM", "base": "MptModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50368),
        Setting("d_model", "d_model", 2048, alias="hidden_size"),
        Setting("n_layers", "num_layers", 24, "layers", alias="num_hidden_layers"),
        Setting("n_heads", "num_heads", 16, alias="num_attention_heads"),
        Fixed({"d_ff": None, "activation": "gelu", "position": "alibi", "norm_bias": False}),
        FOUR_TIMES,
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        Inside(
            "attn_config",
            (
                Setting("clip_qkv", "qkv_clip", None, "positive", optional=True),
                Setting("softmax_scale", "attention_scale", None, "positive", optional=True),
                Only("alibi", (True,), True),
                Only("alibi_bias_max", (8,), 8),
                Only("attn_type", ("multihead_attention",), "multihead_attention"),
                Only("prefix_lm", (False,), False),
                Only("qk_ln", (False,), False),
                Only("attn_uses_sequence_id", (False,), False),
                Kept(("attn_impl", "attn_pdrop")),
            ),
        ),
        Only("expansion_ratio", (4,), 4),
        Only("no_bias", (True,), True),
        Only("logit_scale", (None,), None),
        Only("norm_type", ("low_precision_layernorm", "layernorm"), "low_precision_layernorm"),
        Kept(("resid_pdrop", "emb_pdrop", "embedding_fraction", "learned_pos_emb")),
        Kept(("init_config", "init_device", "verbose", "max_position_embeddings")),
        Kept((), {"max_seq_len": 2048}),
        Tied(True, table="transformer.wte.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.wte.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{MPT_LAYER}.norm_1"),
        fused(QKV, f"{MPT_LAYER}.attn.Wqkv", "linear rows"),
        linear(f"{ATTENTION}.wo", f"{MPT_LAYER}.attn.out_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{MPT_LAYER}.norm_2"),
        linear(f"{FEED_FORWARD}.w_in", f"{MPT_LAYER}.ffn.up_proj"),
        linear(f"{FEED_FORWARD}.w_out", f"{MPT_LAYER}.ffn.down_proj"),
        norm("decoder.norm", "transformer.norm_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
)

# Almazrouei et al. 2023. The smallest models, with ALiBi in low precision, are not among these.
FALCON = Family(
    model_type="falcon",
    shape="lm",
    classes={"output": "FalconForCausalLM", "base": "FalconModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 65024),
        Setting("hidden_size", "d_model", 4544, alias="n_embed"),
        Setting("num_hidden_layers", "num_layers", 32, "layers"),
        Setting("num_attention_heads", "num_heads", 71),
        Setting("ffn_hidden_size", "d_ff", None, optional=True),
        FOUR_TIMES,
        Named("activation", "activation", "gelu", ACTIVATION_NAMES),
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        FalconLayers(),
        Setting("bias", "qkv_bias", False, "flag"),
        Derived("out_bias", lambda fields: fields["qkv_bias"]),
        Derived("ff_bias", lambda fields: fields["qkv_bias"]),
        Only("alibi", (False,), False),
        Rotary(partial_key=None, max_length=2048),
        Kept((), {"max_position_embeddings": 2048}),
        Tied(True, table="transformer.word_embeddings.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.word_embeddings.weight"),
        when(
            lambda a: a.parallel == "two norms",
            norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_attn"),
            norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_mlp"),
        ),
        when(
            lambda a: a.parallel != "two norms",
            norm(f"{LAYER}.self_attention_residual.norm", f"{H}.input_layernorm"),
            norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.post_attention_layernorm"),
        ),
        fused(QKV, f"{H}.self_attention.query_key_value", "linear heads"),
        linear(f"{ATTENTION}.wo", f"{H}.self_attention.dense"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.dense_h_to_4h"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.dense_4h_to_h"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    special={"bos_token_id": 11, "eos_token_id": 11},
)

OPEN_DECODERS = (OPT, BLOOM, MPT, FALCON)
