"""The reports that `fit` gives to callbacks, and the callbacks that are called between evaluations.

A callback in the list of `fit` is called after each evaluation. It gets the model, which is copied
for it. `Every` wraps a callback that needs only figures: it is called more often and costs no copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never

from jaxformers.checks import check_callable, check_size


@dataclass(frozen=True)
class Report:
    """The argument of the callbacks of `fit`.

    Arguments:
        step: the number of steps made.
        metrics: the figures of the last step (`loss`, `gradient_norm`, `learning_rate`, `tokens`,
            `skipped`), and `eval_loss` if there are batches to evaluate on. If that loss includes
            label smoothing or z-loss, `eval_cross_entropy` is the loss without them.
        model: a copy of the model with the weights that are evaluated, an average if the optimizer
            keeps one. It stays usable after the callback.
        begun: the step at which the run goes on in this process, 0 if it was begun here.
    """

    step: int
    metrics: dict[str, float]
    model: Any
    begun: int = 0


@dataclass(frozen=True)
class Figures:
    """The argument of the callbacks in `Every`: a `Report` without a model.

    Arguments:
        step: the number of the step, from 1 on.
        metrics: the figures of this step, as in a `Report`. After an evaluation they include its
            figures.
        begun: the step at which the run goes on in this process, 0 if it was begun here.
    """

    step: int
    metrics: dict[str, float]
    begun: int = 0

    @property
    def model(self) -> Never:
        """Raises an error, because a later step may have overwritten the weights of this one."""
        raise AttributeError(
            "a callback in Every(...) gets figures and no model. Pass the callback itself in "
            "callbacks=[...]: it is called after each evaluation, with a copy of the model."
        )


class Every:
    """A callback of `fit` that is called every `steps` steps, with figures and without a model.

    It is called with the figures of each step whose number is a multiple of `steps`, and once more
    after each evaluation, with its `eval_loss` too. The training does not wait for the figures:
    they are read when the device has computed them, while it works on the next step. Nothing is
    copied.

    A resumed run goes on with the step after its checkpoint. Steps that were lost with a killed run
    are made again, and so are their calls.

    Arguments:
        steps: the number of steps between two calls.
        callback: function that is called with `Figures`: `step`, `metrics`, `begun`. The training
            ends if it returns True, after at most one more step.

    Raises:
        ValueError: if `steps` is not a whole number above 0, the callback is no function or is an
            `Every` itself.

    Example:
        >>> seen = []
        >>> training = fit(
        ...     model,
        ...     AdamW(1e-3),
        ...     [batch],
        ...     loss=language_model_loss,
        ...     steps=5,
        ...     key=key,
        ...     callbacks=[Every(2, lambda figures: seen.append(figures.step))],
        ...     progress=False,
        ... )
        >>> seen
        [2, 4]
    """

    def __init__(self, steps: int, callback: Callable[[Figures], Any]):
        check_size(steps=steps)
        check_callable(callback=callback)
        if isinstance(callback, Every):
            raise ValueError("callback must be a function of figures, got an Every(...) again.")
        self.steps, self.callback = steps, callback

    def __call__(self, figures: Figures) -> Any:
        return self.callback(figures)
