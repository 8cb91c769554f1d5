"""Grapheme to phoneme: the arithmetic of the error rates, the files, a language of few rules."""

import importlib.util
import itertools
import re
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "g2p.py"
spec = importlib.util.spec_from_file_location("g2p", SCRIPT)
g2p = importlib.util.module_from_spec(spec)
spec.loader.exec_module(g2p)

pytest.importorskip("tqdm")
pytest.importorskip("safetensors")

SIZES = "--steps 160 --batch-size 64 --d-model 32 --num-layers 1 --dropout 0".split()
TAGS = g2p.FORWARDS, g2p.BACKWARDS


def pronounce(word):
    """A vowel is long before "n", which is silent; "c" is two phones."""
    text = word.replace("c", "ts")
    long = [x + "ː" if text[i + 1 : i + 2] == "n" else x for i, x in enumerate(text)]
    return [x for x in long if x != "n"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    # Of one length, so that one step is compiled.
    words = ["".join(x) for x in itertools.product("bct", "aiu", "nk", "bct", "aiu", "nk")]
    words = np.random.default_rng(5).permutation(words).tolist()
    parts = {"train": words[:264], "dev": words[264:294], "test": [*words[294:323], "baqbik"]}
    for name, part in parts.items():
        lines = [f"{word}\t{' '.join(pronounce(word))}\n" for word in part]
        (directory / f"toy_{name}.tsv").write_text("".join(lines), "utf-8")
    return directory


def louder(x):
    return 4 * x


def run(data, *args):
    g2p.main(["--data", str(data), "--language", "toy", *SIZES, *map(str, args)])


def rates(text, name):
    return tuple(map(float, re.search(rf"{name}: WER ([\d.]+) %, PER ([\d.]+) %", text).groups()))


def test_a_language_is_learned_and_a_finished_run_is_not_run_again(data, tmp_path, capsys):
    saved = "--checkpoint", tmp_path / "saved"
    run(data, *saved)
    first = capsys.readouterr().out
    assert rates(first, "dev")[0] < 20 and "test:" not in first
    run(data, *saved, "--test", "--predictions", tmp_path / "predictions")
    again = capsys.readouterr().out
    assert rates(again, "dev") == rates(first, "dev")
    lines = (tmp_path / "predictions" / "toy_test.tsv").read_text("utf-8").splitlines()
    given = (data / "toy_test.tsv").read_text("utf-8").splitlines()
    wrong = sum(a != b for a, b in zip(lines, given, strict=True))
    assert rates(again, "test")[0] == pytest.approx(100 * wrong / len(given), abs=0.01)
    assert lines[-1].startswith("baqbik\t")  # "q" was never seen


def test_error_rates_by_hand():
    references = [
        [("a", "b", "c")],  # one phone missing
        [("a", "b")],  # right
        [("x", "y"), ("a", "b", "c", "d")],  # the second one, but for one more phone
        [("a",), ("aː", "b")],  # the second of two
    ]
    predictions = [("a", "c"), ("a", "b"), ("a", "b", "c", "d", "e"), ("aː", "b")]
    # Two words of four; distances 1 + 0 + 1 + 0 over lengths 3 + 2 + 4 + 2.
    assert g2p.error_rates(predictions, references) == pytest.approx((50.0, 100 * 2 / 11))
    assert g2p.error_rates([()], [[("a", "b")]]) == (100.0, 100.0)


def test_edit_distances():
    assert g2p.edit_distance("kitten", "sitting") == g2p.edit_distance("sitting", "kitten") == 3
    assert g2p.edit_distance("", "abc") == g2p.edit_distance("abc", "") == 3
    assert g2p.edit_distance(("ab", "c"), ("a", "b", "c")) == 2  # phones, not characters


def test_words_with_several_pronunciations(tmp_path):
    path = tmp_path / "x.tsv"
    # e and an accent, with a carriage return; then the letter that is both.
    path.write_bytes("e\u0301\tɛ\r\nu\ty\n\u00e9\te ː\n".encode())
    words = g2p.read_words(path)
    assert words == {"\u00e9": [("ɛ",), ("e", "ː")], "u": [("y",)]}
    spelling = g2p.Spelling(words)
    sources, targets = zip(*spelling.pairs(words), strict=True)
    assert len(targets) == 2 * 3 and targets[2] == targets[3][::-1] and len(targets[2]) == 2
    assert sources[2][0] != sources[3][0] and sources[2][1:] == sources[3][1:]
    assert spelling.read("uz", g2p.FORWARDS)[2] == g2p.UNKNOWN


def test_letters_and_marks_are_apart_where_that_halves_them():
    spelling = g2p.Spelling({word: [("a",)] for word in ("áàâãa", "íìîĩi", "úùûũu", "é")})
    assert spelling.letters == [*"aeiu", "\u0300", "\u0301", "\u0302", "\u0303"]
    e, tilde = (spelling.letter_ids[x] for x in ("e", "\u0303"))
    assert spelling.read("ẽ", g2p.BACKWARDS) == [g2p.BACKWARDS, e, tilde]  # a new pair
    spelling = g2p.Spelling({"éóa": [("a",)]})
    assert spelling.letters == ["a", "é", "ó"]
    assert spelling.read("e", g2p.FORWARDS) == [g2p.FORWARDS, g2p.UNKNOWN]


def test_both_directions_choose(data):
    """The best is the best by both, whichever proposed it."""
    words = list(g2p.read_words(data / "toy_dev.tsv"))
    seen = g2p.read_words(data / "toy_train.tsv")
    spelling = g2p.Spelling({word: [tuple(word.replace("c", "ts"))] for word in seen})
    args = g2p.parse(["--data", "", "--language", "", *SIZES, "--seed", "3"])
    model = g2p.build_model(spelling, args)
    # Louder than drawn, so that the two directions have opinions of their own.
    model = eqx.tree_at(lambda m: m.output, model, replace_fn=lambda o: jax.tree.map(louder, o))
    predictions = g2p.predict(model, spelling, words)
    forwards, backwards = (g2p.propose(model, spelling, words, tag) for tag in TAGS)
    winners = set()
    for word, left, right, predicted in zip(words, forwards, backwards, predictions, strict=True):
        proposals = [*left, *(ids[::-1] for ids in right)]
        totals = 0.0
        for tag, order in zip(TAGS, (1, -1), strict=True):
            rows = [[g2p.START, *ids[::order], g2p.END] for ids in proposals]
            totals += model.score([spelling.read(word, tag)] * len(rows), rows).sum(axis=1)
        best = int(np.argmax(totals))
        assert predicted == tuple(spelling.phones[i - g2p.SPECIAL] for i in proposals[best])
        winners.add(best)
    assert len(winners) > 3 and max(winners) >= g2p.BEAMS  # from either direction


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("ab\ta b\n\nc\tc\n", "line 2.*''"),
        ("ab\ta b\nab a b\n", "line 2.*'ab a b'"),
        ("ab\ta b\tc\n", "line 1"),
        ("ab\t \n", "line 1"),
        ("\ta\n", "line 1"),
        (b"ab\t\xff\n", "not UTF-8"),
        (None, "cannot read .*No such file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, text, words):
    path = tmp_path / "toy_train.tsv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=words) as caught:
        run(tmp_path)
    assert str(path) in str(caught.value)


def test_without_dev_words_it_says_so(data, tmp_path, capsys):
    (tmp_path / "toy_train.tsv").write_bytes((data / "toy_train.tsv").read_bytes())
    with pytest.raises(SystemExit, match="steps must be"):  # where the training begins
        run(tmp_path, "--steps", 0)
    assert "toy_dev.tsv" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot read.*toy_test.tsv"):
        run(tmp_path, "--test")
