"""The tables of Cohere's Command R and Command A."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.window import FULL, Windows
from jaxformers.hf.config.settings import Fixed, Kept, Named, Only, Setting
from jaxformers.hf.families.decoder_paths import ATTENTION
from jaxformers.hf.families.llama_like import (
    ATTENTION_BIAS,
    LLAMA_ATTENTION,
    LLAMA_ENDS,
    LLAMA_FEED_FORWARD,
    LLAMA_NORMS,
    SILU,
    L,
    llama_like,
    rotary,
    sizes,
)
from jaxformers.hf.family import rules, same

COHERE_SIZES = sizes(
    vocab_size=256000,
    hidden_size=8192,
    num_hidden_layers=40,
    num_attention_heads=64,
    intermediate_size=22528,
)

COHERE_LAYERS = (
    Fixed({"norm.bias": False, "residual.parallel": "one norm", "feed_forward.gated": True}),
    Setting("layer_norm_eps", "norm.eps", 1e-5, "positive"),
    SILU,
    *ATTENTION_BIAS,
    Setting("logit_scale", "output.scale", 0.0625, "positive"),
)

COHERE_WEIGHTS = rules(LLAMA_ENDS, LLAMA_NORMS[:2], LLAMA_ATTENTION, LLAMA_FEED_FORWARD)

# Command R.
COHERE = llama_like(
    "cohere",
    "Cohere",
    (
        *COHERE_SIZES,
        *COHERE_LAYERS,
        Named(
            "use_qk_norm", "attention.qk_norm", False, {False: None, None: None, True: "per head"}
        ),
        *rotary(8192, theta=5e5, interleaved=True, partial_key=None),
        Tied(True),
    ),
    rules(
        COHERE_WEIGHTS,
        *(same(f"{ATTENTION}.{x}_norm.norm.gain", f"{L}.self_attn.{x}_norm.weight") for x in "qk"),
    ),
    pad=0,
    bos=5,
    eos=255001,
)

# Cohere 2025, Command A.
COHERE2 = llama_like(
    "cohere2",
    "Cohere2",
    (
        *COHERE_SIZES,
        *COHERE_LAYERS,
        Windows(4096, "every", 4, every_key="sliding_window_pattern"),
        *rotary(8192, interleaved=True, without=FULL, partial_key=None),
        Only("position_embedding_type", ("rope_gptj",), "rope_gptj"),
        Only("rotary_pct", (1.0, 1), 1.0),
        Only("use_gated_activation", (True,), True),
        Only("use_parallel_block", (True,), True),
        Only("order_of_interleaved_layers", ("local_attn_first",), "local_attn_first"),
        Kept(("layer_switch", "use_embedding_sharing", "use_parallel_embedding")),
        Kept(("_sliding_window_pattern",)),  # layer_types say the same
        Tied(True),
    ),
    COHERE_WEIGHTS,
    pad=0,
    bos=5,
    eos=255001,
)

FAMILIES = (
    COHERE,
    COHERE2,
)
