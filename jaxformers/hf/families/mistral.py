"""The tables of Mistral, Ministral and Mixtral."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.settings import Fixed, Setting
from jaxformers.hf.families.llama_like import (
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_NORMS,
    RMS_GATED,
    SILU,
    L,
    experts,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import rules


def mistral(model_type, name, windows):
    """Returns one of Mistral's tables, which differ in their windows only."""
    settings = (
        *sizes(intermediate_size=14336, num_key_value_heads=8),
        RMS_GATED,
        rms(1e-6),
        SILU,
        windows,
        *rotary(131072, partial_key=None),
        Tied(False),
    )
    return llama_like(model_type, name, settings, bos=1, eos=2)


# Jiang et al. 2023; Mistral AI 2024, with windows in some layers.
MISTRAL = mistral("mistral", "Mistral", Windows(4096, typed=False))
MINISTRAL = mistral("ministral", "Ministral", Windows(4096))

# Jiang et al. 2024.
MIXTRAL = llama_like(
    "mixtral",
    "Mixtral",
    (
        *sizes(intermediate_size=14336, num_key_value_heads=8),
        RMS_GATED,
        rms(1e-5),
        SILU,
        Setting("num_local_experts", "feed_forward.experts", 8),
        Setting("num_experts_per_tok", "feed_forward.experts_used", 2),
        Fixed({"feed_forward.renormalize": True}),
        Windows(None, typed=False),
        *rotary(131072, theta=1e6, partial_key=None),
        Tied(False),
    ),
    rules(
        LLAMA_ENDS,
        LLAMA_NORMS,
        LLAMA_ATTENTION,
        experts(f"{L}.block_sparse_moe", "w1", "w3", "w2"),
    ),
    bos=1,
    eos=2,
)

FAMILIES = (
    MISTRAL,
    MINISTRAL,
    MIXTRAL,
)
