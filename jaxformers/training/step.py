"""One step of training: gradients of the loss, then the optimiser, as one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree

from jaxformers.checks import check_callable, check_key, check_positive, check_size
from jaxformers.optim import Model, Optimizer, as_optimizer, global_norm
from jaxformers.precision import cast_floating, check_float_dtype
from jaxformers.training.names import explain_arguments
from jaxformers.training.objectives import Batch, Loss, check_ids, count_targets

MEMORY, LONGEST_START = 0.98, 20  # of the usual norm of gradients, in steps


class Gradients(eqx.Module):
    """How the loss of a batch and its gradients are computed; see `train_step`."""

    loss: Loss
    compute_dtype: Any = eqx.field(static=True)
    accumulate: int = eqx.field(static=True)
    count: Callable

    def __init__(self, loss: Loss, compute_dtype: Any, accumulate: int, count: Callable):
        check_callable(loss=loss, count=count)
        check_size(accumulate=accumulate)
        self.loss, self.accumulate, self.count = loss, accumulate, count
        self.compute_dtype = None if compute_dtype is None else _check_compute_dtype(compute_dtype)

    def __call__(
        self, optimizer: Optimizer, model: Model, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Model]:
        trained, frozen = eqx.partition(model, optimizer.trains(model))

        @eqx.filter_value_and_grad
        def value_and_grad(trained, batch, key):
            model = eqx.combine(trained, frozen)
            if self.compute_dtype is not None:
                model = cast_floating(model, self.compute_dtype)
            return _check_loss(self.loss(model, batch, key))

        if self.accumulate == 1:
            return value_and_grad(trained, batch, key)

        def add(sums, part):
            weight = jnp.asarray(self.count(part[0]), jnp.float32)
            new = *value_and_grad(trained, *part), jnp.ones(())
            # The loss of a part in which nothing counts may be anything.
            new = jax.tree.map(
                lambda x: jnp.where(weight == 0, 0, weight * x.astype(jnp.float32)), new
            )
            return jax.tree.map(jnp.add, sums, new), None

        shapes = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
        parts = _split_rows(batch, self.accumulate), jax.random.split(key, self.accumulate)
        sums, _ = jax.lax.scan(add, (jnp.zeros(()), shapes, jnp.zeros(())), parts)
        *means, weight = sums
        weight = jnp.where(weight == 0, 1, weight)  # no target counts: the loss is 0
        value, grads = jax.tree.map(lambda x: x / weight, tuple(means))
        return value, grads


@explain_arguments
def train_step(
    model: Model,
    state: PyTree,
    batch: Batch,
    *,
    optimizer: Any,
    loss: Loss,
    key: PRNGKeyArray,
    compute_dtype: Any = None,
    accumulate: int = 1,
    count: Callable[[Batch], Any] = count_targets,
) -> tuple[Model, PyTree, Float[Array, ""]]:
    """One update: gradients of the loss, then the optimiser, as one compiled program.

    The arrays of `model` and `state` are donated: their memory is used for the result, so only the
    returned ones may be used afterwards.

    With `compute_dtype=jnp.bfloat16` the loss is computed by a copy of the weights in 16 bits, and
    what is updated stays in 32 (Micikevicius et al. 2018): small updates are not rounded away.
    Sums over tokens, softmax, norms and the loss are computed in float32 either way.

    A loss that is not finite changes neither the weights nor the state. Ids beyond the vocabulary
    give NaN on an accelerator; in NumPy's arrays and on a CPU they are refused beforehand.

    Arguments:
        model: the model to train.
        state: `optimizer.init(model)`, or what the last step returned.
        batch: what `loss` takes.
        optimizer: `AdamW` or another `Optimizer`, or an optax transformation.
        loss: function `(model, batch, key) -> scalar`, such as `language_model_loss`: a mean over
            what counts in the batch.
        key: PRNG key for dropout, a new one each step.
        compute_dtype: the type to compute the loss and its gradients in, `jnp.bfloat16`; None is
            that of the weights. It saves time where the hardware has it, as GPUs and TPUs do.
        accumulate: in how many parts of equal size the rows of the batch are passed through the
            model, one after another, 1. Their gradients are added up, weighted by `count`: the
            same update with the memory of one part, but for the dropout drawn.
        count: function `batch -> number`, of what `loss` takes the mean over.

    Returns:
        The model and the state after the update, and the loss before it.

    Raises:
        ValueError: if there is no key, a piece does not fit another, ids are not in the
            vocabulary, the rows cannot be divided into `accumulate` parts, or
            `compute_dtype` is no floating-point type, or float16, whose range is too small for
            gradients.

    Example:
        >>> optimizer = AdamW(1e-3)
        >>> state = optimizer.init(model)
        >>> model, state, value = train_step(
        ...     model, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
        ... )
    """
    gradients = Gradients(loss, compute_dtype, accumulate, count)
    check_ids(loss, model, batch)
    return _train_step((gradients, as_optimizer(optimizer), batch, check_key(key)), model, state)


@eqx.filter_jit(donate="all-except-first")
def _train_step(kept, model, state):
    gradients, optimizer, batch, key = kept
    value, grads = gradients(optimizer, model, batch, key)
    new = optimizer.update(grads, state, model)
    # Not by the norm of the gradients: all would have to be there before the first is applied.
    model, state = _new_if(jnp.isfinite(value), new, (model, state))
    return model, state, value


def _new_if(good: Bool[Array, ""], new: Model, old: Model) -> Model:
    """Returns a new tree after a good step, else the old one."""
    return jax.tree.map(lambda x, y: jnp.where(good, x, y) if eqx.is_array(x) else x, new, old)


class Guard(NamedTuple):
    """What `BadSteps` remembers: the usual norm of gradients, made of how many; failures."""

    usual: Float[Array, ""]
    seen: Int32[Array, ""]
    in_a_row: Int32[Array, ""]
    failed: Bool[Array, ""]


class BadSteps(eqx.Module):
    """Which steps are bad, and how many of them are skipped.

    A step whose loss or gradients are not finite, or whose gradients are much larger than usual,
    changes neither the weights nor the optimiser's state (Chowdhery et al. 2022 skip batches at
    spikes of the loss).

    Arguments:
        allowed: how many bad steps in a row are skipped and counted. One more ends the training
            with an error; 0 allows none.
        spike: a norm of the gradients of more than `spike` times its running mean is bad as well,
            after the first 20 steps; None, the default, is no limit.

    Raises:
        ValueError: if `allowed` is not a whole number from 0, or `spike` is not above 1.

    Example:
        >>> bad_steps = BadSteps(allowed=5, spike=10.0)
        >>> good, _ = bad_steps.judge(bad_steps.start(), jnp.asarray(jnp.nan), jnp.asarray(1.0))
        >>> print(good)
        False
    """

    allowed: int = eqx.field(static=True, default=0)
    spike: float | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if isinstance(self.allowed, bool) or not isinstance(self.allowed, int) or self.allowed < 0:
            raise ValueError(f"allowed must be a whole number from 0, got {self.allowed!r}.")
        if self.spike is not None:
            check_positive(spike=self.spike)
            if self.spike <= 1:
                raise ValueError(f"spike must be above 1, the usual norm, got {self.spike!r}.")

    def start(self) -> Guard:
        """What is remembered before the first step."""
        usual, seen, in_a_row = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return Guard(usual, seen, in_a_row, jnp.zeros((), jnp.bool_))

    def judge(
        self, guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], Guard]:
        """Whether a step is good, and what to remember; after a failure none is, and nothing."""
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if self.spike is not None:
            usual = guard.usual / (
                1 - MEMORY ** guard.seen.astype(jnp.float32)
            )  # the mean starts at 0
            good &= (guard.seen < LONGEST_START) | (norm <= self.spike * usual)
        good &= ~guard.failed
        usual = jnp.where(good, MEMORY * guard.usual + (1 - MEMORY) * norm, guard.usual)
        in_a_row = jnp.where(good, 0, guard.in_a_row + 1)
        failed = guard.failed | (in_a_row > self.allowed)
        return good, Guard(usual, guard.seen + good.astype(jnp.int32), in_a_row, failed)


class Training(eqx.Module):
    """Everything that a run needs to go on: what `fit` returns and checkpoints hold.

    The position in the data is the step: batch `i` trains step `i`, counted from 0. Gradients are
    accumulated within a step, so nothing of that is left between two.
    """

    model: PyTree
    optimizer_state: PyTree
    key: PRNGKeyArray
    step: Int32[Array, ""]
    skipped: Int32[Array, ""]
    guard: Guard


def begin(model: Model, optimizer: Optimizer, bad_steps: BadSteps, key: PRNGKeyArray) -> Training:
    """The state before the first step, in memory of its own: steps write over it."""
    model, key = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, (model, check_key(key)))
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return Training(model, optimizer.init(model), key, step, skipped, bad_steps.start())


@eqx.filter_jit(donate="all-except-first")
def advance(kept: tuple, training: Training) -> tuple[Training, dict[str, Array]]:
    """The state after one more step, and what there is to tell about it."""
    gradients, optimizer, bad_steps, batch = kept
    old = training.model, training.optimizer_state
    key = jax.random.fold_in(training.key, training.step)
    value, grads = gradients(optimizer, training.model, batch, key)
    norm = global_norm(grads)
    good, guard = bad_steps.judge(training.guard, value, norm)
    metrics = {"loss": value, "gradient_norm": norm, "tokens": jnp.asarray(gradients.count(batch))}
    rate = optimizer.rate(training.optimizer_state)
    if rate is not None:
        metrics["learning_rate"] = rate
    new = optimizer.update(grads, training.optimizer_state, training.model)
    model, state = _new_if(good, new, old)
    step = training.step + (~guard.failed).astype(jnp.int32)
    skipped = training.skipped + (~good & ~guard.failed).astype(jnp.int32)
    training = Training(model, state, training.key, step, skipped, guard)
    return training, metrics | {"skipped": training.skipped, "failed": guard.failed}


def _split_rows(batch: Batch, parts: int) -> Batch:
    """The rows of a batch in `parts` parts, along a new leading axis."""
    shapes = {name: np.shape(x) for name, x in batch.items() if x is not None}
    rows = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(rows) != 1 or rows.pop() % parts or max(map(len, shapes.values())) < 2:
        raise ValueError(
            f"accumulate={parts} needs a batch whose arrays all have the same number of rows, "
            f"divisible by {parts}, got the shapes {shapes}."
        )

    def split(x: Array) -> Array:
        # Each part has rows from everywhere, so that a batch over many devices stays spread.
        x = jnp.asarray(x)
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    return {name: split(x) for name, x in batch.items() if x is not None}


def _check_loss(value: Any) -> Float[Array, ""]:
    if not eqx.is_inexact_array(value) or value.shape != ():
        raise ValueError(
            "loss must return one floating-point number as an array of shape (), got "
            f"{eqx.tree_pformat(value)}."
        )
    return value


def _check_compute_dtype(dtype: Any) -> np.dtype:
    dtype = check_float_dtype(compute_dtype=dtype)
    if dtype == jnp.float16:
        raise ValueError(
            "compute_dtype float16 is refused: gradients below 6e-8 would be zero unless the loss "
            "were scaled. Pass jnp.bfloat16, which has the range of float32."
        )
    return dtype
