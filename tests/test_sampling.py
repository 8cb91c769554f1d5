"""From logits to a token where numbers are extreme: nothing underflows, nothing overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import KEY, make_lm, prompt_of

from jaxformers import RotaryPositionalEncoding
from jaxformers.generation.plan import SAMPLING
from jaxformers.generation.processors import History, RepetitionPenalty
from jaxformers.generation.sampling import Warper, draw, first_highest, per_row, row_keys

FAR = np.array([[0.0, -200.0, -150.0, -120.0, -300.0]], np.float32)


def warp(logits, keep=1, **numbers):
    """The logits after the steps named, whose numbers are read as those of `generate` are."""
    logits = jnp.asarray(logits)
    arrays = {
        name: per_row(name, number, len(logits), *SAMPLING[name])
        for name, number in numbers.items()
    }
    return np.asarray(Warper(**arrays, keep=keep)(logits))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "numbers",
    [
        {"min_p": 0.1},
        {"top_p": 0.9},
        {"typical_p": 0.9},
        {"top_k": 1},
        {"min_p": 1.0, "top_p": 0.5, "temperature": 1e-3},
        {"min_p": 1e-30, "typical_p": 0.01, "top_k": 1, "temperature": 0.5},
    ],
    ids=str,
)
def test_what_has_to_be_kept_is_ranked_by_logits(numbers):
    """All probabilities but one are 0 in float32."""
    for keep, kept in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3, 4])):
        got = warp(FAR, keep, **numbers)
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(got[0])), kept)


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
def test_all_of_the_probability_is_every_token(name):
    """For some rows, and for all; sums of probabilities reach 1 before the last token."""
    logits = np.tile(np.r_[FAR[0], np.zeros(5000)], (2, 1)).astype(np.float32)
    np.testing.assert_array_equal(warp(logits, **{name: 1.0}), logits)
    got = np.isfinite(warp(logits, **{name: [1.0, 0.3]}))
    assert got[0].all() and not got[1, :5][np.argmin(FAR)]


def test_all_of_the_probability_after_another_cut_cuts_nothing_more():
    logits = np.array([[2.0, 1.0, 0.0, -1.0, -200.0]] * 2, np.float32)
    wanted = warp(logits, top_k=3)
    assert np.isfinite(wanted).sum() == 6
    np.testing.assert_array_equal(warp(logits, top_k=3, top_p=1.0), wanted)
    got = np.isfinite(warp(logits, top_k=[3, 4], top_p=[1.0, 0.5])).sum(axis=-1)
    np.testing.assert_array_equal(got, [3, 1])


NEUTRAL = {"temperature": 1.0, "top_k": 23, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@pytest.mark.parametrize("numbers", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_numbers_that_cut_nothing_leave_the_other_cuts_alone(numbers):
    logits = np.random.default_rng(3).normal(size=(4, 23)).astype(np.float32)
    logits[1, 4:] = -np.inf
    got, alone = warp(logits, **NEUTRAL | numbers), warp(logits, **numbers)
    np.testing.assert_array_equal(got, alone)
    assert (np.isfinite(got).sum(-1) < np.isfinite(logits).sum(-1)).any()
    # In one batch, where some rows are cut and others are not.
    (name, number), neutral = *numbers.items(), NEUTRAL
    mixed = warp(logits, **neutral | {name: [number, number, neutral[name], neutral[name]]})
    np.testing.assert_array_equal(mixed, np.concatenate([alone[:2], logits[2:]]))


def test_a_small_min_p_cuts_what_is_less_probable():
    logits = np.array([[0.0, -60.0, -80.0, -100.0]], np.float32)
    np.testing.assert_array_equal(np.isfinite(warp(logits, min_p=1e-30)), [[1, 1, 0, 0]])
    np.testing.assert_array_equal(np.isfinite(warp(logits, min_p=0.0)), [[1, 1, 1, 1]])


STEEP = np.array(
    [
        [-3.0, 4.9, np.nextafter(np.float32(5), np.float32(4)), 5.0, -np.inf, 0.0],
        [-9.0, -4.0, -3.0, -5.0, -np.inf, -np.inf],
        [0.0, 1e30, 3e30, -3e38, 2e30, 2.9e30],
        [-3.4e38, -1e5, -2e5, -3e5, -np.inf, -1e6],
    ],
    np.float32,
)


@pytest.mark.few(3)
@pytest.mark.parametrize("temperature", [1e-12, 1e-25, 1e-38, 1e-42, 1e-300, jnp.bfloat16(1e-38)])
def test_a_temperature_near_0_takes_the_most_probable_token(temperature):
    for others in ({}, {"top_p": 0.9}, {"typical_p": 0.9}, {"min_p": 0.1, "top_k": 3}):
        warped = warp(STEEP, temperature=temperature, **others)
        assert not np.isnan(warped).any()
        for seed in range(3):
            tokens = draw(jnp.asarray(warped), row_keys(jax.random.key(seed), 4), jnp.asarray(0))
            np.testing.assert_array_equal(tokens, [3, 2, 2, 1])


def test_each_row_has_its_own_temperature():
    """A cold row changes nothing in the others, and what is not known yet may be 0."""
    logits = STEEP[[0, 0, 0]]
    warped = warp(logits, temperature=[1.0, 1e-38, 2.0])
    np.testing.assert_array_equal(warped[[0, 2]], logits[[0, 2]] / np.float32([[1], [2]]))
    assert np.argmax(warped[1]) == 3
    traced = jax.jit(lambda t: Warper(temperature=t)(jnp.asarray(logits)))
    np.testing.assert_array_equal(traced(jnp.array([1.0, 0.0, 1e-40])).argmax(-1), [3, 3, 3])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_logits_of_16_bits(dtype):
    logits = jnp.asarray([[1.0, 4.0, 3.0]], dtype)
    got = warp(logits, temperature=1e-38, top_p=0.9)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isfinite(got), [[0, 1, 0]])
    np.testing.assert_array_equal(warp(logits, temperature=dtype(0.5)), [[2.0, 8.0, 6.0]])


def test_numbers_beyond_float32_mean_the_last_one_within():
    np.testing.assert_allclose(warp(FAR, temperature=1e300), 0 * FAR, atol=1e-30)
    np.testing.assert_array_equal(np.isfinite(warp(FAR, top_p=1e-60)), [[1, 0, 0, 0, 0]])


@pytest.mark.parametrize("given", [0, 0.0, [0.5, 0.0], -1, np.array([1, np.inf])])
def test_a_temperature_of_0_says_what_to_do(given):
    with pytest.raises(ValueError, match="temperature must be a number above 0.*top_k=1"):
        per_row("temperature", given, 2, *SAMPLING["temperature"])


@pytest.mark.parametrize("penalty", [1e-38, 1e38])
def test_an_extreme_penalty_gives_numbers(penalty):
    history = History(jnp.array([[1, 2, 0]]), jnp.array([0]), jnp.asarray(1), jnp.asarray(2))
    logits = jnp.asarray([[3.0, 4.0, -5.0, -jnp.inf]])
    got = np.asarray(RepetitionPenalty(penalty)(None, logits, history)[1])
    assert np.isfinite(got[0, :3]).all() and got[0, 3] == -np.inf
    assert np.argmax(got) == (1 if penalty < 1 else 0)


def top_of(row, k, p):
    """The places that a sort of one row keeps, with those that are tied with the last one."""
    best = np.sort(row)[::-1]
    probs = np.exp(np.float64(best) - best[0]) * (best >= best[k - 1])
    before = np.cumsum(probs) - probs
    count = k if p == 1 else np.count_nonzero(before < p * probs.sum())
    return (row >= best[count - 1]) & np.isfinite(row)


@pytest.mark.parametrize("spread", [0.1, 3.0, 1e30])
def test_cuts_are_those_of_a_sort(spread):
    logits = spread * np.random.default_rng(5).normal(size=(4, 300)).astype(np.float32)
    logits[1] = np.round(logits[1] / spread) * spread  # many are tied, at 0 and -0 too
    logits[2, 40:] = -np.inf
    k, p = np.array([300, 20, 50, 7]), np.array([0.43, 0.9, 0.77, 1.0], np.float32)
    got = np.isfinite(warp(logits, top_k=k, top_p=p))
    np.testing.assert_array_equal(got, [top_of(*row) for row in zip(logits, k, p, strict=True)])


@pytest.mark.few(4)
@pytest.mark.parametrize("seed", range(8))
def test_cuts_of_many_tokens(seed):
    """Rows that end among the highest logits and rows that do not, which do not change others."""
    rng = np.random.default_rng(seed)
    v = int(rng.choice([127, 128, 129, 1000, 5003]))
    logits = np.float32(rng.choice([0.3, 2.0, 6.0], (9, 1))) * rng.normal(size=(9, v))
    logits[1] = np.round(logits[1])  # many are tied, at the border of any cut
    logits[2] = 0
    logits[3, rng.random(v) < 0.99] = -np.inf
    logits[4] += 1e4
    logits[5, rng.integers(v)] = 40  # certain
    logits[6:] = np.sort(logits[6:], axis=-1)
    logits = logits.astype(np.float32)
    k = rng.choice([1, 2, 50, 126, 127, 128, 129, 400, v], 9).clip(max=v)
    p = rng.choice([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0], 9).astype(np.float32)
    for numbers in ({"top_k": k}, {"top_p": p}, {"top_k": k, "top_p": p}):
        got = warp(logits, **numbers)
        alone = [
            warp(row[None], **{n: x[i] for n, x in numbers.items()})[0]
            for i, row in enumerate(logits)
        ]
        np.testing.assert_array_equal(got, alone)
        ks, ps = numbers.get("top_k", [v] * 9), numbers.get("top_p", [1] * 9)
        wanted = [top_of(*row) for row in zip(logits, ks, ps, strict=True)]
        np.testing.assert_array_equal(np.isfinite(got), wanted)


@pytest.mark.parametrize("v", [5, 128, 300])
def test_an_infinite_logit_has_all_of_the_probability(v):
    logits = np.random.default_rng(1).normal(size=(3, v)).astype(np.float32)
    logits[0, 3], logits[1, [1, 4]], logits[2] = np.inf, np.inf, -np.inf
    for k in (3, v):
        got = warp(logits, top_k=k, top_p=0.5)
        np.testing.assert_array_equal(got > -np.inf, logits == np.inf)


def test_cuts_sort_nothing():
    """A sort of 50,000 logits takes a CPU half as long as a small model."""
    logits, numbers = jnp.zeros((2, 3000)), jnp.full(2, 0.5)
    warper = Warper(top_k=jnp.array([3, 4]), top_p=numbers, typical_p=numbers, keep=2)
    program = jax.jit(lambda x: warper(x)).lower(logits).compile().as_text()
    assert "reduce" in program and " sort(" not in program


def test_tokens_are_drawn_as_often_as_they_are_probable():
    v, count = 300, 20_000
    logits = np.random.default_rng(2).normal(size=v).astype(np.float32)
    logits[[5, 130, 290]] += 5
    logits[140:250] = -np.inf
    rows = jnp.broadcast_to(logits, (count, v))
    tokens = np.asarray(draw(rows, row_keys(jax.random.key(3), count), jnp.asarray(0)))
    wanted = np.exp(np.float64(logits) - logits.max())
    wanted *= count / wanted.sum()
    got = np.bincount(tokens, minlength=v)
    assert not got[wanted == 0].any()
    likely = wanted > 5
    chi_square = ((got - wanted)[likely] ** 2 / wanted[likely]).sum()
    n = np.count_nonzero(likely)
    assert n > 80 and abs(chi_square - n) < 4 * np.sqrt(2 * n)


def test_a_draw_depends_on_its_row_alone():
    logits = jnp.asarray(3 * np.random.default_rng(4).normal(size=(5, 700)), jnp.float32)
    keys, index = row_keys(jax.random.key(0), 5), jnp.arange(3, 8)
    together = draw(logits, keys, index)
    alone = [draw(logits[i : i + 1], keys[i : i + 1], index[i])[0] for i in range(5)]
    np.testing.assert_array_equal(together, alone)
    others = [draw(logits, keys, index + j) for j in range(1, 4)]
    assert all((other != together).any() for other in others)


# Beams.


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding())


@pytest.mark.parametrize("temperature", [1e-8, 1e-38])
def test_beams_drawn_at_a_low_temperature_are_those_of_beam_search(lm, temperature):
    """Sums of log-probabilities that are divided by it lie far below any of plain ones."""
    search = {"num_beams": 3, "num_return_sequences": 2}
    wanted = lm.generate(prompt_of(4, 2), 6, **search)
    got = lm.generate(prompt_of(4, 2), 6, **search, temperature=temperature, key=KEY)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("length_penalty", [-12.0, 20.0])
def test_sequences_of_one_length_have_one_order_whatever_the_penalty(lm, length_penalty):
    search = {"num_beams": 3, "num_return_sequences": 2, "return_scores": True}
    wanted = lm.generate(prompt_of(4, 2), 12, **search, length_penalty=0.0)
    got = lm.generate(prompt_of(4, 2), 12, **search, length_penalty=length_penalty)
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    scale = np.float64(12) ** length_penalty
    np.testing.assert_allclose(got.scores, np.asarray(wanted.scores) / scale, rtol=1e-5)


def test_a_length_penalty_beyond_float32_is_refused(lm, no_shape_checker):
    for penalty in (-80.0, 80.0, [1.0, 50.0]):
        with pytest.raises(ValueError, match="length_penalty must be a number from -24.1 to 32.2"):
            lm.generate(prompt_of(4, 2), 12, num_beams=2, length_penalty=penalty)


# Tokens tied at the border of a cut, where the docs say what holds.


@pytest.mark.parametrize("keep", [1, 3])
def test_ties_as_in_transformers_but_for_top_p(keep):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch
    import transformers.generation.logits_process as hf

    rng = np.random.default_rng(0)
    cuts = {
        "top_k": (7, hf.TopKLogitsWarper),
        "min_p": (0.2, hf.MinPLogitsWarper),
        "top_p": (0.6, hf.TopPLogitsWarper),
        "typical_p": (0.6, hf.TypicalLogitsWarper),
    }
    logits = rng.integers(-3, 4, (40, 19)).astype(np.float32)
    logits[:3] = 0  # all tokens are tied
    for name, (number, make) in cuts.items():
        cut = make(number, min_tokens_to_keep=keep)
        wanted = np.isfinite(cut(None, torch.tensor(logits)).numpy())
        got = np.isfinite(warp(logits, keep, **{name: number}))
        if name == "top_p":  # all that are tied with one that is kept, and no others
            lowest = np.where(wanted, logits, np.inf).min(-1, keepdims=True)
            np.testing.assert_array_equal(got, logits >= lowest)
            assert (got.sum(-1) > wanted.sum(-1)).any()
        elif name == "typical_p" and keep > 1:
            assert (got | ~wanted).all()
        elif name == "min_p":
            np.testing.assert_array_equal(got.sum(-1), wanted.sum(-1))
        else:
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_highest_is_that_of_argmax(seed):
    draw = np.random.default_rng(seed)
    b, v = int(draw.integers(1, 6)), int(draw.choice([1, 127, 128, 129, *draw.integers(2, 900, 4)]))
    x = draw.integers(-4, 5, (b, v)).astype(np.float32)  # with many ties
    x[draw.random((b, v)) < 0.1] = -np.inf
    x[0] = [-np.inf, x[0], np.inf][seed % 3]
    for function in (first_highest, jax.jit(first_highest)):
        assert function(jnp.asarray(x)).tolist() == x.argmax(-1).tolist()
    rows = jax.vmap(lambda x: first_highest(x[None])[0])(jnp.asarray(x))
    assert rows.tolist() == x.argmax(-1).tolist()
