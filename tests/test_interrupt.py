"""Signals at any moment of a run: what was reached is saved or returned, and soon."""

import os
import signal
import time
import warnings
from functools import partial

import jax
import numpy as np
import pytest

from jaxformers import AdamW, Checkpoints, TransformerLM, fit, language_model_loss
from jaxformers.checkpoint import directory
from jaxformers.data import Windows
from jaxformers.training import interrupt
from jaxformers.training.log import read_metrics

pytest.importorskip("safetensors")

BATCHES = Windows(np.random.default_rng(5).integers(0, 17, 301), 6, 4)
HELD_OUT = [BATCHES[i] for i in range(50, 53)]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def small_model():
    return TransformerLM(17, 12, 3, 1, 20, 6, use_bias=False, key=jax.random.key(3))


run = partial(fit, loss=language_model_loss, key=jax.random.key(0), progress=False)


def stopped(*args, **options):
    """What a run returns that a signal stops; None after SIGTERM, which ends the program."""
    try:
        with pytest.warns(UserWarning, match="stopped after step"):
            return run(small_model(), AdamW(1e-2), *args, **options)
    except SystemExit as exit:
        assert exit.code == 143
        return None


def same(a, b):
    pairs = zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def strike(number):
    os.kill(os.getpid(), number)


def wait_for(path):
    """A test that waits in vain hangs; none depends on how fast the machine is."""
    while not path.exists():
        time.sleep(0.005)


def saved(where, step):
    return where / f"step-{step:09}.safetensors"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(interrupt, "PATIENCE", 0.05)


class Struck:
    """The signal comes while batch `i` is made, and something happens then."""

    def __init__(self, number, i, then=lambda: None):
        self.number, self.i, self.then = number, i, then

    def __getitem__(self, i):
        assert i <= self.i, "after a signal nothing is fetched"
        if i == self.i:
            strike(self.number)
            self.then()
        return BATCHES[i]


class Evaluated:
    """Batches to evaluate on; the signal comes before batch `i`."""

    def __init__(self, number, i, before=lambda: None):
        self.number, self.i, self.before, self.struck = number, i, before, False

    def __iter__(self):
        for i, batch in enumerate(HELD_OUT):
            assert not self.struck, "after a signal nothing is evaluated"
            if i == self.i:
                self.struck = True
                self.before()
                strike(self.number)
            yield batch


@BOTH
@pytest.mark.parametrize("every", [2, 5])
def test_during_an_evaluation(tmp_path, number, every):
    """A checkpoint that is due is written before; the run that goes on evaluates first of all."""
    options = {"steps": 5, "eval_every": 4, "eval_batches": HELD_OUT}
    reports, whole = [], []
    expected = run(
        small_model(),
        AdamW(1e-2),
        BATCHES,
        checkpoint=Checkpoints(tmp_path / "whole", every=every),
        callbacks=[whole.append],
        **options,
    )

    def due():
        if every == 2:
            wait_for(saved(tmp_path / "a", 4))

    checkpoint = Checkpoints(tmp_path / "a", every=every)
    held_out = Evaluated(number, 1, due)
    stopped(
        BATCHES,
        checkpoint=checkpoint,
        callbacks=[reports.append],
        **options | {"eval_batches": held_out},
    )
    assert checkpoint.steps()[-1] == 4 and not reports
    assert len(read_metrics(tmp_path / "a")) == 4
    options |= {"checkpoint": checkpoint, "callbacks": [reports.append]}
    assert same(run(small_model(), AdamW(1e-2), BATCHES, **options), expected)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "a")]
    assert logs[0] == logs[1]
    figures = [[(x.step, x.metrics) for x in list] for list in (whole, reports)]
    assert figures[0] == figures[1] and [step for step, _ in figures[0]] == [4, 5]
    assert run(small_model(), AdamW(1e-2), BATCHES, **options).step == 5
    assert len(reports) == 2  # what was completed is not done again


def test_during_the_last_evaluation(tmp_path):
    options = {"steps": 3, "checkpoint": Checkpoints(tmp_path, every=2)}
    training = run(
        small_model(), AdamW(1e-2), BATCHES, eval_batches=Evaluated(signal.SIGINT, 1), **options
    )
    assert training.step == 3 and "eval_loss" not in read_metrics(tmp_path)[-1]
    run(small_model(), AdamW(1e-2), BATCHES, eval_batches=HELD_OUT, **options)
    assert "eval_loss" in read_metrics(tmp_path)[-1]


def forever():
    while True:
        time.sleep(0.01)


def generated(source):
    for i in range(10):
        yield source[i]


def failing_reads(source):
    """As loaders do that try again when a disk fails."""
    for i in range(10):
        while True:
            try:
                item = source[i]
                break
            except Exception:
                continue
        yield item


@pytest.mark.few(3)
@BOTH
@pytest.mark.parametrize("kind", [lambda x: x, generated, failing_reads])
def test_a_loader_that_does_not_return(tmp_path, number, kind):
    expected = run(small_model(), AdamW(1e-2), BATCHES, steps=3)
    checkpoint = Checkpoints(tmp_path, every=50)
    training = stopped(kind(Struck(number, 3, forever)), steps=9, checkpoint=checkpoint)
    assert checkpoint.steps() == [3] and len(read_metrics(tmp_path)) == 3
    if number == signal.SIGINT:
        assert same(training, expected)
        training = stopped(kind(Struck(number, 3, forever)), steps=9)  # nothing to save to
        assert same(training, expected)


def test_a_loader_of_the_evaluation_that_does_not_return():
    class Slow:
        def __iter__(self):
            yield HELD_OUT[0]
            if self.later:
                strike(signal.SIGINT)
                forever()
            self.later = True

        later = False

    assert stopped(BATCHES, steps=9, eval_every=2, eval_batches=Slow()).step == 4


@BOTH
def test_what_was_reached_is_saved_while_nothing_returns(tmp_path, number):
    """Not even to Python, such as a loader in C: a second thread saves."""
    checkpoint = Checkpoints(tmp_path / "loader", every=50)

    def deaf():
        while not saved(tmp_path / "loader", 3).exists():
            try:
                forever()
            except BaseException:
                pass

    stopped(Struck(number, 3, deaf), steps=9, checkpoint=checkpoint)
    assert checkpoint.steps() == [3] and len(read_metrics(tmp_path / "loader")) == 3
    checkpoint = Checkpoints(tmp_path / "callback", every=50)

    def callback(report):
        strike(number)
        wait_for(saved(tmp_path / "callback", 4))

    stopped(BATCHES, steps=9, eval_every=4, callbacks=[callback], checkpoint=checkpoint)
    assert checkpoint.steps() == [4]


@BOTH
def test_during_the_first_step(tmp_path, number):
    """Compiling is waited for; no other batch is."""
    calls = []

    def loss(model, batch, key=None):
        calls.append(strike(number))
        return language_model_loss(model, batch, key)

    class Single:
        def __getitem__(self, i):
            assert i == 0
            return BATCHES[0]

    checkpoint = Checkpoints(tmp_path, every=50)
    stopped(Single(), steps=9, loss=loss, checkpoint=checkpoint)
    assert checkpoint.steps() == [1] and len(calls) == 1


@BOTH
def test_while_saving(tmp_path, number, monkeypatch):
    write = directory.write_object

    def struck(path, content):
        if content["step"] == 2:
            strike(number)
        write(path, content)

    monkeypatch.setattr(directory, "write_object", struck)
    checkpoint = Checkpoints(tmp_path, every=2)

    class Waiting:
        def __getitem__(self, i):
            if i == 3:
                wait_for(saved(tmp_path, 2))
            return BATCHES[i]

    stopped(Waiting(), steps=90, checkpoint=checkpoint)
    assert 2 in checkpoint.steps()
    last = checkpoint.steps()[-1]
    assert len(read_metrics(tmp_path)) == last <= 4


def broken():
    raise RuntimeError("DataLoader worker exited unexpectedly")


@pytest.mark.parametrize("kind", [lambda x: x, generated])
def test_the_error_of_a_loader_after_a_signal_is_the_end(kind):
    expected = run(small_model(), AdamW(1e-2), BATCHES, steps=3)
    assert same(stopped(kind(Struck(signal.SIGINT, 3, broken)), steps=9), expected)
    assert same(stopped(kind(Struck(signal.SIGINT, 3, lambda: next(iter([])))), steps=9), expected)


def test_a_handler_that_raises_after_a_signal_does_no_harm(tmp_path):
    """As torch's of SIGCHLD does when a worker is gone, wherever the main thread is."""

    def raise_error(*_):
        raise RuntimeError("DataLoader worker is killed by signal")

    before = signal.signal(signal.SIGCHLD, raise_error)
    try:
        checkpoint = Checkpoints(tmp_path, every=50)
        both = Struck(signal.SIGINT, 3, lambda: strike(signal.SIGCHLD))
        assert stopped(both, steps=9, checkpoint=checkpoint).step == 3
        assert signal.getsignal(signal.SIGCHLD) is raise_error
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert checkpoint.steps() == [3]


def test_a_second_one_ends_it_at_once_and_hands_the_state_over():
    with pytest.raises(KeyboardInterrupt) as error:
        run(small_model(), AdamW(1e-2), Struck(signal.SIGINT, 3, lambda: strike(2)), steps=9)
    assert same(error.value.training, run(small_model(), AdamW(1e-2), BATCHES, steps=3))
    assert "sys.last_value.training" in error.value.__notes__[-1]


def test_nothing_is_left_behind():
    """Handlers, a file descriptor that others had set, and threads are as before."""
    import socket
    import threading

    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGURG
    before = [signal.getsignal(number) for number in numbers], threading.active_count()
    others = signal.set_wakeup_fd(mouth.fileno())
    try:
        stopped(Struck(signal.SIGINT, 3), steps=9)
        assert signal.set_wakeup_fd(others) == mouth.fileno()
        assert ear.recv(1) == bytes([signal.SIGINT])  # is told, too
    finally:
        signal.set_wakeup_fd(others)
        ear.close()
        mouth.close()
    assert before == ([signal.getsignal(number) for number in numbers], threading.active_count())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_worker_obeys_signals():
    """What a run makes of signals is not for its children: `Pool.terminate` would wait forever."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), -1
    codes = []

    class Forking:
        def __getitem__(self, i):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of JAX and Python, about threads
                child = os.fork()
            if child == 0:
                found = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
                os._exit(0 if (*found, signal.set_wakeup_fd(-1)) == before else 1)
            codes.append(os.waitpid(child, 0)[1])
            return BATCHES[i]

    run(small_model(), AdamW(1e-2), Forking(), steps=2)
    assert codes == [0, 0]
