"""Decoder-only families before Llama: GPT-2 and those that grew from it."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.families.decoders import ATTENTION, FEED_FORWARD, LAYER, TABLE
from jaxformers.hf.family import Family, conv1d, fused, linear, norm, rules, same
from jaxformers.hf.rope_settings import Rotary
from jaxformers.hf.settings import Derived, Fixed, Kept, Named, Only, Setting, Tied
from jaxformers.hf.special_settings import LayerScale, LocalLayers, RotaryDim

QKV = tuple(f"{ATTENTION}.w{x}" for x in "qkv")
H = "transformer.h.{i}"
GPT_TABLE = "transformer.wte.weight"
GPT_IGNORED = (r"\.attn\.(attention\.)?(masked_)?bias$",)
FOUR_TIMES = Derived("d_ff", lambda fields: fields["d_ff"] or 4 * fields["d_model"])
INNER = (Setting("n_inner", "d_ff", None, optional=True), FOUR_TIMES)

# Radford et al. 2019.
GPT2 = Family(
    model_type="gpt2",
    shape="lm",
    classes={"output": "GPT2LMHeadModel", "base": "GPT2Model"},
    settings=(
        Setting("vocab_size", "vocab_size", 50257),
        Setting("n_positions", "max_seq_length", 1024),
        Setting("n_embd", "d_model", 768),
        Setting("n_layer", "num_layers", 12, "layers"),
        Setting("n_head", "num_heads", 12),
        *INNER,
        Named("activation_function", "activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_pdrop", "dropout", 0.1, "number"),
        Setting("attn_pdrop", "attention_dropout", 0.1, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        Fixed({"position": "learned", "qkv_bias": True, "out_bias": True, "ff_bias": True}),
        LayerScale(),
        Kept(("embd_pdrop", "n_ctx", "reorder_and_upcast_attn")),
        Tied(True, table=GPT_TABLE),
    ),
    weights=rules(
        same(TABLE, GPT_TABLE),
        same("embedding.position.weight", "transformer.wpe.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        fused(QKV, f"{H}.attn.c_attn", "conv1d columns"),
        conv1d(f"{ATTENTION}.wo", f"{H}.attn.c_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_2"),
        conv1d(f"{FEED_FORWARD}.w_in", f"{H}.mlp.c_fc"),
        conv1d(f"{FEED_FORWARD}.w_out", f"{H}.mlp.c_proj"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=GPT_IGNORED,
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

NEOX_LAYER = "gpt_neox.layers.{i}"
# Black et al. 2022; Biderman et al. 2023 (Pythia).
GPT_NEOX = Family(
    model_type="gpt_neox",
    shape="lm",
    classes={"output": "GPTNeoXForCausalLM", "base": "GPTNeoXModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50432),
        Setting("hidden_size", "d_model", 6144),
        Setting("num_hidden_layers", "num_layers", 44, "layers"),
        Setting("num_attention_heads", "num_heads", 64),
        Setting("intermediate_size", "d_ff", 24576),
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Setting("layer_norm_eps", "norm_eps", 1e-5, "positive"),
        Named("hidden_act", "activation", "gelu", ACTIVATION_NAMES),
        Named("use_parallel_residual", "parallel", True, {True: "two norms", False: None}),
        Setting("attention_bias", "qkv_bias", True, "flag"),
        Derived("out_bias", lambda fields: fields["qkv_bias"]),
        Fixed({"ff_bias": True}),
        Rotary(partial=0.25, partial_key="rotary_pct", theta_key="rotary_emb_base"),
        # Some files repeat what they say under other names.
        Kept(("rope_theta", "partial_rotary_factor", "is_decoder")),
        Kept(("attention_probs_dropout_prob", "hidden_dropout_prob")),
        Kept((), {"max_position_embeddings": 2048}),
        Tied(False, "embed_out.weight", "gpt_neox.embed_in.weight"),
    ),
    weights=rules(
        same(TABLE, "gpt_neox.embed_in.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{NEOX_LAYER}.input_layernorm"),
        fused(
            QKV,
            f"{NEOX_LAYER}.attention.query_key_value",
            "linear heads",
        ),
        linear(f"{ATTENTION}.wo", f"{NEOX_LAYER}.attention.dense"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{NEOX_LAYER}.post_attention_layernorm"),
        linear(f"{FEED_FORWARD}.w_in", f"{NEOX_LAYER}.mlp.dense_h_to_4h"),
        linear(f"{FEED_FORWARD}.w_out", f"{NEOX_LAYER}.mlp.dense_4h_to_h"),
        norm("decoder.norm", "gpt_neox.final_layer_norm"),
        linear("output.w", "embed_out"),
    ),
    prefix="gpt_neox.",
    ignored=(r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
    special={"bos_token_id": 0, "eos_token_id": 2},
    aliases=((r"^lm_head\.", "embed_out."),),
)

# Wang and Komatsuzaki 2021.
GPTJ = Family(
    model_type="gptj",
    shape="lm",
    classes={"output": "GPTJForCausalLM", "base": "GPTJModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50400),
        Setting("n_embd", "d_model", 4096),
        Setting("n_layer", "num_layers", 28, "layers"),
        Setting("n_head", "num_heads", 16),
        *INNER,
        Named("activation_function", "activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_pdrop", "dropout", 0.0, "number"),
        Setting("attn_pdrop", "attention_dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        RotaryDim(),
        Fixed({"parallel": "one norm", "ff_bias": True, "logits_bias": True}),
        Kept(("embd_pdrop", "rotary", "scale_attn_weights"), {"n_positions": 2048}),
        Tied(False, table=GPT_TABLE),
    ),
    weights=rules(
        same(TABLE, GPT_TABLE),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        *(linear(f"{ATTENTION}.w{x}", f"{H}.attn.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{H}.attn.out_proj"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.fc_in"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.fc_out"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=GPT_IGNORED,
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

# Black et al. 2021.
GPT_NEO = Family(
    model_type="gpt_neo",
    shape="lm",
    classes={"output": "GPTNeoForCausalLM", "base": "GPTNeoModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50257),
        Setting("max_position_embeddings", "max_seq_length", 2048),
        Setting("hidden_size", "d_model", 2048),
        Setting("num_layers", "num_layers", 24, "layers"),
        Setting("num_heads", "num_heads", 16),
        Setting("intermediate_size", "d_ff", None, optional=True),
        FOUR_TIMES,
        Named("activation_function", "activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        LocalLayers(),
        Fixed({"position": "learned", "attention_scale": 1.0, "out_bias": True, "ff_bias": True}),
        Kept(("embed_dropout",)),
        Tied(True, table=GPT_TABLE),
    ),
    weights=rules(
        same(TABLE, GPT_TABLE),
        same("embedding.position.weight", "transformer.wpe.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        *(linear(f"{ATTENTION}.w{x}", f"{H}.attn.attention.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{H}.attn.attention.out_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_2"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.c_fc"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.c_proj"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=GPT_IGNORED,
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

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
        Kept(("activation_dropout", "layerdrop")),
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
        Kept(("skip_bias_add", "skip_bias_add_qkv")),
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

PHI_LAYER = "model.layers.{i}"
# Gunasekar et al. 2023; Li et al. 2023.
PHI = Family(
    model_type="phi",
    shape="lm",
    classes={"output": "PhiForCausalLM", "base": "PhiModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 51200),
        Setting("hidden_size", "d_model", 2048),
        Setting("intermediate_size", "d_ff", 8192),
        Setting("num_hidden_layers", "num_layers", 24, "layers"),
        Setting("num_attention_heads", "num_heads", 32),
        Setting("num_key_value_heads", "num_kv_heads", None, optional=True),
        Setting("resid_pdrop", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Named("hidden_act", "activation", "gelu_new", ACTIVATION_NAMES),
        Setting("layer_norm_eps", "norm_eps", 1e-5, "positive"),
        Named("qk_layernorm", "qk_norm", False, {False: None, True: "head"}),
        Fixed({"parallel": "one norm", "qkv_bias": True, "out_bias": True, "ff_bias": True}),
        Fixed({"logits_bias": True}),
        Rotary(partial=0.5, max_length=2048),
        Kept(("embd_pdrop",), {"max_position_embeddings": 2048}),
        Tied(False),
    ),
    weights=rules(
        same(TABLE, "model.embed_tokens.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{PHI_LAYER}.input_layernorm"),
        *(linear(f"{ATTENTION}.w{x}", f"{PHI_LAYER}.self_attn.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{PHI_LAYER}.self_attn.dense"),
        norm(f"{ATTENTION}.q_norm", f"{PHI_LAYER}.self_attn.q_layernorm"),
        norm(f"{ATTENTION}.k_norm", f"{PHI_LAYER}.self_attn.k_layernorm"),
        linear(f"{FEED_FORWARD}.w_in", f"{PHI_LAYER}.mlp.fc1"),
        linear(f"{FEED_FORWARD}.w_out", f"{PHI_LAYER}.mlp.fc2"),
        norm("decoder.norm", "model.final_layernorm"),
        linear("output.w", "lm_head"),
    ),
    prefix="model.",
    ignored=(r"rotary_emb\.inv_freq$",),
    special={"bos_token_id": 1, "eos_token_id": 2},
)

CLASSIC_DECODERS = (GPT2, GPT_NEOX, GPTJ, GPT_NEO, OPT, BLOOM, PHI)
