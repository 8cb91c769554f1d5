"""Steps write over what they are given: states that share arrays, and optax's other arguments."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    AdamW,
    Averaged,
    Groups,
    Muon,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    as_optimizer,
    cast_floating,
    cross_entropy,
    evaluate,
    fit,
    freeze,
    language_model_loss,
    save,
    train_step,
)
from jaxformers.optim import Optimizer

V, D, KEY = 7, 4, jax.random.key(0)
TEXT = np.random.default_rng(3).integers(0, V, (4, 6))
BATCH = {"tokens": jnp.asarray(TEXT[:, :-1]), "targets": jnp.asarray(TEXT[:, 1:])}


@pytest.fixture
def optax():
    return pytest.importorskip("optax")


class Tiny(eqx.Module):
    """Weights, a vector, integers, and a leaf that is no array."""

    embedding: jax.Array
    w: jax.Array
    b: jax.Array
    count: jax.Array
    activation: object


def tiny():
    table, w = np.random.default_rng(5).normal(size=(2, V, D)) / 2
    return Tiny(*map(jnp.float32, (table, w.T, np.zeros(V))), jnp.arange(3), jnp.tanh)


def loss(model, batch, key=None):
    logits = model.activation(model.embedding[batch["tokens"]]) @ model.w + model.b
    return cross_entropy(logits, batch["targets"])


def is_vector(path, array):
    return path == "b"


run = partial(fit, loss=loss, key=KEY, progress=False)


def steps(model, optimizer, count=4, **options):
    state = as_optimizer(optimizer).init(model)
    for _ in range(count):
        model, state, value = train_step(
            *(model, state, BATCH), optimizer=optimizer, loss=loss, key=KEY, **options
        )
    return model, state


def by_optax(optax, transformation, model, count=4):
    """A loop as optax's documentation has it."""
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    state = transformation.init(weights)

    @jax.jit
    def step(weights, state):
        value, grads = jax.value_and_grad(lambda w: loss(eqx.combine(w, rest), BATCH))(weights)
        extra = optax.with_extra_args_support(transformation)
        updates, state = extra.update(grads, state, weights, value=value)
        return optax.apply_updates(weights, updates), state

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(count):
            weights, state = step(weights, state)
    return eqx.combine(weights, rest)


def assert_same(a, b, atol=1e-6):
    a, b = (jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


TRANSFORMATIONS = {
    # Their states begin with the weights.
    "prodigy": lambda o: o.contrib.prodigy(1.0),
    "dog": lambda o: o.contrib.dog(1.0),
    "mechanize": lambda o: o.contrib.mechanize(o.adam(1e-2)),
    "schedule_free": lambda o: o.contrib.schedule_free_sgd(0.1),
    # They ask for the loss.
    "polyak_sgd": lambda o: o.polyak_sgd(),
    "momo": lambda o: o.contrib.momo(),
    "momo_adam": lambda o: o.contrib.momo_adam(),
    "reduce_on_plateau": lambda o: o.chain(
        o.adam(1e-2), o.contrib.reduce_on_plateau(patience=1, rtol=0.9)
    ),
    # Others in their own way.
    "several steps": lambda o: o.MultiSteps(o.adam(1e-2), 2),
    "injected": lambda o: o.inject_hyperparams(o.adamw)(learning_rate=jnp.asarray(1e-2)),
    "lbfgs": lambda o: o.lbfgs(1e-2, linesearch=None),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_optax_transformations_are_taken_as_in_optax(optax, name):
    transformation = TRANSFORMATIONS[name](optax)
    plain = getattr(transformation, "gradient_transformation", lambda: transformation)()
    expected = by_optax(optax, plain, tiny())
    assert any((x != y).any() for x, y in [(expected.w, tiny().w)])
    model, given = tiny(), tiny()
    assert_same(run(given, transformation, [BATCH], steps=4).model, expected)
    assert_same(given, model, 0)
    # As a group of everything, an average beside it; of a batch in parts the loss is their mean.
    wrapped = Averaged(Groups([(lambda path, x: True, transformation)], None), 0.9)
    assert_same(steps(tiny(), wrapped, accumulate=2)[0], expected, 1e-5)


@pytest.mark.parametrize("name", ["polyak_sgd", "prodigy"])
def test_optax_transformations_in_groups(optax, name):
    """For some of the leaves, with Muon around or the others frozen."""
    for optimizer in (
        Groups([(is_vector, TRANSFORMATIONS[name](optax))], AdamW(1e-2)),
        Muon(1e-2, rest=TRANSFORMATIONS[name](optax), hidden=lambda path, x: path == "w"),
        freeze(TRANSFORMATIONS[name](optax), is_vector),
    ):
        first, _ = steps(tiny(), optimizer)
        assert_same(run(tiny(), optimizer, [BATCH], steps=4).model, first)
        assert loss(first, BATCH) < loss(tiny(), BATCH)


def test_further_arguments_reach_those_that_take_them(optax):
    """In a loop of one's own: the loss, and what a line search evaluates."""
    values = []

    def update(updates, state, params=None, *, value, **extra):
        values.append(value)
        return updates, state

    asking = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    groups = Groups([(is_vector, asking)], Averaged(optax.sgd(0.1)))
    assert groups.takes("value") and not Groups([(is_vector, AdamW(1.0))], None).takes("value")
    grads = eqx.filter_grad(loss)(tiny(), BATCH)
    groups.update(grads, groups.init(tiny()), tiny(), value=jnp.asarray(2.0))
    assert len(values) == 1
    for optimizer in (AdamW(1e-2), Averaged(AdamW(1e-2)), Groups([(is_vector, None)], AdamW(1.0))):
        with pytest.raises(TypeError, match="value"):
            optimizer.update(grads, optimizer.init(tiny()), tiny(), value=jnp.asarray(2.0))

    def distance(weights):
        return ((weights["w"] - 1) ** 2).sum()

    weights, search = {"w": jnp.asarray([3.0, -2.0])}, as_optimizer(optax.lbfgs())
    state = search.init(weights)
    for _ in range(4):
        value, grads = jax.value_and_grad(distance)(weights)
        extra = {"value": value, "grad": grads, "value_fn": distance}
        weights, state = search.update(grads, state, weights, **extra)
    np.testing.assert_allclose(weights["w"], [1, 1], atol=1e-4)


def refused(optax):
    """Transformations that steps have too little for, and what names them."""
    sgd = optax.sgd(1.0)
    yield optax.lbfgs(), "value_fn.* optax.lbfgs"
    yield optax.chain(sgd, optax.scale_by_backtracking_linesearch(3)), "backtracking_linesearch"
    yield optax.contrib.sam(sgd, sgd, opaque_mode=True), "grad_fn .*sam with opaque_mode"
    yield optax.contrib.sophia(1e-3), "obj_fn .*sophia"
    yield optax.chain(sgd, optax.monitor({"n": optax.global_norm})), "optax.monitor"
    yield optax.lookahead(sgd, 3, 0.5), "optax.lookahead"
    yield optax.contrib.galore(1e-3), "optax.contrib.galore"
    yield optax.contrib.dpsgd(1e-3, 1.0, 0.1, 0), "batch dimension"


@pytest.mark.filterwarnings("ignore")  # of optax
def test_transformations_that_cannot_work_are_refused_by_name_before_the_first_step(optax):
    model = tiny()
    for transformation, words in refused(optax):
        with pytest.raises(ValueError, match=words):
            run(model, transformation, [BATCH], steps=1)
        with pytest.raises(ValueError, match=words):
            steps(model, transformation)
    for wrapped in (Averaged(optax.lbfgs()), Groups([(is_vector, optax.lbfgs())], AdamW(1e-2))):
        with pytest.raises(ValueError, match="optax.lbfgs"):
            run(model, wrapped, [BATCH], steps=1)
    assert_same(model, tiny(), 0)


class Keeping(Optimizer):
    """Gradient descent that remembers the weights before and after, in the same arrays."""

    def init(self, model):
        weights = eqx.filter(model, eqx.is_inexact_array)
        return {
            "first": weights,
            "again": [weights, weights],
            "last": weights,
            "count": model.count,
        }

    def update(self, grads, state, model):
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        model = eqx.apply_updates(model, updates)
        last = eqx.filter(model, eqx.is_inexact_array)
        return model, state | {"last": last, "again": [last, last], "count": model.count}


class Weighing(Optimizer):
    """Gradient descent of one's own that asks for the loss, and whose state changes its type."""

    def init(self, model):
        return jnp.zeros((), jnp.int32)

    @eqx.filter_jit
    def update(self, grads, state, model, value):
        updates = jax.tree.map(lambda g: -0.1 * value * g, grads)
        return eqx.apply_updates(model, updates), state.astype(jnp.float32) + value


def test_an_optimizer_of_ones_own_may_ask_for_the_loss():
    expected, total = tiny(), 0.0
    for _ in range(2):
        value, grads = eqx.filter_value_and_grad(loss)(expected, BATCH)
        expected = eqx.apply_updates(expected, jax.tree.map(lambda g, v=value: -0.1 * v * g, grads))
        total += value
    for optimizer in (Weighing(), Groups([(lambda path, x: True, Weighing())], None)):
        model, state = steps(tiny(), optimizer, 2)
        assert_same(model, expected)
        np.testing.assert_allclose(jax.tree.leaves(state)[0], total, rtol=1e-6)
        assert_same(run(tiny(), optimizer, [BATCH], steps=2).model, expected)


def test_states_may_hold_the_weights_in_any_number_of_places():
    expected, grads = tiny(), None
    for _ in range(3):
        grads = eqx.filter_grad(loss)(expected, BATCH)
        expected = eqx.apply_updates(expected, jax.tree.map(lambda g: -0.1 * g, grads))
    training = run(tiny(), Keeping(), [BATCH], steps=3)
    for model, state in (steps(tiny(), Keeping(), 3), (training.model, training.optimizer_state)):
        assert_same(model, expected)
        assert_same(state["last"], eqx.filter(model, eqx.is_inexact_array), 0)
        assert_same(state["first"], eqx.filter(tiny(), eqx.is_inexact_array), 0)


def test_one_array_may_be_at_two_places_of_a_model():
    def build(again):
        first = jnp.zeros(V)
        return {"one": first, "two": first if again else jnp.zeros(V), "model": tiny()}

    def both(model, batch, key=None):
        whole = eqx.tree_at(lambda m: m.b, model["model"], model["one"] + 2 * model["two"])
        return loss(whole, batch)

    results = []
    for again in (False, True):
        optimizer, given = AdamW(1e-2), build(again)
        options = {"loss": both, "key": KEY}
        training = fit(given, optimizer, [BATCH], steps=2, progress=False, **options)
        state = optimizer.init(given)
        for _ in range(2):
            given, state, _ = train_step(given, state, BATCH, optimizer=optimizer, **options)
        results += training.model, given
    for other in results[1:]:
        assert_same(other, results[0])


def test_arrays_may_share_memory_without_being_one(capfd):
    """`jax.device_put` makes another array of the same memory."""
    model, optimizer = tiny(), Keeping()
    again = partial(jax.device_put, device=jax.devices()[0])
    state = optimizer.init(jax.tree.map(lambda x: again(x) if eqx.is_array(x) else x, model))
    model, state, _ = train_step(model, state, BATCH, optimizer=optimizer, loss=loss, key=KEY)
    assert_same(model, steps(tiny(), Keeping(), 1)[0])
    capfd.readouterr()  # where XLA says that memory was to be donated twice


def test_a_state_may_hold_the_batch_and_the_key():
    class Holding(Keeping):
        def init(self, model):
            return {"key": KEY, "tokens": BATCH["tokens"]}

        def update(self, grads, state, model):
            return eqx.apply_updates(model, grads), state

    steps(tiny(), Holding(), 2)
    run(tiny(), Holding(), [BATCH], steps=2)
    assert not KEY.is_deleted() and not BATCH["tokens"].is_deleted()


def test_what_a_transformation_keeps_is_not_written_over(optax):
    """A key, a learning rate: the transformation is there for the next training."""
    noisy = optax.noisy_sgd(0.1, key=jax.random.key(5))
    first, second = (steps(tiny(), noisy)[0] for _ in range(2))
    assert_same(first, second, 0)
    assert_same(run(tiny(), noisy, [BATCH], steps=4).model, first)


def test_a_donated_model_says_so():
    optimizer, model = AdamW(1e-2), tiny()
    state = optimizer.init(model)
    train_step(model, state, BATCH, optimizer=optimizer, loss=loss, key=KEY)
    words = r"model\.embedding was donated to an earlier step.* returned.*x.copy\(\)"
    with pytest.raises(ValueError, match=words):
        train_step(model, state, BATCH, optimizer=optimizer, loss=loss, key=KEY)
    with pytest.raises(ValueError, match=r"state\.step was donated"):
        train_step(tiny(), state, BATCH, optimizer=optimizer, loss=loss, key=KEY)
    with pytest.raises(ValueError, match=words):
        run(model, optimizer, [BATCH], steps=1)
    with pytest.raises(ValueError, match=words):
        evaluate(model, [BATCH], loss=loss)
    grads = eqx.filter_grad(loss)(tiny(), BATCH)
    with pytest.raises(ValueError, match=words):
        optimizer.update(grads, optimizer.init(tiny()), model)


def test_whatever_uses_a_donated_model_says_so(tmp_path):
    tokens, options = jnp.asarray([[1, 2, 3]]), {"key": KEY}
    decoder = TransformerLM(V, 8, 2, 1, 8, 6, **options)
    pair = Transformer(V, V, 8, 2, 1, 1, 8, 6, **options)
    encoder = TransformerEncoder(V, 8, 2, 1, 8, 6, **options)
    for x in jax.tree.leaves(eqx.filter((decoder, pair, encoder), eqx.is_array)):
        x.delete()  # as a step does
    for use in (
        lambda: decoder(tokens),
        lambda: decoder.generate(tokens, 2),
        lambda: decoder.score(tokens),
        lambda: list(decoder.stream(tokens, 2)),
        lambda: language_model_loss(decoder, {"tokens": tokens, "targets": tokens}),
        lambda: pair(tokens, tokens),
        lambda: pair.encode(tokens),
        lambda: pair.generate(tokens, 3, 1),
        lambda: pair.score(tokens, tokens),
        lambda: encoder(tokens),
        lambda: cast_floating(decoder, jnp.bfloat16),
        lambda: save(tmp_path / "model.safetensors", decoder),
        lambda: Averaged(AdamW(1e-2)).init(decoder),
    ):
        with pytest.raises(ValueError, match=r"model\..* was donated to an earlier step"):
            use()


def test_what_is_frozen_is_neither_copied_nor_donated_by_fit():
    """Nor what an optimizer does not differentiate; if it changes that all the same, it may."""

    class Counting(Keeping):
        def update(self, grads, state, model):
            model, state = super().update(grads, state, model)
            return eqx.tree_at(lambda m: m.count, model, model.count + 1), state

    given = tiny()
    trained = run(given, freeze(AdamW(1e-2), is_vector), [BATCH], steps=2).model
    assert trained.b is given.b and trained.count is given.count and trained.w is not given.w
    trained = run(given, Counting(), [BATCH], steps=2).model
    np.testing.assert_array_equal(trained.count, [2, 3, 4])
    assert_same(given, tiny(), 0)


def test_a_step_writes_over_nothing_that_fit_shares():
    given, optimizer = tiny(), freeze(AdamW(1e-2), is_vector)
    training = run(given, optimizer, [BATCH], steps=2)
    after, _ = steps(given, optimizer, 2)
    assert not given.b.is_deleted() and not given.count.is_deleted() and given.w.is_deleted()
    assert_same(after, training.model, 1e-6)
    train_step(
        *(training.model, training.optimizer_state, BATCH), optimizer=optimizer, loss=loss, key=KEY
    )
    assert_same(after.b, given.b, 0)
