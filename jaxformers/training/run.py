"""The state of a run, with its steps, evaluations and checkpoints."""

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
from jaxformers.training.objectives import Batch, Loss, check_ids, is_regularized
from jaxformers.training.reports import Every, Figures, Report
from jaxformers.training.step import BadSteps, Gradients, Training, one_step, trained_parts


@dataclass(frozen=True)
class Evaluation:
    """The evaluation and the callbacks, which run between steps."""

    batches: Any
    loss: Loss
    count: Callable[[Batch], Any]
    callbacks: Sequence[Callable[[Any], Any]]
    weights: Callable[[Any, Any], Any] | None = None

    @property
    def wanted(self) -> bool:
        """Whether there are batches to evaluate on, or callbacks that get the model."""
        return self.batches is not None or self.needs_model

    @property
    def needs_model(self) -> bool:
        """Whether there are callbacks that get the model."""
        return any(not isinstance(x, Every) for x in self.callbacks)

    def due(self, step: int) -> list[Every]:
        """Returns the callbacks that get the figures of a step."""
        return [x for x in self.callbacks if isinstance(x, Every) and step % x.steps == 0]


class Run:
    """The state of a run and the parts that work on it."""

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
        self.trains = trained_parts(training.model, optimizer)
        self.evaluation, self.checkpoint, self.log = evaluation, checkpoint, log
        self.unread: deque[tuple[int, dict, Batch]] = deque()
        self.untold: deque[Figures] = deque()  # read, and not yet given to the callbacks
        self.metrics = log.metrics
        self.begun = self.saved = self.step
        self._failed: OSError | None = None  # the error of the last attempt to save
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the first batch

    def advance(self, batch: dict[str, Any]) -> None:
        """Starts a step on the device."""
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
                    "the last batch of a loader is smaller, drop it (drop_last=True) or pad it."
                )
            raise
        self.step += 1
        self.unread.append((self.step, metrics, batch))

    def read(self, in_flight: int) -> None:
        """Writes the figures of all steps but the last `in_flight`, which may still be running."""
        while len(self.unread) > in_flight:
            step, metrics, batch = self.unread.popleft()
            metrics = jax.device_get(metrics)
            order = ("loss", *(name for name in metrics if name != "loss"))
            self.metrics = {name: metrics[name].item() for name in order}
            if self.metrics.pop("failed"):
                self.unread.clear()
                # Ids on an accelerator are checked only now.
                check_ids(self.gradients.loss, self.training.model, batch, wait=True)
                raise ValueError(
                    f"step {step} is bad: its loss is {self.metrics['loss']}, the norm of its "
                    f"gradients {self.metrics['gradient_norm']}. It changed no weights. Look at "
                    "the batch and the learning rate, or have such steps skipped: "
                    "bad_steps=BadSteps(allowed=10)."
                )
            self.log.write(step, self.metrics)
            if self.evaluation.due(step):
                self.untold.append(Figures(step, dict(self.metrics), self.begun))

    def tell(self, in_flight: int, interrupt: Interrupt) -> bool:
        """Reads the figures of steps, as `read`, and calls the callbacks in `Every` with them.

        Returns whether one of them ends the training. A second thread may read, but not call.
        """
        self.read(in_flight)
        answers = []
        while self.untold:
            with interrupt.foreign_code():
                answers += self._tell_next()
        return _ends(answers)

    def _tell_next(self) -> list[Any]:
        """Calls the callbacks in `Every` with the first untold figures, and returns their answers.

        A callback that raises is not called with these figures again.
        """
        figures = self.untold.popleft()
        return [callback(figures) for callback in self.evaluation.due(figures.step)]

    def report(self, interrupt: Interrupt) -> bool:
        """Evaluates and calls the callbacks. Returns whether one of them ends the training.

        A signal stops both early. The next run of the checkpoint then makes them completely.
        """
        if not self.evaluation.wanted or interrupt.asked is not None:
            return False
        model = self._evaluated_model()
        if self.evaluation.batches is not None:
            try:
                self._evaluate(model, interrupt)
            except Stopped:
                self.log.tell(f"the evaluation after step {self.step} was not completed")
                return False
        figures: Any = Figures(self.step, dict(self.metrics), self.begun)
        report: Any = None
        if self.evaluation.needs_model:
            # A callback may keep the model, and the next step overwrites the weights.
            report = Report(self.step, dict(self.metrics), self._copy(model), self.begun)
        callbacks = self.evaluation.callbacks
        if self.evaluation.batches is None:  # then those in `Every` have these figures already
            callbacks = [x for x in callbacks if not isinstance(x, Every)]
        with interrupt.foreign_code():  # all are called, even if the first returns True
            answers = [x(figures if isinstance(x, Every) else report) for x in callbacks]
        self.log.reported(self.step)
        return _ends(answers)

    def _evaluated_model(self) -> Any:
        model, state = self.training.model, self.training.optimizer_state
        if self.evaluation.weights is None:
            return self.optimizer.averaged(model, state)
        trained, rest = eqx.partition(model, eqx.is_inexact_array)
        weights = self.evaluation.weights(trained, state)
        given: Any = jax.tree.structure(trained)
        got: Any = jax.tree.structure(weights)
        if given != got:
            raise ValueError(
                "eval_weights must return weights of the form that it is given, which is the model "
                f"with only its floating-point arrays: expected {given}, got {got}."
            )
        return eqx.combine(weights, rest)

    def _copy(self, model: Any) -> Any:
        """Returns a copy of the arrays that steps overwrite, beside the others."""
        trained, rest = (model, None) if self.trains is None else eqx.partition(model, self.trains)
        copy = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, trained)
        return copy if rest is None else eqx.combine(copy, rest)

    def _evaluate(self, model: Any, interrupt: Interrupt) -> None:
        what = self.evaluation
        with interrupt.foreign_code():
            batches = interrupt.each(lambda: in_order(what.batches))
            value = evaluate(model, batches, loss=what.loss, count=what.count)
        found, text = {"eval_loss": float(value)}, f"step {self.step}: evaluation loss {value:.4f}"
        if value.cross_entropy is not None and is_regularized(what.loss):
            found["eval_cross_entropy"] = value.cross_entropy
            text += f", cross-entropy {value.cross_entropy:.4f}"
        self.log.write(self.step, found)
        self.log.say(text)
        self.metrics |= found

    def save(self) -> None:
        """Starts to save the state, unless it is saved. It is written in the background."""
        failed = self._begin_to_save()
        if failed is not None:
            # Stopping would lose the steps since the last checkpoint. The next save may succeed.
            warn_and_go_on(f"a checkpoint is missing, training goes on: {failed}", 6)

    def finish(self) -> None:
        """Saves the state, unless it is saved, and waits until it is written."""
        if self.checkpoint is None:
            return
        new = self._begin_to_save()
        self.checkpoint.wait()
        failed = self._failed if new is None else new  # of this attempt, or of the one before
        if failed is not None and self.step not in self.checkpoint.steps():
            raise failed
        if new is not None:
            warn_and_go_on(f"a checkpoint is missing: {failed}", 6)

    def _begin_to_save(self) -> OSError | None:
        if self.checkpoint is None:
            return None
        self.read(0)  # the log must have every step that a checkpoint has
        if self.saved == self.step:
            return None
        self._failed = None
        try:
            self.log.sync()
            self.saved = self.step
            self.checkpoint.save(self.training, self.step)
        except OSError as error:
            self._failed = error
        return self._failed

    def rescue(self, error: BaseException) -> None:
        """Saves the state before an error, and sets it as the attribute `training` of the error."""
        try:
            reached = self._mend()
        except Exception as second:
            error.add_note(f"The state of the training is lost: {second}")
            return
        if not reached:
            return
        self.hand_over(error)
        self._tell_rest(error)
        if jax.process_count() > 1:  # the others may not have the error, and would not save
            return
        if self.checkpoint is None or not isinstance(error, Exception | SystemExit):
            error.add_note(
                f"The state after step {self.step} is the attribute `training` of this error. "
                "Catch the error, or read sys.last_value.training in an interactive session."
            )
            return
        try:
            self.finish()
            error.add_note(f"Step {self.step} is saved in {self.checkpoint.directory}.")
        except Exception as second:
            error.add_note(f"The state after step {self.step} could not be saved: {second}")

    def hand_over(self, error: BaseException) -> None:
        """Sets the state as the attribute `training` of an error."""
        with contextlib.suppress(AttributeError):
            error.training = self.training  # type: ignore[attr-defined]

    def _tell_rest(self, error: BaseException) -> None:
        """Calls the callbacks in `Every` for the last steps, which no resumed run repeats."""
        try:
            while self.untold and isinstance(error, Exception):
                self._tell_next()
        except Exception as second:
            error.add_note(f"A callback failed then, too: {second!r}")

    def _mend(self) -> bool:
        """Makes the state one that can be resumed. Returns False if no step was made."""
        arrays = jax.tree.leaves(eqx.filter(self.training, eqx.is_array))
        if any(x.is_deleted() for x in arrays):
            if self.step == self.begun:
                return False
            raise RuntimeError("the step that failed had begun to overwrite it.")
        if int(self.training.step) == self.begun:
            return False
        with contextlib.suppress(ValueError):
            self.read(0)
        # The resumed run has the same count of bad steps, so one more bad step ends it again.
        guard = self.training.guard
        in_a_row = jnp.minimum(guard.in_a_row, self.bad_steps.allowed)
        guard = guard._replace(failed=jnp.zeros_like(guard.failed), in_a_row=in_a_row)
        self.training = eqx.tree_at(lambda x: x.guard, self.training, guard)
        self.step = int(self.training.step)
        self.saved = self.begun  # saving may have failed
        return True


def _ends(answers: Sequence[Any]) -> bool:
    """Returns whether one of the answers of callbacks ends the training."""
    # A comparison of arrays gives an array. An answer that is no truth value means nothing.
    return any(x is True or getattr(x, "dtype", None) == np.bool and bool(x) for x in answers)
