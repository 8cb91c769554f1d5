"""The state of a run, and what is done with it: steps, reports, saving, rescue."""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.optim import Optimizer
from jaxformers.training.batches import in_order
from jaxformers.training.evaluation import evaluate
from jaxformers.training.interrupt import Interrupt, Stopped
from jaxformers.training.log import Log
from jaxformers.training.notices import warn_and_go_on
from jaxformers.training.objectives import Batch, Loss, check_ids
from jaxformers.training.step import BadSteps, Gradients, Training, one_step


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


@dataclass(frozen=True)
class Evaluation:
    """What is looked at between steps."""

    batches: Any
    loss: Loss
    count: Callable[[Batch], Any]
    callbacks: Sequence[Callable[[Report], Any]]

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.batches is not None or bool(self.callbacks)


class Run:
    """The state of a run, and what is done with it."""

    def __init__(
        self,
        training: Training,
        gradients: Gradients,
        optimizer: Optimizer,
        bad_steps: BadSteps,
        evaluation: Evaluation,
        checkpoint: Any,
        log: Log,
    ):
        self.training, self.step = training, int(training.step)
        self.gradients, self.optimizer, self.bad_steps = gradients, optimizer, bad_steps
        self.trains = optimizer.trains(training.model)
        self.evaluation, self.checkpoint, self.log = evaluation, checkpoint, log
        self.unread: deque[tuple[int, dict, Batch]] = deque()
        self.metrics = log.metrics
        self.begun = self.saved = self.step
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the first batch

    def advance(self, batch: dict[str, Any]) -> None:
        """Have the device make a step."""
        shapes = {name: np.shape(x) for name, x in batch.items()}
        if not self._shapes:
            self._shapes = shapes
            self.log.compiling()
        pieces = self.gradients, self.optimizer, self.bad_steps, batch
        try:
            self.training, metrics = one_step(*pieces, self.training, self.trains)
        except Exception as error:
            if shapes != self._shapes:
                error.add_note(
                    f"Batch {self.step} has the shapes {shapes}, the first one {self._shapes}. If "
                    "the last batch of a loader is smaller, have it leave that out, or fill it up."
                )
            raise
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

    def report(self, interrupt: Interrupt) -> bool:
        """Evaluate, and call the callbacks; whether one of them wants to end the training.

        After a signal nothing more of it is begun: the run that goes on makes up for it.
        """
        if not self.evaluation.wanted or interrupt.asked is not None:
            return False
        model = self.optimizer.averaged(self.training.model, self.training.optimizer_state)
        if self.evaluation.batches is not None:
            try:
                self._evaluate(model, interrupt)
            except Stopped:
                self.log.tell(f"the evaluation after step {self.step} was not completed")
                return False
        answers = []
        callbacks = self.evaluation.callbacks
        if callbacks:  # may keep it, while the next step writes over the weights
            model = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, model)
            report = Report(self.step, dict(self.metrics), model)
            with interrupt.elsewhere():  # all are called, whatever the first says
                answers = [callback(report) for callback in callbacks]
        self.log.reported(self.step)
        return any(isinstance(x, bool | np.bool) and bool(x) for x in answers)

    def _evaluate(self, model: Any, interrupt: Interrupt) -> None:
        what = self.evaluation
        with interrupt.elsewhere():
            batches = interrupt.each(lambda: in_order(what.batches))
            value = evaluate(model, batches, loss=what.loss, count=what.count)
        self.log.write(self.step, {"eval_loss": value})
        self.log.say(f"step {self.step}: evaluation loss {value:.4f}")
        self.metrics["eval_loss"] = value

    def save(self) -> None:
        """Begin to save this step, unless that was done; it is written in the background."""
        failed = self._begin_to_save()
        if failed is not None:
            # To stop would lose the steps since the last checkpoint; the next may succeed.
            warn_and_go_on(f"a checkpoint is missing, training goes on: {failed}", 6)

    def finish(self) -> None:
        """Save this step, unless that was done, and wait until it is there."""
        if self.checkpoint is None:
            return
        failed = self._begin_to_save()  # of this one, or of the one before
        self.checkpoint.wait()
        if failed is None:
            return
        if self.step not in self.checkpoint.steps():
            raise failed
        warn_and_go_on(f"a checkpoint is missing: {failed}", 6)

    def _begin_to_save(self) -> OSError | None:
        if self.checkpoint is None:
            return None
        self.read(0)  # the log has the steps of a checkpoint
        if self.saved == self.step:
            return None
        try:
            self.log.sync()
            self.saved = self.step
            self.checkpoint.save(self.training, self.step)
        except OSError as error:
            return error
        return None

    def rescue(self, error: BaseException) -> None:
        """Save what was reached before an error, and hand it over as the error's `training`."""
        try:
            reached = self._mend()
        except Exception as second:
            error.add_note(f"What was reached is lost: {second}")
            return
        if not reached:
            return
        self.hand_over(error)
        if self.checkpoint is None or not isinstance(error, Exception | SystemExit):
            error.add_note(
                f"The state after step {self.step} is this error's `training`: catch the error, or "
                "look at sys.last_value.training in an interactive session."
            )
            return
        try:
            self.finish()
            error.add_note(f"Step {self.step} is saved in {self.checkpoint.directory}.")
        except Exception as second:
            error.add_note(f"What was reached could not be saved: {second}")

    def hand_over(self, error: BaseException) -> None:
        """Give an error the state as its attribute `training`."""
        with contextlib.suppress(AttributeError):
            error.training = self.training  # type: ignore[attr-defined]

    def _mend(self) -> bool:
        """Have a state from which a run can go on; False if there is no new one."""
        arrays = jax.tree.leaves(eqx.filter(self.training, eqx.is_array))
        if any(x.is_deleted() for x in arrays):
            if self.step == self.begun:
                return False
            raise RuntimeError("the step that failed had begun to write over it.")
        if int(self.training.step) == self.begun:
            return False
        with contextlib.suppress(ValueError):
            self.read(0)
        # Whoever goes on is where this run was: one more bad step is too many again.
        guard = self.training.guard
        in_a_row = jnp.minimum(guard.in_a_row, self.bad_steps.allowed)
        guard = guard._replace(failed=jnp.zeros_like(guard.failed), in_a_row=in_a_row)
        self.training = eqx.tree_at(lambda x: x.guard, self.training, guard)
        self.step = int(self.training.step)
        self.saved = self.begun  # it may have failed
        return True
