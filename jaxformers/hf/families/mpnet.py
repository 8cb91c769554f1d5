"""The table of MPNet."""

from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.architecture.position import AfterPadding
from jaxformers.hf.config.settings import Fixed, Only
from jaxformers.hf.families.bert_like import (
    ATTENTION,
    BERT_LIKE,
    DENSE_CLASSIFIER,
    IGNORED,
    LAYER,
    PER_TOKEN,
    classes,
    embeddings,
    first,
    masked_lm,
    masked_lm_repeats,
    masked_lm_settings,
    sizes,
)
from jaxformers.hf.family import Family, linear, norm, rules, same

MP = "mpnet.encoder.layer.{i}"

# Song et al. 2020: RoBERTa without types, with T5's bias beside the table of positions.
MPNET = Family(
    model_type="mpnet",
    shape="encoder",
    classes=classes("MPNet"),
    settings=(
        *(setting for setting in sizes(vocab_size=30527) if setting.key != "type_vocab_size"),
        *BERT_LIKE,
        AfterPadding(key=None),
        Only("relative_attention_num_buckets", (32,), 32),
        Fixed({"position.t5_buckets": 32, "position.t5_distance": 128}),
        *masked_lm_settings("lm_head", "mpnet"),
        Fixed({"output.transform": "gelu"}),
        Heads(
            output="lm_head.dense.weight",
            pooler="mpnet.pooler.dense.weight",
            sequence={"classifier.out_proj.weight": first("tanh")},
            tokens={"classifier.weight": PER_TOKEN},
        ),
    ),
    weights=rules(
        embeddings("mpnet"),
        *(linear(f"{ATTENTION}.w{x}", f"{MP}.attention.attn.{x}") for x in "qkvo"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{MP}.attention.LayerNorm"),
        linear(f"{LAYER}.feed_forward.w_in", f"{MP}.intermediate.dense"),
        linear(f"{LAYER}.feed_forward.w_out", f"{MP}.output.dense"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{MP}.output.LayerNorm"),
        same("encoder.score_bias.weight", "mpnet.encoder.relative_attention_bias.weight"),
        linear("pooler.w", "mpnet.pooler.dense"),
        masked_lm("lm_head", "dense", "layer_norm"),
        DENSE_CLASSIFIER,
    ),
    prefix="mpnet.",
    repeats=masked_lm_repeats("lm_head"),
    ignored=IGNORED,
    special={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
)

FAMILIES = (MPNET,)
