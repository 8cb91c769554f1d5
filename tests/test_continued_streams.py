"""Caches that streams, drafts and encoder-decoders leave and continue, against whole texts."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_continued import NEW, REAL, TURNS, check_held, pad
from test_generation import (
    KEY,
    V,
    count_compilations,
    make_lm,
    make_seq2seq,
    prompt_of,
)
from test_generation_options import cut_after
from test_long_rotary import LONG, long_lm

from jaxformers import (
    DynamicScaling,
    RotaryPositionalEncoding,
    TokenStream,
    scan_layers,
)
from jaxformers.cache import SPARE

ENDS, PAD = [9, 13, 22, 30], V - 1


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding(), max_seq_length=512)


def until_end(row):
    return cut_after(list(row), [[end] for end in ENDS])


def by_generate(model, turn, mask, cache, **options):
    """The new tokens of a turn, and the cache with them."""
    out = model.generate(turn, NEW, padding_mask=mask, cache=cache, return_cache=True, **options)
    return np.asarray(out.tokens)[:, turn.shape[1] :], out.cache


def by_stream(model, turn, mask, cache, taken=NEW, **options):
    """The same by a stream that is left after so many tokens."""
    stream = model.stream(turn, NEW, padding_mask=mask, cache=cache, **options)
    tokens = list(itertools.islice(stream, taken))
    stream.close()
    return np.stack(tokens, axis=1), stream.cache


def converse(model, speak, cache, whole=None, **options):
    """Three turns that keep the cache, each equal to one call with the whole text.

    The rows of a turn are padded in different places and end at different times.
    """
    texts, ended = [[], [], []], 0
    for turn, mask in zip(TURNS, REAL, strict=True):
        got, cache = speak(model, turn, mask, cache, **options)
        texts = [text + row[m].tolist() for text, row, m in zip(texts, turn, mask, strict=True)]
        tokens, there = pad(texts)
        given = options if whole is None else whole
        wanted = np.asarray(model.generate(tokens, NEW, padding_mask=there, **given))[:, -NEW:]
        columns = got.shape[1]
        np.testing.assert_array_equal(got, wanted[:, :columns])
        kept = [until_end(row) for row in got]
        ended += sum(len(row) < columns for row in kept)
        texts = [text + row for text, row in zip(texts, kept, strict=True)]
        check_held(cache, texts)
    assert ended > 0
    return cache


WITH_END = {"end_token": ENDS, "pad_token": PAD}
PIECES = {
    "rotary": {},
    "window that rolls": {"window": 3, "num_layers": 2},
}


@pytest.mark.parametrize("name", PIECES)
def test_streams(name):
    pieces = {"position": RotaryPositionalEncoding(), "max_seq_length": 512} | PIECES[name]
    model = make_lm(**pieces)
    if name == "window that rolls":
        model = scan_layers(model)
    converse(model, by_stream, model.init_cache(3, 112), repetition_penalty=1.3, **WITH_END)


def test_streams_that_are_left_early(lm):
    def leave(*args, **options):
        return by_stream(*args, taken=4, **options)

    keys = jax.random.split(KEY, 3)
    converse(lm, leave, lm.init_cache(3, 112), key=keys, temperature=[0.5, 1.0, 2.0], **WITH_END)


DRAFTS = {
    "lookup, sampled": ("rotary", {"prompt_lookup": 2}, {"key": jax.random.split(KEY, 3)}),
    "a window that rolls": ("window that rolls", {"prompt_lookup": 3, "draft_length": SPARE}, {}),
    "another model": ("rotary", {"draft_model": {"window": 5}}, {"no_repeat_ngram_size": 3}),
    "the model itself": ("rotary", {"draft_model": {}, "draft_length": 3}, {}),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts(name):
    kind, draft, options = DRAFTS[name]
    pieces = {"position": RotaryPositionalEncoding(), "max_seq_length": 512} | PIECES[kind]
    model, options = make_lm(**pieces), options | WITH_END
    if "draft_model" in draft:
        draft = draft | {"draft_model": make_lm(**pieces | draft["draft_model"])}
    converse(model, by_generate, model.init_cache(3, 112), options, **draft, **options)


def test_a_draft_that_knows_the_cache_agrees_with_the_model(lm):
    """Its own memory has the cache's tokens, so the model itself is always right."""
    first = lm.generate(TURNS[0], NEW, return_cache=True)
    options = {"cache": first.cache, "return_scores": True}
    same = lm.generate(TURNS[1], NEW, draft_model=lm, **options)
    assert same.acceptance_rate == 1

    # The cache alone has what came before.
    def count_up(logits, tokens, real):
        last = jnp.take_along_axis(tokens, real.sum(-1, keepdims=True) - 1, axis=1)
        return jnp.where(jnp.arange(V) == (last + 1) % 5, 0.0, -jnp.inf)

    options = {"logits_fn": count_up, "prompt_lookup": 3, "draft_length": 6}
    first = lm.generate([0, 1, 2, 3, 4, 0], 3, logits_fn=count_up, return_cache=True)
    cache = first.cache.resize(64)
    got = lm.generate([[4]], 20, cache=cache, return_scores=True, **options)
    np.testing.assert_array_equal(got.tokens[0], np.arange(4, 25) % 5)
    assert got.acceptance_rate == 1


@pytest.mark.parametrize("speak", [by_stream, by_generate])
@pytest.mark.parametrize("kind", ["long", "dynamic"])
def test_angles_that_depend_on_the_length(kind, speak):
    """Rows outgrow their angles within a turn, or by the prompt of the next."""
    model = long_lm(*() if kind == "long" else (DynamicScaling(4.0, 12),))
    draft = {} if speak is by_stream else {"prompt_lookup": 2}
    whole = WITH_END
    converse(model, speak, model.init_cache(3, 112), whole, **draft, **whole)


def test_a_stream_may_be_asked_for_its_cache_at_any_time(lm):
    prompt, more = prompt_of(5, 2), prompt_of(3, 2, seed=4)
    given = lm.generate(prompt, 4, return_cache=True)
    held = jax.tree.map(np.asarray, given.cache)
    free = np.asarray(lm.generate(more, NEW, cache=given.cache))[:, 3:]
    stream = lm.stream(more, NEW, cache=given.cache)
    assert isinstance(stream, TokenStream) and stream.finish_reason == [None, None]
    texts = np.concatenate([np.asarray(given.tokens), more], axis=1)
    for count in range(NEW):
        if count in (0, 1, 5):
            check_held(stream.cache, np.concatenate([texts, free[:, :count]], axis=1).tolist())
        np.testing.assert_array_equal(next(stream), free[:, count])
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.finish_reason == ["length", "length"]
    # The user's cache is still there, and so is the one that was read along the way.
    jax.tree.map(np.testing.assert_array_equal, held, jax.tree.map(np.asarray, given.cache))
    stream = lm.stream(more, NEW, cache=given.cache)
    stream.close()
    assert list(stream) == [] and stream.finish_reason == [None, None]
    got = lm.generate(prompt, 4, cache=stream.cache)
    whole = lm.generate(np.concatenate([texts, prompt], axis=1), 4)
    np.testing.assert_array_equal(got[:, -4:], whole[:, -4:])


def test_turns_within_the_same_sizes_compile_nothing(lm):
    cache = lm.init_cache(1, 256)
    for turn in range(4):
        with count_compilations() as compiled:
            stream = lm.stream(prompt_of(3 + turn, 1, seed=turn), 10 + turn, cache=cache)
            list(stream)
            out = lm.generate(
                prompt_of(5 + turn, 1), 12 - turn, cache=stream.cache, return_cache=True
            )
            drafted = lm.generate(
                prompt_of(2 + turn, 1),
                7 + turn,
                cache=out.cache,
                return_cache=True,
                prompt_lookup=2,
            )
        cache = drafted.cache
        assert turn == 0 or compiled == []
    assert cache.slots == 256


def test_why_rows_ended(lm):
    prompt = prompt_of(4, 3)
    free = np.asarray(lm.generate(prompt, NEW))[:, 4:]
    some = (set(free[0].tolist()) ^ set(free[1].tolist())) - set(free[2].tolist())
    end, pair = some.pop(), [V - 1, V - 1]
    options = {"end_token": end, "stop_sequences": [pair]}
    rows = [row.tolist() for row in free]
    wanted = ["stop" if len(cut_after(row, [[end], pair])) < NEW else "length" for row in rows]
    assert len(set(wanted)) == 2
    out = lm.generate(prompt, NEW, return_scores=True, **options)
    assert out.finish_reason == wanted
    np.testing.assert_array_equal(out.finished, [reason == "stop" for reason in wanted])
    stream = lm.stream(prompt, NEW, **options)
    list(stream)
    assert stream.finish_reason == wanted
    one = lm.generate(prompt[0], NEW, return_scores=True, prompt_lookup=2, **options)
    assert one.finish_reason == wanted[0] and one.finished.shape == ()
    stream = lm.stream(prompt[1], NEW, **options)
    list(stream)
    assert stream.finish_reason == wanted[1]
    # A row that ends with the last token that it may have was ended by it.
    exact = lm.generate(prompt[0], NEW, return_scores=True, end_token=[], forced_last_token=5)
    assert exact.finish_reason == "length"
    exact = lm.generate(prompt[0], NEW, return_scores=True, end_token=5, forced_last_token=5)
    assert exact.finish_reason == "stop"


def test_why_beams_ended(lm):
    prompt, search = prompt_of(4, 2), {"num_beams": 3, "num_return_sequences": 3}
    out = lm.generate(prompt, 6, end_token=ENDS, pad_token=PAD, return_scores=True, **search)
    ends = [bool(set(row) & set(ENDS)) for row in np.asarray(out.tokens)[:, 4:].tolist()]
    np.testing.assert_array_equal(out.finished, ends)
    assert set(ends) == {True, False}


# Encoder-decoders.


SRC = prompt_of(7, 3, seed=8) % 29
SRC_REAL = np.arange(7) < np.array([[7], [4], [5]])


def test_targets_are_continued():
    """Rows with other sources, of which parts are padding, and targets that end at other times.

    The targets outgrow the angles of the cache, so that their tokens are read again.
    """
    pieces = {"position": RotaryPositionalEncoding(scaling=LONG)}
    model, masked = make_seq2seq(num_kv_heads=2, **pieces), {"src_padding_mask": SRC_REAL}
    # Of its doubled weights one unit in the last place moves the log-probs by up to 1e-4.
    model = jax.tree.map(lambda x: x / 2 if eqx.is_array(x) else x, model)
    first = model.generate(SRC, 6, 3, return_cache=True, **masked, **WITH_END)
    texts = [until_end(row) for row in np.asarray(first.tokens).tolist()]
    check_held(first.cache, texts)
    cache, more = first.cache.resize(64), TURNS[2][:, :4]
    texts = [text + row.tolist() for text, row in zip(texts, more, strict=True)]
    tokens, there = pad(texts, 10)
    whole = model.generate(
        SRC, 19, tgt=tokens, tgt_padding_mask=there, return_scores=True, **masked, **WITH_END
    )
    options = {"tgt": more, "cache": cache, **WITH_END}
    for draft in ({}, {"prompt_lookup": 2}):
        out = model.generate(None, 4 + NEW, return_cache=True, **draft, **options)
        np.testing.assert_array_equal(out.tokens[:, 4:], whole.tokens[:, 10:])
        np.testing.assert_allclose(out.log_probs, whole.log_probs, atol=5e-6)
        said = [until_end(row) for row in np.asarray(whole.tokens)[:, 10:].tolist()]
        check_held(out.cache, [text + row for text, row in zip(texts, said, strict=True)])
    for _ in range(2):  # the cache is not used up
        stream = model.stream(None, 4 + NEW, **options)
        got = np.stack(list(stream), axis=1)
        np.testing.assert_array_equal(got, whole.tokens[:, 10 : 10 + got.shape[1]])
        assert stream.finish_reason == whole.finish_reason
    check_held(stream.cache, [text + row for text, row in zip(texts, said, strict=True)])
    draft = make_seq2seq(window=4, **pieces)
    out = model.generate(SRC, 4 + NEW, draft_model=draft, **masked, **options)
    np.testing.assert_array_equal(out[:, 4:], whole.tokens[:, 10:])


def test_what_targets_begin_with():
    model = make_seq2seq()
    whole = model.generate(SRC, 15, 3)
    for columns in (1, 6):
        begin = np.asarray(whole)[:, :columns]
        np.testing.assert_array_equal(model.generate(SRC, 15, tgt=begin), whole)
    got = np.stack(list(model.stream(SRC, 15, tgt=begin)), axis=1)
    np.testing.assert_array_equal(got, whole[:, 6:])
    one = model.generate(SRC[0], 15, tgt=begin[0], num_beams=2)
    np.testing.assert_array_equal(one[:6], begin[0])
    ragged = model.generate(SRC, 15, tgt=[[3], [3, 5], [3, 7, 8]])
    np.testing.assert_array_equal(ragged[1, 3:], model.generate(SRC[1], 14, tgt=[3, 5])[2:])


def test_odd_calls_are_refused(lm, no_shape_checker):
    model = make_seq2seq()
    held = model.generate(SRC, 6, 3, return_cache=True).cache
    tgt, draft = [[1], [2], [3]], {"draft_model": make_seq2seq()}
    for src, options, match in (
        (None, {}, "src must hold integer ids, got dtype object, with None"),
        (
            None,
            {"tgt": tgt, "cache": held, **draft},
            "src must be ids, which the draft_model has to read, .*got None",
        ),
        (SRC, {"tgt": tgt, "cache": held}, "src must be None, for the cache has it, .*got ids"),
        (None, {"tgt": tgt, "cache": held, "src_padding_mask": SRC_REAL}, "src_padding_mask is of"),
        (None, {"cache": held}, "tgt must be the ids that come after those of the cache"),
        (None, {"cache": held, "tgt": tgt[:2]}, "cache must have the prompt's 2 rows, got 3"),
        (SRC, {"tgt": tgt, "start_token": 3}, "start_token is what targets begin with where tgt"),
        (SRC, {"tgt": tgt[:2]}, r"tgt must have a row for each row of src.*\(3,\), got \(2,\)"),
        (SRC[0], {"tgt": tgt[:1]}, r"tgt must have a row for each row of src.*\(\), got \(1,\)"),
        (SRC, {"start_token": 3, "tgt_padding_mask": SRC_REAL}, "tgt_padding_mask is of tgt"),
        (SRC, {"tgt": [[V]] * 3}, "tgt must be ids from 0 to"),
        (SRC, {"tgt": prompt_of(9, 3)}, "max_length must be an integer of at least 10"),
        (None, {"cache": held, "tgt": tgt, "num_beams": 2}, "cache does not go with num_beams"),
        (None, {"cache": lm.init_cache(3, 20), "tgt": tgt}, "cache must be one of this model"),
    ):
        with pytest.raises(ValueError, match=match):
            model.generate(src, 9, **options)
    with pytest.raises(ValueError, match="return_cache is not for streaming.*as an attribute"):
        lm.stream(TURNS[0], 3, return_cache=True)
    with pytest.raises(ValueError, match="cache must be a Cache, got a Generation"):
        lm.stream(TURNS[0], 3, cache=lm.generate(TURNS[0], 2, return_cache=True))
    with pytest.raises(ValueError, match="max_new_tokens must leave room"):
        make_lm().generate(TURNS[0], 27, draft_model=make_lm(), cache=None)


def test_a_stream_of_numbers_that_are_none_ends():
    model = make_lm()
    weight = lambda m: m.embedding.token_embedding.weight  # noqa: E731
    broken = eqx.tree_at(weight, model, replace_fn=lambda w: w.at[7].set(jnp.nan))
    stream = broken.stream([[1, 7]], 3)
    with pytest.raises(FloatingPointError, match="NaN"):
        next(stream)
    assert list(stream) == []
