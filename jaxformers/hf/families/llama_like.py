"""The settings and weights that Llama began and most decoder-only families since have kept."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.rope import Rotary
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Setting, with_defaults
from jaxformers.hf.families.decoder_paths import ATTENTION, FEED_FORWARD, LAYER, TABLE
from jaxformers.hf.family import Family, Rule, fused, linear, norm, rules, same

SIZES = (
    Setting("vocab_size", "vocab_size", 32000),
    Setting("hidden_size", "d_model", 4096),
    Setting("num_hidden_layers", "num_layers", 32, "layers"),
    Setting("num_attention_heads", "attention.num_heads", 32),
    Setting("num_key_value_heads", "attention.num_kv_heads", None, optional=True),
    Setting("head_dim", "attention.head_dim", None, optional=True),
    Setting("intermediate_size", "feed_forward.d_ff", 11008),
    Setting("attention_dropout", "attention.dropout", 0.0, "number"),
)


def sizes(**defaults):
    """Returns Llama's sizes with the defaults of another family."""
    return with_defaults(SIZES, **defaults)


def classes(name):
    """Returns the classes of transformers for a family, by the beginning of their names."""
    return {"output": f"{name}ForCausalLM", "base": f"{name}Model"}


def rotary(max_length, **options):
    """Returns the settings of rotary positions and of the length of the training."""
    named = Kept((), {"max_position_embeddings": max_length})
    return Rotary(max_length=max_length, **options), named


def rms(eps):
    """Returns the setting of the epsilon of all norms."""
    return Setting("rms_norm_eps", "norm.eps", eps, "positive")


RMS_GATED = Fixed({"norm.kind": "rms", "feed_forward.gated": True})
SILU = Named("hidden_act", "feed_forward.activation", "silu", ACTIVATION_NAMES)
ATTENTION_BIAS = (
    Setting("attention_bias", "attention.qkv_bias", False, "flag"),
    Derived("attention.out_bias", lambda fields: fields["attention.qkv_bias"]),
)

MLP_BIAS = Setting("mlp_bias", "feed_forward.bias", False, "flag")
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
    """Returns a family with tensors named like Llama's; `special` are token ids."""
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


TANH_GELU = "gelu_pytorch_tanh"
OUTPUT_NORMS = rules(
    norm(f"{LAYER}.self_attention_residual.output_norm", f"{L}.post_attention_layernorm"),
    norm(f"{LAYER}.feed_forward_residual.output_norm", f"{L}.post_feedforward_layernorm"),
)

UP_DOWN = rules(
    linear(f"{FEED_FORWARD}.w_in", f"{L}.mlp.up_proj"),
    linear(f"{FEED_FORWARD}.w_out", f"{L}.mlp.down_proj"),
)

UP_DOWN_WEIGHTS = rules(LLAMA_ENDS, LLAMA_NORMS, LLAMA_ATTENTION, UP_DOWN)
RELU_SQUARED = Named("hidden_act", "feed_forward.activation", "relu2", ACTIVATION_NAMES)
QKV_BIAS = Setting("attention_bias", "attention.qkv_bias", False, "flag")


def experts(module, gate, up, down):
    """Returns the rules of a mixture of experts in `module`; the others are its maps' names."""
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
