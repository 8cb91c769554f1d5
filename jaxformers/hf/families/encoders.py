"""Encoder-only families."""

from jaxformers.hf.activation_names import ACTIVATION_NAMES
from jaxformers.hf.family import Family, linear, norm, rules, same
from jaxformers.hf.settings import Derived, Fixed, Heads, Kept, Named, Only, Setting, Tied

LAYER = "encoder.layers.{i}"
ATTENTION = f"{LAYER}.attention"
TABLE = "embedding.token_embedding.weight"

# Devlin et al. 2019. The layers of RoBERTa, ELECTRA and others have the same names.
BERT_SETTINGS = (
    Setting("vocab_size", "vocab_size", 30522),
    Setting("hidden_size", "d_model", 768),
    Setting("num_hidden_layers", "num_layers", 12, "layers"),
    Setting("num_attention_heads", "num_heads", 12),
    Setting("intermediate_size", "d_ff", 3072),
    Setting("max_position_embeddings", "max_seq_length", 512),
    Setting("type_vocab_size", "token_types", 2),
    Setting("layer_norm_eps", "norm_eps", 1e-12, "positive"),
    Setting("hidden_dropout_prob", "dropout", 0.1, "number"),
    Setting("attention_probs_dropout_prob", "attention_dropout", 0.1, "number"),
    Named("hidden_act", "activation", "gelu", ACTIVATION_NAMES),
    Only("position_embedding_type", ("absolute",), "absolute"),
    Fixed(
        {
            **{"position": "learned", "placement": "post", "final_norm": False},
            **{"qkv_bias": True, "out_bias": True, "ff_bias": True, "embedding_norm": True},
            **{"logits_bias": True},
        }
    ),
)
BERT_EMBEDDINGS = rules(
    same(TABLE, "bert.embeddings.word_embeddings.weight"),
    same("embedding.position.weight", "bert.embeddings.position_embeddings.weight"),
    same("embedding.type_embedding.weight", "bert.embeddings.token_type_embeddings.weight"),
    norm("embedding.norm", "bert.embeddings.LayerNorm"),
)
BERT_LAYER = "bert.encoder.layer.{i}"
BERT_LAYERS = rules(
    linear(f"{ATTENTION}.wq", f"{BERT_LAYER}.attention.self.query"),
    linear(f"{ATTENTION}.wk", f"{BERT_LAYER}.attention.self.key"),
    linear(f"{ATTENTION}.wv", f"{BERT_LAYER}.attention.self.value"),
    linear(f"{ATTENTION}.wo", f"{BERT_LAYER}.attention.output.dense"),
    norm(f"{LAYER}.attention_residual.norm", f"{BERT_LAYER}.attention.output.LayerNorm"),
    linear(f"{LAYER}.feed_forward.w_in", f"{BERT_LAYER}.intermediate.dense"),
    linear(f"{LAYER}.feed_forward.w_out", f"{BERT_LAYER}.output.dense"),
    norm(f"{LAYER}.feed_forward_residual.norm", f"{BERT_LAYER}.output.LayerNorm"),
)
# The next-sentence head is left out; older files have the masked-LM bias under two names.
BERT_IGNORED = (r"\.position_ids$", r"^cls\.seq_relationship\.")

BERT = Family(
    model_type="bert",
    shape="encoder",
    classes={
        "output": "BertForMaskedLM",
        "base": "BertModel",
        "sequence": "BertForSequenceClassification",
        "tokens": "BertForTokenClassification",
    },
    settings=(
        *BERT_SETTINGS,
        Tied(True, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        Derived("transform", lambda fields: fields["activation"]),
        Heads(
            output="cls.predictions.transform.dense.weight",
            pooler="bert.pooler.dense.weight",
            classifier="classifier.weight",
            sequence={"classifier": "pooler"},
        ),
        Kept(("gradient_checkpointing", "use_cache")),
    ),
    weights=rules(
        BERT_EMBEDDINGS,
        BERT_LAYERS,
        linear("pooler.w", "bert.pooler.dense"),
        linear("output.transform.w", "cls.predictions.transform.dense"),
        norm("output.transform.norm", "cls.predictions.transform.LayerNorm"),
        linear("output.w", "cls.predictions.decoder")[:1],
        linear("output.w", "cls.predictions")[1:],
        linear("classifier.out.w", "classifier"),
    ),
    prefix="bert.",
    ignored=BERT_IGNORED,
    copies=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)

ENCODERS = (BERT,)
