"""The table of Falcon."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.rope import Rotary
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Derived, Kept, Named, Only, Setting
from jaxformers.hf.families.decoder_paths import (
    ATTENTION,
    FEED_FORWARD,
    FOUR_TIMES,
    LAYER,
    QKV,
    TABLE,
)
from jaxformers.hf.families.gpt import H
from jaxformers.hf.family import Family, fused, linear, norm, rules, same, when


class FalconLayers(NamedTuple):
    """Falcon's key/value heads and parallel layers, with the switches of its two generations."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        new = config.get("new_decoder_architecture", False, "flag")
        one_key = config.get("multi_query", True, "flag")
        parallel = config.get("parallel_attn", True, "flag")
        norms = config.get("num_ln_in_parallel_attn", None, "size", optional=True)
        heads = fields["attention.num_heads"]
        given = config.get("num_kv_heads", None, "size", optional=True) or heads
        if new and not parallel:
            config.refuse("parallel_attn", "the new architecture has parallel layers only.")
        if norms not in ((None, 1, 2) if new else (None, 1)):
            config.refuse("num_ln_in_parallel_attn", "it is 1, or in the new architecture 2.")
        fields["attention.num_kv_heads"] = given if new else 1 if one_key else heads
        norms = "two norms" if new and norms != 1 else "one norm"
        fields["residual.parallel"] = norms if parallel else None

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        kv_heads, parallel = fields["attention.num_kv_heads"], fields["residual.parallel"]
        two = parallel == "two norms"
        new = two or kv_heads not in (1, fields["attention.num_heads"])
        config["new_decoder_architecture"] = new
        config["multi_query"] = kv_heads == 1
        config["num_kv_heads"] = kv_heads
        config["parallel_attn"] = parallel is not None
        config["num_ln_in_parallel_attn"] = (2 if two else 1) if new else None


# Almazrouei et al. 2023. The smallest models, with ALiBi in low precision, are not among these.
FALCON = Family(
    model_type="falcon",
    shape="lm",
    classes={"output": "FalconForCausalLM", "base": "FalconModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 65024),
        Setting("hidden_size", "d_model", 4544, alias="n_embed"),
        Setting("num_hidden_layers", "num_layers", 32, "layers"),
        Setting("num_attention_heads", "attention.num_heads", 71),
        Setting("ffn_hidden_size", "feed_forward.d_ff", None, optional=True),
        FOUR_TIMES,
        Named("activation", "feed_forward.activation", "gelu", ACTIVATION_NAMES),
        Setting("hidden_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Setting("layer_norm_epsilon", "norm.eps", 1e-5, "positive"),
        FalconLayers(),
        Setting("bias", "attention.qkv_bias", False, "flag"),
        Derived("attention.out_bias", lambda fields: fields["attention.qkv_bias"]),
        Derived("feed_forward.bias", lambda fields: fields["attention.qkv_bias"]),
        Only("alibi", (False,), False),
        Rotary(partial_key=None, max_length=2048),
        Kept((), {"max_position_embeddings": 2048}),
        Tied(True, table="transformer.word_embeddings.weight"),
    ),
    weights=rules(
        same(TABLE, "transformer.word_embeddings.weight"),
        when(
            lambda a: a.residual.parallel == "two norms",
            norm(f"{LAYER}.self_attention_residual.norm", f"{H}.ln_attn"),
            norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.ln_mlp"),
        ),
        when(
            lambda a: a.residual.parallel != "two norms",
            norm(f"{LAYER}.self_attention_residual.norm", f"{H}.input_layernorm"),
            norm(f"{LAYER}.feed_forward_residual.norm", f"{H}.post_attention_layernorm"),
        ),
        fused(QKV, f"{H}.self_attention.query_key_value", "linear heads"),
        linear(f"{ATTENTION}.wo", f"{H}.self_attention.dense"),
        linear(f"{FEED_FORWARD}.w_in", f"{H}.mlp.dense_h_to_4h"),
        linear(f"{FEED_FORWARD}.w_out", f"{H}.mlp.dense_4h_to_h"),
        norm("decoder.norm", "transformer.ln_f"),
        linear("output.w", "lm_head"),
    ),
    prefix="transformer.",
    special={"bos_token_id": 11, "eos_token_id": 11},
)

FAMILIES = (FALCON,)
