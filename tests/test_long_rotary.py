"""Angles that depend on how long a row is: cached decoding against the model on all tokens."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_checkpoints import randomize
from programs import trace
from test_generation import KEY, V, compiled_run, make_lm, make_seq2seq, prompt_of

from jaxformers import (
    DynamicScaling,
    LongScaling,
    RotaryPositionalEncoding,
    TransformerLM,
    scan_layers,
)
from jaxformers.cache import CHUNK, SPARE
from jaxformers.generation.sampling import draw, row_keys

ORIGINAL, NEW, WIDTH = 12, 10, 32
LONG = LongScaling([1.0, 1.3, 2.0], [2.5, 6.0, 30.0], ORIGINAL, attention_factor=1.3)
# Rows of 7, 4 and 11 tokens, padded on the left, in the middle and on both sides, which become
# longer than the original length at different times.
PROMPT = prompt_of(13, 3, seed=4)
REAL = np.ones(PROMPT.shape, bool)
REAL[0, :6] = REAL[1, 1:10] = REAL[2, [0, 12]] = False
ROWS = [row[real].tolist() for row, real in zip(PROMPT, REAL, strict=True)]


def long_lm(scaling=LONG, **pieces):
    sizes = {"num_layers": 2, "max_seq_length": 512, "scale": 1.6} | pieces
    return make_lm(position=RotaryPositionalEncoding(scaling=scaling), **sizes)


@pytest.fixture(scope="module")
def lm():
    return long_lm()


@eqx.filter_jit
def prefix_log_probs(model, tokens, lengths):
    """What comes after the first `lengths` tokens of each row, without a cache."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    log_probs = jax.nn.log_softmax(model.logits(tokens, padding_mask=real))
    return jnp.take_along_axis(log_probs, (lengths - 1)[:, None, None], axis=1)[:, 0]


def uncached(log_probs_of, rows, new, choose=lambda log_probs, _: log_probs.argmax(-1)):
    """Tokens and their log-probabilities from a loop that reads each row anew for every token."""
    rows, kept = [list(row) for row in rows], []
    for index in range(new):
        tokens = np.zeros((len(rows), WIDTH), int)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        log_probs = log_probs_of(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows]))
        chosen = np.asarray(choose(log_probs, index))
        kept.append(np.asarray(log_probs)[range(len(rows)), chosen])
        rows = [[*row, int(token)] for row, token in zip(rows, chosen, strict=True)]
    return np.stack([row[-new:] for row in rows]), np.stack(kept, axis=1)


def assert_same(out, wanted):
    tokens, log_probs = wanted
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, -NEW:], tokens)
    np.testing.assert_allclose(out.log_probs, log_probs, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def greedy(lm):
    tokens, log_probs = uncached(partial(prefix_log_probs, lm), ROWS, NEW)
    assert len(set(tokens.ravel())) > 9  # a model that repeats itself would hide errors
    return tokens, log_probs


@pytest.mark.parametrize("kind", ["plain", "scanned", "window"])
def test_each_token_is_that_of_the_uncached_model(lm, greedy, kind):
    if kind == "window":
        lm = long_lm(window=5)
        greedy = uncached(partial(prefix_log_probs, lm), ROWS, NEW)
    elif kind == "scanned":
        lm = scan_layers(lm)
    out = lm.generate(PROMPT, NEW, padding_mask=REAL, return_scores=True)
    assert_same(out, greedy)


def test_sampled_with_penalties_and_as_a_stream(lm):
    options = {"key": KEY, "frequency_penalty": [0.0, 1.5, 0.0], "padding_mask": REAL}
    keys, seen = row_keys(KEY, 3), np.zeros((3, V))

    def choose(log_probs, index):
        penalty = 1.5 * seen * np.array([[0], [1], [0]])
        chosen = draw(log_probs - penalty.astype("float32"), keys, jnp.asarray(index))
        seen[range(3), np.asarray(chosen)] += 1
        return chosen

    wanted = uncached(partial(prefix_log_probs, lm), ROWS, NEW, choose)
    assert_same(lm.generate(PROMPT, NEW, return_scores=True, **options), wanted)
    np.testing.assert_array_equal(np.stack([*lm.stream(PROMPT, NEW, **options)], 1), wanted[0])


def search(log_probs_of, rows, k):
    """Beam search that reads every beam anew for every token, of a row without an end token."""
    beams = [[(0.0, row)] for row in rows]
    for _ in range(NEW):
        tokens = np.zeros((len(rows) * k, WIDTH), int)
        started = (beam for row_beams in beams for beam in [*row_beams, *row_beams][:k])
        for i, (_, row) in enumerate(started):
            tokens[i, : len(row)] = row
        lengths = [len(row[0][1]) for row in beams for _ in range(k)]
        log_probs = np.asarray(log_probs_of(jnp.asarray(tokens), jnp.asarray(lengths)))
        log_probs = log_probs.reshape(len(rows), k, V)
        beams = [
            sorted(
                (
                    (total + float(log_probs[i, j, token]), [*row, token])
                    for j, (total, row) in enumerate(row_beams)
                    for token in range(V)
                ),
                reverse=True,
            )[:k]
            for i, row_beams in enumerate(beams)
        ]
    return [[(total / NEW, row[-NEW:]) for total, row in row_beams] for row_beams in beams]


def test_beams(lm):
    out = lm.generate(
        PROMPT, NEW, padding_mask=REAL, num_beams=2, num_return_sequences=2, return_scores=True
    )
    wanted = search(partial(prefix_log_probs, lm), ROWS, 2)
    flat = [beam for row in wanted for beam in row]
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, -NEW:], [row for _, row in flat])
    np.testing.assert_allclose(out.scores, [score for score, _ in flat], rtol=1e-5, atol=2e-5)


DRAFTS = {
    "the model itself": (lambda lm: {"draft_model": lm}, None),
    "another model": (lambda lm: {"draft_model": long_lm(window=5), "draft_length": SPARE}, KEY),
    "lookup": (lambda lm: {"prompt_lookup": 2, "draft_length": 3}, None),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts(lm, name):
    """A guess beyond the original length must not change the angles of those before it."""
    make, key = DRAFTS[name]
    options = {"padding_mask": REAL, "key": key, "return_scores": True}
    wanted = lm.generate(PROMPT, NEW, **options)
    out = lm.generate(PROMPT, NEW, **options, **make(lm))
    assert_same(out, (np.asarray(wanted.tokens)[:, -NEW:], wanted.log_probs))
    assert name != "the model itself" or out.acceptance_rate == 1


@pytest.mark.parametrize("window", [None, 5])
def test_turns_of_a_chat(lm, window):
    """A row may become long while it is answered, or by the next turn's prompt, or be so."""
    lm = lm if window is None else long_lm(window=window)
    turns = [prompt_of(4, 3, seed=i) for i in range(3)]
    # Rows of 1 to 4 tokens a turn: after the first they have 4 to 7, then 8 to 14 and so on.
    there = [np.arange(4) >= np.array([[3], [i], [0]]) for i in range(3)]
    there[2][2] = [True, False, True, False]
    cache, texts = lm.init_cache(3, 128), [[], [], []]
    for turn, real in zip(turns, there, strict=True):
        options = {"padding_mask": real, "return_scores": True, "return_cache": True}
        out = lm.generate(turn, 5, cache=cache, **options)
        texts = [[*text, *row[r]] for text, row, r in zip(texts, turn, real, strict=True)]
        tokens, log_probs = uncached(partial(prefix_log_probs, lm), texts, 5)
        np.testing.assert_array_equal(np.asarray(out.tokens)[:, -5:], tokens)
        np.testing.assert_allclose(out.log_probs, log_probs, rtol=1e-5, atol=2e-5)
        texts = [[*text, *row] for text, row in zip(texts, tokens, strict=True)]
        cache = out.cache
    assert min(map(len, texts)) > ORIGINAL


def test_a_cache_by_hand(lm):
    """In chunks, over the border, back before it and over it again."""

    @eqx.filter_jit
    def extend(cache, tokens, real):
        hidden, cache = lm.forward(tokens, padding_mask=real, cache=cache)
        return jax.nn.log_softmax(lm.logits_of(hidden[:, -1:]))[:, 0], cache

    text, real = prompt_of(20, 2, seed=8), np.ones((2, 20), bool)
    real[1, 4:7] = False

    def check(cache, start, stop):
        part = np.s_[:, start:stop]
        got, cache = extend(cache, jnp.asarray(text[part]), jnp.asarray(real[part]))
        rows = [row[:stop][r[:stop]].tolist() for row, r in zip(text, real, strict=True)]
        tokens, log_probs = uncached(partial(prefix_log_probs, lm), rows, 1)
        np.testing.assert_allclose(
            got[np.arange(2), tokens[:, 0]], log_probs[:, 0], rtol=1e-5, atol=2e-5
        )
        return cache

    cache = lm.init_cache(2, 24)
    for start in (0, 4, 8, 12):
        cache = check(cache, start, start + 4)
    cache = cache.rewind(jnp.int32(8)).take(jnp.array([0, 1]))
    for start in (8, 12, 16):
        cache = check(cache, start, start + 4)


def test_the_border_is_wider_than_a_chunk():
    """Rows are read again in chunks."""
    original, new = CHUNK + 60, 6
    lm = long_lm(LongScaling(LONG.short_factors, LONG.long_factors, original, 1.1))
    prompt = prompt_of(original - 2, 2)
    out = lm.generate(prompt, new, return_scores=True)
    for size in (original - 1, original, original + 1, original + new - 3):
        rows = jnp.asarray(out.tokens)[:, : original + new - 2]
        log_probs = prefix_log_probs(lm, rows, jnp.full(2, size))
        np.testing.assert_array_equal(out.tokens[:, size], log_probs.argmax(-1))
        got = out.log_probs[:, size - original + 2]
        np.testing.assert_allclose(got, log_probs.max(-1), rtol=1e-5, atol=2e-5)


def test_an_encoder_decoder():
    model = make_seq2seq(position=RotaryPositionalEncoding(scaling=LONG))
    src, real = (
        jnp.asarray(prompt_of(9, 2, seed=3) % 29),
        jnp.ones((2, 9), bool).at[1, 5:].set(False),
    )

    @eqx.filter_jit
    def log_probs_of(tokens, lengths):
        masks = {"src_padding_mask": real, "tgt_padding_mask": jnp.arange(WIDTH) < lengths[:, None]}
        log_probs = model(src, tokens, **masks)
        return jnp.take_along_axis(log_probs, (lengths - 1)[:, None, None], axis=1)[:, 0]

    tokens, log_probs = uncached(log_probs_of, [[3], [3]], 20)
    assert len(set(tokens.ravel())) > 9
    for options in ({}, {"prompt_lookup": 2}):
        out = model.generate(src, 21, 3, [], src_padding_mask=real, return_scores=True, **options)
        np.testing.assert_array_equal(out.tokens[:, 1:], tokens)
        np.testing.assert_allclose(out.log_probs, log_probs, rtol=1e-5, atol=2e-5)


def conditions(model, slots):
    cache = model.init_cache(2, slots)
    program = trace(lambda cache, x: model.forward(x, cache=cache)[0], cache, jnp.ones((2, 1), int))
    return [equation for equation in program if equation.primitive.name == "cond"]


def test_models_that_do_not_depend_on_length_pay_nothing(lm):
    plain = make_lm(position=RotaryPositionalEncoding())
    assert plain.init_cache(2, 30).rotated_for is None and not conditions(plain, 30)
    assert not conditions(lm, ORIGINAL) and not conditions(long_lm(DynamicScaling(4.0, 9)), 30)
    assert len(conditions(lm, ORIGINAL + 1)) == 1


def test_the_cache_is_written_in_place():
    """Nothing of its size is copied for a token; what reads a row again is apart."""
    lm = long_lm(num_layers=1)
    program, slots = compiled_run(lm, prompt_of(4, 1), 100)
    bodies = re.findall(r" while\(.*body=(%\S+?),", program)
    texts = [program[program.index(f"\n{body} (") :] for body in bodies]
    texts = [
        text[: text.index("\n}")] for text in texts if "conditional(" in text[: text.index("\n}")]
    ]
    assert len(texts) == 1 and f"{slots},6]" in texts[0]
    assert not re.findall(rf".*= f32\[[\d,]*{slots},6\]\S* copy\(.*", texts[0])


# Dynamic scaling, which decodes as transformers does.


def test_drafts_with_dynamic_scaling():
    """A call of several tokens would have the angles of the last guess."""
    lm = long_lm(DynamicScaling(4.0, ORIGINAL))
    wanted = lm.generate(PROMPT, NEW, padding_mask=REAL, return_scores=True)
    out = lm.generate(PROMPT, NEW, padding_mask=REAL, return_scores=True, prompt_lookup=2)
    assert_same(out, (np.asarray(wanted.tokens)[:, -NEW:], wanted.log_probs))


def test_turns_with_dynamic_scaling():
    """Each turn reads its row at the length of the prompt, as one call with the whole text."""
    lm = long_lm(DynamicScaling(4.0, ORIGINAL))
    cache, text = lm.init_cache(2, 128), np.zeros((2, 0), int)
    for seed in range(3):
        turn = prompt_of(5, 2, seed=seed)
        out = lm.generate(turn, 5, cache=cache, return_scores=True, return_cache=True)
        text, cache = np.concatenate([text, turn], axis=1), out.cache
        whole = lm.generate(text, 5, return_scores=True)
        np.testing.assert_array_equal(out.tokens[:, -5:], whole.tokens[:, -5:])
        np.testing.assert_allclose(out.log_probs, whole.log_probs, rtol=1e-5, atol=2e-5)
        text = np.asarray(whole.tokens)


@pytest.mark.parametrize("kind", ["phi3", "dynamic"])
def test_transformers_across_the_border(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {
        **{"vocab_size": V, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": False},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
    }
    if kind == "phi3":
        factors = {"short_factor": list(LONG.short_factors), "long_factor": list(LONG.long_factors)}
        config = transformers.Phi3Config(
            **sizes,
            max_position_embeddings=64,
            original_max_position_embeddings=ORIGINAL,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
        )
    else:
        config = transformers.LlamaConfig(
            **sizes,
            max_position_embeddings=ORIGINAL,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(theirs.eval())
    theirs.save_pretrained(tmp_path)
    ours = TransformerLM.from_pretrained(tmp_path)
    for row in ROWS:
        wanted = theirs.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)
        got = ours.generate(np.asarray(row), NEW)
        np.testing.assert_array_equal(got, wanted[0])
        assert len(set(wanted[0, -NEW:].tolist())) > 3
