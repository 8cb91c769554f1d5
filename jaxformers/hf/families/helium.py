"""The table of Helium."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.families.llama_like import (
    MLP_BIAS,
    QKV_BIAS,
    RMS_GATED,
    SILU,
    llama_like,
    rms,
    rotary,
    sizes,
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

FAMILIES = (HELIUM,)
