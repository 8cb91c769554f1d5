"""The text comes back from a token file, whatever the tokenizer does to the ends of a text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers import Tokenizer, load_tokenizer
from jaxformers.__main__ import main
from jaxformers.data import joined as joined_module
from jaxformers.data import open_tokens, text_files
from jaxformers.data import tokenize as tokenize_module
from jaxformers.data.joined import Joined
from jaxformers.data.text_files import Piece, read_pieces, texts_of
from jaxformers.data.tokenize import tokenize
from jaxformers.data.verbatim import verbatim

tokenizers = pytest.importorskip("tokenizers")

WORDS = "the cat sat on a mat; where was it? Naïve – 日本 they're 1234567 x=y+1 don't \t ".split(
    " "
)
ODD = (
    "naïve café 日本語 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff\u2028 ½ ﬁ \U0010ffff tab\t\n\r\n"
    " \n\n nul\x00 bell\x07 <|endoftext|> [SEP] </s> <s>x <unk> ▂  the end \r"
)


def text(count, seed):
    """Words between spaces and line ends of every kind, and none at the end."""
    rng = np.random.default_rng(seed)
    breaks = [" ", "  ", "\n", "\n\n", "\n  ", "\r\n", ".", " " * 30]
    chosen = rng.choice(breaks, count, p=[0.7, 0.05, 0.1, 0.03, 0.02, 0.04, 0.03, 0.03])
    words = rng.choice(WORDS, count)
    return "".join(w + b for w, b in zip(words, chosen, strict=True)).strip() + "."


CORPUS = [text(400, seed) for seed in range(3)] + [ODD] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*before, normalizer=None, prefix=False, ignore_merges=False, use_regex=None):
    """BPE of bytes, as GPT-2's, with another way to cut words where there is one `before`."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    split = {"invert": False, "behavior": "isolated"}
    steps = [
        pre_tokenizers.Split(tokenizers.Regex(step), **split) if isinstance(step, str) else step
        for step in before
    ]
    use_regex = not before if use_regex is None else use_regex
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex))
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def falcon():
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=False)
    return byte_level(
        pre_tokenizers.Punctuation("contiguous"), digits, "[0-9][0-9][0-9]", use_regex=True
    )


def deepseek():
    from tokenizers import pre_tokenizers

    cuts = "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"
    return byte_level(*cuts, pre_tokenizers.Digits(individual_digits=True))


def qwen():
    normalizer = tokenizers.normalizers.NFC()
    return byte_level(LLAMA3.replace("{1,3}", ""), normalizer=normalizer)


def olmo():
    """Runs of spaces are tokens that were added to the vocabulary."""
    backend = byte_level(normalizer=tokenizers.normalizers.NFC())
    runs = [tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
    backend.add_tokens([*runs, tokenizers.AddedToken("|||IP|||", normalized=False)])
    return backend


def sentencepiece(normalizer=None, scheme=None, cut=False, strip=True):
    """BPE of characters with spaces as ▁, as sentencepiece's, and bytes for the others."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=50,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    contents = json.loads(backend.to_str())
    contents["added_tokens"] = contents["added_tokens"][:3]  # bytes are ordinary
    backend = tokenizers.Tokenizer.from_str(json.dumps(contents))
    backend.pre_tokenizer = None
    if scheme is not None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=cut)
    elif cut:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if normalizer == "legacy":
        spaces = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif normalizer is not None:
        backend.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", 1)]
    )
    return backend


def gemma():
    return sentencepiece(tokenizers.normalizers.Replace(" ", "▁"), cut=True, strip=False)


def phi3():
    """Tokens that take the space after them, one of them special by the settings only."""
    contents = json.loads(sentencepiece("legacy").to_str())
    contents["added_tokens"][2] |= {"special": False, "rstrip": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(contents))
    backend.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
    return backend


def unigram(*normalizer, words=False):
    """As T5's and XLM-RoBERTa's, with an end and a start token."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(list(normalizer))
    steps = [pre_tokenizers.WhitespaceSplit()] if words else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250,
        special_tokens=["<pad>", "</s>", "<unk>", "<s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return backend


def one_space():
    return tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")


def charsmap():
    """A table of characters in sentencepiece's format: a double-array trie, and the replacements.

    The units of the trie have a label, the distance to their children, and a flag for a value.
    """
    table = {"ﬁ": "fi", "½": "1/2", "\n": " ", "\t": " ", "\r": " ", "\u200b": "", "e\u0301": "é"}
    trie: dict = {}
    texts = b""
    for key, replacement in table.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)
        texts += replacement.encode() + b"\0"
    units, used = {}, {0}

    def place(node, at, label):
        base = next(b for b in range(1, 2**12) if used.isdisjoint(b ^ byte for byte in node))
        used.update(base ^ byte for byte in node)
        units[at] = (at ^ base) << 10 | (0 in node) << 8 | label
        for byte, child in node.items():
            if byte:
                place(child, base ^ byte, byte)
            else:
                units[base] = child | 1 << 31

    place(trie, 0, 0)
    array = np.zeros((max(units) | 255) + 1, "<u4")
    array[list(units)] = list(units.values())
    return np.array(array.nbytes, "<u4").tobytes() + array.tobytes() + texts


def t5(words=False):
    """With the table of characters that T5 and XLM-RoBERTa ship, in small."""
    normalizer = tokenizers.normalizers.Precompiled(charsmap())
    assert normalizer.normalize_str("aﬁb\nc½e\u0301\u200bx\r\ny") == "afib c1/2éx y"
    return unigram(normalizer, one_space(), words=words)


def albert():
    from tokenizers import normalizers

    accents = normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()
    return unigram(*accents, normalizers.Strip(), one_space())


def bert(lowercase=True):
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


# Those that give every text back, and those that change it themselves.
FAITHFUL = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(LLAMA3, ignore_merges=True),
    "tekken": lambda: byte_level(TEKKEN, ignore_merges=True),
    "falcon": falcon,
    "bloom": lambda: byte_level(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
    "deepseek": deepseek,
    "llama2 legacy": lambda: sentencepiece("legacy"),
    "llama2": lambda: sentencepiece(scheme="first"),
    "llama2 always": lambda: sentencepiece(scheme="always"),
    "llama2 never": lambda: sentencepiece(scheme="never", strip=False),
    "mistral": lambda: sentencepiece(scheme="first", cut=True),
    "gemma": gemma,
    "phi3": phi3,
}
LOSSY = {
    "gpt2 with a space": lambda: byte_level(prefix=True),  # which is there in the text, too
    "qwen": qwen,  # composes characters
    "olmo": olmo,
    "t5": t5,  # composes, joins spaces, does not know all characters
    "t5 by rules": lambda: unigram(
        tokenizers.normalizers.Nmt(), tokenizers.normalizers.NFKC(), one_space()
    ),
    "xlmr": lambda: t5(words=True),
    "albert": albert,
    "bert": bert,
    "bert cased": lambda: bert(lowercase=False),
}
FAMILIES = FAITHFUL | LOSSY
ENDS = ("<|endoftext|>", "</s>", "[SEP]")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The name and the directory of a tokenizer."""
    backend = FAMILIES[request.param]()
    directory = tmp_path_factory.mktemp("family") / "tokenizer"
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    end = next(token for token in ENDS if backend.token_to_id(token) is not None)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return request.param, directory


def sizes(monkeypatch, piece, context, step):
    monkeypatch.setattr(text_files, "PIECE", piece)
    monkeypatch.setattr(text_files, "CONTEXT", context)
    monkeypatch.setattr(tokenize_module, "STEP", step)


# For some tokenizers a long run has no border in it, or others than from another place on.
LONG = "a" * 240 + " " * 151 + "1234567" * 30 + "\n" * 50 + "日本" * 30 + "🇩🇪" * 20 + "e\u0301" * 30


@pytest.mark.parametrize("piece, context, step", [(5, 40, 400), (37, 64, 400), (256, 128, 600)])
def test_pieces_have_the_ids_of_the_whole(family, piece, context, step, tmp_path, monkeypatch):
    name, directory = family
    if name.startswith("bert"):  # to which a word of more than 100 characters is unknown
        context = 512
    sizes(monkeypatch, piece, context, step)
    texts = {"a.txt": text(150, 9) + ODD + text(50, 5), "b.txt": LONG, "c.txt": "\nthe cat "}
    borders = []
    monkeypatch.setattr(joined_module, "_border", noted(joined_module._border, borders))
    for file, content in texts.items():
        (tmp_path / file).write_bytes(content.encode())
    tokens = tokenize([tmp_path / file for file in texts], tmp_path / "out", str(directory))
    tokens.verify()
    tokenizer, encoder = load_tokenizer(directory), verbatim(load_tokenizer(directory))
    documents = np.split(np.asarray(tokens.ids), tokens.ends[:-1])
    assert len(documents) == 3
    for ids, content in zip(documents, texts.values(), strict=True):
        assert ids[-1] == tokenizer.end_token not in ids[:-1]
        assert ids[:-1].tolist() == encoder.encode(content).ids
        if name in FAITHFUL or name in ("qwen", "olmo") and content.isascii():
            assert tokenizer.decode(ids[:-1]) == content
    if piece < 256 and not name.startswith("bert"):
        assert sum(border is not None for border in borders) > len(borders) / 2 > 5


def noted(function, results):
    def call(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return call


def test_the_ids_are_the_tokenizers_own(family):
    """What is encoded in pieces is compared with the tokenizer that is saved, too."""
    name, directory = family
    ours = load_tokenizer(directory)
    encoder = verbatim(ours)
    ours.backend.encode_special_tokens = True
    for content in (text(300, 3), LONG, " the", "the ", "\u0301e", "", "\x00", "\ufeffthe"):
        want = ours.backend.encode(content, add_special_tokens=False).ids
        assert encoder.encode(content, add_special_tokens=False).ids == want
    if name in FAITHFUL:
        content = f"{ODD} {ODD}x<|end|> y</s>  z"
        ids = encoder.encode(content).ids
        assert ours.decode(ids) == content  # nothing is left out as special
    documents = [text(4, 1), "the", "", ODD]
    lines = [Piece(content, k, True) for k, content in enumerate(documents)]
    parts = Joined(encoder).add(lines)
    assert all(part.ends for part in parts)
    assert [part.ids for part in parts] == [encoder.encode(content).ids for content in documents]


@settings(max_examples=25, deadline=None)
@given(
    string=st.text("ab \n\té日\r\u0301▂<s>/1\x00🇩", max_size=90),
    piece=st.integers(1, 30),
    context=st.sampled_from([0, 30, 60]),
    data=st.data(),
)
@pytest.mark.parametrize("name", ["gpt2", "qwen", "llama2", "llama2 legacy", "gemma", "t5", "bert"])
def test_any_text_in_any_pieces_and_stopped_anywhere(
    name, string, piece, context, data, tmp_path_factory, encoders
):
    encoder = encoders(name)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(string.encode() or b"\xef\xbb\xbf")
    with pytest.MonkeyPatch.context() as patch:
        sizes(patch, piece, context, 1)
        joined, ids = Joined(encoder), []
        pieces = list(read_pieces(path))
        while pieces:
            count = data.draw(st.integers(1, len(pieces)))
            parts = joined.add(pieces[:count])
            ids += [i for part in parts for i in part.ids]
            pieces = pieces[count:]
            if pieces and data.draw(st.booleans()):  # killed, and begun again with what is saved
                joined = Joined(encoder, joined.start, joined.offset)
                pieces = list(read_pieces(path, joined.start))
        assert parts[-1].ends
    assert ids == encoder.encode(string).ids


@pytest.fixture(scope="module")
def encoders():
    made = {}

    def get(name):
        if name not in made:
            made[name] = verbatim(Tokenizer({"tokenizer.json": FAMILIES[name]().to_str().encode()}))
        return made[name]

    return get


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 5, 6, 7, 9])
def test_characters_of_several_bytes_at_a_border(piece, tmp_path, monkeypatch):
    content = "é日👩‍👩‍👧‍👦🇩🇪e\u0301\r\n" * 3
    sizes(monkeypatch, piece, 20, 60)
    (tmp_path / "a.txt").write_bytes(content.encode())
    pieces = list(read_pieces(tmp_path / "a.txt"))
    assert "".join(piece.text for piece in pieces) == content
    assert len(pieces) >= len(content.encode()) / max(piece + 4, 8)
    for k, this in enumerate(pieces):
        first = "".join(piece.text for piece in pieces[:k])
        last = "".join(piece.text for piece in pieces[k + 1 :])
        assert first.endswith(this.before) and last.startswith(this.after)
        for around, there in ((this.before, first), (this.after, last)):
            assert 17 <= len(around.encode()) <= 20 or around == there
    for kind in ("bytes", "characters"):
        tokens = tokenize([tmp_path / "a.txt"], tmp_path / kind, kind)
        assert load_tokenizer(tmp_path / kind / "tokenizer").decode(tokens.ids[:-1]) == content


def test_a_space_is_put_before_a_document_and_not_before_a_piece(tmp_path, monkeypatch):
    """By hand: the first word has ▁ and the others have the spaces that are there."""
    words = {"▁ab": 0, "▁": 1, "ab": 2, "\n": 3, "<unk>": 4}
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=4)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_bytes(b"ab\n" * 40)
    sizes(monkeypatch, 9, 90, 30)
    tokens = tokenize([tmp_path / "a.txt"], tmp_path / "out", str(tmp_path), add_end=False)
    assert tokens.ids.tolist() == [0, 3] + [2, 3] * 39


# Special tokens in a text.


def test_unigram_does_not_find_special_tokens_unless_it_needs_them():
    """They are pieces as others are, which the package finds in a text by itself."""

    def encoded(letters, string, unknown=0):
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in letters)]
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=unknown))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Metaspace()
        backend.add_special_tokens(["</s>", "<unk>", "<extra>"])
        backend.encode_special_tokens = True
        assert backend.encode(string).ids.count(1) == string.count("</s>")
        ids = verbatim(Tokenizer({"tokenizer.json": backend.to_str().encode()})).encode(string).ids
        assert backend.decode(ids, skip_special_tokens=False) == string
        return ids

    string = "a</s>a"
    assert encoded("▁a</s>", string) == [2, 3, 4, 5, 6, 7, 3]
    assert encoded("▁a/s>", string) == [2, 3, 1, 3]  # "<" it cannot write
    assert encoded("▁a</s>", string, unknown=None) == [2, 3, 4, 5, 6, 7, 3]
    assert 1 not in encoded("▁a</s>unk", "</s><unk>")


def test_added_tokens_keep_the_spaces_around_them():
    backend = byte_level()
    backend.add_tokens([tokenizers.AddedToken("<T>", lstrip=True, rstrip=True)])
    ours = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    string = "the <T>  cat<T>sat"
    assert backend.decode(backend.encode(string).ids) == "the<T>cat<T>sat"
    ids = verbatim(ours).encode(string).ids
    assert ours.decode(ids) == string
    assert ids.count(backend.token_to_id("<T>")) == 2  # it is no special one


# Byte-order marks.

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("piece", [1, 4, 5, 300])
@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_byte_order_marks_are_no_text(piece, kind, tmp_path, monkeypatch):
    """At the beginning only: elsewhere the same character is text."""
    sizes(monkeypatch, piece, 7, 30)
    with_mark, without = tmp_path / "with.txt", tmp_path / "without.txt"
    content = "ab \ufeffé\r\n" * 4
    with_mark.write_bytes(MARK + content.encode())
    without.write_bytes(content.encode())
    a, b = (
        tokenize([path], tmp_path / path.stem, kind, add_end=False) for path in (with_mark, without)
    )
    assert a.ids.tolist() == b.ids.tolist() and a.vocab_size == b.vocab_size
    assert load_tokenizer(tmp_path / "with" / "tokenizer").decode(a.ids) == content
    assert "".join(texts_of([with_mark], "text")) == content
    pieces = list(read_pieces(with_mark))
    assert pieces[-1].stop == with_mark.stat().st_size
    for k, this in enumerate(pieces[:-1]):
        assert list(read_pieces(with_mark, this.stop)) == pieces[k + 1 :]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_byte_order_marks_in_json_lines(name, tmp_path):
    """Also where files were put one after the other; in a text one stays."""
    lines = [{"text": "ab"}, {"text": "\ufeffc"}, {"text": "d"}]
    content = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    (tmp_path / name).write_bytes(
        MARK + content[0] + b"\r\n" + MARK + content[1] + b"\n" + MARK + b"\n" + content[2]
    )
    tokens = tokenize([tmp_path / name], tmp_path / "out", "bytes")
    assert tokens.ids.tolist() == [97, 98, 256, *MARK, 99, 256, 100, 256]


def test_a_byte_order_mark_alone_is_an_empty_document(tmp_path, capsys):
    for name, content in (("a.txt", MARK), ("b.txt", b"b"), ("c.jsonl", MARK)):
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]
    assert main(["tokenize", *inputs, "--out", str(out), "--tokenizer", "bytes"]) == 0
    assert "1 documents without a token were left out" in capsys.readouterr().err
    assert open_tokens(out).ids.tolist() == [98, 256]
    with pytest.raises(ValueError, match="hold no text that makes a token"):
        tokenize([tmp_path / "a.txt"], tmp_path / "none", "bytes")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_places_of_errors_count_the_byte_order_mark(name, tmp_path):
    content = b'{"text": "a"}\n{"text": "\xff"}'
    (tmp_path / name).write_bytes(MARK + content)
    message = f"line 2 of {tmp_path / name}, byte 27 of the file, is no UTF-8"
    with pytest.raises(ValueError, match=message):
        tokenize([tmp_path / name], tmp_path / "out", "bytes")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named(name, encoding, tmp_path, capsys):
    mark = "" if encoding == "utf-16" else "\ufeff"  # that codec writes one by itself
    (tmp_path / name).write_bytes((mark + '{"text": "ab"}').encode(encoding))
    (tmp_path / "good.txt").write_text("good")
    expected = f"{tmp_path / name} is no UTF-8: it begins with the byte-order mark of "
    expected += f"{encoding[:6].upper()}. Convert it, for instance with iconv -f"
    inputs = [str(tmp_path / "good.txt"), str(tmp_path / name)]
    for command in (
        ["tokenize", "--tokenizer", "bytes"],
        ["train-tokenizer", "--vocab-size", "300"],
    ):
        assert main([command[0], *inputs, "--out", str(tmp_path / "out"), *command[1:]]) == 1
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out").exists()  # it is said before anything is written
    with pytest.raises(ValueError, match="byte-order mark of UTF"):
        list(read_pieces(tmp_path / name))
