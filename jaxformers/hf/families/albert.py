"""The table of ALBERT."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Derived, Kept, Only, Setting
from jaxformers.hf.families.bert_like import (
    ATTENTION,
    BERT_LIKE,
    IGNORED,
    LAYER,
    PER_TOKEN,
    POOLED,
    POSITIONS,
    classes,
    classifiers,
    embeddings,
    masked_lm,
    masked_lm_repeats,
    masked_lm_settings,
    sizes,
)
from jaxformers.hf.family import Family, linear, norm, rules


class SharedLayers(NamedTuple):
    """ALBERT's layers. Each of them runs several times."""

    layers: int = 12
    groups: int = 1

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        layers = config.get("num_hidden_layers", self.layers, "layers")
        groups = config.get("num_hidden_groups", self.groups, "layers")
        if groups > layers:
            config.refuse("num_hidden_groups", f"there are {layers} layers.")
        fields["num_layers"] = groups
        fields["layer_order"] = tuple(int(i / (layers / groups)) for i in range(layers))

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        groups, order = fields["num_layers"], fields["layer_order"]
        config["num_hidden_layers"] = groups if order is None else len(order)
        config["num_hidden_groups"] = groups


A = "albert.encoder.albert_layer_groups.{i}.albert_layers.0"

# Lan et al. 2020: a layer, or one of a few, that runs many times.
ALBERT = Family(
    model_type="albert",
    shape="encoder",
    classes=classes("Albert", pretraining="AlbertForPreTraining"),
    settings=(
        *sizes(
            vocab_size=30000,
            hidden_size=4096,
            num_attention_heads=64,
            intermediate_size=16384,
            hidden_act="gelu_new",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        SharedLayers(),  # it replaces the usual meaning of num_hidden_layers
        Only("inner_group_num", (1,), 1),
        Setting("embedding_size", "embedding.dim", 128),
        *POSITIONS,
        *BERT_LIKE,
        *masked_lm_settings("predictions", "albert"),
        Derived("output.transform", lambda fields: fields["feed_forward.activation"]),
        Heads(
            output="predictions.dense.weight",
            pooler="albert.pooler.weight",
            sequence={"classifier.weight": POOLED, "sop_classifier.classifier.weight": POOLED},
            tokens={"classifier.weight": PER_TOKEN},
        ),
        Kept(("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks")),
    ),
    weights=rules(
        embeddings("albert"),
        linear("embedding.projection.w", "albert.encoder.embedding_hidden_mapping_in"),
        linear(f"{ATTENTION}.wq", f"{A}.attention.query"),
        linear(f"{ATTENTION}.wk", f"{A}.attention.key"),
        linear(f"{ATTENTION}.wv", f"{A}.attention.value"),
        linear(f"{ATTENTION}.wo", f"{A}.attention.dense"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{A}.attention.LayerNorm"),
        linear(f"{LAYER}.feed_forward.w_in", f"{A}.ffn"),
        linear(f"{LAYER}.feed_forward.w_out", f"{A}.ffn_output"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{A}.full_layer_layer_norm"),
        linear("pooler.w", "albert.pooler"),
        masked_lm("predictions", "dense", "LayerNorm"),
        classifiers(lambda a: not a.output.present, "classifier"),
        # The classifier of the order of two sentences, trained together with the masked-LM head.
        classifiers(lambda a: a.output.present, "sop_classifier.classifier"),
    ),
    prefix="albert.",
    repeats=masked_lm_repeats("predictions"),
    ignored=IGNORED,
    special={"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
)

FAMILIES = (ALBERT,)
