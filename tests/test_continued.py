"""Calls that continue a cache against calls with the whole text, for every option of `generate`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import KEY, V, make_lm, make_seq2seq, prompt_of
from test_generation_options import cut_after

from jaxformers import ALiBi, RotaryPositionalEncoding, cast_floating, scan_layers
from jaxformers.generation import loop

NEW = 9
# Three turns of three rows: padded on the left, on the right and in the middle.
TURNS = [prompt_of(n, 3, seed=n) for n in (6, 4, 5)]
REAL = [np.ones(turn.shape, bool) for turn in TURNS]
REAL[0][1, :2] = REAL[1][0, 2:] = REAL[1][2, 0] = REAL[2][1, 1:3] = False


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding(), max_seq_length=512)


def converse(model, **options):
    """What three turns add that keep the cache, each equal to one call with the whole text.

    The cache has room for all of them and the whole text a fixed width, so that a program each is
    enough.
    """
    ends = [[options["end_token"]], *options["stop_sequences"]] if "end_token" in options else []
    cache, texts, said = model.init_cache(3, 112), [[], [], []], []
    for turn, mask in zip(TURNS, REAL, strict=True):
        out = model.generate(
            turn, NEW, padding_mask=mask, cache=cache, return_cache=True, **options
        )
        cache, got = out.cache, np.asarray(out.tokens)[:, turn.shape[1] :]
        texts = [text + row[m].tolist() for text, row, m in zip(texts, turn, mask, strict=True)]
        tokens, there = pad(texts)
        whole = model.generate(tokens, NEW, padding_mask=there, return_scores=True, **options)
        np.testing.assert_array_equal(got, np.asarray(whole.tokens)[:, -NEW:])
        np.testing.assert_allclose(out.log_probs, whole.log_probs, atol=2e-5)
        texts = [text + cut_after(row.tolist(), ends) for text, row in zip(texts, got, strict=True)]
        said.append(got)
    check_held(cache, texts)
    return said


def pad(texts, columns=48):
    """Rows of different length in one array, padded on the right, and what is real in it."""
    real = np.arange(columns) < np.array([[len(text)] for text in texts])
    tokens = np.zeros(real.shape, int)
    tokens[real] = np.concatenate(texts)
    return tokens, real


def check_held(cache, texts):
    """The cache holds the tokens of each row in order, filling and padding apart."""
    tokens, positions = np.asarray(cache.tokens), np.asarray(cache.positions)
    for row, where, text in zip(tokens, positions, texts, strict=True):
        np.testing.assert_array_equal(row[where >= 0], text)
        np.testing.assert_array_equal(where[where >= 0], range(len(text)))


def prefer_new_words(logits, tokens, real):
    """A function of the user's own, which reads the tokens of the row so far."""
    rows = jnp.arange(len(tokens))[:, None]
    seen = jnp.zeros(logits.shape, jnp.float32).at[rows, tokens].max(real.astype(jnp.float32))
    return logits - 100.0 * seen


def test_penalties_and_bans_see_what_the_cache_holds(lm):
    """Rows differ in their options, so that one program tries them all."""
    free, none = converse(lm), 50
    for options in (
        {"repetition_penalty": [2.0, 1.0, 1.0], "no_repeat_ngram_size": [none, 1, 1]},
        {"frequency_penalty": [5.0, 0.0, 5.0], "presence_penalty": [0.0, 5.0, 1.0]},
    ):
        held = converse(lm, **options)
        for row in range(3):
            assert any((a[row] != b[row]).any() for a, b in zip(free, held, strict=True))


def test_words_that_begin_in_the_cache_do_not_come(lm):
    free = converse(lm)
    # The end of what the first turn said, the second turn's prompt, and what would come next.
    words = [
        [*said[-2:], *turn[m], then[0]]
        for said, turn, m, then in zip(free[0], TURNS[1], REAL[1], free[1], strict=True)
    ]
    words = [[int(token) for token in word] for word in words]
    held = converse(lm, bad_words=words)
    np.testing.assert_array_equal(held[0], free[0])
    assert (held[1][:, 0] != free[1][:, 0]).all()


def test_a_function_on_the_logits_sees_what_the_cache_holds(lm):
    options = {"forced_first_token": [5, 6, 7], "forced_last_token": 8}
    said = converse(lm, logits_fn=prefer_new_words, **options)
    # It forbids in effect what came before: a token comes again only if it was forced.
    for row in np.concatenate(said, axis=1):
        kept = [token for token in row if token not in (5, 6, 7, 8)]
        assert len(set(kept)) == len(kept)


def test_rows_that_ended_early_and_stop_sequences(lm):
    """What fills an ended row is not held, its end is; sampled with a key for each row."""
    keys = jax.random.split(KEY, 3)
    free = converse(lm, key=keys)
    # The last one would be complete if it could begin in the cache, before the second turn.
    over = [*free[0][0, -1:], *TURNS[1][0], free[1][0, 0]]
    stops = [[int(token) for token in stop] for stop in (free[0][1, 2:4], over)]
    end = next(int(token) for token in free[0][2] if token not in free[0][:2])
    options = {"end_token": end, "stop_sequences": stops, "min_new_tokens": [0, 0, 3]}
    held = converse(lm, key=keys, pad_token=V - 1, **options)
    np.testing.assert_array_equal(held[0][0], free[0][0])
    np.testing.assert_array_equal(held[0][1], [*free[0][1, :4], *[V - 1] * (NEW - 4)])
    np.testing.assert_array_equal(held[1][0, :3], free[1][0, :3])
    assert end not in held[0][2, :3] and (held[0][2] != free[0][2]).any()


MODELS = {
    "window that rolls": {"window": 3, "num_layers": 2},
    "sinusoids": {"position": None},
    "alibi and one key head": {"position": ALiBi(), "num_kv_heads": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_models(name):
    pieces = {"position": RotaryPositionalEncoding(), "max_seq_length": 512} | MODELS[name]
    converse(make_lm(**pieces), repetition_penalty=1.3)


def test_scanned_layers():
    model = make_lm(position=RotaryPositionalEncoding(), max_seq_length=512, num_layers=2)
    converse(scan_layers(model), no_repeat_ngram_size=1)


def test_half_precision_and_a_cache_that_has_to_grow(lm):
    half, options = cast_floating(lm, jnp.bfloat16), {"repetition_penalty": 1.5}
    first = half.generate(TURNS[0], NEW, return_cache=True, **options)
    assert first.cache.layers[0].own.keys.dtype == jnp.bfloat16
    got = half.generate(TURNS[1], NEW, cache=first.cache, **options)
    whole = half.generate(np.concatenate([first.tokens, TURNS[1]], axis=1), NEW, **options)
    np.testing.assert_array_equal(got[:, 4:], whole[:, 6 + NEW + 4 :])


def test_a_cache_made_by_hand_and_one_row_without_a_batch(lm):
    """The model keeps the tokens of each call, whoever makes it."""
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    forward, cache, text = eqx.filter_jit(lm.forward), lm.init_cache(1, 64), prompt_of(11)
    assert (np.asarray(cache.positions) == -1).all()
    for part, real in ((slice(0, 5), [True, False, True, True, False]), (slice(5, 6), [True])):
        _, cache = forward(
            jnp.asarray(text[None, part]), padding_mask=jnp.asarray([real]), cache=cache
        )
    check_held(cache, [text[[0, 2, 3, 5]]])
    got = lm.generate(text[6:], NEW, cache=cache, **options)
    assert got.shape == (5 + NEW,)
    whole = lm.generate(text[[0, 2, 3, *range(5, 11)]], NEW, **options)
    np.testing.assert_array_equal(got[5:], whole[9:])
    # The tokens go where the keys and values go.
    both = cache.resize(70).rewind(jnp.int32(1)).take(jnp.array([0, 0]))
    check_held(both, [text[[0, 2, 3]]] * 2)
    _, longer = forward(jnp.asarray(text[None, 5:7].repeat(2, 0)), cache=both)
    check_held(longer, [text[[0, 2, 3, 5, 6]]] * 2)


def test_a_prompt_longer_than_a_chunk_and_a_cache_under_jit(lm):
    prompt = prompt_of(loop.CHUNK + 40, 2)
    first = lm.generate(prompt[:, :30], 3, return_cache=True)
    options = {"no_repeat_ngram_size": 2, "presence_penalty": 0.5}
    whole = lm.generate(np.concatenate([first.tokens, prompt[:, 30:]], axis=1), 5, **options)
    got = lm.generate(prompt[:, 30:], 5, cache=first.cache, **options)
    np.testing.assert_array_equal(got[:, -5:], whole[:, -5:])
    jitted = eqx.filter_jit(lambda more, cache: lm.generate(more, 5, cache=cache, **options))
    np.testing.assert_array_equal(jitted(prompt[:, 30:], first.cache), got)


def test_an_encoder_decoder_keeps_its_targets_tokens():
    model = make_seq2seq()
    src, tgt = jnp.asarray(prompt_of(4, 2) % 29), jnp.asarray(prompt_of(5, 2))
    cache = model.init_cache(model.encode(src), 8)
    real = jnp.array([[False, True, True, True, True], [True] * 5])
    for part in (slice(0, 3), slice(3, 5)):
        _, cache = eqx.filter_jit(model.forward)(
            tgt[:, part], padding_mask=real[:, part], cache=cache
        )
    check_held(cache, [tgt[0, 1:].tolist(), tgt[1].tolist()])


def test_a_cache_of_another_model_and_what_is_none(lm, no_shape_checker):
    pieces = {"position": RotaryPositionalEncoding(), "max_seq_length": 512}
    out, more = lm.generate(TURNS[0], 2, return_cache=True), TURNS[1]
    for given in (out, False, out.cache.layers):
        with pytest.raises(ValueError, match=r"must be a Cache, got a \w+.*cache=out.cache"):
            lm.generate(more, 2, cache=given)
    for other, match in (
        (make_lm(num_layers=2, **pieces), "1 layers instead of 2"),
        (make_lm(num_kv_heads=2, **pieces), "heads 4, .* instead of heads 2"),
        (make_lm(d_model=32, **pieces), "head_dim 6, .* instead of .*head_dim 8"),
    ):
        with pytest.raises(ValueError, match=f"one of this model.*{match}"):
            other.generate(more, 2, cache=out.cache)
    windowed = make_lm(window=3, **pieces)
    rolled = windowed.init_cache(3, 64)
    with pytest.raises(ValueError, match="window_slots 19 instead of .*window_slots None"):
        lm.generate(more, 2, cache=rolled)
    with pytest.raises(ValueError, match="window_slots 19 instead of .*window_slots 21"):
        make_lm(window=5, **pieces).generate(more, 2, cache=rolled)
    seq2seq = make_seq2seq()
    cache = seq2seq.init_cache(seq2seq.encode(jnp.asarray(more % 29)), 8)
    with pytest.raises(ValueError, match="cross_attention True, .*cross_attention False"):
        make_lm(num_layers=2, **pieces).generate(more, 2, cache=cache)
    # A cache that is too short for the window to roll, and then grows, is the model's own.
    assert windowed.generate(more, 2, cache=windowed.init_cache(3, 6)).shape == (3, 6)
