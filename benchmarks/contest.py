"""Measures contenders beside each other, each in its own process and in turns.

A script that uses this module names its contenders. A contender is a function that builds a step:

    def ours(config):
        ...
        return step, check      # step() does the work once; check() gives numbers to compare

A step that returns a float has timed itself: these are its seconds.

    if __name__ == "__main__":
        contest.main(__doc__, {"ours": ours, "torch": torch_eager}, CONFIGS)

Every contender runs in a child process, so that none shares another's threads, caches or allocator.
It waits while another one works. Times are medians over rounds in which each contender runs once,
so that a machine that is slow for a minute is slow for all. The numbers of `check` must agree
before anything is timed.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

Contender = Callable[[dict], tuple[Callable[[], Any], Callable[[], list[float]]]]
# Takes a configuration, a contender's name, its numbers and the first one's. Returns what the table
# says of the numbers, and raises ValueError if they do not agree.
Compare = Callable[[dict, str, list[float], list[float]], str]

# Memory that was returned to the system is fetched again page by page. These settings of glibc keep
# it in the process. They are read when a process starts.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "kept": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(2**26),
    },
}


class Child:
    """A contender in its own process."""

    def __init__(self, script: str, name: str, config: dict, environment: dict[str, str]):
        command = [sys.executable, script, "--child", name, "--config-json", json.dumps(config)]
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Contenders on one accelerator share its memory.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **environment},
        )

    def ask(self, question: str) -> Any:
        """Returns the contender's answer, which `answer` below makes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:  # other lines come from libraries
                if line.startswith("\x02"):
                    return json.loads(line[1:])
        except BrokenPipeError:
            pass
        raise SystemExit(f"{self.name} ended with code {self.process.wait()}; see its error above.")

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()  # closes the pipes


def answer(make: Contender, config: dict) -> None:
    """Builds a contender in the child process and answers until there are no more questions."""
    start = time.perf_counter()
    step, check = make(config)
    built = {"build_seconds": time.perf_counter() - start}
    for question in sys.stdin:
        if question.strip() == "check":
            reply: Any = [float(x) for x in check()]
        else:
            reply = turn(step, int(question)) | built
        print("\x02" + json.dumps(reply), flush=True)


def turn(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Returns the time of a step, its page faults, and the memory."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = sum(timed(step) for _ in range(repeats)) / repeats
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "faults": (after.ru_minflt - before.ru_minflt) / repeats,
        "peak_bytes": peak_bytes(after),
    }


def timed(step: Callable[[], Any]) -> float:
    """Returns the seconds of a step, which may have timed itself."""
    start = time.perf_counter()
    result = step()
    elapsed = time.perf_counter() - start
    return result if isinstance(result, float) else elapsed


def peak_bytes(usage: Any) -> int:
    """Returns the peak memory of the process, on the accelerator if there is one, else resident."""
    if "jax" in sys.modules:
        statistics_ = sys.modules["jax"].local_devices()[0].memory_stats()
        if statistics_ and "peak_bytes_in_use" in statistics_:
            return statistics_["peak_bytes_in_use"]
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compete(
    script: str,
    names: list[str],
    config: dict,
    *,
    rounds: int,
    repeats: int,
    environment: dict[str, str],
    compare: Compare,
) -> dict[str, dict]:
    """Returns the medians of every contender, whose numbers must agree with the first one's."""
    children: list[Child] = []
    checks, told = {}, {}
    try:
        for name in names:  # one after the other, since they would be slow together
            children.append(Child(script, name, config, environment))
            checks[name] = children[-1].ask("check")
        reference = checks[names[0]]
        for name, numbers in checks.items():
            try:
                told[name] = compare(config, name, numbers, reference)
            except ValueError as error:
                raise SystemExit(f"{name} does not compute what {names[0]} does: {error}") from None
        turns: dict[str, list[dict]] = {name: [] for name in names}
        for i in range(rounds + 1):  # the first one warms up
            for child in children if i % 2 else children[::-1]:
                reply = child.ask(str(repeats))
                time.sleep(0.3)  # threads that wait by spinning stop
                if i:
                    turns[child.name].append(reply)
    finally:
        for child in children:
            child.close()
    first = statistics.median(turn["seconds"] for turn in turns[names[0]])
    return {
        name: summary(turns[name], first) | {"check": checks[name], "agreement": told[name]}
        for name in names
    }


def within(
    tolerance: float, config: dict, name: str, numbers: list[float], first: list[float]
) -> str:
    """Raises `ValueError` if a number is farther than a tolerance from the first one's."""
    tolerance = config.get("tolerance", tolerance)
    pairs = zip(first, numbers, strict=True)
    if not all(abs(a - b) <= tolerance for a, b in pairs):  # NaN does not agree
        raise ValueError(f"{numbers} and {first}.")
    return ""


def summary(turns: list[dict], first: float) -> dict:
    seconds = sorted(turn["seconds"] for turn in turns)
    median = statistics.median(seconds)
    quarter = len(seconds) // 4
    return {
        "seconds": median,
        "ratio": first / median,
        "spread": (seconds[-1 - quarter] - seconds[quarter]) / median,
        "faults": statistics.median(turn["faults"] for turn in turns),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "build_seconds": turns[0]["build_seconds"],
    }


def machine() -> str:
    """Returns the machine and the versions of the measurement."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return f"{os.cpu_count()} cores of {name}"


def found_gpu() -> str | None:
    """Returns the name of the GPU that JAX finds, from another process, as JAX takes its memory."""
    program = (
        "import jax, json; print(json.dumps([(d.platform, d.device_kind) for d in jax.devices()]))"
    )
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    devices = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else []
    return next((name for platform, name in devices if platform == "gpu"), None)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    libraries = "jax", "jaxlib", "equinox", "flax", "optax", "torch", "transformers"
    others = "llama-cpp-python", "gguf"
    plugins = "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"
    for package in libraries + others + plugins:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def installed(*packages: str) -> bool:
    """Returns whether all of these can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)


def show(title: str, results: Mapping[str, dict], first: str, remark: Callable) -> None:
    """Returns a table of each contender's time, and of the first one's time over it."""
    print(f"\n{title}")
    print(f"{'':22} {'ms':>9} {first + ' / it':>14} {'spread':>7} {'peak MB':>8} {'faults':>8}")
    for name, row in results.items():
        print(
            f"{name:22} {1e3 * row['seconds']:9.2f} {row['ratio']:14.2f} {row['spread']:6.0%} "
            f"{row['peak_bytes'] / 1e6:8.0f} {row['faults']:8.0f} {remark(row)}{row['agreement']}",
            flush=True,
        )


def main(
    document: str,
    contenders: Mapping[str, Contender],
    configs: Mapping[str, dict],
    *,
    repeats: Mapping[str, int] | None = None,
    tolerance: float = 1e-3,
    compare: Compare | None = None,
    remark: Callable[[dict, dict], str] = lambda config, row: "",
    arguments: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
    prepare: Callable[[argparse.Namespace], dict] = lambda options: {},
) -> dict[str, dict]:
    """Runs the command line of a script, which compares its contenders on its configurations.

    Arguments:
        document: what the script says of itself.
        contenders: by name; the others are compared with the first.
        configs: by name; what the contenders are built from; `without` those named there, and
            with a `tolerance` of their own.
        repeats: how many steps make a turn, where one is too short to be timed.
        tolerance: how far the numbers of `check` may be from the first one's.
        compare: compares these numbers in another way.
        remark: what else to print of a row.
        arguments: adds arguments of the script's own.
        prepare: returns what all configurations have in addition, given the arguments.

    Returns:
        The rows of each configuration and allocator.
    """
    if sys.argv[1:2] == ["--child"]:  # as `Child` calls the script
        _, _, name, _, config = sys.argv
        answer(contenders[name], json.loads(config))
        return {}
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments(parser)
    parser.add_argument("configs", nargs="*", default=list(configs), help=", ".join(configs))
    parser.add_argument("--contenders", nargs="+", default=list(contenders))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--allocator", nargs="+", default=list(ALLOCATORS), choices=ALLOCATORS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_intermixed_args()
    unknown = {*options.configs} - {*configs}, {*options.contenders} - {*contenders}
    if unknown[0] or unknown[1]:
        parser.error(f"no such configuration or contender: {', '.join(unknown[0] | unknown[1])}")
    given = prepare(options)
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "results": {}}
    print(record["machine"], *(f"{k} {v}" for k, v in record["versions"].items()), sep=", ")
    for name in options.configs:
        config = configs[name] | given
        for allocator in options.allocator:
            left_out = config.get("without", ())
            names = [x for x in options.contenders if x not in left_out]
            results = compete(
                sys.argv[0],
                names,
                config,
                rounds=options.rounds,
                repeats=(repeats or {}).get(name, 1),
                environment=ALLOCATORS[allocator],
                compare=compare or partial(within, tolerance),
            )
            title = f"{name}, memory {allocator}: {configs[name]}"
            show(title, results, names[0], partial(remark, config))
            record["results"][f"{name}/{allocator}"] = results
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record["results"]
