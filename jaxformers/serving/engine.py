"""The decoding engine: one thread in which all requests share the steps of one batch of rows.

A request takes a free row while others go on. Its prompt is read in chunks between their steps, and
a row that ends is free at once. Where only one row is in use, it takes steps of its own, which are
shorter than those of a batch.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxformers.checks import check_size, check_usable
from jaxformers.generation.generate import failure
from jaxformers.output import check_output
from jaxformers.serving.batch import Batch
from jaxformers.serving.job import Closed, Job, QueueFull, Token
from jaxformers.serving.job_checks import check_job
from jaxformers.serving.rows import Chosen, read_rules

LOG = logging.getLogger(__name__)
# The most tokens of a row, where neither the model nor the user sets a limit.
LONGEST = 4096
# Prompts are read in chunks of these sizes, which are those that programs are compiled for. Between
# two steps of the other rows no more than the largest is read.
CHUNKS = 256, 32


class Place(NamedTuple):
    """A row of the batch.

    Arguments:
        job: the `Job` that it belongs to; None if it is free.
        tokens: the prompt and the new tokens.
        last_used: when it became free.
        copied: the most tokens that the row had which its first ones were copied from.
    """

    job: Any = None
    tokens: list[int] = []
    last_used: float = 0.0
    copied: int = 0

    @property
    def memory(self) -> list[int]:
        """The tokens in the row's cache, which lacks the last one of a row in use."""
        return self.tokens if self.job is None else self.tokens[:-1]

    @property
    def longest(self) -> int:
        """The most tokens that the row's cache has had, by which layers with windows forget."""
        return max(self.copied, len(self.tokens))


class Reading(NamedTuple):
    """A job whose prompt is being read.

    Arguments:
        job: whose it is.
        place: the number of the row that it gets.
        read: how many tokens of the prompt are in it.
        copied: as of `Place`.
    """

    job: Job
    place: int
    read: int = 0
    copied: int = 0


class Engine:
    """Decodes for many requests at a time; see the beginning of this file.

    Arguments:
        model: a `TransformerLM` or a `Transformer`.
        rows: the most requests that are decoded at a time, 8.
        context: the most tokens of a row, its prompt and new ones together; None is the model's
            limit, but at most `LONGEST`.
        waiting: the most jobs that wait for a row, 64.

    Raises:
        ValueError: if a number is not at least 1, or the context is beyond the model's limit.

    Example:
        >>> from jaxformers.serving.job import Job, Sampling
        >>> class Printed(Job):
        ...     def receive(self, token):
        ...         ids.append(token.id)
        ...         return True
        >>> ids, engine = [], Engine(model, rows=2, context=32)
        >>> engine.start()
        >>> engine.submit([Printed([5, 7], 3, Sampling(temperature=0.0))])
        >>> engine.close()  # once all have ended
        >>> ids == model.generate(jnp.array([5, 7]), 3)[2:].tolist()
        True
    """

    def __init__(self, model: Any, rows: int = 8, context: int | None = None, waiting: int = 64):
        check_usable(model=model)
        check_output(model)
        check_size(rows=rows, waiting=waiting)
        limit = model.max_seq_length
        if context is None:
            context = LONGEST if limit is None else min(limit, LONGEST)
        check_size(context=context)
        if context < 2 or (limit is not None and context > limit):
            most = "" if limit is None else f" and at most the {limit} positions of the model"
            raise ValueError(
                f"context must be at least 2, a token and a new one,{most}, got {context}."
            )
        self.context, self.waiting = context, waiting
        self.vocab_size: int = model.vocab_size
        self._batch = Batch(model, rows, context)
        self._places = [Place() for _ in range(rows)]
        self._queue: deque[Job] = deque()
        self._reading: Any = None
        self._change = threading.Condition()
        self._is_closed = self._gives_up = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def warm_up(self, longest: int = 512) -> None:
        """Compiles programs; before `start`.

        Arguments:
            longest: rows of up to so many tokens compile nothing afterwards, 512. A longer one
                compiles when it comes, for which all others wait.
        """
        check_size(warm_up=longest)
        self._batch.warm_up(CHUNKS, min(longest, self.context))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes some jobs, all or none.

        Raises:
            QueueFull: if more would wait than may.
            Closed: after `close`.
            ValueError: if a job has no prompt, tokens that the model does not have, or is longer
                than the context.
        """
        for job in jobs:
            check_job(job, self._batch.model, self.context)
        with self._change:
            if self._is_closed:
                raise Closed("the engine takes no more jobs.")
            free = sum(place.job is None for place in self._places) - (self._reading is not None)
            if len(self._queue) + len(jobs) > self.waiting + max(free, 0):
                raise QueueFull(f"{len(self._queue)} jobs wait, of at most {self.waiting}.")
            self._queue.extend(jobs)
            self._change.notify_all()

    def counts(self) -> dict[str, int]:
        """Returns the number of rows, of those in use and of the jobs that wait."""
        busy = sum(place.job is not None for place in self._places)
        busy += self._reading is not None
        return {"rows": len(self._places), "busy": busy, "waiting": len(self._queue)}

    def close(self, at_once: bool = False) -> None:
        """Takes no more jobs, and returns when those that it has taken have ended.

        Arguments:
            at_once: whether they are given up.
        """
        with self._change:
            self._is_closed, self._gives_up = True, self._gives_up or at_once
            if at_once:
                running = [place.job for place in self._places]
                reading = None if self._reading is None else self._reading.job
                for job in [*self._queue, *running, reading]:
                    if job is not None:
                        job.cancel()
            self._change.notify_all()
        if self._thread.ident is None:
            self.start()
        self._thread.join()

    def _run(self) -> None:
        """Takes turns as long as there is something to do, then waits."""
        while True:
            with self._change:
                while not (self._queue or self._reading or self._active()):
                    if self._is_closed:
                        return
                    self._change.wait()
            try:
                self._turn()
            except Exception as error:  # such as a full memory; the other requests have to go on
                LOG.exception("A step of decoding failed.")
                self._fail(error)

    def _turn(self) -> None:
        """Reads a part of the prompts that wait, and takes one step with all rows in use."""
        budget = CHUNKS[0]
        while budget > 0 and self._has_prompt():
            budget -= self._read()
        bias = {}
        for i in self._active():
            place = self._places[i]
            try:
                bias[i] = self._bias(place.job, place.tokens[len(place.job.prompt) :])
            except Exception as error:  # of a grammar
                self._end(i, error)
        if bias:
            self._batch.fit(1 + max(len(self._places[i].tokens) for i in bias))
            chosen = self._batch.step([*bias], _stack([*bias.values()]))
            for row, i in enumerate(bias):
                self._deliver(i, chosen, row)

    def _active(self) -> list[int]:
        """Returns the numbers of the rows in use."""
        return [i for i, place in enumerate(self._places) if place.job is not None]

    def _drop_cancelled(self) -> None:
        """Ends the jobs that were given up."""
        for i in self._active():
            if self._places[i].job.is_cancelled:
                self._end(i)
        if self._reading is not None and self._reading.job.is_cancelled:
            job, self._reading = self._reading.job, None
            self._batch.give_up()
            _tell_end(job)
        with self._change:
            dropped = [job for job in self._queue if job.is_cancelled]
            self._queue = deque(job for job in self._queue if not job.is_cancelled)
        for job in dropped:
            _tell_end(job)

    def _has_prompt(self) -> bool:
        """Returns whether there is a prompt to read, for which it takes a job out of the queue."""
        self._drop_cancelled()
        if self._reading is not None:
            return True
        free = [i for i, place in enumerate(self._places) if place.job is None]
        if not free:
            return False
        with self._change:
            if not self._queue:
                return False
            place = min(free, key=lambda i: self._places[i].last_used)
            self._reading = Reading(self._queue.popleft(), place)
        self._open(self._reading.job)
        return True

    def _open(self, job: Job) -> None:
        """Begins to read a prompt; what any row has read of it already is copied."""
        lengths = [len(self._places[i].tokens) for i in self._active()]
        source = 1 if job.source is None else len(job.source)
        self._batch.fit(1 + max(*lengths, len(job.prompt), 1), source, shrink=True)
        for i, x in enumerate(self._places):
            if x.job is None:
                self._places[i] = x._replace(tokens=self._batch.kept(x.tokens, x.longest))
        counts = [self._batch.reusable(x.memory, x.longest, job.prompt) for x in self._places]
        best = max(range(len(counts)), key=counts.__getitem__)
        self._batch.open(job.source, best, counts[best])
        copied = self._places[best].longest if counts[best] else 0
        self._reading = self._reading._replace(read=counts[best], copied=copied)

    def _read(self) -> int:
        """Reads a chunk of the prompt, and begins the row with the last; returns its size."""
        job, place, read, copied = self._reading
        rest = job.prompt[read:]
        # Filling is read as well, so that a large chunk has to be full for the most part.
        size = next((x for x in CHUNKS if 3 * x <= 4 * len(rest)), CHUNKS[-1])
        hidden = self._batch.read(rest[:size], size, len(job.prompt))
        self._reading = self._reading._replace(read=read + len(rest[:size]))
        if len(rest) <= size:
            self._reading = None
            self._begin(job, place, copied, hidden)
        return size

    def _begin(self, job: Job, place: int, copied: int, hidden: Any) -> None:
        """Puts a job whose prompt has been read into its row, and gives it its first token."""
        try:
            rules, bias = read_rules(job.sampling), self._bias(job, ())
        except Exception as error:  # such as a seed that is too large
            self._batch.give_up()
            _tell_end(job, error)
            return
        self._places[place] = Place(job, list(job.prompt), copied=copied)
        if self._gives_up:  # `close` may have looked for the job while it was in neither place
            job.cancel()
        chosen = self._batch.begin(place, hidden, job.prompt, rules, _stack([bias]))
        self._deliver(place, chosen, 0)

    def _bias(self, job: Job, new: Sequence[int]) -> Float[np.ndarray, " v"] | None:
        """Returns what is added to the logits of a job after its new tokens; None is nothing."""
        if job.follower is None and not job.sampling.logit_bias:
            return None
        bias = np.zeros(self.vocab_size, np.float32)
        for token, number in job.sampling.logit_bias.items():
            bias[token] = number
        if job.follower is not None:
            bias[~job.follower.legal(tuple(new))] = -np.inf
        return bias

    def _deliver(self, i: int, chosen: Chosen, row: int) -> None:
        """Gives a job its next token, and ends it if that was the last."""
        place = self._places[i]
        job = place.job
        try:
            if chosen.failed[row]:
                raise failure(int(chosen.failed[row]))
            ids, log_probs = chosen.top_tokens[row], chosen.top_log_probs[row]
            top = [*zip(ids.tolist(), log_probs.tolist(), strict=True)][: job.sampling.top]
            token = Token(int(chosen.tokens[row]), float(chosen.log_probs[row]), top)
            place.tokens.append(token.id)
            new = len(place.tokens) - len(job.prompt)
            goes_on = job.receive(token) and new < job.max_new_tokens and not job.is_cancelled
        except Exception as error:
            self._end(i, error)
            return
        if not goes_on:
            self._end(i)

    def _end(self, i: int, error: BaseException | None = None) -> None:
        """Frees a row, and tells its job."""
        place = self._places[i]
        self._places[i] = Place(None, place.memory, time.monotonic(), place.longest)
        _tell_end(place.job, error)

    def _fail(self, error: BaseException) -> None:
        """Ends all jobs that have begun, whose memory is lost."""
        jobs = [place.job for place in self._places if place.job is not None]
        if self._reading is not None:
            jobs.append(self._reading.job)
        self._reading, self._places = None, [Place() for _ in self._places]
        self._batch.clear()
        for job in jobs:
            _tell_end(job, error)


def _tell_end(job: Job, error: BaseException | None = None) -> None:
    """Tells a job that no more tokens come."""
    try:
        job.end(error)
    except Exception:  # the other jobs have to go on
        LOG.exception("A job failed at its end.")


def _stack(rows: list[Float[np.ndarray, " v"] | None]) -> Float[np.ndarray, "r v"] | None:
    """Returns what is added to the logits of some rows; None is nothing."""
    known = [x for x in rows if x is not None]
    if not known:
        return None
    return np.stack([np.zeros_like(known[0]) if x is None else x for x in rows])
