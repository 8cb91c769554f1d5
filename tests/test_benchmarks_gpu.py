"""benchmarks/gpu.py is tried with small sizes, since no test has a GPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module.contest, "installed", lambda *names: False)
    monkeypatch.setattr(module.contest, "found_gpu", lambda: None)
    return module


class SameProcess:
    """A contender in the process of the test, where programs are compiled once."""

    def __init__(self, script, name, config, environment):
        self.worker, self.process = sys.modules["gpu"].Worker(name, config), self

    def ask(self, question):
        return json.loads(json.dumps(self.worker.answer(question)))

    def close(self):
        pass

    kill = close


def rows_of(gpu, *arguments):
    code = gpu.main(["--tiny", *arguments])
    return code, json.loads(Path("gpu.json").read_text())["rows"]


def test_all_parts_run_with_small_sizes(gpu, monkeypatch):
    monkeypatch.setattr(gpu.contest, "Child", SameProcess)
    monkeypatch.setattr(gpu, "TURN_SECONDS", 0.0)
    Path("text.txt").write_text(("To be, or not to be, that is the question. " * 60)[:2570])
    *parts, gpt, llama, _ = gpu.all_parts(True, "text.txt")
    gpt.contenders = {"ours, int8": "decoding, int8"}
    llama.contenders = {"ours": "decoding"}
    parts = [*parts, gpt, llama]
    for part in parts:  # programs take seconds to compile
        first, *_, last = [*part.settings.items()] * 2
        part.settings = dict([first, last] if part.name == "cudnn" else [first])
    monkeypatch.setattr(gpu, "all_parts", lambda tiny, text: parts)
    code, rows = rows_of(gpu, "--text", "text.txt")
    assert code == 0, [row["failed"] for row in rows if "failed" in row]
    ours = [row for row in rows if row["contender"].startswith("ours")]
    assert all("facts" in row for row in ours)
    assert {row["part"] for row in ours} == {part.title for part in parts}
    others = [row for row in rows if row not in ours]
    assert others and all(row["skipped"] == "torch is not installed" for row in others)
    (facts,) = (row["facts"] for row in ours if row["part"] == "decode 124M")
    # 2 layers of 32 and 65 tokens: the matrices in 8 bits, and a number in 32 bits for each output,
    # each bias and each gain.
    matrices, outputs = 2 * 12 * 32 * 32 + 65 * 32, 2 * (4 + 4 + 1) * 32 + 65
    assert facts["weight_bytes"] == matrices + 4 * (outputs + 2 * (4 + 5 + 4) * 32 + 2 * 32)
    assert facts["cache_bytes"] == 2 * 2 * 32 * 4 * 69  # 64 tokens and the mean of 2 and 8
    page = Path("gpu.md").read_text()
    assert "100.0% of bandwidth" in page and "1.4697" in page and "no call of cuDNN" in page


def test_what_finds_no_time_is_noted(gpu):
    code, rows = rows_of(gpu, "--minutes", "0")
    assert code == 0
    told = {row["skipped"] for row in rows if row["contender"] == "ours"}
    assert told == {"no time was left", "there is no file tinyshakespeare.txt; pass --text FILE"}


def test_what_fails_is_noted_and_the_rest_goes_on(gpu, monkeypatch):
    parts = gpu.all_parts(True, "")[:2]
    for part in parts:
        part.contenders = {"ours": "none of this name"}
    monkeypatch.setattr(gpu, "all_parts", lambda tiny, text: parts)
    for part in parts:
        part.settings = dict([*part.settings.items()][:1])
    code, rows = rows_of(gpu)
    assert code == 1 and [row["part"] for row in rows] == ["card", "cudnn"]
    assert all(row["failed"] == "KeyError: 'none of this name'" for row in rows)
