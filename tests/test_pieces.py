"""Pieces beyond the paper's: that each does what it says, and refuses what it cannot mean."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    Addition,
    AllHeadsNorm,
    Dense,
    Encoder,
    EncoderLayer,
    GatedFeedForward,
    LayerNorm,
    MultiHeadAttention,
    NoNorm,
    OneNorm,
    OutputLayer,
    OutputNorm,
    PerHeadNorm,
    Pieces,
    PostNorm,
    PreNorm,
    Residual,
    RMSNorm,
    RotaryPositionalEncoding,
    Sandwich,
    T5PositionBias,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    TwoNorms,
    load,
    save,
    scan_layers,
)
from jaxformers.mixture_of_experts import MixtureOfExperts

VOCAB, D, N, F, B, T = 13, 8, 2, 12, 2, 5
KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
language_model = partial(TransformerLM, VOCAB, D, N, 2, F, 9, 0.0, key=KEY)


def x_of(getkey, *shape):
    return jax.random.normal(getkey(), shape)


def raises(*words):
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


OPTIONS = {
    "sandwich": Pieces(norm_placement="sandwich", residual_scale=0.7),
    "output": Pieces(norm_placement="output", qk_norm=partial(AllHeadsNorm, RMSNorm)),
    "none": Pieces(norm_placement="none"),
    "one norm": Pieces(parallel="one norm"),
    "two norms": Pieces(parallel="two norms", softcap=0.3),
    "layers differ": Pieces(
        position=RotaryPositionalEncoding(30.0),
        attention_scale=0.9,
        per_layer=lambda i: Pieces(window=2) if i == 0 else Pieces(position=None, window=None),
    ),
    "per head": Pieces(
        num_kv_heads=1, qk_norm=partial(PerHeadNorm, partial(LayerNorm, use_bias=False))
    ),
    "experts": Pieces(feed_forward=partial(MixtureOfExperts, num_experts=3, top_k=2)),
    "buckets": Pieces(position=lambda key: T5PositionBias(N, 6, 7, key=key)),
    "embedding": Pieces(
        embedding=partial(TransformerEmbedding, norm=LayerNorm, embedding_dim=6),
        output=partial(
            OutputLayer, scale=0.3, softcap=2.0, transform=partial(Dense, norm=LayerNorm)
        ),
    ),
    "biases": Pieces(use_bias=False, use_qkv_bias=True, use_logits_bias=True),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoding_with_a_cache_is_the_full_forward(options):
    model = language_model(**options)
    full = model.logits(TOKENS)
    cache, steps = model.init_cache(B, T), []
    for start, stop in [(0, 2), (2, 3), (3, T)]:
        hidden, cache = model.forward(TOKENS[:, start:stop], cache=cache)
        steps.append(model.logits_of(hidden))
    np.testing.assert_allclose(jnp.concatenate(steps, 1), full, atol=1e-5)
    assert all(leaf.size == 0 or jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(full))


@pytest.mark.few(5)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_weight_has_a_gradient_and_no_later_token_is_seen(options):
    model = language_model(**options)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return (model(TOKENS) * jnp.arange(1.0, 1.0 + VOCAB)).sum()

    grads = gradient(model)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # Keys' biases shift all scores of a query alike; some tokens do not come up.
        if not name.endswith("bk"):
            assert jnp.any(grad != 0), name
    changed = TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % VOCAB)
    np.testing.assert_array_equal(model(TOKENS)[:, :-1], model(changed)[:, :-1])


def test_a_residual_puts_its_norms_where_it_says(getkey):
    x, y = x_of(getkey, B, T, D), x_of(getkey, B, T, D)
    norm = partial(RMSNorm, eps=0.5)
    n = norm(D)
    for placement, read, written in [
        ("pre", n(x), x + 0.5 * y),
        ("post", x, n(x + 0.5 * y)),
        ("sandwich", n(x), x + 0.5 * n(y)),
        ("output", x, x + 0.5 * n(y)),
        ("none", x, x + 0.5 * y),
    ]:
        residual = Residual(norm, D, 0.0, placement, 0.5)
        assert residual.placement == placement
        np.testing.assert_allclose(residual.read(x), read, atol=1e-6)
        np.testing.assert_allclose(residual.write(x, y, None), written, atol=1e-6)


def test_parallel_layers_read_the_stream_once(getkey):
    x = x_of(getkey, B, T, D)
    for parallel, read in [
        ("one norm", "self_attention_residual"),
        ("two norms", "feed_forward_residual"),
    ]:
        layer = EncoderLayer(D, N, F, 0.0, parallel=parallel, key=KEY)
        layer = eqx.tree_at(lambda m: m.self_attention_residual.norm.gain, layer, x_of(getkey, D))
        if parallel == "two norms":
            gain = x_of(getkey, D)
            layer = eqx.tree_at(lambda m: m.feed_forward_residual.norm.gain, layer, gain)
        attended = layer.self_attention(layer.self_attention_residual.norm(x))
        expected = x + attended + layer.feed_forward(getattr(layer, read).norm(x))
        np.testing.assert_allclose(layer(x), expected, atol=1e-5)


class LayerScale(eqx.Module):
    """A placement of one's own, as the docstring of `Joint` shows it."""

    norm: LayerNorm
    gain: jax.Array
    add: Addition

    def __init__(self, norm, d_model, add):
        self.norm, self.gain, self.add = norm(d_model), jnp.full(d_model, 0.1), add

    def read(self, x):
        return self.norm(x)

    def write(self, x, y, key):
        return self.add(x, self.gain * y, key)


@pytest.mark.parametrize(
    "build",
    [
        language_model,
        partial(TransformerEncoder, VOCAB, D, N, 2, F, 9, 0.0, key=KEY),
        partial(Transformer, VOCAB, VOCAB, D, N, 2, 2, F, 9, 0.0, key=KEY),
    ],
    ids=["TransformerLM", "TransformerEncoder", "Transformer"],
)
def test_a_placement_of_ones_own(build, tmp_path):
    pytest.importorskip("safetensors")
    model = build(norm_placement=LayerScale)
    tokens = (TOKENS, TOKENS) if isinstance(model, Transformer) else (TOKENS,)

    @eqx.filter_jit
    def out(model):
        return model(*tokens)

    def gains(model):
        where = lambda x: isinstance(x, LayerScale)  # noqa: E731
        return [x.gain for x in jax.tree.leaves(model, is_leaf=where) if where(x)]

    assert len(gains(model)) == 2 * (5 if isinstance(model, Transformer) else 2)
    expected = out(model)
    np.testing.assert_allclose(out(scan_layers(model)), expected, atol=1e-5)
    save(tmp_path / "model", model)
    loaded = load(tmp_path / "model", known=[LayerScale])
    np.testing.assert_array_equal(out(loaded), expected)
    # Ones are the usual placement, and the gains are trained.
    plain = eqx.tree_at(gains, model, replace_fn=jnp.ones_like)
    np.testing.assert_allclose(out(plain), out(build()), atol=1e-6)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: (m(*tokens) ** 2).sum()))(model)
    assert all(jnp.any(gain != 0) for gain in gains(grads))


@pytest.mark.parametrize(
    "name, word, given",
    [
        ("norm_placement", "pre", PreNorm),
        ("norm_placement", "post", PostNorm),
        ("norm_placement", "sandwich", Sandwich),
        ("norm_placement", "output", OutputNorm),
        ("norm_placement", "none", NoNorm),
        ("parallel", "one norm", OneNorm()),
        ("parallel", "two norms", TwoNorms()),
        ("norm_first", True, True),
    ],
)
def test_words_are_short_for_objects(name, word, given):
    layer, same = (EncoderLayer(D, N, F, key=KEY, **{name: x}) for x in (word, given))
    assert eqx.tree_equal(layer, same)
    if name == "norm_placement":
        assert type(layer.feed_forward_residual) is given
    elif name == "parallel":
        assert layer.parallel == given
        with_flag = EncoderLayer(D, N, F, key=KEY, norm_first=True, parallel=given)
        assert eqx.tree_equal(layer, with_flag)


class Mean(eqx.Module):
    """A parallel feed-forward of one's own: it reads halfway between two streams."""

    placement = NoNorm

    def source(self, x, seen):
        return 0.5 * (x + seen)


def test_a_parallel_feed_forward_of_ones_own(getkey):
    x = x_of(getkey, B, T, D)
    layer = EncoderLayer(D, N, F, 0.0, parallel=Mean(), key=KEY)
    seen = layer.self_attention_residual.norm(x)
    expected = x + layer.self_attention(seen) + layer.feed_forward(0.5 * (x + seen))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_norms_over_heads(getkey):
    x = x_of(getkey, B, N, T, 3)
    whole = AllHeadsNorm(RMSNorm, 3, N)
    flat = jnp.swapaxes(x, 1, 2).reshape(B, T, -1)
    expected = jnp.swapaxes(whole.norm(flat).reshape(B, T, N, 3), 1, 2)
    np.testing.assert_allclose(whole(x), expected, atol=1e-6)
    own = PerHeadNorm(partial(LayerNorm, use_bias=False), 3, N)
    own = eqx.tree_at(lambda m: m.norm.gain, own, jnp.arange(1.0, 1 + 3 * N).reshape(N, 3))
    for head in range(N):
        plain = LayerNorm(3)(x[:, head]) * own.norm.gain[head]
        np.testing.assert_allclose(own(x)[:, head], plain, atol=1e-5)


def test_a_gain_counts_from_its_offset(getkey):
    x, gain = x_of(getkey, B, T, D), x_of(getkey, D)
    for norm in (RMSNorm, LayerNorm):
        plain, shifted = norm(D), norm(D, gain_offset=0.75)
        np.testing.assert_allclose(shifted(x), plain(x), atol=1e-6)  # drawn to be the same
        plain = eqx.tree_at(lambda m: m.gain, plain, gain)
        shifted = eqx.tree_at(lambda m: m.gain, shifted, gain - 0.75)
        np.testing.assert_allclose(shifted(x), plain(x), atol=1e-5)


def test_queries_keys_and_values_are_bounded(getkey):
    x = 9.0 * x_of(getkey, B, T, D)
    bounded = MultiHeadAttention(D, N, qkv_clip=0.2, key=KEY)
    kv = bounded.project(x, x, jnp.arange(T))
    for seen in kv:
        assert jnp.abs(seen).max() == jnp.float32(0.2)
    # Queries too: in one dimension and beyond the bound, their size no longer matters.
    ones = [jnp.ones_like(w) for w in (bounded.wq, bounded.wk, bounded.wv)]
    bounded = eqx.tree_at(lambda m: [m.wq, m.wk, m.wv], bounded, ones)
    large, larger = jnp.ones((1, T, D)), 5.0 * jnp.ones((1, T, D))
    np.testing.assert_array_equal(bounded(large, x[:1]), bounded(larger, x[:1]))


def test_layers_that_run_more_than_once(getkey):
    x = x_of(getkey, B, T, D)
    shared = Encoder(2, D, N, F, 0.0, layer_order=[0, 1, 1, 0], key=KEY)
    a, b = shared.layers
    np.testing.assert_allclose(shared(x), shared.norm(a(b(b(a(x))))), atol=1e-5)


def test_both_stacks_have_their_own_sizes():
    model = Transformer(
        VOCAB, VOCAB, D, N, 1, 2, F, 9, decoder_num_heads=4, decoder_d_ff=10, key=KEY
    )
    assert model.encoder.layers[0].self_attention.num_heads == N
    assert model.decoder.layers[0].cross_attention.num_heads == 4
    assert model.decoder.layers[1].feed_forward.w_in.shape == (D, 10)


@pytest.mark.few(12)
@pytest.mark.parametrize(
    "build, words",
    {
        "placement": (
            lambda: language_model(norm_placement="middle"),
            ["norm_placement", "middle"],
        ),
        "placement that is built": (
            lambda: language_model(norm_placement=Residual(LayerNorm, D)),
            ["norm_placement", "PreNorm", "built"],
        ),
        "placement of other arguments": (
            lambda: language_model(norm_placement=lambda norm: norm),
            ["norm_placement", "norm, d_model, add"],
        ),
        "placement that does not write": (
            lambda: language_model(norm_placement=lambda norm, d_model, add: norm(d_model)),
            ["norm_placement", r"write\(x, y, key\)", "LayerNorm"],
        ),
        "parallel as a class": (
            lambda: language_model(parallel=OneNorm),
            ["parallel", r"OneNorm\(\)"],
        ),
        "both words for it": (
            lambda: language_model(norm_first=True, norm_placement="pre"),
            ["norm_first", "norm_placement"],
        ),
        "parallel": (lambda: language_model(parallel=True), ["parallel", "one norm", "True"]),
        "parallel post-norm": (
            lambda: language_model(parallel="two norms", norm_first=False),
            ["parallel", "post"],
        ),
        "parallel with an encoder": (
            lambda: Transformer(VOCAB, VOCAB, D, N, 1, 1, F, 9, parallel="one norm", key=KEY),
            ["parallel", "cross-attention"],
        ),
        "residual scale": (lambda: language_model(residual_scale=0.0), ["residual_scale", "0.0"]),
        "soft-cap": (lambda: language_model(softcap=-1.0), ["softcap", "-1.0"]),
        "bound": (lambda: language_model(qkv_clip=0.0), ["qkv_clip", "0.0"]),
        "offset": (lambda: LayerNorm(D, gain_offset=-1.0), ["gain_offset", "-1.0"]),
        "scale": (lambda: language_model(attention_scale=jnp.inf), ["attention_scale", "inf"]),
        "per layer": (lambda: language_model(per_layer=lambda i: i), ["per_layer", "layer 0"]),
        "per layer, unknown": (
            lambda: language_model(per_layer=lambda i: {"windows": 3}),
            ["per_layer", "windows", "window"],
        ),
        "a layer has no layers": (
            lambda: EncoderLayer(D, N, F, per_layer=lambda i: {}, key=KEY),
            ["EncoderLayer", "per_layer"],
        ),
        "a stack has no embedding": (
            lambda: Encoder(1, D, N, F, embedding=TransformerEmbedding, key=KEY),
            ["Encoder", "embedding"],
        ),
        "order": (
            lambda: Encoder(2, D, N, F, layer_order=[0, 2], key=KEY),
            ["layer_order", "0 to 1", r"\[0, 2\]"],
        ),
        "no output to tie": (
            lambda: TransformerEncoder(VOCAB, D, N, 1, F, 9, tie_embeddings=True, key=KEY),
            ["tie_embeddings", "output=OutputLayer"],
        ),
        "embedding_dim without a transform": (
            lambda: OutputLayer(D, VOCAB, embedding_dim=6, key=KEY),
            ["embedding_dim", "transform="],
        ),
        "bias without gain": (lambda: LayerNorm(D, use_gain=False), ["use_bias=False"]),
        "no table of types": (
            lambda: TransformerEncoder(VOCAB, D, N, 1, F, 9, key=KEY)(TOKENS, token_types=TOKENS),
            ["token_types", "num_token_types"],
        ),
        "bias of experts": (
            lambda: language_model(
                feed_forward=partial(MixtureOfExperts, num_experts=3, top_k=2), use_bias=True
            ),
            ["use_bias"],
        ),
    }.values(),
)
def test_what_cannot_be_meant_is_refused(build, words):
    with raises(*words):
        build()


def test_models_still_share_their_pieces():
    """A constructor handed to three models makes three sets of weights."""
    options = Pieces(norm=RMSNorm, feed_forward=GatedFeedForward, softcap=3.0)
    a, b = language_model(**options), TransformerEncoder(VOCAB, D, N, 1, F, 9, key=KEY, **options)
    assert a.decoder.layers[0].self_attention.softcap == 3.0
    assert b.encoder.layers[0].self_attention.softcap == 3.0
    assert MultiHeadAttention(D, N, key=KEY).softcap is None
