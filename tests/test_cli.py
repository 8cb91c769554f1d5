"""The commands for texts: what they write, their exit statuses, and errors of one line."""

import argparse
import codecs
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from test_text_generator import TEMPLATE, V, tokenizer_of
from test_token_text import byte_level

import jaxformers
from jaxformers import (
    GatedFeedForward,
    LayerNorm,
    RMSNorm,
    RotaryPositionalEncoding,
    TextEmbedder,
    TextGenerator,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    describe,
    load,
)
from jaxformers.__main__ import ADD, main
from jaxformers.cli.inspect import sizes
from jaxformers.cli.text_model import first_messages

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
def endless(tmp_path_factory):
    """A directory with a small model whose answers do not end by themselves."""
    directory = tmp_path_factory.mktemp("endless")
    sizes = {"d_model": 24, "num_heads": 4, "num_layers": 1, "d_ff": 40}
    pieces = {"norm": RMSNorm, "feed_forward": GatedFeedForward, "use_bias": False}
    position = RotaryPositionalEncoding()
    model = TransformerLM(V, **sizes, **pieces, position=position, key=jax.random.key(3))
    model.save_pretrained(directory)
    config = directory / "config.json"
    entries = json.loads(config.read_text())
    config.write_text(json.dumps(entries | {"max_position_embeddings": 9000}))
    tokenizer_of(byte_level(), chat_template=TEMPLATE).save(directory)
    return directory


def encoder_of(max_seq_length):
    """A small BERT, and its tokenizer of words."""
    words = {f"w{i}": i for i in range(40)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    norm = partial(TransformerEmbedding, norm=LayerNorm, num_token_types=2)
    options = {"learnable_pos": True, "embedding_scale": 1.0, "norm_first": False}
    sizes = 40, 12, 2, 1, 20, max_seq_length
    model = TransformerEncoder(*sizes, **options, embedding=norm, key=jax.random.key(0))
    return model, tokenizer_of(backend)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A directory with a small BERT and its tokenizer."""
    directory = tmp_path_factory.mktemp("encoder")
    model, tokenizer = encoder_of(32)
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def text(checkpoint):
    return TextGenerator.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def programs(tmp_path_factory, monkeypatch):
    """Programs are kept in a folder of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run(capsys):
    """A function that runs a command, and returns its status and what it wrote."""

    def run(*arguments):
        status = main([str(x) for x in arguments])
        return status, *capsys.readouterr()

    run.output = lambda: capsys.readouterr().out
    return run


def test_generate(run, checkpoint, text, monkeypatch):
    wanted = text("the cat", 12)
    assert run("generate", checkpoint, "the cat", "--max-new-tokens", 12)[:2] == (0, wanted + "\n")
    status, out, errors = run(
        *("generate", checkpoint, "the cat", "--max-new-tokens", 12, "--json", "--verbose")
    )
    found = json.loads(out)
    assert status == 0 and found["text"] == wanted and len(found["log_probs"]) == 12
    assert found["finish_reason"] == "length" and "12 tokens" in errors
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


@pytest.fixture(scope="module")
def adapter(text, tmp_path_factory):
    """A directory with an adapter that changes what the model says."""
    model = jaxformers.lora(text.model, rank=2, key=jax.random.key(0))
    directory = tmp_path_factory.mktemp("adapter")
    jaxformers.save_adapter(_shifted(model), directory)
    return directory


def _shifted(model):
    """An adapter begins without a change; this one makes some."""
    return jax.tree.map(lambda x: x + 0.3 if x.ndim == 2 and 2 in x.shape else x, model)


def test_the_options_of_the_weights(run, checkpoint, text, adapter):
    plain = run("generate", checkpoint, "the cat", "--max-new-tokens", 12)[1]
    models = {
        ("--quantize", "int4"): jaxformers.quantize(text.model, bits=4),
        ("--dtype", "bfloat16"): jaxformers.from_pretrained(checkpoint, dtype="bfloat16"),
        ("--adapter", adapter): jaxformers.load_adapter(text.model, adapter),
    }
    for options, model in models.items():
        wanted = "".join(TextGenerator(model, text.tokenizer).stream("the cat", 12))
        found = run("generate", checkpoint, "the cat", "--max-new-tokens", 12, *options)
        assert found[:2] == (0, wanted + "\n"), options
        assert found[1] != plain or "bfloat16" in options, options


def test_a_chat_with_few_bits_an_adapter_and_a_schema(
    run, checkpoint, adapter, tmp_path, monkeypatch
):
    schema = _file(tmp_path, '{"enum": ["yes", "no"]}')
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/reset\nthe\n"))
    options = "--quantize", "int8", "--adapter", adapter, "--schema", schema
    status, out, _ = run("chat", checkpoint, *options)
    assert status == 0 and [json.loads(x) in ("yes", "no") for x in out.splitlines()] == [True] * 2


def _file(directory, content):
    path = directory / "file"
    path.write_text(content)
    return path


def test_a_message_of_the_system_may_be_empty():
    """Some templates write one of their own where there is none."""
    assert first_messages(argparse.Namespace(system="")) == [{"role": "system", "content": ""}]


def test_generate_with_a_constraint(run, checkpoint, tmp_path):
    regex = run("generate", checkpoint, "the", "--regex", "[0-9]{3}-(yes|no)")
    assert regex[0] == 0 and re.fullmatch("[0-9]{3}-(yes|no)\n", regex[1])
    schema = _file(tmp_path, '{"type": "array", "items": {"enum": [1, "a"]}, "maxItems": 3}')
    status, out, _ = run("generate", checkpoint, "the", "--schema", schema)
    assert status == 0 and set(json.loads(out)) <= {1, "a"}
    both = run("generate", checkpoint, "the", "--schema", schema, "--regex", "a")
    assert both[0] == 1 and "--schema and --regex" in both[2]


def test_embed(run, encoder, tmp_path):
    lines = _file(tmp_path, "w1 w2\nw3\n\nw4 w5 w6\n")
    status, out, _ = run("embed", encoder, lines, "--json")
    rows = [json.loads(x) for x in out.splitlines()]
    assert status == 0 and [x["text"] for x in rows] == ["w1 w2", "w3", "", "w4 w5 w6"]
    wanted = TextEmbedder.from_pretrained(encoder)([x["text"] for x in rows])
    np.testing.assert_allclose([x["vector"] for x in rows], wanted, rtol=1e-5, atol=1e-6)
    assert run("embed", encoder, lines, "--out", tmp_path / "v.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), wanted, rtol=1e-5, atol=1e-6)
    small = run("embed", encoder, lines, "--quantize", "int8", "--json")[1].splitlines()
    model = TextEmbedder.from_pretrained(encoder)
    model.model = jaxformers.quantize(model.model)
    vectors = model([x["text"] for x in rows])
    np.testing.assert_allclose([json.loads(x)["vector"] for x in small], vectors, rtol=1e-5)
    plain = run("embed", encoder, lines)[1].splitlines()
    np.testing.assert_allclose(np.array(plain[0].split(), float), wanted[0], rtol=1e-4, atol=1e-5)
    assert run("embed", encoder, lines, "--out", tmp_path / "v.txt")[0] == 1


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
    listed = json.loads(run("inspect", checkpoint, "--parameters", "--json")[1])
    assert listed["class"] == "TransformerLM"
    assert [row["path"] for row in listed["rows"]] == [x.path for x in describe(text.model).rows]
    assert run("inspect", checkpoint, "--parameters")[1] == f"{describe(text.model)}\n"


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


def cut(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(name):
    return lambda directory: (directory / name).unlink()


def writing(name, content):
    return lambda directory: (directory / name).write_bytes(content)


BROKEN = {
    "cut": (cut, "truncated"),
    "no-weights": (without("model.safetensors"), "has no model.safetensors"),
    "no-config": (without("config.json"), "config.json is missing"),
    "no-tokenizer": (without("tokenizer.json"), "no tokenizer.json"),
    "bad-json": (writing("config.json", b'{"model_type": '), "not valid JSON"),
    "not-utf-8": (writing("config.json", b"\xff\xfe"), "not valid JSON"),
    "unknown-type": (writing("config.json", b'{"model_type": "mamba9"}'), "mamba9"),
    "no-type": (writing("config.json", b"{}"), "model_type"),
    "bad-tokenizer": (writing("tokenizer.json", b'{"a": 1}'), "tokenizer.json is broken"),
    "gguf": (writing("one.gguf", b"GGUF" + bytes(30)), "one.gguf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_line(run, checkpoint, tmp_path, name):
    spoil, wanted = BROKEN[name]
    spoilt = tmp_path / "spoilt"
    shutil.copytree(checkpoint, spoilt)
    spoil(spoilt)
    status, out, errors = run("generate", spoilt / "one.gguf" if name == "gguf" else spoilt, "x")
    assert (status, out, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: ") and wanted in errors


@pytest.mark.parametrize(
    "arguments",
    [(), ("generat",), ("generate",), ("generate", "a", "b", "--top-k", "x"), ("chat", "a", "--x")],
    ids=lambda x: "-".join(x) or "nothing",
)
def test_wrong_options_are_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, errors = capsys.readouterr()
    assert end.value.code == 2 and out == "" and errors.count("\n") == 1
    assert errors.startswith("error: ") and errors.endswith(" --help.\n")


def help_of(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for name in NAMES:
        text = help_of(name, capsys)
        assert max(map(len, text.splitlines())) <= 60, text
        assert examples_in(text) == examples_in(help_of(name, capsys)) != []


NAMES = [add.__name__.removeprefix("add_").replace("_", "-") for add in ADD]


def examples_in(text):
    """The words of each example of a help."""
    lines = text.partition("\nexamples:\n")[2].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def link_examples(checkpoint, encoder):
    """Gives checkpoints the names that they have in the examples, here and on the hub."""
    places = {
        "SmolLM2-135M-Instruct": checkpoint,
        "HuggingFaceTB/SmolLM2-135M-Instruct": checkpoint,
        "sentence-transformers/all-MiniLM-L6-v2": encoder,
    }
    for name, place in places.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(place)


@pytest.mark.parametrize("name", [x for x in NAMES if x not in ("verify", "serve")])
def test_the_examples_of_the_help_run(name, run, checkpoint, encoder, tmp_path, monkeypatch):
    """In a folder with small files of these names."""
    monkeypatch.chdir(tmp_path)
    model = jaxformers.from_pretrained(checkpoint)
    jaxformers.save_adapter(jaxformers.lora(model, rank=2, key=jax.random.key(0)), "lora")
    link_examples(checkpoint, encoder)
    Path("book.txt").write_text("the cat sat on the mat\n" * 9)
    Path("sentences.txt").write_text("w1 w2\nw3\n")
    Path("articles.jsonl").write_text('{"body": "the cat sat on the mat"}\n' * 9)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "cat"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    Path("person.json").write_text('{"enum": ["Anna", "Ben"]}')
    with pytest.raises(SystemExit):
        run(name, "--help")
    for words in examples_in(run.output()):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
        if words[0] == "echo":
            words = words[words.index("|") + 1 :]
        words = [x.replace("Instruct.Q4_1.gguf", "Instruct") for x in words]
        assert words[:2] == ["jaxformers", name]
        status, out, errors = run(*words[1:])
        assert status == 0, errors


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


def test_ctrl_c_ends_a_command(endless):
    command = "generate", endless, "the", "--max-new-tokens", 8000
    process = started(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and errors == b""


def test_an_interrupt_that_a_callback_swallows_comes_again(monkeypatch):
    class Last:
        def __del__(self):
            raise KeyboardInterrupt

    def run(options):
        Last()
        time.sleep(300)

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    monkeypatch.setattr("jaxformers.__main__.make_parser", lambda: parser)
    assert main([]) == 130


def test_streams_that_are_closed(run, checkpoint, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    arguments = str(checkpoint), "--max-new-tokens", "3"
    statuses = [main(["generate", *arguments, "the"]), main(["chat", *arguments])]
    streams = sys.stdin, sys.stdout, sys.stderr
    monkeypatch.undo()
    for stream in streams:
        stream.close()
    assert statuses == [0, 0]


class Typist:
    """A chat in a terminal of its own, with somebody who types and reads."""

    def __init__(self, *arguments):
        pty = pytest.importorskip("pty")
        self.ours, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = started("chat", *arguments, "--verbose", **streams)
        os.close(theirs)
        self.seen = ""
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def until(self, sign):
        """Reads until a sign comes, and returns what came before it."""
        end = time.monotonic() + 300
        while sign not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.ours], [], [], 1)[0]:
                self.seen += self.decode(os.read(self.ours, 4096))
        before, _, self.seen = self.seen.partition(sign)
        return before

    def type(self, text):
        data = text.encode()
        while data:
            data = data[os.write(self.ours, data[:512]) :]

    def turn(self, message):
        """Types a message, and returns the tokens of its answer and what was seen of it."""
        self.type(message + "\n")
        answer = self.until(" token")
        self.until("\n> ")
        return int(answer.split()[-1]), answer

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def leave(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def type_to():
    """A function that begins a chat in a terminal."""
    typists = []

    def begin(*arguments):
        typists.append(Typist(*arguments))
        typists[-1].until("\n> ")
        return typists[-1]

    yield begin
    for typist in typists:
        typist.leave()


def test_a_chat_in_a_terminal(endless, type_to):
    """Turns, commands, long and wide pastes, Ctrl-C at the prompt and within an answer, the end."""
    chat = type_to(endless, "--max-new-tokens", 6)
    count, answer = chat.turn("the cat 日本 👋🏽 e\u0301?")
    assert count == 6 and "日本" in answer
    chat.type("/reset\n")
    chat.until("\n> ")
    paste = "\n".join(f"line {i}" for i in range(30))
    assert chat.turn(paste)[0] == 6  # one message
    chat.type("half a line")
    chat.until("line")
    chat.interrupt()
    chat.until("\n> ")
    chat.interrupt()  # nothing has been typed
    chat.until("\n> ")
    chat.type("/help\n")
    assert "half" not in chat.until("Ctrl-C stops")
    chat.until("\n> ")
    chat.type("/quit\n")  # no message for the model
    chat.until("there is no command /quit: /reset begins anew")
    chat.until("\n> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    assert "Traceback" not in chat.seen


def test_ctrl_c_stops_an_answer_and_not_the_chat(endless, type_to):
    chat = type_to(endless, "--max-new-tokens", 8000)
    chat.type("the\n")
    chat.until("\r\n")  # the echo
    while not chat.seen:  # the answer has begun
        chat.seen += chat.decode(os.read(chat.ours, 1))
    chat.interrupt()
    assert int(chat.until(" token").split()[-1]) < 8000
    chat.until("\n> ")
    chat.type("/help\n/exit\n")  # typed ahead: each is a command of its own
    chat.until("Ctrl-C stops")
    assert chat.process.wait(60) == 0
    assert "Traceback" not in chat.seen


def test_a_line_that_comes_with_ctrl_c_is_not_lost(type_to, endless):
    chat = type_to(endless, "--max-new-tokens", 2)
    chat.interrupt()
    chat.type("/exit\n")
    assert chat.process.wait(60) == 0


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"jaxformers {jaxformers.__version__}\n"
    assert jaxformers.__version__ == version("jaxformers")  # what is installed says the same
