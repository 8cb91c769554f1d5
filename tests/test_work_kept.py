"""Whatever ends a run, what was trained is returned, saved, or handed over with the error."""

import itertools
import os
import signal
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from jaxformers import AdamW, BadSteps, Checkpoints, TransformerLM, fit, language_model_loss
from jaxformers.data import Windows

BATCHES = Windows(np.random.default_rng(5).integers(0, 17, 301), 6, 4)
fit = partial(fit, loss=language_model_loss, key=jax.random.key(0), progress=False)


def run(batches, steps=9, **options):
    model = TransformerLM(17, 12, 3, 1, 20, 6, use_bias=False, key=jax.random.key(3))
    return fit(model, AdamW(1e-2), batches, steps=steps, **options)


def same(a, b):
    pairs = zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def generated(count):
    for i in range(count):
        yield BATCHES[i]
    raise OSError("the disk is gone")


def exhausted():
    yield from generated_whole(3)
    next(iter([]))  # which Python makes a RuntimeError of


def generated_whole(count):
    return (BATCHES[i] for i in range(count))


class Indexed:
    def __getitem__(self, i):
        return {}[i] if i == 3 else BATCHES[i]


def with_row(i, row):
    return itertools.chain(generated_whole(i), [row])


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("batches", "options", "kind", "note"),
    [
        (lambda: generated(3), {}, OSError, "Batch 3 raised this error when it was fetched"),
        (exhausted, {}, RuntimeError, "Batch 3 raised this error when it was fetched"),
        (Indexed, {}, KeyError, "Batch 3 raised this error when it was fetched"),
        (lambda: with_row(3, [1, 2]), {}, ValueError, "state after step 3"),
        (
            lambda: with_row(3, {name: x[:3] for name, x in BATCHES[3].items()}),
            {"accumulate": 2},
            ValueError,
            "Batch 3 has the shapes {'targets': (3, 6), 'tokens': (3, 6)}, the first one "
            "{'targets': (4, 6), 'tokens': (4, 6)}. If the last batch of a loader is smaller",
        ),
        (lambda: BATCHES, {"callbacks": [lambda report: {}[0]]}, KeyError, "state after step 3"),
        (lambda: BATCHES, {"callbacks": [lambda report: sys.exit(4)]}, SystemExit, "after step 3"),
    ],
)
def test_an_error_has_what_was_trained(batches, options, kind, note):
    with pytest.raises(kind) as error:
        run(batches(), eval_every=3, **options)
    expected = run(BATCHES, steps=3, **{"accumulate": 1} | options | {"callbacks": []})
    assert error.value.training.step == 3 and same(error.value.training, expected)
    notes = "\n".join(error.value.__notes__)
    assert note in notes and "sys.last_value.training" in notes


def test_a_failed_evaluation_and_a_bad_step(tmp_path):
    class Gone:
        calls = 0

        def __iter__(self):
            Gone.calls += 1
            return generated(1) if Gone.calls > 2 else generated_whole(2)

    with pytest.raises(OSError, match="the disk is gone") as error:
        run(BATCHES, eval_every=2, eval_batches=Gone())
    assert error.value.training.step == 4

    def loss(model, batch, key=None):
        rest = {name: x for name, x in batch.items() if name != "factor"}
        return language_model_loss(model, rest, key) * batch["factor"].mean()

    factors = [1.0, 1.0, np.nan, np.nan]
    rows = [BATCHES[i] | {"factor": np.full((4, 1), x, np.float32)} for i, x in enumerate(factors)]
    with pytest.raises(ValueError, match="step 4 is bad") as error:
        run(rows, loss=loss, bad_steps=BadSteps(allowed=1))
    training = error.value.training
    assert (training.step, training.skipped, training.guard.failed) == (3, 1, False)


def test_nothing_is_handed_over_where_nothing_was_trained():
    with pytest.raises(KeyError) as error:
        run([{"tokens": np.ones((2, 3), int)}], loss=lambda model, batch, key: batch["token"])
    assert not hasattr(error.value, "training")


def test_with_a_checkpoint_it_is_saved_too(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(OSError) as error:
        run(generated(3), checkpoint=Checkpoints(tmp_path, every=2))
    assert error.value.training.step == 3 and Checkpoints(tmp_path).steps() == [2, 3]
    assert error.value.__notes__[-1] == f"Step 3 is saved in {tmp_path}."


def test_what_is_used_up_ends_the_run(caplog):
    """Where warnings are errors, as here, it is logged: the model is worth more."""
    assert same(run(generated_whole(3)), run(BATCHES, steps=3))
    assert "training ends after 3 steps: there are no more batches." in caplog.messages


def test_sigterm_hands_it_over():
    class Struck:
        def __getitem__(self, i):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return BATCHES[i]

    with pytest.raises(SystemExit) as exit:
        run(Struck())
    assert exit.value.code == 143 and same(exit.value.training, run(BATCHES, steps=3))


PROGRAM = """
import multiprocessing, sys, time
import numpy as np

ids = np.random.default_rng(5).integers(0, 17, 301).astype(np.int32)

class Rows:
    def __len__(self):
        return 100

    def __getitem__(self, i):
        time.sleep(10**6 if i >= 6 else 0)  # batch 3 never comes
        return {"tokens": ids[i : i + 6], "targets": ids[i + 1 : i + 7]}

def stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

def batch(i):
    return stack([Rows()[2 * i], Rows()[2 * i + 1]])

def from_pool():  # whose workers take a task with them when they die: its result never comes
    return multiprocessing.get_context("fork").Pool(2).imap(batch, range(50))

def from_torch():
    from torch.utils.data import DataLoader
    loader = DataLoader(
        Rows(), 2, num_workers=1, multiprocessing_context="spawn", collate_fn=stack
    )
    return iter(loader)

def told(loader):
    for _ in range(3):
        yield next(loader)
    print("waiting", flush=True)
    yield next(loader)

if __name__ == "__main__":
    loader = {"pool": from_pool, "torch": from_torch}[sys.argv[1]]()
    import jax
    from jaxformers import AdamW, TransformerLM, fit, language_model_loss
    model = TransformerLM(17, 12, 3, 1, 20, 6, key=jax.random.key(3))
    key, loss = jax.random.key(0), language_model_loss
    training = fit(model, AdamW(1e-2), told(loader), loss=loss, key=key, steps=50, progress=False)
    print("returned at step", training.step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", ["pool", "torch"])
def test_ctrl_c_in_a_terminal_ends_the_workers_too(tmp_path, kind):
    """The signal goes to all processes at once; one run returns its model nevertheless."""
    if kind == "torch":
        pytest.importorskip("torch")
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, path, kind],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout.readline() == "waiting\n", (tmp_path / "errors").read_text()
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 0 and "returned at step 3" in out, errors
    assert "SIGINT: stopped after step 3 of 50" in errors
