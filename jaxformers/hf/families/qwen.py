"""The tables of Qwen, with and without a mixture of experts."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.settings import Fixed, Kept, Only, Setting
from jaxformers.hf.families.decoder_paths import FEED_FORWARD
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_NORMS,
    LLAMA_WEIGHTS,
    QK_NORMS,
    RMS_GATED,
    SILU,
    L,
    experts,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import linear, rules

QWEN_SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
QWEN_LAYERS = (
    RMS_GATED,
    rms(1e-6),
    SILU,
    Windows(4096, "last", enabled_key="use_sliding_window"),
    *rotary(32768, partial_key=None),
    Tied(False),
)

# Yang et al. 2024.
QWEN2 = llama_like(
    "qwen2",
    "Qwen2",
    (*sizes(**QWEN_SIZES), Fixed({"attention.qkv_bias": True}), *QWEN_LAYERS),
)

# Yang et al. 2025.
QWEN3 = llama_like(
    "qwen3",
    "Qwen3",
    (
        *sizes(**QWEN_SIZES, head_dim=128),
        *ATTENTION_BIAS,
        Fixed({"attention.qk_norm": "head"}),
        *QWEN_LAYERS,
    ),
    rules(LLAMA_WEIGHTS, QK_NORMS),
)

QWEN_SHARED = (
    RMS_GATED,
    rms(1e-6),
    SILU,
    Setting("norm_topk_prob", "feed_forward.renormalize", False, "flag"),
    # Some layers could be dense. In the published models none is.
    Only("decoder_sparse_step", (1,), 1),
    Only("mlp_only_layers", ([], None), None),
    *rotary(32768, partial_key=None),
    Tied(False),
)

QWEN_EXPERTS = experts(f"{L}.mlp", "gate_proj", "up_proj", "down_proj")


def qwen_sizes(expert_width, **defaults):
    """Returns sizes; `intermediate_size` is that of dense layers, which no model has."""
    usual = sizes(vocab_size=151936, hidden_size=2048, num_hidden_layers=24, **defaults)
    width = Setting("moe_intermediate_size", "feed_forward.d_ff", expert_width)
    return (
        *(x for x in usual if x.field != "feed_forward.d_ff"),
        width,
        Kept(("intermediate_size",)),
    )


# Yang et al. 2024.
QWEN2_MOE = llama_like(
    "qwen2_moe",
    "Qwen2Moe",
    (
        *qwen_sizes(1408, num_attention_heads=16, num_key_value_heads=16),
        Setting("qkv_bias", "attention.qkv_bias", True, "flag"),
        Setting("num_experts", "feed_forward.experts", 60),
        Setting("num_experts_per_tok", "feed_forward.experts_used", 4),
        Setting("shared_expert_intermediate_size", "feed_forward.shared_expert_d_ff", 5632),
        Windows(4096, "odd", enabled_key="use_sliding_window"),
        *QWEN_SHARED,
    ),
    rules(
        LLAMA_ENDS,
        LLAMA_NORMS,
        LLAMA_ATTENTION,
        QWEN_EXPERTS,
        *(
            linear(f"{FEED_FORWARD}.shared_expert.w_{x}", f"{L}.mlp.shared_expert.{x}_proj")
            for x in ("gate", "up", "down")
        ),
        linear(f"{FEED_FORWARD}.w_shared_gate", f"{L}.mlp.shared_expert_gate")[:1],
    ),
)

# Yang et al. 2025.
QWEN3_MOE = llama_like(
    "qwen3_moe",
    "Qwen3Moe",
    (
        *qwen_sizes(768, num_key_value_heads=4),
        *ATTENTION_BIAS,
        Fixed({"attention.qk_norm": "head"}),
        Setting("num_experts", "feed_forward.experts", 128, alias="num_local_experts", twice=True),
        Setting("num_experts_per_tok", "feed_forward.experts_used", 8),
        Windows(4096, enabled_key="use_sliding_window", typed=False),
        Kept(("max_window_layers",)),
        *QWEN_SHARED,
    ),
    rules(LLAMA_ENDS, LLAMA_NORMS, LLAMA_ATTENTION, QK_NORMS, QWEN_EXPERTS),
)

FAMILIES = (
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
)
