"""A server under load: many clients that wait their turn, some of which leave early.

    python tests/serving_load.py [--requests 1000] [--clients 32] [--seed 0] [--path CHECKPOINT]

starts `jaxformers serve` on a free port, with a tiny random model unless a checkpoint is given.
The prompts and the answers have random lengths. Every answer must be what `TextGenerator` gives
for its prompt alone. The status is 1 if one differs or is lost, if a row stays in use, or if the
memory grows.
"""

import contextlib
import http.client
import json
import random
import statistics
import threading
import time

from serving_hostile import (
    COMPLETIONS,
    LEVEL,
    SECONDS,
    checkpoint_of,
    memory_of,
    read_options,
    server_of,
    wait_until_free,
)

WORDS = "the cat sat on a mat and where was it then in Rome they say one two three".split()
LENGTHS = 3, 11, 24, 48  # of the answers, in tokens
LEAVING = 0.1


class Load:
    """The requests that are left, and what came of the others.

    Arguments:
        target: the server.
        wanted: the text for each prompt and length.
        count: of the requests.
        seed: of what they ask for.
    """

    def __init__(self, target, wanted, count, seed):
        self.target, self.wanted, self.random = target, wanted, random.Random(seed)
        self.left, self.lock = count, threading.Lock()
        self.answers = self.gone = self.tokens = 0
        self.wrong, self.seconds = [], []

    def work(self):
        """Sends one request after the other."""
        while True:
            with self.lock:
                if not self.left:
                    return
                self.left -= 1
                asked = self.random.choice(list(self.wanted))
                kinds = [self.random.random() for _ in range(3)]
            try:
                self.ask(asked, kinds[0] < LEAVING, kinds[1] < 0.5, kinds[2])
            except Exception as error:
                with self.lock:
                    self.wrong.append(f"{asked} failed: {error!r}")

    def ask(self, asked, leaves, streams, share):
        """Sends a request, and compares the answer if the client stays."""
        prompt, length = asked
        body = {"model": "m", "prompt": prompt, "max_tokens": length, "temperature": 0}
        body = json.dumps(body | {"stream": streams})
        begun = time.perf_counter()
        client = http.client.HTTPConnection("127.0.0.1", self.target.port, timeout=SECONDS * 5)
        with contextlib.closing(client):
            client.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            if leaves:
                time.sleep(share * 0.3)
                with self.lock:
                    self.gone += 1
                return
            answer = client.getresponse()
            text = read(answer.read(), streams) if answer.status == 200 else answer.read()
        with self.lock:
            self.answers += 1
            self.tokens += length
            self.seconds.append(time.perf_counter() - begun)
            if text != self.wanted[asked]:
                self.wrong.append(f"{asked} gave {text!r} for {self.wanted[asked]!r}")


def read(content, streams):
    """Returns the text of an answer."""
    if not streams:
        return json.loads(content)["choices"][0]["text"]
    events = content.decode().strip().split("\n\n")
    if events.pop() != "data: [DONE]":
        return f"an unfinished stream: {events[-1:]}"
    events = [json.loads(x.removeprefix("data: ")) for x in events]
    return "".join(x["choices"][0]["text"] for x in events)


def texts_of(path, seed, most):
    """Returns what `TextGenerator` gives for some prompts and lengths, each by itself."""
    from jaxformers import TextGenerator

    text, chosen = TextGenerator.from_pretrained(path), random.Random(seed)
    counts = [chosen.randint(1, most) for _ in range(12)]
    prompts = [" ".join(chosen.choice(WORDS) for _ in range(n)) for n in counts]
    return {(x, n): text(x, n, end_token=None) for x in prompts for n in LENGTHS}


def main():
    options = read_options(__doc__, requests=1000, clients=32, seed=0)
    with checkpoint_of(options) as (path, directory):
        wanted = texts_of(path, options.seed, 30)
        with (directory / "log").open("w") as log:
            with server_of(path, log, ("--waiting", str(options.clients))) as (process, target):
                check(process, target, wanted, options)


def check(process, target, wanted, options):
    """Sends the requests, and ends the script if anything is wrong."""
    begun, loads = time.perf_counter(), []
    for count in (options.requests // 4, options.requests - options.requests // 4):
        loads.append(Load(target, wanted, count, options.seed + len(loads)))
        threads = [threading.Thread(target=loads[-1].work) for _ in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until_free(target)
        loads[-1].memory = memory_of(process)
    seconds = time.perf_counter() - begun
    answers, gone = sum(x.answers for x in loads), sum(x.gone for x in loads)
    waited = sorted(x for load in loads for x in load.seconds)
    print(
        f"{answers} answers and {gone} clients that left in {seconds:.0f} s, at most "
        f"{sum(x.tokens for x in loads) / seconds:.0f} tokens a second; half of the answers within "
        f"{statistics.median(waited):.2f} s, all within {waited[-1]:.2f} s"
    )
    first, last = (x.memory for x in loads)
    print(f"memory {first / 2**20:.0f} MB after a quarter, {last / 2**20:.0f} MB at the end")
    wrong = [x for load in loads for x in load.wrong]
    if wrong or answers + gone != options.requests:
        raise SystemExit("\n".join([f"{len(wrong)} answers are wrong", *wrong[:5]]))
    if last - first > LEVEL:
        raise SystemExit("the memory grows")


if __name__ == "__main__":
    main()
