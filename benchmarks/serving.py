"""Measures the server beside `generate`: one client alone, and sixteen at once.

    python benchmarks/serving.py CHECKPOINT [--rows N] [--tokens N] [--rounds N]

CHECKPOINT is a decoder with its tokenizer, a directory or a GGUF file. The server runs in a process
of its own. In each round, `generate` continues prompts at batch 1, then one client asks the server
for the same, then sixteen clients ask at once. It prints tokens per second, and the medians of the
ratios over `generate` of the same round. The prompts have 20 to 100 tokens.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np

from jaxformers import TextGenerator

CLIENTS, ALONE = 16, 4


def start(checkpoint, rows):
    """Starts a server, and returns its process and its address once it is ready."""
    command = [sys.executable, "-m", "jaxformers", "serve", checkpoint, "--port", "0"]
    server = subprocess.Popen(
        [*command, "--rows", str(rows)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = server.stdout.readline()
    if "http://" not in line:
        sys.exit(f"the server did not start: {line}")
    return server, urlsplit(line.split()[-1]).netloc


def ask(address, model, ids, tokens):
    """Returns how many new tokens a request has got."""
    body = {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0}
    connection = http.client.HTTPConnection(address, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = json.load(connection.getresponse())
    connection.close()
    return answer["usage"]["completion_tokens"]


def timed(run):
    """Returns the tokens per second of a function that returns a number of tokens."""
    begin = time.perf_counter()
    return run() / (time.perf_counter() - begin)


def at_once(address, model, prompts, tokens):
    """Returns the number of new tokens of clients that ask at the same time."""
    counts = [0] * len(prompts)

    def client(i):
        counts[i] = ask(address, model, prompts[i], tokens)

    threads = [threading.Thread(target=client, args=[i]) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    text = TextGenerator.from_pretrained(given.checkpoint)
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(100, text.model.vocab_size // 2, n).tolist()
        for n in rng.integers(20, 100, CLIENTS)
    ]

    def generate():
        total = 0
        for ids in prompts[:ALONE]:
            out = text.model.generate(np.array(ids), given.tokens, return_scores=True)
            total += int(np.count_nonzero(np.asarray(out.log_probs)))
        return total

    server, address = start(given.checkpoint, given.rows)
    connection = http.client.HTTPConnection(address)
    connection.request("GET", "/v1/models")
    model = json.load(connection.getresponse())["data"][0]["id"]
    connection.close()

    def alone():
        return sum(ask(address, model, ids, given.tokens) for ids in prompts[:ALONE])

    def all_at_once():
        return at_once(address, model, prompts, given.tokens)

    try:
        generate(), alone(), all_at_once()  # the first round compiles
        ratios = []
        for _ in range(given.rounds):
            base, one, many = timed(generate), timed(alone), timed(all_at_once)
            ratios.append((one / base, many / base))
            print(
                f"generate {base:.1f}, one client {one:.1f}, {CLIENTS} at once {many:.1f}",
                flush=True,
            )
        one, many = (statistics.median(x) for x in zip(*ratios, strict=True))
        print(f"over generate at batch 1: one client {one:.2f}, {CLIENTS} at once {many:.2f}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
