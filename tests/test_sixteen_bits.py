"""Models in 16 bits are trained in float32, and whoever trains 16 bits is told so once."""

import warnings
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    Adafactor,
    AdamW,
    Averaged,
    Checkpoints,
    Groups,
    Muon,
    OrbaxCheckpoints,
    TransformerLM,
    as_optimizer,
    cast_floating,
    cross_entropy,
    evaluate,
    fit,
    freeze,
    language_model_loss,
    scan_layers,
    train_step,
)

V, T, B, KEY = 17, 5, 4, jax.random.key(0)
TEXT = np.random.default_rng(3).integers(0, V, (B, T + 1))
BATCH = {"tokens": jnp.asarray(TEXT[:, :-1]), "targets": jnp.asarray(TEXT[:, 1:])}
run = partial(fit, loss=language_model_loss, key=KEY, progress=False)


@eqx.filter_jit
def small_model(dtype=jnp.float32, layers=1):
    model = TransformerLM(V, 12, 3, layers, 20, T, 0.0, use_bias=False, key=jax.random.key(3))
    return cast_floating(model, dtype)


def is_embedding(path, array):
    return path.startswith("embedding")


def types(tree):
    return {str(x.dtype) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))}


def same(a, b):
    a, b = (eqx.filter(x, eqx.is_inexact_array) for x in (a, b))  # without keys
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


OPTIMIZERS = {
    "adamw": AdamW(1e-5),
    "averaged muon": Averaged(Muon(1e-3), 0.9),
    "adafactor": Adafactor(1e-4),
    "groups": Groups([(is_embedding, AdamW(1e-3))], Adafactor(1e-4)),
}


@pytest.mark.parametrize(
    "name, dtype", [(x, "bfloat16") for x in OPTIMIZERS] + [("adamw", "float16")]
)
def test_a_model_in_16_bits_is_trained_as_the_same_one_in_float32(name, dtype):
    half = small_model(dtype)
    training = run(half, OPTIMIZERS[name], [BATCH], steps=2)
    expected = run(cast_floating(half, jnp.float32), OPTIMIZERS[name], [BATCH], steps=2)
    assert same(training, expected) and types(training) == {"float32"}
    assert same(half, small_model(dtype))
    assert types(cast_floating(training.model, dtype)) == {dtype}


def test_small_updates_reach_all_weights():
    """In 16 bits 97 % of them would stay, and all gains."""
    half = small_model(jnp.bfloat16)
    trained = run(half, AdamW(1e-5), [BATCH], steps=1).model
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(half), strict=True):
        used = slice(None) if x.shape[0] != V else np.unique(TEXT[:, :-1])
        assert (x[used] != y[used].astype(jnp.float32)).mean() > 0.99


def test_scanned_layers_in_16_bits():
    half = scan_layers(small_model(jnp.bfloat16, layers=2))
    training = run(half, AdamW(1e-3), [BATCH], steps=2)
    expected = run(cast_floating(half, jnp.float32), AdamW(1e-3), [BATCH], steps=2)
    assert same(training, expected) and types(training.model) == {"float32"}


def test_what_is_frozen_in_16_bits_stays_as_it_is_and_in_its_place():
    """The loss is that of float32 weights; with a `compute_dtype`, all is computed in it."""
    optimizer, half = freeze(AdamW(1e-3), is_embedding), small_model(jnp.bfloat16)
    wide = cast_floating(half, jnp.float32)
    for options in ({}, {"compute_dtype": jnp.bfloat16}, {"accumulate": 2}):
        training = run(half, optimizer, [BATCH], steps=3, **options)
        expected = run(wide, optimizer, [BATCH], steps=3, **options)
        frozen, given = training.model.embedding, half.embedding
        pairs = zip(jax.tree.leaves(frozen), jax.tree.leaves(given), strict=True)
        assert all(x is y for x, y in pairs) and types(frozen) == {"bfloat16"}
        assert same(training.optimizer_state, expected.optimizer_state)
        for part in ("decoder", "output"):
            assert same(getattr(training.model, part), getattr(expected.model, part))
        loss = evaluate(training.model, [BATCH], loss=language_model_loss)
        assert loss == evaluate(expected.model, [BATCH], loss=language_model_loss)
    assert same(half, small_model(jnp.bfloat16))  # nothing was written over


def test_a_step_with_frozen_weights_of_16_bits_is_that_of_float32():
    optimizer, losses = freeze(AdamW(1e-3), is_embedding), []
    half = small_model(jnp.bfloat16)
    mixed = cast_floating(half, jnp.float32)
    mixed = eqx.tree_at(lambda m: m.embedding, mixed, half.embedding)
    for model in (mixed, cast_floating(half, jnp.float32)):
        state = optimizer.init(model)
        *_, loss = train_step(
            *(model, state, BATCH), optimizer=optimizer, loss=language_model_loss, key=KEY
        )
        losses.append(loss)
    assert losses[0] == losses[1]


def test_a_run_in_16_bits_goes_on_where_it_was(tmp_path):
    half, optimizer = small_model(jnp.bfloat16), Averaged(AdamW(1e-3), 0.9)
    whole = run(half, optimizer, [BATCH], steps=4)
    run(half, optimizer, [BATCH], steps=2, checkpoint=Checkpoints(tmp_path))
    resumed = run(half, optimizer, [BATCH], steps=4, checkpoint=Checkpoints(tmp_path))
    assert same(resumed, whole)


def test_a_run_that_was_begun_with_16_bit_weights_goes_on_in_float32(tmp_path):
    """As earlier versions saved them."""
    half, optimizer = small_model(jnp.bfloat16), AdamW(1e-3)
    training = run(half, optimizer, [BATCH], steps=2)
    narrow = eqx.tree_at(lambda t: t.model, training, cast_floating(training.model, jnp.bfloat16))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(narrow, 2)
    checkpoints.wait()
    resumed = run(half, optimizer, [BATCH], steps=2, checkpoint=checkpoints)
    wide = cast_floating(narrow.model, jnp.float32)
    assert same(resumed.model, wide) and same(resumed.optimizer_state, training.optimizer_state)
    checkpoints.save(training, 3)
    with pytest.raises(ValueError, match="float32 .* there, bfloat16 .* here"):
        checkpoints.restore(narrow)


def test_orbax_gives_16_bit_weights_back_in_float32(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    checkpoints = OrbaxCheckpoints(tmp_path)
    half = {"w": jnp.asarray([0.1, 0.7], jnp.bfloat16)}
    checkpoints.save(half, 2)
    wide, _ = checkpoints.restore({"w": jnp.zeros(2)})
    assert same(wide, cast_floating(half, jnp.float32))


def told(function):
    """How often weights of 16 bits are spoken of, and from which file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    found = [x for x in caught if "of 16 bits are trained" in str(x.message)]
    assert len(found) == len(caught) and {x.filename for x in found} <= {__file__}
    return len(found)


def tiny(dtype=jnp.float32):
    """Weights of which nothing has to be compiled for long."""
    table = np.random.default_rng(2).normal(size=(V, 3))
    weights = {"embedding": table, "w": table.T, "count": np.arange(2), "b": None}
    return cast_floating(jax.tree.map(jnp.asarray, weights), dtype)


def tiny_loss(weights, batch, key=None):
    hidden = weights["embedding"].astype(jnp.float32)[batch["tokens"]]
    return cross_entropy(hidden @ weights["w"].astype(jnp.float32), batch["targets"])


def steps(weights, optimizer, **options):
    """Three steps of `train_step`."""
    state = as_optimizer(optimizer).init(weights)
    for _ in range(3):
        weights, state, _ = train_step(
            *(weights, state, BATCH), optimizer=optimizer, loss=tiny_loss, key=KEY, **options
        )


def loop(weights, optimizer, jit=False):
    """Three steps of one's own, compiled as a whole or not."""

    def step(weights, state):
        grads = eqx.filter_grad(tiny_loss)(weights, BATCH)
        return optimizer.update(grads, state, weights)

    optimizer = as_optimizer(optimizer)
    state, step = optimizer.init(weights), eqx.filter_jit(step) if jit else step
    for _ in range(3):
        weights, state = step(weights, state)


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", [steps, loop, partial(loop, jit=True)])
def test_steps_on_weights_of_16_bits_warn_once(way, dtype):
    for optimizer in (
        AdamW(1e-3),
        AdamW(1e-3),  # another one: another warning
        Averaged(Groups([(is_embedding, AdamW(1e-3))], Adafactor(1e-4)), 0.9),
        freeze(AdamW(1e-3), is_embedding),
    ):
        assert told(lambda o=optimizer: way(tiny(dtype), o)) == 1
        assert told(lambda o=optimizer: way(tiny(dtype), o)) == 0
    frozen = tiny() | {"embedding": tiny(dtype)["embedding"]}
    assert told(lambda: way(tiny(), AdamW(1e-3))) == 0
    if way is steps:  # in a loop of one's own, whoever gives gradients of it trains it
        assert told(lambda: way(frozen, freeze(AdamW(1e-3), is_embedding))) == 0


def test_fit_and_computing_in_16_bits_warn_of_nothing():
    assert told(lambda: steps(tiny(), AdamW(1e-3), compute_dtype=jnp.bfloat16)) == 0
    assert told(lambda: run(small_model(jnp.bfloat16), AdamW(1e-3), [BATCH], steps=1)) == 0


def test_steps_of_optax_on_weights_of_16_bits_warn_once():
    optax = pytest.importorskip("optax")
    for way in (steps, loop):
        lion = optax.lion(1e-3)
        assert told(lambda w=way, o=lion: w(tiny(jnp.bfloat16), o)) == 1
        assert told(lambda w=way, o=lion: w(tiny(jnp.bfloat16), o)) == 0


def test_optax_rounds_weights_of_16_bits_once():
    optax = pytest.importorskip("optax")
    weights = {"w": jnp.asarray(np.random.default_rng(1).normal(size=99), jnp.bfloat16)}
    grads = {"w": jnp.asarray(np.random.default_rng(2).normal(size=99), jnp.float32)}
    descent = as_optimizer(optax.sgd(0.037))
    with pytest.warns(UserWarning, match="1 arrays of 16 bits"):
        trained, _ = descent.update(grads, descent.init(weights), weights)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optax.sgd(0.037).update(grads, optax.sgd(0.037).init(weights), weights)
        expected = optax.apply_updates(weights, updates)
    assert same(trained, expected)
