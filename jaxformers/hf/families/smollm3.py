"""The table of SmolLM3."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import NO_ROPE, Windows
from jaxformers.hf.config.settings import Kept
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

FAMILIES = (SMOLLM3,)
