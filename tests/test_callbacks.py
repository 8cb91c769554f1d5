"""Callbacks that get the figures of steps, between evaluations and without a model."""

import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import AdamW, Checkpoints, Every, KeepBest, TransformerLM, fit, language_model_loss
from jaxformers.data import Windows
from jaxformers.training import Figures, Report, loop
from jaxformers.training import run as run_module
from jaxformers.training.log import read_metrics

TEXT = np.random.default_rng(5).integers(0, 17, 301)
BATCHES = Windows(TEXT, 6, 4)
HELD_OUT = [BATCHES[50]]
run = partial(fit, loss=language_model_loss, key=jax.random.key(0), progress=False)


def small_model():
    return TransformerLM(17, 12, 3, 1, 20, 6, use_bias=False, key=jax.random.key(3))


def told(seen):
    return [(figures.step, figures.metrics) for figures in seen]


def test_figures_come_every_few_steps_and_after_each_evaluation(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("no callback needs the model")

    monkeypatch.setattr(run_module.Run, "_copy", refuse)
    seen, rare = [], []
    callbacks = [Every(2, seen.append), Every(5, rare.append)]
    options = {"eval_batches": HELD_OUT, "eval_every": 3, "log": tmp_path}
    run(small_model(), AdamW(1e-2), BATCHES, steps=7, callbacks=callbacks, **options)
    steps = [(row["step"], row) for row in read_metrics(tmp_path)]
    figures = {step: row for step, row in steps if "loss" in row}
    evaluated = {step: figures[step] | row for step, row in steps if "eval_loss" in row}
    assert [figures.step for figures in seen] == [2, 3, 4, 6, 6, 7]
    expected = [figures[2], evaluated[3], figures[4], figures[6], evaluated[6], evaluated[7]]
    assert [{"step": step} | metrics for step, metrics in told(seen)] == expected
    assert [figures.step for figures in rare] == [3, 5, 6, 7]
    assert all(isinstance(x, Figures) and x.begun == 0 for x in seen)


def test_the_device_has_the_next_step_while_figures_are_told(monkeypatch):
    events = []

    def started(*args):
        events.append("start")
        return one_step(*args)

    one_step = run_module.one_step
    monkeypatch.setattr(run_module, "one_step", started)
    tell = Every(1, lambda figures: events.append(figures.step))
    run(small_model(), AdamW(1e-2), BATCHES, steps=4, callbacks=[tell])
    assert loop.IN_FLIGHT == 1
    assert events == ["start", "start", 1, "start", 2, "start", 3, 4]


def test_both_kinds_of_callbacks(tmp_path):
    seen, reports = [], []
    callbacks = [reports.append, Every(2, seen.append), KeepBest(tmp_path / "best", "loss")]
    training = run(small_model(), AdamW(1e-2), BATCHES, steps=4, eval_every=4, callbacks=callbacks)
    assert [x.step for x in seen] == [2, 4] and [x.step for x in reports] == [4]
    assert isinstance(reports[0], Report) and reports[0].metrics == seen[1].metrics
    np.testing.assert_array_equal(reports[0].model.output.w, training.model.output.w)
    with pytest.raises(AttributeError, match="gets figures and no model. Pass the callback itself"):
        _ = seen[0].model


@pytest.mark.parametrize("kind", [bool, np.array, jnp.array])
def test_true_ends_the_run_with_an_evaluation(tmp_path, kind):
    reports = []
    checkpoint = Checkpoints(tmp_path, every=50)
    training = run(
        small_model(),
        AdamW(1e-2),
        BATCHES,
        steps=9,
        eval_batches=HELD_OUT,
        callbacks=[Every(2, lambda figures: kind(figures.step == 4)), reports.append],
        checkpoint=checkpoint,
    )
    assert training.step == 5 and checkpoint.steps() == [5]  # one step was under way
    assert [report.step for report in reports] == [5] and "eval_loss" in reports[0].metrics


class Ending:
    """Batches of which number 3 is a signal or an error, once."""

    def __init__(self, what):
        self.what = what

    def __getitem__(self, i):
        if i == 3 and self.what is not None:
            what, self.what = self.what, None
            if isinstance(what, int):
                os.kill(os.getpid(), what)
            else:
                raise what
        return BATCHES[i]


@pytest.mark.filterwarnings("ignore:SIGINT")
@pytest.mark.parametrize("what", [signal.SIGINT, OSError("the disk is gone")])
def test_a_resumed_run_tells_each_step_once(tmp_path, what):
    whole, parts = [], []
    options = {"steps": 6, "eval_batches": HELD_OUT, "eval_every": 4}
    run(small_model(), AdamW(1e-2), BATCHES, callbacks=[Every(1, whole.append)], **options)
    options |= {"checkpoint": Checkpoints(tmp_path, every=50)}
    options |= {"callbacks": [Every(1, parts.append)]}
    batches = Ending(what)
    try:
        assert run(small_model(), AdamW(1e-2), batches, **options).step == 3
    except OSError as error:
        assert error.training.step == 3
    assert [x.step for x in parts] == [1, 2, 3]
    run(small_model(), AdamW(1e-2), batches, **options)
    assert told(parts) == told(whole) and parts[-1].begun == 3


def test_a_callback_that_fails_loses_nothing(tmp_path):
    def fail(figures):
        raise KeyError(figures.step)

    checkpoint = Checkpoints(tmp_path, every=50)
    with pytest.raises(KeyError) as error:
        run(
            small_model(),
            AdamW(1e-2),
            BATCHES,
            steps=9,
            callbacks=[Every(3, fail)],
            checkpoint=checkpoint,
        )
    assert error.value.args == (3,) and checkpoint.steps() == [4]


@pytest.mark.parametrize(
    ("steps", "callback"), [(0, print), (2.0, print), (3, None), (3, Every(2, print))]
)
def test_what_is_refused(steps, callback, no_shape_checker):
    with pytest.raises(ValueError, match="must be"):
        Every(steps, callback)
