"""What a run shows of itself, and that it needs nothing for it."""

import sys
import types
from functools import partial

import jax
import numpy as np
import pytest

from jaxformers import AdamW, TransformerLM, fit, language_model_loss
from jaxformers.data import Windows
from jaxformers.training import log
from jaxformers.training.log import read_metrics
from jaxformers.training.notices import warn_and_go_on

BATCHES = Windows(np.random.default_rng(5).integers(0, 17, 301), 6, 4)
fit = partial(fit, loss=language_model_loss, key=jax.random.key(0))


def run(**options):
    model = TransformerLM(17, 12, 3, 1, 20, 6, use_bias=False, key=jax.random.key(3))
    return fit(model, AdamW(1e-2), BATCHES, steps=2, **options)


def broken(*_, **__):
    raise TypeError("Descriptors cannot be created directly.")


class Broken(types.ModuleType):
    """A package that fails in its own way when it is used."""

    __getattr__ = broken


@pytest.mark.parametrize(
    ("package", "module", "words"),
    [
        ("tqdm", None, "There is no progress bar without tqdm: pip install 'jaxformers[train]'"),
        ("tqdm", Broken("tqdm"), "There is no progress bar: TypeError"),
        ("tensorboard.compat.proto", None, ""),
        (
            "tensorboard.compat.proto",
            Broken("tensorboard.compat.proto"),
            "There are no TensorBoard events: TypeError",
        ),
    ],
)
def test_a_package_that_is_missing_or_broken(tmp_path, monkeypatch, caplog, package, module, words):
    if package != "tqdm":
        pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, package, module)
    assert run(log=tmp_path, progress=package == "tqdm").step == 2
    assert len(read_metrics(tmp_path)) == 2
    assert (words in caplog.text) if words else not caplog.messages


def test_a_stream_that_is_none_of_a_terminal(monkeypatch):
    """As notebooks and services put one in the place of standard error."""
    pytest.importorskip("tqdm")
    written = []
    stream = types.SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(progress=True).step == 2


def test_it_is_compiling_until_the_first_step_is_made(capsys):
    pytest.importorskip("tqdm")
    run(progress=True)
    errors = capsys.readouterr().err
    first, _, rest = errors.rpartition("compiling")
    assert "0/2" in first and "loss" not in first
    assert "2/2" in rest and "loss" in rest


def test_compiling_does_not_count_as_a_step():
    pytest.importorskip("tqdm")
    bar = log._Bar(3, 9)
    now = [bar.bar.start_t]
    bar.bar._time = lambda: now[0]
    bar.compiling()
    figures = {"loss": 1.0, "gradient_norm": 1.0, "tokens": 5.0, "skipped": 0.0}
    now[0] += 1000  # seconds
    bar.write(4, figures)
    assert (bar.bar.n, bar.bar.initial, bar.bar.format_dict["elapsed"]) == (4, 4, 0)
    for step in (5, 6, 7):
        now[0] += 2
        bar.write(step, figures)
    state = bar.bar.format_dict
    assert (state["n"], state["elapsed"]) == (7, 6)
    assert state["rate"] is None or state["rate"] == pytest.approx(0.5)
    assert "0.50step/s" in str(bar.bar) or "2.00s/step" in str(bar.bar)
    bar.close()


def test_a_warning_does_not_end_a_run(caplog):
    warn_and_go_on("one thing", 2)  # an error here
    assert caplog.messages == ["one thing"]
    with pytest.warns(UserWarning, match="another thing"):
        warn_and_go_on("another thing", 2)
