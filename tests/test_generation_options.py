"""What `generate` can do besides: ends, scores, streams, caches, drafts, beams."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import (
    KEY,
    V,
    by_hand,
    count_compilations,
    full_logits,
    make_lm,
    make_seq2seq,
    prompt_of,
)

from jaxformers import ALiBi, Generation, RotaryPositionalEncoding, perplexity
from jaxformers.cache import SPARE

NEW = 12


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding())


def test_lists_of_different_length_are_padded_on_the_left(lm):
    rows = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    out = np.asarray(lm.generate(rows, 6))
    assert out.shape == (3, 11)
    for row, got in zip(rows, out, strict=True):
        np.testing.assert_array_equal(got[:5], [0] * (5 - len(row)) + row)
        np.testing.assert_array_equal(got[5:], lm.generate(np.array(row), 6)[len(row) :])
    np.testing.assert_array_equal(
        lm.generate([[1, 2], [6, 7]], 2), lm.generate(np.array([[1, 2], [6, 7]]), 2)
    )
    with pytest.raises(ValueError, match="padding_mask"):
        lm.generate(rows, 6, padding_mask=np.ones((3, 5), bool))
    with pytest.raises(ValueError, match="prompt"):
        lm.generate([[1, 2], []], 6)


def cut_after(row, ends):
    """The row up to and including the first place where one of the sequences ends."""
    for stop in range(1, len(row) + 1):
        if any(list(row[stop - len(end) : stop]) == list(end) for end in ends if len(end) <= stop):
            return list(row[:stop])
    return list(row)


def test_several_end_tokens_and_stop_sequences(lm):
    prompt = prompt_of(4, 3)
    free = np.asarray(lm.generate(prompt, NEW, key=KEY))[:, 4:]
    single, other, pair = int(free[0, 3]), int(free[1, 5]), free[2, 5:7].tolist()
    assert len({single, other, *pair}) == 4
    out = lm.generate(
        prompt,
        NEW,
        key=KEY,
        end_token=[single, other],
        stop_sequences=[pair, [V - 1] * 3],
        pad_token=0,
    )
    for row, got in zip(free, np.asarray(out)[:, 4:], strict=True):
        kept = cut_after(row, [[single], [other], pair])
        np.testing.assert_array_equal(got, kept + [0] * (NEW - len(kept)))


def test_a_stop_sequence_does_not_reach_into_the_prompt(lm):
    prompt = prompt_of(4, 1)
    free = np.asarray(lm.generate(prompt, NEW))[0]
    over = free[3:5].tolist()
    got = lm.generate(prompt, NEW, stop_sequences=[over], pad_token=V - 1)[0]
    kept = cut_after(free[4:], [over])
    assert len(kept) > 1
    np.testing.assert_array_equal(got[4:], kept + [V - 1] * (NEW - len(kept)))


def test_forced_and_banned_tokens_and_early_ends(lm):
    prompt = prompt_of(4, 2)
    free = np.asarray(lm.generate(prompt, NEW))[:, 4:]
    out = np.asarray(lm.generate(prompt, NEW, forced_first_token=[5, 6], forced_last_token=7))[
        :, 4:
    ]
    np.testing.assert_array_equal(out[:, 0], [5, 6])
    np.testing.assert_array_equal(out[:, -1], [7, 7])
    banned = [[int(token)] for token in set(free.ravel())]
    out = np.asarray(lm.generate(prompt, NEW, bad_words=banned))[:, 4:]
    assert not set(out.ravel()) & {token for (token,) in banned}
    end = int(free[0, 1])
    out = np.asarray(lm.generate(prompt, NEW, end_token=end, min_new_tokens=[8, 0]))[:, 4:]
    assert end not in out[0, :8]
    np.testing.assert_array_equal(
        out[1], cut_after(free[1], [[end]]) + [end] * (NEW - len(cut_after(free[1], [[end]])))
    )


@pytest.mark.parametrize(
    "options", [{}, {"key": KEY}, {"prompt_lookup": 2}], ids=["greedy", "sampled", "lookup"]
)
def test_stop_sequences_do_not_count_before_the_least_number_of_tokens(lm, options):
    """One that is complete with the last of these ends the row; with no end at all none does."""
    prompt = prompt_of(4, 2)
    free = np.asarray(lm.generate(prompt, NEW, **options))[:, 4:]
    stops = [free[0, 2:4].tolist(), free[1, :1].tolist(), free[0, 6:8].tolist()]
    for least in (1, 4, 5, [8, 1], [9, 12]):
        out = lm.generate(
            prompt, NEW, stop_sequences=stops, min_new_tokens=least, pad_token=0, **options
        )
        for row, got, n in zip(free, out[:, 4:], np.broadcast_to(least, 2), strict=True):
            ends = [
                stop
                for stop in range(n, NEW + 1)
                if any(row[:stop].tolist()[-len(end) :] == end for end in stops)
            ]
            length = min(ends, default=NEW)
            np.testing.assert_array_equal(got, [*row[:length], *[0] * (NEW - length)])
    np.testing.assert_array_equal(
        lm.generate(prompt, NEW, min_new_tokens=7, **options)[:, 4:], free
    )


def test_stop_sequences_do_not_end_beams_early(lm):
    prompt, search = prompt_of(4, 2), {"num_beams": 2, "return_scores": True}
    free = lm.generate(prompt, 8, **search)
    stops = [free.tokens[0, 5:7].tolist(), free.tokens[1, 4:5].tolist()]
    out = lm.generate(prompt, 8, **search, stop_sequences=stops, min_new_tokens=[8, 1])
    np.testing.assert_array_equal(out.tokens[0], free.tokens[0])
    stopped = lm.generate(prompt, 8, **search, stop_sequences=stops)
    assert not np.array_equal(stopped.tokens[0], free.tokens[0])
    np.testing.assert_array_equal(out.tokens[1], stopped.tokens[1])


def test_a_function_on_the_logits(lm):
    def only_even(logits, tokens, real):
        assert logits.shape == (2, V) and tokens.shape == real.shape
        return jnp.where(jnp.arange(V) % 2 == 0, logits, -jnp.inf)

    out = np.asarray(lm.generate(prompt_of(4, 2), NEW, key=KEY, logits_fn=only_even))
    assert (out[:, 4:] % 2 == 0).all() and len(set(out[:, 4:].ravel())) > 2


def test_scores_are_the_models_own_log_probabilities(lm):
    prompt = prompt_of(4, 2)
    free = lm.generate(prompt, NEW, key=KEY, top_k=5, temperature=2.0)
    end = int(free[0, 9])
    out = lm.generate(
        prompt,
        NEW,
        key=KEY,
        top_k=5,
        temperature=2.0,
        end_token=end,
        pad_token=0,
        return_scores=True,
    )
    assert isinstance(out, Generation)
    text, real = np.asarray(out.tokens), np.ones(out.tokens.shape, bool)
    for row, mask in zip(text, real, strict=True):
        mask[4 + len(cut_after(row[4:], [[end]])) :] = False
    assert not real.all()
    np.testing.assert_allclose(
        out.log_probs, np.asarray(lm.score(text, real))[:, 4:], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(out.scores, np.asarray(out.log_probs).sum(-1), rtol=1e-6)
    one = lm.generate(prompt[0], NEW, return_scores=True)
    assert (
        one.tokens.shape == (4 + NEW,) and one.log_probs.shape == (NEW,) and one.scores.shape == ()
    )


def test_score_of_given_text_wherever_padding_stands(lm):
    rows = [prompt_of(7, seed=1), prompt_of(4, seed=2)]
    real = np.array([[True] * 7, [False, True, False, True, True, False, True]])
    text = np.stack([rows[0], np.zeros(7, int)])
    text[1, real[1]] = rows[1]
    got = np.asarray(lm.score(text, real))
    for row, mask, line in zip(rows, real, got, strict=True):
        logits = full_logits(lm, jnp.asarray(row[None]), jnp.ones((1, len(row)), bool))
        wanted = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(line[mask][1:], wanted, rtol=1e-5, atol=1e-5)
        assert (line[~mask] == 0).all() and line[mask][0] == 0


def test_score_of_a_target_given_a_source():
    model, src, tgt = make_seq2seq(), np.array([[1, 2, 3, 0]]), np.array([[4, 5, 6]])
    src_real = src != 0
    got = model.score(src, tgt, src_real)
    wanted = model(jnp.asarray(src), jnp.asarray(tgt), src_padding_mask=jnp.asarray(src_real))
    np.testing.assert_allclose(got[0, 1:], wanted[0, [0, 1], tgt[0, 1:]], rtol=1e-5, atol=1e-5)


def test_perplexity_in_windows(lm):
    text = prompt_of(23)
    whole = np.exp(-np.asarray(lm.score(text)).sum() / 22)
    np.testing.assert_allclose(perplexity(lm, text), whole, rtol=1e-5)
    context, stride, total = 9, 4, 0.0
    for token in range(1, 23):
        # The window that scores a token is the first that reaches it.
        begin = max(0, -(-(token + 1 - context) // stride)) * stride
        total += float(lm.score(text[begin : token + 1])[-1])
    wanted = np.exp(-total / 22)
    np.testing.assert_allclose(perplexity(lm, text, stride, context), wanted, rtol=1e-5)
    assert abs(wanted - whole) > 1e-3
    for bad in ({"stride": 9, "context": 9}, {"stride": 0}, {"context": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            perplexity(lm, text, **bad)
    with pytest.raises(ValueError, match="context"):
        perplexity(make_lm(), text, context=33)


def test_a_stream_gives_the_same_tokens(lm):
    prompt = prompt_of(4, 2)
    for options in ({}, {"key": KEY, "temperature": 1.5, "repetition_penalty": 1.2}):
        wanted = np.asarray(lm.generate(prompt, NEW, **options))
        tokens = list(lm.stream(prompt, NEW, **options))
        np.testing.assert_array_equal(np.stack(tokens, axis=1), wanted[:, 4:])
    wanted = lm.generate(prompt[0], NEW, key=KEY)[4:]
    end = int(wanted[5])
    got = list(lm.stream(prompt[0], NEW, key=KEY, end_token=end))
    np.testing.assert_array_equal(got, cut_after(np.asarray(wanted), [[end]]))
    assert got[0].shape == ()
    model, src = make_seq2seq(), np.array([[1, 2, 3]])
    got = list(model.stream(src, 6, 0))
    np.testing.assert_array_equal(np.stack(got, axis=1), model.generate(src, 6, 0, None)[:, 1:])
    with pytest.raises(ValueError, match="num_beams"):
        lm.stream(prompt, NEW, num_beams=2)


def test_a_stream_gives_tokens_as_they_come(lm):
    tokens = lm.stream(prompt_of(4), 10**4)
    assert len(list(itertools.islice(tokens, 3))) == 3


@pytest.mark.parametrize("key", [None, KEY], ids=["greedy", "sampled"])
def test_turns_of_a_chat_keep_the_cache(lm, key):
    """Each turn with the cache of those before equals one call with the whole text."""
    first, second = prompt_of(5, 2, seed=1), prompt_of(3, 2, seed=2)
    end = int(lm.generate(first, NEW, key=key)[0, 9])
    options = {"key": key, "end_token": end, "pad_token": 0}
    turn = lm.generate(first, NEW, return_cache=True, **options)
    texts = []
    for row in np.asarray(turn.tokens):
        texts.append([*row[:5], *cut_after(row[5:], [[end]])])
    assert len(texts[0]) < 17
    both = lm.generate(second, 20, cache=turn.cache, return_cache=True, **options)
    for _ in range(2):
        texts = [text + list(row) for text, row in zip(texts, second, strict=True)]
        rows = [np.asarray(text) for text in texts]
        wanted = np.asarray(lm.generate(rows, 20, **options))[:, -20:]
        np.testing.assert_array_equal(both.tokens[:, 3:], wanted)
        texts = [text + cut_after(row, [[end]]) for text, row in zip(texts, wanted, strict=True)]
        both = lm.generate(second, 20, cache=both.cache, return_cache=True, **options)


def test_a_shared_prefix_is_read_once(lm):
    prefix = lm.generate(np.tile(prompt_of(9), (3, 1)), 1, return_cache=True)
    rest = prompt_of(4, 3, seed=5)
    got = lm.generate(rest, NEW, cache=prefix.cache)
    wanted = lm.generate(np.concatenate([prefix.tokens, rest], axis=1), NEW)
    np.testing.assert_array_equal(got[:, 4:], wanted[:, 14:])
    with pytest.raises(ValueError, match="cache"):
        lm.generate(rest[:2], NEW, cache=prefix.cache)


def test_a_cache_does_not_lift_the_limit_of_positions():
    model = make_lm()
    turn = model.generate(prompt_of(8, 1), 12, return_cache=True)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(prompt_of(4, 1), 9, cache=turn.cache)
    got = model.generate(prompt_of(4, 1), 8, cache=turn.cache)
    whole = np.concatenate([turn.tokens, prompt_of(4, 1)], axis=1)
    np.testing.assert_array_equal(got[:, 4:], model.generate(whole, 8)[:, 24:])


@pytest.mark.parametrize("position", [RotaryPositionalEncoding(), ALiBi()], ids=["rotary", "alibi"])
def test_windowed_layers_keep_only_their_window(position):
    model = make_lm(num_layers=2, window=3, position=position)
    whole = make_lm(num_layers=2, position=position)
    prompt, new = prompt_of(30, 2), 30
    real = np.arange(30) < np.array([[30], [10]])
    out = model.generate(prompt, new, padding_mask=real, return_cache=True)
    assert {layer.own.keys.shape[2] for layer in out.cache.layers} == {3 + SPARE}
    assert out.cache.slots > 60
    for i, row in enumerate([prompt[0], prompt[1, :10]]):
        wanted = by_hand(partial(full_logits, model), row, new, width=64)
        np.testing.assert_array_equal(out.tokens[i, 30:], wanted[len(row) :])
    assert not np.array_equal(out.tokens, whole.generate(prompt, new, padding_mask=real))
    # Guesses that are taken back must not have cost tokens that are still in view.
    drafts = {"draft_model": nearby(model, 0.02), "draft_length": SPARE}
    np.testing.assert_array_equal(
        model.generate(prompt, new, padding_mask=real, **drafts), out.tokens
    )
    # A next turn that is longer than the window and its spare slots together.
    turn, texts = prompt_of(25, 2, seed=3), []
    for row, n in zip(np.asarray(out.tokens), (30, 10), strict=True):
        texts.append(np.concatenate([row[:n], row[30:], turn[len(texts)]]))
    got = model.generate(turn, 9, cache=out.cache)
    np.testing.assert_array_equal(got[:, 25:], np.asarray(model.generate(texts, 9))[:, -9:])


# Speculative decoding.


def nearby(model, distance):
    """A draft that mostly agrees with the model."""
    keys = iter(jax.random.split(jax.random.key(9), 99))
    return jax.tree.map(
        lambda x: x + distance * jax.random.normal(next(keys), x.shape) if eqx.is_array(x) else x,
        model,
    )


@pytest.mark.parametrize("options", [
    {},
    {"key": KEY, "temperature": 1.3, "top_p": 0.9},
    {"key": KEY, "end_token": 5, "repetition_penalty": 1.2, "stop_sequences": [[1, 2]]},
], ids=["greedy", "sampled", "constrained"])  # fmt: skip
def test_drafts_do_not_change_the_tokens(options):
    model, prompt = make_lm(learnable_pos=True), prompt_of(6, 2)
    wanted = model.generate(prompt, 26, **options)  # up to the last position there is
    near = nearby(model, 0.01)
    rates = {}
    drafts = {
        "same": {"draft_model": model},
        "near": {"draft_model": near, "draft_length": 3},
        "lookup": {"prompt_lookup": 2, "draft_length": 5},
    }
    for name, draft in drafts.items():
        got = model.generate(prompt, 26, return_scores=True, **draft, **options)
        np.testing.assert_array_equal(got.tokens, wanted)
        rates[name] = float(got.acceptance_rate)
    assert rates["same"] == 1.0 and 0 < rates["near"] < 1, rates


def test_a_draft_saves_calls_of_the_model(lm):
    calls = []
    step = type(lm).forward

    class Counting(eqx.Module):
        model: eqx.Module

        def __getattr__(self, name):
            return getattr(self.model, name)

        def forward(self, tokens, **options):
            jax.debug.callback(lambda: calls.append(tokens.shape))
            return step(self.model, tokens, **options)

    from jaxformers.generation.generate import generate

    generate(Counting(lm), prompt_of(4), 21, {"draft_model": lm, "draft_length": 4})
    jax.effects_barrier()
    assert len(calls) == 1 + 4, calls  # the prompt, then five tokens a time


def test_lookup_guesses_what_came_after_before():
    """A model that counts up is guessed right by its own past."""
    model = make_lm(position=RotaryPositionalEncoding())

    def count_up(logits, tokens, real):
        last = jnp.take_along_axis(tokens, real.sum(-1, keepdims=True) - 1, axis=1)
        return jnp.where(jnp.arange(V) == (last + 1) % 5, 0.0, -jnp.inf)

    prompt = np.array([[0, 1, 2, 3, 4, 0, 1]])
    got = model.generate(
        prompt, 20, prompt_lookup=3, draft_length=6, logits_fn=count_up, return_scores=True
    )
    np.testing.assert_array_equal(got.tokens[0], np.arange(27) % 5)
    assert got.acceptance_rate == 1.0


def test_sampling_with_a_draft_keeps_the_distribution():
    """The second new token over many rows, against its exact distribution (chi-squared)."""
    model, rows = make_lm(scale=1.5), 4000
    prompt, draft = prompt_of(3), nearby(make_lm(scale=1.5), 0.05)

    def probabilities(texts):
        logits = full_logits(model, jnp.asarray(texts), jnp.ones(texts.shape, bool))
        return np.asarray(jax.nn.softmax(logits[:, -1]))

    (first,) = probabilities(prompt[None])
    both = np.concatenate([np.tile(prompt, (V, 1)), np.arange(V)[:, None]], axis=1)
    wanted = first @ probabilities(both)
    out = model.generate(np.tile(prompt, (rows, 1)), 2, key=KEY, draft_model=draft, draft_length=2)
    counted = np.bincount(np.asarray(out)[:, 4], minlength=V)
    chi2 = ((counted - rows * wanted) ** 2 / (rows * wanted)).sum()
    assert chi2 < 76  # 36 degrees of freedom: beyond that once in ten thousand
    assert wanted.max() < 0.5


# Beams.


def test_beams_find_the_best_of_all_sequences(lm):
    """With as many beams as there are beginnings, beam search is exhaustive."""
    prompt = prompt_of(4, 2)
    out = lm.generate(prompt, 2, num_beams=V, num_return_sequences=3, return_scores=True)
    for i, row in enumerate(prompt):
        pairs = np.array(list(itertools.product(range(V), repeat=2)))
        texts = np.concatenate([np.tile(row, (len(pairs), 1)), pairs], axis=1)
        totals = np.asarray(lm.score(texts)).astype(np.float64)[:, 4:].sum(-1)
        best = np.argsort(-totals)[:3]
        np.testing.assert_array_equal(out.tokens[3 * i : 3 * i + 3], texts[best])
        np.testing.assert_allclose(out.scores[3 * i : 3 * i + 3], totals[best] / 2, rtol=1e-5)


def test_sampled_beams(lm):
    prompt, options = prompt_of(4, 2), {"num_beams": 3, "temperature": 2.0}
    search = partial(lm.generate, prompt, 6, **options)
    one, again, other = search(key=KEY), search(key=KEY), search(key=jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    alone = lm.generate(prompt[:1], 6, key=KEY, **options)
    np.testing.assert_array_equal(alone, one[:1])


def test_beams_of_one_row_keep_its_shape(lm):
    prompt = prompt_of(4)
    assert lm.generate(prompt, 3, num_beams=2).shape == (7,)
    assert lm.generate(prompt, 3, num_beams=2, num_return_sequences=2).shape == (2, 7)


def test_a_new_budget_or_penalty_compiles_nothing_for_beams_and_drafts(lm):
    for extra in ({"num_beams": 2, "length_penalty": 1.0}, {"prompt_lookup": 2}):
        lm.generate(prompt_of(4, 2), 6, repetition_penalty=1.5, **extra)
        with count_compilations() as compiled:
            extra = extra | ({"length_penalty": 0.5} if "length_penalty" in extra else {})
            lm.generate(prompt_of(7, 2), 9, repetition_penalty=1.1, **extra)
        assert compiled == []


def test_compile_time_is_reported_on_request():
    model = make_lm(d_model=20)
    first = model.generate(prompt_of(4), 3, return_scores=True)
    second = model.generate(prompt_of(5), 3, return_scores=True)
    assert first.compile_seconds > 0.01 and second.compile_seconds == 0


BAD = {
    "num_beams": [{"num_beams": 0}, {"num_beams": 2, "prompt_lookup": 2}],
    "num_return_sequences": [
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
    ],
    "length_penalty": [{"length_penalty": 2.0}],
    "early_stopping": [{"early_stopping": True}, {"num_beams": 2, "early_stopping": "always"}],
    "repetition_penalty": [{"repetition_penalty": 0.0}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 0}, {"no_repeat_ngram_size": 1.5}],
    "bad_words": [{"bad_words": [5]}, {"bad_words": [[V]]}, {"bad_words": [[]]}],
    "stop_sequences": [{"stop_sequences": [[]]}, {"stop_sequences": [[V]]}],
    "min_new_tokens": [
        {"min_new_tokens": 9},
        {"min_new_tokens": 9, "end_token": 1},
        {"min_new_tokens": -1, "end_token": 1},
    ],
    "forced_first_token": [{"forced_first_token": V}],
    "forced_last_token": [{"forced_last_token": -1}],
    "end_token": [{"end_token": [1, V]}],
    "draft_length": [
        {"draft_length": 3},
        {"draft_length": 0, "prompt_lookup": 2},
        {"draft_length": SPARE + 1, "prompt_lookup": 2},
    ],
    "draft_model": [{"draft_model": make_lm, "prompt_lookup": 2}],
    "prompt_lookup": [{"prompt_lookup": 0}],
    "return_cache": [{"num_beams": 2, "return_cache": True}],
}  # fmt: skip


@pytest.mark.parametrize("name, case", [(name, i) for name in BAD for i in range(len(BAD[name]))])
def test_bad_options_are_named(name, case, lm, no_shape_checker):
    with pytest.raises(ValueError, match=name):
        lm.generate(prompt_of(4, 2), 3, **BAD[name][case])


def test_a_draft_of_another_vocabulary_is_refused(lm):
    from jaxformers import TransformerLM

    other = TransformerLM(V + 1, 8, 2, 1, 8, key=KEY)
    with pytest.raises(ValueError, match="draft_model"):
        lm.generate(prompt_of(4), 3, draft_model=other)
