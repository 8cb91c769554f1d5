"""Targets that do not count, -100, and ids that do not exist: the same wherever they are given."""

from collections import UserDict
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    AdamW,
    OutputLayer,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    chunked_cross_entropy,
    cross_entropy,
    evaluate,
    fit,
    language_model_loss,
    masked_language_model_loss,
    sequence_to_sequence_loss,
    train_step,
)
from jaxformers.training import count_targets, objectives
from jaxformers.training.step import _train_step

# Users hand in NumPy's arrays as well.
pytestmark = pytest.mark.usefixtures("no_shape_checker")

V, T, B = 17, 5, 4
RNG = np.random.default_rng(3)
TEXT = RNG.integers(0, V, (B, T + 1))
COUNTED = np.arange(T) < np.array([[5], [0], [2], [3]])
LOGITS = RNG.normal(size=(B, T, V)).astype(np.float32)
KEY = jax.random.key(0)


def with_ignored(targets=TEXT[:, 1:]):
    return np.where(COUNTED, targets, -100)


def language_batch(**more):
    return {"tokens": TEXT[:, :-1], "targets": TEXT[:, 1:]} | more


def language_model():
    return TransformerLM(V, 12, 3, 1, 20, T, 0.0, key=KEY)


CASES = {
    "language": (language_model, language_model_loss, language_batch()),
    "pair": (
        lambda: Transformer(V, V, 12, 3, 1, 1, 20, T, key=KEY),
        sequence_to_sequence_loss,
        {"src": TEXT[:, :3], "tgt": TEXT[:, :-1], "targets": TEXT[:, 1:]},
    ),
    "masked": (
        lambda: TransformerEncoder(V, 12, 3, 1, 20, T, output=OutputLayer, key=KEY),
        masked_language_model_loss,
        language_batch(loss_mask=np.ones((B, T), bool)),
    ),
}


def in_chunks(logits, targets, *args, **options):
    return chunked_cross_entropy(lambda x: x, logits, targets, *args, chunk=3, **options)


@pytest.mark.parametrize("loss", [cross_entropy, in_chunks])
def test_the_loss_is_that_of_torch(loss):
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS).flatten(0, 1), torch.tensor(with_ignored()).flatten()
    )
    for targets in (with_ignored(), jnp.asarray(with_ignored()), with_ignored().astype(np.int8)):
        for run in (loss, jax.jit(loss)):
            np.testing.assert_allclose(run(LOGITS, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, in_chunks])
def test_what_minus_100_would_be_in_another_type_is_no_minus_100(loss):
    for kind, number in ((np.uint32, 2**32 - 100), (np.uint8, 156), (np.int64, 2**32 - 100)):
        targets = TEXT[:, 1:].astype(kind)
        targets[2, 1] = number
        with pytest.raises(ValueError, match=f"got {number}.*-100 .*loss_mask"):
            loss(LOGITS, targets)
    with pytest.raises(ValueError, match="got -100"):
        loss(LOGITS, with_ignored(), ignore_index=None)
    with pytest.raises(ValueError, match="got -100"):
        loss(LOGITS, with_ignored(), ignore_index=-1)


@pytest.mark.parametrize("name", CASES)
def test_ignored_and_masked_targets_are_the_same(name):
    build, loss, batch = CASES[name]
    model, ignored = build(), batch | {"targets": with_ignored()}
    expected = loss(model, batch | {"loss_mask": COUNTED})
    np.testing.assert_allclose(loss(model, ignored), expected, rtol=1e-6)
    on_device = jax.device_put(ignored)
    np.testing.assert_allclose(loss(model, on_device), expected, rtol=1e-6)
    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, on_device)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
    mean = evaluate(model, [ignored, batch], loss=loss)  # 10 and 20 targets count
    np.testing.assert_allclose(mean, (expected + 2 * loss(model, batch)) / 3, rtol=1e-6)


def test_the_same_targets_count_wherever_they_are_counted():
    real, more = np.arange(T) < np.array([[4], [5], [1], [2]]), np.ones((B, T), bool)
    positions = np.where(real, np.arange(T), -1)
    for given, expected in (
        ({}, COUNTED),
        ({"padding_mask": real}, COUNTED & real),
        ({"tgt_padding_mask": real}, COUNTED & real),
        ({"positions": positions}, COUNTED & real),
        ({"positions": positions, "padding_mask": more}, COUNTED & real),
        ({"padding_mask": real, "loss_mask": more}, COUNTED),
    ):
        batch = language_batch(**given) | {"targets": with_ignored()}
        for arrays in (batch, jax.device_put(batch)):
            assert count_targets(arrays) == expected.sum()
    labels = {"tokens": TEXT, "padding_mask": np.ones(TEXT.shape, bool), "targets": np.ones(B)}
    assert count_targets(labels) == TEXT.size  # targets of another kind
    assert count_targets({"tokens": TEXT}) == B
    assert count_targets({"targets": TEXT.astype(np.uint8)}) == TEXT.size


def test_parts_of_a_batch_are_weighed_by_what_counts():
    ignored = language_batch() | {"targets": with_ignored()}
    results = []
    for batch, parts in ((language_batch(loss_mask=COUNTED), 1), (ignored, 2), (ignored, 4)):
        model, optimizer = language_model(), AdamW(1e-2)
        state = optimizer.init(model)
        results.append(
            train_step(
                *(model, state, batch),
                optimizer=optimizer,
                loss=language_model_loss,
                key=KEY,
                accumulate=parts,
            )
        )
    whole, *others = results
    for other in others:
        np.testing.assert_allclose(other[2], whole[2], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(other[1]), jax.tree.leaves(whole[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_labels_of_a_loss_of_ones_own_are_counted():
    """By their rows, the parts of an accumulated batch would have other weights than its mean."""
    labels = with_ignored()
    assert count_targets({"input_ids": TEXT[:, :-1], "labels": labels}) == COUNTED.sum() == 10
    assert count_targets({"x": TEXT[:, :-1], "labels": TEXT[:, 0]}) == B
    assert count_targets({"labels": labels, "targets": TEXT, "x": TEXT}) == TEXT.size
    assert count_targets({"x": TEXT[:, :-1], "labels": None}) == B


@pytest.mark.parametrize("kind", ["torch", "lists", "mapping"])
def test_a_step_takes_the_arrays_that_fit_takes(kind):
    batch = language_batch(targets=with_ignored())
    if kind == "torch":
        torch = pytest.importorskip("torch")
        given = {name: torch.tensor(x) for name, x in batch.items()}
    else:
        given = {name: x.tolist() for name, x in batch.items()}
        given = given if kind == "lists" else UserDict(batch)

    def step(batch):
        model, optimizer = language_model(), AdamW(1e-2)
        return train_step(
            model,
            optimizer.init(model),
            batch,
            optimizer=optimizer,
            loss=language_model_loss,
            key=KEY,
            accumulate=2,
        )

    expected = step(batch)
    compiled = _train_step._cached._cache_size()
    assert jax.tree.all(jax.tree.map(np.array_equal, step(given), expected))
    assert _train_step._cached._cache_size() == compiled  # numbers are no constants
    with pytest.raises(ValueError, match="targets must be ids from 0 to 16 .* got 40"):
        step(given | {"targets": np.where(COUNTED, 40, -100).tolist()})


def test_if_nothing_counts_nothing_is_learned():
    model, batch = language_model(), language_batch(targets=np.full((B, T), -100))
    value, grads = eqx.filter_value_and_grad(language_model_loss)(model, batch)
    assert value == 0 and not any(x.any() for x in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="there must be targets that count"):
        evaluate(model, [batch], loss=language_model_loss)


def wrong_batches(name):
    """Batches with an id that does not exist, as NumPy's and as JAX's arrays."""
    batch = CASES[name][2]
    for key, ids in [("targets", (-1, -101, V, V + 400)), ("tokens", (-100, V)), ("src", (V,))]:
        for wrong in ids if key in batch else ():
            array = batch[key].copy()
            array[1, 2] = wrong
            for make in (np.asarray, jnp.asarray):
                yield key, wrong, batch | {key: make(array)}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_that_is_refused_changes_nothing(name):
    build, loss, _ = CASES[name]
    model, optimizer = build(), AdamW(1e-2)
    state = optimizer.init(model)
    options = {"optimizer": optimizer, "loss": loss, "key": KEY}
    for key, wrong, batch in wrong_batches(name):
        refused = partial(pytest.raises, ValueError)
        words = f"{key} must be ids from 0 to {V - 1} .* got {wrong}"
        words += ".* -100 .*loss_mask" if key == "targets" else ""
        with refused(match=words):
            loss(model, batch)
        with refused(match=words):
            evaluate(model, [batch], loss=partial(loss, z_loss=0.1))
        with refused(match=words):
            train_step(model, state, batch, **options)
        with refused(match=words):
            fit(model, optimizer, [batch], loss=loss, steps=1, key=KEY, progress=False)
    assert not any(x.is_deleted() for x in jax.tree.leaves((model, state)))
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(build()), strict=True):
        np.testing.assert_array_equal(x, y)


def unknown(model, batch, key):
    """A loss of one's own, whose ids nobody looks at before the step."""
    return language_model_loss(model, batch, key)


def test_ids_that_are_not_looked_at_make_all_gradients_nan_and_change_nothing():
    optimizer = AdamW(1e-2)
    for key, wrong, batch in wrong_batches("language"):
        model = language_model()
        if key == "tokens":  # what it stands at neither counts nor is seen by what does
            batch |= {"loss_mask": np.arange(T) < 2 + np.zeros((B, 1), int)}
        step = eqx.filter_jit(eqx.filter_value_and_grad(language_model_loss))
        value, grads = step(model, jax.device_put(batch))
        assert jnp.isnan(value), wrong
        assert all(jnp.isnan(x).any() for x in jax.tree.leaves(grads))
        state = optimizer.init(model)
        model, state, value = train_step(
            model, state, batch, optimizer=optimizer, loss=unknown, key=KEY
        )
        assert jnp.isnan(value) and state.step == 0
        for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(language_model()), strict=True):
            np.testing.assert_array_equal(x, y)


def test_ids_on_an_accelerator_are_named_when_the_step_is_known_to_be_bad(monkeypatch):
    values = objectives._values
    monkeypatch.setattr(objectives, "_values", lambda x, wait: values(x, wait) if wait else None)
    batch = jax.device_put(language_batch(targets=np.where(COUNTED, TEXT[:, 1:], -1)))
    options = {"loss": language_model_loss, "key": KEY, "progress": False}
    with pytest.raises(ValueError, match="targets must be ids .* got -1.* -100 .*loss_mask"):
        fit(language_model(), AdamW(1e-2), [batch], steps=2, **options)


def test_a_masked_language_model_needs_to_be_told_what_was_masked():
    build, loss, batch = CASES["masked"]
    batch = {name: x for name, x in batch.items() if name != "loss_mask"}
    with pytest.raises(ValueError, match="loss_mask.* targets != -100"):
        loss(build(), batch)
