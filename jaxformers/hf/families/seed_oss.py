"""The table of Seed-OSS."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Kept, Setting
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

# ByteDance Seed Team 2025.
SEED_OSS = llama_like(
    "seed_oss",
    "SeedOss",
    (
        *sizes(
            vocab_size=155136,
            intermediate_size=27648,
            num_hidden_layers=64,
            num_attention_heads=80,
            num_key_value_heads=8,
            head_dim=128,
            attention_dropout=0.1,
        ),
        RMS_GATED,
        rms(1e-6),
        SILU,
        QKV_BIAS._replace(default=True),
        Setting("attention_out_bias", "attention.out_bias", False, "flag"),
        MLP_BIAS,
        Setting("residual_dropout", "dropout", 0.1, "number"),
        *rotary(524288, partial_key=None),
        Kept(("pretraining_tp",)),
        Tied(False),
    ),
    pad=1,
    bos=0,
    eos=2,
)

FAMILIES = (SEED_OSS,)
