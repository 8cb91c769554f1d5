"""The table of Nomic BERT."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.architecture.rope import Rotary
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Older, Only, Setting
from jaxformers.hf.families.bert_like import (
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
from jaxformers.hf.family import Family, fused, linear, norm, rules, same

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
        Named(
            "hidden_act", "feed_forward.activation", "silu", ACTIVATION_NAMES | {"swiglu": "silu"}
        ),
        Setting("head_dim", "attention.head_dim", None, optional=True),
        Fixed(
            {
                "residual.placement": "post",
                "residual.final_norm": False,
                "embedding.norm": True,
                "feed_forward.gated": True,
            }
        ),
        Rotary(theta=1000.0, partial_key=None),
        *masked_lm_settings("cls.predictions", "nomic_bert"),
        Fixed({"output.bias": True}),
        Derived("output.transform", lambda fields: fields["feed_forward.activation"]),
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
    # These are the names in files. transformers has other names in memory.
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

FAMILIES = (NOMIC_BERT,)
