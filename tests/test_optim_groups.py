"""Groups of leaves, frozen ones, averages of the weights, and all of it in a training step."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import optim, schedules
from jaxformers.hf.plan import arrays_by_path
from jaxformers.optim import (
    Adafactor,
    AdamW,
    Averaged,
    Groups,
    Lion,
    Muon,
    clip_by_global_norm,
    freeze,
    global_norm,
)


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Programs that run a few times on tiny arrays are not worth optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


TOLERANCE = {"rtol": 0.0, "atol": 1e-6}
SHAPES = {"table": (7, 3), "w": (3, 5), "b": (5,), "gain": (4,)}


def draw(seed, dtype=np.float32):
    random = np.random.default_rng(seed)
    tree = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    return {name: jnp.asarray(x.astype(dtype)) for name, x in tree.items()}


def gradients(step):
    """Gradients that differ from step to step, with norms on both sides of 1."""
    return jax.tree.map(lambda x: x * (0.01 if step % 3 == 0 else 1.0), draw(100 + step))


def train(optimizer, names=tuple(SHAPES), steps=12, dtype=np.float32, clip=None):
    optimizer = optim.as_optimizer(optimizer)

    def chosen(tree):
        return {name: x if name in names else None for name, x in tree.items()}

    weights = chosen(draw(7, dtype))
    state, history = optimizer.init(weights), []
    for step in range(steps):
        grads = gradients(step) if clip is None else clip(gradients(step))
        weights, state = optimizer.update(chosen(grads), state, weights)
        history.append(weights)
    return weights, state, history


def assert_same(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def is_table(path, array):
    return path == "table"


def is_vector(path, array):
    return array.ndim == 1


# Groups.


def test_groups_are_the_optimizers_apart():
    """The first predicate that holds decides; the vector "b" is one of both."""
    first = lambda path, array: path in ("table", "b")  # noqa: E731
    rate = schedules.warmup_linear(0.1, 3, 9)
    groups = Groups([(first, Lion(0.02)), (is_vector, AdamW(rate))], Adafactor())
    weights, state, _ = train(groups)
    expected = (
        train(Lion(0.02), ("table", "b"))[0],
        train(AdamW(rate), ("gain",))[0],
        train(Adafactor(), ("w",))[0],
    )
    assert_same(weights, eqx.combine(*expected), **TOLERANCE)
    assert state[0].moments["w"] is None and state[1].moments["b"] is None
    assert set(state[2].moments["w"]) == {"rows", "columns"}


def test_groups_equal_optax():
    optax = pytest.importorskip("optax")
    labels = {"table": "slow", "w": "fast", "b": "frozen", "gain": "fast"}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                "slow": optax.sgd(0.1),
                "fast": optax.adamw(0.2, b2=0.99),
                "frozen": optax.set_to_zero(),
            },
            labels,
        ),
    )
    all_decay = partial(jax.tree.map, lambda _: True)
    ours = Groups(
        [(is_table, optax.sgd(0.1)), (lambda path, array: path == "b", None)],
        AdamW(0.2, b2=0.99, weight_decay=1e-4, decay_mask=all_decay),
    )

    def clip(grads):
        return clip_by_global_norm(grads, 1.0)[0]

    expected = train(theirs)[0]
    assert_same(train(ours, clip=clip)[0], expected, **TOLERANCE)
    assert_same(expected["b"], draw(7)["b"])


def test_the_norm_is_that_of_all_groups_without_the_frozen():
    def clip(grads):
        trained = {name: grads[name] for name in ("w", "b", "gain")}
        norms.append(float(global_norm(trained)))
        return grads | clip_by_global_norm(trained, 1.0)[0]

    norms = []
    groups = [(is_table, None), (is_vector, optim.Lion(0.1))]
    clipped = train(Groups(groups, AdamW(0.1), max_grad_norm=1.0))[0]
    assert_same(clipped, train(Groups(groups, AdamW(0.1)), clip=clip)[0], **TOLERANCE)
    assert min(norms) < 1.0 < max(norms)


def test_frozen_leaves_cost_nothing_and_stay_bit_for_bit():
    frozen = freeze(AdamW(0.1, weight_decay=0.5), is_table)
    weights, state, _ = train(frozen)  # with gradients for what is frozen
    assert_same(weights["table"], draw(7)["table"])
    assert all((weights[name] != draw(7)[name]).any() for name in ("w", "b", "gain"))
    assert frozen.trains(weights) == {"table": False, "w": True, "b": True, "gain": True}
    floats = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
    assert sum(x.size for x in floats) == 2 * (15 + 5 + 4)
    without = train(frozen, ("table", "w"))[0]  # gradients that are None
    assert_same(without["w"], weights["w"])
    only = Groups([(is_table, AdamW(0.1))], None)
    assert only.trains(weights) == {"table": True, "w": False, "b": False, "gain": False}
    assert_same(train(only)[0]["w"], draw(7)["w"])


def test_leaves_that_are_no_arrays_pass_through():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    optimizer = Averaged(freeze(Lion(0.1), lambda path, array: path.endswith("bias")))
    grads = eqx.filter_grad(lambda m: m(jnp.ones(3)).sum())(model)
    state = optimizer.init(model)
    trained, state = optimizer.update(grads, state, model)
    trained = optimizer.averaged(trained, state)
    assert trained.activation is model.activation
    assert (trained.layers[0].bias == model.layers[0].bias).all()
    assert (trained.layers[0].weight != model.layers[0].weight).any()
    assert optimizer.trains(model).activation is False


def test_rates_are_those_of_the_next_update():
    rate = schedules.linear(1.0, 0.0, 4)
    weights = draw(1)
    for optimizer in (
        AdamW(rate),
        freeze(Lion(rate), is_table),
        Averaged(Groups([(is_table, AdamW(0.3))], Adafactor(rate))),
        Groups([(is_table, AdamW(rate))], None),
        Muon(rate, rest=AdamW(0.3), hidden=is_table),
    ):
        state = optimizer.init(weights)
        assert optimizer.rate(state) == 1.0
        _, state = optimizer.update(draw(2), state, weights)
        assert optimizer.rate(state) == 0.75


def test_optax_has_no_rate_and_works_everywhere():
    optax = pytest.importorskip("optax")
    sgd = optim.as_optimizer(optax.sgd(0.1))
    assert sgd.rate(sgd.init(draw(1))) is None
    assert sgd.trains(draw(1)) == dict.fromkeys(SHAPES, True)
    nested = Averaged(Groups([(is_table, None)], optax.adamw(0.1)), 0.9)
    weights, state, _ = train(nested)
    assert nested.rate(state) is None
    assert_same(weights["w"], train(optax.adamw(0.1), ("w",))[0]["w"], **TOLERANCE)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: freeze(AdamW(0.1), lambda path, array: "lora" in path), r"0, .*such as b, gain, "),
        (lambda: Groups([(is_table, None), (is_table, Lion(0.1))], AdamW(0.1)), "predicate 1"),
        (lambda: freeze(AdamW(0.1), lambda path, array: True), "all arrays are frozen"),
        (lambda: Groups([("table", None)], AdamW(0.1)), "must be a function"),
        (lambda: Groups([is_table], AdamW(0.1)), "groups must be pairs"),
        (lambda: Groups([(is_table, "sgd")], AdamW(0.1)), "optimizer must be an Optimizer"),
        (lambda: Groups([], AdamW(0.1), 0.0), "max_grad_norm must be a finite number above 0"),
        (lambda: Averaged(AdamW(0.1), 1.0), r"decay must be a number in \[0, 1\)"),
        (lambda: Averaged("adamw"), "optimizer must be an Optimizer"),
    ],
)
def test_what_is_wrong_is_refused(build, message, no_shape_checker):
    with pytest.raises(ValueError, match=message):
        build().init(draw(1))


def test_gradients_and_averages_that_do_not_fit_are_refused():
    weights = draw(1)
    for optimizer in (freeze(AdamW(0.1), is_table), Averaged(AdamW(0.1))):
        state = optimizer.init(weights)
        with pytest.raises(ValueError, match="grads must have the model's structure"):
            optimizer.update([], state, weights)
    with pytest.raises(ValueError, match="average must have the model's structure"):
        optimizer.update(weights, optimizer.init({"w": weights["w"]}), weights)


def test_the_state_of_another_optimizer_is_refused():
    weights = draw(1)
    optimizers = AdamW(0.1), freeze(AdamW(0.1), is_table), Averaged(AdamW(0.1))
    for optimizer, other in zip(optimizers, (*optimizers[1:], optimizers[0]), strict=True):
        with pytest.raises(ValueError, match="state must be that of this optimizer.*expected"):
            optimizer.update(weights, other.init(weights), weights)
    three = Groups([(is_table, None), (is_vector, Lion(0.1))], AdamW(0.1))
    with pytest.raises(ValueError, match="expected tuple of 2, got"):
        optimizers[1].update(weights, three.init(weights), weights)


# Averages.


def test_the_average_is_the_formula_in_float64():
    weights, state, history = train(Averaged(AdamW(0.1), 0.8), steps=40)
    expected = {name: np.asarray(x, np.float64) for name, x in draw(7).items()}
    for t, now in enumerate(history, start=1):
        decay = min(0.8, (1 + t) / (10 + t))
        for name, x in now.items():
            expected[name] = decay * expected[name] + (1 - decay) * np.asarray(x, np.float64)
    averaged = Averaged(AdamW(0.1)).averaged(weights, state)
    assert_same(averaged, expected, **TOLERANCE)
    assert_same(weights, train(AdamW(0.1), steps=40)[0])


def test_the_plain_average_equals_torch():
    torch = pytest.importorskip("torch")
    swa = torch.optim.swa_utils
    twins = {name: torch.tensor(np.asarray(x)) for name, x in draw(7).items()}
    model = torch.nn.ParameterDict(twins)
    theirs = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.7))
    theirs.update_parameters(model)  # the first time it copies
    optimizer = Averaged(AdamW(0.1), schedules.constant(0.7))
    weights, state, history = train(optimizer)
    for now in history:
        for name, p in model.items():
            p.data = torch.tensor(np.asarray(now[name]))
        theirs.update_parameters(model)
    averaged = optimizer.averaged(weights, state)
    for name, p in theirs.module.items():
        np.testing.assert_allclose(averaged[name], p.detach().numpy(), **TOLERANCE)


def test_averages_of_16_bit_weights_are_float32():
    optimizer = Averaged(AdamW(1e-2), 0.9)
    with pytest.warns(UserWarning, match="of 16 bits are trained"):
        weights, state, _ = train(optimizer, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(state.average)} == {jnp.dtype(jnp.float32)}
    averaged = optimizer.averaged(weights, state)
    assert {x.dtype for x in jax.tree.leaves(averaged)} == {jnp.dtype(jnp.bfloat16)}
    # It is made of many: more bits than those of any weight.
    for x in map(np.asarray, state.average.values()):
        assert (x != x.astype(jnp.bfloat16).astype(np.float32)).any()


def test_averages_nest():
    inside = Groups([(is_table, Averaged(Lion(0.1), 0.5))], Adafactor(0.1))
    around = Averaged(Groups([(is_table, Lion(0.1))], Adafactor(0.1)), 0.5)
    weights, state, _ = train(inside)
    expected, around_state, _ = train(around)
    assert_same(weights, expected)
    part, whole = inside.averaged(weights, state), around.averaged(weights, around_state)
    assert_same(part["table"], whole["table"], **TOLERANCE)
    assert_same(part["w"], weights["w"])
    assert (whole["w"] != weights["w"]).any()
    assert freeze(AdamW(0.1), is_table).averaged(weights, (None, None)) is not None
    _, frozen_state, _ = train(Averaged(freeze(Lion(0.1), is_table)))
    assert frozen_state.average["table"] is None


def test_another_decay_or_rate_compiles_nothing():
    traces = []

    def predicate(path, array):
        traces.append(path)
        return path == "table"

    weights, counts = draw(1), []
    for rate, decay in ((0.1, 0.9), (0.2, 0.99), (0.3, 0.5)):
        optimizer = Averaged(Groups([(predicate, Lion(rate))], AdamW(rate), 1.0), decay)
        state = optimizer.init(weights)
        traces.clear()
        optimizer.update(draw(2), state, weights)
        counts.append(len(traces))
    assert counts[0] > counts[1] == counts[2] == 0


# In a training step: compiled, donated, in bfloat16.


def is_embedding(path, array):
    return "token_embedding" in path


def is_first_layer(path, array):
    return "layers.0" in path


def language_model(key):
    return jf.TransformerLM(11, 8, 2, 2, 12, 9, tie_embeddings=True, key=key)


def sequence_to_sequence(key):
    return jf.Transformer(11, 7, 8, 2, 1, 1, 12, 9, key=key)


def encoder(key):
    return jf.TransformerEncoder(11, 8, 2, 2, 12, 9, key=key)


def tokens(seed, high, shape=(3, 6)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def squares(model, batch, key):
    return jnp.mean(jnp.square(model(batch["tokens"]).astype(jnp.float32) - 0.5))


STEPS = {
    "language model": (
        language_model,
        {"tokens": tokens(1, 11), "targets": tokens(2, 11)},
        jf.language_model_loss,
        Averaged(freeze(Muon(0.02, max_grad_norm=1.0), is_first_layer), 0.9),
        is_first_layer,
    ),
    "encoder-decoder": (
        sequence_to_sequence,
        {"src": tokens(1, 11), "tgt": tokens(2, 7, (3, 5)), "targets": tokens(3, 7, (3, 5))},
        jf.sequence_to_sequence_loss,
        Groups([(is_embedding, None)], Averaged(Adafactor(0.05)), max_grad_norm=1.0),
        is_embedding,
    ),
    "encoder": (
        encoder,
        {"tokens": tokens(1, 11)},
        squares,
        Averaged(Groups([(is_embedding, None), (is_first_layer, AdamW(0.01))], Lion(0.01))),
        is_embedding,
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_with_everything(name):
    build, batch, loss, optimizer, is_frozen = STEPS[name]
    model = eqx.filter_jit(build)(jax.random.key(3))
    before = {path: np.array(x) for path, x in arrays_by_path(model).items()}
    state, losses = optimizer.init(model), []
    for i in range(6):  # what is trained and its state are donated: no buffer is there twice
        donated = jax.tree.leaves((eqx.filter(model, optimizer.trains(model)), state))
        model, state, value = jf.train_step(
            model,
            state,
            batch,
            optimizer=optimizer,
            loss=loss,
            key=jax.random.key(i),
            compute_dtype=jnp.bfloat16,
        )
        assert all(x.is_deleted() for x in donated)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.02
    averaged = arrays_by_path(optimizer.averaged(model, state))
    for path, x in arrays_by_path(model).items():
        assert x.dtype == averaged[path].dtype == jnp.float32
        if is_frozen(path, x):
            np.testing.assert_array_equal(x, before[path])
            np.testing.assert_array_equal(averaged[path], before[path])
        elif ".bk" not in path:  # which changes no attention weight
            assert (x != before[path]).any() and (x != averaged[path]).any(), path
    assert any(is_frozen(path, x) for path, x in averaged.items())
