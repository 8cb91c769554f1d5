"""Measures everything that is worth knowing on one NVIDIA GPU, in under ten minutes.

    pip install -e . 'jax[cuda13]'                   # or jax[cuda12], as the driver wants
    pip install torch transformers                   # with CUDA, for the columns of others
    python benchmarks/gpu.py [--only decode attention] [--text tinyshakespeare.txt] [--minutes 10]

It writes gpu.json and gpu.md, after every row. The parts are:

    card         a copy, and products of matrices in bfloat16 and float32
    cudnn        cuDNN's attention, asserted from the compiled program, at odd lengths as well
    train        GPT-2 124M in bfloat16, 16 x 1,024 tokens, beside torch.compile of nanoGPT's model
    attention    forward, and forward and backward, 1k to 64k, beside torch's
    shakespeare  nanoGPT's model of characters, for 5,000 steps, beside its published loss of 1.4697
    decode       124M, Llama 2 7B and 1.5B at batch 1, 64 and 8, in bfloat16 and with weights of 8
                 bits, beside transformers with a static cache

Each contender has a process of its own. The processes share the card, so JAX takes memory as it
needs it. A contender that fails or lacks memory is noted with its reason, and the others go on. So
is what finds no time. Times are medians of rounds in which contenders alternate. The first run of
each, which compiles, is apart. With --tiny, small sizes run on any device, to try this program.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
import traceback
from functools import cache
from pathlib import Path

import contest
from gpu_contenders import CONTENDERS
from gpu_parts import Part, all_parts
from gpu_table import FORMULAS, card, table

TURN_SECONDS, MOST_REPEATS = 0.2, 50


class Worker:
    """Answers the questions about one contender, in its process."""

    def __init__(self, name: str, config: dict):
        self.name, self.config = name, config
        self.prepare = None
        self.steps: dict = {}
        self.repeats: dict[str, int] = {}

    def answer(self, question: str) -> dict:
        """Returns the facts of a setting, or, if asked for the "time", the seconds of each step."""
        try:
            asked = json.loads(question)
            return self.turn() if asked == "time" else self.build(asked)
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split())[:300]
            return {"failed": f"{type(error).__name__}: {told}"}

    def build(self, setting: dict) -> dict:
        self.steps = {}  # the memory of the setting before
        gc.collect()
        start = time.perf_counter()
        if self.prepare is None:
            self.prepare = CONTENDERS[self.name](self.config)
        made = time.perf_counter()
        self.steps, facts = self.prepare(setting)
        for step in self.steps.values():
            step()
        first = time.perf_counter() - made
        for name, step in self.steps.items():
            begin = time.perf_counter()
            step()
            count = TURN_SECONDS / (time.perf_counter() - begin)
            self.repeats[name] = max(1, min(MOST_REPEATS, int(count)))
        return {"facts": facts, "build_seconds": made - start, "first_seconds": first}

    def turn(self) -> dict:
        seconds = {}
        for name, step in self.steps.items():
            begin = time.perf_counter()
            for _ in range(self.repeats[name]):
                step()
            seconds[name] = (time.perf_counter() - begin) / self.repeats[name]
        peak = contest.peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
        return {"seconds": seconds, "peak_bytes": peak}


class Contenders:
    """The processes of a part. One that ends is started again for the next setting."""

    def __init__(self, part: Part, deadline: float):
        self.part, self.deadline = part, deadline
        self.children: dict[str, contest.Child] = {}

    def ask(self, name: str, question: object) -> dict:
        """Returns the answer, or why there is none."""
        left = self.deadline - time.perf_counter()
        if left <= 0:
            return {"skipped": "no time was left"}
        if name not in self.children:
            script, contender = str(Path(__file__).resolve()), self.part.contenders[name]
            self.children[name] = contest.Child(script, contender, self.part.config, {})
        child = self.children[name]
        timer = threading.Timer(left, child.process.kill)
        timer.start()
        try:
            return child.ask(json.dumps(question))
        except SystemExit as end:
            self.children.pop(name).close()
            if time.perf_counter() >= self.deadline:
                return {"skipped": "it was not done when the time was over"}
            return {"failed": str(end)}
        finally:
            timer.cancel()

    def close(self) -> None:
        for child in self.children.values():
            child.close()


def measure(part: Part, contenders: Contenders, missing: dict[str, str]):
    """Yields the rows of each setting of a part."""
    for label, setting in part.settings.items():
        rows = {}
        for name in part.contenders:
            row = {"part": part.title, "setting": label, "contender": name, "remark": part.remark}
            told = {"skipped": missing[name]} if name in missing else contenders.ask(name, setting)
            rows[name] = row | told
        check_agreement(rows, part.config.get("tolerance", 0.05))
        timed = [name for name, row in rows.items() if "facts" in row]
        turns: dict[str, list[dict]] = {name: [] for name in timed}
        for i in range(part.rounds):
            for name in timed if i % 2 else timed[::-1]:
                turn = {} if "failed" in rows[name] else contenders.ask(name, "time")
                if "seconds" in turn:
                    turns[name].append(turn)
                else:
                    rows[name] |= turn
        for name in timed:
            add_times(rows[name], turns[name])
        add_ratios(list(rows.values()))
        yield from rows.values()


def check_agreement(rows: dict[str, dict], tolerance: float) -> None:
    """Marks contenders that do not compute what the first one does."""
    given = {
        name: row["facts"]["check"] for name, row in rows.items() if "check" in row.get("facts", {})
    }
    first, *others = given or [""]
    for name in others:
        pairs = zip(given[first], given[name], strict=True)
        if not all(abs(a - b) <= tolerance for a, b in pairs):  # NaN does not agree
            rows[name]["failed"] = f"it computes {given[name]}, and {first} {given[first]}"


def add_times(row: dict, turns: list[dict]) -> None:
    """Adds the median of the turns, of the difference of two runs where there are two."""
    facts = row["facts"]
    tokens = facts["new"] - facts["fewer"] if "new" in facts else None
    seconds = [
        turn["seconds"]["step"]
        if tokens is None
        else (turn["seconds"]["new"] - turn["seconds"]["fewer"]) / tokens
        for turn in turns
        if turn["seconds"]
    ]
    if seconds and statistics.median(seconds) > 0:
        row["seconds"], row["turns"] = statistics.median(seconds), seconds
        row["peak_bytes"] = turns[-1]["peak_bytes"]
        row["rates"] = {
            name: facts[name] / row["seconds"]
            for name in ("bytes", "flops", "tokens")
            if name in facts
        }
    elif seconds:
        row["skipped"] = "the difference of the two runs is too short to be timed"


def add_ratios(rows: list[dict]) -> None:
    for row in rows:
        if "seconds" in row and "seconds" in rows[0]:
            row["ratio"] = rows[0]["seconds"] / row["seconds"]


@cache
def torch_problem(gpu: bool) -> str | None:
    """Returns why torch cannot be measured, or None."""
    if not contest.installed("torch"):
        return "torch is not installed"
    program = "import torch; print(torch.cuda.is_available(), torch.__version__)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if run.returncode:
        return f"torch cannot be imported: {run.stderr.strip().splitlines()[-1]}"
    found, version = run.stdout.split()
    return f"torch {version} finds no CUDA device" if gpu and found == "False" else None


def missing(part: Part, gpu: bool) -> dict[str, str]:
    """Returns why contenders cannot be measured, by name."""
    found = {}
    for name, contender in part.contenders.items():
        if contender == "shakespeare" and not Path(part.config["text"]).is_file():
            found[name] = f"there is no file {part.config['text']}; pass --text FILE"
        elif contender == "Hugging Face" and not contest.installed("transformers"):
            found[name] = "transformers is not installed"
        elif "torch" in contender or contender == "Hugging Face":
            found |= {name: why} if (why := torch_problem(gpu)) else {}
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(part.name for part in all_parts(False, "")))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together (10)")
    parser.add_argument("--text", default="tinyshakespeare.txt", help="the text of shakespeare")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--markdown", type=Path, default=Path("gpu.md"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--config-json", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if something failed, else 0."""
    deadline = time.perf_counter()
    options = parse(arguments)
    if options.child:
        worker = Worker(options.child, json.loads(options.config_json))
        for question in sys.stdin:
            print("\x02" + json.dumps(worker.answer(question)), flush=True)
        return 0
    deadline += 60 * options.minutes
    gpu = contest.found_gpu()
    if gpu is None and not options.tiny:
        raise SystemExit("JAX finds no GPU. --tiny tries this program on any device.")
    record = {"gpu": gpu, "card": card(), "machine": contest.machine()}
    record |= {"versions": contest.versions(), "minutes": options.minutes, "tiny": options.tiny}
    record |= {"formulas": FORMULAS, "rows": []}
    for part in all_parts(options.tiny, options.text):
        if part.name not in {*options.only, "card"}:  # its bandwidth is what others are shares of
            continue
        contenders = Contenders(part, deadline)
        try:
            for row in measure(part, contenders, missing(part, gpu is not None)):
                record["rows"].append(row)
                options.json.write_text(json.dumps(record, indent=1) + "\n")
                options.markdown.write_text(table(record))
                print(table(record).split("\n- ")[0].strip().splitlines()[-1], flush=True)
        finally:
            contenders.close()
    return int(any("failed" in row for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
