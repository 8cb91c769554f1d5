"""The loop around the training step."""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jaxformers.checks import check_callable, check_size
from jaxformers.optim import Optimizer, as_optimizer
from jaxformers.training.batches import Feed, in_order, prepared
from jaxformers.training.evaluation import evaluate
from jaxformers.training.interrupt import Interrupt
from jaxformers.training.log import Log
from jaxformers.training.objectives import Batch, Loss, check_ids, count_targets
from jaxformers.training.step import BadSteps, Gradients, Training, advance, begin

IN_FLIGHT = 1  # steps that the device may be behind
NONE_BAD = BadSteps()


@dataclass(frozen=True)
class Report:
    """What a callback of `fit` is given.

    Arguments:
        step: how many steps were made.
        metrics: the figures of the last step (`loss`, `gradient_norm`, `learning_rate`, `tokens`,
            `skipped`), and `eval_loss` if there are batches to evaluate on.
        model: the model, its averaged weights if the optimiser keeps an average; a copy, which
            stays usable.
    """

    step: int
    metrics: dict[str, float]
    model: Any


def fit(
    model: PyTree,
    optimizer: Any,
    batches: Any,
    *,
    loss: Loss,
    steps: int,
    key: PRNGKeyArray,
    eval_batches: Any = None,
    eval_loss: Loss | None = None,
    eval_every: int = 500,
    checkpoint: Any = None,
    callbacks: Sequence[Callable[[Report], Any]] = (),
    log: Any = None,
    progress: bool = True,
    bad_steps: BadSteps = NONE_BAD,
    compute_dtype: Any = None,
    accumulate: int = 1,
    count: Callable[[Batch], Any] = count_targets,
) -> Training:
    """Train a model, from the beginning or from where a checkpoint of the same run left off.

    A run that was killed and is started again ends with the same weights and the same log, bit for
    bit on a CPU, as one that was not. Ctrl-C ends it after the step: the state is saved and
    returned; a second one ends it at once. SIGTERM saves, too, and then ends the program with
    status 143, or does what you have it do. The step is one compiled program; while the device
    works on it, the next batch is made. The model that is passed in stays usable: the run has a
    copy.

    Arguments:
        model: the model to train.
        optimizer: `AdamW` or another `Optimizer`, or an optax transformation.
        batches: dicts of arrays, one a step: a source of `jaxformers.data` or anything with
            `batches[i]` for step `i`; or an iterable, such as a list or a loader of Grain or torch,
            which starts again at its end and must be the same in each run, since on resuming its
            first batches are passed over.
        loss: function `(model, batch, key) -> scalar`, such as `language_model_loss`.
        steps: how many there are to be in all, those of the runs before included.
        key: PRNG key; step `i` draws its dropout from `jax.random.fold_in(key, i)`.
        eval_batches: what to evaluate on: a source of `jaxformers.data`, or a list of batches.
        eval_loss: what to evaluate, in the type of the weights; None is `loss`.
        eval_every: steps between evaluations, and calls of the callbacks; both also at the end.
        checkpoint: where to save and resume, `Checkpoints(directory, every=500)` or
            `OrbaxCheckpoints`; None is nowhere.
        callbacks: functions called with a `Report`; training ends early if one returns True. What
            they remember themselves is not resumed.
        log: directory for `metrics.jsonl`, a line for each step, and for TensorBoard's events if
            that package is installed; None is the checkpoints' directory, if there is one. Lines
            there of steps that are made now, all of them without a checkpoint, are replaced.
        progress: whether to show a progress bar on standard error (needs tqdm).
        bad_steps: which steps are skipped, and how many; by default the first one whose loss or
            gradients are not finite ends the training with an error.
        compute_dtype, accumulate, count: as for `train_step`.

    Of what a run was begun with, the shapes of the weights, the kind of optimiser and the key are
    held against the checkpoint. Other settings, data and learning rates among them, may be changed;
    the steps from there on are made with them.

    Returns:
        The state at the end: `model`, `optimizer_state`, `step`, `skipped`, `key`. If the optimiser
        keeps an average of the weights, `optimizer.averaged(model, optimizer_state)` has it.

    Raises:
        ValueError: if something does not fit, ids are not in the vocabulary, more steps in a row
            are bad than allowed, or the checkpoint is of another run. What was reached before an
            error is saved, if there is a checkpoint.
        OSError: if the last state cannot be saved. Before the end, that is a warning.
        ImportError: if tqdm is missing, or safetensors where there is a checkpoint.

    Example:
        >>> training = fit(
        ...     model,
        ...     AdamW(1e-3),
        ...     [batch],
        ...     loss=language_model_loss,
        ...     steps=3,
        ...     key=key,
        ...     progress=False,
        ... )
        >>> print(training.step)
        3
    """
    check_size(steps=steps, eval_every=eval_every)
    if not isinstance(callbacks, Sequence):
        raise ValueError(f"callbacks must be a list of functions, got {callbacks!r}. Pass [it].")
    check_callable(**{f"callbacks[{i}]": callback for i, callback in enumerate(callbacks)})
    _check_pieces(bad_steps, checkpoint, eval_batches)
    optimizer = as_optimizer(optimizer)
    gradients = Gradients(loss, compute_dtype, accumulate, count)
    eval_loss = loss if eval_loss is None else eval_loss
    if eval_batches is not None:  # what is wrong with them is known before the first step
        first = next(in_order(eval_batches), None)
        if first is None:
            raise ValueError("eval_batches must not be empty.")
        prepared(first, "the first of eval_batches", eval_loss, model)
    training = _resume(begin(model, optimizer, bad_steps, key), checkpoint)
    del model  # if the caller does not hold it either, its memory is free
    done = int(training.step)
    with Interrupt() as interrupt, Log(_log(log, checkpoint), done, steps, progress) as writer:
        evaluation = _Evaluation(eval_batches, eval_loss, count, callbacks)
        run = _Run(training, gradients, optimizer, bad_steps, evaluation, checkpoint, writer)
        del training
        if done:
            what = "going on" if done < steps else f"nothing is left of {steps} steps to make"
            writer.warn(f"{what}: {checkpoint.directory} is at step {done}")
        feed = Feed(
            batches, done, lambda batch, name: prepared(batch, name, loss, run.training.model)
        )
        try:
            _loop(run, feed, steps, eval_every, interrupt)
        except (Exception, SystemExit) as error:
            run.rescue(error, done)
            raise
        if interrupt.asked is not None and run.step < steps:
            writer.warn(f"{interrupt.asked.name}: stopped after step {run.step} of {steps}")
    interrupt.pass_on()
    return run.training


def _loop(run: "_Run", feed: Feed, steps: int, eval_every: int, interrupt: Interrupt) -> None:
    """All the steps that are left."""
    save_every = steps if run.checkpoint is None else run.checkpoint.every
    end = run.step >= steps
    if not end:
        feed.advance()
        end = feed.ended
    while not end:
        run.advance(feed.batch)
        if run.step < steps:
            feed.advance()  # while the device works
        ended = run.step == steps or feed.ended
        asked = interrupt.asked is not None
        report = run.step % eval_every == 0 or ended
        end = ended or asked
        save = run.step % save_every == 0 or end
        run.read(0 if report or save else IN_FLIGHT)
        if asked:
            run.save(end)  # at once: whoever asks may not wait for an evaluation
        if report and run.report():
            end = save = True
        if save and not asked:
            run.save(end)


@dataclass(frozen=True)
class _Evaluation:
    """What is looked at between steps."""

    batches: Any
    loss: Loss
    count: Callable[[Batch], Any]
    callbacks: Sequence[Callable[[Report], Any]]


class _Run:
    """The state of a run, and what is done with it."""

    def __init__(
        self,
        training: Training,
        gradients: Gradients,
        optimizer: Optimizer,
        bad_steps: BadSteps,
        evaluation: _Evaluation,
        checkpoint: Any,
        log: Log,
    ):
        self.training, self.step = training, int(training.step)
        self.gradients, self.optimizer, self.bad_steps = gradients, optimizer, bad_steps
        self.evaluation, self.checkpoint, self.log = evaluation, checkpoint, log
        self.unread: deque[tuple[int, dict, Batch]] = deque()
        self.metrics: dict[str, float] = {}

    def advance(self, batch: dict[str, Any]) -> None:
        """Have the device make a step."""
        kept = self.gradients, self.optimizer, self.bad_steps, batch
        self.training, metrics = advance(kept, self.training)
        self.step += 1
        self.unread.append((self.step, metrics, batch))

    def read(self, in_flight: int) -> None:
        """Put down the figures of all steps but the last few, which the device may be at."""
        while len(self.unread) > in_flight:
            step, metrics, batch = self.unread.popleft()
            metrics = jax.device_get(metrics)
            order = ("loss", *(name for name in metrics if name != "loss"))
            self.metrics = {name: metrics[name].item() for name in order}
            if self.metrics.pop("failed"):
                self.unread.clear()
                # Ids on an accelerator are looked at only now.
                check_ids(self.gradients.loss, self.training.model, batch, wait=True)
                raise ValueError(
                    f"step {step} is bad: its loss is {self.metrics['loss']}, the norm of its "
                    f"gradients {self.metrics['gradient_norm']}. It changed no weights. Look at "
                    "the batch and the learning rate, or have such steps skipped: "
                    "bad_steps=BadSteps(allowed=10)."
                )
            self.log.write(step, self.metrics)

    def report(self) -> bool:
        """Evaluate, and call the callbacks; whether one of them wants to end the training."""
        what = self.evaluation
        if what.batches is None and not what.callbacks:
            return False
        model = self.optimizer.averaged(self.training.model, self.training.optimizer_state)
        if what.batches is not None:
            value = evaluate(model, what.batches, loss=what.loss, count=what.count)
            self.log.write(self.step, {"eval_loss": value})
            self.log.say(f"step {self.step}: evaluation loss {value:.4f}")
            self.metrics["eval_loss"] = value
        if what.callbacks:  # may keep it, while the next step writes over the weights
            model = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, model)
        report = Report(self.step, dict(self.metrics), model)
        answers = [callback(report) for callback in what.callbacks]  # all, whatever the first says
        return any(isinstance(x, bool | np.bool) and bool(x) for x in answers)

    def save(self, end: bool) -> None:
        """Save in the background; at the end, wait until it is there."""
        if self.checkpoint is None:
            return
        failed = None
        try:
            self.log.sync()
            self.checkpoint.save(self.training, self.step)
        except OSError as error:  # of this one, or of the one before
            failed = error
        if end:
            self.checkpoint.wait()
            if self.step not in self.checkpoint.steps() and failed is not None:
                raise failed
        if failed is not None:
            # To stop would lose the steps since the last checkpoint; the next may succeed.
            warnings.warn(f"a checkpoint is missing, training goes on: {failed}", stacklevel=4)

    def rescue(self, error: BaseException, done: int) -> None:
        """Save what was reached beyond step `done` before an error, if the device still has it."""
        arrays = jax.tree.leaves(eqx.filter(self.training, eqx.is_array))
        if self.checkpoint is None or any(x.is_deleted() for x in arrays):
            return
        if int(self.training.step) == done:
            return
        try:
            with contextlib.suppress(ValueError):
                self.read(0)
            # Whoever goes on is where this run was: one more bad step is too many again.
            guard = self.training.guard
            in_a_row = jnp.minimum(guard.in_a_row, self.bad_steps.allowed)
            guard = guard._replace(failed=jnp.zeros_like(guard.failed), in_a_row=in_a_row)
            self.training = eqx.tree_at(lambda x: x.guard, self.training, guard)
            self.step = int(self.training.step)
            self.save(end=True)
            error.add_note(f"Step {self.step} is saved in {self.checkpoint.directory}.")
        except Exception as second:
            error.add_note(f"What was reached could not be saved: {second}")


def _resume(training: Training, checkpoint: Any) -> Training:
    """The state of the newest checkpoint, if there is one."""
    if checkpoint is None or not checkpoint.steps():
        return training
    key = jax.random.key_data(training.key).tolist()
    like = jax.tree.map(_outline, training)
    del training  # the memory of two would be needed otherwise
    found, _ = checkpoint.restore(like)
    begun = jax.random.key_data(found.key).tolist()
    if key != begun:
        raise ValueError(
            f"the run in {checkpoint.directory} was begun with another key, {begun}, got {key}. "
            "Pass that key, or another directory."
        )
    return found


def _outline(x: Any) -> Any:
    """An array without its memory; scalars, which may be keys or weakly typed, as they are."""
    if not isinstance(x, jax.Array) or x.ndim == 0:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


def _log(log: Any, checkpoint: Any) -> Any:
    """Where figures are written to."""
    if log is not None or checkpoint is None:
        return log
    if "://" in os.fspath(checkpoint.directory):
        raise ValueError(
            f"the log needs a local directory, and {checkpoint.directory} is none: pass log=."
        )
    return checkpoint.directory


def _check_pieces(bad_steps: Any, checkpoint: Any, eval_batches: Any) -> None:
    if not isinstance(bad_steps, BadSteps):
        raise ValueError(f"bad_steps must be BadSteps(allowed=...), got {bad_steps!r}.")
    if checkpoint is not None and not hasattr(checkpoint, "restore"):
        raise ValueError(
            f"checkpoint must be Checkpoints(directory, every=500) or None, got {checkpoint!r}."
        )
    if isinstance(eval_batches, Iterator):
        raise ValueError(
            "eval_batches must give its batches anew each time, got an iterator, which gives them "
            "once. Pass a list, or a source of jaxformers.data."
        )
    gives = hasattr(eval_batches, "__iter__") or hasattr(eval_batches, "in_order")
    if eval_batches is not None and (not gives or isinstance(eval_batches, Mapping | type)):
        raise ValueError(
            "eval_batches must be a list of dicts of arrays, or a source of jaxformers.data, got "
            f"{eval_batches!r:.80}."
        )
