"""The table of Nemotron."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Fixed, Kept, Setting
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    MLP_BIAS,
    RELU_SQUARED,
    UP_DOWN_WEIGHTS,
    llama_like,
    rotary,
    sizes,
)

# Parmar et al. 2024.
NEMOTRON = llama_like(
    "nemotron",
    "Nemotron",
    (
        *sizes(
            vocab_size=256000, hidden_size=6144, intermediate_size=24576, num_attention_heads=48
        ),
        Fixed({"norm.offset": 1.0}),
        Setting("norm_eps", "norm.eps", 1e-5, "positive"),
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

FAMILIES = (NEMOTRON,)
