"""Decoder-only families."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.family import Family, linear, norm, rules, same
from jaxformers.hf.rope_settings import Rotary
from jaxformers.hf.settings import Derived, Fixed, Kept, Named, Setting, Tied

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
    return tuple(
        setting._replace(default=defaults.get(setting.key, setting.default)) for setting in SIZES
    )


LLAMA_ATTENTION = rules(
    *(linear(f"{ATTENTION}.w{x}", f"model.layers.{{i}}.self_attn.{x}_proj") for x in "qkvo")
)
LLAMA_FEED_FORWARD = rules(
    *(
        linear(f"{FEED_FORWARD}.w_{x}", f"model.layers.{{i}}.mlp.{x}_proj")
        for x in ("gate", "up", "down")
    )
)
LLAMA_ENDS = rules(
    same(TABLE, "model.embed_tokens.weight"),
    norm("decoder.norm", "model.norm"),
    linear("output.w", "lm_head"),
)
LLAMA_WEIGHTS = rules(
    LLAMA_ENDS,
    norm(f"{LAYER}.self_attention_residual.norm", "model.layers.{i}.input_layernorm"),
    norm(f"{LAYER}.feed_forward_residual.norm", "model.layers.{i}.post_attention_layernorm"),
    LLAMA_ATTENTION,
    LLAMA_FEED_FORWARD,
)
LLAMA_IGNORED = (r"rotary_emb\.inv_freq$",)

# Touvron et al. 2023; Grattafiori et al. 2024.
LLAMA = Family(
    model_type="llama",
    shape="lm",
    classes={"output": "LlamaForCausalLM", "base": "LlamaModel"},
    settings=(
        *sizes(),
        Fixed({"norm": "rms", "gated": True}),
        Setting("rms_norm_eps", "norm_eps", 1e-6, "positive"),
        Named("hidden_act", "activation", "silu", ACTIVATION_NAMES),
        Setting("attention_bias", "qkv_bias", False, "flag"),
        Derived("out_bias", lambda fields: fields["qkv_bias"]),
        Setting("mlp_bias", "ff_bias", False, "flag"),
        Rotary(partial_key=None),
        Kept(("pretraining_tp",), {"max_position_embeddings": 2048}),
        Tied(False),
    ),
    weights=LLAMA_WEIGHTS,
    prefix="model.",
    ignored=LLAMA_IGNORED,
    special={"bos_token_id": 1, "eos_token_id": 2},
)

DECODERS = (LLAMA,)
