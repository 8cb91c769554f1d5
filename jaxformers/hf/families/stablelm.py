"""The table of StableLM."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Derived, Fixed, Named, Setting
from jaxformers.hf.families.decoder_paths import ATTENTION
from jaxformers.hf.families.llama_like import LLAMA_WEIGHTS, SILU, L, llama_like, rotary, sizes
from jaxformers.hf.family import Rule, rules

# Bellagente et al. 2024.
STABLELM = llama_like(
    "stablelm",
    "StableLm",
    (
        *(
            setting
            for setting in sizes(
                vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_key_value_heads=32
            )
            if setting.key != "head_dim"
        ),
        Fixed({"feed_forward.gated": True}),
        Setting("layer_norm_eps", "norm.eps", 1e-5, "positive"),
        SILU,
        Setting("use_qkv_bias", "attention.qkv_bias", False, "flag"),
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Named("use_parallel_residual", "residual.parallel", False, {False: None, True: "one norm"}),
        Named("qk_layernorm", "attention.qk_norm", False, {False: None, True: "per head"}),
        Derived(
            "attention.qk_norm_bias",
            lambda fields: None if fields["attention.qk_norm"] is None else False,
        ),
        *rotary(4096, partial=0.25),
        Tied(False),
    ),
    rules(
        LLAMA_WEIGHTS,
        *(
            [
                Rule(
                    (f"{ATTENTION}.{x}_norm.norm.gain",),
                    (f"{L}.self_attn.{x}_layernorm.norms.{{e}}.weight",),
                    "heads",
                )
            ]
            for x in "qk"
        ),
    ),
    bos=0,
    eos=0,
)

FAMILIES = (STABLELM,)
