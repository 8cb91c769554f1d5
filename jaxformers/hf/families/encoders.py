"""Encoder-only families: BERT, RoBERTa and their kin."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.encoder_settings import AfterPadding, Heads, OutputBias
from jaxformers.hf.family import Family, linear, norm, rules, same, when
from jaxformers.hf.settings import (
    Derived,
    Fixed,
    Kept,
    Named,
    Only,
    Setting,
    Tied,
    with_defaults,
)

LAYER = "encoder.layers.{i}"
ATTENTION = f"{LAYER}.self_attention"
TABLE = "embedding.token_embedding.weight"
IGNORED = (r"\.position_ids$",)

# Classifiers by pooling: of sequences by BERT's pooler, of sequences by their first token after a
# dense layer, and of tokens.
POOLED, PER_TOKEN = {"classifier": "pooler"}, {"classifier": "none"}


def first(activation: str) -> dict[str, str]:
    return {"classifier": "first", "classifier_transform": activation}


def classes(name: str, **more: str) -> dict[str, str]:
    """The names of a family's classes, which all end in the same way."""
    return {
        "output": f"{name}ForMaskedLM",
        "base": f"{name}Model",
        "sequence": f"{name}ForSequenceClassification",
        "tokens": f"{name}ForTokenClassification",
        **more,
    }


# Devlin et al. 2019. The layers of RoBERTa, ELECTRA and others have the same names.
SIZES = (
    Setting("vocab_size", "vocab_size", 30522),
    Setting("hidden_size", "d_model", 768),
    Setting("num_hidden_layers", "num_layers", 12, "layers"),
    Setting("num_attention_heads", "num_heads", 12),
    Setting("intermediate_size", "d_ff", 3072),
    Setting("type_vocab_size", "token_types", 2),
    Setting("layer_norm_eps", "norm_eps", 1e-12, "positive"),
    Setting("hidden_dropout_prob", "dropout", 0.1, "number"),
    Setting("attention_probs_dropout_prob", "attention_dropout", 0.1, "number"),
    Named("hidden_act", "activation", "gelu", ACTIVATION_NAMES),
)


def sizes(**defaults):
    """BERT's sizes with the defaults of another family."""
    return with_defaults(SIZES, **defaults)


POSITIONS = (Setting("max_position_embeddings", "max_seq_length", 512),)
BERT_LIKE = (
    Only("position_embedding_type", ("absolute",), "absolute"),
    Only("is_decoder", (False,), False),
    Only("add_cross_attention", (False,), False),
    Fixed(
        {
            **{"position": "learned", "placement": "post", "final_norm": False},
            **{"qkv_bias": True, "out_bias": True, "ff_bias": True, "embedding_norm": True},
            **{"logits_bias": True},
        }
    ),
)


def embeddings(name: str):
    """The tables and the norm at the entrance of the model that files call `name`."""
    return rules(
        same(TABLE, f"{name}.embeddings.word_embeddings.weight"),
        same("embedding.position.weight", f"{name}.embeddings.position_embeddings.weight"),
        same("embedding.type_embedding.weight", f"{name}.embeddings.token_type_embeddings.weight"),
        norm("embedding.norm", f"{name}.embeddings.LayerNorm"),
    )


def layers(name: str):
    """The layers and the pooler of the model that files call `name`."""
    layer = f"{name}.encoder.layer.{{i}}"
    return rules(
        linear(f"{ATTENTION}.wq", f"{layer}.attention.self.query"),
        linear(f"{ATTENTION}.wk", f"{layer}.attention.self.key"),
        linear(f"{ATTENTION}.wv", f"{layer}.attention.self.value"),
        linear(f"{ATTENTION}.wo", f"{layer}.attention.output.dense"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{layer}.attention.output.LayerNorm"),
        linear(f"{LAYER}.feed_forward.w_in", f"{layer}.intermediate.dense"),
        linear(f"{LAYER}.feed_forward.w_out", f"{layer}.output.dense"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{layer}.output.LayerNorm"),
        linear("pooler.w", f"{name}.pooler.dense"),
    )


def masked_lm(head: str, dense: str, layer_norm: str):
    """A masked-LM head that has a bias of its own beside that of the map to the vocabulary."""
    weight, bias = linear("output.w", f"{head}.decoder")
    [_, alone] = linear("output.w", head)
    return rules(
        linear("output.transform.w", f"{head}.{dense}"),
        norm("output.transform.norm", f"{head}.{layer_norm}"),
        [weight],
        when(lambda a: a.tied, [alone]),
        when(lambda a: not a.tied, [bias]),
    )


def masked_lm_settings(head: str, name: str):
    """Whether the map to the vocabulary of such a head is the token table."""
    return (
        Tied(True, f"{head}.decoder.weight", f"{name}.embeddings.word_embeddings.weight"),
        OutputBias(f"{head}.bias", f"{head}.decoder.bias"),
    )


def masked_lm_repeats(head: str):
    """The bias of such a head, which version 4 of transformers reads under the one name only."""
    return ((f"{head}.bias", f"{head}.decoder.bias"),)


def classifiers(condition, out: str, dense: str | None = None):
    """The names of the classifier's maps where the condition holds."""
    transform = [] if dense is None else linear("classifier.transform.w", dense)
    return when(condition, linear("classifier.out.w", out), transform)


# Of sequences, with a dense layer, and of tokens, without: files call them differently.
DENSE_CLASSIFIER = rules(
    classifiers(lambda a: a.classifier == "first", "classifier.out_proj", "classifier.dense"),
    classifiers(lambda a: a.classifier == "none" and not a.classifier_transform, "classifier"),
)

BERT = Family(
    model_type="bert",
    shape="encoder",
    classes=classes("Bert", pretraining="BertForPreTraining"),
    settings=(
        *SIZES,
        *POSITIONS,
        *BERT_LIKE,
        *masked_lm_settings("cls.predictions", "bert"),
        Derived("transform", lambda fields: fields["activation"]),
        Heads(
            output="cls.predictions.transform.dense.weight",
            pooler="bert.pooler.dense.weight",
            sequence={"classifier.weight": POOLED, "cls.seq_relationship.weight": POOLED},
            tokens={"classifier.weight": PER_TOKEN},
        ),
        # How the first multilingual files describe the pooler that all of them have.
        Kept(("directionality", "pooler_type", "pooler_fc_size", "pooler_size_per_head")),
        Kept(("pooler_num_attention_heads", "pooler_num_fc_layers")),
    ),
    weights=rules(
        embeddings("bert"),
        layers("bert"),
        masked_lm("cls.predictions", "transform.dense", "transform.LayerNorm"),
        classifiers(lambda a: not a.output, "classifier"),
        # Whether one sentence follows another, trained together with the masked-LM head.
        classifiers(lambda a: a.output and a.labels == 2, "cls.seq_relationship"),
    ),
    prefix="bert.",
    repeats=masked_lm_repeats("cls.predictions"),
    ignored=IGNORED,
    special={"pad_token_id": 0},
)


def roberta(model_type: str, name: str, vocab_size: int) -> Family:
    """RoBERTa and the models that differ from it in what they were trained on alone."""
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
            Fixed({"transform": "gelu"}),
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

D = "distilbert.transformer.layer.{i}"
# Sanh et al. 2019.
DISTILBERT = Family(
    model_type="distilbert",
    shape="encoder",
    classes=classes("DistilBert"),
    settings=(
        Setting("vocab_size", "vocab_size", 30522),
        Setting("dim", "d_model", 768, alias="hidden_size"),
        Setting("n_layers", "num_layers", 6, "layers", alias="num_hidden_layers"),
        Setting("n_heads", "num_heads", 12, alias="num_attention_heads"),
        Setting("hidden_dim", "d_ff", 3072),
        Setting("dropout", "dropout", 0.1, "number"),
        Setting("attention_dropout", "attention_dropout", 0.1, "number"),
        Named("activation", "activation", "gelu", ACTIVATION_NAMES),
        *POSITIONS,
        *BERT_LIKE,
        Fixed({"norm_eps": 1e-12}),
        Tied(True, "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        Derived("transform", lambda fields: fields["activation"]),
        Heads(
            output="vocab_transform.weight",
            pooler="",
            sequence={"classifier.weight": first("relu")},
            tokens={"classifier.weight": PER_TOKEN},
        ),
        # Sinusoids are stored like any other table.
        Kept(("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_")),
    ),
    weights=rules(
        embeddings("distilbert"),
        *(linear(f"{ATTENTION}.w{x}", f"{D}.attention.{x}_lin") for x in "qkv"),
        linear(f"{ATTENTION}.wo", f"{D}.attention.out_lin"),
        norm(f"{LAYER}.self_attention_residual.norm", f"{D}.sa_layer_norm"),
        linear(f"{LAYER}.feed_forward.w_in", f"{D}.ffn.lin1"),
        linear(f"{LAYER}.feed_forward.w_out", f"{D}.ffn.lin2"),
        norm(f"{LAYER}.feed_forward_residual.norm", f"{D}.output_layer_norm"),
        linear("output.transform.w", "vocab_transform"),
        norm("output.transform.norm", "vocab_layer_norm"),
        linear("output.w", "vocab_projector"),
        linear("classifier.transform.w", "pre_classifier"),
        linear("classifier.out.w", "classifier"),
    ),
    prefix="distilbert.",
    ignored=IGNORED,
    special={"pad_token_id": 0},
)

ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT)
