"""Position schemes against transformers, and what they must not accept."""

import dataclasses
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import AttentionMask, Transformer, TransformerLM
from jaxformers.positions.absolute import (
    LearnablePositionalEncoding,
    SinusoidalPositionalEncoding,
)
from jaxformers.positions.bias import (
    ALiBi,
    T5PositionBias,
)
from jaxformers.positions.length_scaling import (
    DynamicScaling,
    LongScaling,
    long_attention_factor,
)
from jaxformers.positions.rotary import (
    RotaryPositionalEncoding,
)
from jaxformers.positions.scaling import (
    LinearScaling,
    Llama3Scaling,
    ProportionalScaling,
    YarnScaling,
    yarn_attention_factor,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

SHORT, LONG = [1.0, 1.1, 1.5, 2.0], [1.0, 2.5, 7.0, 30.0]  # a number per pair of 8 features
ORIGINAL = 10
# What a checkpoint says, and the same here; the original length is ORIGINAL where it is not given.
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, LinearScaling(3.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, DynamicScaling(3.0, ORIGINAL)),
    "proportional": (
        {"rope_type": "proportional", "factor": 1.5, "partial_rotary_factor": 0.7},
        ProportionalScaling(0.7, 1.5),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        Llama3Scaling(8.0, 1.0, 4.0, 256),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        YarnScaling(4.0, 512),
    ),
    "yarn without a ramp": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
        YarnScaling(4.0, 6),
    ),
    "yarn with everything": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
        YarnScaling(4.0, 512, 20.0, 2.0, yarn_attention_factor(4.0, 0.7, 0.4), truncate=False),
    ),
    "yarn with its own attention factor": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.7,
        },
        YarnScaling(4.0, 512, attention_factor=1.7),
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": ORIGINAL,
        },
        LongScaling(SHORT, LONG, ORIGINAL, long_attention_factor(4.0, ORIGINAL)),
    ),
}
each_scaling = pytest.mark.parametrize("name", SCALINGS)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tensor(x):
    return torch.tensor(np.asarray(x))


def llama_config(name, theta=10000.0, head_dim=8):
    from transformers import LlamaConfig

    parameters = {**SCALINGS[name][0], "rope_theta": theta}
    return LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        head_dim=head_dim,
        max_position_embeddings=ORIGINAL,
        rope_parameters=parameters,
    )


def rotated_by_llama(config, x, positions):
    from transformers.models.llama import modeling_llama as llama

    rotary = llama.LlamaRotaryEmbedding(config)  # a new one: it remembers the longest sequence
    cos, sin = rotary(tensor(x), tensor(positions))
    return llama.apply_rotary_pos_emb(tensor(x), tensor(x), cos, sin)[0].numpy()


# Rotary positions.


@each_scaling
@pytest.mark.parametrize("theta", [10000.0, 500.0, 1e6])
@pytest.mark.parametrize("length", [3, ORIGINAL, ORIGINAL + 1, 97])
def test_frequencies_are_those_of_transformers(name, theta, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, scaling = SCALINGS[name]
    init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    expected, expected_factor = init(llama_config(name, theta), seq_len=length)
    frequencies, factor = scaling.frequencies(theta, 8, jnp.arange(length))
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(factor, expected_factor, rtol=1e-7)


def test_frequencies_of_many_pairs():
    """The ramps of a head of 128 features, at the lengths of real checkpoints."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, length in [("llama3", 8192), ("yarn", 32768), ("yarn with everything", 4096)]:
        config = llama_config(name, 5e5, 128)
        config.rope_parameters["original_max_position_embeddings"] = length
        expected, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
        scaling = dataclasses.replace(SCALINGS[name][1], original_length=length)
        frequencies, _ = scaling.frequencies(5e5, 128, jnp.arange(3))
        np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)


@each_scaling
def test_scaled_rotation_is_that_of_llama(name):
    """Each row of a batch by itself: transformers takes the longest row's length for all."""
    config, position = llama_config(name, 500.0), RotaryPositionalEncoding(500.0)
    scaled = RotaryPositionalEncoding(500.0, scaling=SCALINGS[name][1])
    x = normal(3, 2, 5, 8)
    positions = jnp.array([[0, 1, 2, 3, 4], [30, 31, 7, 5, 0], [9, 3, 2, 1, 0]])
    ours = jax.jit(scaled.rotate)(x, positions)
    for row in range(3):
        theirs = rotated_by_llama(config, x[row : row + 1], positions[row : row + 1])
        assert_close(ours[row : row + 1], theirs)
        assert_close(scaled.rotate(x[row], positions[row]), theirs[0])
    assert np.abs(ours - position.rotate(x, positions)).max() > 1e-2


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rows_of_a_batch_have_their_own_length(name):
    position = RotaryPositionalEncoding(scaling=SCALINGS[name][1])
    x = normal(2, 3, 4, 8)
    for longest in (5, 9, 10, 40):
        other = jnp.array([-1, 0, 3, longest])
        own = jnp.array([-1, -1, 11, 12])
        both = position.rotate(x, jnp.stack([own, other]))
        np.testing.assert_array_equal(both[0], position.rotate(x[0], own))
        np.testing.assert_array_equal(both[1], position.rotate(x[1], other))
        assert np.isfinite(both).all()
    padding = jnp.full(4, -1)
    assert np.isfinite(position.rotate(x, padding)).all()


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_decoding_one_token_at_a_time_has_the_angles_of_transformers(name):
    from transformers.models.llama import modeling_llama as llama

    position = RotaryPositionalEncoding(scaling=SCALINGS[name][1])
    rotary, x = llama.LlamaRotaryEmbedding(llama_config(name)), normal(1, 3, 1, 8)
    for step in range(ORIGINAL - 3, ORIGINAL + 4):
        cos, sin = rotary(tensor(x), torch.tensor([[step]]))
        theirs = llama.apply_rotary_pos_emb(tensor(x), tensor(x), cos, sin)[0]
        assert_close(position.rotate(x, jnp.array([[step]])), theirs.numpy())


def test_dynamic_scaling_of_a_single_pair_changes_nothing():
    """The fastest pair keeps its frequency, and there is no other."""
    x, positions = normal(3, 5, 2), jnp.arange(50, 55)
    scaled = RotaryPositionalEncoding(scaling=DynamicScaling(3.0, ORIGINAL))
    assert_close(scaled.rotate(x, positions), RotaryPositionalEncoding().rotate(x, positions))


def test_rotation_is_that_of_llama_gptj_and_gpt_neox():
    from transformers.models.gpt_neox import modeling_gpt_neox as neox
    from transformers.models.gptj import modeling_gptj as gptj
    from transformers.models.llama import modeling_llama as llama

    n, t, h, part = 3, 6, 12, 6
    x = normal(2, n, t, h)
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 60, (2, t)))
    config = {"hidden_size": n * h, "num_attention_heads": n}
    rope = {"rope_type": "default", "rope_theta": 300.0}

    llama_rotary = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**config, rope_parameters=rope))
    cos, sin = llama_rotary(tensor(x), tensor(positions))
    theirs, _ = llama.apply_rotary_pos_emb(tensor(x), tensor(x), cos, sin)
    assert_close(RotaryPositionalEncoding(300.0).rotate(x, positions), theirs.numpy())

    rope["partial_rotary_factor"] = part / h
    neox_rotary = neox.GPTNeoXRotaryEmbedding(neox.GPTNeoXConfig(**config, rope_parameters=rope))
    cos, sin = neox_rotary(tensor(x), tensor(positions))
    theirs, _ = neox.apply_rotary_pos_emb(tensor(x), tensor(x), cos, sin)
    assert_close(RotaryPositionalEncoding(300.0, part).rotate(x, positions), theirs.numpy())

    sin, cos = gptj.create_sinusoidal_positions(60, part)[tensor(positions)].chunk(2, -1)
    theirs = tensor(x).transpose(1, 2).clone()
    theirs[..., :part] = gptj.apply_rotary_pos_emb(theirs[..., :part], sin, cos)
    ours = RotaryPositionalEncoding(10000.0, part, interleaved=True).rotate(x, positions)
    assert_close(ours, theirs.transpose(1, 2).numpy())


def test_angles_are_computed_once_for_all_heads_and_layers():
    """XLA joins a cosine with what uses it, and would compute it again for each head and layer."""
    rotary, x = RotaryPositionalEncoding(), jnp.ones((5, 3, 7, 8))

    def rotate(x, positions):
        return sum(jnp.sin(rotary.rotate(x * i, positions)) for i in range(1, 4))

    program = jax.jit(rotate).lower(x, jnp.arange(7)).compile().as_text()
    parts = [part for part in program.split("\n\n") if " cosine(" in part]
    assert len(parts) == 1 and "f32[5,3,7" not in parts[0]
    cos, sin = rotary._cos_sin(8, jnp.arange(7))
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(
        np.stack([cos[0], sin[0]]), [np.cos(angles), np.sin(angles)], atol=1e-6
    )


def test_rotation_of_a_part_with_an_attention_factor_is_that_of_phi3():
    from transformers.models.phi3 import modeling_phi3 as phi3

    n, t, h = 3, 5, 12
    config = phi3.Phi3Config(
        hidden_size=n * h,
        num_attention_heads=n,
        pad_token_id=0,
        max_position_embeddings=4 * ORIGINAL,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 300.0,
            "partial_rotary_factor": 8 / h,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    )
    scaling = LongScaling(SHORT, LONG, ORIGINAL, long_attention_factor(4.0, ORIGINAL))
    position, x = RotaryPositionalEncoding(300.0, 8, scaling=scaling), normal(1, n, t, h)
    for positions in (jnp.arange(t)[None], jnp.arange(ORIGINAL - 2, ORIGINAL + 3)[None]):
        cos, sin = phi3.Phi3RotaryEmbedding(config)(tensor(x), tensor(positions))
        theirs, _ = phi3.apply_rotary_pos_emb(tensor(x), tensor(x), cos, sin)
        assert_close(position.rotate(x, positions), theirs.numpy())


@each_scaling
def test_scalings_are_settings(name):
    """No arrays, equal where their numbers are, and usable as a key of `jit`'s cache."""
    make = partial(RotaryPositionalEncoding, scaling=SCALINGS[name][1])
    position = make(7.0)
    assert jax.tree.leaves(position) == []
    assert hash(position) == hash(make(7.0))
    assert position == make(7.0) == pickle.loads(pickle.dumps(position))
    assert position != make(8.0)
    for other in SCALINGS:
        same = RotaryPositionalEncoding(7.0, scaling=SCALINGS[other][1]) == position
        assert same == (name == other)


def test_rules_of_attention_factors():
    assert yarn_attention_factor(1.0) == 1.0
    assert (
        yarn_attention_factor(8.0)
        == yarn_attention_factor(8.0, 0.7)
        == YarnScaling(8.0, 9).attention_factor
    )
    assert yarn_attention_factor(8.0, 1.0, 1.0) == 1.0
    assert yarn_attention_factor(8.0, 0.0, 1.0) == yarn_attention_factor(8.0)
    assert long_attention_factor(1.0, 4096) == 1.0


# Biases of scores.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "buckets, far",
    [(32, 128), (33, 128), (31, 64), (6, 7), (5, 20), (4, 3), (20, 300), (9, 128), (19, 16)],
)
def test_t5_bias_is_that_of_t5(getkey, causal, buckets, far):
    from transformers.models.t5.modeling_t5 import T5Attention, T5Config

    n, t = 3, 2 * far + 5
    config = T5Config(
        d_model=12,
        num_heads=n,
        is_decoder=causal,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=far,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = T5PositionBias(n, buckets, far, key=getkey())
    assert (ours.num_heads, ours.num_buckets, ours.max_distance) == (n, buckets, far)
    theirs.relative_attention_bias.weight.data = tensor(ours.weight)
    expected = theirs.compute_bias(t, t)[0].detach().numpy()
    bias = ours.bias(jnp.arange(t), jnp.arange(t), n, causal)
    np.testing.assert_array_equal(bias, expected)
    np.testing.assert_array_equal(AttentionMask(causal, bias=ours).score_bias(t, t, n), expected)


def test_t5_bias_follows_positions(getkey):
    """By row, whatever the order, finite at padding, and in float32."""
    scheme = T5PositionBias(3, 8, 20, key=getkey())
    everywhere = scheme.bias(jnp.arange(50), jnp.arange(50), 3)
    q, k = jnp.array([[-1, 40, 2], [7, 6, 49]]), jnp.array([[0, 49, -1, -1], [8, 1, 0, 7]])
    bias = jax.jit(partial(scheme.bias, num_heads=3, causal=False))(q, k)
    assert bias.shape == (2, 3, 3, 4) and np.isfinite(bias).all()
    for row, i, j in np.ndindex(2, 3, 4):
        if q[row, i] >= 0 and k[row, j] >= 0:
            expected = everywhere[:, q[row, i], k[row, j]]
            np.testing.assert_array_equal(bias[row, :, i, j], expected)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), scheme)
    assert half.bias(q, k, 3).dtype == jnp.float32
    # Cached keys that were never written have position -1 too, however far the query is.
    assert np.isfinite(scheme.bias(jnp.array([10**6]), jnp.array([-1, 0, 10**6]), 3, True)).all()


def test_t5_bias_in_models(getkey):
    """One table per stack: one-sided in decoders, two-sided in encoders, cached as uncached."""

    def scheme(key):
        return T5PositionBias(2, 6, 8, key=key)

    def used_rows(grads):
        return list(np.abs(grads.score_bias.weight).sum(1) > 0)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, *inputs):
        return jnp.square(model(*inputs)).sum()

    model = Transformer(13, 13, 8, 2, 1, 1, 16, 20, position=scheme, key=getkey())
    tables = [stack.score_bias.weight for stack in (model.encoder, model.decoder)]
    assert not np.allclose(*tables)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 12)))
    grads = gradient(model, tokens, tokens)
    assert used_rows(grads.decoder) == [True] * 6
    # Of the half for keys ahead, the bucket of distance 0 stays empty: that is in the other half.
    assert used_rows(grads.encoder) == [True, True, True, False, True, True]

    model = TransformerLM(13, 8, 2, 1, 16, 20, position=scheme, key=getkey())
    cache, chunks = model.init_cache(2, 12), []
    for chunk in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        hidden, cache = eqx.filter_jit(model.forward)(chunk, cache=cache)
        chunks.append(model.logits_of(hidden))
    assert_close(jnp.concatenate(chunks, 1), eqx.filter_jit(model.logits)(tokens))


@pytest.mark.parametrize("num_heads", range(1, 41))
def test_alibi_is_that_of_bloom_and_of_mpt(num_heads):
    """Both add slope * key position: the same up to a constant in each row of scores."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    s = 9
    bloom = build_alibi_tensor(torch.ones(1, s, dtype=torch.int64), num_heads, torch.float32)
    mpt = build_mpt_alibi_tensor(num_heads, s)
    for causal in (False, True):
        ours = ALiBi().bias(jnp.array([s - 1]), jnp.arange(s), num_heads, causal)
        for theirs in (bloom.numpy(), mpt.numpy()):
            assert_close(ours - ours[..., :1], theirs - theirs[..., :1])


# Schemes that are added to the embeddings.


@pytest.mark.parametrize("width", [1, 2, 6, 7, 64])
def test_sinusoids_in_halves_are_those_of_marian(width):
    from transformers.models.marian import modeling_marian as marian

    theirs = marian.MarianSinusoidalPositionalEmbedding(60, width).create_weight().numpy()
    ours = SinusoidalPositionalEncoding(60, width, interleaved=False)
    assert_close(ours(60), theirs)
    positions = jnp.array([[5, -1], [3, 59]])
    assert_close(ours.embed(positions), theirs[np.maximum(positions, 0)])


@pytest.mark.parametrize("width", [4, 6, 64])
def test_sinusoids_up_to_the_last_wavelength_are_those_of_m2m_100(width):
    from transformers.models.m2m_100 import modeling_m2m_100 as m2m_100

    table = m2m_100.M2M100SinusoidalPositionalEmbedding.get_embedding(62, width, padding_idx=1)
    ours = SinusoidalPositionalEncoding(60, width, interleaved=False, inclusive=True, offset=2)
    assert_close(ours(60), table[2:].numpy())


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_learned_positions_with_an_offset(getkey, offset, no_shape_checker):
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    rows, width = 9, 4
    ours = LearnablePositionalEncoding(rows, width, offset=offset, key=getkey())
    assert ours.weight.shape == (rows + offset, width)
    assert ours.max_seq_length == rows
    np.testing.assert_array_equal(ours(rows), ours.weight[offset:])
    np.testing.assert_array_equal(
        ours.embed(jnp.array([-1, 8])), ours.weight[offset + jnp.array([0, 8])]
    )
    with pytest.raises(ValueError, match="max_seq_length = 9 tokens, got 10"):
        ours(rows + 1)
    if offset == 2:
        mask = torch.ones(1, rows, dtype=torch.int64)
        for theirs in (
            BartLearnedPositionalEmbedding(rows, width),
            OPTLearnedPositionalEmbedding(rows, width),
        ):
            theirs.weight.data = tensor(ours.weight)
            expected = theirs(mask)[0].detach().numpy()
            np.testing.assert_array_equal(ours(rows), expected)
    model = TransformerLM(13, width, 2, 1, 8, position=ours, key=getkey())
    assert model.max_seq_length == rows
    with pytest.raises(ValueError, match="at most max_seq_length = 9 tokens, got 10"):
        model(jnp.zeros((1, 10), jnp.int32))


# What is refused.

NUMBERS = [0, 0.5, -2.0, float("nan"), float("inf"), "2", None, True, [2.0], 1j]
LENGTHS = [0, -1, 2.5, "8", None, True, float("nan")]
YARN = partial(YarnScaling, 4.0, 512)
LLAMA3 = partial(Llama3Scaling, 8.0)


@pytest.mark.parametrize("bad", NUMBERS)
@pytest.mark.parametrize(
    "constructor",
    [
        LinearScaling,
        lambda factor: ProportionalScaling(0.5, factor),
        lambda factor: DynamicScaling(factor, 8),
        lambda factor: Llama3Scaling(factor, 1.0, 4.0, 8),
        lambda factor: YarnScaling(factor, 8),
        yarn_attention_factor,
        lambda factor: long_attention_factor(factor, 8),
    ],
)
def test_factors(constructor, bad, no_shape_checker):
    with pytest.raises(ValueError, match="^factor must be .* got"):
        constructor(bad)


@pytest.mark.parametrize("bad", LENGTHS)
@pytest.mark.parametrize(
    "constructor",
    [
        partial(DynamicScaling, 2.0),
        partial(Llama3Scaling, 2.0, 1.0, 4.0),
        partial(YarnScaling, 2.0),
        lambda length: LongScaling([1.0], [2.0], length, 1.0),
        partial(long_attention_factor, 2.0),
    ],
)
def test_original_lengths(constructor, bad, no_shape_checker):
    with pytest.raises(ValueError, match="^original_length must be .* got"):
        constructor(bad)


def bad_settings():
    """Calls, and what their errors say."""
    return [
        (lambda: LLAMA3(4.0, 4.0, 8), "high_frequency_factor must be above"),
        (lambda: LLAMA3(0.0, 4.0, 8), "low_frequency_factor must be a finite number above 0"),
        (lambda: LLAMA3(1.0, "4", 8), "high_frequency_factor must be a finite number"),
        (lambda: YARN(1.0, 32.0), "beta_fast must be above beta_slow"),
        (lambda: YARN(float("nan")), "beta_fast must be a finite number"),
        (lambda: YARN(beta_slow=None), "beta_slow must be a finite number"),
        (lambda: YARN(attention_factor=0.0), "attention_factor must be a finite number above 0"),
        (lambda: YARN(truncate=1), "truncate must be True or False"),
        (lambda: yarn_attention_factor(4.0, -1.0, 1.0), "mscale must be a finite number"),
        (lambda: yarn_attention_factor(4.0, 1.0, "1"), "mscale_all_dim must be a finite number"),
        (lambda: long_attention_factor(4.0, 1), "original_length must be at least 2"),
        (lambda: ProportionalScaling(1.5), "share must be at most 1, got 1.5"),
        (lambda: ProportionalScaling(0), "share must be a finite number above 0"),
        (lambda: LongScaling(3.0, [1.0], 8, 1.0), "short_factors must be a list of numbers"),
        (lambda: LongScaling([1.0], "ab", 8, 1.0), "long_factors must be a list of numbers"),
        (lambda: LongScaling([1.0], [1.0, None], 8, 1.0), r"long_factors\[1\] must be a finite"),
        (lambda: LongScaling([-1.0], [1.0], 8, 1.0), r"short_factors\[0\] must be a finite"),
        (lambda: LongScaling([1.0], [1.0], 8, None), "attention_factor must be a finite number"),
        (lambda: RotaryPositionalEncoding(scaling=4.0), r"scaling must be a scaling .* got 4.0"),
        (lambda: RotaryPositionalEncoding(scaling=LinearScaling), "scaling must be a scaling"),
        (lambda: RotaryPositionalEncoding(interleaved="no"), "interleaved must be True or False"),
        (lambda: SinusoidalPositionalEncoding(9, 4, None), "interleaved must be True or False"),
        (
            lambda: SinusoidalPositionalEncoding(9, 4, inclusive=0),
            "inclusive must be True or False",
        ),
        (
            lambda: SinusoidalPositionalEncoding(9, 5, inclusive=True),
            "inclusive needs an even d_mod",
        ),
        (lambda: SinusoidalPositionalEncoding(9, 4, offset=-1), "offset must be an integer of at"),
    ]


@pytest.mark.parametrize("build, words", bad_settings())
def test_settings(build, words, no_shape_checker):
    with pytest.raises(ValueError, match=words):
        build()


def test_scalings_that_do_not_fit_the_heads(no_shape_checker):
    """Said when the attention is built, before anything is computed."""
    long = LongScaling([1.0, 1.0], [2.0, 2.0, 2.0], 8, 1.0)
    for position, words in [
        (RotaryPositionalEncoding(scaling=long), "each of the 4 pairs .* got 2 and 3"),
        (
            RotaryPositionalEncoding(rotary_dim=4, scaling=long),
            "each of the 2 pairs .* got 2 and 3",
        ),
        (RotaryPositionalEncoding(0.5, scaling=YarnScaling(2.0, 8)), "theta above 1, got 0.5"),
    ]:
        with pytest.raises(ValueError, match=words):
            TransformerLM(13, 16, 2, 1, 8, position=position, key=jax.random.key(0))


@pytest.mark.parametrize("bad", [-1, 1.0, None, True, "2", float("nan")])
def test_offsets(bad, no_shape_checker, getkey):
    with pytest.raises(ValueError, match="offset must be an integer of at least 0, got"):
        LearnablePositionalEncoding(9, 4, offset=bad, key=getkey())


def test_sizes_of_t5_biases(no_shape_checker, getkey):
    for arguments, words in [
        ((0,), "num_heads must be an integer of at least 1, got 0"),
        ((2.0,), "num_heads must be an integer of at least 1, got 2.0"),
        ((2, 3), "num_buckets must be at least 4, got 3"),
        ((2, "8"), "num_buckets must be an integer"),
        ((2, 32, 16), "max_distance must be above num_buckets / 2, got 16 and 32"),
        ((2, 32, None), "max_distance must be an integer"),
    ]:
        with pytest.raises(ValueError, match=words):
            T5PositionBias(*arguments, key=getkey())
    with pytest.raises(ValueError, match="key must be a JAX PRNG key"):
        T5PositionBias(2)
    with pytest.raises(ValueError, match="is for 2 heads, got 4"):
        T5PositionBias(2, key=getkey()).bias(jnp.arange(3), jnp.arange(3), 4)
