"""Schedules against optax's, their values at the corners, and that equal ones compile once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import schedules as ours

STEPS = range(14)

SCHEDULES = {
    "constant": lambda: ours.constant(0.3),
    "linear": lambda: ours.linear(0.3, 0.1, 7),
    "cosine": lambda: ours.cosine(0.3, 0.1, 7),
    "warmup_cosine": lambda: ours.warmup_cosine(0.3, 3, 10, end=0.1),
    "warmup_cosine_at_once": lambda: ours.warmup_cosine(0.3, 0, 10),
    "warmup_linear": lambda: ours.warmup_linear(0.3, 3, 10, end=0.1),
    "inverse_square_root": lambda: ours.inverse_square_root(0.3, 3),
    "warmup_stable_decay": lambda: ours.warmup_stable_decay(0.3, 3, 4, 5, end=0.1),
}


def optax_twin(name):
    optax = pytest.importorskip("optax")
    up, flat = optax.linear_schedule(0.0, 0.3, 3), optax.constant_schedule(0.3)
    return {
        "constant": flat,
        "linear": optax.linear_schedule(0.3, 0.1, 7),
        "cosine": optax.cosine_decay_schedule(0.3, 7, alpha=0.1 / 0.3),
        "warmup_cosine": optax.warmup_cosine_decay_schedule(0.0, 0.3, 3, 10, 0.1),
        "warmup_cosine_at_once": optax.cosine_decay_schedule(0.3, 10),
        "warmup_linear": optax.join_schedules([up, optax.linear_schedule(0.3, 0.1, 7)], [3]),
        "warmup_stable_decay": optax.join_schedules(
            [up, flat, optax.linear_schedule(0.3, 0.1, 5)], [3, 7]
        ),
    }[name]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "inverse_square_root"])
def test_equals_optax(name):
    schedule, twin = SCHEDULES[name](), optax_twin(name)
    rates = [float(schedule(step)) for step in STEPS]
    # optax's cosine multiplies the step by a float: an integer is refused in strict promotion.
    expected = [float(twin(jnp.asarray(step, jnp.float32))) for step in STEPS]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-7)


def test_inverse_square_root_is_the_papers():
    d_model, warmup = 64, 5
    schedule = ours.inverse_square_root((d_model * warmup) ** -0.5, warmup)
    steps = np.arange(1, 40)
    paper = d_model**-0.5 * np.minimum(steps**-0.5, steps * warmup**-1.5)
    np.testing.assert_allclose([float(schedule(int(step))) for step in steps], paper, rtol=1e-6)
    assert schedule(0) == 0


@pytest.mark.parametrize(
    "name, corners",
    [
        ("constant", {0: 0.3, 10**6: 0.3}),
        ("linear", {0: 0.3, 7: 0.1, 10**6: 0.1}),
        ("cosine", {0: 0.3, 7: 0.1, 10**6: 0.1}),
        ("warmup_cosine", {0: 0.0, 3: 0.3, 10: 0.1, 10**6: 0.1}),
        ("warmup_cosine_at_once", {0: 0.3, 10: 0.0, 10**6: 0.0}),
        ("warmup_linear", {0: 0.0, 3: 0.3, 10: 0.1, 10**6: 0.1}),
        ("inverse_square_root", {0: 0.0, 3: 0.3, 12: 0.15}),
        ("warmup_stable_decay", {0: 0.0, 3: 0.3, 7: 0.3, 12: 0.1, 10**6: 0.1}),
    ],
)
def test_corners_are_exact(name, corners):
    rates = {step: SCHEDULES[name]()(step) for step in corners}
    assert rates == {step: np.float32(rate) for step, rate in corners.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_int_traced_and_array_steps_agree(name):
    schedule = SCHEDULES[name]()
    rates = jnp.stack([schedule(step) for step in STEPS])
    steps = jnp.asarray(STEPS, jnp.int32)
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(schedule(steps), rates, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(steps), rates, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_schedule_built_twice_compiles_once(name):
    traces = []

    @eqx.filter_jit
    def rate(schedule, step):
        traces.append(schedule)
        return schedule(step)

    for _ in range(2):
        rate(SCHEDULES[name](), jnp.asarray(3, jnp.int32))
    assert len(traces) == 1
    rate(ours.constant(0.7), jnp.asarray(3, jnp.int32))
    assert len(traces) == 2
    assert SCHEDULES[name]() == SCHEDULES[name]() != ours.constant(0.7)
    assert hash(SCHEDULES[name]()) == hash(SCHEDULES[name]())


def test_join_takes_any_function_and_counts_in_integers():
    late = ours.join(lambda step: 0.5, 2**24, ours.linear(0.0, 4.0, 4))
    assert late(2**24 - 1) == 0.5
    assert late(2**24) == 0.0
    assert late(2**24 + 1) == 1.0  # float32 cannot tell this step from the one before


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ours.constant(-0.1), r"value must be a finite number of at least 0, got -0\.1"),
        (lambda: ours.constant(float("nan")), "value must be a finite .* got nan"),
        (lambda: ours.linear(0.1, float("inf"), 3), "end must be a finite .* got inf"),
        (lambda: ours.linear(0.1, 0.0, -3), "steps must be at least 0, got -3"),
        (lambda: ours.cosine(-0.1, 0.0, 3), "start must be a finite"),
        (lambda: ours.warmup_cosine(-0.1, 3, 10), "peak must be a finite"),
        (lambda: ours.warmup_cosine(0.1, 11, 10), "warmup_steps must be at most .* 11 > 10"),
        (lambda: ours.warmup_cosine(0.1, -1, 10), "warmup_steps must be at least 0, got -1"),
        (lambda: ours.warmup_linear(0.1, 11, 10), "raise it or shorten the warm-up"),
        (lambda: ours.warmup_linear(-0.1, 3, 10), "peak must be a finite"),
        (lambda: ours.inverse_square_root(0.1, 0), "warmup_steps must be at least 1, got 0"),
        (lambda: ours.inverse_square_root(-0.1, 3), "peak must be a finite"),
        (lambda: ours.warmup_stable_decay(0.1, 3, -4, 5), "stable_steps must be at least 0"),
        (lambda: ours.warmup_stable_decay(0.1, 3, 4, -5), "decay_steps must be at least 0"),
        (lambda: ours.join(ours.constant(0.1), -1, ours.constant(0.2)), "steps must be at least"),
    ],
)
def test_bad_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.usefixtures("no_shape_checker")
def test_fractions_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"steps must be a whole number .* got 2\.5.* int\("):
        ours.join(ours.constant(0.1), 2.5, ours.constant(0.2))
