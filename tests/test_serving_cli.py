"""The command `serve`: what it reads, what it says, and how it ends."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from test_cli import checkpoint, encoder, examples_in, help_of, link_examples, run, started  # noqa: F401

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from jaxformers.serving import server  # noqa: E402
from jaxformers.serving.app import App  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")


@pytest.fixture
def served(monkeypatch):
    """The app of each server that a command begins, all of which end at once."""
    found = []

    def serve(app, sock, ready):
        found.append(app)
        ready()
        app.close()
        if app.engine is not None:
            app.engine.close()

    monkeypatch.setattr(server, "serve", serve)
    return found


def test_the_examples_of_the_help(run, checkpoint, encoder, served, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    link_examples(checkpoint, encoder)
    examples = examples_in(help_of("serve", capsys))
    for words in examples:
        if words[0].startswith("JAXFORMERS_KEY="):
            monkeypatch.setenv(*words.pop(0).split("="))
        assert words[:2] == ["jaxformers", "serve"]
        status, out, errors = run(*words[1:], "--port", 0)
        assert status == 0 and re.fullmatch(r"serving .* at http://[\d.]+:\d+/v1\n", out), errors
    chats, both, vectors = served
    assert [x.names for x in (chats, both, vectors)] == [
        ["SmolLM2-135M-Instruct"],
        ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"],
        ["all-MiniLM-L6-v2"],
    ]
    assert vectors.engine is None and chats._key is None and vectors._key == "secret"


def test_options(run, checkpoint, encoder, served):  # noqa: F811
    more = "--rows", 3, "--waiting", 5, "--context", 50, "--key", "k", "--port", 0
    names = "--name", "a", "--embedder-name", "b", "--embedder", encoder, "--quantize", "int8"
    assert run("serve", checkpoint, *more, *names, "--host", "::1")[0] in (0, 1)  # without IPv6 1
    assert run("serve", checkpoint, *more, *names)[1].startswith("serving a, b at http://127")
    app = served[-1]
    engine = app.engine
    assert engine.counts()["rows"] == 3 and engine.waiting == 5 and engine.context == 50
    assert app._key == "k" and app.names == ["a", "b"]


def test_errors_are_one_line(run, checkpoint, encoder, served, monkeypatch):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ((checkpoint, "--port", port), f"port {port} of 127.0.0.1"),
            ((checkpoint, "--port", 70000), "--port"),
            ((checkpoint, "--host", "no.such.host.invalid"), "no.such.host.invalid"),
            ((checkpoint, "--key", "a b"), "--key"),
            ((checkpoint, "--context", 97), "context"),
            ((checkpoint, "--rows", 0), "rows"),
            ((checkpoint, "--embedder", checkpoint, "--name", checkpoint.name), "--name"),
            ((encoder, "--embedder", encoder), "--embedder"),
            ((encoder, "--rows", 4), "--rows"),
            ((encoder, "--warm-up", 9), "--warm-up"),
            ((checkpoint, "--warm-up", 0), "warm_up"),
            ((checkpoint, "--embedder-name", "b"), "--embedder-name"),
            (("nowhere",), "nowhere"),
        ]
        for arguments, word in cases:
            more = () if "--port" in arguments else ("--port", 0)
            status, out, errors = run("serve", *arguments, *more)
            assert (status, out) == (1, "") and errors.startswith("error: "), arguments
            assert errors.count("\n") == 1 and word in errors, errors
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, errors = run("serve", checkpoint)
    assert status == 1 and "pip install 'jaxformers[serve]'" in errors
    assert not served


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_server_of_its_own(checkpoint, sign):  # noqa: F811
    """It says where it is, answers, writes a line for each request, and ends by a signal."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started("serve", checkpoint, "--port", 0, "--name", "m", **streams) as process:
        try:
            line = process.stdout.readline().decode()
            port = int(re.fullmatch(r"serving m at http://127.0.0.1:(\d+)/v1\n", line)[1])
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
                body = json.dumps({"model": "m", "prompt": "the cat", "max_tokens": 5})
                kind = {"Content-Type": "application/json"}
                client.request("POST", "/v1/completions", body, kind)
                answer = client.getresponse()
                assert answer.status == 200 and json.loads(answer.read())["usage"]
            process.send_signal(sign)
            out, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == 0 and out == b"", errors
    assert re.fullmatch(
        r"POST /v1/completions 200 \d+ prompt tokens, \d new tokens, [\d.]+ s\n", errors.decode()
    )


def test_a_second_server_on_a_port_is_refused_also_after_both_have_bound_it():
    with server.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        try:
            second = server.bind("127.0.0.1", port)
        except OSError:  # a system that refuses it already here
            return
        first.listen()
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be listened on"):
            server.serve(App(None, None), second, pytest.fail)
