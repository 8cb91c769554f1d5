"""Learning rates as functions of the step: `step -> rate`.

Step 0 is the first update. A learning rate may be one of these schedules, a function of your own or
an optax schedule.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformers.checks import check_nonnegative


@dataclass(frozen=True)
class Schedule:
    """A schedule that consists of a formula and its arguments.

    Two schedules with equal arguments are equal and have the same hash, unlike closures and
    `functools.partial`. Therefore a new schedule with the same arguments does not compile a
    training step again.

    Arguments:
        formula: function `(step, *args) -> rate` in JAX operations; `step` is an int32 array.
        args: hashable arguments of the formula.

    Example:
        >>> halving = Schedule(lambda step, rate: rate * 0.5**step, (0.8,))
        >>> print(halving(3))
        0.1
    """

    formula: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def __call__(self, step: int | Int[Array, "*n"]) -> Float[Array, "*n"]:
        return jnp.asarray(self.formula(jnp.asarray(step, jnp.int32), *self.args), jnp.float32)


def constant(value: float) -> Schedule:
    """Returns a schedule with the rate `value` at every step.

    Arguments:
        value: the rate, at least 0.

    Raises:
        ValueError: if `value` is negative or not finite.

    Example:
        >>> print(constant(0.1)(1000))
        0.1
    """
    check_nonnegative(value=value)
    return linear(value, value, 0)


def linear(start: float, end: float, steps: int) -> Schedule:
    """Returns a linear schedule from `start` at step 0 to `end` at step `steps` and later.

    Arguments:
        start: rate at step 0, at least 0.
        end: rate from step `steps` on, at least 0.
        steps: length of the line in steps; 0 gives `end` at once.

    Raises:
        ValueError: if a rate is negative or not finite, or `steps` is not a whole number from 0.

    Example:
        >>> print(linear(1.0, 0.0, 4)(jnp.arange(6)))
        [1.   0.75 0.5  0.25 0.   0.  ]
    """
    return Schedule(_ramp, _ends(start, end, steps))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Returns a cosine schedule from `start` at step 0 to `end` at step `steps` and later.

    Arguments:
        start: rate at step 0, at least 0.
        end: rate from step `steps` on, at least 0.
        steps: length of the curve in steps; 0 gives `end` at once.

    Raises:
        ValueError: if a rate is negative or not finite, or `steps` is not a whole number from 0.

    Example:
        >>> print(cosine(1.0, 0.0, 2)(jnp.arange(4)))
        [1.  0.5 0.  0. ]
    """
    return Schedule(_cosine_ramp, _ends(start, end, steps))


def join(first: Callable, steps: int, second: Callable) -> Schedule:
    """Returns `first` for `steps` steps, then `second`, whose steps count from 0 again.

    Arguments:
        first: any schedule, a function `step -> rate`.
        steps: number of steps of `first`.
        second: the schedule after `first`.

    Raises:
        ValueError: if `steps` is not a whole number from 0.

    Example:
        >>> print(join(constant(1.0), 2, linear(0.5, 0.0, 2))(jnp.arange(5)))
        [1.   1.   0.5  0.25 0.  ]
    """
    return Schedule(_joined, (first, _whole("steps", steps), second))


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """Returns a linear warm-up to `peak`, then a cosine decay to `end` (Loshchilov & Hutter 2017).

    The rate is 0 at step 0 (`peak` without warm-up), `peak` at step `warmup_steps`, and `end` at
    step `total_steps` and later, as in `optax.warmup_cosine_decay_schedule`.

    Arguments:
        peak: highest rate, at least 0.
        warmup_steps: length of the warm-up in steps.
        total_steps: length of the whole schedule in steps, the warm-up included.
        end: rate from step `total_steps` on, 0.

    Raises:
        ValueError: if a rate is negative or not finite, a number of steps is not a whole number
            from 0, or the warm-up is longer than the whole schedule.

    Example:
        >>> print(warmup_cosine(1.0, 2, 4)(jnp.arange(6)))
        [0.  0.5 1.  0.5 0.  0. ]
    """
    check_nonnegative(peak=peak, end=end)
    down = cosine(peak, end, _steps_left(warmup_steps, total_steps))
    return _warm_up(peak, warmup_steps, down)


def warmup_linear(peak: float, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """Returns a linear warm-up to `peak`, then a linear decay to `end` (Devlin et al. 2019).

    The rate is 0 at step 0 (`peak` without warm-up), `peak` at step `warmup_steps`, and `end` at
    step `total_steps` and later.

    Arguments:
        peak: highest rate, at least 0.
        warmup_steps: length of the warm-up in steps.
        total_steps: length of the whole schedule in steps, the warm-up included.
        end: rate from step `total_steps` on, 0.

    Raises:
        ValueError: if a rate is negative or not finite, a number of steps is not a whole number
            from 0, or the warm-up is longer than the whole schedule.

    Example:
        >>> print(warmup_linear(1.0, 2, 6)(jnp.arange(8)))
        [0.   0.5  1.   0.75 0.5  0.25 0.   0.  ]
    """
    check_nonnegative(peak=peak, end=end)
    down = linear(peak, end, _steps_left(warmup_steps, total_steps))
    return _warm_up(peak, warmup_steps, down)


def inverse_square_root(peak: float, warmup_steps: int) -> Schedule:
    """Returns a linear warm-up to `peak`, then the rate `peak * sqrt(warmup_steps / step)`.

    The rate is 0 at step 0 and `peak` at step `warmup_steps`. The decay has no end. Vaswani et al.
    2017 use `peak = (d_model * warmup_steps) ** -0.5`.

    Arguments:
        peak: highest rate, at least 0.
        warmup_steps: length of the warm-up in steps, at least 1. It also scales the decay.

    Raises:
        ValueError: if `peak` is negative or not finite, or `warmup_steps` is not a whole number
            from 1.

    Example:
        >>> print(inverse_square_root(1.0, 4)(jnp.asarray([0, 2, 4, 16, 64])))
        [0.   0.5  1.   0.5  0.25]
    """
    check_nonnegative(peak=peak)
    warmup_steps = _whole("warmup_steps", warmup_steps, least=1)
    return _warm_up(peak, warmup_steps, Schedule(_inverse_root, (float(peak), warmup_steps)))


def warmup_stable_decay(
    peak: float, warmup_steps: int, stable_steps: int, decay_steps: int, end: float = 0.0
) -> Schedule:
    """Returns a linear warm-up to `peak`, a plateau, and a linear decay to `end`.

    The rate is 0 at step 0 (`peak` without warm-up), `peak` from step `warmup_steps` to
    `warmup_steps + stable_steps`, and `end` from `decay_steps` steps later on. The plateau can be
    extended while the total number of steps is unknown (Hu et al. 2024; Hägele et al. 2024).

    Arguments:
        peak: highest rate, at least 0.
        warmup_steps: length of the warm-up in steps.
        stable_steps: length of the plateau in steps.
        decay_steps: length of the decay in steps.
        end: rate after the decay, 0.

    Raises:
        ValueError: if a rate is negative or not finite, or a number of steps is not a whole
            number from 0.

    Example:
        >>> print(warmup_stable_decay(1.0, 2, 2, 2)(jnp.arange(8)))
        [0.  0.5 1.  1.  1.  0.5 0.  0. ]
    """
    check_nonnegative(peak=peak, end=end)
    stable_steps = _whole("stable_steps", stable_steps)
    down = linear(peak, end, _whole("decay_steps", decay_steps))
    return _warm_up(peak, warmup_steps, join(constant(peak), stable_steps, down))


def _warm_up(peak: float, warmup_steps: int, after: Schedule) -> Schedule:
    warmup_steps = _whole("warmup_steps", warmup_steps)
    return join(linear(0.0, peak, warmup_steps), warmup_steps, after)


def _ends(start: float, end: float, steps: int) -> tuple[float, float, int]:
    check_nonnegative(start=start, end=end)
    return float(start), float(end), _whole("steps", steps)


def _whole(name: str, value: Any, least: int = 0) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be a whole number of steps, got {value!r}. Round it with int(...)."
        ) from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}. Pass a number of updates.")
    return value


def _steps_left(warmup_steps: int, total_steps: int) -> int:
    left = _whole("total_steps", total_steps) - _whole("warmup_steps", warmup_steps)
    if left < 0:
        raise ValueError(
            f"warmup_steps must be at most total_steps, got {warmup_steps} > {total_steps}. "
            "total_steps counts the warm-up too: raise it or shorten the warm-up."
        )
    return left


def _ramp(step: Array, start: float, end: float, steps: int) -> Array:
    fraction = _fraction(step, steps)
    return start * (1 - fraction) + end * fraction


def _cosine_ramp(step: Array, start: float, end: float, steps: int) -> Array:
    fraction = (1 - jnp.cos(math.pi * _fraction(step, steps))) / 2
    return start * (1 - fraction) + end * fraction


def _fraction(step: Array, steps: int) -> Array:
    """Returns `step / steps`, at most 1; 0 and 1 are exact."""
    return jnp.where(step < steps, step.astype(jnp.float32) / max(steps, 1), 1.0)


def _inverse_root(step: Array, peak: float, warmup_steps: int) -> Array:
    return peak * jnp.sqrt(warmup_steps / (warmup_steps + step).astype(jnp.float32))


def _joined(step: Array, first: Callable, steps: int, second: Callable) -> Array:
    early = jnp.asarray(first(step), jnp.float32)
    late = jnp.asarray(second(jnp.maximum(step - steps, 0)), jnp.float32)
    return jnp.where(step < steps, early, late)
