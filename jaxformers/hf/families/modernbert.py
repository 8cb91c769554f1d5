"""The table of ModernBERT."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.heads import Heads, Pooling
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.architecture.rope import Rotary
from jaxformers.hf.architecture.window import Windows
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Setting
from jaxformers.hf.families.bert_like import ATTENTION, LAYER, PER_TOKEN, TABLE, classes
from jaxformers.hf.family import Family, fused, linear, norm, rules, same, when


class DenseHead(NamedTuple):
    """ModernBERT's dense layer before the vocabulary or before the classes."""

    activation: Named = Named("classifier_activation", "output.transform", "gelu", ACTIVATION_NAMES)

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        self.activation.read(config, fields)
        bias = config.get("classifier_bias", False, "flag")
        fields |= {"output.transform_bias": bias, "heads.bias": bias, "heads.norm": True}
        fields["heads.transform"] = fields["output.transform"]

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        activation, bias = fields["output.transform"], fields["output.transform_bias"]
        if fields["heads.labels"] is not None:
            activation, bias = fields["heads.transform"], fields["heads.bias"]
        if activation is not None:
            self.activation.write({"output.transform": activation}, config)
            config["classifier_bias"] = bias


M = "model.layers.{i}"


def dense_head(ours: str):
    """Returns the rules of the dense layer before the vocabulary or before the classes."""
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
        Setting("num_attention_heads", "attention.num_heads", 12),
        Setting("intermediate_size", "feed_forward.d_ff", 1152),
        Setting("norm_eps", "norm.eps", 1e-5, "positive"),
        Setting("norm_bias", "norm.bias", False, "flag"),
        Setting("attention_bias", "attention.qkv_bias", False, "flag"),
        Derived("attention.out_bias", lambda fields: fields["attention.qkv_bias"]),
        Setting("mlp_bias", "feed_forward.bias", False, "flag"),
        Named("hidden_activation", "feed_forward.activation", "gelu", ACTIVATION_NAMES),
        Setting("embedding_dropout", "dropout", 0.0, "number"),
        Setting("attention_dropout", "attention.dropout", 0.0, "number"),
        Fixed(
            {
                "feed_forward.gated": True,
                "embedding.norm": True,
                "residual.first_attention_norm": False,
            }
        ),
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
        Setting("decoder_bias", "output.bias", True, "flag"),
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
        # Entries about the training.
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
        when(lambda a: a.heads.labels is None, dense_head("output")),
        when(lambda a: not a.output.present, dense_head("classifier")),
        linear("output.w", "decoder"),
        linear("classifier.out.w", "classifier"),
    ),
    prefix="model.",
    special={"pad_token_id": 50283, "bos_token_id": 50281, "eos_token_id": 50282},
    newer=("rope_parameters", "layer_types"),
)

FAMILIES = (MODERNBERT,)
