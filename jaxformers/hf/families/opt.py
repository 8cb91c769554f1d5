"""The table of OPT."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Setting
from jaxformers.hf.families.decoder_paths import ATTENTION, FEED_FORWARD, LAYER, TABLE
from jaxformers.hf.family import Family, linear, norm, rules, same

OPT_LAYER = "model.decoder.layers.{i}"

# Zhang et al. 2022.
OPT = Family(
    model_type="opt",
    shape="lm",
    classes={"output": "OPTForCausalLM", "base": "OPTModel"},
    settings=(
        Setting("vocab_size", "vocab_size", 50272),
        Setting("max_position_embeddings", "position.max_seq_length", 2048),
        Setting("hidden_size", "d_model", 768),
        Setting("num_hidden_layers", "num_layers", 12, "layers"),
        Setting("num_attention_heads", "attention.num_heads", 12),
        Setting("ffn_dim", "feed_forward.d_ff", 3072),
        Named("activation_function", "feed_forward.activation", "relu", ACTIVATION_NAMES),
        Setting("dropout", "dropout", 0.1, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Fixed({"position.kind": "learned", "position.offset": 2}),
        # Token vectors of another width are mapped to the stream's, and hidden states back.
        Setting("word_embed_proj_dim", "embedding.dim", None, optional=True),
        Derived(
            "embedding.project_tokens", lambda f: f["embedding.dim"] not in (None, f["d_model"])
        ),
        Derived(
            "embedding.dim", lambda f: f["embedding.dim"] if f["embedding.project_tokens"] else None
        ),
        Derived("output.transform", lambda f: "linear" if f["embedding.project_tokens"] else None),
        Derived("output.transform_bias", lambda f: not f["embedding.project_tokens"]),
        Named("do_layer_norm_before", "residual.placement", True, {True: "pre", False: "post"}),
        Named("_remove_final_layer_norm", "residual.final_norm", False, {False: True, True: False}),
        Derived(
            "residual.final_norm",
            lambda f: f["residual.final_norm"] and f["residual.placement"] == "pre",
        ),
        Setting("layer_norm_elementwise_affine", "norm.gain", True, "flag"),
        Derived("norm.bias", lambda f: f["norm.gain"]),
        Setting("enable_bias", "attention.qkv_bias", True, "flag"),
        Derived("attention.out_bias", lambda f: f["attention.qkv_bias"]),
        Derived("feed_forward.bias", lambda f: f["attention.qkv_bias"]),
        Kept(("activation_dropout", "layerdrop", "learned_embeddings")),
        Tied(True, table="model.decoder.embed_tokens.weight"),
    ),
    weights=rules(
        same(TABLE, "model.decoder.embed_tokens.weight"),
        same("embedding.position.weight", "model.decoder.embed_positions.weight"),
        linear("embedding.projection.w", "model.decoder.project_in"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{OPT_LAYER}.self_attn_layer_norm"),
        *(linear(f"{ATTENTION}.w{x}", f"{OPT_LAYER}.self_attn.{x}_proj") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{OPT_LAYER}.self_attn.out_proj"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{OPT_LAYER}.final_layer_norm"),
        linear(f"{FEED_FORWARD}.w_in", f"{OPT_LAYER}.fc1"),
        linear(f"{FEED_FORWARD}.w_out", f"{OPT_LAYER}.fc2"),
        norm("decoder.norm", "model.decoder.final_layer_norm"),
        linear("output.transform.w", "model.decoder.project_out"),
        linear("output.w", "lm_head"),
    ),
    prefix="model.",
    ignored=(r"decoder\.version$",),
    special={"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
)

FAMILIES = (OPT,)
