"""Encoder-only families that change BERT's embeddings, layers or positions."""

from jaxformers.hf.encoder_settings import AfterPadding, EmbeddingSize, Heads, SharedLayers
from jaxformers.hf.families.encoders import (
    ATTENTION,
    BERT_LIKE,
    DENSE_CLASSIFIER,
    IGNORED,
    LAYER,
    PER_TOKEN,
    POOLED,
    POSITIONS,
    classes,
    classifiers,
    embeddings,
    first,
    layers,
    masked_lm,
    masked_lm_repeats,
    masked_lm_settings,
    sizes,
)
from jaxformers.hf.family import Family, linear, norm, rules, same
from jaxformers.hf.settings import Derived, Fixed, Kept, Only, Setting, Tied

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
        Fixed({"transform": "gelu"}),
        Derived("classifier_transform", lambda fields: fields["activation"]),
        Heads(
            output="generator_predictions.dense.weight",
            pooler="",
            sequence={"classifier.out_proj.weight": first("gelu")},
            tokens={
                "classifier.weight": {**PER_TOKEN, "classifier_transform": None},
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
            lambda a: a.classifier == "none" and a.classifier_transform and a.labels == 1,
            "discriminator_predictions.dense_prediction",
            "discriminator_predictions.dense",
        ),
    ),
    prefix="electra.",
    ignored=IGNORED,
    special={"pad_token_id": 0},
)

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
        SharedLayers(),  # which says what num_hidden_layers is here
        Only("inner_group_num", (1,), 1),
        Setting("embedding_size", "embedding_dim", 128),
        *POSITIONS,
        *BERT_LIKE,
        *masked_lm_settings("predictions", "albert"),
        Derived("transform", lambda fields: fields["activation"]),
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
        classifiers(lambda a: not a.output, "classifier"),
        # Which of two sentences comes first, trained together with the masked-LM head.
        classifiers(lambda a: a.output, "sop_classifier.classifier"),
    ),
    prefix="albert.",
    repeats=masked_lm_repeats("predictions"),
    ignored=IGNORED,
    special={"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
)

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
        Fixed({"t5_buckets": 32, "t5_distance": 128}),
        *masked_lm_settings("lm_head", "mpnet"),
        Fixed({"transform": "gelu"}),
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

LATER_ENCODERS = (ELECTRA, ALBERT, MPNET)
