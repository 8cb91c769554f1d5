"""The tables of Gemma."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Only, Power, Setting
from jaxformers.hf.families.decoder_paths import LAYER
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_FEED_FORWARD,
    QK_NORMS,
    TANH_GELU,
    L,
    llama_like,
    rms,
    rotary,
    sizes,
)
from jaxformers.hf.family import norm, rules

GEMMA_NORMS = (
    Fixed({"norm.kind": "rms", "norm.offset": 1.0, "feed_forward.gated": True}),
    rms(1e-6),
    Derived("embedding.scale", lambda fields: fields["d_model"] ** 0.5),
)

GEMMA_SPECIAL = {"pad": 0, "eos": 1, "bos": 2}

# In the first Gemma's files "gelu" means the tanh form.
GEMMA_ACTIVATIONS = {TANH_GELU: "gelu_tanh"} | ACTIVATION_NAMES | {"gelu": "gelu_tanh"}

# Gemma Team 2024, Gemma.
GEMMA = llama_like(
    "gemma",
    "Gemma",
    (
        *sizes(
            vocab_size=256000,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
        ),
        *GEMMA_NORMS,
        Named("hidden_act", "feed_forward.activation", TANH_GELU, GEMMA_ACTIVATIONS, disputed=True),
        Only("hidden_activation", (None, TANH_GELU), None),
        *ATTENTION_BIAS,
        *rotary(8192, partial_key=None),
        Tied(True),
    ),
    **GEMMA_SPECIAL,
)

GEMMA2_SIZES = sizes(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
)

GEMMA2_LAYERS = (
    *GEMMA_NORMS,
    Fixed({"residual.placement": "sandwich"}),
    Named("hidden_activation", "feed_forward.activation", TANH_GELU, ACTIVATION_NAMES),
    *ATTENTION_BIAS,
    Power("query_pre_attn_scalar", "attention.scale", 256, -0.5, "size"),
)

GEMMA2_WEIGHTS = rules(
    LLAMA_ENDS,
    norm(f"{LAYER}.self_attention_residual.norm", f"{L}.input_layernorm"),
    norm(f"{LAYER}.self_attention_residual.output_norm", f"{L}.post_attention_layernorm"),
    norm(f"{LAYER}.feed_forward_residual.norm", f"{L}.pre_feedforward_layernorm"),
    norm(f"{LAYER}.feed_forward_residual.output_norm", f"{L}.post_feedforward_layernorm"),
    LLAMA_ATTENTION,
    LLAMA_FEED_FORWARD,
)

# Gemma Team 2024, Gemma 2.
GEMMA2 = llama_like(
    "gemma2",
    "Gemma2",
    (
        *GEMMA2_SIZES,
        *GEMMA2_LAYERS,
        Setting("attn_logit_softcapping", "attention.softcap", 50.0, "positive", optional=True),
        Setting("final_logit_softcapping", "output.softcap", 30.0, "positive", optional=True),
        Windows(4096, "every", 2),
        *rotary(8192, partial_key=None),
        # The first files repeat these.
        Kept(("hidden_act", "sliding_window_size")),
        Tied(True),
    ),
    GEMMA2_WEIGHTS,
    **GEMMA_SPECIAL,
)

# Gemma Team 2025.
GEMMA3 = llama_like(
    "gemma3_text",
    "Gemma3",
    (
        *(x._replace(default=262208) if x.key == "vocab_size" else x for x in GEMMA2_SIZES),
        *GEMMA2_LAYERS,
        Fixed({"attention.qk_norm": "head"}),
        Setting("final_logit_softcapping", "output.softcap", None, "positive", optional=True),
        Windows(4096, "every", 6, every_key="sliding_window_pattern"),
        *rotary(
            131072,
            theta=1e6,
            sliding_theta=1e4,
            sliding_theta_key="rope_local_base_freq",
            unscaled_sliding=True,
            partial_key=None,
        ),
        Kept(("_sliding_window_pattern",)),
        Tied(True),
    ),
    rules(GEMMA2_WEIGHTS, QK_NORMS),
    **GEMMA_SPECIAL,
)._replace(classes={"output": "Gemma3ForCausalLM", "base": "Gemma3TextModel"})

FAMILIES = (
    GEMMA,
    GEMMA2,
    GEMMA3,
)
