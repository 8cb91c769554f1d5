"""The tables of Phi."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.rope import Rotary
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.settings import Fixed, Kept, Named, Only, Setting
from jaxformers.hf.families.decoder_paths import ATTENTION, FEED_FORWARD, LAYER, TABLE
from jaxformers.hf.families.llama_like import (
    FUSED_FEED_FORWARD,
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
from jaxformers.hf.family import Family, fused, linear, norm, rules, same

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

PHI_LAYER = "model.layers.{i}"

# Gunasekar et al. 2023; Li et al. 2023.
PHI = Family(
    model_type="phi",
    shape="lm",
    classes={"output": "PhiForCausalLM", "base": "PhiModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 51200),
        Setting("hidden_size", "d_model", 2048),
        Setting("intermediate_size", "feed_forward.d_ff", 8192),
        Setting("num_hidden_layers", "num_layers", 24, "layers"),
        Setting("num_attention_heads", "attention.num_heads", 32),
        Setting("num_key_value_heads", "attention.num_kv_heads", None, optional=True),
        Setting("resid_pdrop", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Named("hidden_act", "feed_forward.activation", "gelu_new", ACTIVATION_NAMES),
        Setting("layer_norm_eps", "norm.eps", 1e-5, "positive"),
        Named("qk_layernorm", "attention.qk_norm", False, {False: None, True: "head"}),
        Fixed(
            {
                "residual.parallel": "one norm",
                "attention.qkv_bias": True,
                "attention.out_bias": True,
                "feed_forward.bias": True,
            }
        ),
        Fixed({"output.bias": True}),
        Rotary(partial=0.5, max_length=2048),
        Kept(("embd_pdrop",), {"max_position_embeddings": 2048}),
        Tied(False),
    ),
    weights=rules(
        same(TABLE, "model.embed_tokens.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{PHI_LAYER}.input_layernorm"),
        *(linear(f"{ATTENTION}.w{x}", f"{PHI_LAYER}.self_attn.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{PHI_LAYER}.self_attn.dense"),
        norm(f"{ATTENTION}.q_norm", f"{PHI_LAYER}.self_attn.q_layernorm"),
        norm(f"{ATTENTION}.k_norm", f"{PHI_LAYER}.self_attn.k_layernorm"),
        linear(f"{FEED_FORWARD}.w_in", f"{PHI_LAYER}.mlp.fc1"),
        linear(f"{FEED_FORWARD}.w_out", f"{PHI_LAYER}.mlp.fc2"),
        norm("decoder.norm", "model.final_layernorm"),
        linear("output.w", "lm_head"),
    ),
    prefix="model.",
    ignored=(r"rotary_emb\.inv_freq$",),
    special={"bos_token_id": 1, "eos_token_id": 2},
)

FAMILIES = (
    PHI3,
    PHI,
)
