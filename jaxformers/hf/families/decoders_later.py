"""Decoder-only families that change more of Llama than its sizes."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.families.decoders import (
    ATTENTION,
    ATTENTION_BIAS,
    FEED_FORWARD,
    LAYER,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_FEED_FORWARD,
    LLAMA_NORMS,
    MLP_BIAS,
    RMS_GATED,
    SILU,
    TANH_GELU,
    L,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import linear, norm, rules, same
from jaxformers.hf.rope_settings import NO_ROPE, Windows
from jaxformers.hf.settings import Derived, Fixed, Kept, Named, Only, Power, Setting, Tied

OUTPUT_NORMS = rules(
    norm(f"{LAYER}.self_attention_residual.output_norm", f"{L}.post_attention_layernorm"),
    norm(f"{LAYER}.feed_forward_residual.output_norm", f"{L}.post_feedforward_layernorm"),
)
ALL_HEADS_NORMS = rules(
    norm(f"{ATTENTION}.q_norm.norm", f"{L}.self_attn.q_norm"),
    norm(f"{ATTENTION}.k_norm.norm", f"{L}.self_attn.k_norm"),
)
OLMO2_LAYERS = (
    *sizes(vocab_size=50304),
    RMS_GATED,
    Fixed({"placement": "output", "qk_norm": "all heads"}),
    rms(1e-5),
    SILU,
    *ATTENTION_BIAS,
)
OLMO2_WEIGHTS = rules(
    LLAMA_ENDS, OUTPUT_NORMS, LLAMA_ATTENTION, ALL_HEADS_NORMS, LLAMA_FEED_FORWARD
)
# OLMo Team 2025, OLMo 2.
OLMO2 = llama_like(
    "olmo2",
    "Olmo2",
    (*OLMO2_LAYERS, *rotary(2048, partial_key=None), Tied(False)),
    OLMO2_WEIGHTS,
    pad=1,
    eos=50279,
)

# Bakouch et al. 2025; some layers have no positions (Yang et al. 2025).
SMOLLM3 = llama_like(
    "smollm3",
    "SmolLM3",
    (
        *sizes(
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
        ),
        RMS_GATED,
        rms(1e-6),
        SILU,
        *ATTENTION_BIAS,
        MLP_BIAS,
        Windows(None, "still", enabled_key="use_sliding_window"),
        *rotary(32768, theta=2e6, without=NO_ROPE, partial_key=None),
        Kept(("max_window_layers", "pretraining_tp")),
        Tied(True),
    ),
    pad=128004,
    bos=128000,
    eos=128001,
)

# Granite Team 2024.
GRANITE = llama_like(
    "granite",
    "Granite",
    (
        *sizes(),
        RMS_GATED,
        rms(1e-6),
        SILU,
        *ATTENTION_BIAS,
        MLP_BIAS,
        Setting("embedding_multiplier", "embedding_scale", 1.0, "positive"),
        Setting("residual_multiplier", "residual_scale", 1.0, "positive"),
        Setting("attention_multiplier", "attention_scale", 1.0, "positive"),
        Power("logits_scaling", "logits_scale", 1.0, -1.0),
        *rotary(2048, partial_key=None),
        Tied(False),
    ),
    bos=1,
    eos=2,
)

COHERE_SIZES = sizes(
    vocab_size=256000,
    hidden_size=8192,
    num_hidden_layers=40,
    num_attention_heads=64,
    intermediate_size=22528,
)
COHERE_LAYERS = (
    Fixed({"norm_bias": False, "parallel": "one norm", "gated": True}),
    Setting("layer_norm_eps", "norm_eps", 1e-5, "positive"),
    SILU,
    *ATTENTION_BIAS,
    Setting("logit_scale", "logits_scale", 0.0625, "positive"),
)
COHERE_WEIGHTS = rules(LLAMA_ENDS, LLAMA_NORMS[:2], LLAMA_ATTENTION, LLAMA_FEED_FORWARD)
# Command R.
COHERE = llama_like(
    "cohere",
    "Cohere",
    (
        *COHERE_SIZES,
        *COHERE_LAYERS,
        Named("use_qk_norm", "qk_norm", False, {False: None, None: None, True: "per head"}),
        *rotary(8192, theta=5e5, interleaved=True, partial_key=None),
        Tied(True),
    ),
    rules(
        COHERE_WEIGHTS,
        *(same(f"{ATTENTION}.{x}_norm.norm.gain", f"{L}.self_attn.{x}_norm.weight") for x in "qk"),
    ),
    pad=0,
    bos=5,
    eos=255001,
)

# Lozhkov et al. 2024.
STARCODER2 = llama_like(
    "starcoder2",
    "Starcoder2",
    (
        *sizes(
            vocab_size=49152,
            hidden_size=3072,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
            intermediate_size=12288,
        ),
        Setting("norm_epsilon", "norm_eps", 1e-5, "positive"),
        Named("hidden_act", "activation", TANH_GELU, {TANH_GELU: "gelu_tanh"} | ACTIVATION_NAMES),
        Setting("use_bias", "ff_bias", True, "flag"),
        Derived("qkv_bias", lambda fields: fields["ff_bias"]),
        Derived("out_bias", lambda fields: fields["ff_bias"]),
        Setting("residual_dropout", "dropout", 0.0, "number"),
        Windows(None, typed=False),
        *rotary(4096, partial_key=None),
        Only("norm_type", ("layer_norm",), "layer_norm"),
        Only("mlp_type", ("default",), "default"),
        # Left over from StarCoder in the files of the first hour.
        Kept(("embedding_dropout", "activation_function", "layer_norm_epsilon")),
        Kept(
            ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights")
        ),
        Tied(True),
    ),
    rules(
        LLAMA_ENDS,
        LLAMA_NORMS,
        LLAMA_ATTENTION,
        linear(f"{FEED_FORWARD}.w_in", f"{L}.mlp.c_fc"),
        linear(f"{FEED_FORWARD}.w_out", f"{L}.mlp.c_proj"),
    ),
    bos=50256,
    eos=50256,
)

LATER_DECODERS = (OLMO2, SMOLLM3, GRANITE, COHERE, STARCODER2)
