"""Tiny models for texts, saved by transformers and sentence-transformers, for tests."""

import sentence_transformers as st
import tokenizers
import torch
import transformers
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "qwen3": ("<|end|>", "<unk>"),
    "mistral": ("<unk>", "<s>", "</s>"),
    "t5": ("<pad>", "</s>", "<unk>"),
}
# What is around a text, and the padding.
AROUND = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[PAD]"),
    "xlm-roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>", "<pad>"),
    "qwen3": ("$A <|end|>", "$A $B <|end|>", "<|end|>"),
    "mistral": ("<s> $A </s>", "<s> $A $B </s>", "</s>"),
    "t5": ("$A </s>", "$A </s> $B </s>", "<pad>"),
}
BERT_SIZES = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=34,
)
DECODER_SIZES = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    intermediate_size=20,
    max_position_embeddings=34,
)


def tokenizer_of(kind, side="right"):
    """A tokenizer of words between spaces, with the special tokens of a kind of model."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL[kind], *WORDS])}
    unknown = next(x for x in SPECIAL[kind] if "unk" in x.lower())
    single, pair, padding = AROUND[kind]
    backend = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = [(x, vocabulary[x]) for x in SPECIAL[kind] if x in single]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    named = {"cls_token": ends[0][0], "sep_token": ends[-1][0], "eos_token": ends[-1][0]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        pad_token=padding,
        padding_side=side,
        model_max_length=32 if kind in ("xlm-roberta", "t5") else 10**30,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if kind == "bert"
        else ["input_ids", "attention_mask"],
        **named,
    )


def model_of(kind, head=None, **options):
    """A model of transformers: BertModel and so on, or a classifier."""
    torch.manual_seed(len(kind))
    size = len(SPECIAL[kind]) + len(WORDS)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=size, **BERT_SIZES, **options)
        model = transformers.BertForSequenceClassification if head else transformers.BertModel
    elif kind == "xlm-roberta":
        config = transformers.XLMRobertaConfig(
            vocab_size=size, pad_token_id=1, type_vocab_size=1, **BERT_SIZES, **options
        )
        model = transformers.XLMRobertaModel
        model = transformers.XLMRobertaForSequenceClassification if head else model
    elif kind == "qwen3":
        config = transformers.Qwen3Config(vocab_size=size, **DECODER_SIZES, **options)
        model = transformers.Qwen3Model
    elif kind == "mistral":
        config = transformers.MistralConfig(
            vocab_size=size, sliding_window=None, **DECODER_SIZES, **options
        )
        model = transformers.MistralModel
    else:
        config = transformers.T5Config(
            vocab_size=size, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, **options
        )
        model = transformers.T5EncoderModel
    model = model(config).eval()
    with torch.no_grad():  # as they are drawn, they give nearly the same for all texts
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def save_plain(directory, kind, side="right", head=None, **options):
    """Writes a model and its tokenizer as transformers does."""
    model_of(kind, head, **options).save_pretrained(directory)
    tokenizer_of(kind, side).save_pretrained(directory)
    return str(directory)


def save_sentences(directory, kind, modes="mean", rest=(), side="right", **options):
    """Writes a directory of sentence-transformers, and returns the reference read from it."""
    plain = save_plain(directory / "plain", kind, side)
    modules = [Transformer(plain), Pooling(12, modes), *rest]
    st.SentenceTransformer(modules=modules, device="cpu", **options).save(str(directory / "st"))
    return str(directory / "st"), st.SentenceTransformer(str(directory / "st"), device="cpu")
