"""Odd and broken requests against a server: it must live, its rows be free, its memory level.

    python tests/serving_hostile.py [--requests 1000] [--seed 0] [--path CHECKPOINT]

starts `jaxformers serve` on a free port, with a tiny random model unless a checkpoint is given. The
status is 1 if an answer is an error of the server, a row stays in use, the same request gives
another text at the end than at the beginning, the memory grows, or SIGTERM does not end it.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECONDS = 60  # for an answer
THREADS = 6
# Growth of the memory, after a quarter of the requests, that is still level: the allocator's pages.
LEVEL = 64 * 2**20
JSON = "Content-Type: application/json\r\n"
ODD = [
    "\x00",
    "\u202e",
    "é" * 50,
    "👩‍👩‍👧",
    "\ud7ff",
    "<|endoftext|>",
    "}{",
    '"',
    "\\",
    "\r\n\r\n",
    "ﷺ",
]
NUMBERS = [-1, 0, 1, 2, 3.5, 1e300, -0.0, 10**25, 2**31, 2**63, 1e-320]
METHODS = "PUT", "TRACE", "OPTIONS", "DELETE", "HEAD", "CONNECT", "BREW"
FIELDS = (
    "model messages prompt n stop max_tokens max_completion_tokens temperature top_p seed stream "
    "logprobs top_logprobs logit_bias response_format frequency_penalty presence_penalty user "
    "tools stream_options echo suffix best_of store metadata top_k min_p repetition_penalty input"
).split()


class Target:
    """A server, and what its answers were.

    Arguments:
        port: of this machine.
        model: its name.
    """

    def __init__(self, port, model):
        self.port, self.model = port, model
        self.statuses = collections.Counter()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def send(self, data, reads=True, resets=False):
        """Sends bytes, and counts the status of the answer if it is read."""
        with contextlib.suppress(ConnectionError, TimeoutError), self.connect() as client:
            for part in [data] if isinstance(data, bytes) else data:
                client.sendall(part)
            if reads:
                self.count(client)
            if resets:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def count(self, client):
        """Reads an answer to its end, and counts its status."""
        found = http.client.HTTPResponse(client)
        try:
            found.begin()
            found.read()
            self.statuses[found.status] += 1
        except (http.client.HTTPException, ValueError):
            self.statuses["none"] += 1

    def request(self, path, body, head=JSON):
        """Returns a request as bytes."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        begin = f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n"
        return begin.encode() + body

    def chat(self, **fields):
        message = {"role": "user", "content": "Hello"}
        return {"model": self.model, "messages": [message], "max_tokens": 20, **fields}


def noise(target, rng):
    target.send(rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n")


def half_a_head(target, rng):
    data = target.request(CHAT, target.chat())
    target.send(data[: rng.randint(1, 80)], reads=False)


def half_a_body(target, rng):
    data = target.request(CHAT, target.chat())
    target.send(data[: -rng.randint(1, 60)], reads=False, resets=rng.random() < 0.5)


def wrong_lengths(target, rng):
    body = json.dumps(target.chat()).encode()
    length = rng.choice(["-1", "1e3", str(len(body) - 9), "0", "99999999999999999999", "x", ""])
    more = rng.choice(["", "Transfer-Encoding: chunked\r\n", "Content-Length: 3\r\n"])
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{JSON}{more}Content-Length: {length}\r\n\r\n"
    target.send(head.encode() + body, reads=len(length) < 9)


def wrong_chunks(target, rng):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n".encode()
    target.send(
        head
        + rng.choice([b"zz\r\n", b"-5\r\nabc", b"FFFFFFFFFFFFFFFFFFFF\r\n", b"5\r\nabcdefgh\r\n"])
    )


def odd_heads(target, rng):
    line = rng.choice(
        [
            f"GET /{'x' * 70_000} HTTP/1.1",
            "GET /v1/models HTTP/9.9",
            "GET /v1/models",
            "PRI * HTTP/2.0",
            "GET /%00%ff%2e%2e/%2e%2e/etc/passwd HTTP/1.1",
            "GET http://elsewhere/v1/models HTTP/1.1",
            "GET * HTTP/1.1",
            "\x16\x03\x01\x02\x00\x01",
            f"{rng.choice(METHODS)} {CHAT} HTTP/1.1",
            "GET /v1/models/" + "%F0%9F" * 100 + " HTTP/1.1",
        ]
    )
    more = rng.choice(
        [
            "",
            f"X: {'y' * 100_000}\r\n",
            "X: y\r\n" * 3000,
            "Authorization: Bearer \xff\xfe\r\n",
            "Upgrade: websocket\r\nConnection: Upgrade\r\n",
            "Expect: 100-continue\r\n",
            " folded: x\r\n",
        ]
    )
    target.send(f"{line}\r\nHost: x\r\n{more}Connection: close\r\n\r\n".encode("latin-1"))


def odd_bodies(target, rng):
    depth = rng.choice([60, 100, 100_000])
    body = rng.choice(
        [
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b'{"n": ' + b"9" * rng.choice([20, 400, 50_000]) + b"}",
            b'{"temperature": NaN}',
            b'{"model": "\xff\xfe"}',
            b'{"model": "\\ud83d"}',
            b"\xef\xbb\xbf{}",
            "{}".encode("utf-16"),
            json.dumps(target.chat()).encode()[: rng.randint(0, 90)],
            json.dumps({"model": target.model, "prompt": [1] * 200_000}).encode(),
            json.dumps(
                target.chat(messages=[{"role": "user", "content": "x" * 3_000_000}])
            ).encode(),
        ]
    )
    target.send(target.request(rng.choice([CHAT, COMPLETIONS, "/v1/embeddings"]), body))


def large_bodies(target, rng):
    size = rng.choice([9, 12]) * 2**20
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {size}\r\n\r\n".encode()
    part = b" " * 2**18
    target.send([head, *[part] * (size // len(part))], reads=rng.random() < 0.5)


def odd_fields(target, rng):
    """A good request in which a few fields have other values."""
    body = target.chat(max_tokens=rng.randint(1, 30))
    if rng.random() < 0.4:
        body["prompt"] = rng.choice(["Hello", "", ["a", "b"], [1, 2, 3], [[5], [7, 9]]])
        del body["messages"]
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = value(rng)
    path = COMPLETIONS if "prompt" in body else CHAT
    target.send(target.request(path, body))


def value(rng, depth=0):
    """Returns a value of JSON of any kind."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if kind == 7:
        return {
            rng.choice([*FIELDS, *ODD]): value(rng, depth + 1) for _ in range(rng.randint(0, 3))
        }
    return (True, None, rng.choice(NUMBERS), rng.choice(ODD), "text", rng.randint(-3, 9))[kind]


def odd_texts(target, rng):
    content = "".join(rng.choice([*ODD, chr(rng.randrange(0xD000)), "word "]) for _ in range(20))
    body = target.chat(messages=[{"role": "user", "content": content}], stop=rng.sample(ODD, 2))
    body |= {"stream": rng.random() < 0.5, "temperature": rng.choice([0, 1, 2]), "max_tokens": 15}
    target.send(target.request(CHAT, body | {"logprobs": True, "top_logprobs": rng.randint(0, 20)}))


def odd_schemas(target, rng):
    wide = {"type": "string", "maxLength": rng.choice([10, 3000, 10**9])}
    schema = rng.choice(
        [
            {"$ref": "#"},
            {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]},
            {"enum": [f"{i:030}" for i in range(800)]},
            {"type": "string", "pattern": "(a|a)*" * 20 + "b"},
            {"type": "string", "pattern": rng.choice(["(", "[^a]{900}x", "(?=a)", "\\p{L}+"])},
            {"type": "object", "properties": {f"p{i}": wide for i in range(rng.choice([3, 40]))}},
            {"type": "array", "items": wide, "minItems": 3, "maxItems": rng.choice([2, 40, 10**8])},
            {"type": "integer", "minimum": 10**20, "exclusiveMaximum": -5},
            {"type": ["string", 3]},
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
            {"type": "object", "additionalProperties": True},
        ]
    )
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    target.send(target.request(CHAT, target.chat(response_format=format_, max_tokens=12)))


def leaving(target, rng):
    """A client that goes away at any time, with or without reading some of its answer."""
    body = target.chat(
        stream=rng.random() < 0.7, max_tokens=rng.randint(1, 60), n=rng.randint(1, 3)
    )
    with contextlib.suppress(ConnectionError, TimeoutError), target.connect() as client:
        client.sendall(target.request(CHAT, body))
        time.sleep(rng.choice([0, 0.001, 0.01, 0.1, 0.3]))
        if rng.random() < 0.5:
            client.recv(rng.randint(1, 600))
        if rng.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_closed(target, rng):
    with contextlib.suppress(ConnectionError, TimeoutError, OSError), target.connect() as client:
        client.sendall(target.request(CHAT, target.chat(stream=True)))
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass


def slow_writers(target, rng):
    data = target.request(CHAT, target.chat())
    with contextlib.suppress(ConnectionError, TimeoutError), target.connect() as client:
        for i in range(0, len(data), 40):
            client.sendall(data[i : i + 40])
            time.sleep(0.02)
            if rng.random() < 0.03:
                return
        target.count(client)


def slow_readers(target, rng):
    with contextlib.suppress(ConnectionError, TimeoutError), target.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.sendall(target.request(CHAT, target.chat(stream=True, max_tokens=40, logprobs=True)))
        for _ in range(10):
            client.recv(50)
            time.sleep(0.02)


def pipelined(target, rng):
    one = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    target.send(one * rng.randint(2, 30) + target.request(CHAT, target.chat()), reads=False)


def silent(target, rng):
    with contextlib.suppress(ConnectionError, TimeoutError), target.connect():
        time.sleep(rng.choice([0, 0.05, 0.5]))


ATTACKS = [
    *(noise, half_a_head, half_a_body, wrong_lengths, wrong_chunks, odd_heads, odd_bodies),
    *(large_bodies, odd_fields, odd_texts, odd_schemas, leaving, half_closed, slow_writers),
    *(slow_readers, pipelined, silent, odd_fields, odd_fields, leaving, odd_heads),
]


def ask(target, method, path, body=None):
    """Returns what a good request gives."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"a good request got {answer.status}: {content[:300]!r}")
        return json.loads(content)


def greedy(target):
    body = json.dumps(target.chat(temperature=0))
    return ask(target, "POST", CHAT, body)["choices"][0]["message"]["content"]


def attack(target, seeds):
    """Sends a request for each seed, several at a time."""
    waiting, lock = list(seeds), threading.Lock()

    def work():
        while True:
            with lock:
                if not waiting:
                    return
                seed = waiting.pop()
            ATTACKS[seed % len(ATTACKS)](target, random.Random(seed))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def wait_until_free(target):
    """Returns when no row is in use, or ends the script."""
    end = time.monotonic() + SECONDS
    while (counts := ask(target, "GET", "/health"))["busy"] or counts["waiting"]:
        if time.monotonic() > end:
            raise SystemExit(f"rows stay in use: {counts}")
        time.sleep(0.1)


def memory_of(process):
    """Returns the bytes of a process in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def make_checkpoint(directory):
    """Writes a tiny random model with a tokenizer of bytes."""
    import jax
    from test_text_generator import TEMPLATE, V, tokenizer_of
    from test_token_text import byte_level

    from jaxformers import TransformerLM

    sizes = {"d_model": 24, "num_heads": 4, "num_layers": 2, "d_ff": 40, "max_seq_length": 160}
    options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
    TransformerLM(V, **sizes, **options, key=jax.random.key(3)).save_pretrained(directory)
    tokenizer_of(byte_level(), eos_token="<|endoftext|>", chat_template=TEMPLATE).save(directory)


@contextlib.contextmanager
def server_of(path, log, more=("--waiting", "8")):
    """Yields the process of a server and where it listens."""
    command = [sys.executable, "-m", "jaxformers", "serve", str(path), "--port", "0", "--name", "m"]
    command += ["--rows", "4", "--context", "160", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            line = process.stdout.readline()
            port = re.search(r":(\d+)/v1", line)
            if port is None:
                raise SystemExit(f"the server did not begin: {line}")
            yield process, Target(int(port[1]), "m")
        finally:
            if process.poll() is None:
                process.kill()


def read_options(text, **numbers):
    """Returns the options of a script, whose help begins as `text`."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--path", help="a checkpoint (default: a tiny random one)")
    return parser.parse_args()


@contextlib.contextmanager
def checkpoint_of(options):
    """Yields the checkpoint of the options, and a folder for a while."""
    with tempfile.TemporaryDirectory() as directory:
        if options.path is None:
            make_checkpoint(Path(directory))
        yield options.path or directory, Path(directory)


def main():
    options = read_options(__doc__, requests=1000, seed=0)
    with checkpoint_of(options) as (path, directory):
        log_path = directory / "log"
        with log_path.open("w") as log, server_of(path, log) as (process, target):
            check(process, target, options)
        text = log_path.read_text()
    if "Traceback" in text:
        print(text[-3000:])
        raise SystemExit("the log has a traceback")
    print(f"{text.count(chr(10))} lines of log")


def check(process, target, options):
    """Attacks a server, and ends the script if it does not hold."""
    begun, wanted = time.monotonic(), greedy(target)
    seeds = range(options.seed, options.seed + options.requests)
    quarter = len(seeds) // 4
    for seed in range(60):  # the largest automata, whose memory the allocator keeps
        odd_schemas(target, random.Random(seed))
    attack(target, seeds[:quarter])
    wait_until_free(target)
    before = memory_of(process)
    attack(target, seeds[quarter:])
    wait_until_free(target)
    after = memory_of(process)
    print(f"{len(seeds)} requests in {time.monotonic() - begun:.0f} s: {dict(target.statuses)}")
    print(f"memory {before / 2**20:.0f} MB after a quarter, {after / 2**20:.0f} MB at the end")
    failed = {x: n for x, n in target.statuses.items() if x != "none" and x >= 500 and x != 503}
    if failed:
        raise SystemExit(f"errors of the server: {failed}")
    if after - before > LEVEL:
        raise SystemExit("the memory grows")
    if (got := greedy(target)) != wanted:
        raise SystemExit(f"the same request gives {got!r}, and gave {wanted!r}")
    files = len(os.listdir(f"/proc/{process.pid}/fd"))
    print(f"{files} open files, the same text as at the beginning")
    process.send_signal(signal.SIGTERM)
    if (status := process.wait(SECONDS)) != 0:
        raise SystemExit(f"after SIGTERM the status is {status}")


if __name__ == "__main__":
    main()
