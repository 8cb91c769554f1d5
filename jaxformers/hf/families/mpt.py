"""The table of MPT."""

from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Fixed, Inside, Kept, Only, Setting
from jaxformers.hf.families.decoder_paths import (
    ATTENTION,
    FEED_FORWARD,
    FOUR_TIMES,
    LAYER,
    QKV,
    TABLE,
)
from jaxformers.hf.family import Family, fused, linear, norm, rules, same

MPT_LAYER = "transformer.blocks.{i}"

# MosaicML 2023.
MPT = Family(
    model_type="mpt",
    shape="lm",
    classes={"output": "MptForCausalLM", "base": "MptModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50368),
        Setting("d_model", "d_model", 2048, alias="hidden_size"),
        Setting("n_layers", "num_layers", 24, "layers", alias="num_hidden_layers"),
        Setting("n_heads", "attention.num_heads", 16, alias="num_attention_heads"),
        Fixed(
            {
                "feed_forward.d_ff": None,
                "feed_forward.activation": "gelu",
                "position.kind": "alibi",
                "norm.bias": False,
            }
        ),
        FOUR_TIMES,
        Setting("layer_norm_epsilon", "norm.eps", 1e-5, "positive"),
        Inside(
            "attn_config",
            (
                Setting("clip_qkv", "attention.qkv_clip", None, "positive", optional=True),
                Setting("softmax_scale", "attention.scale", None, "positive", optional=True),
                Only("alibi", (True,), True),
                Only("alibi_bias_max", (8,), 8),
                Only("attn_type", ("multihead_attention",), "multihead_attention"),
                Only("prefix_lm", (False,), False),
                Only("qk_ln", (False,), False),
                Only("attn_uses_sequence_id", (False,), False),
                Kept(("attn_impl", "attn_pdrop")),
            ),
        ),
        Only("expansion_ratio", (4,), 4),
        Only("no_bias", (True,), True),
        Only("logit_scale", (None,), None),
        Only("norm_type", ("low_precision_layernorm", "layernorm"), "low_precision_layernorm"),
        Kept(("resid_pdrop", "emb_pdrop", "embedding_fraction", "learned_pos_emb")),
        Kept(("init_config", "init_device", "verbose", "max_position_embeddings")),
        Kept((), {"max_seq_len": 2048}),
        Tied(True, table="transformer.wte.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.wte.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{MPT_LAYER}.norm_1"),
        fused(QKV, f"{MPT_LAYER}.attn.Wqkv", "linear rows"),
        linear(f"{ATTENTION}.wo", f"{MPT_LAYER}.attn.out_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{MPT_LAYER}.norm_2"),
        linear(f"{FEED_FORWARD}.w_in", f"{MPT_LAYER}.ffn.up_proj"),
        linear(f"{FEED_FORWARD}.w_out", f"{MPT_LAYER}.ffn.down_proj"),
        norm("decoder.norm", "transformer.norm_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
)

FAMILIES = (MPT,)
