"""The table of Llama."""

from jaxformers.hf.architecture.output import Tied
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

# Touvron et al. 2023; Grattafiori et al. 2024.
LLAMA = llama_like(
    "llama",
    "Llama",
    (
        *sizes(),
        RMS_GATED,
        rms(1e-6),
        SILU,
        *ATTENTION_BIAS,
        MLP_BIAS,
        *rotary(2048, partial_key=None),
        Kept(("pretraining_tp",)),
        Tied(False),
    ),
    bos=1,
    eos=2,
)

FAMILIES = (LLAMA,)
