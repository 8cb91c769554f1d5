"""The table of DistilBERT."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.heads import Heads
from jaxformers.hf.architecture.output import Tied
from jaxformers.hf.config.settings import Derived, Fixed, Kept, Named, Setting
from jaxformers.hf.families.bert_like import (
    ATTENTION,
    BERT_LIKE,
    IGNORED,
    LAYER,
    PER_TOKEN,
    POSITIONS,
    classes,
    embeddings,
    first,
)
from jaxformers.hf.family import Family, linear, norm, rules

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
        Setting("n_heads", "attention.num_heads", 12, alias="num_attention_heads"),
        Setting("hidden_dim", "feed_forward.d_ff", 3072),
        Setting("dropout", "dropout", 0.1, "number"),
        Setting("attention_dropout", "attention.dropout", 0.1, "number"),
        Named("activation", "feed_forward.activation", "gelu", ACTIVATION_NAMES),
        *POSITIONS,
        *BERT_LIKE,
        Fixed({"norm.eps": 1e-12}),
        Tied(True, "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        Derived("output.transform", lambda fields: fields["feed_forward.activation"]),
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

FAMILIES = (DISTILBERT,)
