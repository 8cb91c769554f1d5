"""The table of ELECTRA."""

from jaxformers.hf.architecture.embedding import EmbeddingSize
from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Derived, Fixed
from jaxformers.hf.families.bert_like import (
    BERT_LIKE,
    DENSE_CLASSIFIER,
    IGNORED,
    PER_TOKEN,
    POSITIONS,
    classes,
    classifiers,
    embeddings,
    first,
    layers,
    sizes,
)
from jaxformers.hf.family import Family, linear, norm, rules

# Clark et al. 2020: the generator is a masked LM, the discriminator a classifier of tokens.
ELECTRA = Family(
    model_type="electra",
    shape="encoder",
    classes=classes("Electra", discriminator="ElectraForPreTraining"),
    settings=(
        *sizes(hidden_size=256, num_attention_heads=4, intermediate_size=1024),
        EmbeddingSize(128),
        *POSITIONS,
        *BERT_LIKE,
        Tied(True, "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
        Fixed({"output.transform": "gelu"}),
        Derived("heads.transform", lambda fields: fields["feed_forward.activation"]),
        Heads(
            output="generator_predictions.dense.weight",
            pooler="",
            sequence={"classifier.out_proj.weight": first("gelu")},
            tokens={
                "classifier.weight": {**PER_TOKEN, "heads.transform": None},
                "discriminator_predictions.dense_prediction.weight": PER_TOKEN,
            },
        ),
    ),
    weights=rules(
        embeddings("electra"),
        linear("embedding.projection.w", "electra.embeddings_project"),
        layers("electra"),
        linear("output.transform.w", "generator_predictions.dense"),
        norm("output.transform.norm", "generator_predictions.LayerNorm"),
        linear("output.w", "generator_lm_head"),
        DENSE_CLASSIFIER,
        classifiers(
            lambda a: a.heads.pooling == "none" and a.heads.transform and a.heads.labels == 1,
            "discriminator_predictions.dense_prediction",
            "discriminator_predictions.dense",
        ),
    ),
    prefix="electra.",
    ignored=IGNORED,
    special={"pad_token_id": 0},
)

FAMILIES = (ELECTRA,)
