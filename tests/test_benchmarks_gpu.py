"""benchmarks/gpu.py is tried with small sizes, since no test has a GPU."""

import importlib
import json
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


def rows_of(gpu, *arguments):
    code = gpu.main(["--tiny", *arguments])
    return code, json.loads(Path("gpu.json").read_text())["rows"]


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
