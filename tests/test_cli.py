"""The commands for texts: what they write, their exit statuses, and errors of one line."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from test_text_generator import TEMPLATE, V, tokenizer_of
from test_token_text import byte_level

import jaxformers
from jaxformers import (
    LayerNorm,
    TextGenerator,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    load,
)
from jaxformers.__main__ import ADD, main, make_parser
from jaxformers.cli.inspect import sizes

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
ROOT = Path(jaxformers.__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a small GPT-2 and its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    sizes = {"d_model": 24, "num_heads": 4, "num_layers": 2, "d_ff": 40, "max_seq_length": 96}
    options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
    TransformerLM(V, **sizes, **options, key=jax.random.key(3)).save_pretrained(directory)
    tokenizer_of(byte_level(), eos_token="<|endoftext|>", chat_template=TEMPLATE).save(directory)
    return directory


@pytest.fixture(scope="module")
def text(checkpoint):
    return TextGenerator.from_pretrained(checkpoint)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """A function that runs a command, and returns its status and what it wrote."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))

    def run(*arguments):
        status = main([str(x) for x in arguments])
        return status, *capsys.readouterr()

    return run


def test_generate(run, checkpoint, text, monkeypatch):
    wanted = text("the cat", 12)
    assert run("generate", checkpoint, "the cat", "--max-new-tokens", 12)[:2] == (0, wanted + "\n")
    status, out, errors = run(
        *("generate", checkpoint, "the cat", "--max-new-tokens", 12, "--json", "--verbose")
    )
    found = json.loads(out)
    assert status == 0 and found["text"] == wanted and len(found["log_probs"]) == 12
    assert found["finish_reason"] == "length" and "12 tokens in" in errors
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
    assert run("generate", checkpoint, "-", "--max-new-tokens", 12)[1] == wanted + "\n"
    messages = [{"role": "system", "content": "mat"}, {"role": "user", "content": "the cat"}]
    chat = run(
        "generate", checkpoint, "the cat", "--chat", "--system", "mat", "--max-new-tokens", 9
    )
    assert chat[:2] == (0, text.chat(messages, 9) + "\n")
    drawn = [
        run("generate", checkpoint, "x", "--temperature", 1.5, "--seed", seed, "--top-k", 50)[1]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def _file(directory, content):
    path = directory / "file"
    path.write_text(content)
    return path


def test_generate_with_a_constraint(run, checkpoint, tmp_path):
    regex = run("generate", checkpoint, "the", "--regex", "[0-9]{3}-(yes|no)")
    assert regex[0] == 0 and re.fullmatch("[0-9]{3}-(yes|no)\n", regex[1])
    schema = _file(tmp_path, '{"type": "array", "items": {"enum": [1, "a"]}, "maxItems": 3}')
    status, out, _ = run("generate", checkpoint, "the", "--schema", schema)
    assert status == 0 and set(json.loads(out)) <= {1, "a"}
    both = run("generate", checkpoint, "the", "--schema", schema, "--regex", "a")
    assert both[0] == 1 and "--schema and --regex" in both[2]


def test_embed(run, tmp_path):
    directory = tmp_path / "encoder"
    words = {f"w{i}": i for i in range(40)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    norm = partial(TransformerEmbedding, norm=LayerNorm, num_token_types=2)
    options = {"learnable_pos": True, "embedding_scale": 1.0, "norm_first": False}
    sizes = 40, 12, 2, 1, 20, 32
    model = TransformerEncoder(*sizes, **options, embedding=norm, key=jax.random.key(0))
    model.save_pretrained(directory)
    tokenizer_of(backend).save(directory)
    lines = _file(tmp_path, "w1 w2\nw3\n\nw4 w5 w6\n")
    status, out, _ = run("embed", directory, lines, "--json")
    rows = [json.loads(x) for x in out.splitlines()]
    assert status == 0 and [x["text"] for x in rows] == ["w1 w2", "w3", "", "w4 w5 w6"]
    wanted = jaxformers.TextEmbedder.from_pretrained(directory)([x["text"] for x in rows])
    np.testing.assert_allclose([x["vector"] for x in rows], wanted, rtol=1e-5, atol=1e-6)
    assert run("embed", directory, lines, "--out", tmp_path / "v.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), wanted, rtol=1e-5, atol=1e-6)
    plain = run("embed", directory, lines)[1].splitlines()
    np.testing.assert_allclose(np.array(plain[0].split(), float), wanted[0], rtol=1e-4, atol=1e-5)
    assert run("embed", directory, lines, "--out", tmp_path / "v.txt")[0] == 1


def test_inspect(run, checkpoint, text):
    found = json.loads(run("inspect", checkpoint, "--json")[1])
    d, f, v, t = 24, 40, V, 96
    layer = 4 * d * d + 2 * d * f
    assert found["parameters"] == sum(
        x.size for x in jax.tree.leaves(text.model) if hasattr(x, "size")
    )
    assert found["bytes"] == 4 * found["parameters"] and found["class"] == "TransformerLM"
    assert found["parts"]["embedding"] == (v + t) * d
    assert found["operations_per_token"] == 2 * (2 * layer + v * d)
    assert found["operations_per_token_of_context"] == 2 * 4 * d
    assert found["cache_bytes_per_token"] == 2 * 2 * d * 4
    assert sum(found["parts"].values()) == found["parameters"]
    assert found == json.loads(json.dumps(sizes(text.model)))
    status, out, _ = run("inspect", checkpoint)
    assert status == 0 and f"{found['parameters']:,} parameters" in out


def test_convert(run, checkpoint, text, tmp_path):
    status, out, _ = run("convert", checkpoint, tmp_path / "one.safetensors")
    assert status == 0 and "written" in out
    tokens = np.arange(7)
    np.testing.assert_array_equal(load(tmp_path / "one.safetensors")(tokens), text.model(tokens))
    assert run("convert", checkpoint, tmp_path / "new", "--dtype", "bfloat16")[0] == 0
    again = TextGenerator.from_pretrained(tmp_path / "new")
    assert again.model.embedding.table.dtype == "bfloat16" and again("the", 3)
    assert run("convert", checkpoint, tmp_path / "new")[0] == 1  # nothing is overwritten


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "nowhere", "x"),
        ("chat", "nowhere"),
        ("embed", "nowhere", "nowhere.txt"),
        ("inspect", "nowhere"),
        ("convert", "nowhere", "out"),
        ("generate", "CHECKPOINT", "x", "--seed", "1"),
        ("generate", "CHECKPOINT", "x", "--system", "a"),
        ("generate", "CHECKPOINT", "x", "--dtype", "float7"),
        ("generate", "CHECKPOINT", "x", "--schema", "nowhere.json"),
        ("generate", "CHECKPOINT", "x", "--regex", "("),
        ("generate", "CHECKPOINT", "x", "--adapter", "nowhere"),
        ("generate", "CHECKPOINT", "the " * 200),
        ("generate", "CHECKPOINT", "x", "--max-new-tokens", "0"),
    ],
    ids=lambda x: "-".join(x)[:40],
)
def test_errors_are_one_line(run, checkpoint, arguments):
    status, out, errors = run(*(checkpoint if x == "CHECKPOINT" else x for x in arguments))
    assert status == 1 and out == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and len(errors) > 30


def test_help_fits_the_terminal_and_its_examples_can_be_read(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for add in ADD:
        name = add.__name__.removeprefix("add_").replace("_", "-")
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        text, _, examples = capsys.readouterr().out.partition("\nexamples:")
        assert max(map(len, text.splitlines())) <= 60, name
        for line in examples.strip().splitlines():
            words = shlex.split(line.split("| ")[-1], comments=True)
            assert words[:2] == ["jaxformers", name] and make_parser().parse_args(words[1:]).run
    with pytest.raises(SystemExit) as end:
        main(["generate", "--no-such-option"])
    assert end.value.code == 2


def started(*arguments, **options):
    command = [sys.executable, "-m", "jaxformers", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, **options)


def test_a_reader_that_goes_away(checkpoint):
    process = started(
        *("generate", checkpoint, "the cat", "--max-new-tokens", 80),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141 and "Traceback" not in errors


def test_a_chat_in_a_terminal(checkpoint, text):
    """Turns, a paste of several lines, Ctrl-C at the prompt and within an answer, and the end."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = started("chat", checkpoint, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    seen = b""

    def until(*signs):
        nonlocal seen
        end = time.monotonic() + 90
        while not any(sign in seen for sign in signs):
            assert time.monotonic() < end, seen
            seen += os.read(ours, 4096)
        before, seen = seen, b""
        return before.decode()

    until(b"> ")
    for message in ("the cat 日本?", "first line\nsecond line"):
        os.write(ours, message.encode() + b"\n")
        assert until(b"\n> ")
    os.write(ours, b"/reset\n")
    until(b"> ")
    os.write(ours, b"on a mat\n")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # within the answer, or at the prompt after it
    until(b"> ")
    os.write(ours, b"/exit\n")
    assert process.wait(60) == 0
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    os.close(ours)
