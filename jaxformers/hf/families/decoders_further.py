"""Decoder-only families that combine what those of the other files have in other ways."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.families.decoders import (
    ATTENTION,
    ATTENTION_BIAS,
    FEED_FORWARD,
    FUSED_FEED_FORWARD,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_FEED_FORWARD,
    LLAMA_NORMS,
    LLAMA_WEIGHTS,
    MLP_BIAS,
    QK_NORMS,
    RMS_GATED,
    SILU,
    L,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.families.decoders_later import (
    COHERE_LAYERS,
    COHERE_SIZES,
    COHERE_WEIGHTS,
    OLMO2_LAYERS,
    OLMO2_WEIGHTS,
    OUTPUT_NORMS,
)
from jaxformers.hf.family import Rule, linear, rules
from jaxformers.hf.rope_settings import FULL, Windows
from jaxformers.hf.settings import Derived, Fixed, Kept, Named, Only, Setting, Tied

UP_DOWN = rules(
    linear(f"{FEED_FORWARD}.w_in", f"{L}.mlp.up_proj"),
    linear(f"{FEED_FORWARD}.w_out", f"{L}.mlp.down_proj"),
)
UP_DOWN_WEIGHTS = rules(LLAMA_ENDS, LLAMA_NORMS, LLAMA_ATTENTION, UP_DOWN)
RELU_SQUARED = Named("hidden_act", "activation", "relu2", ACTIVATION_NAMES)
QKV_BIAS = Setting("attention_bias", "qkv_bias", False, "flag")

# ByteDance Seed Team 2025.
SEED_OSS = llama_like(
    "seed_oss",
    "SeedOss",
    (
        *sizes(
            vocab_size=155136,
            intermediate_size=27648,
            num_hidden_layers=64,
            num_attention_heads=80,
            num_key_value_heads=8,
            head_dim=128,
            attention_dropout=0.1,
        ),
        RMS_GATED,
        rms(1e-6),
        SILU,
        QKV_BIAS._replace(default=True),
        Setting("attention_out_bias", "out_bias", False, "flag"),
        MLP_BIAS,
        Setting("residual_dropout", "dropout", 0.1, "number"),
        *rotary(524288, partial_key=None),
        Kept(("pretraining_tp",)),
        Tied(False),
    ),
    pad=1,
    bos=0,
    eos=2,
)

# Arcee AI 2025, AFM.
ARCEE = llama_like(
    "arcee",
    "Arcee",
    (
        *sizes(hidden_size=2560, intermediate_size=18432),
        Fixed({"norm": "rms"}),
        rms(1e-5),
        RELU_SQUARED,
        *ATTENTION_BIAS,
        MLP_BIAS,
        *rotary(4096, partial_key=None),
        Tied(False),
    ),
    UP_DOWN_WEIGHTS,
    bos=128000,
    eos=128001,
)

# Parmar et al. 2024.
NEMOTRON = llama_like(
    "nemotron",
    "Nemotron",
    (
        *sizes(
            vocab_size=256000, hidden_size=6144, intermediate_size=24576, num_attention_heads=48
        ),
        Fixed({"norm_offset": 1.0}),
        Setting("norm_eps", "norm_eps", 1e-5, "positive"),
        RELU_SQUARED,
        *ATTENTION_BIAS,
        MLP_BIAS,
        *rotary(4096, partial=0.5),
        Kept(("rope_percent",)),
        Tied(False),
    ),
    UP_DOWN_WEIGHTS,
    bos=2,
    eos=3,
)

# Groeneveld et al. 2024.
OLMO = llama_like(
    "olmo",
    "Olmo",
    (
        *sizes(vocab_size=50304),
        Fixed({"norm_gain": False, "norm_bias": False, "gated": True}),
        SILU,
        *ATTENTION_BIAS,
        Setting("clip_qkv", "qkv_clip", None, "positive", optional=True),
        *rotary(2048, partial_key=None),
        Tied(False),
    ),
    pad=1,
    eos=50279,
)
# OLMo Team 2025, OLMo 3.
OLMO3 = llama_like(
    "olmo3",
    "Olmo3",
    (
        *OLMO2_LAYERS,
        Windows(4096, "every", 4),
        *rotary(2048, theta=5e5, sliding_theta=5e5, unscaled_sliding=True, partial_key=None),
        Tied(False),
    ),
    OLMO2_WEIGHTS,
    pad=1,
    eos=50279,
)

# Cohere 2025, Command A.
COHERE2 = llama_like(
    "cohere2",
    "Cohere2",
    (
        *COHERE_SIZES,
        *COHERE_LAYERS,
        Windows(4096, "every", 4, every_key="sliding_window_pattern"),
        *rotary(8192, interleaved=True, without=FULL, partial_key=None),
        Only("position_embedding_type", ("rope_gptj",), "rope_gptj"),
        Only("rotary_pct", (1.0, 1), 1.0),
        Only("use_gated_activation", (True,), True),
        Only("use_parallel_block", (True,), True),
        Only("order_of_interleaved_layers", ("local_attn_first",), "local_attn_first"),
        Kept(("layer_switch", "use_embedding_sharing", "use_parallel_embedding")),
        Kept(("_sliding_window_pattern",)),  # beside layer_types, which say it
        Tied(True),
    ),
    COHERE_WEIGHTS,
    pad=0,
    bos=5,
    eos=255001,
)

# LG AI Research 2025.
EXAONE4 = llama_like(
    "exaone4",
    "Exaone4",
    (
        *sizes(vocab_size=102400, intermediate_size=16384, num_key_value_heads=32),
        RMS_GATED,
        Fixed({"placement": "output", "qk_norm": "head"}),
        rms(1e-5),
        SILU,
        Windows(4096, "every", 4, every_key="sliding_window_pattern"),
        *rotary(2048, without=FULL, if_windowed=True, partial_key=None),
        Tied(False),
    ),
    rules(LLAMA_ENDS, OUTPUT_NORMS, LLAMA_ATTENTION, QK_NORMS, LLAMA_FEED_FORWARD),
    bos=0,
    eos=2,
)

# GLM Team 2024.
GLM = llama_like(
    "glm",
    "Glm",
    (
        *sizes(
            vocab_size=151552,
            intermediate_size=13696,
            num_hidden_layers=40,
            num_key_value_heads=2,
            head_dim=128,
        ),
        RMS_GATED,
        rms(1.5625e-7),
        SILU,
        QKV_BIAS._replace(default=True),
        *rotary(131072, partial=0.5, interleaved=True),
        Tied(False),
    ),
    rules(LLAMA_ENDS, LLAMA_NORMS, LLAMA_ATTENTION, FUSED_FEED_FORWARD),
    pad=151329,
    eos=[151329, 151336, 151338],
)

# Kyutai 2025.
HELIUM = llama_like(
    "helium",
    "Helium",
    (
        *sizes(
            vocab_size=48000,
            hidden_size=2560,
            intermediate_size=7040,
            num_hidden_layers=24,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=128,
        ),
        RMS_GATED,
        rms(1e-8),
        SILU,
        QKV_BIAS,
        MLP_BIAS,
        *rotary(4096, theta=1e5, interleaved=True, partial_key=None),
        Tied(False),
    ),
    pad=3,
    bos=1,
    eos=2,
)

# Bellagente et al. 2024.
STABLELM = llama_like(
    "stablelm",
    "StableLm",
    (
        *(
            setting
            for setting in sizes(
                vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_key_value_heads=32
            )
            if setting.key != "head_dim"
        ),
        Fixed({"gated": True}),
        Setting("layer_norm_eps", "norm_eps", 1e-5, "positive"),
        SILU,
        Setting("use_qkv_bias", "qkv_bias", False, "flag"),
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Named("use_parallel_residual", "parallel", False, {False: None, True: "one norm"}),
        Named("qk_layernorm", "qk_norm", False, {False: None, True: "per head"}),
        Derived("qk_norm_bias", lambda fields: None if fields["qk_norm"] is None else False),
        *rotary(4096, partial=0.25),
        Tied(False),
    ),
    rules(
        LLAMA_WEIGHTS,
        *(
            [
                Rule(
                    (f"{ATTENTION}.{x}_norm.norm.gain",),
                    (f"{L}.self_attn.{x}_layernorm.norms.{{e}}.weight",),
                    "heads",
                )
            ]
            for x in "qk"
        ),
    ),
    bos=0,
    eos=0,
)

FURTHER_DECODERS = (
    *(SEED_OSS, ARCEE, NEMOTRON, OLMO, OLMO3, COHERE2, EXAONE4, GLM, HELIUM),
    STABLELM,
)
