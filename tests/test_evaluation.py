"""What is measured of a model: the loss and the cross-entropy in it, of which weights; the best."""

import copy
import math
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    AdamW,
    Averaged,
    Checkpoints,
    Groups,
    KeepBest,
    OutputLayer,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    chunks,
    evaluate,
    fit,
    language_model_loss,
    load,
    masked_language_model_loss,
    save,
    sequence_to_sequence_loss,
)
from jaxformers.training import MeanLoss, Report
from jaxformers.training.log import read_metrics

V, T, B, KEY = 17, 5, 3, jax.random.key(0)
TEXT = np.random.default_rng(3).integers(0, V, (2, B, T + 1))
COUNTED = [np.ones((B, T), bool), np.arange(T) < np.array([[1], [0], [3]])]


def batches(**more):
    arrays = ({"tokens": x[:, :-1], "targets": x[:, 1:]} for x in TEXT)
    return [jax.device_put(x | {"loss_mask": m}) for x, m in zip(arrays, COUNTED, strict=True)]


def language_model():
    return TransformerLM(V, 12, 3, 1, 20, T, 0.0, key=KEY)


def pairs():
    return [{"src": x["tokens"][:, :3], "tgt": x.pop("tokens"), **x} for x in batches()]


CASES = {
    "language": (language_model, language_model_loss, batches()),
    "pair": (
        lambda: Transformer(V, V, 12, 3, 1, 1, 20, T, 0.0, key=KEY),
        sequence_to_sequence_loss,
        pairs(),
    ),
    "masked": (
        lambda: TransformerEncoder(V, 12, 3, 1, 20, T, 0.0, output=OutputLayer, key=KEY),
        masked_language_model_loss,
        batches(),
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CASES)
def test_the_cross_entropy_is_beside_what_is_minimized(name, monkeypatch):
    build, loss, data = CASES[name]
    model, smooth = build(), partial(loss, label_smoothing=0.2)
    plain = evaluate(model, data, loss=loss)
    by_hand = [float(loss(model, batch)) for batch in data]
    expected = np.average(by_hand, weights=[x.sum() for x in COUNTED])
    np.testing.assert_allclose([plain, plain.cross_entropy], expected, rtol=1e-6)
    np.testing.assert_allclose(plain.perplexity, np.exp(expected), rtol=1e-6)
    for other in (smooth, partial(smooth, z_loss=0.1)):
        mean = evaluate(model, data, loss=other)
        by_hand = [float(other(model, batch)) for batch in data]
        np.testing.assert_allclose(
            mean, np.average(by_hand, weights=[x.sum() for x in COUNTED]), rtol=1e-6
        )
        np.testing.assert_allclose(mean.cross_entropy, expected, rtol=1e-6)
        assert abs(mean - expected) > 1e-4
    monkeypatch.setattr(chunks, "choose_chunk", lambda rows, vocab_size, devices, limit: 2)
    mean = evaluate(model, data, loss=partial(loss, label_smoothing=0.25))
    np.testing.assert_allclose(mean.cross_entropy, expected, rtol=1e-6)


def test_the_cross_entropy_of_other_losses_is_not_known():
    model, data = language_model(), batches()
    expected = evaluate(model, data, loss=language_model_loss)
    mean = evaluate(model, data, loss=lambda m, b, k: language_model_loss(m, b, k))
    assert mean == expected and mean.cross_entropy is None and mean.perplexity is None


def test_a_mean_loss_is_a_number():
    mean = MeanLoss(2.5, 1.5)
    assert mean == 2.5 and f"{mean:.2f}" == "2.50" and isinstance(mean, float)
    assert mean.perplexity == math.exp(1.5) and MeanLoss(1e4, 1e4).perplexity == math.inf
    for again in (copy.deepcopy(mean), pickle.loads(pickle.dumps(mean))):
        assert (again, again.cross_entropy) == (2.5, 1.5)


def run(*args, **options):
    options = {"loss": language_model_loss, "eval_batches": batches(), "eval_every": 2} | options
    return fit(*args, batches(), key=KEY, progress=False, **options)


def test_both_are_reported(tmp_path):
    reports, smooth = [], partial(language_model_loss, label_smoothing=0.2, z_loss=0.01)
    training = run(
        *(language_model(), AdamW(1e-2)),
        steps=2,
        loss=smooth,
        log=tmp_path,
        callbacks=[reports.append],
    )
    mean = evaluate(training.model, batches(), loss=smooth)
    expected = {"eval_loss": float(mean), "eval_cross_entropy": mean.cross_entropy}
    assert read_metrics(tmp_path)[-1] == {"step": 2, **expected}
    assert reports[0].metrics.items() >= expected.items() and reports[0].begun == 0
    reports.clear()
    run(language_model(), AdamW(1e-2), steps=2, callbacks=[reports.append])
    assert "eval_cross_entropy" not in reports[0].metrics  # which is the loss
    run(*(language_model(), AdamW(1e-2)), steps=2, loss=smooth, eval_loss=language_model_loss)


def zeros(weights, state):
    return jax.tree.map(jnp.zeros_like, weights)


def test_other_weights_are_evaluated():
    """The trained ones beside an average, or any that are made of the state."""
    optimizer = Averaged(AdamW(1e-2), decay=0.5)
    for eval_weights, expected in (
        (None, optimizer.averaged),
        (optimizer.averaged, optimizer.averaged),
        (lambda weights, state: weights, lambda model, state: model),
        (zeros, None),
    ):
        reports = []
        options = {"callbacks": [reports.append], "eval_weights": eval_weights}
        training = run(language_model(), optimizer, steps=2, **options)
        found = reports[0].metrics["eval_loss"]
        if expected is None:
            np.testing.assert_allclose(found, np.log(V), rtol=1e-6)
            continue
        model = expected(training.model, training.optimizer_state)
        assert found == evaluate(model, batches(), loss=language_model_loss)
        for x, y in zip(jax.tree.leaves(reports[0].model), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(x, y)


def test_weights_of_another_form_are_refused(no_shape_checker):
    with pytest.raises(ValueError, match="eval_weights must return weights of the form"):
        run(language_model(), AdamW(1e-2), steps=1, eval_weights=lambda weights, state: state)
    with pytest.raises(ValueError, match="eval_weights must be a function"):
        run(language_model(), AdamW(1e-2), steps=1, eval_weights=0.5)


def test_schedule_free_weights_are_evaluated():
    optax = pytest.importorskip("optax")
    free = optax.contrib.schedule_free_adamw(1e-2, warmup_steps=1)

    def weights_of(weights, state):
        return optax.contrib.schedule_free_eval_params(state, weights)

    reports = []
    options = {"eval_weights": weights_of, "callbacks": [reports.append]}
    training = run(language_model(), free, steps=4, **options)
    weights, rest = eqx.partition(training.model, eqx.is_inexact_array)
    state = training.optimizer_state
    b1 = state.b1

    def average(y, z):  # x in the paper, of which y = b1 x + (1 - b1) z is trained
        return (y - (1 - b1) * z) / b1

    expected = eqx.combine(jax.tree.map(average, weights, state.z), rest)
    mean = evaluate(expected, batches(), loss=language_model_loss)
    np.testing.assert_allclose(reports[-1].metrics["eval_loss"], mean, rtol=1e-5)
    assert abs(evaluate(training.model, batches(), loss=language_model_loss) - mean) > 1e-4
    grouped = Groups([(lambda path, x: path.startswith("output"), AdamW(1e-2))], free)
    run(
        *(language_model(), grouped),
        steps=2,
        eval_weights=lambda weights, state: weights_of_group(weights, state, weights_of),
    )


def weights_of_group(weights, state, weights_of):
    """Those of the second group in its way, the others as they are."""
    inside = jax.tree.map(
        lambda z, w: None if z is None else w, state[1].z, weights, is_leaf=lambda x: x is None
    )
    return eqx.combine(weights_of(inside, state[1]), weights)


def report(step, value, begun=0, **more):
    return Report(step, {"eval_loss": value, **more}, {"w": jnp.full(3, step)}, begun)


def kept(path):
    return int(load(path)["w"][0])


def test_the_best_is_kept_where_a_run_goes_on(tmp_path):
    path = tmp_path / "runs" / "best.safetensors"
    keep = KeepBest(path)
    for step, value, best in (
        (2, 2.0, 2),
        (4, 1.5, 4),
        (6, 1.7, 4),
        (8, math.nan, 4),
        (10, 1.5, 4),
    ):
        assert keep(report(step, value)) is None
        assert kept(path) == keep.step == best
    assert keep.best == 1.5
    for step, value, best in ((8, 1.6, 4), (10, 1.5, 4), (12, 1.4, 12)):  # in other processes
        KeepBest(path)(report(step, value, begun=6))
        assert kept(path) == best
    KeepBest(path)(report(2, 9.0))  # a run that begins anew
    assert kept(path) == 2


def test_the_best_by_another_metric(tmp_path):
    path = tmp_path / "best.safetensors"
    keep = KeepBest(path, metric="eval_cross_entropy")
    keep(report(1, 1.0, eval_cross_entropy=2.0))
    keep(report(2, 2.0, eval_cross_entropy=1.0))
    assert kept(path) == 2
    with pytest.raises(ValueError, match="needs 'eval_cross_entropy', and fit reports eval_loss"):
        keep(report(3, 1.0))
    with pytest.raises(ValueError, match="does not note the eval_loss"):
        KeepBest(path)
    save(tmp_path / "other.safetensors", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="there already, and does not note the eval_loss"):
        KeepBest(tmp_path / "other.safetensors")


def test_the_best_of_a_run_that_gets_worse(tmp_path):
    """After going on with a learning rate that is far too large."""
    path = tmp_path / "best.safetensors"
    for steps, rate in ((4, 1e-2), (8, 3.0)):
        training = run(
            *(language_model(), AdamW(rate)),
            steps=steps,
            checkpoint=Checkpoints(tmp_path / "run"),
            callbacks=[KeepBest(path)],
        )
        best = load(path) if steps == 4 else best
    means = [evaluate(x, batches(), loss=language_model_loss) for x in (training.model, load(path))]
    assert means[0] > means[1] == evaluate(best, batches(), loss=language_model_loss)


def test_a_file_that_cannot_be_written_leaves_the_best(tmp_path, monkeypatch):
    keep = KeepBest(tmp_path / "best.safetensors")
    keep(report(1, 2.0))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("jaxformers.checkpoint.model_file.write_sealed_file", full_disk)
        keep(report(2, 1.0))
    assert kept(keep.path) == keep.step == 1
    keep(report(3, 1.5))
    assert kept(keep.path) == 3


def full_disk(*args):
    raise OSError(28, "the disk is full")
