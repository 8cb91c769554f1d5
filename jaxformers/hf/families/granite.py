"""The table of Granite."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Power, Setting
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    MLP_BIAS,
    RMS_GATED,
    SILU,
    llama_like,
    rms,
    rotary,
    sizes,
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
        Setting("embedding_multiplier", "embedding.scale", 1.0, "positive"),
        Setting("residual_multiplier", "residual.scale", 1.0, "positive"),
        Setting("attention_multiplier", "attention.scale", 1.0, "positive"),
        Power("logits_scaling", "output.scale", 1.0, -1.0),
        *rotary(2048, partial_key=None),
        Tied(False),
    ),
    bos=1,
    eos=2,
)

FAMILIES = (GRANITE,)
