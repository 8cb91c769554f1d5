"""AdamW against optax's and torch's, what it leaves alone, and the one protocol of optimizers."""

import ast
import functools
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import optim, schedules
from jaxformers.optim import AdamW, as_optimizer, clip_by_global_norm, default_decay_mask

TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


class Norm(eqx.Module):
    gain: jax.Array
    b: jax.Array


class Model(eqx.Module):
    """A small network with every kind of leaf: weights, biases of two axes, norms and no arrays."""

    w_in: jax.Array
    b_in: jax.Array
    norm: Norm
    w_out: jax.Array
    b_out: None
    positions: jax.Array
    activation: Callable
    name: str = eqx.field(static=True)

    def __call__(self, x):
        x = self.activation(x @ self.w_in + self.b_in.reshape(-1))
        x = (x - x.mean(-1, keepdims=True)) * self.norm.gain + self.norm.b
        return x @ self.w_out * self.positions.astype(jnp.float32)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=0.5, size=shape), jnp.float32)


@pytest.fixture
def model():
    norm = Norm(gain=draw(3, 6), b=draw(4, 6))
    positions = jnp.arange(1, 5, dtype=jnp.int32)
    return Model(draw(1, 3, 6), draw(2, 2, 3), norm, draw(5, 6, 4), None, positions, jnp.tanh, "m")


@eqx.filter_jit
def gradients(model, step):
    """Gradients that differ from step to step, with norms on both sides of 1."""
    x = jnp.sin(jnp.arange(15.0).reshape(5, 3) + step.astype(jnp.float32))
    scale = jnp.where(step % 3 == 0, 1e-3, 1e-2)
    return eqx.filter_grad(lambda m: scale * (m(x) ** 2).sum())(model)


def train(optimizer, model, steps):
    optimizer = as_optimizer(optimizer)
    state = optimizer.init(model)
    for step in range(steps):
        grads = gradients(model, jnp.asarray(step, jnp.int32))
        model, state = optimizer.update(grads, state, model)
    return model, state


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def assert_same(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(arrays(tree), arrays(expected), strict=True):
        np.testing.assert_allclose(x, y, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def counting_mask():
    """A decay mask and the list that it grows by one at each compilation."""
    traces = []

    def mask(model):
        traces.append(model)
        return default_decay_mask(model)

    return mask, traces


SCHEDULES = {"constant": 0.01, "schedule": schedules.warmup_cosine(0.02, 10, 40, end=0.001)}
CASES = pytest.mark.parametrize(
    "rate, max_norm", [("constant", None), ("constant", 1.0), ("schedule", None), ("schedule", 1.0)]
)


@CASES
def test_adamw_equals_optax(model, rate, max_norm):
    optax = pytest.importorskip("optax")
    rate = SCHEDULES[rate]
    theirs = optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=default_decay_mask)
    if max_norm is not None:
        theirs = optax.chain(optax.clip_by_global_norm(max_norm), theirs)
    ours = AdamW(rate, b2=0.99, weight_decay=0.1, max_grad_norm=max_norm)
    trained, state = train(ours, model, 50)
    expected, _ = train(theirs, model, 50)
    assert state.step == 50
    assert_same(trained, expected, **TOLERANCE)


@CASES
def test_adamw_equals_torch(model, rate, max_norm):
    torch = pytest.importorskip("torch")
    rate = SCHEDULES[rate]
    params, structure = jax.tree.flatten(eqx.filter(model, eqx.is_inexact_array))
    # In float64: torch's own rounding, p * (1 - rate * decay) at each step, is 1e-6 after 50.
    twins = [torch.nn.Parameter(torch.tensor(np.asarray(p)).double()) for p in params]
    decays = jax.tree.leaves(default_decay_mask(eqx.filter(model, eqx.is_inexact_array)))
    groups = [
        {"params": [twin], "weight_decay": 0.1 if decay else 0.0}
        for twin, decay in zip(twins, decays, strict=True)
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    norms = []
    for step in range(50):
        now = [jnp.asarray(twin.detach().numpy(), jnp.float32) for twin in twins]
        grads = gradients(
            eqx.combine(jax.tree.unflatten(structure, now), model), jnp.asarray(step, jnp.int32)
        )
        for twin, grad in zip(twins, arrays(grads), strict=True):
            twin.grad = torch.tensor(np.asarray(grad)).double()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(twins, max_norm).item())
        for group in theirs.param_groups:
            group["lr"] = float(rate(step)) if callable(rate) else rate
        theirs.step()
    assert max_norm is None or min(norms) < max_norm < max(norms)

    ours = AdamW(rate, b2=0.99, weight_decay=0.1, max_grad_norm=max_norm)
    trained, _ = train(ours, model, 50)
    for p, twin in zip(arrays(trained), twins, strict=True):
        np.testing.assert_allclose(p, twin.detach().numpy(), **TOLERANCE)


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 50.0])
def test_clipping_equals_torch_and_optax(max_norm):
    torch = pytest.importorskip("torch")
    optax = pytest.importorskip("optax")
    grads = {"w": draw(1, 3, 4), "frozen": None, "b": 3 * draw(2, 5)}
    twins = [torch.zeros(5), torch.zeros(3, 4)]
    for twin, name in zip(twins, ("b", "w"), strict=True):
        twin.grad = torch.tensor(np.asarray(grads[name]))
    expected_norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)

    clipped, norm = clip_by_global_norm(grads, max_norm)
    transformation = optax.clip_by_global_norm(max_norm)
    assert_same(clipped, transformation.update(grads, transformation.init(grads))[0], **TOLERANCE)
    np.testing.assert_allclose(norm, expected_norm.item(), rtol=1e-6)
    np.testing.assert_allclose(clipped["w"], twins[1].grad.numpy(), **TOLERANCE)
    np.testing.assert_allclose(optim.global_norm(clipped), min(norm, max_norm), rtol=1e-6)


def test_clipping_keeps_small_gradients_bit_for_bit_and_zero_finite():
    grads = {"w": draw(1, 3, 4), "b": jnp.zeros(5)}
    assert_same(clip_by_global_norm(grads, 100.0)[0], grads)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    assert_same(clip_by_global_norm(zeros, 1.0)[0], zeros)
    assert optim.global_norm({}) == 0


def test_a_new_learning_rate_does_not_compile_anew(model):
    mask, traces = counting_mask()
    moved = []
    for rate in (0.1, 0.2, 0.2, jnp.asarray(0.3), np.float32(0.4)):
        trained, _ = train(AdamW(rate, decay_mask=mask), model, 2)
        moved.append(float(jnp.abs(trained.w_in - model.w_in).max()))
    assert len(traces) == 1
    assert moved[0] < moved[1] == moved[2] < moved[3] < moved[4]


def test_the_same_schedule_does_not_compile_anew(model):
    mask, traces = counting_mask()
    for _ in range(2):
        train(AdamW(schedules.warmup_linear(0.1, 2, 5), decay_mask=mask), model, 2)
    assert len(traces) == 1
    train(AdamW(schedules.warmup_linear(0.2, 2, 5), decay_mask=mask), model, 2)
    assert len(traces) == 2


def test_any_function_is_a_schedule(model):
    trained, _ = train(AdamW(lambda step: 0.5 / (step + 1).astype(jnp.float32)), model, 1)
    assert_same(trained, train(AdamW(0.5), model, 1)[0])


def test_nothing_is_donated_but_a_user_may_donate(model):
    before = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, model)
    optimizer = AdamW(0.1)
    state = optimizer.init(model)
    grads = gradients(model, jnp.asarray(0, jnp.int32))
    optimizer.update(grads, state, model)
    assert not any(x.is_deleted() for x in arrays((grads, state, model)))
    assert_same(model, before)

    donating = eqx.filter_jit(lambda *args: optimizer.update(*args), donate="all")
    expected, _ = optimizer.update(grads, state, model)
    trained, _ = donating(grads, state, model)
    assert_same(trained, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["ours", "optax"])
def test_frozen_leaves_stay_as_they_are(model, name):
    if name == "optax":
        optax = pytest.importorskip("optax")
        optimizer = as_optimizer(optax.adamw(0.1, weight_decay=0.5))
    else:
        optimizer = AdamW(0.1, weight_decay=0.5)
    # One update of everything first: momentum must not move a frozen leaf either.
    model, state = train(optimizer, model, 1)
    grads = gradients(model, jnp.asarray(1, jnp.int32))
    frozen_grads = eqx.tree_at(lambda g: (g.w_in, g.norm.b), grads, (None, None))
    trained, _ = optimizer.update(frozen_grads, state, model)
    assert (trained.w_in == model.w_in).all() and (trained.norm.b == model.norm.b).all()
    full, _ = optimizer.update(grads, state, model)
    assert (full.w_in != model.w_in).all()
    np.testing.assert_array_equal(trained.w_out, full.w_out)
    assert (trained.w_out != model.w_out).all()


def test_other_leaves_pass_through(model):
    trained, state = train(AdamW(0.1), model, 2)
    assert trained.activation is jnp.tanh and trained.name == "m" and trained.b_out is None
    np.testing.assert_array_equal(trained.positions, model.positions)
    assert trained.positions.dtype == jnp.int32
    assert state.moments.positions is None and state.moments.activation is None


def test_frozen_leaves_need_no_moments(model):
    optimizer = AdamW(0.1)
    part = eqx.tree_at(lambda m: m.w_in, model, None)
    state = optimizer.init(part)
    assert state.moments.w_in is None
    grads = gradients(model, jnp.asarray(0, jnp.int32))
    with pytest.raises(
        ValueError, match="state must be that of .* init: w_in of shape .* got None"
    ):
        optimizer.update(grads, state, model)
    grads = eqx.tree_at(lambda g: g.w_in, grads, None)
    trained, state = optimizer.update(grads, state, model)
    expected, _ = optimizer.update(grads, optimizer.init(model), model)
    assert state.moments.w_in is None
    assert_same(trained, expected)


def test_moments_are_float32_and_parameters_keep_their_dtype(model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), eqx.filter(model, eqx.is_inexact_array))
    optimizer = AdamW(0.1, max_grad_norm=1.0)
    grads = jax.tree.map(lambda p: 3 * p, half)
    with pytest.warns(UserWarning, match="of 16 bits are trained"):
        trained, state = optimizer.update(grads, optimizer.init(half), half)
    assert {x.dtype for x in arrays(trained)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in arrays(state.moments)} == {jnp.dtype(jnp.float32)}
    full = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    grads = jax.tree.map(lambda p: 3 * p, full)
    expected, _ = optimizer.update(grads, optimizer.init(full), full)
    rounded = jax.tree.map(lambda p: p.astype(jnp.float32), trained)
    assert_same(rounded, expected, rtol=2**-7, atol=1e-3)


def test_the_mask_decays_weights_only(model):
    mask = default_decay_mask(model)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    decays = {jax.tree_util.keystr(path): decay for path, decay in leaves}
    assert decays == {
        ".w_in": True,
        ".b_in": False,
        ".norm.gain": False,
        ".norm.b": False,
        ".w_out": True,
        ".positions": False,
        ".activation": False,
    }


def test_the_mask_is_right_for_equinox_layers():
    @eqx.filter_jit
    def build(key):
        return {
            "linear": eqx.nn.Linear(3, 4, key=key),
            "norm": eqx.nn.LayerNorm(4),
            "convolution": eqx.nn.Conv1d(3, 4, 2, key=key),
            "tables": [eqx.nn.Embedding(5, 3, key=key)],
        }

    mask = default_decay_mask(build(jax.random.key(0)))
    assert mask["linear"].weight and not mask["linear"].bias
    assert not mask["norm"].weight and not mask["norm"].bias
    assert mask["convolution"].weight and not mask["convolution"].bias  # its bias has two axes
    assert mask["tables"][0].weight


def test_the_mask_goes_by_names_and_can_spare_embeddings():
    table, weights = jnp.ones((3, 2)), [jnp.ones((2, 2)), jnp.ones((2, 2))]
    model = {
        "token_embedding": {"weight": table},
        "position": {"weight": table},
        "weights": weights,
        "biases": weights,
        "gain": table,
    }
    assert default_decay_mask(model)["token_embedding"]["weight"]
    assert default_decay_mask(model, decay_embeddings=False) == {
        "token_embedding": {"weight": False},
        "position": {"weight": False},
        "weights": [True, True],
        "biases": [False, False],
        "gain": False,
    }


def test_decay_follows_the_mask(model):
    zeros = jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
    optimizer = AdamW(0.1, weight_decay=0.5)
    trained, _ = optimizer.update(zeros, optimizer.init(model), model)
    np.testing.assert_allclose(trained.w_in, model.w_in * 0.95, rtol=1e-6)
    assert_same((trained.b_in, trained.norm), (model.b_in, model.norm))

    nothing = AdamW(0.1, weight_decay=0.5, decay_mask=lambda m: jax.tree.map(lambda _: False, m))
    assert_same(nothing.update(zeros, nothing.init(model), model)[0], model)
    partial = functools.partial(default_decay_mask, decay_embeddings=False)
    sparing = AdamW(0.1, weight_decay=0.5, decay_mask=partial)
    assert_same(sparing.update(zeros, sparing.init(model), model)[0], trained)


def test_inside_jit_is_the_same_and_one_update_fits_the_next(model):
    mask, traces = counting_mask()
    optimizer = AdamW(0.1, max_grad_norm=1.0, decay_mask=mask)
    expected, expected_state = train(optimizer, model, 3)
    assert len(traces) == 1  # the types of model and state are those that came in

    dynamic, static = eqx.partition(model, eqx.is_array)

    @jax.jit
    def scanned(dynamic):
        def body(carry, step):
            now, state = eqx.combine(carry[0], static), carry[1]
            now, state = optimizer.update(gradients(now, step), state, now)
            return (eqx.filter(now, eqx.is_array), state), None

        state = optimizer.init(eqx.combine(dynamic, static))
        return jax.lax.scan(body, (dynamic, state), jnp.arange(3, dtype=jnp.int32))[0]

    trained, state = scanned(dynamic)
    assert_same(eqx.combine(trained, static), expected, **TOLERANCE)
    assert_same(state, expected_state, **TOLERANCE)


def test_the_learning_rate_can_be_differentiated_forwards(model):
    grads = gradients(model, jnp.asarray(0, jnp.int32))

    def moved(rate):
        optimizer = AdamW(rate)
        return arrays(optimizer.update(grads, optimizer.init(model), model)[0])

    _, tangents = jax.jvp(moved, (jnp.asarray(0.1),), (jnp.asarray(1.0),))
    # One update is linear in the learning rate.
    for tangent, end, start in zip(tangents, moved(1.0), moved(0.0), strict=True):
        np.testing.assert_allclose(tangent, end - start, atol=1e-5)


class Descent(optim.Optimizer):
    step_size: float

    def init(self, model):
        return None

    def update(self, grads, state, model):
        return eqx.apply_updates(model, jax.tree.map(lambda g: -self.step_size * g, grads)), state


class Duck:
    """Has the methods of both protocols, so nobody can know what `update` returns."""

    init = update = staticmethod(lambda *args: args)


def test_as_optimizer_keeps_ours(model):
    for optimizer in (AdamW(0.1), Descent(0.1)):
        assert as_optimizer(optimizer) is optimizer
    optax = pytest.importorskip("optax")
    assert_same(train(Descent(0.1), model, 3)[0], train(optax.sgd(0.1), model, 3)[0], **TOLERANCE)


def test_as_optimizer_takes_optax_transformations(model):
    optax = pytest.importorskip("optax")
    lion = optax.lion(0.01, weight_decay=0.1)
    trained, _ = train(lion, model, 5)

    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = lion.init(params)
    for step in range(5):
        grads = gradients(eqx.combine(params, static), jnp.asarray(step, jnp.int32))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = lion.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_same(trained, eqx.combine(params, static), **TOLERANCE)
    assert not any(x.is_deleted() for x in arrays(model))


def test_extra_arguments_reach_optax(model):
    optax = pytest.importorskip("optax")

    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    scaling = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = as_optimizer(scaling)
    grads = gradients(model, jnp.asarray(0, jnp.int32))
    state = optimizer.init(model)
    trained, _ = optimizer.update(grads, state, model, value=jnp.asarray(2.0))
    assert_same(trained, eqx.apply_updates(model, jax.tree.map(lambda g: 2 * g, grads)))


@pytest.mark.parametrize("wrong", [AdamW, Duck(), 0.1, "adamw", lambda: None, None, (1, 2)])
def test_as_optimizer_refuses_the_rest(wrong):
    with pytest.raises(ValueError, match=r"optimizer must be an Optimizer .* optax .*, got "):
        as_optimizer(wrong)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: AdamW(-0.1), r"learning_rate must be a finite number .* got -0\.1"),
        (lambda: AdamW(float("nan")), "learning_rate must be a finite number .* got nan"),
        (lambda: AdamW(jnp.asarray(-1.0)), "learning_rate must be a finite number"),
        (lambda: AdamW(0.1, b1=1.0), r"b1 must be a number in \[0, 1\), got 1\.0"),
        (lambda: AdamW(0.1, b2=-0.1), r"b2 must be a number in \[0, 1\), got -0\.1"),
        (lambda: AdamW(0.1, eps=0.0), r"eps must be a finite number above 0, got 0\.0"),
        (lambda: AdamW(0.1, weight_decay=-0.1), "weight_decay must be a finite number"),
        (lambda: AdamW(0.1, max_grad_norm=0.0), "max_grad_norm must be a finite number above 0"),
        (lambda: clip_by_global_norm({}, -1.0), "max_norm must be a finite number above 0"),
    ],
)
def test_bad_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda grads: None,
        arrays,
        lambda grads: eqx.tree_at(lambda g: g.w_in, grads, jnp.ones((6, 3))),
        lambda grads: eqx.tree_at(lambda g: g.w_in, grads, 1.0),
        lambda grads: eqx.tree_at(
            lambda g: g.positions, grads, jnp.ones(4), is_leaf=lambda x: x is None
        ),
    ],
)
@pytest.mark.parametrize("protocol", ["ours", "optax"])
def test_gradients_that_do_not_fit_are_refused(model, spoil, protocol):
    optimizer = AdamW(0.1)
    if protocol == "optax":
        optax = pytest.importorskip("optax")
        optimizer = as_optimizer(optax.sgd(0.1))
    state = optimizer.init(model)
    grads = spoil(gradients(model, jnp.asarray(0, jnp.int32)))
    with pytest.raises(ValueError, match="grads must have the model's structure.*filter_grad"):
        optimizer.update(grads, state, model)


def test_a_state_or_mask_that_does_not_fit_is_refused(model):
    grads = gradients(model, jnp.asarray(0, jnp.int32))
    other = eqx.tree_at(lambda m: m.w_in, model, jnp.ones((6, 3)))
    with pytest.raises(
        ValueError, match=r"state must be .* w_in of shape \(3, 6\) needs .*got .*\(6, 3\)"
    ):
        AdamW(0.1).update(grads, AdamW(0.1).init(other), model)
    with pytest.raises(ValueError, match=r"state must be .* moments of shapes .*nu.*, got "):
        AdamW(0.1).update(grads, optim.Lion(0.1).init(model), model)
    with pytest.raises(ValueError, match="moments must have the model's structure"):
        AdamW(0.1).update(grads, AdamW(0.1).init([model]), model)
    optimizer = AdamW(0.1, decay_mask=lambda model: [True])
    with pytest.raises(ValueError, match="decay_mask must have the model's structure"):
        optimizer.update(grads, optimizer.init(model), model)


def test_the_package_does_not_import_optax():
    package = Path(optim.__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("optax")]
