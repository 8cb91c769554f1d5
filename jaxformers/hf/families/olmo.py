"""The tables of OLMo."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.settings import Fixed, Setting
from jaxformers.hf.families.decoder_paths import ATTENTION
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_FEED_FORWARD,
    OUTPUT_NORMS,
    RMS_GATED,
    SILU,
    L,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import norm, rules

ALL_HEADS_NORMS = rules(
    norm(f"{ATTENTION}.q_norm.norm", f"{L}.self_attn.q_norm"),
    norm(f"{ATTENTION}.k_norm.norm", f"{L}.self_attn.k_norm"),
)

OLMO2_LAYERS = (
    *sizes(vocab_size=50304),
    RMS_GATED,
    Fixed({"residual.placement": "output", "attention.qk_norm": "all heads"}),
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

# Groeneveld et al. 2024.
OLMO = llama_like(
    "olmo",
    "Olmo",
    (
        *sizes(vocab_size=50304),
        Fixed({"norm.gain": False, "norm.bias": False, "feed_forward.gated": True}),
        SILU,
        *ATTENTION_BIAS,
        Setting("clip_qkv", "attention.qkv_clip", None, "positive", optional=True),
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

FAMILIES = (
    OLMO2,
    OLMO,
    OLMO3,
)
