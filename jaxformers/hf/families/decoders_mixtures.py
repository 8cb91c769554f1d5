"""Decoder-only families with a mixture of experts in place of the feed-forward."""

from jaxformers.hf.families.decoders import (
    FEED_FORWARD,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_NORMS,
    RMS_GATED,
    SILU,
    L,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import linear, rules
from jaxformers.hf.layouts import Rule
from jaxformers.hf.rope_settings import Windows
from jaxformers.hf.settings import Fixed, Setting, Tied


def experts(module, gate, up, down):
    """A router and its experts; `module` is theirs, and the others are its maps' names."""
    names = {"gate": gate, "up": up, "down": down}
    return rules(
        linear(f"{FEED_FORWARD}.router", f"{module}.gate")[:1],
        *(
            [
                Rule(
                    (f"{FEED_FORWARD}.w_{x}",),
                    (f"{module}.experts.{{e}}.{name}.weight",),
                    "experts",
                )
            ]
            for x, name in names.items()
        ),
    )


# Jiang et al. 2024.
MIXTRAL = llama_like(
    "mixtral",
    "Mixtral",
    (
        *sizes(intermediate_size=14336, num_key_value_heads=8),
        RMS_GATED,
        rms(1e-5),
        SILU,
        Setting("num_local_experts", "experts", 8),
        Setting("num_experts_per_tok", "experts_used", 2),
        Fixed({"renormalise": True}),
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

MIXTURE_DECODERS = (MIXTRAL,)
