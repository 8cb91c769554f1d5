"""The server's side of HTTP, with an engine that follows a script."""

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import threading

import numpy as np
import pytest
from test_text_generator import TEMPLATE, V, lm_of, tokenizer_of
from test_token_text import byte_level

from jaxformers import RotaryPositionalEncoding, TextGenerator

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from serving import JSON, Log, ScriptedEngine, serving  # noqa: E402
from serving_hostile import ATTACKS, Target  # noqa: E402

from jaxformers.serving import body as body_module  # noqa: E402
from jaxformers.serving.generator import Generator  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANSWER = "The naïve cat 日本 sat."
HELLO = [{"role": "user", "content": "Hello"}]
STREAM = {"model": "tiny", "messages": HELLO, "stream": True}


@pytest.fixture(scope="module")
def text():
    tokenizer = tokenizer_of(byte_level(), eos_token="<|endoftext|>", chat_template=TEMPLATE)
    return TextGenerator(lm_of(position=RotaryPositionalEncoding()), tokenizer)


@pytest.fixture
def script():
    """What the engine does for a job, which a test may replace."""
    return {}


@pytest.fixture
def log():
    return Log()


@contextlib.contextmanager
def running(text, script, log):
    ids = np.asarray(text.tokenizer.encode(ANSWER)[0]).tolist()
    script["do"] = lambda job: [*ids, text.tokenizer.end_token]
    engine = ScriptedEngine(lambda job: script["do"](job), V, most=6)
    engine.start()
    with serving(Generator("tiny", text, engine, 5), log=log) as server:
        server.engine = engine
        yield server


@pytest.fixture
def server(text, script, log):
    with running(text, script, log) as server:
        yield server


@pytest.fixture(scope="module")
def shared(text):
    """One server for requests that are refused."""
    with running(text, {}, Log()) as server:
        yield server


def chat(server, **fields):
    return server.post(CHAT, **{"model": "tiny", "messages": HELLO, **fields})


def test_chat(server, log):
    status, found = chat(server)
    choice = found["choices"][0]
    assert status == 200 and found["object"] == "chat.completion" and found["model"] == "tiny"
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    job = server.engine.jobs[0]
    used = len(job.prompt), len(job.row.tokens)
    assert tuple(found["usage"].values()) == (*used, sum(used))
    line = log.wait_for(f"POST {CHAT} 200 {used[0]} prompt tokens, {used[1]} new tokens, ")
    assert "Hello" not in line and "cat" not in line


def test_chat_as_events(server):
    events = server.events(
        CHAT, model="tiny", messages=HELLO, stream_options={"include_usage": True}
    )
    assert events.pop() == "[DONE]"
    chunks = [json.loads(x) for x in events]
    assert {x["object"] for x in chunks} == {"chat.completion.chunk"}
    assert len({(x["id"], x["created"], x["model"]) for x in chunks}) == 1
    last = chunks.pop()
    assert last["choices"] == [] and last["usage"] == chat(server)[1]["usage"]
    choices = [x["choices"][0] for x in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert "".join(x["delta"]["content"] for x in choices[:-1]) == ANSWER and len(choices) > 5
    assert all(x["finish_reason"] is None for x in choices[:-1])
    assert all(x["usage"] is None for x in chunks)


def test_stop_strings_end_an_answer(server):
    for stop, wanted in (
        ("cat", "The naïve "),
        (["日", " cat"], "The naïve"),
        (["nowhere"], ANSWER),
    ):
        choice = chat(server, stop=stop, logprobs=True)[1]["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (wanted, "stop")
        listed = choice["logprobs"]["content"]
        content = b"".join(bytes(x["bytes"]) for x in listed).decode()
        assert content.startswith(wanted) and len(content) <= len(wanted) + 3
        events = server.events(CHAT, model="tiny", messages=HELLO, stop=stop, logprobs=True)
        choices = [json.loads(x)["choices"][0] for x in events[:-1]]
        assert "".join(x["delta"].get("content", "") for x in choices) == wanted
        parts = [x["logprobs"]["content"] for x in choices if x["logprobs"]]
        assert [x for part in parts for x in part] == listed


def test_log_probs(server):
    choice = chat(server, logprobs=True, top_logprobs=2, max_tokens=4)[1]["choices"][0]
    assert choice["finish_reason"] == "length"
    listed = choice["logprobs"]["content"]
    assert len(listed) == 4 and all(x["logprob"] == -0.5 for x in listed)
    assert [x["top_logprobs"][0]["token"] for x in listed] == [x["token"] for x in listed]
    assert "".join(x["token"] for x in listed).startswith(choice["message"]["content"])
    asked = {"model": "tiny", "prompt": "a", "logprobs": 2, "max_tokens": 40}
    status, found = server.post(COMPLETIONS, **asked)
    log_probs, text = found["choices"][0]["logprobs"], found["choices"][0]["text"]
    assert status == 200 and text == ANSWER
    for token, offset in zip(log_probs["tokens"], log_probs["text_offset"], strict=True):
        assert token.startswith("bytes:") or text.startswith(token, offset)
    assert all(len(x) == 2 for x in log_probs["top_logprobs"])
    events = server.events(COMPLETIONS, **asked)
    parts = [json.loads(x)["choices"][0] for x in events[:-1]]
    assert "".join(x["text"] for x in parts) == ANSWER and parts[-1]["finish_reason"] == "stop"
    for name, values in log_probs.items():
        assert [x for part in parts for x in part["logprobs"][name]] == values


def test_completions(server, text):
    prompts = ["the cat", "a mat where"]
    rows = [np.asarray(text.tokenizer.encode(x)[0]).tolist() for x in prompts]
    for given, count in ((prompts, 2), (prompts[0], 1), (rows, 2), (rows[1], 1)):
        status, found = server.post(COMPLETIONS, model="tiny", prompt=given, n=2, max_tokens=50)
        assert status == 200 and found["object"] == "text_completion"
        choices = found["choices"]
        assert [x["index"] for x in choices] == list(range(2 * count))
        assert {x["text"] for x in choices} == {ANSWER}
    assert [job.prompt for job in server.engine.jobs[:4]] == [rows[0], rows[0], rows[1], rows[1]]
    assert [job.sampling.index for job in server.engine.jobs[:4]] == [0, 1, 2, 3]
    echo = server.post(COMPLETIONS, model="tiny", prompt=rows[0], echo=True)[1]["choices"][0]
    assert echo["text"] == "the cat" + ANSWER and server.engine.jobs[-1].max_new_tokens == 16
    events = server.events(COMPLETIONS, model="tiny", prompt="x", echo=True, max_tokens=3)
    texts = [json.loads(x)["choices"][0]["text"] for x in events[:-1]]
    assert texts[0] == "x" and ANSWER.startswith("".join(texts[1:]))


def test_sampling_is_what_the_request_says(server, text):
    numbers = {"temperature": 0.5, "top_p": 0.25, "frequency_penalty": -1, "presence_penalty": 0.5}
    more = {"seed": 7, "top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5}
    status, _ = chat(server, **numbers, **more, logit_bias={"3": -100, "11": 2.5})
    assert status == 200
    got = server.engine.jobs[-1].sampling
    assert all(getattr(got, name) == x for name, x in (numbers | more).items())
    assert got.logit_bias == {3: -100.0, 11: 2.5} and got.top == 0
    chat(server), chat(server), chat(server, top_p=0)
    free, again, greedy = (job.sampling for job in server.engine.jobs[-3:])
    assert free.temperature == 1 and free.seed != again.seed and greedy.temperature == 0
    roles = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert chat(server, messages=roles)[0] == 200
    written = text.tokenizer.decode(server.engine.jobs[-1].prompt, skip_special_tokens=False)
    assert written.startswith("[system]Be brief.") and "[user]a\nb" in written


def format_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# What is wrong, the status, and the field or a word of the message.
WRONG = [
    ({"n": 0}, 400, "n"),
    ({"n": 1000}, 400, "n"),
    ({"n": 6}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"n": 1.5}, 400, "n"),
    ({"n": "2"}, 400, "n"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**63}, 400, "seed"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": 10**400}, 400, "temperature"),
    ({"top_p": 1.01}, 400, "top_p"),
    ({"frequency_penalty": 3}, 400, "frequency_penalty"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 96}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, 400, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"stop": "x" * 1000}, 400, "stop"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"logit_bias": {"512": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias.1"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"tool_choice": "auto"}, 400, "tool_choice"),
    ({"functions": [{}]}, 400, "functions"),
    ({"store": True}, 400, "store"),
    ({"service_tier": "priority"}, 400, "service_tier"),
    ({"modalities": ["audio"]}, 400, "modalities"),
    ({"metadata": {"a": 1}}, 400, "metadata"),
    ({"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
    (
        {"response_format": format_of({"enum": ["x" * 70_000]})},
        400,
        "response_format.json_schema.schema",
    ),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort"),
    ({"no_such_field": 1}, 400, "no_such_field"),
    ({"model": "other"}, 404, "model"),
    ({"model": None}, 400, "model"),
    ({"model": 3}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [3]}, 400, "messages[0]"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "A"}]}, 400, "messages[0].name"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": "the cat " * 60}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 10**6}]}, 400, "messages"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}},
        400,
        "response_format.json_schema.schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(?=a)"}},
            }
        },
        400,
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.few(30)
@pytest.mark.parametrize("case", WRONG, ids=[f"{i}-{x[2]}" for i, x in enumerate(WRONG)])
def test_wrong_fields_are_named(shared, case):
    fields, wanted, name = case
    before = list(shared.engine.jobs)
    status, found = chat(shared, **fields)
    error = found["error"]
    assert (status, error["type"]) == (wanted, "invalid_request_error"), found
    assert error["param"] == name and len(error["message"]) > 20
    assert (
        name.split(".")[0].split("[")[0] in error["message"] or "context length" in error["message"]
    )
    assert shared.engine.jobs == before


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None},
        {"prompt": []},
        {"prompt": ["a", 3]},
        {"prompt": [512]},
        {"prompt": [-1]},
        {"prompt": [[]]},
        {"prompt": [[1], "a"]},
        {"prompt": ["a"] * 200},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "best_of": 3},
        {"prompt": "a", "logprobs": 6},
        {"prompt": "a", "logprobs": True},
        {"prompt": "a", "echo": True, "logprobs": 1},
        {"prompt": list(range(96))},
        {"prompt": "a", "response_format": {"type": "text"}},
        {"prompt": "a", "max_completion_tokens": 3},
    ],
    ids=lambda x: "-".join(x),
)
def test_wrong_completions(shared, fields):
    before = list(shared.engine.jobs)
    status, found = shared.post(COMPLETIONS, **{"model": "tiny", **fields})
    assert status == 400 and found["error"]["param"] in {*fields, "prompt", "max_tokens"}
    assert shared.engine.jobs == before


@pytest.mark.parametrize(
    "path, fields, advice",
    [
        (CHAT, {"tools": [{}]}, "a list of 1. Leave it out, or pass []."),
        (CHAT, {"reasoning_effort": "low"}, "'low'. Leave it out, or pass \"none\"."),
        (CHAT, {"parallel_tool_calls": 1}, "1. Leave it out, or pass true or false."),
        (CHAT, {"audio": "a"}, "'a'. Leave it out."),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "'b'. Leave it out, or pass \"\"."),
    ],
    ids=["tools", "effort", "parallel", "audio", "suffix"],
)
def test_what_is_refused_by_name_says_what_to_pass(shared, path, fields, advice):
    messages = {} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    status, found = shared.post(path, **{"model": "tiny", **messages, **fields})
    assert status == 400 and found["error"]["message"].endswith("this server, got " + advice)


def test_too_long_for_the_context(server):
    status, found = chat(server, max_tokens=95)
    assert status == 400 and found["error"]["code"] == "context_length_exceeded"
    assert "96 tokens" in found["error"]["message"]
    room = 96 - len(np.asarray(server.app._generator.text.tokenizer.encode("a")[0]))
    assert server.post(COMPLETIONS, model="tiny", prompt="a", max_tokens=room)[0] == 200
    assert server.post(COMPLETIONS, model="tiny", prompt="a", max_tokens=room + 1)[0] == 400


BODIES = {
    "empty": b"",
    "text": b"hello",
    "half": b'{"model": "tiny"',
    "list": b"[1]",
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}',
    "huge": b'{"temperature": 1e999}',
    "digits": b'{"n": ' + b"9" * 5000 + b"}",
    "twice": b'{"n": 1, "n": 2}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "latin": '{"model": "é"}'.encode("latin-1"),
    "surrogate": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "nul": b"\0" * 9,
    "page": b"<html>",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_json(shared, name):
    status, _, content = shared.request("POST", CHAT, BODIES[name], JSON)
    message = json.loads(content)["error"]["message"]
    assert status == 400 and 20 < len(message) < 500 and "\n" not in message


def test_routes_and_methods(server):
    status, found = server.post("/v1/nothing", model="tiny")
    assert status == 404 and found["error"]["code"] == "unknown_url"
    status, headers, content = server.request("GET", CHAT)
    said = json.loads(content)["error"]["message"]
    assert status == 405 and headers["Allow"] == "POST" and said.endswith(" Use POST.")
    assert server.request("POST", "/v1/models", b"{}", JSON)[0] == 405
    for kind in ({}, {"Content-Type": "text/plain"}):
        status, _, content = server.request("POST", CHAT, b'{"model": "tiny"}', kind)
        assert status == 415 and "application/json" in json.loads(content)["error"]["message"]
    odd = JSON | {"Content-Encoding": "gzip"}
    assert server.request("POST", CHAT, b"{}", odd)[0] == 415
    assert (
        server.request("POST", CHAT, b"{}", {"Content-Type": "Application/JSON; charset=utf-8"})[0]
        == 400
    )
    listed = json.loads(server.request("GET", "/v1/models")[2])
    assert [x["id"] for x in listed["data"]] == ["tiny"] and listed["object"] == "list"
    assert json.loads(server.request("GET", "/v1/models/tiny")[2]) == listed["data"][0]
    assert server.request("GET", "/v1/models/a/b")[0] == 404
    assert json.loads(server.request("GET", "/health")[2])["status"] == "ok"
    status, found = server.post("/v1/embeddings", model="tiny", input="a")
    assert status == 400 and "--embedder" in found["error"]["message"]


def test_large_bodies_are_not_read(server):
    message = json.dumps({"model": "tiny", "messages": "x" * (body_module.MOST + 1)}).encode()
    assert server.request("POST", CHAT, message, JSON)[0] == 413

    def endless():
        while True:
            yield b"x" * 65536

    with contextlib.closing(server.connect()) as connection, contextlib.suppress(OSError):
        connection.request("POST", CHAT, endless(), JSON, encode_chunked=True)
    assert chat(server)[0] == 200


def test_the_key(text):
    engine = ScriptedEngine(lambda job: [], V)
    engine.start()
    with serving(Generator("tiny", text, engine, 5), key="s3cret") as server:
        assert server.request("GET", "/health")[0] == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            status, _, content = server.request("GET", "/v1/models", headers=header)
            assert status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key"
            assert server.request("POST", CHAT, b"{}", JSON | header)[0] == 401
        odd = {"Authorization": "Bearer \xe9"}
        assert server.request("GET", "/v1/models", headers=odd)[0] == 401
        right = {"Authorization": "Bearer s3cret"}
        assert server.request("GET", "/v1/models", headers=right)[0] == 200


def test_a_full_queue(server):
    server.engine.gate.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            answer = stack.enter_context(server.answer(CHAT, **STREAM, n=3))
            assert answer.readline().startswith(b"data: ")
        body = json.dumps({"model": "tiny", "messages": HELLO})
        status, headers, content = server.request("POST", CHAT, body, JSON)
        assert status == 429 and headers["Retry-After"] == "1"
        assert json.loads(content)["error"]["type"] == "rate_limit_error"
        health = json.loads(server.request("GET", "/health")[2])
        assert health["busy"] == 6
    server.engine.wait_until_free()  # since both clients have gone
    server.engine.gate.set()
    assert chat(server)[0] == 200


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("abruptly", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, log, streams, abruptly):
    server.engine.gate.clear()
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": streams}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.engine.wait_until_busy()
        if abruptly:  # with a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.engine.wait_until_free()
    [job] = server.engine.ended
    assert job.is_cancelled and not job.row.tokens
    log.wait_for(f"POST {CHAT} 499 ")
    server.engine.gate.set()
    assert chat(server)[0] == 200


def test_an_error_of_the_engine(server, script):
    def broken(job):
        yield from job.prompt[:1]
        raise RuntimeError("no memory")

    good, script["do"] = script["do"], broken
    status, found = chat(server)
    assert status == 500 and "no memory" in found["error"]["message"]
    assert found["error"]["type"] == "server_error"
    events = server.events(CHAT, model="tiny", messages=HELLO)
    assert "no memory" in json.loads(events[-1])["error"]["message"]
    script["do"] = good
    assert chat(server)[0] == 200


def test_what_breaks_in_a_request_is_an_error_of_the_server(server, monkeypatch, caplog):
    monkeypatch.setattr(server.engine, "submit", None)
    status, found = chat(server)
    assert status == 500 and found["error"]["message"] == "the server failed."
    monkeypatch.undo()
    assert chat(server)[0] == 200 and "a request failed" in caplog.text


def test_running_answers_end_after_a_signal(server):
    """The first signal refuses what is new, and lets what runs end."""
    server.engine.gate.clear()
    with server.answer(CHAT, **STREAM) as answer:
        server.server.handle_exit(15, None)
        while json.loads(server.request("GET", "/health")[2])["status"] == "ok":
            pass
        assert server.request("GET", "/health")[0] == 503
        status, found = chat(server)
        assert status == 503 and "about to end" in found["error"]["message"]
        server.engine.gate.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")
    server.engine._thread.join(60)
    assert not server.engine._thread.is_alive()


class SlowEmbedder:
    """Gives a vector when it is told to."""

    name = "slow"

    def __init__(self):
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    async def embed(self, fields):
        self.has_begun.set()
        assert await asyncio.to_thread(self.may_end.wait, 60)
        return {"data": [], "usage": {"prompt_tokens": 3}}

    def close(self):
        pass


def test_running_embeddings_end_after_a_signal():
    embedder = SlowEmbedder()
    with serving(embedder=embedder) as server, contextlib.closing(server.connect()) as client:
        client.request("POST", "/v1/embeddings", json.dumps({"model": "slow", "input": "a"}), JSON)
        assert embedder.has_begun.wait(60)
        server.server.handle_exit(15, None)
        while json.loads(server.request("GET", "/health")[2])["status"] == "ok":
            pass
        assert not server.server.should_exit
        embedder.may_end.set()
        answer = client.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["data"] == []


def test_a_second_signal_ends_at_once(server):
    server.engine.gate.clear()
    with server.answer(CHAT, **STREAM) as answer:
        server.server.handle_exit(15, None)
        server.server.handle_exit(15, None)
        content = answer.read()
        assert b"[DONE]" not in content
    assert server.engine.jobs[0].is_cancelled


@pytest.mark.parametrize("number", range(len(dict.fromkeys(ATTACKS))))
def test_odd_and_broken_requests(shared, monkeypatch, number):
    """Three of each kind, of which the script sends many."""
    monkeypatch.setattr(body_module, "PAUSE", 0.2)
    target = Target(shared.port, "tiny")
    for seed in range(3):
        list(dict.fromkeys(ATTACKS))[number](target, random.Random(seed))
    shared.engine.wait_until_free()
    assert all(x == "none" or x < 500 for x in target.statuses), target.statuses
    assert chat(shared)[0] == 200


def test_every_field_of_openai_is_known(server):
    """What the documentation of OpenAI names is done, or refused by its name."""
    types = pytest.importorskip("openai.types")
    chats = types.chat.completion_create_params.CompletionCreateParamsNonStreaming
    texts = types.completion_create_params.CompletionCreateParamsNonStreaming
    for path, params, given in (
        (CHAT, chats, {"messages": HELLO}),
        (COMPLETIONS, texts, {"prompt": "a"}),
    ):
        known = server.post(path, model="tiny", **given, zzz=1)[1]["error"]["message"]
        assert "is no field" in known
        assert set(params.__annotations__) <= set(re.findall(r"\w+", known))
