"""The loop around the training step."""

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jaxformers.checks import check_callable, check_size
from jaxformers.optim import as_optimizer
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
        model: the model, its averaged weights if the optimiser keeps an average.
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
    bit on a CPU, as one that was not. Ctrl-C and SIGTERM end it after the step, with everything
    saved; a second Ctrl-C at once. The step is one compiled program; while the device works on it,
    the next batch is made. The model that is passed in stays usable: the run has a copy.

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
        eval_loss: what to evaluate; None is `loss`.
        eval_every: steps between evaluations, and calls of the callbacks; both also at the end.
        checkpoint: where to save and resume, `Checkpoints(directory, every=500)` or
            `OrbaxCheckpoints`; None is nowhere.
        callbacks: functions called with a `Report`; training ends early if one returns True.
        log: directory for `metrics.jsonl`, a line for each step, and for TensorBoard's events if
            that package is installed; None is the checkpoints' directory, if there is one.
        progress: whether to show a progress bar on standard error (needs tqdm).
        bad_steps: which steps are skipped, and how many; by default the first one whose loss or
            gradients are not finite ends the training with an error.
        compute_dtype, accumulate, count: as for `train_step`.

    Returns:
        The state at the end: `model`, `optimizer_state`, `step`, `skipped`, `key`.

    Raises:
        ValueError: if something does not fit, ids are not in the vocabulary, more steps in a row
            are bad than allowed, or the checkpoint is of another run. What was reached is saved
            first, if there is a checkpoint.
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
    check_callable(**{f"callbacks[{i}]": callback for i, callback in enumerate(callbacks)})
    _check_pieces(bad_steps, checkpoint, eval_batches)
    optimizer = as_optimizer(optimizer)
    gradients = Gradients(loss, compute_dtype, accumulate, count)
    training = _resume(begin(model, optimizer, bad_steps, key), checkpoint)
    del model  # if nobody else holds it, its memory is free
    log = checkpoint.directory if log is None and checkpoint is not None else log
    evaluation = eval_batches, loss if eval_loss is None else eval_loss, count
    done = int(training.step)
    with Interrupt() as interrupt, Log(log, done, steps, progress) as writer:
        pieces = gradients, optimizer, bad_steps
        run = _Run(training, pieces, evaluation, checkpoint, callbacks, writer)
        del training
        try:
            _loop(run, _Feed(batches, done), steps, eval_every, interrupt)
        except Exception as error:
            run.rescue(error)
            raise
    return run.training


def _loop(run: "_Run", feed: "_Feed", steps: int, eval_every: int, interrupt: Interrupt) -> None:
    """All the steps that are left."""
    save_every = run.checkpoint.every if run.checkpoint is not None else steps
    end = run.step >= steps
    if not end:
        feed.prepare(run)
    while not end:
        run.advance(feed.batch)
        if run.step < steps:
            feed.prepare(run)  # while the device works
        end = run.step == steps or feed.ended or interrupt.asked is not None
        report = run.step % eval_every == 0 or run.step == steps
        save = run.step % save_every == 0 or end
        run.read(0 if report or save else IN_FLIGHT)
        if report and run.report():
            end = save = True
        if save:
            run.save(end)
    if interrupt.asked is not None:
        run.log.say(f"{interrupt.asked}: stopped after step {run.step} of {steps}")


class _Run:
    """The state of a run, and what is done with it."""

    def __init__(
        self,
        training: Training,
        pieces: tuple,
        evaluation: tuple,
        checkpoint: Any,
        callbacks: Sequence[Callable[[Report], Any]],
        log: Log,
    ):
        self.training, self.step = training, int(training.step)
        self.pieces, self.evaluation, self.callbacks = pieces, evaluation, callbacks
        self.checkpoint, self.log = checkpoint, log
        self.unread: deque[tuple[int, dict]] = deque()
        self.metrics: dict[str, float] = {}

    def advance(self, batch: dict[str, Any]) -> None:
        """Have the device make a step."""
        self.training, metrics = advance((*self.pieces, batch), self.training)
        self.step += 1
        self.unread.append((self.step, metrics))

    def read(self, in_flight: int) -> None:
        """Put down the figures of all steps but the last few, which the device may be at."""
        while len(self.unread) > in_flight:
            step, metrics = self.unread.popleft()
            metrics = jax.device_get(metrics)
            order = ("loss", *(name for name in metrics if name != "loss"))
            self.metrics = {name: metrics[name].item() for name in order}
            if self.metrics.pop("failed"):
                self.unread.clear()
                raise ValueError(
                    f"step {step} is bad: its loss is {self.metrics['loss']}, the norm of its "
                    f"gradients {self.metrics['gradient_norm']}. The weights are those before it. "
                    "Look at the batch and the learning rate, or skip such steps: "
                    "bad_steps=BadSteps(allowed=10)."
                )
            self.log.write(step, self.metrics)

    def report(self) -> bool:
        """Evaluate, and call the callbacks; whether one of them wants to end the training."""
        batches, loss, count = self.evaluation
        if batches is None and not self.callbacks:
            return False
        _, optimizer, _ = self.pieces
        model = optimizer.averaged(self.training.model, self.training.optimizer_state)
        if batches is not None:
            value = evaluate(model, batches, loss=loss, count=count)
            self.log.write(self.step, {"eval_loss": value})
            self.log.say(f"step {self.step}: evaluation loss {value:.4f}")
            self.metrics["eval_loss"] = value
        report = Report(self.step, dict(self.metrics), model)
        # All are called, whatever the first one says.
        return any([callback(report) is True for callback in self.callbacks])

    def save(self, end: bool) -> None:
        """Save in the background; at the end, wait until it is there."""
        if self.checkpoint is None:
            return
        self.log.sync()
        try:
            self.checkpoint.save(self.training, self.step)
            if end:
                self.checkpoint.wait()
        except OSError as error:
            if end:
                raise
            # To stop would lose the steps since the last checkpoint; the next may succeed.
            warnings.warn(f"training goes on, but a checkpoint is missing: {error}", stacklevel=2)

    def rescue(self, error: Exception) -> None:
        """Save what was reached before an error, if the device still has it."""
        arrays = jax.tree.leaves(eqx.filter(self.training, eqx.is_array))
        if self.checkpoint is None or any(x.is_deleted() for x in arrays):
            return
        try:
            with contextlib.suppress(ValueError):
                self.read(0)
            fresh = self.pieces[-1].start()._replace(usual=self.training.guard.usual)
            fresh = fresh._replace(seen=self.training.guard.seen)
            training = eqx.tree_at(lambda x: x.guard, self.training, fresh)
            self.checkpoint.save(training, int(training.step))
            self.checkpoint.wait()
            error.add_note(f"Step {training.step} is saved in {self.checkpoint.directory}.")
        except Exception as second:
            error.add_note(f"What was reached could not be saved: {second}")


class _Feed:
    """The batches from a step on, on the device, one ahead."""

    def __init__(self, batches: Any, position: int):
        self.batches, self.position, self.ended = batches, position, False
        self.batch: dict[str, Any] = {}
        self.iterator: Iterator[Any] | None = None
        gives = hasattr(batches, "__getitem__") or hasattr(batches, "__iter__")
        if not gives or isinstance(batches, Mapping | type):
            raise ValueError(
                "batches must give one dict of arrays a step, as a list, an iterable or a source "
                f"with batches[i], got {batches!r:.80}. For one batch pass [batch]."
            )
        if not hasattr(batches, "__getitem__"):
            self.iterator = self._iterate(position)

    def prepare(self, run: _Run) -> None:
        """Make the next batch, or know that there is none."""
        try:
            batch = self._at(self.position) if self.iterator is None else next(self.iterator)
        except StopIteration:
            self.ended = True
            warnings.warn(
                f"training ends after {self.position} steps: there are no more batches.",
                stacklevel=2,
            )
            return
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {self.position} must be a dict of arrays, got {type(batch).__name__}."
            )
        self.position += 1
        batch = {name: _as_array(x) for name, x in batch.items() if x is not None}
        check_ids(run.pieces[0].loss, run.training.model, batch)
        self.batch = jax.device_put(batch)

    def _at(self, position: int) -> Any:
        size = len(self.batches) if hasattr(self.batches, "__len__") else None
        if size == 0:
            raise ValueError("batches must not be empty.")
        return self.batches[position if size is None else position % size]

    def _iterate(self, skip: int) -> Iterator[Any]:
        """Again and again, unless it is an iterator; without the first `skip`."""
        once = iter(self.batches) is self.batches
        while True:
            empty = True
            for batch in self.batches:
                empty = False
                if skip:
                    skip -= 1
                else:
                    yield batch
            if once:
                return
            if empty:
                raise ValueError("batches must not be empty.")


def _as_array(x: Any) -> Any:
    """A loader's array, with indices as JAX has them."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x.astype(np.int32) if x.dtype == np.int64 and abs(x).max(initial=0) < 2**31 else x


def _resume(training: Training, checkpoint: Any) -> Training:
    """The state of the newest checkpoint, if there is one."""
    found = None if checkpoint is None else checkpoint.restore(training)
    if found is None:
        return training
    key, begun = (jax.random.key_data(x.key).tolist() for x in (training, found[0]))
    if key != begun:
        raise ValueError(
            f"the run in {checkpoint.directory} was begun with another key, {begun}, got {key}. "
            "Pass that key, or another directory."
        )
    return found[0]


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
