"""The table of EXAONE 4."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import FULL, Windows
from jaxformers.hf.config.settings import Fixed
from jaxformers.hf.families.llama_like import (
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_FEED_FORWARD,
    OUTPUT_NORMS,
    QK_NORMS,
    RMS_GATED,
    SILU,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import rules

# LG AI Research 2025.
EXAONE4 = llama_like(
    "exaone4",
    "Exaone4",
    (
        *sizes(vocab_size=102400, intermediate_size=16384, num_key_value_heads=32),
        RMS_GATED,
        Fixed({"residual.placement": "output", "attention.qk_norm": "head"}),
        rms(1e-5),
        SILU,
        Windows(4096, "every", 4, every_key="sliding_window_pattern"),
        *rotary(2048, without=FULL, if_windowed=True, partial_key=None),
        Tied(False),
    ),
    rules(LLAMA_ENDS, OUTPUT_NORMS, LLAMA_ATTENTION, QK_NORMS, LLAMA_FEED_FORWARD),
    bos=0,
    eos=2,
)

FAMILIES = (EXAONE4,)
