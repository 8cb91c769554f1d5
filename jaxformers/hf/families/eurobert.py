"""The table of EuroBERT."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.heads import Heads, Pooling
from jaxformers.hf.architecture.rope import Rotary
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Older, Only, Setting
from jaxformers.hf.families.bert_like import ATTENTION, LAYER, PER_TOKEN, TABLE, classes
from jaxformers.hf.families.modernbert import M
from jaxformers.hf.family import Family, linear, norm, rules, same

# Boizard et al. 2025.
EUROBERT = Family(
    model_type="eurobert",
    shape="encoder",
    classes=classes("EuroBert"),
    settings=(
        Older({"clf_pooling": "classifier_pooling"}),
        Setting("vocab_size", "vocab_size", 128256),
        Setting("hidden_size", "d_model", 768),
        Setting("num_hidden_layers", "num_layers", 12, "layers"),
        Setting("num_attention_heads", "attention.num_heads", 12),
        Setting("num_key_value_heads", "attention.num_kv_heads", None, optional=True),
        Setting("head_dim", "attention.head_dim", None, optional=True),
        Setting("intermediate_size", "feed_forward.d_ff", 3072),
        Setting("rms_norm_eps", "norm.eps", 1e-5, "positive"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Named("hidden_act", "feed_forward.activation", "silu", ACTIVATION_NAMES),
        Setting("attention_bias", "attention.qkv_bias", False, "flag"),
        Derived("attention.out_bias", lambda fields: fields["attention.qkv_bias"]),
        Setting("mlp_bias", "feed_forward.bias", False, "flag"),
        Derived("output.bias", lambda fields: fields["feed_forward.bias"]),
        Fixed({"norm.kind": "rms", "feed_forward.gated": True}),
        Rotary(partial_key=None, max_length=8192),
        # A file with a tied output layer would have no tensor that shows the layer.
        Only("tie_word_embeddings", (False,), False),
        Pooling("late", {"bos": "first", "mean": "mean", "late": "late"}),
        Heads(
            output="lm_head.weight",
            pooler="",
            sequence={"classifier.weight": {"heads.transform": "gelu"}},
            tokens={"classifier.weight": PER_TOKEN},
        ),
        Kept(("pretraining_tp", "hidden_dropout")),
        Kept((), {"max_position_embeddings": 8192}),
    ),
    weights=rules(
        same(TABLE, "model.embed_tokens.weight"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{M}.input_layernorm"),
        *(linear(f"{ATTENTION}.w{x}", f"{M}.self_attn.{x}_proj") for x in "qkvo"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{M}.post_attention_layernorm"),
        *(
            linear(f"{LAYER}.feed_forward.w_{x}", f"{M}.mlp.{x}_proj")
            for x in ("gate", "up", "down")
        ),
        norm("encoder.norm", "model.norm"),
        linear("output.w", "lm_head"),
        linear("classifier.transform.w", "dense"),
        linear("classifier.out.w", "classifier"),
    ),
    prefix="model.",
    special={"pad_token_id": 128001, "bos_token_id": 128000, "eos_token_id": 128001},
)

FAMILIES = (EUROBERT,)
