"""The settings and weights that BERT began and most encoder-only families have kept."""

from jaxformers.hf.architecture.activation import ACTIVATION_NAMES
from jaxformers.hf.architecture.output import OutputBias, Tied
from jaxformers.hf.config.settings import Fixed, Named, Only, Setting, with_defaults
from jaxformers.hf.family import linear, norm, rules, same, when

LAYER = "encoder.layers.{i}"
ATTENTION = f"{LAYER}.self_attention"
TABLE = "embedding.token_embedding.weight"
IGNORED = (r"\.position_ids$",)

# The fields of classifiers: of sequences by BERT's pooler, of tokens, and of sequences by their
# first token after a dense layer.
POOLED, PER_TOKEN = {"heads.pooling": "pooler"}, {"heads.pooling": "none"}


def first(activation: str) -> dict[str, str]:
    return {"heads.pooling": "first", "heads.transform": activation}


def classes(name: str, **more: str) -> dict[str, str]:
    """Returns the classes of transformers for a family, by the beginning of their names."""
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
    Setting("num_attention_heads", "attention.num_heads", 12),
    Setting("intermediate_size", "feed_forward.d_ff", 3072),
    Setting("type_vocab_size", "embedding.token_types", 2),
    Setting("layer_norm_eps", "norm.eps", 1e-12, "positive"),
    Setting("hidden_dropout_prob", "dropout", 0.1, "number"),
    Setting("attention_probs_dropout_prob", "attention.dropout", 0.1, "number"),
    Named("hidden_act", "feed_forward.activation", "gelu", ACTIVATION_NAMES),
)


def sizes(**defaults):
    """Returns BERT's sizes with the defaults of another family."""
    return with_defaults(SIZES, **defaults)


POSITIONS = (Setting("max_position_embeddings", "position.max_seq_length", 512),)
BERT_LIKE = (
    Only("position_embedding_type", ("absolute",), "absolute"),
    Only("is_decoder", (False,), False),
    Only("add_cross_attention", (False,), False),
    Fixed({"position.kind": "learned", "residual.placement": "post", "residual.final_norm": False}),
    Fixed({"attention.qkv_bias": True, "attention.out_bias": True, "feed_forward.bias": True}),
    Fixed({"embedding.norm": True, "output.bias": True}),
)


def embeddings(name: str):
    """Returns the rules of the embedding; `name` is the prefix of the model in files."""
    return rules(
        same(TABLE, f"{name}.embeddings.word_embeddings.weight"),
        same("embedding.position.weight", f"{name}.embeddings.position_embeddings.weight"),
        same("embedding.type_embedding.weight", f"{name}.embeddings.token_type_embeddings.weight"),
        norm("embedding.norm", f"{name}.embeddings.LayerNorm"),
    )


def layers(name: str):
    """Returns the rules of the layers and the pooler; `name` is the prefix in files."""
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
    """Returns the rules of a masked-LM head; its bias has one of two names."""
    weight, bias = linear("output.w", f"{head}.decoder")
    [_, alone] = linear("output.w", head)
    return rules(
        linear("output.transform.w", f"{head}.{dense}"),
        norm("output.transform.norm", f"{head}.{layer_norm}"),
        [weight],
        when(lambda a: a.output.tied, [alone]),
        when(lambda a: not a.output.tied, [bias]),
    )


def masked_lm_settings(head: str, name: str):
    """Returns the settings of such a head that say whether it is tied, and of its bias."""
    return (
        Tied(True, f"{head}.decoder.weight", f"{name}.embeddings.word_embeddings.weight"),
        OutputBias(f"{head}.bias", f"{head}.decoder.bias"),
    )


def masked_lm_repeats(head: str):
    """Returns the repeats of its bias, which version 4 of transformers reads under one name."""
    return ((f"{head}.bias", f"{head}.decoder.bias"),)


def classifiers(condition, out: str, dense: str | None = None):
    """Returns the rules of a classifier, for architectures that meet the condition."""
    transform = [] if dense is None else linear("classifier.transform.w", dense)
    return when(condition, linear("classifier.out.w", out), transform)


# A classifier of sequences has a dense layer, one of tokens has none; their names differ.
DENSE_CLASSIFIER = rules(
    classifiers(lambda a: a.heads.pooling == "first", "classifier.out_proj", "classifier.dense"),
    classifiers(lambda a: a.heads.pooling == "none" and not a.heads.transform, "classifier"),
)
