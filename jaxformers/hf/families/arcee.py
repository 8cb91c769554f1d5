"""The table of Arcee's AFM."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Fixed
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    MLP_BIAS,
    RELU_SQUARED,
    UP_DOWN_WEIGHTS,
    llama_like,
    rms,
    rotary,
    sizes,
)

# Arcee AI 2025, AFM.
ARCEE = llama_like(
    "arcee",
    "Arcee",
    (
        *sizes(hidden_size=2560, intermediate_size=18432),
        Fixed({"norm.kind": "rms"}),
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

FAMILIES = (ARCEE,)
