"""Token files: written by a command that can be killed at any moment, and read with care."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers import load_tokenizer
from jaxformers.__main__ import main
from jaxformers.data import PackedDocuments, Windows, open_tokens
from jaxformers.data import text_files as text_files_module
from jaxformers.data.text_files import read_pieces
from jaxformers.data.tokenize import tokenize
from jaxformers.data.tokens import token_dtype

pytest.importorskip("tokenizers")

ROOT = Path(__file__).parent.parent
ODD = (
    "naïve café 日本語 한국어 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff\u2028 ½ Ⅳ ﬁ \U0010ffff tab\t\n\r\n"
    " \n\n nul\x00 bell\x07 <|endoftext|> [SEP]   end  "
)
WORDS = "the cat sat on a mat; where was it? Naïve – 日本 \n".split(" ")


def text(count, seed=0):
    """Words in lines, some of them blank, some indented."""
    rng = np.random.default_rng(seed)
    breaks = rng.choice([" ", "  ", "\n", "\n\n", "\n  "], count, p=[0.8, 0.05, 0.1, 0.03, 0.02])
    return "".join(WORDS[k] + b for k, b in zip(rng.integers(0, len(WORDS), count), breaks))  # noqa: B905


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The directory of a tokenizer that the command line trained."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text(text(3000) + ODD)
    (directory / "more.jsonl").write_text(json.dumps({"body": "zebra " * 50, "id": 3}) + "\n\n")
    command = ["train-tokenizer", f"{directory}/text.txt", f"{directory}/more.jsonl"]
    options = ["--field", "body", "--vocab-size", "320", "--pad-token", "<pad>"]
    out = directory / "tokenizer"
    assert main([*command, "--out", str(out), *options, "--special-tokens", "<a>", "<b>"]) == 0
    return out


def run(*arguments):
    """The exit status of a command; the directories and files may be paths."""
    return main([str(argument) for argument in arguments])


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*.*"))}


# Training a tokenizer.


def test_transformers_reads_the_tokenizer_and_gives_the_same_ids(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tokenizer), load_tokenizer(tokenizer)
    for string in (ODD, text(50, seed=2), "zebra", "", " ", "<a><b><pad>"):
        ids = np.asarray(ours.encode(string)[0]).tolist()
        assert ids == theirs(string)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == string == theirs.decode(ids)
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<pad>")
    assert (ours.end_token, ours.pad_token) == (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    assert ours.vocab_size == len(theirs) == 320
    assert len(ours.encode("zebra zebra")[0]) < 5  # of the JSON line


def test_training_twice_is_the_same(tokenizer, tmp_path):
    source = tokenizer.parent
    options = ("--field", "body", "--vocab-size", 320, "--pad-token", "<pad>")
    out = tmp_path / "again"
    inputs = source / "text.txt", source / "more.jsonl"
    assert run("train-tokenizer", *inputs, "--out", out, *options,
               "--special-tokens", "<a>", "<b>") == 0  # fmt: skip
    assert files(out) == files(tokenizer)


def test_training_refuses(tmp_path, tokenizer, capsys):
    good = tokenizer.parent / "text.txt"
    for options, message in [
        (("--vocab-size", 200), "vocab_size must be at least 257, for 256 bytes and 1 special"),
        (("--vocab-size", 300, "--min-frequency", 0), "min_frequency must be an integer of at"),
    ]:
        assert run("train-tokenizer", good, "--out", tmp_path / "t", *options) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert run("train-tokenizer", good, "--out", tokenizer, "--vocab-size", 300) == 1
    assert "is not empty" in capsys.readouterr().err
    small = tmp_path / "small.txt"
    small.write_text("ab ab")
    assert run("train-tokenizer", small, "--out", tmp_path / "s", "--vocab-size", 999) == 0
    assert "note: not 999" in capsys.readouterr().err


# Making token files.


@pytest.mark.parametrize("name", ["bytes", "characters", "trained"])
def test_the_text_comes_back(name, tokenizer, tmp_path, monkeypatch):
    """Cut into pieces and encoded many at a time, ids are those of the whole text."""
    monkeypatch.setattr(text_files_module, "PIECE", 300)
    whole = text(2000, seed=1) + ODD
    (tmp_path / "text.txt").write_bytes(whole.encode())
    (tmp_path / "b.txt").write_bytes(b"the mat")
    assert len(list(read_pieces(tmp_path / "text.txt"))) > 20
    out = tmp_path / "out"
    kind = tokenizer if name == "trained" else name
    assert run("tokenize", tmp_path / "text.txt", tmp_path / "b.txt", "--out", out,
               "--tokenizer", kind) == 0  # fmt: skip
    tokens, saved = open_tokens(out), load_tokenizer(out / "tokenizer")
    tokens.verify()
    first, second = np.split(np.asarray(tokens.ids), tokens.ends[:1])
    assert first[-1] == second[-1] == saved.end_token
    assert tokens.vocab_size == saved.vocab_size
    assert (first[:-1] != saved.end_token).all()  # what looks like one in a text is text
    assert saved.decode(first[:-1], skip_special_tokens=False) == whole
    saved.backend.encode_special_tokens = True
    assert first[:-1].tolist() == saved.backend.encode(whole, add_special_tokens=False).ids
    if name == "bytes":
        assert first[:-1].tolist() == list(whole.encode())
    if name == "characters":
        assert tokens.vocab_size == len(set(whole)) + 1


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n\té日\r", min_size=1, max_size=120), st.integers(4, 20))
def test_pieces_are_the_text_from_any_of_them_on(tmp_path_factory, string, size):
    path = tmp_path_factory.mktemp("pieces") / "text"
    path.write_bytes(string.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files_module, "PIECE", size)
        pieces = list(read_pieces(path))
        assert "".join(piece.text for piece in pieces) == string
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        for k, piece in enumerate(pieces[:-1]):
            assert list(read_pieces(path, piece.stop)) == pieces[k + 1 :]


def test_json_lines(tmp_path, capsys):
    lines = [{"text": "ab"}, {"text": ""}, {"text": "c", "other": [1]}, {"text": "日"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "out"
    assert run("tokenize", tmp_path / "a.jsonl", "--out", out, "--tokenizer", "bytes") == 0
    said = capsys.readouterr()
    assert "10 in 3 documents" not in said.out and "8 in 3 documents" not in said.out
    assert "9 in 3 documents, vocab_size=257" in said.out
    assert "1 documents without a token were left out" in said.err
    tokens = open_tokens(out)
    assert tokens.ids.tolist() == [97, 98, 256, 99, 256, 0xE6, 0x97, 0xA5, 256]
    assert tokens.ends.tolist() == [3, 5, 9] and tokens.ids.dtype == np.uint16
    (batch,) = PackedDocuments(out, 4, 5).in_order()
    assert batch["segment_ids"].max() == 2
    again = tmp_path / "none"
    assert run("tokenize", tmp_path / "a.jsonl", "--out", again, "--tokenizer", "bytes",
               "--no-end-token") == 0  # fmt: skip
    assert open_tokens(again).ids.tolist() == [97, 98, 99, 0xE6, 0x97, 0xA5]


# Small steps, slow enough to be hit in the middle.
SLOW = """
import os, sys, time
from jaxformers.data import tokenize, text_files
tokenize.STEP, text_files.PIECE = 1500, 256
real = os.fsync
os.fsync = lambda number: (time.sleep(0.002), real(number))
from jaxformers.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_at_any_moment_it_goes_on(tokenizer, tmp_path, monkeypatch):
    """Processes that are killed one after the other make the same files as one that is not."""
    monkeypatch.setattr(text_files_module, "PIECE", 256)  # where a text is cut depends on it
    rng = np.random.default_rng(5)
    (tmp_path / "a.txt").write_text(text(9000))
    lines = [json.dumps({"text": text(n, seed=n)}) for n in rng.integers(0, 40, 400)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    inputs = tmp_path / "a.txt", tmp_path / "b.jsonl"
    command = ["tokenize", *map(str, inputs), "--tokenizer", str(tokenizer), "--out"]
    assert run(*command, tmp_path / "whole") == 0
    total, out = len(open_tokens(tmp_path / "whole")), tmp_path / "killed"

    def done():
        progress = out / "progress.json"
        return json.loads(progress.read_text())["tokens"] if progress.exists() else 0

    killed = []
    for share in (0.1, 0.5, 0.8):
        arguments = [sys.executable, "-c", SLOW, *command, str(out)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and done() < share * total:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed.append(done())
        with pytest.raises(ValueError, match="a token file that is not finished. Run the same"):
            open_tokens(out)
    assert 0 < killed[0] < killed[1] < killed[2] < total
    assert run(*command, out) == 0
    assert files(out) == files(tmp_path / "whole")
    open_tokens(out).verify()


# In the middle it waits until it is told to go on.
HELD = """
import os, sys
from jaxformers.data import tokenize, text_files
tokenize.STEP, text_files.PIECE = 1500, 256
real, calls = os.fsync, []
def fsync(number):
    calls.append(number)
    if len(calls) == 20:
        print("held", flush=True)
        input()
    real(number)
os.fsync = fsync
from jaxformers.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_one_process_writes_to_a_directory(tokenizer, tmp_path, monkeypatch, capsys):
    """Another one is refused by name and changes nothing; the lock goes with the process."""
    monkeypatch.setattr(text_files_module, "PIECE", 256)
    (tmp_path / "a.txt").write_text(text(4000))
    command = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer), "--out"]
    assert run(*command, tmp_path / "whole") == 0
    out, pipes = tmp_path / "out", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    def refused(process):
        assert process.stdout.readline() == "held\n"
        before = files(out)
        for _ in range(2):
            assert run(*command, out) == 1
            error = f"{out} is in use by another tokenize (process {process.pid}). Wait until it"
            assert error in capsys.readouterr().err
        assert files(out) == before
        with pytest.raises(ValueError, match="a token file that is not finished"):
            open_tokens(out)

    arguments = [sys.executable, "-c", HELD, *command, str(out)]
    with subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) as first:
        refused(first)
        first.kill()
    assert (out / "lock").read_text() == str(first.pid)  # stale, and no obstacle
    (out / "tokenizer.1.unfinished").mkdir()  # as a process leaves that was killed at its start
    with subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) as second:
        refused(second)
        second.communicate("\n")
    assert second.returncode == 0
    assert files(out) == files(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == [
        "ends.npy", "lock", "tokenizer", "tokens.json", "tokens.npy",
    ]  # fmt: skip
    assert (out / "lock").read_bytes() == b""
    assert run(*command, out) == 0  # is done already


def test_many_that_begin_at_once_make_one_file(tokenizer, tmp_path, monkeypatch):
    """As threads of one process and as processes: one writes, the others are refused."""
    (tmp_path / "a.txt").write_text(text(3000))
    monkeypatch.setattr(text_files_module, "PIECE", 256)
    inputs, kind = [tmp_path / "a.txt"], str(tokenizer)
    whole = files(Path(tokenize(inputs, tmp_path / "whole", kind).name))

    def outcome(k):
        try:
            tokenize(inputs, tmp_path / f"threads{k // 8}", kind)
        except OSError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(outcome, range(32)))
    assert all(text == "done" or "is in use by another tokenize" in text for text in said)
    for k in range(4):
        assert "done" in said[8 * k : 8 * k + 8]
        assert files(tmp_path / f"threads{k}") == whole

    options = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    arguments = [sys.executable, "-c", SLOW, "tokenize", *map(str, inputs), "--tokenizer", kind]
    out = tmp_path / "processes"
    processes = [subprocess.Popen([*arguments, "--out", str(out)], **options) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0 or f"{out} is in use by another tokenize" in error
    assert any(process.returncode == 0 for process in processes)
    assert files(out) == whole


def test_directories_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("ab")
    command = ("tokenize", tmp_path / "a.txt", "--tokenizer", "bytes", "--out")
    assert run(*command, tmp_path / "done") == 0

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert run(*command, tmp_path / "out") == 1
    assert f"tokens cannot be written to {tmp_path / 'out'}: Read-only" in capsys.readouterr().err
    assert run(*command, tmp_path / "done") == 0  # which writes nothing


def test_two_tokenizers_are_not_mixed(tmp_path, monkeypatch):
    """Of two that are saved to one directory at once, one is there and the other an error."""
    from jaxformers.tokenizers.training import save_new, train_bpe

    made = [train_bpe([word * 9], 270 + k) for k, word in enumerate(("abcd", "efgh"))]
    wait, save = Barrier(2), type(made[0]).save

    def slow(self, directory):
        wait.wait(9)
        save(self, directory)
        wait.wait(9)

    monkeypatch.setattr(type(made[0]), "save", slow)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(save_new, tokenizer, tmp_path / "out") for tokenizer in made]
    (failed,) = (job.exception() for job in jobs if job.exception())
    assert isinstance(failed, ValueError) and "is not empty" in str(failed)
    there = load_tokenizer(tmp_path / "out").backend.to_str()
    assert there in [tokenizer.backend.to_str() for tokenizer in made]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stopped_after_each_step_it_goes_on(tmp_path, monkeypatch):
    """Every place where the command writes something, in one process."""
    from jaxformers.data import tokenize

    monkeypatch.setattr(tokenize, "STEP", 60)
    monkeypatch.setattr(text_files_module, "PIECE", 50)
    (tmp_path / "a.txt").write_text(text(25))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    command = ("tokenize", tmp_path / "a.txt", tmp_path / "b.jsonl", "--tokenizer", "characters")
    assert run(*command, "--out", tmp_path / "whole") == 0
    # What reaches the disk is written by these: each call is a moment to stop, before and after.
    real, left = {name: getattr(os, name) for name in ("replace", "fsync")}, [0]

    def stopping(name):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            result = real[name](*arguments)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return result

        return call

    stops = 0
    for moment in range(1, 200):
        out = tmp_path / f"out{moment}"
        for name in real:
            monkeypatch.setattr(os, name, stopping(name))
        left[0] = moment
        stops += run(*command, "--out", out) == 130
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        assert run(*command, "--out", out) == 0
        assert files(out) == files(tmp_path / "whole"), moment
        shutil.rmtree(out)
        if left[0] > 0:
            break
    assert 20 < stops == moment - 1


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, capsys):
    from jaxformers.data import tokenize

    monkeypatch.setattr(tokenize, "STEP", 60)
    monkeypatch.setattr(text_files_module, "PIECE", 50)
    (tmp_path / "a.txt").write_text(text(60))
    command = ("tokenize", tmp_path / "a.txt", "--tokenizer", "bytes")
    assert run(*command, "--out", tmp_path / "whole") == 0
    calls, real = [], os.fsync

    def full(number):
        calls.append(number)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    assert run(*command, "--out", tmp_path / "out") == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(os, "fsync", real)
    assert json.loads((tmp_path / "out/progress.json").read_text())["tokens"] > 0
    assert run(*command, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", None, "a.txt is missing or no regular file"),
        ("a.txt", b"ab\ncd\n\xff\xfe", "line 3 of {path}, byte 6 of the file, is no UTF-8"),
        ("a.txt", b"ab\nc\xc3", "line 2 of {path}, byte 4 of the file, is no UTF-8"),
        ("a.txt", b"ab\n" * 200 + b"\x80", "line 201 of {path}, byte 600 of the file, is no UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of {path} is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["text"]', "line 3 of {path} must be a JSON object"),
        ("a.jsonl", b'{"body": "a"}', "line 1 of {path} must have a text in its field 'text', got"),
        ("a.jsonl", b'{"text": 5}', "line 1 of {path} must have a text in its field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 of {path}, byte 10 of the file, is no UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 of {path} is no Unicode text"),
        ("a.jsonl", b"[" * 100_000, "line 1 of {path} is no JSON"),
        ("a.jsonl", b'{"text": ""}', "hold no text that makes a token"),
        ("a.ndjson", b"\n\n", "hold no text that makes a token"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(name, content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text_files_module, "PIECE", 100)
    path, good, out = tmp_path / name, tmp_path / "good.jsonl", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    inputs = [path]
    if "hold no text" not in message:
        good.write_text('{"text": "good"}')
        inputs = [good, path]
    assert run("tokenize", *inputs, "--out", out, "--tokenizer", "bytes") == 1
    assert message.format(path=path) in capsys.readouterr().err
    assert not (out / "tokens.json").exists()
    with pytest.raises(ValueError, match="not finished|is no token file|is missing"):
        open_tokens(out)


def test_a_directory_is_of_one_job(tmp_path, tokenizer, capsys):
    a, b, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "out"
    a.write_text("abc")
    b.write_text("abcd")
    command = ("--out", out, "--tokenizer")
    assert run("tokenize", a, *command, "bytes") == 0
    before = files(out)
    assert run("tokenize", a, *command, "bytes") == 0  # is done already
    capsys.readouterr()
    for again, message in [
        ((b, *command, "bytes"), "of other inputs or settings"),
        ((a, *command, "bytes", "--no-end-token"), "of other inputs or settings"),
        ((a, *command, "characters"), "of other inputs or settings"),
        ((a, *command, tokenizer), "was begun with another tokenizer"),
        ((a, *command, tmp_path / "none"), "none"),
    ]:
        assert run("tokenize", *again) == 1
        assert message in capsys.readouterr().err
        assert files(out) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "tokens.npy").write_bytes(b"something else")
    assert run("tokenize", a, "--out", mine, "--tokenizer", "bytes") == 1
    assert "is not empty, it holds tokens.npy" in capsys.readouterr().err
    assert files(mine) == {Path("tokens.npy"): b"something else"}
    assert [path.name for path in mine.iterdir()] == ["tokens.npy"]
    (out / "tokens.json").unlink()
    shutil.move(out / "tokens.npy", out / "x")
    (out / "progress.json").write_text(json.dumps({"job": {}}))
    assert run("tokenize", a, *command, "bytes") == 1
    assert "was begun with other inputs or options" in capsys.readouterr().err


def test_end_tokens(tmp_path, tokenizer, capsys):
    path = tmp_path / "a.txt"
    path.write_text("the cat")
    command = ("tokenize", path, "--tokenizer", tokenizer, "--out")
    assert run(*command, tmp_path / "a", "--end-token", "<a>") == 0
    assert open_tokens(tmp_path / "a").ids[-1] == load_tokenizer(tokenizer).backend.token_to_id(
        "<a>"
    )
    assert run(*command, tmp_path / "b", "--end-token", "<none>") == 1
    assert "has no token '<none>'" in capsys.readouterr().err
    without = tmp_path / "without"
    shutil.copytree(tokenizer, without)
    config = json.loads((without / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (without / "tokenizer_config.json").write_text(json.dumps(config))
    assert run("tokenize", path, "--tokenizer", without, "--out", tmp_path / "c") == 1
    assert "the tokenizer has no end token" in capsys.readouterr().err


def test_characters_that_were_not_there(tmp_path, capsys):
    for name, content in (("a.txt", "abc"), ("b.txt", "abd")):
        (tmp_path / name).write_text(content)
    assert run("tokenize", tmp_path / "a.txt", "--tokenizer", "characters", "--out",
               tmp_path / "a") == 0  # fmt: skip
    assert run("tokenize", tmp_path / "b.txt", "--tokenizer", tmp_path / "a/tokenizer", "--out",
               tmp_path / "b") == 1  # fmt: skip
    assert f"cannot encode a text of {tmp_path / 'b.txt'}" in capsys.readouterr().err


# Reading token files.


@pytest.fixture
def directory(tmp_path):
    """A token file of three documents."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"ab" * n}"}}\n' for n in (9, 3, 20)))
    assert (
        run("tokenize", tmp_path / "a.jsonl", "--out", tmp_path / "t", "--tokenizer", "bytes") == 0
    )
    return tmp_path / "t"


def shorten(path, count=1):
    path.write_bytes(path.read_bytes()[:-count])


def rewrite(**changes):
    def change(directory):
        said = json.loads((directory / "tokens.json").read_text())
        (directory / "tokens.json").write_text(json.dumps(said | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokens.json").unlink(), "is no token file: there is no tokens.json"),
        (lambda d: (d / "tokens.npy").unlink(), "tokens.npy is missing"),
        (lambda d: (d / "ends.npy").unlink(), "ends.npy is missing"),
        (lambda d: shorten(d / "tokens.npy"), "is truncated: .67,. of uint16 need 262"),
        (lambda d: shorten(d / "ends.npy", 9), "ends.npy is truncated"),
        (lambda d: shorten(d / "tokens.npy", 200), "tokens.npy is no .npy file"),
        (lambda d: (d / "tokens.npy").write_bytes(b""), "tokens.npy is no .npy file"),
        (lambda d: (d / "tokens.npy").write_bytes(b"\0" * 400), "tokens.npy is no .npy file"),
        (lambda d: np.save(d / "tokens.npy", np.zeros(67)), "of uint16, as tokens.json"),
        (lambda d: np.save(d / "tokens.npy", np.zeros(66, "u2")), "must hold 67 of uint16"),
        (lambda d: np.save(d / "ends.npy", np.array([5, 9, 66])), "must end at the last token, 67"),
        (lambda d: (d / "tokens.json").write_text("{"), "tokens.json is not valid JSON"),
        (rewrite(format="other"), "must be of the format 'jaxformers tokens 1'"),
        (rewrite(tokens=66), "must hold 66 of uint16"),
        (rewrite(documents=None), "must be of the format"),
        (rewrite(vocab_size=70_000), "must hold 67 of uint32"),
    ],
)  # fmt: skip
def test_damaged_token_files_are_refused(directory, spoil, message):
    spoil(directory)
    with pytest.raises(ValueError, match=message):
        open_tokens(directory)
    with pytest.raises(ValueError, match=message):
        Windows(directory, 4, 2)


def test_ids_beyond_the_vocabulary(directory):
    """Found when they are served, or all at once on request; the checksum finds the rest."""
    ids = np.load(directory / "tokens.npy")
    ids[40] = 257
    np.save(directory / "tokens.npy", ids)
    tokens = open_tokens(directory)
    message = "token 40 of .* must be an id from 0 to 256, got 257. It was made by another"
    with pytest.raises(ValueError, match=message):
        tokens.verify()
    source = Windows(tokens, 8, 2)
    with pytest.raises(ValueError, match=message):
        [source[i] for i in range(source.order.count)]
    ids[40] = 5
    np.save(directory / "tokens.npy", ids)
    with pytest.raises(ValueError, match="its checksum is wrong"):
        open_tokens(directory).verify()
    ends = np.load(directory / "ends.npy")
    np.save(directory / "ends.npy", ends[[1, 0, 2]])
    damaged = open_tokens(directory)
    damaged.checksum = None
    with pytest.raises(ValueError, match="documents' ends do not ascend to 67"):
        damaged.verify()
    with pytest.raises(ValueError, match="a vocabulary of 257, got vocab_size=256"):
        open_tokens(directory, 256)
    assert open_tokens(directory, 300).vocab_size == 300
    with pytest.raises(ValueError, match="from 0 to 9, got 99"):
        Windows(open_tokens(np.full(50, 99), vocab_size=10), 8, 2)[0]
    with pytest.raises(ValueError, match="from 0 to 2147483647, got -1"):
        Windows(-np.ones(50, int), 8, 2)[0]
    with pytest.raises(ValueError, match="from 0 to 2147483647, got 2147483648"):
        Windows(np.full(50, 2**31, np.uint64), 8, 2)[0]


def test_ids_from_anywhere(tmp_path):
    """A list, an array of any integers, a `.npy` file and a map of raw ones are the same."""
    want = Windows(list(range(200)), 7, 3)[4]
    np.save(tmp_path / "ids.npy", np.arange(200, dtype=np.uint32))
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    raw = np.memmap(tmp_path / "ids.bin", np.uint16, "r")
    others = raw, tmp_path / "ids.npy", str(tmp_path / "ids.npy"), np.arange(200, dtype=">i8")
    for ids in (*others, np.arange(200, dtype=np.uint8), range(200)):
        batch = Windows(ids, 7, 3)[4]
        assert all((batch[name] == want[name]).all() for name in want)
    assert isinstance(open_tokens(tmp_path / "ids.npy").ids, np.memmap)
    assert isinstance(open_tokens(raw).ids, np.memmap)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(9.0), "must hold integer ids in one row, got shape .9,. of dtype float64. Cast"),
        (np.zeros((3, 4), int), "in one row, got shape .3, 4. of dtype int64"),
        (np.array(5), "must hold integer ids in one row"),
        (np.ones(5, bool), "got shape .5,. of dtype bool"),
        (np.array(["a"]), "must hold integer ids"),
        (None, "must hold integer ids"),
        (np.array([], np.uint16), "must hold at least one token, got none"),
        ([], "must hold at least one token, got none"),
        ([[], []], "must hold at least one token, got none"),
        ([[1, 2], [0.5]], "document 1 must hold integer ids"),
        ([[1, 2], [[1, 2], [3]]], "document 1 must hold integer ids"),
        (["ab"], "document 0 must hold integer ids"),
        ("nowhere/at.npy", "nowhere/at.npy is missing"),
    ],
)  # fmt: skip
def test_what_is_no_ids_is_refused(ids, message, no_shape_checker):
    with pytest.raises(ValueError, match=message):
        open_tokens(ids)


def test_other_npy_files(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([], np.uint16))
    with pytest.raises(ValueError, match="must hold at least one token"):
        open_tokens(path)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="must hold integers, got Python objects"):
        open_tokens(path)
    np.save(path, np.zeros((4, 5), int))
    with pytest.raises(ValueError, match="in one row, got shape .4, 5."):
        open_tokens(path)
    (tmp_path / "b.bin").write_bytes(np.arange(99, dtype=np.uint16).tobytes())
    with pytest.raises(ValueError, match="no .npy file.* opened with np.memmap"):
        open_tokens(tmp_path / "b.bin")


def test_types_of_ids():
    assert [token_dtype(n) for n in (2, 65_536, 65_537)] == [np.uint16, np.uint16, np.uint32]


def test_split(no_shape_checker):
    tokens = open_tokens([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]], vocab_size=11)
    for share, want in ((0.5, [3, 2]), (0.05, [3, 2]), (0.99, [3])):
        train, validation = tokens.split(share)
        assert train.lengths.tolist() == want
        assert np.concatenate([train.ids, validation.ids]).tolist() == tokens.ids.tolist()
        assert [*train.lengths, *validation.lengths] == [3, 2, 5]
        assert train.vocab_size == validation.vocab_size == 11
    train, validation = open_tokens([list(range(10))]).split(0.2)
    assert (train.lengths.tolist(), validation.lengths.tolist()) == ([8], [2])
    for bad in (0.0, 1.0, 1, "0.1", None):
        with pytest.raises(ValueError, match="share must be a number between 0 and 1"):
            tokens.split(bad)
    with pytest.raises(ValueError, match="5 tokens do not divide into two parts"):
        open_tokens(np.arange(5)).split(0.01)
