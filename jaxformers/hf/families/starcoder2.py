"""The table of StarCoder 2."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.settings import Derived, Kept, Named, Only, Setting
from jaxformers.hf.families.decoder_paths import FEED_FORWARD
from jaxformers.hf.families.llama_like import (
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_NORMS,
    TANH_GELU,
    L,
    llama_like,
    rotary,
    sizes,
)
from jaxformers.hf.family import linear, rules

# Lozhkov et al. 2024.
STARCODER2 = llama_like(
    "starcoder2",
    "Starcoder2",
    (
        *sizes(
            vocab_size=49152,
            hidden_size=3072,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
            intermediate_size=12288,
        ),
        Setting("norm_epsilon", "norm.eps", 1e-5, "positive"),
        Named(
            "hidden_act",
            "feed_forward.activation",
            TANH_GELU,
            {TANH_GELU: "gelu_tanh"} | ACTIVATION_NAMES,
        ),
        Setting("use_bias", "feed_forward.bias", True, "flag"),
        Derived("attention.qkv_bias", lambda fields: fields["feed_forward.bias"]),
        Derived("attention.out_bias", lambda fields: fields["feed_forward.bias"]),
        Setting("residual_dropout", "dropout", 0.0, "number"),
        Windows(None, typed=False),
        *rotary(4096, partial_key=None),
        Only("norm_type", ("layer_norm",), "layer_norm"),
        Only("mlp_type", ("default",), "default"),
        # The first files still have these entries of StarCoder.
        Kept(("embedding_dropout", "activation_function", "layer_norm_epsilon")),
        Kept(
            ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights")
        ),
        Tied(True),
    ),
    rules(
        LLAMA_ENDS,
        LLAMA_NORMS,
        LLAMA_ATTENTION,
        linear(f"{FEED_FORWARD}.w_in", f"{L}.mlp.c_fc"),
        linear(f"{FEED_FORWARD}.w_out", f"{L}.mlp.c_proj"),
    ),
    bos=50256,
    eos=50256,
)

FAMILIES = (STARCODER2,)
