"""The scripts as a stranger runs them, cut short."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = "--steps 3 --batch-size 4 --d-model 16 --num-heads 2 --num-layers 1".split()

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")


def run(*args, **kwargs):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def train(tmp_path, *args, env=None):
    curve = "--curve", tmp_path / "curve.png"
    return run(ROOT / "train_example.py", *args, *TINY, *curve, cwd=tmp_path, env=env)


@pytest.mark.parametrize("task", [[], ["copy"]])
def test_the_letter_tasks(tmp_path, task):
    result = train(tmp_path, *task)
    assert result.returncode == 0, result.stderr
    assert "% of 2000 held-out sequences exactly right" in result.stdout
    assert re.fullmatch("weights sha256 [0-9a-f]{64}", result.stdout.splitlines()[-1])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_shakespeare_on_a_text_of_ones_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Sein oder nicht sein, das ist hier die Frage. Übermäßig!\n" * 40, "utf-8")
    shorter = "--context", "16", "--eval-every", "2"
    result = train(tmp_path, "shakespeare", "--data", text, *shorter)
    assert result.returncode == 0, result.stderr
    for words in ("validation loss", "perplexity", "sample at temperature 0.8", "loss curve"):
        assert words in result.stdout


def test_shakespeare_without_a_network_says_what_to_do(tmp_path):
    offline = os.environ | {"https_proxy": "http://127.0.0.1:9", "XDG_CACHE_HOME": str(tmp_path)}
    result = train(tmp_path, "shakespeare", env=offline)
    assert result.returncode == 1
    assert "--data FILE" in result.stderr and "Traceback" not in result.stderr


def test_shakespeare_refuses_a_spoilt_cache(tmp_path):
    cached = tmp_path / "jaxformers" / "tinyshakespeare.txt"
    cached.parent.mkdir()
    cached.write_bytes(b"not Shakespeare")
    result = train(tmp_path, "shakespeare", env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert result.returncode == 1
    assert hashlib.sha256(b"not Shakespeare").hexdigest() in result.stderr


def test_ctrl_c_stops_cleanly_and_still_reports(tmp_path):
    command = [sys.executable, ROOT / "train_example.py", *TINY, "--steps", "1000000"]
    process = subprocess.Popen(
        map(str, [*command, "--curve", tmp_path / "curve.png"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "curve" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "stopped after step" in errors and "held-out sequences" in output
    assert (tmp_path / "curve.png").exists()


def test_sigterm_saves_and_reports_nothing(tmp_path):
    saved = tmp_path / "saved"
    command = [sys.executable, ROOT / "train_example.py", *TINY, "--steps", "1000000"]
    command += ["--checkpoint", saved, "--curve", tmp_path / "curve.png"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (
        (saved / "metrics.jsonl").exists() and (saved / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and "SIGTERM: stopped after step" in errors
    assert "Traceback" not in errors and "weights" not in output
    assert len(list(saved.glob("step-*.safetensors"))) >= 1


def test_a_run_goes_on_where_it_was(tmp_path):
    """Three steps at once are one step and, by another process, the other two."""
    saving = "--checkpoint", tmp_path / "run", "--save-every", "1"
    whole = train(tmp_path).stdout.splitlines()[-1]
    # As after a kill: what a run of three steps had saved after its first.
    train(tmp_path, *saving)
    for step in (2, 3):
        (tmp_path / "run" / f"step-{step:09}.safetensors").unlink()
    again = train(tmp_path, *saving)
    assert again.stdout.splitlines()[-1] == whole and again.returncode == 0
    other = train(tmp_path, *saving, "--seed", "5")
    assert other.returncode == 1 and "begun with another key" in other.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "nowhere.txt"], "goes with the task shakespeare"),
        (["shakespeare", "--data", "nowhere.txt"], "no such file"),
        (["--steps", "0"], "at least 1"),
        (["sort"], "invalid choice"),
        (["--d-model", "30", "--num-heads", "4"], "divisible by num_heads"),
        (["--learning-rate", "-1"], "peak must be"),
        (["--curve", "picture.foo"], "must end in .png"),
        (["--seed", "-1"], "at least 0"),
        (["--checkpoint", __file__], "cannot be written"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, args, words):
    result = run(ROOT / "train_example.py", *args, cwd=tmp_path)
    assert result.returncode != 0
    assert words in result.stderr and "Traceback" not in result.stderr


def test_the_tour(tmp_path):
    result = run(ROOT / "main.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all checks passed" in result.stdout
