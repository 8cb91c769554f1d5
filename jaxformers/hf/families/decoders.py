"""Decoder-only families."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.family import Family, fused, linear, norm, rules, same
from jaxformers.hf.rope_settings import Rotary, Windows
from jaxformers.hf.settings import (
    Derived,
    Fixed,
    Kept,
    Named,
    Only,
    Power,
    Setting,
    Tied,
    with_defaults,
)

LAYER = "decoder.layers.{i}"
ATTENTION = f"{LAYER}.self_attention"
FEED_FORWARD = f"{LAYER}.feed_forward"
TABLE = "embedding.token_embedding.weight"

# What Llama began and most families since have kept.
SIZES = (
    Setting("vocab_size", "vocab_size", 32000),
    Setting("hidden_size", "d_model", 4096),
    Setting("num_hidden_layers", "num_layers", 32, "layers"),
    Setting("num_attention_heads", "num_heads", 32),
    Setting("num_key_value_heads", "num_kv_heads", None, optional=True),
    Setting("head_dim", "head_dim", None, optional=True),
    Setting("intermediate_size", "d_ff", 11008),
    Setting("attention_dropout", "attention_dropout", 0.0, "number"),
)


def sizes(**defaults):
    """The usual sizes, with this family's defaults."""
    return with_defaults(SIZES, **defaults)


def classes(name):
    """The classes of transformers for a family, by the name they begin with."""
    return {"output": f"{name}ForCausalLM", "base": f"{name}Model"}


def rotary(max_length, **options):
    """Rotary positions, for families that name the length of their training beside them."""
    named = Kept((), {"max_position_embeddings": max_length})
    return Rotary(max_length=max_length, **options), named


def rms(eps):
    """The epsilon of all norms."""
    return Setting("rms_norm_eps", "norm_eps", eps, "positive")


RMS_GATED = Fixed({"norm": "rms", "gated": True})
SILU = Named("hidden_act", "activation", "silu", ACTIVATION_NAMES)
ATTENTION_BIAS = (
    Setting("attention_bias", "qkv_bias", False, "flag"),
    Derived("out_bias", lambda fields: fields["qkv_bias"]),
)
MLP_BIAS = Setting("mlp_bias", "ff_bias", False, "flag")

L = "model.layers.{i}"
LLAMA_ATTENTION = rules(*(linear(f"{ATTENTION}.w{x}", f"{L}.self_attn.{x}_proj") for x in "qkvo"))
LLAMA_FEED_FORWARD = rules(
    *(linear(f"{FEED_FORWARD}.w_{x}", f"{L}.mlp.{x}_proj") for x in ("gate", "up", "down"))
)
FUSED_FEED_FORWARD = rules(
    fused(
        (f"{FEED_FORWARD}.w_gate", f"{FEED_FORWARD}.w_up"), f"{L}.mlp.gate_up_proj", "linear rows"
    ),
    linear(f"{FEED_FORWARD}.w_down", f"{L}.mlp.down_proj"),
)
LLAMA_ENDS = rules(
    same(TABLE, "model.embed_tokens.weight"),
    norm("decoder.norm", "model.norm"),
    linear("output.w", "lm_head"),
)
LLAMA_NORMS = rules(
    norm(f"{LAYER}.self_attention_residual.norm", f"{L}.input_layernorm"),
    norm(f"{LAYER}.feed_forward_residual.norm", f"{L}.post_attention_layernorm"),
)
QK_NORMS = rules(
    norm(f"{ATTENTION}.q_norm", f"{L}.self_attn.q_norm"),
    norm(f"{ATTENTION}.k_norm", f"{L}.self_attn.k_norm"),
)
LLAMA_WEIGHTS = rules(LLAMA_ENDS, LLAMA_NORMS, LLAMA_ATTENTION, LLAMA_FEED_FORWARD)


def llama_like(model_type, name, settings, weights=LLAMA_WEIGHTS, **special):
    """A family whose tensors are named as Llama's; `special` are token ids."""
    return Family(
        model_type=model_type,
        shape="lm",
        classes=classes(name),
        settings=settings,
        weights=weights,
        prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$",),
        special={f"{key}_token_id": value for key, value in special.items()},
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


def mistral(model_type, name, windows):
    """Mistral's tables differ in their windows alone."""
    settings = (
        *sizes(intermediate_size=14336, num_key_value_heads=8),
        RMS_GATED,
        rms(1e-6),
        SILU,
        windows,
        *rotary(131072, partial_key=None),
        Tied(False),
    )
    return llama_like(model_type, name, settings, bos=1, eos=2)


# Jiang et al. 2023; Mistral AI 2024, with windows in some layers.
MISTRAL = mistral("mistral", "Mistral", Windows(4096, typed=False))
MINISTRAL = mistral("ministral", "Ministral", Windows(4096))

QWEN_SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
QWEN_LAYERS = (
    RMS_GATED,
    rms(1e-6),
    SILU,
    Windows(4096, "last", enabled_key="use_sliding_window"),
    *rotary(32768, partial_key=None),
    Tied(False),
)
# Yang et al. 2024.
QWEN2 = llama_like(
    "qwen2",
    "Qwen2",
    (*sizes(**QWEN_SIZES), Fixed({"qkv_bias": True}), *QWEN_LAYERS),
)
# Yang et al. 2025.
QWEN3 = llama_like(
    "qwen3",
    "Qwen3",
    (
        *sizes(**QWEN_SIZES, head_dim=128),
        *ATTENTION_BIAS,
        Fixed({"qk_norm": "head"}),
        *QWEN_LAYERS,
    ),
    rules(LLAMA_WEIGHTS, QK_NORMS),
)

GEMMA_NORMS = (
    Fixed({"norm": "rms", "norm_offset": 1.0, "gated": True}),
    rms(1e-6),
    Derived("embedding_scale", lambda fields: fields["d_model"] ** 0.5),
)
GEMMA_SPECIAL = {"pad": 0, "eos": 1, "bos": 2}
TANH_GELU = "gelu_pytorch_tanh"
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
        Named("hidden_act", "activation", TANH_GELU, GEMMA_ACTIVATIONS, disputed=True),
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
    Fixed({"placement": "sandwich"}),
    Named("hidden_activation", "activation", TANH_GELU, ACTIVATION_NAMES),
    *ATTENTION_BIAS,
    Power("query_pre_attn_scalar", "attention_scale", 256, -0.5, "size"),
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
        Setting("attn_logit_softcapping", "softcap", 50.0, "positive", optional=True),
        Setting("final_logit_softcapping", "logits_softcap", 30.0, "positive", optional=True),
        Windows(4096, "every", 2),
        *rotary(8192, partial_key=None),
        # Said a second time in the first files.
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
        Fixed({"qk_norm": "head"}),
        Setting("final_logit_softcapping", "logits_softcap", None, "positive", optional=True),
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

# Abdin et al. 2024.
PHI3 = llama_like(
    "phi3",
    "Phi3",
    (
        *sizes(vocab_size=32064, hidden_size=3072, intermediate_size=8192),
        RMS_GATED,
        rms(1e-5),
        SILU,
        Setting("resid_pdrop", "dropout", 0.0, "number"),
        Windows(None, typed=False),
        *rotary(4096, original_length=4096),
        Only("full_attn_mod", (1,), 1),
        Only("interpolate_factor", (1,), 1),
        Kept(("embd_pdrop",)),
        Tied(False),
    ),
    rules(
        LLAMA_ENDS,
        LLAMA_NORMS,
        fused(tuple(f"{ATTENTION}.w{x}" for x in "qkv"), f"{L}.self_attn.qkv_proj", "linear rows"),
        linear(f"{ATTENTION}.wo", f"{L}.self_attn.o_proj"),
        FUSED_FEED_FORWARD,
    ),
    bos=1,
    eos=32000,
    pad=32000,
)

DECODERS = (LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3)
