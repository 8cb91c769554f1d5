"""The table of GLM."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.families.llama_like import (
    FUSED_FEED_FORWARD,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_NORMS,
    QKV_BIAS,
    RMS_GATED,
    SILU,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import rules

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

FAMILIES = (GLM,)
