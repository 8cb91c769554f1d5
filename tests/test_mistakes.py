"""Padding without a mask, and texts longer than those of the training: warned of, once."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import KEY, MAX, D, N, V, make_lm

from jaxformers import Classifier, Dense, RotaryPositionalEncoding, Transformer, TransformerEncoder
from jaxformers.hf.families import FAMILIES
from jaxformers.hf.load import with_origin
from jaxformers.hf.trained_length import trained_length
from jaxformers.mistakes import warn_of_padding
from jaxformers.origin import Origin, SpecialTokens
from jaxformers.output import OutputLayer

OWN = SpecialTokens(start_token=4, end_token=(7, 8), pad_token=3)  # a token for padding alone
SHARED = SpecialTokens(start_token=4, end_token=(7, 8), pad_token=7)  # that of the end, as GPT-2's
START = SpecialTokens(start_token=3, end_token=(7,), pad_token=3)  # that of the start, as T5's
NONE = SpecialTokens(start_token=4, end_token=(7, 8))
CASES = [
    ("tokens", OWN, [[[3, 3, 5, 6], [1, 2, 9, 5]], [[5, 6, 3, 3]], [[5, 3], [1, 2]], [3, 5, 6]],
     [[[5, 3, 3, 6]], [[3, 3, 3]], [[4, 5, 7, 7]], [[1, 2]], [3], [[3], [3]]]),
    ("tokens", SHARED, [[[7, 7, 5, 6]], [[5, 7, 7, 7], [1, 2, 9, 5]], [5, 7, 7]],
     [[[7, 5, 6, 7], [1, 7, 7, 2]], [[8, 8, 5, 6]], [[3, 3, 5]], [[7, 7]], [4, 7]]),
    ("tokens", START, [[[3, 3, 5]], [[5, 6, 3, 3]]], [[[3, 5, 6]], [[5, 6, 3]], [[7, 7, 6]]]),
    ("src", START, [[[3, 5, 6]], [[5, 6, 3], [1, 2, 7]]], [[[5, 6, 7]], [[7, 7, 5]]]),
    ("tgt", START, [[[3, 3, 5]], [[3, 5, 3], [3, 5, 7]]], [[[3, 5, 6], [3, 1, 7]], [3, 5]]),
    ("src", SHARED, [[[5, 7, 7]], [[7, 7, 5]]], [[[5, 6, 7]], [[7, 5, 6]]]),
    ("tokens", NONE, [[[7, 7, 5]], [[5, 8, 8], [1, 2, 3]]],
     [[[7, 8, 5]], [[5, 6, 7]], [[3, 3, 5]]]),
    ("tokens", SpecialTokens(), [], [[[0, 0, 5]], [[5, 0]]]),
]  # fmt: skip


@pytest.mark.parametrize("name, special, padded, whole", CASES)
def test_which_rows_look_padded(name, special, padded, whole):
    for tokens in padded:
        with pytest.raises(UserWarning, match=rf"^{name} has rows .* no {name[:3]}_mask says"):
            warn_of_padding(np.array(tokens), name, f"{name[:3]}_mask", special)
    for tokens in whole:
        warn_of_padding(jnp.array(tokens), name, "mask", special)
    jax.jit(lambda x: warn_of_padding(x, name, "mask", special))(jnp.zeros((2, 3), int))


# Wherever tokens are given.

LENGTH = 9  # of the training
CHECKPOINT = Origin("{}", special_tokens=OWN, trained_length=LENGTH)
ROTARY = {"position": RotaryPositionalEncoding()}
LEFT = jnp.array([[3, 3, 5, 6], [1, 2, 9, 5]])
REAL = LEFT != 3
SIZES = (D, N, 1, 40, MAX, 0.0)


@pytest.fixture(scope="module")
def lm():
    return with_origin(make_lm(**ROTARY), CHECKPOINT)


@pytest.fixture(scope="module")
def seq2seq():
    model = Transformer(29, V, D, N, 1, 1, 40, dropout_rate=0.0, **ROTARY, key=KEY)
    return with_origin(model, CHECKPOINT)


@pytest.fixture(scope="module")
def encoder():
    heads = {"pooler": Dense, "classifier": partial(Classifier, num_labels=2, pooling="pooler")}
    model = TransformerEncoder(V, *SIZES, output=OutputLayer, **heads, **ROTARY, key=KEY)
    return with_origin(model, CHECKPOINT)


def calls(lm, seq2seq, encoder, tokens, **mask):
    """Every way to read tokens without training, and the beginning of its warning."""
    src = {f"src_{name}": value for name, value in mask.items()}
    plain = jnp.array([[4, 5, 6], [4, 1, 2]])
    return [
        ("prompt", lambda: lm.generate(tokens, 2, **mask)),
        ("prompt", lambda: next(lm.stream(tokens, 2, **mask))),
        ("tokens", lambda: lm.score(tokens, **mask)),
        ("src", lambda: seq2seq.generate(tokens, 3, **src)),
        ("src", lambda: next(seq2seq.stream(tokens, 3, **src))),
        ("src", lambda: seq2seq.score(tokens, plain, **src)),
        ("tgt", lambda: seq2seq.score(plain, tokens, tgt_padding_mask=mask.get("padding_mask"))),
        ("src", lambda: seq2seq(tokens, plain, **src)),
        ("src", lambda: seq2seq.encode(tokens, **src)),
        ("tokens", lambda: encoder(tokens, **mask)),
        ("tokens", lambda: encoder.embed(tokens, **mask)),
        ("tokens", lambda: encoder.pooled(tokens, **mask)),
        ("tokens", lambda: encoder.classify(tokens, **mask)),
        ("tokens", lambda: encoder.logits(tokens, **mask)),
    ]


def test_padding_without_a_mask(lm, seq2seq, encoder):
    for name, call in calls(lm, seq2seq, encoder, LEFT):
        with pytest.raises(UserWarning, match=rf"^{name} has rows .* the padding token 3, .*mask="):
            call()


def test_padding_with_a_mask_and_rows_that_say_it(lm, seq2seq, encoder):
    for _, call in calls(lm, seq2seq, encoder, LEFT, padding_mask=REAL):
        call()
    lm.generate(LEFT, 2, padding_mask=jnp.ones(LEFT.shape, bool))  # it is text
    lm.generate([[5, 6], [1, 2, 9]], 2)
    encoder(LEFT, REAL[:, None, None, :])
    jax.jit(lambda model, tokens: model(tokens))(encoder, LEFT)


def test_tokens_that_the_call_names():
    """Those that rows end with or are filled with are padding where several stand at an end."""
    model = make_lm()
    for options in (
        {"pad_token": 3},
        {"pad_token": 3, "end_token": 5},
        {"end_token": 3},
        {"pad_token": 3, "end_token": [5, 3]},
    ):
        with pytest.raises(UserWarning, match="padding token 3"):
            model.generate(LEFT, 2, **options)
    for options in ({}, {"pad_token": 4}, {"end_token": 5}):
        model.generate(LEFT, 2, **options)
    model.generate(LEFT[:, 1:], 2, pad_token=3, end_token=[5, 3])


def test_a_warning_is_given_once_and_names_the_users_line(lm):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (2, 3, 20, 30):
            lm.generate(LEFT, length)
            lm.score(LEFT)
    messages = [str(warning.message) for warning in caught]
    assert [message.split()[0] for message in messages] == ["prompt", "tokens", "with"]
    assert {warning.filename for warning in caught} == {__file__}


# Lengths.


def test_texts_longer_than_those_of_the_training(lm, seq2seq, encoder):
    longer, fits = jnp.ones((2, LENGTH + 1), int), jnp.ones((2, LENGTH), int)
    for name, call in calls(lm, seq2seq, encoder, longer):
        about = "with its new tokens a row may reach" if name == "prompt" else f"{name} has rows"
        with pytest.raises(UserWarning, match=f"^{about}.* beyond {LENGTH} tokens, .*trained"):
            call()
    for call in (
        lambda: lm.generate(fits, 1),
        lambda: lm.generate(LEFT, LENGTH - 3, padding_mask=REAL),
        lambda: seq2seq.generate(LEFT, LENGTH + 1, src_padding_mask=REAL),
    ):
        with pytest.raises(UserWarning, match="with its new tokens a row may reach beyond 9"):
            call()
    lm.score(fits)
    lm.generate(LEFT, LENGTH - 4, padding_mask=REAL)
    seq2seq.generate(fits, LENGTH)
    encoder.embed(fits)


def test_neither_padding_nor_training_count(lm, encoder):
    wide = jnp.pad(LEFT, ((0, 0), (0, LENGTH)))
    real = jnp.pad(REAL, ((0, 0), (0, LENGTH)))
    lm.generate(wide, LENGTH - 4, padding_mask=real)
    lm.score(wide, real)
    encoder.embed(wide, real)
    encoder(jnp.ones((2, LENGTH + 1), int), key=KEY)
    lm(jnp.ones((2, LENGTH + 1), int))
    jax.jit(lambda tokens: encoder(tokens))(wide)


def test_a_conversation_grows_beyond_the_training(lm):
    turn = lm.generate(LEFT, 2, padding_mask=REAL, return_cache=True)
    turn = lm.generate(LEFT[:, 2:], 1, cache=turn.cache, return_cache=True)
    with pytest.raises(UserWarning, match="beyond 9 tokens"):
        lm.generate(LEFT[:, 3:], 1, cache=turn.cache)


def test_a_table_of_positions_has_an_error_of_its_own(no_shape_checker):
    model = with_origin(make_lm(learnable_pos=True), CHECKPOINT)
    model.score(np.ones((2, LENGTH + 1), int))
    with pytest.raises(ValueError, match="max_seq_length"):
        model.score(np.ones((2, MAX + 1), int))


LENGTHS = [
    ("llama", {"max_position_embeddings": 256}, 256),
    ("llama", {}, 2048),
    ("llama", {"max_position_embeddings": None}, None),
    ("gptj", {"n_positions": 512}, 512),
    ("bloom", {"seq_length": 4096}, 4096),
    ("bloom", {}, None),
    ("mpt", {"max_seq_len": 8192}, 8192),
    ("t5", {"n_positions": 512}, 512),
    ("t5", {}, None),
    ("t5", {"n_positions": 10**30}, None),
    ("modernbert", {}, 8192),
    ("llama", {"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 4.0}},
     400),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, 4096),
    ("qwen2", {"max_position_embeddings": 128, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
    ("llama", {"max_position_embeddings": 512, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, 512),
    ("phi3", {"max_position_embeddings": 512, "original_max_position_embeddings": 64,
              "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, 512),
    ("llama", {"max_position_embeddings": 256, "rope_scaling": None}, 256),
]  # fmt: skip


@pytest.mark.parametrize("family, config, wanted", LENGTHS)
def test_the_length_that_a_checkpoint_was_trained_for(family, config, wanted):
    assert trained_length(config, FAMILIES[family]) == wanted
