"""One step of training: gradients of the loss, then the optimizer, as one compiled program."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree

from jaxformers.checks import check_key, check_positive, check_usable, is_known
from jaxformers.optim import Model, Optimizer, as_optimizer, global_norm
from jaxformers.optim.compiled import choose, own_arrays
from jaxformers.optim.leafwise import LeafwiseOptimizer
from jaxformers.precision import is_narrow, noticed
from jaxformers.sharding.mesh import mesh_in
from jaxformers.sharding.spread import lie_at, places_of, replicate
from jaxformers.training.batches import as_dict
from jaxformers.training.gradients import Gradients
from jaxformers.training.names import explain_arguments
from jaxformers.training.objectives import Batch, Loss, check_ids, count_targets

MEMORY, LONGEST_START = 0.98, 20  # the decay of the running mean of norms; its first steps

# The arrays that `fit` does not train, by `id`. The model that it is given and the one that it
# returns share them, so no step may overwrite them.
_shared: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()


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
    """Makes one update: computes the gradients and applies the optimizer, in one compiled program.

    The arrays of `model` and `state` are donated: their memory is used for the result, so only the
    returned ones may be used afterwards. Arrays that are not trained, such as the bases of
    adapters, are neither donated nor copied.

    The weights are updated in their own type. In 16 bits, rounding loses most updates, and a
    warning says so. Train float32 weights instead, `cast_floating(model, jnp.float32)`; `fit` does
    this by itself. With `compute_dtype=jnp.bfloat16` the loss is computed with a copy of the
    weights in 16 bits (Micikevicius et al. 2018). Sums over tokens, softmax, norms and the loss
    are computed in float32 either way.

    A loss that is not finite changes neither the weights nor the state. Ids beyond the vocabulary
    raise an error if they are in NumPy arrays or on a CPU. On an accelerator the loss is NaN.

    Arguments:
        model: the model to train.
        state: `optimizer.init(model)`, or the state that the last step returned.
        batch: a dict of arrays (NumPy, JAX or torch) or lists of numbers, as `loss` takes it.
        optimizer: `AdamW` or another `Optimizer`, or an optax transformation. If its `update` takes
            `value=`, it gets the loss. One that evaluates the loss itself, such as a line search,
            raises an error.
        loss: function `(model, batch, key) -> scalar`, such as `language_model_loss`; a mean over
            the targets that count in the batch.
        key: PRNG key for dropout, a new one each step.
        compute_dtype: the type in which the loss and its gradients are computed, `jnp.bfloat16`.
            None, the default, is the type of the weights; frozen weights of 16 bits are widened to
            the type of the trained ones. 16 bits save time on hardware that computes with them,
            such as GPUs and TPUs.
        accumulate: the number of equal parts into which the rows of the batch are split, default 1.
            The parts pass through the model one after another. Their gradients are summed, weighted
            by `count`. The update is the same except for dropout, and needs the memory of one part.
        count: function `batch -> number` that counts the targets over which `loss` takes its mean.

    Returns:
        The model and the state after the update, and the loss before it.

    Raises:
        ValueError: if there is no key, the arguments do not fit together, ids are not in the
            vocabulary, the rows cannot be divided into `accumulate` parts, or `compute_dtype` is
            not a floating-point type, or is float16, whose range is too small for gradients.

    Example:
        >>> optimizer = AdamW(1e-3)
        >>> state = optimizer.init(model)
        >>> model, state, value = train_step(
        ...     model, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
        ... )
    """
    gradients = Gradients(loss, compute_dtype, accumulate, count)
    optimizer, key = as_optimizer(optimizer), check_key(key)
    check_usable(model=model, state=state, key=key)
    batch = as_dict(batch)
    check_ids(loss, model, batch)
    owner = getattr(optimizer, "transformation", optimizer)
    with noticed(owner, model, lambda: eqx.filter(model, optimizer.trains(model))):
        trained, rest = _parts(model, trained_parts(model, optimizer))
        mesh = mesh_in(model)
        state, key = replicate((state, key), mesh)
        places = places_of(mesh, model), places_of(mesh, (trained, state))
        kept = gradients, optimizer, batch, key, rest, places
        trained, state, value = _donating(_train_step, kept, trained, state)
        return trained if rest is None else eqx.combine(trained, rest), state, value


@eqx.filter_jit(donate="all-except-first")
def _train_step(kept, model, state):
    gradients, optimizer, batch, key, rest, places = kept
    model = model if rest is None else eqx.combine(model, rest)
    value, grads = gradients(optimizer, model, batch, key, places[0])
    # The norm of the gradients is not checked: all gradients would have to be in memory for that.
    model, state = _update_if(jnp.isfinite(value), optimizer, grads, state, model, value)
    model = model if rest is None else _changed(model, rest)
    return *lie_at((model, state), places[1]), value


def _update_if(
    good: Bool[Array, ""],
    optimizer: Optimizer,
    grads: Model,
    state: PyTree,
    model: Model,
    value: Float[Array, ""],
) -> tuple[Model, PyTree]:
    """Returns the model and the state after an update, or as they are after a bad step.

    The update gets the loss if it takes `value=`.
    """
    if isinstance(optimizer, LeafwiseOptimizer) and optimizer.takes("good"):
        return optimizer.update(grads, state, model, good=good)
    extra = {"value": value} if optimizer.takes("value") else {}
    new, old = optimizer.update(grads, state, model, **extra), (model, state)
    structures: list[Any] = [jax.tree.structure(x) for x in (new, old)]
    if structures[0] != structures[1]:
        raise ValueError(
            "an update must return a model and a state of the form that it was given, so that a "
            "bad step can keep the old ones; that of optax.monitor is another one after the first "
            "step. Leave such a transformation out; optax.snapshot keeps its form."
        )
    return choose(good, new, old)


def _changed(model: Model, rest: Model) -> Model:
    """Returns the model without the leaves that it shares with `rest`, which need no copy."""
    return jax.tree.map(
        lambda kept, x: None if x is kept else x, rest, model, is_leaf=lambda x: x is None
    )


def _donating(step: Callable, kept: PyTree, *given: PyTree) -> Any:
    """Calls a step that overwrites the arrays of `given`. Repeated arrays are copied before.

    An optimizer's state may begin with the weights themselves, and two leaves may be one array.
    """
    arrays = [x for x in jax.tree.leaves(given) if isinstance(x, jax.Array) and is_known(x)]
    seen = {id(x) for x in jax.tree.leaves(kept)}.union(_shared.keys())
    if len({id(x) for x in arrays} - seen) < len(arrays):

        def own(x: Any) -> Any:
            if not isinstance(x, jax.Array) or id(x) not in seen:
                seen.add(id(x))
                return x
            return x.copy()

        given = jax.tree.map(own, given)
    try:
        return step(kept, *given)
    except jax.errors.JaxRuntimeError as error:
        if "donate" not in str(error):
            raise
        # Two arrays share their memory, as after `jax.device_put`. Nothing is donated yet.
        return step(kept, *own_arrays(given))


class Guard(NamedTuple):
    """The memory of `BadSteps`: the mean of norms, its steps, bad steps in a row, the failure."""

    usual: Float[Array, ""]
    seen: Int32[Array, ""]
    in_a_row: Int32[Array, ""]
    failed: Bool[Array, ""]


class BadSteps(eqx.Module):
    """A rule that decides which steps are bad and how many of them are skipped.

    A step is bad if its loss or gradients are not finite, or if its gradients are much larger than
    usual. It changes neither the weights nor the optimizer's state (Chowdhery et al. 2022 skip
    batches at spikes of the loss).

    Arguments:
        allowed: how many bad steps in a row are skipped, default 0. One more ends the training
            with an error.
        spike: after the first 20 steps, a step is also bad if the norm of its gradients is more
            than `spike` times the running mean of norms. None, the default, sets no limit.

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
        """Returns the memory before the first step."""
        usual, seen, in_a_row = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return Guard(usual, seen, in_a_row, jnp.zeros((), jnp.bool_))

    def judge(
        self, guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], Guard]:
        """Returns whether a step is good, and the new memory. After a failure no step is good."""
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
    """The whole state of a training: `fit` returns it and checkpoints hold it.

    The step is also the position in the data: batch `i` trains step `i`, counted from 0. Gradients
    are accumulated within a step, so they are not part of the state.
    """

    model: PyTree
    optimizer_state: PyTree
    key: PRNGKeyArray
    step: Int32[Array, ""]
    skipped: Int32[Array, ""]
    guard: Guard


def begin(model: Model, optimizer: Optimizer, bad_steps: BadSteps, key: PRNGKeyArray) -> Training:
    """Returns the state before the first step. Steps overwrite it, so it has its own memory.

    Trained weights are float32 or wider. Frozen ones are neither cast nor copied.
    """
    check_usable(model=model)
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    trained, rest = eqx.partition(model, optimizer.trains(model))
    trained = jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x) else x.copy(), trained)
    _shared.update({id(x): x for x in jax.tree.leaves(rest) if isinstance(x, jax.Array)})
    model = eqx.combine(trained, rest)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    training = Training(
        model=model,
        optimizer_state=own_arrays(optimizer.init(model)),
        key=check_key(key).copy(),
        step=step,
        skipped=skipped,
        guard=bad_steps.start(),
    )
    return replicate(training, mesh_in(model))


def trained_parts(model: PyTree, optimizer: Optimizer) -> PyTree[bool] | None:
    """Returns which leaves a step overwrites, or None if these are all arrays."""
    trains = optimizer.trains(model)
    pairs = zip(jax.tree.leaves(trains), jax.tree.leaves(model), strict=True)
    return trains if any(eqx.is_array(x) and not trained for trained, x in pairs) else None


def one_step(
    gradients: Gradients,
    optimizer: Optimizer,
    bad_steps: BadSteps,
    batch: Batch,
    training: Training,
    trains: PyTree[bool] | None,
) -> tuple[Training, dict[str, Array]]:
    """Returns the state after one more step, and its figures. Frozen arrays are not copied."""
    trained, rest = _parts(training.model, trains)
    mesh = mesh_in(training.model)
    state = training.optimizer_state
    places = places_of(mesh, training.model), places_of(mesh, (trained, state))
    kept = gradients, optimizer, bad_steps, batch, rest, places
    training, metrics = advance(kept, dataclasses.replace(training, model=trained))
    if rest is None:
        return training, metrics
    model = eqx.combine(training.model, rest)
    return dataclasses.replace(training, model=model), metrics


def _parts(model: Model, trains: PyTree[bool] | None) -> tuple[Model, Model | None]:
    """Returns the part that a step overwrites, and the rest, None if that is empty."""
    return (model, None) if trains is None else eqx.partition(model, trains)


@eqx.filter_jit(donate="all-except-first")
def advance(kept: tuple, training: Training) -> tuple[Training, dict[str, Array]]:
    """Returns the state after one more step, and the figures of the step."""
    gradients, optimizer, bad_steps, batch, rest, places = kept
    model = training.model if rest is None else eqx.combine(training.model, rest)
    old = model, training.optimizer_state
    key = jax.random.fold_in(training.key, training.step)
    value, grads = gradients(optimizer, old[0], batch, key, places[0])
    norm = global_norm(grads)
    good, guard = bad_steps.judge(training.guard, value, norm)
    metrics = {"loss": value, "gradient_norm": norm, "tokens": jnp.asarray(gradients.count(batch))}
    rate = optimizer.rate(training.optimizer_state)
    if rate is not None:
        metrics["learning_rate"] = rate
    model, state = _update_if(good, optimizer, grads, old[1], old[0], value)
    step = training.step + (~guard.failed).astype(jnp.int32)
    skipped = training.skipped + (~good & ~guard.failed).astype(jnp.int32)
    model = model if rest is None else _changed(model, rest)
    model, state = lie_at((model, state), places[1])
    training = Training(model, state, training.key, step, skipped, guard)
    return training, metrics | {"skipped": training.skipped, "failed": guard.failed}
