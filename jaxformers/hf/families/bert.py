"""The table of BERT."""

from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.config.settings import Derived, Kept
from jaxformers.hf.families.bert_like import (
    BERT_LIKE,
    IGNORED,
    PER_TOKEN,
    POOLED,
    POSITIONS,
    SIZES,
    classes,
    classifiers,
    embeddings,
    layers,
    masked_lm,
    masked_lm_repeats,
    masked_lm_settings,
)
from jaxformers.hf.family import Family, rules

BERT = Family(
    model_type="bert",
    shape="encoder",
    classes=classes("Bert", pretraining="BertForPreTraining"),
    settings=(
        *SIZES,
        *POSITIONS,
        *BERT_LIKE,
        *masked_lm_settings("cls.predictions", "bert"),
        Derived("output.transform", lambda fields: fields["feed_forward.activation"]),
        Heads(
            output="cls.predictions.transform.dense.weight",
            pooler="bert.pooler.dense.weight",
            sequence={"classifier.weight": POOLED, "cls.seq_relationship.weight": POOLED},
            tokens={"classifier.weight": PER_TOKEN},
        ),
        # The first multilingual files describe the pooler, which is the same in all files.
        Kept(("directionality", "pooler_type", "pooler_fc_size", "pooler_size_per_head")),
        Kept(("pooler_num_attention_heads", "pooler_num_fc_layers")),
    ),
    weights=rules(
        embeddings("bert"),
        layers("bert"),
        masked_lm("cls.predictions", "transform.dense", "transform.LayerNorm"),
        classifiers(lambda a: not a.output.present, "classifier"),
        # The classifier of following sentences, trained together with the masked-LM head.
        classifiers(lambda a: a.output.present and a.heads.labels == 2, "cls.seq_relationship"),
    ),
    prefix="bert.",
    repeats=masked_lm_repeats("cls.predictions"),
    ignored=IGNORED,
    special={"pad_token_id": 0},
)

FAMILIES = (BERT,)
