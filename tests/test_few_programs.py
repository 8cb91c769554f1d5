"""Batches are padded to the sizes that programs are compiled for, which nobody notices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_continued import check_held
from test_generation import KEY, V, count_compilations, make_lm, make_seq2seq, prompt_of
from test_one_program import encoder_model

from jaxformers import RotaryPositionalEncoding
from jaxformers.generation import prompts

B, T, NEW, ENDS = 5, 7, 9, [9, 13, 22]
PROMPT, REAL = prompt_of(T, B), np.arange(T) >= np.array([[0], [3], [1], [0], [5]])
SRC = prompt_of(4, B, seed=3) % 29


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding(), max_seq_length=512)


def exactly(call):
    """What a call gives that keeps its batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "bucket", lambda n, *limit, **smallest: n if smallest else 16)
        return call()


def same(got, wanted):
    for name in ("tokens", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    for name in ("log_probs", "scores"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), atol=2e-5)


def row_numbers(low, high):
    return np.linspace(low, high, B).astype(np.float32)


CALLS = {
    "numbers of rows": {
        **{"key": KEY, "temperature": row_numbers(0.5, 2), "top_p": row_numbers(0.8, 1)},
        **{"repetition_penalty": row_numbers(1, 1.5), "min_new_tokens": [0, 5, 0, 2, 0]},
    },
    "keys of rows": {"key": jax.random.split(KEY, B), "forced_first_token": [1, 2, 3, 4, 5]},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": row_numbers(0.5, 2)},
    "full beams": {"num_beams": 2, "early_stopping": True, "stop_sequences": [[1], [2], [3]]},
    "lookup": {"prompt_lookup": 2},
}


HOW = (lambda call: call()), exactly


@pytest.mark.parametrize("name", CALLS)
def test_rows_that_are_added_change_nothing(lm, name):
    options = {"end_token": ENDS, "padding_mask": REAL, "return_scores": True} | CALLS[name]
    got = lm.generate(PROMPT, NEW, **options)
    wanted = exactly(lambda: lm.generate(PROMPT, NEW, **options))
    assert got.tokens.shape[0] == B * options.get("num_return_sequences", 1)
    same(got, wanted)
    assert name == "beams" or got.acceptance_rate == wanted.acceptance_rate


def test_encoder_decoders_and_scores(lm):
    model = make_seq2seq()
    masks = {"src_padding_mask": REAL[:, 3:]}
    same(*(f(lambda: model.generate(SRC, 8, 3, return_scores=True, **masks)) for f in HOW))
    calls = (
        lambda: lm.score(PROMPT, REAL),
        lambda: model.score(SRC, PROMPT, tgt_padding_mask=REAL),
        lambda: lm.score(PROMPT[0]),
    )
    for call in calls:
        np.testing.assert_allclose(call(), exactly(call), atol=2e-5)


def test_a_stream_and_its_cache(lm):
    stream = lm.stream(PROMPT, NEW, padding_mask=REAL, end_token=ENDS)
    tokens = np.stack(list(stream), axis=1)
    wanted = lm.generate(PROMPT, NEW, padding_mask=REAL, end_token=ENDS, return_cache=True)
    np.testing.assert_array_equal(tokens, wanted.tokens[:, T : T + tokens.shape[1]])
    assert stream.finish_reason == wanted.finish_reason
    held = np.asarray(wanted.cache.tokens), np.asarray(wanted.cache.positions) >= 0
    check_held(stream.cache, [row[real].tolist() for row, real in zip(*held, strict=True)])


def test_what_sees_the_rows_sees_those_of_the_call(lm):
    seen = []

    def look(logits, tokens, real):
        seen.append(len(logits))
        return logits

    lm.generate(PROMPT, 2, logits_fn=look)
    assert set(seen) == {B}
    assert lm.generate(PROMPT, 2, return_cache=True).cache.positions.shape[0] == B
    hot = eqx.filter_jit(lambda x: lm.generate(PROMPT, 2, key=KEY, temperature=x))
    np.testing.assert_array_equal(
        hot(jnp.full(B, 2.0)), lm.generate(PROMPT, 2, key=KEY, temperature=2.0)
    )
    with pytest.raises(ValueError, match=r"temperature must be .*shape \(5,\)"):
        lm.generate(PROMPT, 2, key=KEY, temperature=[1.0] * 6)
    with pytest.raises(ValueError, match="key must be one key or one per row, 5 of them, got 6"):
        lm.generate(PROMPT, 2, key=jax.random.split(KEY, 6))


def test_large_batches_keep_their_size(lm, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_PADDED", 100)
    text = prompts.read_prompt(PROMPT, None, V)
    assert prompts.rows_for(text, 16) == 6 and prompts.rows_for(text, 17) == B


def test_after_a_warm_up_no_size_compiles(lm):
    seq2seq, encoder, key = make_seq2seq(), encoder_model(), jax.random.key(1)

    def call(b, t, new):
        tokens = prompt_of(t, b)
        lm.generate(tokens, new, key=key, temperature=np.linspace(0.5, 2, b), end_token=ENDS)
        lm.generate(tokens, new, num_beams=2, end_token=ENDS)
        list(lm.stream(tokens, new))
        lm.score(tokens)
        seq2seq.generate(tokens % 29, new + 1, 3)
        seq2seq.score(tokens % 29, tokens)
        ids = jax.device_put(np.asarray(tokens % 29, np.int32))
        encoder.embed(ids), encoder.classify(ids)

    call(6, 8, 5)
    sizes = np.random.default_rng(0)
    with count_compilations() as compiled:
        for b in (5, 6, 5, 5):
            call(b, *(int(n) for n in sizes.integers(1, 17, 2)))
    assert compiled == []
