"""Encoder-only families with rotary positions."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.encoder_settings import DenseHead, Heads, Pooling
from jaxformers.hf.families.encoders import (
    ATTENTION,
    LAYER,
    PER_TOKEN,
    POOLED,
    TABLE,
    classes,
    masked_lm,
    masked_lm_repeats,
    masked_lm_settings,
    sizes,
)
from jaxformers.hf.family import Family, fused, linear, norm, rules, same, when
from jaxformers.hf.rope_settings import Rotary, Windows
from jaxformers.hf.settings import Derived, Fixed, Kept, Named, Older, Only, Setting, Tied

M = "model.layers.{i}"


def dense_head(ours: str):
    """What stands before the vocabulary, or before the classes, under the same names."""
    return rules(
        linear(f"{ours}.transform.w", "head.dense"),
        norm(f"{ours}.transform.norm", "head.norm"),
    )


# Warner et al. 2024.
MODERNBERT = Family(
    model_type="modernbert",
    shape="encoder",
    classes=classes("ModernBert"),
    settings=(
        Setting("vocab_size", "vocab_size", 50368),
        Setting("hidden_size", "d_model", 768),
        Setting("num_hidden_layers", "num_layers", 22, "layers"),
        Setting("num_attention_heads", "num_heads", 12),
        Setting("intermediate_size", "d_ff", 1152),
        Setting("norm_eps", "norm_eps", 1e-5, "positive"),
        Setting("norm_bias", "norm_bias", False, "flag"),
        Setting("attention_bias", "qkv_bias", False, "flag"),
        Derived("out_bias", lambda fields: fields["qkv_bias"]),
        Setting("mlp_bias", "ff_bias", False, "flag"),
        Named("hidden_activation", "activation", "gelu", ACTIVATION_NAMES),
        Setting("embedding_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Fixed({"gated": True, "embedding_norm": True, "first_attention_norm": False}),
        Windows(
            128,
            "first",
            every=3,
            key="local_attention",
            every_key="global_attn_every_n_layers",
            both_sides=True,
        ),
        Rotary(
            theta=160000.0,
            theta_key="global_rope_theta",
            sliding_theta=10000.0,
            sliding_theta_key="local_rope_theta",
            partial_key=None,
            max_length=8192,
        ),
        Setting("decoder_bias", "logits_bias", True, "flag"),
        DenseHead(),
        Pooling("cls", {"cls": "first", "mean": "mean"}),
        Tied(True, "decoder.weight", "model.embeddings.tok_embeddings.weight"),
        Heads(
            output="head.dense.weight",
            pooler="",
            sequence={"classifier.weight": {}},
            tokens={"classifier.weight": PER_TOKEN},
            shared=True,
        ),
        Kept(
            ("mlp_dropout", "position_embedding_type", "layer_norm_eps", "repad_logits_with_grad")
        ),
        # Of the training.
        Kept(("initializer_cutoff_factor", "sparse_prediction", "sparse_pred_ignore_index")),
        Kept((), {"max_position_embeddings": 8192}),
    ),
    weights=rules(
        same(TABLE, "model.embeddings.tok_embeddings.weight"),
        norm("embedding.norm", "model.embeddings.norm"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{M}.attn_norm"),
        fused(tuple(f"{ATTENTION}.w{x}" for x in "qkv"), f"{M}.attn.Wqkv", "linear rows"),
        linear(f"{ATTENTION}.wo", f"{M}.attn.Wo"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{M}.mlp_norm"),
        fused(
            (f"{LAYER}.feed_forward.w_gate", f"{LAYER}.feed_forward.w_up"),
            f"{M}.mlp.Wi",
            "linear rows",
        ),
        linear(f"{LAYER}.feed_forward.w_down", f"{M}.mlp.Wo"),
        norm("encoder.norm", "model.final_norm"),
        when(lambda a: a.labels is None, dense_head("output")),
        when(lambda a: not a.output, dense_head("classifier")),
        linear("output.w", "decoder"),
        linear("classifier.out.w", "classifier"),
    ),
    prefix="model.",
    special={"pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282},
    newer=("rope_parameters", "layer_types"),
)

N = "nomic_bert.encoder.layers.{i}"
NOMIC_OLDER = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
    "rotary_emb_base": "rope_theta",
}
# Nussbaum et al. 2024.
NOMIC_BERT = Family(
    model_type="nomic_bert",
    shape="encoder",
    classes=classes("NomicBert"),
    settings=(
        Older(NOMIC_OLDER),
        *(
            setting
            for setting in sizes(
                vocab_size=30528, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
            if setting.key != "hidden_act"
        ),
        Named("hidden_act", "activation", "silu", ACTIVATION_NAMES | {"swiglu": "silu"}),
        Setting("head_dim", "head_dim", None, optional=True),
        Fixed({"placement": "post", "final_norm": False, "embedding_norm": True, "gated": True}),
        Rotary(theta=1000.0, partial_key=None),
        *masked_lm_settings("cls.predictions", "nomic_bert"),
        Fixed({"logits_bias": True}),
        Derived("transform", lambda fields: fields["activation"]),
        Heads(
            output="cls.predictions.transform.dense.weight",
            pooler="nomic_bert.pooler.dense.weight",
            sequence={"classifier.weight": POOLED},
            tokens={"classifier.weight": PER_TOKEN},
        ),
        Only("rotary_emb_fraction", (1.0, 1), 1.0),
        Only("scale_attn_weights", (True,), True),
        Kept(("dense_seq_output", "max_trained_positions", "pad_vocab_size_multiple")),
        # Its class takes no null for the padding id.
        Kept((), {"max_position_embeddings": 2048, "pad_token_id": 0}),
    ),
    # transformers calls them otherwise in memory, in files as they were first published.
    weights=rules(
        same(TABLE, "nomic_bert.embeddings.word_embeddings.weight"),
        same(
            "embedding.type_embedding.weight", "nomic_bert.embeddings.token_type_embeddings.weight"
        ),
        norm("embedding.norm", "nomic_bert.emb_ln"),
        fused(tuple(f"{ATTENTION}.w{x}" for x in "qkv"), f"{N}.attn.Wqkv", "linear rows"),
        linear(f"{ATTENTION}.wo", f"{N}.attn.out_proj"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{N}.norm1"),
        linear(f"{LAYER}.feed_forward.w_up", f"{N}.mlp.fc11"),
        linear(f"{LAYER}.feed_forward.w_gate", f"{N}.mlp.fc12"),
        linear(f"{LAYER}.feed_forward.w_down", f"{N}.mlp.fc2"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{N}.norm2"),
        linear("pooler.w", "nomic_bert.pooler.dense"),
        masked_lm("cls.predictions", "transform.dense", "transform.layer_norm"),
        linear("classifier.out.w", "classifier"),
    ),
    prefix="nomic_bert.",
    repeats=masked_lm_repeats("cls.predictions"),
    ignored=(r"\.position_ids$", r"\.inv_freq$"),
    special={"pad_token_id": 0},
)

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
        Setting("num_attention_heads", "num_heads", 12),
        Setting("num_key_value_heads", "num_kv_heads", None, optional=True),
        Setting("head_dim", "head_dim", None, optional=True),
        Setting("intermediate_size", "d_ff", 3072),
        Setting("rms_norm_eps", "norm_eps", 1e-5, "positive"),
        Setting("attention_dropout", "attention_dropout", 0.0, "number"),
        Named("hidden_act", "activation", "silu", ACTIVATION_NAMES),
        Setting("attention_bias", "qkv_bias", False, "flag"),
        Derived("out_bias", lambda fields: fields["qkv_bias"]),
        Setting("mlp_bias", "ff_bias", False, "flag"),
        Derived("logits_bias", lambda fields: fields["ff_bias"]),
        Fixed({"norm": "rms", "gated": True}),
        Rotary(partial_key=None, max_length=8192),
        # A tied output layer would leave nothing in a file that says that it is there.
        Only("tie_word_embeddings", (False,), False),
        Pooling("late", {"bos": "first", "mean": "mean", "late": "late"}),
        Heads(
            output="lm_head.weight",
            pooler="",
            sequence={"classifier.weight": {"classifier_transform": "gelu"}},
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

ROTARY_ENCODERS = (MODERNBERT, NOMIC_BERT, EUROBERT)
