"""Decoder-only families before Llama: GPT-2 and those that grew from it."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.families.decoders import ATTENTION, FEED_FORWARD, LAYER, TABLE
from jaxformers.hf.family import Family, conv1d, fused, linear, norm, rules, same
from jaxformers.hf.settings import Derived, Fixed, Kept, Named, Setting, Tied
from jaxformers.hf.special_settings import LayerScale

H = "transformer.h.{i}"
# Radford et al. 2019.
GPT2 = Family(
    model_type="gpt2",
    shape="lm",
    classes={"output": "GPT2LMHeadModel", "base": "GPT2Model"},
    settings=(
        Setting("vocab_size", "vocab_size", 50257),
        Setting("n_positions", "max_seq_length", 1024),
        Setting("n_embd", "d_model", 768),
        Setting("n_layer", "num_layers", 12, "layers"),
        Setting("n_head", "num_heads", 12),
        Setting("n_inner", "d_ff", None, optional=True),
        Derived("d_ff", lambda fields: fields["d_ff"] or 4 * fields["d_model"]),
        Named("activation_function", "activation", "gelu_new", ACTIVATION_NAMES),
        Setting("resid_pdrop", "dropout", 0.1, "number"),
        Setting("attn_pdrop", "attention_dropout", 0.1, "number"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5, "positive"),
        Fixed({"position": "learned", "qkv_bias": True, "out_bias": True, "ff_bias": True}),
        LayerScale(),
        Kept(("embd_pdrop", "n_ctx", "reorder_and_upcast_attn")),
        Tied(True, table="transformer.wte.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.wte.weight"),
        same("embedding.position.weight", "transformer.wpe.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_1"),
        fused(tuple(f"{ATTENTION}.w{x}" for x in "qkv"), f"{H}.attn.c_attn", "conv1d columns"),
        conv1d(f"{ATTENTION}.wo", f"{H}.attn.c_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_2"),
        conv1d(f"{FEED_FORWARD}.w_in", f"{H}.mlp.c_fc"),
        conv1d(f"{FEED_FORWARD}.w_out", f"{H}.mlp.c_proj"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    ignored=(r"\.attn\.(masked_)?bias$",),
    special={"bos_token_id": 50256, "eos_token_id": 50256},
)

CLASSIC_DECODERS = (GPT2,)
