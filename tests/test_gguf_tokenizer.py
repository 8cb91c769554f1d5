"""The tokenizers in GGUF files: the same ids and texts as those that they were made of."""

import json

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxformers import load_tokenizer  # noqa: E402
from jaxformers.tokenizers.gguf_models import LLAMA3, QWEN2, RULES  # noqa: E402

TEXTS = [
    *("", "  two  spaces, then 3.14 and 1000000!\n\n\nEnd", "Don't we'LL I'M they're"),
    *("naïve café e\u0301 ÀÉ — “quoted”", "日本語 中文 한국어", "👩‍👩‍👧 🇩🇪 ½ Ⅳ ²"),
    *("tab\tnul\x00 \u200b\u00a0x\r\n\r\n y", "<|end|>a<|end|> b <think>no</think><s>x"),
    *("    def f(x):\n        return x**2", "aaaaaaaa the the the there", "▁under ▁▁ <0x0A>"),
]
CORPUS = ["the cat sat on the mat, then the other cat 12 34 café don't I'm  there\n\n"] * 20 + TEXTS
NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE = 1, 2, 3, 4, 6


def write(path, model, tokens, types, **entries):
    """Writes a GGUF file of a tokenizer alone; entries are the other keys."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equal(got, wanted, texts=TEXTS):
    for text in texts:
        ids = wanted.encode(text).ids
        assert got.backend.encode(text).ids == ids, text
        for skip in (True, False):
            assert got.decode(ids, skip) == wanted.decode(ids, skip), text


def byte_level(splits, normalizer=None, start=False):
    """A byte-level BPE with special tokens, an added one, and perhaps a start token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)  # with merges across what the rules split
    whole = pre_tokenizers.ByteLevel(
        add_prefix_space=False,
        use_regex=not any(isinstance(x, pre_tokenizers.Split) for x in splits),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, whole])
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    if start:
        ids = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=ids
        )
    return tokenizer


def write_byte_level(path, tokenizer, pre, **entries):
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    types = {"<s>": CONTROL, "<|end|>": CONTROL, "<think>": DEFINED}
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return write(
        *(path, "gpt2", tokens, [types.get(token, NORMAL) for token in tokens]),
        token_merges=merges,
        tokenizer_pre=pre,
        bos_token_id=vocab["<s>"],
        eos_token_id=vocab["<|end|>"],
        **entries,
    )


def split(rule):
    return pre_tokenizers.Split(Regex(rule), "isolated")


@pytest.mark.parametrize(
    "pre, splits, normalizer, start",
    [
        ("gpt-2", [], None, False),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True)], None, False),
        ("llama-bpe", [split(LLAMA3)], None, True),
        ("qwen2", [split(QWEN2)], normalizers.NFC(), False),
        ("tekken", [split(RULES["tekken"])], None, True),
        ("gpt-4o", [split(RULES["gpt-4o"])], None, False),
    ],
)
def test_byte_level(pre, splits, normalizer, start, tmp_path):
    wanted = byte_level(splits, normalizer, start)
    got = load_tokenizer(write_byte_level(tmp_path / "x.gguf", wanted, pre))
    assert_equal(got, wanted)
    assert got.vocab_size == wanted.get_vocab_size() and got.end_token == got.vocab_size - 2
    assert got.start_token == got.vocab_size - 3


def test_the_rules_are_those_of_transformers():
    from transformers.models.qwen2 import tokenization_qwen2

    assert tokenization_qwen2.PRETOKENIZE_REGEX == QWEN2


def pieces():
    """A BPE of SentencePiece with bytes for what is not in its vocabulary: tokens and scores."""
    base = tokenizers.Tokenizer(models.BPE())
    base.normalizer = normalizers.Replace(" ", "▁")
    base.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False)
    base.train_from_iterator([x for x in CORPUS if x.isascii() and "<" not in x], trainer)
    vocab = base.get_vocab()
    trained = sorted(vocab, key=vocab.get)
    trained = [x for x in trained if len(x) > 1] + [x for x in trained if len(x) == 1]
    # A token of spaces has no score of its own, and stands where it was trained.
    spaces = {"▁▁": ("  ", DEFINED), "▁▁▁▁": ("    ", DEFINED)}
    trained = [*spaces, *(token for token in trained if token not in spaces)]
    head = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<think>": DEFINED}
    tokens = [
        *head,
        *(f"<0x{i:02X}>" for i in range(256)),
        *(spaces.get(x, (x,))[0] for x in trained),
    ]
    types = [*head.values(), *[BYTE] * 256, *(spaces.get(x, (x, NORMAL))[1] for x in trained)]
    scores = [0.0] * 260 + [-1000.0 if x in spaces else -float(i) for i, x in enumerate(trained)]
    return tokens, types, scores


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces(prefix, tmp_path):
    """As `LlamaTokenizer` and `GemmaTokenizer` of transformers make them of the same pieces."""
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    tokens, types, scores = pieces()
    options = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    path = write(
        *(tmp_path / "x.gguf", "llama", tokens, types),
        token_scores=scores,
        add_space_prefix=prefix,
        **options,
    )
    spelled = [token.replace(" ", "▁") for token in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    merges = generate_merges(vocab, {token: -i for i, token in enumerate(spelled)})
    wanted = GemmaTokenizer(vocab, merges, bos_token="<s>", eos_token="</s>")._tokenizer
    wanted.add_tokens([AddedToken("<think>", normalized=False)])
    wanted.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    if prefix:
        replace = normalizers.Replace(" ", "▁")
        wanted.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        back = decoders.Replace("▁", " ")
        steps = [back, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        wanted.decoder = decoders.Sequence(steps)
    got = load_tokenizer(path)
    assert_equal(got, wanted)
    assert (got.start_token, got.end_token, got.unknown_token, got.pad_token) == (1, 2, 0, None)


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces(lower, tmp_path):
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
    words = [
        "the",
        "cat",
        "don",
        "'",
        "t",
        "##s",
        "##re",
        "##at",
        "1",
        "##0",
        ".",
        "!",
        "中",
        "cafe",
    ]
    words += [] if lower else ["The", "I", "M", "##M"]
    vocab = {token: i for i, token in enumerate([*special, *words])}
    as_written = [word[2:] if word.startswith("##") else f"▁{word}" for word in words]
    types = [CONTROL] * 5 + [NORMAL] * (1 + len(words))
    path = write(
        *(tmp_path / "x.gguf", "bert", [*special, *as_written], types),
        bos_token_id=2,
        sep_token_id=3,
        pad_token_id=0,
        unk_token_id=1,
        mask_token_id=4,
    )
    wanted = BertTokenizer(vocab, do_lower_case=lower)._tokenizer
    got = load_tokenizer(path)
    texts = [*TEXTS, "The cats, there [MASK] café 100! 中 IM", "[CLS] x [unused0]"]
    for text in texts:
        assert got.backend.encode(text).ids == wanted.encode(text).ids, text
        pair, pair_wanted = got.backend.encode(text, "cat"), wanted.encode(text, "cat")
        assert (pair.ids, pair.type_ids) == (pair_wanted.ids, pair_wanted.type_ids)
    assert got.decode([2, 6, 7, 11, 3]) == "the cats"


def test_chat_templates_and_ends(tmp_path):
    wanted = byte_level([])
    more = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "add_eos_token": True}
    got = load_tokenizer(
        write_byte_level(tmp_path / "x.gguf", wanted, "gpt-2", add_bos_token=True, **more)
    )
    message = [{"role": "user", "content": "hi"}]
    assert got.apply_chat_template(message) == "<s>hi"
    ids = got.encode("the")[0].tolist()
    assert ids[0] == got.start_token and ids[-1] == got.end_token
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    path = write_byte_level(tmp_path / "y.gguf", wanted, "gpt-2", chat_template=several)
    assert load_tokenizer(path).chat_templates == {"default": "a", "tool_use": "b"}


def test_tokenizer_json_beside_a_file_is_preferred(tmp_path):
    wanted = byte_level([])
    write_byte_level(tmp_path / "x.gguf", wanted, "gpt-2")
    assert load_tokenizer(tmp_path).vocab_size == wanted.get_vocab_size()
    wanted.add_tokens(["another"])
    wanted.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == wanted.get_vocab_size()


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"pre": "some-new"}, "tokenizer.ggml.pre must be one of .*qwen2.*, got 'some-new'"),
        ({"token_merges": ["the"]}, "a merge must be two tokens that make a third"),
        ({"token_merges": ["zz yy"]}, "a merge must be two tokens that make a third"),
        ({"bos_token_id": 10**6}, "has 256 tokens, among them the special ones .1000000. must be"),
        ({"model": "rwkv"}, "tokenizer.ggml.model must be one of gpt2, llama, bert, got 'rwkv'"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"types": [1] * 9}, "token_type must be a list of 256 finite numbers"),
        ({"model": "llama", "token_scores": [float("nan")] * 256}, "scores must be a list of 256"),
        ({"tokens": ["a"] * 256}, "the vocabulary has the token 'a' twice"),
        ({"add_bos_token": True, "chat_template": ""}, None),
    ],
)
def test_what_is_refused(changed, words, tmp_path):
    tokens = changed.pop("tokens", sorted(pre_tokenizers.ByteLevel.alphabet()))
    model, types = changed.pop("model", "gpt2"), changed.pop("types", [1] * 256)
    entries = {"tokenizer_pre": changed.pop("pre", "gpt-2"), **changed}
    path = write(tmp_path / "x.gguf", model, tokens, types, **entries)
    if words is None:
        assert load_tokenizer(path).encode("ab")[0].shape == (2,)
        return
    with pytest.raises(ValueError, match=words):
        load_tokenizer(path)


def test_types_may_be_missing(tmp_path):
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens_of, mask = load_tokenizer(tmp_path / "x.gguf").encode("é")
    assert np.array(mask).all() and len(tokens_of) == 2
