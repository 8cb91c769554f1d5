"""The decoding engine: rows that begin and end while others go on, against `generate`."""

import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    DynamicScaling,
    LongScaling,
    RotaryPositionalEncoding,
    Transformer,
    TransformerLM,
    scan_layers,
)
from jaxformers.serving import batch, engine
from jaxformers.serving.engine import Engine
from jaxformers.serving.job import Closed, Job, QueueFull, Sampling
from jaxformers.serving.rows import read_rules

V, D, N, D_FF, MAX = 37, 24, 4, 40, 60
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Rows grow and prompts are read in parts also where they are short."""
    monkeypatch.setattr(batch, "SLOTS", 16)
    monkeypatch.setattr(batch, "SOURCE_SLOTS", 8)
    monkeypatch.setattr(engine, "CHUNKS", (8, 4))


class Recorded(Job):
    """A job that keeps what it hears; it ends itself after `stop_after` tokens."""

    def __init__(self, *args, stop_after=10**9, at_token=lambda job: None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ids, self.log_probs, self.tops, self.ends = [], [], [], []
        self.stop_after, self.at_token = stop_after, at_token
        self.done = threading.Event()

    def receive(self, token):
        assert not self.ends
        self.ids.append(token.id)
        self.log_probs.append(token.log_prob)
        self.tops.append(token.top)
        self.at_token(self)
        return len(self.ids) < self.stop_after

    def end(self, error=None):
        self.ends.append(error)
        self.done.set()


def run(engine, jobs):
    """Submits jobs to a new engine, and returns them when all have ended."""
    engine.submit(jobs)
    engine.start()
    engine.close()
    assert all(len(job.ends) == 1 for job in jobs)
    assert engine.counts()["busy"] == engine.counts()["waiting"] == 0
    return jobs


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).tolist() for n in lengths]


def make_lm(num_layers=2, **pieces):
    sizes = {"d_model": D, "num_heads": N, "d_ff": D_FF, "max_seq_length": MAX} | pieces
    model = TransformerLM(V, num_layers=num_layers, **sizes, key=jax.random.key(0))
    # Larger weights than those of a fresh model, so that it does not just repeat a token.
    return jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, model)


@pytest.fixture(scope="module")
def model():
    return make_lm(num_kv_heads=2, position=RotaryPositionalEncoding())


def new_tokens(model, given, new, **options):
    """The first `new` tokens of `generate` after some prompts, in one call."""
    real = [len(x) for x in given]
    out = np.asarray(model.generate(given, new, **options))
    assert out.shape == (len(given), max(real) + new)
    return out[:, -new:].tolist()


MODELS = {
    "learned": {"learnable_pos": True},
    "alibi, window": {"position": ALiBi(), "window": 3},
    "long": {
        "position": RotaryPositionalEncoding(
            scaling=LongScaling([1.0, 1.0, 2.0], [1.0, 4.0, 9.0], 12, 1.1)
        )
    },
    "dynamic": {"position": RotaryPositionalEncoding(scaling=DynamicScaling(4.0, 12))},
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_any_length_come_and_go_as_if_each_were_alone(name):
    model = make_lm(**MODELS[name])
    lengths, new = [11, 3, 1, 14, 5, 20, 8], [4, 9, 1, 11, 5, 2, 12]
    given = prompts(lengths)
    jobs = [Recorded(p, n, GREEDY) for p, n in zip(given, new, strict=True)]
    run(Engine(model, rows=3), jobs)
    for job, expected, n in zip(jobs, new_tokens(model, given, max(new)), new, strict=True):
        assert job.ends == [None]
        assert job.ids == expected[:n]


def test_scanned_layers_give_the_same(model):
    given = prompts([5, 9, 2])
    jobs = run(Engine(scan_layers(model), rows=2), [Recorded(p, 6, GREEDY) for p in given])
    assert [job.ids for job in jobs] == new_tokens(model, given, 6)


def test_an_encoder_reads_the_source_of_each_row():
    sizes = {"d_model": D, "num_heads": N, "d_ff": D_FF, "max_seq_length": 50}
    model = Transformer(
        29, V, **sizes, num_encoder_layers=1, num_decoder_layers=2, key=jax.random.key(3)
    )
    model = jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, model)
    rng, new = np.random.default_rng(2), [3, 9, 5, 17, 6]
    sources = [rng.integers(0, 29, n).tolist() for n in (6, 1, 13, 3, 30)]
    jobs = [Recorded([4], n, GREEDY, source=source) for source, n in zip(sources, new, strict=True)]
    run(Engine(model, rows=3), jobs)
    expected = np.asarray(model.generate(sources, 1 + max(new), 4))[:, 1:].tolist()
    assert [job.ids for job in jobs] == [row[:n] for row, n in zip(expected, new, strict=True)]


def test_each_row_has_its_own_way_to_choose(model):
    given = prompts([5, 9, 2, 7, 12, 3])
    options = [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.5, "min_p": 0.2, "frequency_penalty": 0.9},
        {"temperature": 0.9, "presence_penalty": 1.5, "repetition_penalty": 1.2},
    ]
    samplings = [Sampling(**x, seed=seed, index=seed % 3) for seed, x in enumerate(options)]
    jobs = [Recorded(p, 8, x) for p, x in zip(given, [*samplings, GREEDY], strict=True)]
    run(Engine(model, rows=3), jobs)
    for job, x in zip(jobs, [*options, {}], strict=True):
        key = None
        if x:
            key = jax.random.fold_in(jax.random.key(job.sampling.seed), job.sampling.index)[None]
        (expected,) = new_tokens(model, [job.prompt], 8, key=key, **x)
        assert job.ids == expected


def test_log_probabilities_are_those_of_the_model(model):
    (prompt,) = prompts([5])
    sampling = Sampling(temperature=0.0, frequency_penalty=2.0, top=4)
    (job,) = run(Engine(model, rows=3), [Recorded(prompt, 7, sampling)])
    row = jnp.array([*prompt, *job.ids])
    scores = np.asarray(model.score(row))[len(prompt) :]
    np.testing.assert_allclose(job.log_probs, scores, atol=1e-5)
    log_probs = np.asarray(model(row[None]))[0, len(prompt) - 1 : -1]
    for top, expected in zip(job.tops, log_probs, strict=True):
        assert [i for i, _ in top] == np.argsort(-expected, kind="stable")[:4].tolist()
        np.testing.assert_allclose([x for _, x in top], np.sort(expected)[:-5:-1], atol=1e-5)


def test_numbers_are_added_to_logits_and_followers_allow_tokens(model):
    class Even:
        asked = []

        def legal(self, tokens):
            self.asked.append(len(tokens))
            return np.arange(V) % 2 == len(tokens) % 2

    given = prompts([5, 9, 2])
    biased = Sampling(temperature=0.0, logit_bias={7: 100.0, 3: -100.0})
    jobs = [Recorded(given[0], 5, biased), Recorded(given[1], 5, GREEDY, follower=Even())]
    jobs += [Recorded(given[2], 9, GREEDY)]
    run(Engine(model, rows=3), jobs)
    assert jobs[0].ids == [7] * 5
    assert [x % 2 for x in jobs[1].ids] == [0, 1, 0, 1, 0] and Even.asked == [0, 1, 2, 3, 4]
    assert jobs[2].ids == new_tokens(model, [given[2]], 9)[0]


def test_what_any_row_has_read_of_a_prompt_is_not_read_again(model, monkeypatch):
    counts = []
    read = batch.Batch.read

    def counted(self, tokens, size, length):
        counts.append(len(tokens))
        return read(self, tokens, size, length)

    monkeypatch.setattr(batch.Batch, "read", counted)
    (prompt,) = prompts([21])
    server = Engine(model, rows=3)
    first = Recorded(prompt, 5, GREEDY)
    others = [Recorded([*prompt, 3, 4], 5, GREEDY), Recorded([*prompt[:-1], 9], 5, GREEDY)]
    run(server, [first, *others])
    assert sum(counts) == 21 + 2 + 1
    expected = new_tokens(model, [job.prompt for job in others], 5)
    assert [job.ids for job in others] == expected


@pytest.mark.parametrize("window", [None, 5])
def test_what_a_shorter_batch_has_lost_is_read_again(window):
    model = make_lm(position=RotaryPositionalEncoding(), window=window)
    (prompt,) = prompts([40])
    server = Engine(model, rows=3)
    # The second makes the batch shorter, while the row of the first is free.
    jobs = [Recorded(x, 3, GREEDY) for x in (prompt, [5, 7], [*prompt, 3])]
    later = [Recorded(jobs[-1].prompt, 3, GREEDY)]
    server.start()
    for job in [*jobs, *later]:
        server.submit([job])
        assert job.done.wait(60)
    server.close()
    assert jobs[2].ids == later[0].ids == new_tokens(model, [jobs[2].prompt], 3)[0]


@pytest.mark.parametrize("window", [5, 16, 40])
def test_a_row_with_a_window_goes_on_but_not_far_back(window):
    """With 16 the layers have 32 slots, which is also a size of the batch."""
    model = make_lm(position=RotaryPositionalEncoding(), window=window)
    (prompt,) = prompts([37])
    given = [prompt, [*prompt, 3], [*prompt[:5], 9], prompt, [*prompt[:20], 3]]
    jobs = run(Engine(model, rows=1), [Recorded(x, 4, GREEDY) for x in given])
    assert [job.ids for job in jobs] == new_tokens(model, given, 4)


def test_a_copy_of_the_end_of_a_row_has_no_beginning(monkeypatch):
    """Its layers with windows lack what the row had forgotten, short as the copy is."""
    monkeypatch.setattr(batch, "SLOTS", 32)
    model = make_lm(position=RotaryPositionalEncoding(), window=3)
    (prompt,) = prompts([24])
    # The second begins with 15 tokens of the first, which has 30 and keeps the last 19.
    given = (prompt, 7), (prompt[:16], 1), ([*prompt[:9], 8], 4)
    jobs = [Recorded(p, n, GREEDY) for p, n in given]
    run(Engine(model, rows=1), jobs)
    for job in jobs:
        scores = np.asarray(model.score(jnp.array([*job.prompt, *job.ids])))[len(job.prompt) :]
        np.testing.assert_allclose(job.log_probs, scores, atol=1e-5)


def test_jobs_may_be_given_up_at_any_time(model):
    server = Engine(model, rows=3)
    given = prompts([3, 3, 40, 3, 7])
    jobs = [
        Recorded(given[0], 40, GREEDY, at_token=lambda job: len(job.ids) == 3 and job.cancel()),
        Recorded(given[1], 40, GREEDY, stop_after=5),
        Recorded(given[2], 10, GREEDY),
        Recorded(given[3], 40, GREEDY),
        Recorded(given[4], 6, GREEDY),
    ]
    # The third is given up while its prompt is read, the fourth before it has begun.
    jobs[1].at_token = lambda job: len(job.ids) == 4 and (jobs[2].cancel(), jobs[3].cancel())
    run(server, jobs)
    assert [len(job.ids) for job in jobs] == [3, 5, 0, 0, 6]
    assert all(job.ends == [None] for job in jobs)
    assert jobs[4].ids == new_tokens(model, [given[4]], 6)[0]


def test_only_so_many_may_wait(model):
    server = Engine(model, rows=2, waiting=3)
    jobs = [Recorded([1, 2], 3, GREEDY) for _ in range(7)]
    server.submit(jobs[:5])
    with pytest.raises(QueueFull, match="jobs wait, of at most 3"):
        server.submit(jobs[5:])
    assert server.counts() == {"rows": 2, "busy": 0, "waiting": 5}
    server.start()
    server.close()
    assert [len(job.ids) for job in jobs] == [3] * 5 + [0] * 2
    with pytest.raises(Closed):
        server.submit(jobs[5:])


def test_what_cannot_be_decoded_is_refused(model):
    server = Engine(model, rows=2, context=20)
    for prompt, new in (([], 3), ([1], 0), ([1] * 10, 11), ([1] * 21, 1)):
        with pytest.raises(ValueError, match="at most 20 together"):
            server.submit([Recorded([1], 1, GREEDY), Recorded(prompt, new, GREEDY)])
    with pytest.raises(ValueError, match="source"):
        server.submit([Recorded([1], 1, GREEDY, source=[3])])
    with pytest.raises(ValueError, match="at most the 60 positions of the model, got 61"):
        Engine(make_lm(learnable_pos=True), context=61)
    for ids in ([1, V], [-1]):
        with pytest.raises(ValueError, match=f"from 0 to {V - 1}, the tokens of the model, got"):
            server.submit([Recorded(ids, 1, GREEDY)])
    for sizes in ({"rows": 0}, {"context": 0}, {"context": 1}, {"waiting": 0}):
        with pytest.raises(ValueError, match="must be"):
            Engine(model, **sizes)
    assert server.counts()["waiting"] == 0


def test_an_error_ends_its_job_alone(model):
    class Broken:
        def legal(self, tokens):
            raise RuntimeError("no grammar")

    class Second:
        def legal(self, tokens):
            if tokens:
                raise RuntimeError("no second")
            return np.ones(V, np.bool_)

    def fail(job):
        raise RuntimeError("no reader")

    class Nothing:
        def legal(self, tokens):
            return np.zeros(V, np.bool_) if len(tokens) == 2 else np.ones(V, np.bool_)

    given = prompts([3, 4, 5, 6])
    jobs = [
        Recorded(given[0], 9, GREEDY, follower=Broken()),
        Recorded(given[1], 9, GREEDY, at_token=fail),
        Recorded(given[2], 9, GREEDY, follower=Nothing()),
        Recorded(given[3], 9, GREEDY),
    ]
    jobs += [Recorded(given[0], 9, Sampling(seed=2**70))]
    run(Engine(model, rows=3), jobs)
    assert isinstance(jobs.pop().ends[0], OverflowError)
    (alone,) = run(Engine(model, rows=3), [Recorded(given[0], 9, GREEDY, follower=Second())])
    assert str(alone.ends[0]) == "no second" and len(alone.ids) == 1
    assert [str(job.ends[0])[:10] for job in jobs] == [
        *("no grammar", "no reader", "no token i"),
        "None",
    ]
    assert jobs[3].ids == new_tokens(model, [given[3]], 9)[0]


def test_logits_that_are_no_numbers_are_an_error(model):
    broken = eqx.tree_at(lambda x: x.output.b, model, model.output.b.at[3].set(jnp.nan))
    (job,) = run(Engine(broken, rows=3), [Recorded([1, 2], 5, GREEDY)])
    assert isinstance(job.ends[0], FloatingPointError) and not job.ids


def test_a_row_of_nan_spoils_no_later_one(model):
    """Neither where its memory was, nor beside it."""
    broken = eqx.tree_at(
        lambda x: x.embedding.token_embedding.weight,
        model,
        model.embedding.token_embedding.weight.at[3].set(jnp.nan),
    )
    given = [[5, 3, 9], *prompts([6, 2, 9, 4], seed=1)]
    given[1:] = [[x + (x == 3) for x in row] for row in given[1:]]
    forbidden = Sampling(temperature=0.0, logit_bias={3: -1e9})
    jobs = run(Engine(broken, rows=2), [Recorded(p, 7, forbidden) for p in given])
    assert isinstance(jobs[0].ends[0], FloatingPointError)
    alone = run(Engine(model, rows=2), [Recorded(p, 7, forbidden) for p in given[1:]])
    assert [job.ids for job in jobs[1:]] == [job.ids for job in alone]
    assert [job.ends for job in jobs[1:]] == [[None]] * 4


def test_rows_that_are_not_in_use_ask_for_nothing():
    asks = Sampling(top_k=5, top=2, frequency_penalty=1.0, presence_penalty=0.5)
    rules = read_rules(asks)._replace(repetition_penalty=jnp.array([1.5]))
    used, unused = (rules.of(jnp.array([x])) for x in (True, False))
    assert used.cuts.all() and used.penalizes.all() and used.wants_top.all()
    assert not (unused.cuts.any() or unused.penalizes.any() or unused.wants_top.any())
    assert unused.is_greedy.all() and not used.is_greedy.any()


def test_a_failed_step_ends_what_has_begun_and_nothing_else(model, monkeypatch, caplog):
    step, calls = batch.Batch.step, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(batch.Batch, "step", failing)
    given = prompts([3, 4, 5, 6])
    jobs = run(Engine(model, rows=3), [Recorded(p, 6, GREEDY) for p in given])
    assert [str(job.ends[0]) for job in jobs] == ["out of memory"] * 3 + ["None"]
    assert jobs[3].ids == new_tokens(model, [given[3]], 6)[0]
    assert "A step of decoding failed." in caplog.text


def test_closing_at_once_gives_all_up(model):
    server, begun, closing = Engine(model, rows=3), threading.Event(), threading.Event()

    def pause(job):
        begun.set()
        assert closing.wait(60)

    jobs = [Recorded([1, 2], 9, GREEDY, at_token=pause) for _ in range(5)]
    server.submit(jobs)
    server.start()
    assert begun.wait(60)
    closer = threading.Thread(target=server.close, args=[True])
    closer.start()
    while not all(job.is_cancelled for job in jobs):
        time.sleep(0.01)
    closing.set()
    closer.join()
    assert [len(job.ids) for job in jobs] == [1, 0, 0, 0, 0]
    assert all(job.ends == [None] for job in jobs)


def test_after_the_warm_up_nothing_is_compiled(model, compiled):
    server = Engine(model, rows=3, context=50)
    server.warm_up(longest=50)
    compiled()
    jobs = [
        Recorded(p, n, GREEDY)
        for p, n in zip(prompts([3, 40, 17, 9, 26]), [9, 4, 30, 2, 1], strict=True)
    ]
    run(server, jobs)
    assert compiled() == []


def test_many_threads_ask_at_odd_times(model):
    """Each job's tokens are those of its own greedy text, whoever comes and goes beside it."""
    server, rng = Engine(model, rows=3, waiting=64), np.random.default_rng(7)
    given, new = prompts(rng.integers(1, 30, 40), 5), rng.integers(1, 25, 40).tolist()
    given[20:25] = [given[3] + [5]] * 5
    leaves = rng.random(40) < 0.2
    expected = new_tokens(model, given, 24)
    server.start()
    found = {}

    def ask(numbers):
        for i in numbers:
            job = Recorded(given[i], new[i], GREEDY)
            if leaves[i]:
                job.at_token = lambda job, n=i % 5: len(job.ids) > n and job.cancel()
            server.submit([job])
            assert job.done.wait(120)
            found[i] = job

    threads = [threading.Thread(target=ask, args=[range(k, 40, 8)]) for k in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    server.close()
    assert len(found) == 40
    for i, job in found.items():
        assert job.ends == [None]
        assert job.ids == expected[i][: len(job.ids)]
        assert len(job.ids) == new[i] or leaves[i]
