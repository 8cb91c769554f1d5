"""Processors of one's own: their states in every loop, and what does not fit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array
from test_generation import KEY, V, count_compilations, make_lm, make_seq2seq, prompt_of

from jaxformers import RotaryPositionalEncoding
from jaxformers.generation.processors import (
    BadWords,
    ForcedFirstToken,
    ForcedLastToken,
    FrequencyPenalty,
    LogitsFunction,
    MinNewTokens,
    NoRepeatNgram,
    PresencePenalty,
    Processor,
    RepetitionPenalty,
    SuppressFirstTokens,
    SuppressTokens,
)

NEW = 16


def step(number, token):
    """What a row amounts to after one more token: the order counts, and each token once."""
    return (3 * number + token + 1) % 7


def allow(number, logits):
    """The logits of a few tokens, of which a third is banned by what the row amounts to."""
    tokens = jnp.arange(logits.shape[1])
    banned = (tokens + number[:, None]) % 3 == 0
    return jnp.where(banned | (tokens > 4), -jnp.inf, logits)


def fold(history):
    """What the rows amount to, from all their tokens."""

    def body(i, number):
        return jnp.where(history.real[:, i], step(number, history.tokens[:, i]), number)

    start = jnp.zeros(len(history.tokens), jnp.int32)
    return lax.fori_loop(0, history.tokens.shape[1], body, start)


class Remembers(Processor):
    """It sees each token once, and keeps what the row amounts to."""

    def init_state(self, history):
        return {"number": fold(history)}

    def __call__(self, state, logits, history):
        number = step(state["number"], history.last)
        return {"number": number}, allow(number, logits)


class Recomputes(Processor):
    """The same without a state."""

    def __call__(self, state, logits, history):
        return state, allow(fold(history), logits)


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding(), max_seq_length=512)


def nearby(model):
    return jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(KEY, x.shape) if eqx.is_inexact_array(x) else x,
        model,
    )


RAGGED = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
SAMPLED = {"key": KEY, "temperature": 2.0}
LOOPS = {
    "sampled": SAMPLED,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, **SAMPLED},
    "lookup": {"prompt_lookup": 2, "draft_length": 3},
    "draft": {"draft_length": 3, **SAMPLED},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", LOOPS)
def test_a_state_is_that_of_its_row_in_every_loop(lm, name):
    options = dict(LOOPS[name])
    if name == "draft":
        options["draft_model"] = nearby(lm)
    one, other = (
        lm.generate(RAGGED, NEW, processors=[x], return_scores=True, **options)
        for x in (Remembers(), Recomputes())
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)
    if "draft_length" in options:
        assert 0 < one.acceptance_rate < 1  # some guesses were taken, and some taken back


def test_states_in_streams_in_turns_and_of_targets(lm):
    wanted = np.asarray(lm.generate(RAGGED, NEW, processors=[Recomputes()]))[:, 5:]
    got = np.stack(list(lm.stream(RAGGED, NEW, processors=[Remembers()])), axis=1)
    np.testing.assert_array_equal(got, wanted)

    lookup = lm.generate(RAGGED, NEW, processors=[Remembers()], prompt_lookup=1)
    np.testing.assert_array_equal(lookup[:, 5:], wanted)

    first = lm.generate(RAGGED, 4, processors=[Remembers()], return_cache=True)
    both = [
        lm.generate(prompt_of(3, 3), NEW, cache=first.cache, processors=[x])
        for x in (Remembers(), Recomputes())
    ]
    np.testing.assert_array_equal(*both)

    pair, src = make_seq2seq(), prompt_of(6, 2) % 29
    for options in ({}, {"num_beams": 2}, {"prompt_lookup": 1}):
        one, other = (
            pair.generate(src, NEW, 3, [], processors=[x], **options)
            for x in (Remembers(), Recomputes())
        )
        np.testing.assert_array_equal(one, other)


class OnlyAfter(Processor):
    """A token comes only after another one has come; the example of `Processor`."""

    token: Array = eqx.field(converter=jnp.asarray)
    opener: Array = eqx.field(converter=jnp.asarray)

    def init_state(self, history):
        return (history.real & (history.tokens == self.opener)).any(axis=1)

    def __call__(self, state, logits, history):
        state = state | (history.last == self.opener)
        is_token = jnp.arange(logits.shape[1]) == self.token
        return state, jnp.where(is_token & ~state[:, None], -jnp.inf, logits)


def test_a_token_that_may_come_after_another_one(lm):
    likes_five = LogitsFunction(lambda logits, tokens, real: logits.at[:, 5].add(20.0))
    forced = ForcedFirstToken(7)
    prompt = np.array([[1, 2], [7, 2]])
    never = SuppressTokens([7])
    alone = lm.generate(prompt, 4, processors=[likes_five, OnlyAfter(5, 7), never])
    assert (alone[0, 2:] != 5).all() and (alone[1, 2:] == 5).all()
    after = lm.generate(prompt, 4, processors=[likes_five, OnlyAfter(5, 7), forced])
    assert (after[:, 2] == 7).all() and (after[:, 3:] == 5).all()
    lm.generate(prompt, 4, processors=[likes_five, OnlyAfter(5, 7), RepetitionPenalty(1.1)])
    with count_compilations() as compiled:
        others = [likes_five, OnlyAfter(9, 3), RepetitionPenalty(1.3)]
        lm.generate(prompt, 4, processors=others)
    assert compiled == []


def test_options_are_short_forms(lm):
    prompt, end = prompt_of(6, 2), {"end_token": 4, "pad_token": 0}
    pairs = {
        "repetition_penalty": (1.6, RepetitionPenalty(1.6)),
        "frequency_penalty": (2.0, FrequencyPenalty(2.0)),
        "presence_penalty": ([2.0, 0.5], PresencePenalty([2.0, 0.5])),
        "no_repeat_ngram_size": (1, NoRepeatNgram(1)),
        "bad_words": ([[3], [5, 6]], BadWords([[3], [5, 6]])),
        "suppress_tokens": ([1, 2, 3], SuppressTokens([1, 2, 3])),
        "begin_suppress_tokens": ([4], SuppressFirstTokens([4])),
        "min_new_tokens": (5, MinNewTokens(5)),
        "forced_first_token": (8, ForcedFirstToken(8)),
        "forced_last_token": ([8, 9], ForcedLastToken([8, 9])),
    }
    short = {name: value for name, (value, _) in pairs.items()}
    chain = [processor for _, processor in pairs.values()]
    chain[6] = SuppressFirstTokens([4], index=1)  # after the forced one
    for options in ({}, {"num_beams": 2}):
        np.testing.assert_array_equal(
            lm.generate(prompt, NEW, **short, **end, **options),
            lm.generate(prompt, NEW, processors=chain, **end, **options),
        )


class Grows(Processor):
    def init_state(self, history):
        return jnp.zeros((len(history.tokens), 1), jnp.int32)

    def __call__(self, state, logits, history):
        return jnp.concatenate([state, state], axis=1), logits


class OneForAll(Processor):
    def init_state(self, history):
        return jnp.zeros((), jnp.int32)

    def __call__(self, state, logits, history):
        return state, logits


def test_what_does_not_fit_is_refused(lm, no_shape_checker):
    prompt = prompt_of(4, 2)
    for given, match in (
        (RepetitionPenalty(1.1), "must be a list of Processors"),
        ([lambda logits: logits], "must be a list of Processors.*logits_fn="),
        ([RepetitionPenalty], "must be a list of Processors"),
        ([Grows()], r"Grows must return a state .*int32 \(2, 1\).*int32 \(2, 2\)"),
        ([OneForAll()], r"state of OneForAll must be arrays .* 2 rows, got shapes \[\(\)\]"),
        ([RepetitionPenalty([1.1, 1.2, 1.3])], r"one per row, shape \(2,\), got shape \(3,\)"),
        ([BadWords([[1, V]])], f"words of BadWords must be ids from 0 to {V - 1}"),
        ([SuppressTokens(range(V))], "SuppressTokens must leave a token to choose"),
        ([ForcedLastToken(V)], f"token of ForcedLastToken must be ids from 0 to {V - 1}"),
    ):
        with pytest.raises(ValueError, match=match):
            lm.generate(prompt, 2, processors=given)
    for make, match in (
        (lambda: RepetitionPenalty(0.0), "penalty must be a number above 0"),
        (lambda: NoRepeatNgram(0.5), "size must be an integer of at least 1"),
        (lambda: BadWords([5]), "words must be a list of token sequences"),
        (lambda: MinNewTokens(-1), "least must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
