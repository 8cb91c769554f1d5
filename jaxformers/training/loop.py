"""The loop around the training step."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from jaxformers.checks import check_callable, check_positive, check_size
from jaxformers.optim import as_optimizer
from jaxformers.sharding.hosts import by_first_host
from jaxformers.sharding.mesh import as_auto, mesh_in
from jaxformers.sharding.spread import shard, shard_batch
from jaxformers.training.batches import Feed, in_order, on_device, prepared
from jaxformers.training.interrupt import Interrupt
from jaxformers.training.log import Log
from jaxformers.training.names import explain_arguments
from jaxformers.training.notices import warn_and_go_on, warn_of_separate_layers
from jaxformers.training.objectives import Batch, Loss, count_targets
from jaxformers.training.reports import Every, Report
from jaxformers.training.row_order import ordered
from jaxformers.training.run import Evaluation, Run
from jaxformers.training.step import BadSteps, Gradients, Training, begin

IN_FLIGHT = 1  # the number of steps that the device may be behind
NONE_BAD = BadSteps()


@explain_arguments
def fit(
    model: PyTree,
    optimizer: Any,
    batches: Any,
    *,
    loss: Loss,
    steps: int | None = None,
    epochs: int | float | None = None,
    key: PRNGKeyArray,
    eval_batches: Any = None,
    eval_loss: Loss | None = None,
    eval_every: int = 500,
    eval_weights: Callable[[Any, Any], Any] | None = None,
    checkpoint: Any = None,
    callbacks: Sequence[Callable[[Report], Any] | Every] = (),
    log: Any = None,
    progress: bool = True,
    bad_steps: BadSteps = NONE_BAD,
    compute_dtype: Any = None,
    accumulate: int = 1,
    count: Callable[[Batch], Any] = count_targets,
    mesh: Mesh | None = None,
) -> Training:
    """Trains a model from the beginning, or from the newest checkpoint of the same run.

    A run that was killed and is started again ends with the same weights and the same log as an
    uninterrupted run, bit for bit on a CPU. The step is one compiled program. While the device
    works on it, the next batch is fetched. The model that is passed in stays usable, because the
    run trains a copy.

    The trained weights are float32, also for a model in 16 bits, because rounding in 16 bits would
    lose most updates. `cast_floating(training.model, jnp.bfloat16)` gives 16 bits again. Frozen
    weights keep their type and are not copied; `compute_dtype=jnp.bfloat16` uses them as they are.

    Ctrl-C ends a run: the state is saved and returned. SIGTERM saves as well; then it ends the
    program with status 143, or your own handler runs. Both also work during an evaluation, a
    callback or a slow loader: a second thread saves at once, no other batch is fetched, and a
    loader that does not return within two seconds is left. If an evaluation was not completed, the
    next run makes it again, and the callbacks after it. A second Ctrl-C ends the run at once.

    On several hosts every host calls `fit` with the same arguments and a mesh of all devices (see
    `jaxformers.sharding.join_hosts`). A signal at one host then ends the run on all of them, after
    at most two more steps. An evaluation, a callback or a loader is finished first.

    Arguments:
        model: the model to train.
        optimizer: `AdamW` or another `Optimizer`, or an optax transformation.
        batches: dicts of arrays, one for each step. They come from a source of `jaxformers.data`,
            or any object with `batches[i]` for step `i`, or an iterable such as a list or a loader
            of Grain or torch. An iterable starts again at its end. It must be the same in each
            run, because a resumed run skips its first batches. On several hosts each gives the
            whole batch, or global arrays from `join_batch`.
        loss: function `(model, batch, key) -> scalar`, such as `language_model_loss`.
        steps: the number of steps in all, including those of earlier runs. Pass either this or
            `epochs`.
        epochs: how often the data comes in all, in place of `steps`, such as 3 or 0.5. The run has
            `epochs * len(batches)` steps, rounded to a whole number; `len` of a source of
            `jaxformers.data`, a list or a loader is the number of batches in an epoch.
        key: PRNG key; step `i` draws its dropout from `jax.random.fold_in(key, i)`.
        eval_batches: the data of the evaluation, a source of `jaxformers.data` or a list of
            batches. None, the default, evaluates nothing.
        eval_loss: the loss of the evaluation, computed in the type of the weights; None is `loss`.
            Its cross-entropy is evaluated as well.
        eval_every: the number of steps between evaluations and calls of the callbacks, default
            500. Both also come at the end.
        eval_weights: function `(weights, optimizer_state) -> weights`. The weights that it returns
            are evaluated and given to the callbacks in place of the trained ones. Weights are the
            model with only its floating-point arrays. None is `optimizer.averaged`, the average if
            the optimizer keeps one. For schedule-free optimizers of optax it is
            `lambda weights, state: optax.contrib.schedule_free_eval_params(state, weights)`.
        checkpoint: where to save and resume, `Checkpoints(directory, every=500)` or
            `OrbaxCheckpoints`. None, the default, does neither.
        callbacks: functions that are called with a `Report` after each evaluation. One in `Every`,
            such as `Every(10, function)`, is called every ten steps with figures and without a
            model. The training ends early if one returns True. Their own state is not resumed;
            `KeepBest` keeps its state in its file.
        log: the directory of `metrics.jsonl`, which has a line for each step, and of TensorBoard's
            events if that package is installed. None is the directory of the checkpoints, if there
            is one. Existing lines of steps that are made again are replaced. Without a checkpoint
            these are all lines. Of several hosts the first one writes it.
        progress: whether to show a progress bar on standard error, if tqdm is installed.
        bad_steps: the rule for bad steps and how many of them are skipped. By default, the first
            step whose loss or gradients are not finite ends the training with an error.
        compute_dtype, accumulate, count: as for `train_step`; None computes in float32 where the
            trained weights are float32.
        mesh: devices over which the model and the batches are spread, `make_mesh(fsdp=8)` of
            `jaxformers.sharding`. A model that `shard` has spread over this mesh stays as it is.
            None, the default, leaves model and batches where they are. A checkpoint of another
            mesh is continued on this one.

    A resumed run must have the same shapes of weights, kind of optimizer and key as its checkpoint.
    Other settings, such as the data and the learning rate, may change. They apply from there on.

    Returns:
        The state at the end: `model`, `optimizer_state`, `step`, `skipped`, `key`. If the optimizer
        keeps an average of the weights, `optimizer.averaged(model, optimizer_state)` returns it.

    Raises:
        ValueError: if arguments do not fit together, ids are not in the vocabulary, more steps in a
            row are bad than allowed, or the checkpoint is of another run.
        OSError: if the last state cannot be saved. An earlier failure to save is a warning.

    An error of a loader, a callback or the run does not lose the trained state. It is saved if
    there is a checkpoint and a single host, and it is the attribute `training` of the error. If an
    iterator of batches ends before `steps`, the run ends with a warning and without an error.

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
    check_size(eval_every=eval_every)
    steps = _steps(batches, steps, epochs)
    _check_pieces(callbacks, eval_weights, bad_steps, checkpoint, eval_batches)
    optimizer = as_optimizer(optimizer)
    gradients = Gradients(loss, compute_dtype, accumulate, count)
    eval_loss = loss if eval_loss is None else eval_loss
    _check_first(eval_batches, eval_loss, model)
    if mesh is not None:
        warn_of_separate_layers(model, mesh)
        model = model if mesh_in(model) == as_auto(mesh) else shard(model, mesh)
    training = _resume(begin(model, optimizer, bad_steps, key), checkpoint)
    del model  # its memory is free if the caller does not hold it either
    done = int(training.step)
    evaluation = Evaluation(eval_batches, eval_loss, count, callbacks, eval_weights)
    due = evaluation.wanted and done > 0 and (done == steps or done % eval_every == 0)
    with Log(_log(log, checkpoint), done, steps, progress, due) as writer:
        run = Run(training, gradients, optimizer, bad_steps, evaluation, checkpoint, writer)
        del training
        if done:
            writer.tell(_progress_of(checkpoint, done, steps))

        def put(arrays: dict[str, Any]) -> dict[str, Any]:
            if mesh is None:
                return on_device(arrays)
            return shard_batch(ordered(arrays, loss, count, run.training.model, mesh), mesh)

        with Interrupt(_saver(run)) as interrupt:
            feed = Feed(
                batches,
                done,
                lambda batch, name: prepared(batch, name, loss, run.training.model, put),
                interrupt.fetch,
            )
            try:
                _loop(run, feed, steps, eval_every, interrupt)
            except BaseException as error:
                run.rescue(error)
                raise
            finally:
                feed.close()
        if interrupt.asked is not None and run.step < steps:
            writer.warn(f"{interrupt.asked.name}: stopped after step {run.step} of {steps}")
        elif feed.ended:
            warn_and_go_on(f"training ends after {run.step} steps: there are no more batches.", 4)
    try:
        interrupt.pass_on()
    except BaseException as end:
        run.hand_over(end)
        raise
    return run.training


def _loop(run: Run, feed: Feed, steps: int, eval_every: int, interrupt: Interrupt) -> None:
    """Makes the remaining steps, with the evaluations and checkpoints between them."""
    save_every = steps if run.checkpoint is None else run.checkpoint.every

    def advance_feed() -> bool:
        with interrupt.foreign_code():
            return run.step < steps and feed.advance()

    # The run before may have ended before the evaluation that follows its last step.
    more = not (by_first_host(run.log.due) and run.report(interrupt)) and advance_feed()
    while more:
        run.advance(feed.batch)
        interrupt.agree()
        more = advance_feed()  # while the device works
        report = run.step == steps or feed.ended or run.step % eval_every == 0
        save = not more or run.step % save_every == 0
        if run.tell(0 if report or save else IN_FLIGHT, interrupt):
            more, report, save = False, True, True
            run.tell(0, interrupt)
        if save:
            run.save()  # before the evaluation, which may take long
        if report and run.report(interrupt):
            more = False
        more = more and interrupt.asked is None
    run.finish()
    # A signal that one of several hosts got since the last step: told here, and read here.
    interrupt.agree()
    interrupt.agree()


def _steps(batches: Any, steps: int | None, epochs: int | float | None) -> int:
    """Returns the number of steps, of which `epochs` may be given in place."""
    if steps is not None and epochs is None:
        check_size(steps=steps)
        return steps
    if epochs is None or steps is not None:
        raise ValueError(
            "fit needs either steps or epochs, the length of the training, got "
            f"{'neither' if steps is None else f'steps={steps!r} and epochs={epochs!r}'}. Pass one "
            "of them."
        )
    check_positive(epochs=epochs)
    try:
        size = len(batches)
    except TypeError:
        raise ValueError(
            "epochs needs batches with a length, the number of batches in an epoch, and a "
            f"{type(batches).__name__} has none. Pass steps=, or a source of jaxformers.data, a "
            "list, or an object that defines __len__."
        ) from None
    return max(1, round(epochs * size))


def _progress_of(checkpoint: Any, done: int, steps: int) -> str:
    what = "going on" if done < steps else f"nothing is left of {steps} steps to make"
    return f"{what}: {checkpoint.directory} is at step {done}"


def _saver(run: Run) -> Callable[[], None]:
    """Returns the function that saves a run after a signal. Hosts cannot save independently."""
    return run.save if jax.process_count() == 1 else lambda: None


def _resume(training: Training, checkpoint: Any) -> Training:
    """Returns the state of the newest checkpoint, or the given state if there is none."""
    if checkpoint is None or not checkpoint.steps():
        return training
    key = jax.random.key_data(training.key).tolist()
    like = jax.tree.map(_outline, training)
    del training  # otherwise two states would be in memory
    found, _ = checkpoint.restore(like)
    begun = jax.random.key_data(found.key).tolist()
    if key != begun:
        raise ValueError(
            f"the run in {checkpoint.directory} was begun with another key, {begun}, got {key}. "
            "Pass that key, or another directory."
        )
    return found


def _outline(x: Any) -> Any:
    """Returns the shape of an array. Scalars, which may be keys or weakly typed, stay arrays."""
    if not isinstance(x, jax.Array) or x.ndim == 0:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


def _log(log: Any, checkpoint: Any) -> Any:
    """Returns the directory of the log."""
    if log is not None or checkpoint is None:
        return log
    if "://" in os.fspath(checkpoint.directory):
        raise ValueError(
            f"the log needs a local directory, and {checkpoint.directory} is none: pass log=."
        )
    return checkpoint.directory


def _check_pieces(
    callbacks: Any, eval_weights: Any, bad_steps: Any, checkpoint: Any, eval_batches: Any
) -> None:
    if not isinstance(callbacks, Sequence):
        raise ValueError(f"callbacks must be a list of functions, got {callbacks!r}. Pass [it].")
    check_callable(**{f"callbacks[{i}]": callback for i, callback in enumerate(callbacks)})
    if eval_weights is not None:
        check_callable(eval_weights=eval_weights)
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


def _check_first(eval_batches: Any, loss: Loss, model: Any) -> None:
    """Checks the first batch to evaluate on, so that an error comes before the first step."""
    if eval_batches is not None:
        first = next(in_order(eval_batches), None)
        if first is None:
            raise ValueError("eval_batches must not be empty. Pass at least one batch, or None.")
        prepared(first, "the first of eval_batches", loss, model)
