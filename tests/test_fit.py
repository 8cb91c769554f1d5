"""The loop: the same numbers as single steps, whatever happens around them."""

import itertools
import json
import os
import signal
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    AdamW,
    Averaged,
    BadSteps,
    TransformerLM,
    evaluate,
    fit,
    freeze,
    global_norm,
    language_model_loss,
    sequence_to_sequence_loss,
    train_step,
    warmup_cosine,
)
from jaxformers.data import Windows
from jaxformers.training.log import read_metrics

VOCAB, T, B = 17, 6, 4
TEXT = np.random.default_rng(5).integers(0, VOCAB, 301)
KEY = jax.random.key(11)
run = partial(fit, loss=language_model_loss, key=KEY, progress=False)


def small_model(dropout=0.0):
    # Without biases: the gradient of the keys' is rounding, of which Adam makes whole steps.
    return TransformerLM(VOCAB, 12, 3, 1, 20, T, dropout, use_bias=False, key=jax.random.key(3))


def batches(seed=0):
    return Windows(TEXT, T, B, seed)


def adamw():
    return AdamW(3e-3, max_grad_norm=1.0)


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def poisoned_loss(model, batch, key=None):
    """The loss, times `factor`, whose values make steps bad."""
    rest = {name: x for name, x in batch.items() if name != "factor"}
    return language_model_loss(model, rest, key) * batch["factor"].mean()


def with_factors(factors):
    rows = (float(x) * np.ones((B, 1), np.float32) for x in factors)
    return [batches()[i] | {"factor": row} for i, row in enumerate(rows)]


def test_fit_is_a_loop_of_steps(tmp_path):
    """With dropout: each step has its own key, which depends on nothing but its number."""
    schedule = warmup_cosine(3e-3, 3, 9, 1e-3)
    model, optimizer = small_model(dropout=0.2), AdamW(schedule, max_grad_norm=1.0)
    training = run(model, optimizer, batches(), steps=7, log=tmp_path)
    own, state = jax.tree.map(lambda x: x.copy(), model), optimizer.init(model)
    for i, row in enumerate(read_metrics(tmp_path)):
        key, batch = jax.random.fold_in(KEY, i), jax.device_put(batches()[i])
        grads = eqx.filter_jit(eqx.filter_grad(language_model_loss))(own, batch, key)
        own, state, loss = train_step(
            own, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
        )
        figures = row["step"], row["loss"], row["gradient_norm"], row["learning_rate"]
        expected = i + 1, loss, global_norm(grads), schedule(i)
        np.testing.assert_allclose(figures, expected, rtol=1e-4)
        assert row["tokens"] == B * T and row["skipped"] == 0
    for a, b in zip(jax.tree.leaves(training.model), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert training.step == 7 and training.optimizer_state.step == 7
    assert not same(model, own)  # and the one that was passed in can still be read


def test_a_run_in_parts_of_a_batch_in_sixteen_bits():
    whole = run(small_model(), adamw(), batches(), steps=3)
    parts = run(small_model(), adamw(), batches(), steps=3, accumulate=2)
    halves = run(small_model(), adamw(), batches(), steps=3, compute_dtype=jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(parts.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
    assert halves.model.output.w.dtype == jnp.float32
    assert not same(halves.model, whole.model)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_ends_the_run_with_the_weights_before_it(tmp_path, bad):
    good = run(small_model(), adamw(), with_factors([1, 1]), loss=poisoned_loss, steps=2)
    data = with_factors([1, 1, bad, 1, 1])
    with pytest.raises(ValueError, match="step 3 is bad: its loss is (nan|inf)"):
        run(small_model(), adamw(), data, loss=poisoned_loss, steps=5, log=tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    skipping = BadSteps(allowed=1)
    training = run(
        small_model(), adamw(), data[:3], loss=poisoned_loss, steps=3, bad_steps=skipping
    )
    assert same((good.model, good.optimizer_state), (training.model, training.optimizer_state))
    assert training.skipped == 1 and training.step == 3


def test_bad_steps_are_skipped_and_counted_up_to_a_limit(tmp_path):
    options = {"loss": poisoned_loss, "bad_steps": BadSteps(allowed=2), "log": tmp_path}
    data = with_factors([1, np.nan, np.nan, 1, np.nan, 1])
    training = run(small_model(), adamw(), data, steps=6, **options)
    assert training.skipped == 3 and training.optimizer_state.step == 3
    rows = read_metrics(tmp_path)
    assert [row["loss"] is None for row in rows] == [False, True, True, False, True, False]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 3, 3]
    data = with_factors([1, np.nan, np.nan, np.nan, 1])
    with pytest.raises(ValueError, match="step 4 is bad"):
        run(small_model(), adamw(), data, steps=5, **options)


def test_a_mask_that_is_none_is_no_mask():
    batch = dict(batches()[0]) | {"padding_mask": np.arange(T) < np.array([[6], [2], [3], [4]])}
    model, batch = small_model(), jax.device_put(batch)
    loss = language_model_loss(model, batch)
    assert language_model_loss(model, batch | {"loss_mask": None}) == loss
    assert loss != language_model_loss(model, batch | {"loss_mask": jnp.ones((B, T), jnp.bool_)})


def test_spikes_are_bad_once_the_usual_is_known():
    bad_steps = BadSteps(allowed=1, spike=30.0)
    factors = [1.0] * 24
    factors[5] = factors[22] = 1000.0  # the first one comes before 20 steps were seen
    data = with_factors(factors)
    training = run(small_model(), adamw(), data, loss=poisoned_loss, steps=24, bad_steps=bad_steps)
    assert training.skipped == 0  # it had made large norms usual
    factors[5] = 1.0
    data = with_factors(factors)
    training = run(small_model(), adamw(), data, loss=poisoned_loss, steps=24, bad_steps=bad_steps)
    assert training.skipped == 1


def test_what_is_frozen_stays_and_the_rest_moves():
    optimizer = freeze(adamw(), lambda path, array: path.startswith("embedding"))
    model = small_model()
    training = run(model, optimizer, batches(), steps=3)
    assert same(training.model.embedding, model.embedding)
    assert not same(training.model.decoder, model.decoder)
    assert len(jax.tree.leaves(training.optimizer_state)) < 2 * len(jax.tree.leaves(model))


def test_the_average_is_evaluated_and_a_callback_ends_the_run(tmp_path):
    reports = []

    def look(report):
        reports.append(report)
        return np.bool(len(reports) == 2)

    optimizer = Averaged(adamw(), decay=0.9)
    held_out = Windows(TEXT[:40], T, 3)
    training = run(
        small_model(),
        optimizer,
        batches(),
        steps=9,
        eval_batches=held_out,
        eval_every=2,
        callbacks=[look],
        log=tmp_path,
    )
    assert training.step == 4 and [report.step for report in reports] == [2, 4]
    average = optimizer.averaged(training.model, training.optimizer_state)
    assert same(reports[-1].model, average) and not same(average, training.model)
    expected = evaluate(average, held_out, loss=language_model_loss)
    assert reports[-1].metrics["eval_loss"] == expected
    rows = [row for row in read_metrics(tmp_path) if "eval_loss" in row]
    assert rows[-1] == {"step": 4, "eval_loss": expected}


def test_evaluation_weighs_batches_by_what_counts():
    model, held_out = small_model(), Windows(TEXT[:40], T, 4)
    (whole,) = Windows(TEXT[:40], 39, 1).in_order()
    parts = list(held_out.in_order())
    assert len({part["tokens"].shape for part in parts}) == 3  # the last ones are smaller
    sizes = [part["targets"].size for part in parts]
    losses = [language_model_loss(model, jax.device_put(part)) for part in parts]
    mean = evaluate(model, held_out, loss=language_model_loss)
    np.testing.assert_allclose(mean, np.average(losses, weights=sizes), rtol=1e-6)
    assert sum(sizes) == whole["targets"].size
    with pytest.raises(ValueError, match="0 batches"):
        evaluate(model, iter([]), loss=language_model_loss)


class Loader:
    """As torch's and Grain's: no length, no index, again at each `iter`."""

    def __iter__(self):
        return (batches()[i] for i in range(3))


def test_batches_of_any_kind_are_the_same_batches():
    expected = run(small_model(), adamw(), [batches()[i % 3] for i in range(7)], steps=7).model
    for other in ([batches()[i] for i in range(3)], Loader(), itertools.cycle(Loader())):
        assert same(run(small_model(), adamw(), other, steps=7).model, expected)
    reports = []
    with pytest.warns(UserWarning, match="training ends after 3 steps"):
        ended = run(small_model(), adamw(), iter(Loader()), steps=7, callbacks=[reports.append])
    assert ended.step == 3 and [report.step for report in reports] == [3]
    with pytest.warns(UserWarning, match="training ends after 0 steps"):
        assert run(small_model(), adamw(), iter([]), steps=7).step == 0


def test_a_torch_loader():
    torch = pytest.importorskip("torch")
    rows = [{name: x[0] for name, x in batches()[i].items()} for i in range(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    stacked = {name: np.stack([row[name] for row in rows[:4]]) for name in rows[0]}
    trained = run(small_model(), adamw(), loader, steps=1, eval_batches=loader)
    assert same(trained.model, run(small_model(), adamw(), [stacked], steps=1).model)


def test_epochs_are_steps():
    """Of a source, a list, and a resumed run; a source goes on after its first epoch."""
    source = Windows(TEXT[:60], T, B)  # nine windows
    assert len(source) == 3
    expected = [run(small_model(), adamw(), source, steps=steps).model for steps in (2, 6)]
    assert not same(*expected)
    for epochs, model in zip((0.5, 2), expected, strict=True):
        assert same(run(small_model(), adamw(), source, epochs=epochs).model, model)
    listed = [source[i] for i in range(6)]
    assert same(run(small_model(), adamw(), listed, epochs=1).model, expected[1])
    assert not same(run(small_model(), adamw(), listed[:3], epochs=2).model, expected[1])
    assert run(small_model(), adamw(), listed, epochs=0.01).step == 1


@pytest.mark.parametrize("batches", [Loader(), iter([]), Loader])
def test_epochs_need_a_length(batches, no_shape_checker):
    with pytest.raises(ValueError, match="has none. Pass steps=, or a source of jaxformers.data"):
        run(small_model(), adamw(), batches, epochs=2)


class Struck:
    """The signal comes while batch 3 is made, which is when the third step is computed."""

    def __init__(self, number):
        self.number = number

    def __getitem__(self, i):
        if i == 3:
            os.kill(os.getpid(), self.number)
        return batches()[i]


def test_ctrl_c_ends_the_run_after_the_step():
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="SIGINT: stopped after step 3 of 100"):
        training = run(small_model(), adamw(), Struck(signal.SIGINT), steps=100)
    assert training.step == 3
    assert same(training.model, run(small_model(), adamw(), batches(), steps=3).model)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_ends_the_program_or_does_what_it_did():
    with pytest.warns(UserWarning, match="SIGTERM: stopped after step 3"):
        with pytest.raises(SystemExit) as exit:
            run(small_model(), adamw(), Struck(signal.SIGTERM), steps=100)
    assert exit.value.code == 143
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.warns(UserWarning, match="SIGTERM: stopped after step 3"):
            training = run(small_model(), adamw(), Struck(signal.SIGTERM), steps=100)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert training.step == 3 and heard == [signal.SIGTERM]


def test_the_log_drops_what_is_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(small_model(), adamw(), batches(), steps=2, log=tmp_path)
    first = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')  # killed while it wrote
    assert len(read_metrics(tmp_path)) == 2
    run(small_model(), adamw(), batches(), steps=2, log=tmp_path)
    assert path.read_bytes() == first
    row = json.loads(first.splitlines()[0])
    assert list(row)[:2] == ["step", "loss"] and row["tokens"] == B * T
    assert row["learning_rate"] == pytest.approx(3e-3)
    path.write_bytes(b'{"step": 0}\nno log\n')
    with pytest.raises(ValueError, match="line 2: no JSON"):
        read_metrics(tmp_path)
    with pytest.warns(UserWarning, match="line 2: no JSON"):
        run(small_model(), adamw(), batches(), steps=2, log=tmp_path)
    assert path.read_bytes() == b'{"step": 0}\n' + first
    assert path.with_suffix(".damaged").read_bytes() == b'{"step": 0}\nno log\n'
    with path.open("ab") as file:
        file.write(b"\xff\x00")  # unfinished, and no text at all
    assert len(read_metrics(tmp_path)) == 3


def test_a_full_disk_does_not_end_the_run_nor_lose_lines(tmp_path, monkeypatch):
    from jaxformers.training import log

    class Full(log.FileIO):
        calls = 0

        def write(self, data):
            Full.calls += 1
            if Full.calls == 2:
                raise OSError(28, "No space left on device")
            return super().write(data[:70] if Full.calls == 3 else data)

    monkeypatch.setattr(log, "FileIO", Full)
    with pytest.warns(UserWarning, match="No space left"):
        run(small_model(), adamw(), batches(), steps=5, log=tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_shows_the_run_does_not_end_it(tmp_path, monkeypatch):
    pytest.importorskip("tqdm")
    from jaxformers.training import log

    def fail(*_, **__):
        raise OSError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr(log._Bar, "write", fail)
        with pytest.warns(UserWarning, match="without its progress bar: .*Broken pipe"):
            assert run(small_model(), adamw(), batches(), steps=2, progress=True).step == 2
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", None)
        assert run(small_model(), adamw(), batches(), steps=2, progress=True).step == 2


def test_the_curve(tmp_path):
    pytest.importorskip("matplotlib")
    from jaxformers.plot import loss_curve

    data = with_factors([1, np.nan, 1])
    options = {"loss": poisoned_loss, "bad_steps": BadSteps(allowed=1)}
    held_out = [data[0]]
    run(small_model(), adamw(), data, steps=3, log=tmp_path, eval_batches=held_out, **options)
    figure = loss_curve(tmp_path, save=tmp_path / "pictures" / "curve.png", title="a run")
    (axes,) = figure.axes
    assert figure.get_suptitle() == "a run" and len(axes.lines) == 2
    assert (tmp_path / "pictures" / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no log to read"):
        loss_curve(tmp_path / "elsewhere")


def test_tensorboard_gets_the_same_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(small_model(), adamw(), batches(), steps=3, log=tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    rows = read_metrics(tmp_path)
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(row["step"], row["loss"]) for row in rows]


def test_a_bar_with_the_latest_figures(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("jaxformers.training.log.REFRESH", 0.0)  # a speed after one step
    held_out = [batches()[0]]
    run(small_model(), adamw(), batches(), steps=2, progress=True, eval_batches=held_out)
    errors = capsys.readouterr().err
    assert "step 2: evaluation loss" in errors
    for words in ("loss", "rate 3.0e-03", "gradient", "tokens/s", "2/2"):
        assert words in errors


def bad_ids(name):
    batch = dict(batches()[0])
    batch[name] = np.where(np.arange(T) == 2, VOCAB, batch[name])
    return batch


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([bad_ids("tokens")], "tokens must be ids from 0 to 16"),
        ([bad_ids("targets")], "targets must be ids from 0 to 16"),
        ([batches()[0], bad_ids("tokens")], "tokens must be ids"),
        ([{"tokens": batches()[0]["tokens"]}], "must have tokens, targets"),
        ([{name: x.astype(float) for name, x in batches()[0].items()}], "must hold integer ids"),
        ([dict(batches()[0]) | {"loss_mask": np.ones((B, T))}], "mask == 1"),
        ([[1, 2]], "batch 0 must be a dict of arrays"),
        ([batches()[0] | {"text": ["a"] * B}], "batch 0 must have numbers alone, got 'text'"),
        ([], "must not be empty"),
        (Loader, "must give one dict of arrays a step"),
        (batches()[0], "pass \\[batch\\]"),
    ],
)
def test_bad_batches_are_refused(data, words, no_shape_checker):
    with pytest.raises(ValueError, match=words):
        run(small_model(), adamw(), data, steps=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": None}, "either steps or epochs, the length of the training, got neither"),
        ({"epochs": 2}, "got steps=2 and epochs=2. Pass one of them"),
        ({"steps": None, "epochs": 0}, "epochs must be a finite number above 0"),
        ({"steps": None, "epochs": True}, "epochs must be a finite number above 0"),
        ({"eval_every": 0}, "eval_every"),
        ({"accumulate": 3}, "accumulate=3 needs a batch"),
        ({"compute_dtype": jnp.float16}, "float16 is refused"),
        ({"eval_batches": iter([])}, "eval_batches must give its batches anew"),
        ({"eval_batches": batches()[0]}, "eval_batches must be a list"),
        ({"eval_batches": batches}, "eval_batches must be a list"),
        (
            {"loss": lambda model, batch, key: (0.0, 1)},
            "loss must return one floating-point number",
        ),
        ({"eval_batches": []}, "eval_batches must not be empty"),
        ({"eval_batches": [3]}, "the first of eval_batches must be a dict of arrays"),
        ({"loss": sequence_to_sequence_loss}, "is for a Transformer, got a TransformerLM"),
        ({"compute_dtype": "bf16"}, "compute_dtype must be a type"),
        ({"eval_batches": [{"tokens": np.full((2, 3), VOCAB)}]}, "tokens must be ids"),
        ({"checkpoint": "runs/x"}, "checkpoint must be Checkpoints"),
        ({"bad_steps": 3}, "bad_steps must be BadSteps"),
        ({"callbacks": [3]}, "must be a function"),
        ({"callbacks": print}, "callbacks must be a list of functions"),
        ({"key": 0}, "key must be a JAX PRNG key"),
        ({"loss": None}, "loss must be a function"),
    ],
)
def test_bad_options_are_refused(options, words, no_shape_checker):
    with pytest.raises(ValueError, match=words):
        run(small_model(), adamw(), batches(), **{"steps": 2} | options)


@pytest.mark.parametrize(("allowed", "spike"), [(-1, None), (1.5, None), (True, None), (0, 1.0)])
def test_bad_limits_are_refused(allowed, spike, no_shape_checker):
    with pytest.raises(ValueError, match="must be"):
        BadSteps(allowed, spike)


def test_one_program_for_all_steps():
    from jaxformers.training.step import advance

    run(small_model(), adamw(), batches(), steps=1)
    compiled = advance._cached._cache_size()
    run(small_model(), adamw(), batches(seed=4), steps=9)
    assert advance._cached._cache_size() == compiled
    assert eqx.is_array(run(small_model(), adamw(), batches(), steps=1).step)
