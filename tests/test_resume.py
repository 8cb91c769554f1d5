"""Killed at any moment and started again is never killed: the same bits."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxformers import (
    AdamW,
    BadSteps,
    Checkpoints,
    TransformerLM,
    fit,
    language_model_loss,
    load,
)
from jaxformers.checkpoint import directory
from jaxformers.data import Windows
from jaxformers.training.log import read_metrics

pytest.importorskip("safetensors")

PROGRAM = """
import os, signal, sys
import jax, numpy as np
from jaxformers import *
from jaxformers.data import PackedDocuments

directory, programs, fatal = sys.argv[1], sys.argv[2], int(sys.argv[3])
keep_compiled_programs(programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
synced = 0

def fsync(file):  # the log's before a save, the checkpoint's, its directory's
    global synced
    synced += 1
    if synced == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(file)

real, os.fsync = os.fsync, fsync
rng = np.random.default_rng(1)
documents = [rng.integers(0, 23, n) for n in rng.integers(2, 30, 50)]
model = TransformerLM(
    23, 40, 4, 2, 60, 12, 0.1, position=RotaryPositionalEncoding(), key=jax.random.key(1)
)
optimizer = Averaged(AdamW(warmup_cosine(1e-2, 3, 30), max_grad_norm=1.0), 0.9)
training = fit(
    model,
    optimizer,
    PackedDocuments(documents, 12, 6, seed=4),
    loss=language_model_loss,
    steps=30,
    key=jax.random.key(2),
    eval_batches=PackedDocuments(documents[:9], 12, 4),
    eval_every=7,
    checkpoint=Checkpoints(directory, every=2, keep=2),
    bad_steps=BadSteps(allowed=3, spike=5.0),
    accumulate=2,
    progress=False,
)
print(digest(training))
"""


def start(directory, programs, fatal=0):
    command = [sys.executable, "-c", PROGRAM, directory, programs, fatal]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out.split()[-1]


def count_lines(directory):
    return len((directory / "metrics.jsonl").read_bytes().splitlines())


def test_killed_and_resumed_is_never_killed(tmp_path):
    programs, killed = tmp_path / "programs", tmp_path / "killed"
    expected = finish(start(tmp_path / "whole", programs))
    chance = random.Random(20)
    # In a save: before the log is synced, before a checkpoint is, before its directory is.
    for fatal in (chance.randrange(1, 10), chance.randrange(10, 20)):
        process = start(killed, programs, fatal)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors
    # And at any time, once it is under way again.
    process, lines, more = start(killed, programs), count_lines(killed), chance.randrange(1, 9)
    while process.poll() is None and count_lines(killed) < lines + more:
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert finish(start(killed, programs)) == expected
    log = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == log


def small_run(where, **options):
    model = TransformerLM(17, 12, 3, 1, 20, 6, use_bias=False, key=jax.random.key(3))
    text = np.random.default_rng(5).integers(0, 17, 301)
    options = {"steps": 6, "key": jax.random.key(0), "loss": language_model_loss} | options
    return fit(
        model,
        AdamW(1e-2),
        options.pop("batches", Windows(text, 6, 4)),
        checkpoint=Checkpoints(where, every=2),
        progress=False,
        **options,
    )


def same(a, b):
    pairs = zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def poisoned(bad):
    """A loss and its batches, of which some make it NaN."""

    def loss(model, batch, key=None):
        rest = {name: x for name, x in batch.items() if name != "factor"}
        return language_model_loss(model, rest, key) * batch["factor"].mean()

    text = np.random.default_rng(5).integers(0, 17, 301)
    rows = [Windows(text, 6, 4)[i] for i in range(6)]
    for i, row in enumerate(rows):
        row["factor"] = np.full((4, 1), np.nan if i in bad else 1.0, np.float32)
    return loss, rows


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(tmp_path):
    whole = small_run(tmp_path)
    newest = tmp_path / "step-000000006.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="step-000000006"):
        again = small_run(tmp_path)
    assert same(again, whole)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_more_steps_go_on_and_fewer_are_there_already(tmp_path, caplog):
    """Both are said by `logging`: warnings are errors here."""
    first = small_run(tmp_path, steps=4)
    assert small_run(tmp_path, steps=2).step == 4
    assert f"nothing is left of 2 steps to make: {tmp_path} is at step 4" in caplog.messages
    assert small_run(tmp_path, steps=5).step == 5
    assert f"going on: {tmp_path} is at step 4" in caplog.messages
    more = small_run(tmp_path, steps=7)
    assert more.step == 7 and not same(first, more)
    assert same(small_run(tmp_path / "other", steps=7), more)


def test_another_run_is_refused(tmp_path):
    small_run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="begun with another key"):
        small_run(tmp_path, key=jax.random.key(1))


def test_bad_data_keeps_what_was_reached(tmp_path):
    """The ids of batch 3 do not exist: three steps are saved, and a mended run goes on."""
    text = np.random.default_rng(5).integers(0, 17, 301)
    good = Windows(text, 6, 4)
    rows = [good[i] for i in range(6)]
    rows[3] = rows[3] | {"tokens": rows[3]["tokens"] + 17}
    with pytest.raises(ValueError, match="tokens must be ids") as error:
        small_run(tmp_path, batches=rows)
    assert error.value.__notes__ == [f"Step 3 is saved in {tmp_path}."]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert same(small_run(tmp_path), small_run(tmp_path / "whole"))


def test_a_bad_step_is_met_again_where_it_was(tmp_path):
    loss, rows = poisoned({4})
    with pytest.raises(ValueError, match="step 5 is bad") as error:
        small_run(tmp_path, batches=rows, loss=loss)
    assert "Step 4 is saved" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="step 5 is bad"):
        small_run(tmp_path, batches=rows, loss=loss)


@pytest.fixture
def full_disk(monkeypatch):
    """A set of steps whose checkpoints find no room."""
    steps, write = set(), directory.write_object

    def fail(path, x):
        if x["step"] in steps:
            raise OSError(28, "No space left on device")
        write(path, x)

    monkeypatch.setattr(directory, "write_object", fail)
    return steps


def test_a_save_that_fails_does_not_end_the_run(tmp_path, full_disk):
    """Which one it was shows only when the next is made."""
    full_disk |= {2, 4}
    with pytest.warns(UserWarning, match="training goes on: .*No space left") as warned:
        training = small_run(tmp_path)
    assert training.step == 6 and len(warned) == 2
    assert Checkpoints(tmp_path).steps() == [6]


def test_the_last_save_must_succeed(tmp_path, full_disk):
    full_disk |= {6}
    with pytest.raises(OSError, match="No space left") as error:
        small_run(tmp_path)
    assert "could not be saved" in error.value.__notes__[0]
    full_disk.clear()
    assert same(small_run(tmp_path), small_run(tmp_path / "whole"))


def test_the_last_save_must_begin(tmp_path, monkeypatch):
    """It fails at once where the directory is gone, and not only in the background."""
    save = Checkpoints.save

    def fail(self, training, step):
        if step == 6:
            raise FileNotFoundError(2, "No such file or directory")
        save(self, training, step)

    monkeypatch.setattr(Checkpoints, "save", fail)
    with (
        pytest.warns(UserWarning, match="a checkpoint is missing"),
        pytest.raises(FileNotFoundError, match="No such file") as error,
    ):
        small_run(tmp_path)
    assert "could not be saved" in error.value.__notes__[0] and error.value.training.step == 6
    monkeypatch.undo()
    assert same(small_run(tmp_path), small_run(tmp_path / "whole"))


def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    small_run(tmp_path)

    def fail(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "read_object", fail)
        with pytest.raises(OSError, match="Too many open files"):
            small_run(tmp_path)
    assert Checkpoints(tmp_path).steps() == [2, 4, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_later(tmp_path, number):
    text = np.random.default_rng(5).integers(0, 17, 301)

    class Struck:
        def __getitem__(self, i):
            if i == 3:
                os.kill(os.getpid(), number)
            return Windows(text, 6, 4)[i]

    with pytest.warns(UserWarning, match="stopped after step 3"):
        with contextlib.suppress(SystemExit):
            small_run(tmp_path, batches=Struck())
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert same(small_run(tmp_path), small_run(tmp_path / "whole"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_state_of_a_training_is_no_model(tmp_path):
    small_run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="a state of a training"):
        load(tmp_path / "step-000000002.safetensors")


def test_what_ends_the_first_step_leaves_nothing_to_resume(tmp_path):
    with pytest.raises(KeyError):
        small_run(tmp_path, loss=lambda model, batch, key: batch["token"])
    assert Checkpoints(tmp_path).steps() == []


def test_a_callback_that_exits_is_no_loss(tmp_path):
    with pytest.raises(SystemExit):
        small_run(tmp_path, eval_every=3, callbacks=[lambda report: sys.exit(3)])
    assert Checkpoints(tmp_path).steps() == [2, 3]


def test_the_allowance_of_bad_steps_is_not_renewed(tmp_path):
    loss, rows = poisoned({1, 2, 3})
    for _ in range(2):
        with pytest.raises(ValueError, match="step 4 is bad"):
            small_run(tmp_path, batches=rows, loss=loss, bad_steps=BadSteps(allowed=2))


def test_the_lines_of_the_log_are_json(tmp_path):
    small_run(tmp_path, steps=2)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["skipped"] == 0
