"""The table of BLOOM."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Fixed, Kept, Only, Setting
from jaxformers.hf.families.decoder_paths import (
    ATTENTION,
    FEED_FORWARD,
    FOUR_TIMES,
    LAYER,
    QKV,
    TABLE,
)
from jaxformers.hf.families.gpt import H
from jaxformers.hf.family import Family, fused, linear, norm, rules, same

# BigScience 2022.
BLOOM = Family(
    model_type="bloom",
    shape="lm",
    classes={"output": "BloomForCausalLM", "base": "BloomModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 250880),
        Setting("hidden_size", "d_model", 64, alias="n_embed"),
        Setting("n_layer", "num_layers", 2, "layers", alias="num_hidden_layers"),
        Setting("n_head", "attention.num_heads", 8, alias="num_attention_heads"),
        Fixed({"feed_forward.d_ff": None, "feed_forward.activation": "gelu_tanh"}),
        FOUR_TIMES,
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm.eps", 1e-5, "positive"),
        Only("apply_residual_connection_post_layernorm", (False,), False),
        Fixed({"position.kind": "alibi", "embedding.norm": True}),
        Fixed({"attention.qkv_bias": True, "attention.out_bias": True, "feed_forward.bias": True}),
        # Ways to compute the same.
        Kept(("pretraining_tp", "slow_but_exact", "attention_softmax_in_fp32", "offset_alibi")),
        Kept(("bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "seq_length")),
        Kept(("skip_bias_add", "skip_bias_add_qkv", "max_position_embeddings")),
        Tied(True, table="transformer.word_embeddings.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.word_embeddings.weight"),
        norm("embedding.norm", "transformer.word_embeddings_layernorm"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{H}.input_layernorm"),
        fused(QKV, f"{H}.self_attention.query_key_value", "linear heads"),
        linear(f"{ATTENTION}.wo", f"{H}.self_attention.dense"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.post_attention_layernorm"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.dense_h_to_4h"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.dense_4h_to_h"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    special={"bos_token_id": 1, "eos_token_id": 2},
)

FAMILIES = (BLOOM,)
