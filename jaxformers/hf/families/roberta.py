"""The tables of RoBERTa, XLM-RoBERTa and CamemBERT."""

from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.architecture.position import AfterPadding
from jaxformers.hf.config.settings import Fixed
from jaxformers.hf.families.bert_like import (
    BERT_LIKE,
    DENSE_CLASSIFIER,
    IGNORED,
    PER_TOKEN,
    classes,
    embeddings,
    first,
    layers,
    masked_lm,
    masked_lm_repeats,
    masked_lm_settings,
    sizes,
)
from jaxformers.hf.family import Family, rules


def roberta(model_type: str, name: str, vocab_size: int) -> Family:
    """Returns the table of RoBERTa, or of a model that differs only in its training texts."""
    return Family(
        model_type=model_type,
        shape="encoder",
        classes=classes(name),
        settings=(
            *sizes(vocab_size=vocab_size),
            *BERT_LIKE,
            AfterPadding(),
            *masked_lm_settings("lm_head", "roberta"),
            # Its head has this GELU, whatever the layers have.
            Fixed({"output.transform": "gelu"}),
            Heads(
                output="lm_head.dense.weight",
                pooler="roberta.pooler.dense.weight",
                sequence={"classifier.out_proj.weight": first("tanh")},
                tokens={"classifier.weight": PER_TOKEN},
            ),
        ),
        weights=rules(
            embeddings("roberta"),
            layers("roberta"),
            masked_lm("lm_head", "dense", "layer_norm"),
            DENSE_CLASSIFIER,
        ),
        prefix="roberta.",
        repeats=masked_lm_repeats("lm_head"),
        ignored=IGNORED,
        special={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    )


# Liu et al. 2019; Conneau et al. 2020; Martin et al. 2020.
ROBERTA = roberta("roberta", "Roberta", 50265)
XLM_ROBERTA = roberta("xlm-roberta", "XLMRoberta", 30522)
CAMEMBERT = roberta("camembert", "Camembert", 30522)
FAMILIES = (
    ROBERTA,
    XLM_ROBERTA,
    CAMEMBERT,
)
