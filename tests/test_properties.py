"""What must hold for every model, whatever its weights: who sees whom, and what changes nothing."""

import zlib
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    AttentionMask,
    GatedFeedForward,
    LayerNorm,
    LearnablePositionalEncoding,
    MultiHeadAttention,
    OutputLayer,
    Residual,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    depth_scaled,
    normal,
)
from jaxformers.kernels.plain import dot_product_attention
from jaxformers.layers import dropout

SRC_VOCAB, VOCAB, D, N, H, F, MAX, LAYERS = 23, 29, 10, 4, 6, 14, 21, 2
B, T, S = 3, 7, 5
WINDOW = 3
SCHEMES = {
    "sinusoids": {},
    "learned": {"learnable_pos": True},
    "rotary": {"position": RotaryPositionalEncoding()},
    "rotary in part": {"position": RotaryPositionalEncoding(99.0, rotary_dim=2, interleaved=True)},
    "alibi": {"position": ALiBi()},
}
WINDOWS = {"all": {}, "window": {"window": WINDOW}}
GROUPS = {"multi-head": {}, "grouped": {"num_kv_heads": 2}, "multi-query": {"num_kv_heads": 1}}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_window = pytest.mark.parametrize("window", WINDOWS)
each_group = pytest.mark.parametrize("group", GROUPS)

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


# Models: no array is zero or one, and an array of the same name and size is the same in all.


def filled(constructor, *sizes, **options):
    """A model of that shape whose every array, biases and gains too, is random by its name."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        return jnp.asarray(0.3 * values + name.endswith(".gain"), leaf.dtype)

    key = jax.random.key(0)
    model = eqx.filter_eval_shape(partial(constructor, *sizes, head_dim=H, **options), key=key)
    return jax.tree.map_with_path(draw, model)


def language_model(layers=LAYERS, **options):
    return filled(TransformerLM, VOCAB, D, N, layers, F, MAX, **options)


def encoder_model(layers=LAYERS, **options):
    return filled(TransformerEncoder, VOCAB, D, N, layers, F, MAX, **options)


def seq2seq_model(decoder_layers=LAYERS, **options):
    return filled(Transformer, SRC_VOCAB, VOCAB, D, N, 1, decoder_layers, F, MAX, **options)


def draw_tokens(*shape, vocab_size=VOCAB, seed=0):
    """Random ids, all different, so that a row of the token table belongs to one place."""
    ids = np.random.default_rng(seed).permutation(vocab_size)[: np.prod(shape)]
    return jnp.asarray(ids.reshape(shape), jnp.int32)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Who sees whom.


def influence(run, model, tables, *tokens):
    """How strongly outputs depend on tokens: `|d output / d vector of the token|`, (b, t, b, s).

    One such array for each array of tokens; `tables` picks the model's tables of their vectors,
    `run` gives the outputs (b, t, ...).
    """

    def outputs(vectors):
        out = run(eqx.tree_at(tables, model, vectors))
        return (out * draw(*out.shape)).sum(-1)

    jacobians = jax.jit(jax.jacrev(outputs))(tables(model))
    return [
        np.abs(jacobian[:, :, ids]).max(-1) for jacobian, ids in zip(jacobians, tokens, strict=True)
    ]


def same_row(t, s):
    return np.eye(B, dtype=bool)[:, None, :, None] & np.ones((t, 1, s), bool)


def token_table(model):
    return (model.embedding.token_embedding.weight,)


def both_tables(model):
    return (
        model.src_embedding.token_embedding.weight,
        model.tgt_embedding.token_embedding.weight,
    )


@pytest.mark.parametrize(
    "scheme, window",
    [(scheme, "all") for scheme in SCHEMES] + [("rotary", "window"), ("alibi", "window")],
)
def test_language_model_sees_the_past_of_its_own_row(scheme, window):
    model = language_model(**SCHEMES[scheme], **WINDOWS[window])
    tokens = draw_tokens(B, T)
    distance = np.arange(T)[:, None] - np.arange(T)
    reach = LAYERS * (WINDOW - 1) if window == "window" else T
    expected = same_row(T, T) & ((distance >= 0) & (distance <= reach))[:, None]
    (seen,) = influence(lambda m: m(tokens), model, token_table, tokens)
    np.testing.assert_array_equal(seen > 0, expected)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_encoder_sees_both_sides_of_its_own_row(window):
    model = encoder_model(window=window)
    tokens = draw_tokens(B, T)
    distance = np.abs(np.arange(T)[:, None] - np.arange(T))
    reach = T if window is None else LAYERS * (WINDOW - 1)
    expected = same_row(T, T) & (distance <= reach)[:, None]
    (seen,) = influence(lambda m: m(tokens), model, token_table, tokens)
    np.testing.assert_array_equal(seen > 0, expected)


@pytest.mark.few(2)
@each_scheme
def test_seq2seq_sees_the_source_and_the_past_of_its_own_row(scheme):
    model = seq2seq_model(1, **SCHEMES[scheme])
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    real = jnp.arange(S) < jnp.array([[S], [S - 1], [S - 3]])

    def run(m):
        return m(src, tgt, src_padding_mask=real)

    of_src, of_tgt = influence(run, model, both_tables, src, tgt)
    np.testing.assert_array_equal(of_src > 0, same_row(T, S) & np.asarray(real))
    past = np.tril(np.ones((T, T), bool))[:, None]
    np.testing.assert_array_equal(of_tgt > 0, same_row(T, T) & past)


@pytest.mark.parametrize("position", [None, RotaryPositionalEncoding()])
def test_a_window_counts_the_own_position(position):
    """One attention layer: a window of w sees w positions; of two windows the smaller holds."""
    x = draw(B, T, D)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    for window, causal in [(1, True), (WINDOW, True), (WINDOW, False), (T + 1, True)]:
        mha = filled(MultiHeadAttention, D, N, window=window, position=position)
        wide = filled(MultiHeadAttention, D, N, window=WINDOW + 1, position=position)
        band = (distance < window) & (distance >= 0 if causal else distance > -window)
        plain = filled(MultiHeadAttention, D, N, position=position)
        expected = plain(x, mask=band)
        assert_close(mha(x, mask=AttentionMask(causal)), expected)
        assert_close(plain(x, mask=AttentionMask(causal, window)), expected)
        if window <= WINDOW:
            assert_close(wide(x, mask=AttentionMask(causal, window)), expected)
            assert_close(mha(x, mask=AttentionMask(causal, window + 1)), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("bias", [None, ALiBi()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_query_that_sees_nothing(bias, dtype):
    """Its output is the bias alone, and no gradient goes through it to the keys."""
    mha = jax.tree.map(lambda a: a.astype(dtype), filled(MultiHeadAttention, D, N, num_kv_heads=2))
    allowed = draw(T, S) > 0
    blind, hidden = 2, 3
    allowed = allowed.at[blind].set(False).at[:, hidden].set(False).at[0, 0].set(True)
    mask = AttentionMask(explicit=allowed, bias=bias)
    x, memory = draw(B, T, D).astype(dtype), draw(B, S, D, seed=1).astype(dtype)

    @jax.jit
    def gradients(mha, x, memory, of_query):
        out, pull = jax.vjp(lambda mha, x, memory: mha(x, memory, mask=mask), mha, x, memory)
        return out, pull(jnp.broadcast_to(of_query[:, None], out.shape).astype(dtype))

    out, of_all = gradients(mha, x, memory, jnp.ones(T))
    assert out.dtype == dtype
    assert jnp.isfinite(out).all()
    np.testing.assert_array_equal(out[:, blind], jnp.broadcast_to(mha.bo, (B, D)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(of_all))

    _, (of_mha, of_x, of_memory) = gradients(mha, x, memory, jnp.eye(T)[blind])
    assert not of_x.any() and not of_memory.any() and not of_mha.wv.any()
    _, (of_mha, of_x, of_memory) = gradients(mha, x, memory, jnp.eye(T)[0])
    assert of_x[:, 0].any() and of_memory[:, 0].any() and not of_memory[:, hidden].any()


@pytest.mark.parametrize("scheme", ["learned", "alibi"])
def test_a_row_of_padding_alone_is_finite(scheme):
    """Values and gradients, in the models: the other rows do not suffer from an empty one."""
    real = jnp.arange(T) < jnp.array([[T], [0], [2]])
    tokens, src = draw_tokens(B, T), draw_tokens(B, T, vocab_size=SRC_VOCAB)
    lm, seq2seq = language_model(**SCHEMES[scheme]), seq2seq_model(1, **SCHEMES[scheme])

    def loss(models):
        lm, seq2seq = models
        a = lm(tokens, padding_mask=real)
        b = seq2seq(src, tokens, src_padding_mask=real, tgt_padding_mask=real)
        return (a + b).sum()

    value, gradients = eqx.filter_jit(eqx.filter_value_and_grad(loss))((lm, seq2seq))
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# What changes nothing: padding, packing, batching, caching, compiling.


def with_gaps(tokens, counts, side, fill):
    """The first `counts[i]` tokens of row i, with padding up to the full width on a side of them.

    Also which places are real. The padding's ids are `fill`: they must not matter.
    """
    width = tokens.shape[1]
    places = {
        "left": lambda count: np.arange(width - count, width),
        "right": lambda count: np.arange(count),
        "between": lambda count: np.sort(np.random.default_rng(count).permutation(width)[:count]),
    }[side]
    ids, real = np.full(tokens.shape, fill), np.zeros(tokens.shape, bool)
    for row, count in enumerate(counts):
        ids[row, places(count)] = tokens[row, :count]
        real[row, places(count)] = True
    return jnp.asarray(ids, jnp.int32), jnp.asarray(real)


@pytest.mark.few(8)
@pytest.mark.parametrize("build", [language_model, encoder_model])
@each_window
@each_scheme
def test_padding_changes_nothing(build, scheme, window):
    model = build(**SCHEMES[scheme], **WINDOWS[window])
    tokens, counts = draw_tokens(B, T), (T, T - 3, T - 3)
    whole, short = model(tokens), model(tokens[:, : T - 3])
    for side in ("left", "right", "between"):
        ids, real = with_gaps(tokens, counts, side, fill=1)
        out = model(ids, padding_mask=real)
        assert_close(out[0], whole[0], err_msg=side)
        assert_close(out[1:][real[1:]], short[1:].reshape(-1, out.shape[-1]), err_msg=side)


@pytest.mark.few(2)
@each_scheme
def test_padding_changes_nothing_in_seq2seq(scheme):
    model = seq2seq_model(**SCHEMES[scheme])
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    src_counts, tgt_counts = (S - 2, S - 2, S - 2), (T - 3, T - 3, T - 3)

    expected = model(src[:, : S - 2], tgt[:, : T - 3]).reshape(-1, VOCAB)
    for src_side, tgt_side in [("left", "left"), ("right", "between"), ("between", "right")]:
        src_ids, src_real = with_gaps(src, src_counts, src_side, fill=1)
        tgt_ids, tgt_real = with_gaps(tgt, tgt_counts, tgt_side, fill=1)
        out = model(src_ids, tgt_ids, src_padding_mask=src_real, tgt_padding_mask=tgt_real)
        assert_close(out[tgt_real], expected, err_msg=f"{src_side}, {tgt_side}")


def packed(*lengths):
    """Documents one after another in one row: segment numbers and positions that start anew."""
    segments = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return jnp.asarray(segments, jnp.int32)[None], jnp.asarray(positions, jnp.int32)[None]


def packed_mask(q, k):
    return AttentionMask(q_segments=q[0], k_segments=k[0], q_positions=q[1], k_positions=k[1])


@pytest.mark.few(5)
@pytest.mark.parametrize("build", [language_model, encoder_model])
@each_scheme
def test_packed_documents_are_separate_documents(build, scheme):
    model = build(**SCHEMES[scheme], window=WINDOW)
    tokens, lengths = draw_tokens(1, 11), (4, 3, 4)
    documents = packed(*lengths)
    together = model(tokens, packed_mask(documents, documents))[0]
    start = 0
    for length in lengths:
        alone = model(tokens[:, start : start + length])[0]
        assert_close(together[start : start + length], alone)
        start += length


def test_packed_pairs_are_separate_pairs():
    model = seq2seq_model(1)
    src, tgt = draw_tokens(1, 6, vocab_size=SRC_VOCAB), draw_tokens(1, 8)
    sources, targets = packed(4, 2), packed(3, 5)
    masks = [packed_mask(q, k) for q, k in [(sources,) * 2, (targets,) * 2, (targets, sources)]]
    run = eqx.filter_jit(model)
    together = run(src, tgt, *masks)
    for segment in range(2):
        own_src, own_tgt = (np.flatnonzero(x[0][0] == segment) for x in (sources, targets))
        assert_close(together[:, own_tgt], run(src[:, own_src], tgt[:, own_tgt]))


# Which tokens of each row go into the cache at each step, -1 for padding. Step by step, every
# row takes its tokens in order, but the rows need not keep in step.
CHUNKS = {
    "one by one": [[[i]] * B for i in range(T)],
    "in pieces": [[range(3)] * B, [[3]] * B, [range(4, 7)] * B],
    "with padding": [  # on the left, in a step alone, and on the right
        [[0, 1, 2], [-1, -1, 0], [-1, 0, 1]],
        [[3], [1], [-1]],
        [[4, 5, -1], [2, 3, 4], [2, -1, -1]],
        [[6], [-1], [3]],
    ],
}


def check_cached(step, cache, full, tokens):
    """Each chunking gives the logits that all tokens at once give without a cache."""
    for name, chunks in CHUNKS.items():
        seen = cache
        for places in chunks:
            places = np.array([list(row) for row in places])
            real = None if (places >= 0).all() else jnp.asarray(places >= 0)
            rows = np.arange(B)[:, None]
            logits, seen = step(tokens[rows, places], real, seen)
            where = slice(None) if real is None else np.asarray(real)
            assert_close(logits[where], full[rows, places][where], err_msg=name)


@pytest.mark.few(10)
@each_window
@each_group
@each_scheme
def test_cached_is_full(scheme, group, window):
    model = language_model(**SCHEMES[scheme], **GROUPS[group], **WINDOWS[window])
    tokens = draw_tokens(B, T)

    def step(tokens, real, cache):
        hidden, cache = model.forward(tokens, padding_mask=real, cache=cache)
        return model.logits_of(hidden), cache

    check_cached(step, model.init_cache(B, T + 4), np.asarray(model.logits(tokens)), tokens)


@pytest.mark.parametrize("scheme", ["rotary", "alibi"])
def test_cached_is_full_where_the_window_rolls(scheme):
    """A sequence of many windows, in chunks longer and shorter than what is remembered."""
    length = 45
    model = language_model(1, **SCHEMES[scheme], window=WINDOW, num_kv_heads=2)
    cache = model.init_cache(B, length + 5)
    assert cache.layers[0].own.keys.shape[2] < 20 < cache.slots
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (B, length)), jnp.int32)
    full = np.asarray(model.logits(tokens))
    # Row 1 lags behind by two tokens: padding stands on the left first, on the right later.
    bounds = [0, 21, 24, 25, 28, 29, 30, 31, 34, 37, 38, 39, 42, length]
    places = [
        np.broadcast_to(np.arange(a, b), (B, b - a)).copy()
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    places = [np.where(np.arange(B)[:, None] == 1, chunk - 2, chunk) for chunk in places]
    places[0] = np.maximum(places[0], -1)
    rows, seen = np.arange(B)[:, None], cache
    for chunk in places:
        real = jnp.asarray(chunk >= 0)
        hidden, seen = model.forward(tokens[rows, chunk], padding_mask=real, cache=seen)
        logits = np.asarray(model.logits_of(hidden))
        assert_close(logits[real], full[rows, chunk][real], err_msg=f"at {chunk[0]}")


@pytest.mark.few(3)
@each_scheme
def test_cached_is_full_in_seq2seq(scheme):
    """The encoder's keys and values are in the cache, its padding stays hidden."""
    model = seq2seq_model(**SCHEMES[scheme], **GROUPS["grouped"])
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    src_real = jnp.arange(S) >= jnp.array([[0], [1], [3]])
    full = model.logits(src, tgt, src_padding_mask=src_real)
    memory = model.encode(src, src_padding_mask=src_real)

    def step(tokens, real, cache):
        hidden, cache = model.forward(
            tokens, src_padding_mask=src_real, padding_mask=real, cache=cache
        )
        return model.logits_of(hidden), cache

    check_cached(step, model.init_cache(memory, T + 4), np.asarray(full), tgt)


def test_compiling_changes_nothing():
    """Also that ids and masks may be known inside a compiled function, as constants of it."""
    lm = language_model(1, **SCHEMES["learned"], num_kv_heads=2)
    encoder = encoder_model(1, **SCHEMES["alibi"], window=WINDOW)
    seq2seq = seq2seq_model(1, **SCHEMES["rotary"])
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    real = jnp.arange(T) > jnp.array([[0], [1], [3]])
    documents = packed(3, 4)
    first, second = tgt[:, :3], tgt[:, 3:4]

    def run(lm, encoder, seq2seq, src, tgt, real, first, second):
        _, cache = lm.forward(first, cache=lm.init_cache(B, T))
        hidden, cache = lm.forward(second, cache=cache)
        return (
            lm(tgt, padding_mask=real),
            lm(tgt[:1], packed_mask(documents, documents)),
            encoder(tgt, padding_mask=real),
            seq2seq(src, tgt, tgt_padding_mask=real),
            hidden,
            cache.positions,
        )

    arrays = src, tgt, real, first, second
    expected = run(lm, encoder, seq2seq, *arrays)
    passed = eqx.filter_jit(run)(lm, encoder, seq2seq, *arrays)
    known = eqx.filter_jit(lambda: run(lm, encoder, seq2seq, *arrays))()
    jax.tree.map(assert_close, passed, expected)
    jax.tree.map(assert_close, known, expected)


@each_scheme
def test_a_row_alone_needs_no_batch_axis(scheme):
    """Unbatched is a batch of one is that row of any batch, in models and with all masks."""
    lm, seq2seq = language_model(**SCHEMES[scheme]), seq2seq_model(**SCHEMES[scheme])
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    real = jnp.arange(T) >= jnp.array([[0], [1], [3]])
    mask = jnp.asarray(draw(N, T, T) > -1)
    lm_rows = lm(tgt, mask, padding_mask=real)
    seq2seq_rows = seq2seq(src, tgt, tgt_padding_mask=real)
    for row in range(B):
        alone = lm(tgt[row], mask, padding_mask=real[row])
        assert alone.shape == (T, VOCAB)
        assert_close(alone, lm_rows[row])
        alone = seq2seq(src[row], tgt[row], tgt_padding_mask=real[row])
        assert alone.shape == (T, VOCAB)
        assert_close(alone, seq2seq_rows[row])


def test_layers_without_a_batch_axis():
    """Cross-attention between sequences of different length too."""
    model = seq2seq_model()
    x, memory = draw(B, T, D), draw(B, S, D, seed=1)
    decoded = model.decoder(x, memory)
    attended = model.decoder.layers[0].cross_attention(x, memory)
    for row in range(B):
        assert_close(model.decoder(x[row], memory[row]), decoded[row])
        alone = model.decoder.layers[0].cross_attention(x[row], memory[row])
        assert_close(alone, attended[row])


# Dropout.


def test_dropout_keeps_the_mean(getkey):
    """5 standard errors; the dropped are zero, the kept are scaled, and rate 0 is the identity."""
    x, size = jnp.ones((100, 1000)), 100_000
    for rate in (0.1, 0.5, 0.9):
        y = dropout(x, rate, getkey())
        error = (rate * (1 - rate) / size) ** 0.5
        assert abs(float((y == 0).mean()) - rate) < 5 * error
        assert abs(float(y.mean()) - 1) < 5 * error / (1 - rate)
        np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-3)
    np.testing.assert_array_equal(dropout(x, 0.0, getkey()), x)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)


def test_residual_drops_what_is_written_only(getkey):
    x, y = draw(B, T, D), jnp.zeros((B, T, D))
    residual = Residual(LayerNorm, D, dropout_rate=0.5)
    np.testing.assert_array_equal(residual.write(x, y, getkey()), x)
    assert (residual.write(y, x, getkey()) == 0).any()


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.3, 0.4)])
def test_dropout_follows_the_key(getkey, monkeypatch, rates):
    """No key, no dropout. One key, one result. And each place draws from a key of its own."""
    rate, attention_rate = rates
    options = {"dropout_rate": rate, "attention_dropout_rate": attention_rate}
    silent = {"dropout_rate": 0.0}
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    calls = {
        language_model: lambda m, key=None: m(tgt, key=key),
        encoder_model: lambda m, key=None: m(tgt, key=key),
        seq2seq_model: lambda m, key=None: m(src, tgt, key=key),
    }
    # Embeddings, then per layer what each sublayer writes, and the weights of each attention.
    places = {
        language_model: (1 + 2 * LAYERS, LAYERS),
        encoder_model: (1 + 2 * LAYERS, LAYERS),
        seq2seq_model: (2 + 2 * 1 + 3 * LAYERS, 1 + 2 * LAYERS),
    }
    drawn = []
    bits = jax.random.bits

    def record(key, *args, **kwargs):
        drawn.append(jax.random.key_data(key).tobytes())
        return bits(key, *args, **kwargs)

    for build, run in calls.items():
        model, key = build(**options), getkey()
        plain = run(model)
        np.testing.assert_array_equal(plain, run(build(**silent)))
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "bits", record)
            drawn.clear()
            with jax.disable_jit():  # the keys are looked at
                run(model, key)
        assert len(drawn) == len(set(drawn)) == np.dot(places[build], np.array(rates) > 0)
        once = run(model, key)
        np.testing.assert_array_equal(once, run(model, key))
        assert not np.allclose(once, plain, atol=1e-3)
        assert not np.allclose(once, run(model, getkey()), atol=1e-3)


def test_models_at_rate_0_ignore_the_key(getkey):
    model, tokens = language_model(dropout_rate=0.0), draw_tokens(B, T)
    compiled = eqx.filter_jit(model)  # in the shapes of the tokens, without padding
    np.testing.assert_array_equal(compiled(tokens, key=getkey()), compiled(tokens))


def test_attention_dropout_keeps_the_mean(getkey):
    """With values of one, what heads gather has mean 1 over many queries and keys."""
    rate, h = 0.4, 2
    q, k = draw(1, 5, 200, h), draw(1, 5, 300, h, seed=1)
    drop = partial(dropout, rate=rate, key=getkey())
    out = dot_product_attention(q, k, jnp.ones(k.shape), AttentionMask(), dropout=drop)[..., 0]
    error = float(out.std()) / out.size**0.5
    assert error > 0
    assert abs(float(out.mean()) - 1) < 5 * error


# Fresh models.


def learned(key):
    return LearnablePositionalEncoding(MAX, D, key=key)


@pytest.mark.parametrize(
    "build",
    [
        partial(TransformerLM, VOCAB, D, 5, 2, F, MAX, learnable_pos=True),
        partial(TransformerEncoder, VOCAB, D, 5, 1, F, MAX, feed_forward=GatedFeedForward),
        partial(Transformer, VOCAB, VOCAB, D, 5, 1, 1, F, MAX, position=learned),
    ],
)
def test_no_two_random_arrays_are_equal(build, getkey):
    """Nor begin alike: two arrays drawn with one key would, whatever their shapes and scales."""
    for options in ({}, {"num_kv_heads": 1, "init": normal(), "residual_init": depth_scaled(2)}):
        leaves = jax.tree.leaves_with_path(build(key=getkey(), **options))
        constant = {"gain", "b", "bq", "bk", "bv", "bo", "b_in", "b_out", "b_gate", "b_up"}
        starts = {}
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            if name.rsplit(".", 1)[-1] in constant | {"b_down"}:
                assert np.unique(leaf).size == 1, name
                continue
            assert np.unique(leaf).size > 0.9 * leaf.size, name
            start = np.ravel(leaf)[:8]
            starts[name] = start / np.linalg.norm(start)
        assert len(starts) >= 8
        names, matrix = list(starts), np.stack(list(starts.values()))
        alike = np.argwhere(np.triu(np.abs(matrix @ matrix.T) > 0.999, 1))
        assert not alike.size, [(names[i], names[j]) for i, j in alike]


def test_a_key_decides_the_model(getkey):
    def build(key):
        return jax.tree.leaves(TransformerLM(VOCAB, D, 5, 1, F, MAX, key=key))

    key = getkey()
    for a, b, c in zip(build(key), build(key), build(getkey()), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.unique(a).size == 1 or not np.allclose(a, c)


def test_initializers_reach_their_arrays(getkey):
    """Everything random is drawn by `init`, what writes to the stream by `residual_init`."""

    def constant(number):
        return lambda key, shape, fan_in, fan_out: jnp.full(shape, number)

    sizes = VOCAB, VOCAB, D, 5, 1, 1, F, MAX
    options = {"init": constant(7.0), "learnable_pos": True, "key": getkey()}
    model = Transformer(*sizes, **options)
    scaled = Transformer(*sizes, residual_init=depth_scaled(8, constant(7.0)), **options)
    residual = []
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(model), jax.tree.leaves(scaled), strict=True
    ):
        name = jax.tree_util.keystr(path)
        expected = 1.0 if name.endswith(".gain") else 0.0 if ".b" in name else 7.0
        assert (leaf == expected).all(), name
        if name.endswith((".wo", ".w_out")):
            residual.append(name)
            assert_close(other, 7 / 4)
        else:
            np.testing.assert_array_equal(leaf, other)
    assert len(residual) == 5


# Options: each does what it says, and none is accepted and ignored.


def doubled_values(q, k, v, mask, **options):
    return dot_product_attention(q, k, v + v, mask, **options)


ENCODER, DECODER, CROSS, LOGITS = "encoder", "decoder", "cross-attention", "logits"
LAYER = {ENCODER, DECODER}
# An option, and the parts of the models that it changes.
OPTIONS = {
    "num_kv_heads": (2, LAYER | {CROSS}),
    "use_bias": (False, LAYER | {CROSS, LOGITS}),
    "use_qkv_bias": (False, LAYER | {CROSS}),
    "use_out_bias": (False, LAYER | {CROSS}),
    "use_logits_bias": (False, {LOGITS}),
    "attention_scale": (0.9, LAYER | {CROSS}),
    "softcap": (0.3, LAYER | {CROSS}),
    "qkv_clip": (0.1, LAYER | {CROSS}),
    "qk_norm": (RMSNorm, LAYER | {CROSS}),
    "window": (2, LAYER),
    "attention_dropout_rate": (0.5, LAYER | {CROSS}),
    "attention_fn": (doubled_values, LAYER | {CROSS}),
    "norm": (RMSNorm, LAYER | {CROSS}),
    "norm_first": (False, LAYER | {CROSS}),
    "norm_placement": ("sandwich", LAYER | {CROSS}),
    "residual_scale": (0.5, LAYER | {CROSS}),
    "parallel": ("one norm", LAYER),
    "per_layer": (lambda i: {"window": 2}, LAYER),
    "embedding": (partial(TransformerEmbedding, norm=LayerNorm), LAYER),
    "output": (partial(OutputLayer, scale=0.5), {LOGITS}),
    "feed_forward": (GatedFeedForward, LAYER),
    "position": (RotaryPositionalEncoding(), LAYER),
    "learnable_pos": (True, LAYER),
    "embedding_scale": (0.5, LAYER),
    "final_norm": (False, LAYER | {CROSS}),
    "dropout_rate": (0.5, LAYER | {CROSS}),
    "tie_embeddings": (True, {LOGITS}),
    "share_embeddings": (True, {ENCODER}),
}
OPTIONS_OF = {
    TransformerLM: set(OPTIONS) - {"share_embeddings"},
    TransformerEncoder: set(OPTIONS) - {"tie_embeddings", "share_embeddings", "use_logits_bias"},
    Transformer: set(OPTIONS) - {"parallel"},
}


def parts(constructor, **options):
    """What the parts of a model make of fixed inputs, in training."""
    key, tokens, hidden = jax.random.key(1), draw_tokens(B, T), draw(B, T, D)
    options = {"dropout_rate": 0.0, **options}
    if constructor is TransformerEncoder:
        model = filled(constructor, VOCAB, D, N, 1, F, MAX, **options)
        return {ENCODER: model(tokens, key=key)}
    if constructor is TransformerLM:
        model = filled(constructor, VOCAB, D, N, 1, F, MAX, **options)
        out = model.forward(tokens, key=key)[0]
        return {DECODER: out, LOGITS: model.logits_of(hidden)}
    model = filled(constructor, VOCAB, VOCAB, D, N, 1, 1, F, MAX, **options)
    # The cross-attention alone, without what the other sublayers write.
    layer = model.decoder.layers[0]
    silent = eqx.tree_at(
        lambda m: jax.tree.leaves([m.self_attention, m.feed_forward]),
        layer,
        replace_fn=jnp.zeros_like,
    )
    stack = eqx.tree_at(lambda m: m.layers, model.decoder, (silent,))
    return {
        ENCODER: model.encode(tokens, key=key),
        DECODER: model.decode(tokens, hidden, key=key),
        CROSS: stack(hidden, draw(B, S, D), key=key),
        LOGITS: model.logits_of(hidden),
    }


@pytest.mark.parametrize("constructor", OPTIONS_OF)
def test_every_option_counts(constructor):
    plain = parts(constructor)
    for option in sorted(OPTIONS_OF[constructor]):
        setting, reached = OPTIONS[option]
        changed = {
            name
            for name, out in parts(constructor, **{option: setting}).items()
            if not np.allclose(out, plain[name], atol=1e-3)
        }
        assert changed == reached & set(plain), option


def test_every_option_is_tested():
    """One that is added to a model has to be added here too."""
    from jaxformers.pieces import Pieces

    elsewhere = {"init", "residual_init", "head_dim"}  # the last is given to all models here
    assert set(Pieces.__annotations__) - set(OPTIONS) == elsewhere


@each_scheme
def test_distances_or_places(scheme):
    """Rotary positions and ALiBi know distances only, whose origin may be anywhere."""
    model, tokens = language_model(**SCHEMES[scheme]), draw_tokens(B, T)
    positions = jnp.arange(T) + 4
    shifted = model(tokens, AttentionMask(q_positions=positions, k_positions=positions))
    if "position" in SCHEMES[scheme]:
        assert_close(shifted, model(tokens))
    else:
        assert not np.allclose(shifted, model(tokens), atol=1e-3)
    stretched = AttentionMask(q_positions=2 * positions, k_positions=2 * positions)
    assert not np.allclose(model(tokens, stretched), shifted, atol=1e-3)


def test_position_schemes_differ():
    outputs = [language_model(**options)(draw_tokens(B, T)) for options in SCHEMES.values()]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert not np.allclose(a, b, atol=1e-3)


@eqx.filter_jit
@partial(eqx.filter_value_and_grad, has_aux=True)
def values_and_gradients(model):
    out = model(draw_tokens(B, S, seed=4), draw_tokens(B, T))
    return (out * draw(B, T, VOCAB)).sum(), out


@pytest.mark.parametrize("tied, shared", [(False, True), (True, True)])
def test_one_table_takes_the_place_of_two(tied, shared):
    """The values are those of a model with copies, its gradient is the sum of theirs."""
    sizes = VOCAB, VOCAB, D, N, 1, 1, F, MAX
    copies = filled(Transformer, *sizes)
    table = copies.tgt_embedding.token_embedding.weight
    copies = eqx.tree_at(
        lambda m: (m.src_embedding.token_embedding.weight, m.output.w, m.output.b),
        copies,
        (
            table if shared else copies.src_embedding.token_embedding.weight,
            table.T if tied else copies.output.w,
            jnp.zeros(VOCAB) if tied else copies.output.b,
        ),
    )
    model = filled(Transformer, *sizes, tie_embeddings=tied, share_embeddings=shared)
    tables = [leaf for leaf in jax.tree.leaves(model) if leaf.ndim == 2 and VOCAB in leaf.shape]
    assert len(tables) == 3 - tied - shared
    assert model.src_vocab_size == model.tgt_vocab_size == VOCAB

    (_, out), gradient = values_and_gradients(model)
    (_, expected), gradients = values_and_gradients(copies)
    assert_close(out, expected)
    total = gradients.tgt_embedding.token_embedding.weight
    total += gradients.src_embedding.token_embedding.weight if shared else 0.0
    total += gradients.output.w.T if tied else 0.0
    assert_close(gradient.tgt_embedding.token_embedding.weight, total)


def test_tied_language_model():
    model, tokens = language_model(tie_embeddings=True), draw_tokens(B, T)
    hidden, _ = model.forward(tokens)
    assert model.output.w is None and model.output.b is None
    assert_close(model.logits(tokens), hidden @ token_table(model)[0].T)


# Numbers.


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "build, options",
    [
        (seq2seq_model, {"norm_first": False, "learnable_pos": True, "tie_embeddings": True}),
        (language_model, {"position": RotaryPositionalEncoding(), "num_kv_heads": 1}),
        (language_model, {"position": ALiBi(), "norm": RMSNorm, "qk_norm": RMSNorm}),
        (encoder_model, {"feed_forward": GatedFeedForward, "window": WINDOW}),
    ],
)
def test_bfloat16(build, options):
    """Weights and activations in half the bytes; log-probabilities in float32 nevertheless."""
    tokens, src = draw_tokens(B, T), draw_tokens(B, S, vocab_size=SRC_VOCAB)
    real = jnp.arange(T) >= jnp.array([[0], [1], [3]])

    @eqx.filter_jit
    def run(model):
        if build is encoder_model:
            return [model(tokens, padding_mask=real)]
        if build is seq2seq_model:
            memory = model.encode(src)
            cache, padding = model.init_cache(memory, T), {"padding_mask": real}
        else:
            cache, padding = model.init_cache(B, T), {"padding_mask": real}
        hidden, cache = model.forward(tokens, cache=cache, **padding)
        return [hidden, cache.layers[0].own.keys, jax.nn.log_softmax(model.logits_of(hidden))]

    wide = build(1, **options)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    for a, b in zip(run(narrow), run(wide), strict=True):
        assert a.dtype == (jnp.float32 if b.shape[-1] == VOCAB else jnp.bfloat16)
        # bfloat16 has 8 bits: each of about 30 operations in a row may err by 1/256.
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.1, atol=0.1)


def test_bfloat16_dropout(getkey):
    """The same key drops the same places, and keeps the type."""
    x, key = draw(B, T, D), getkey()
    wide = filled(MultiHeadAttention, D, N, attention_dropout_rate=0.3)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    half = x.astype(jnp.bfloat16)
    for a, b in [
        (dropout(half, 0.3, key), dropout(x, 0.3, key)),
        (narrow(half, key=key), wide(x, key=key)),
    ]:
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_outputs_are_log_probabilities(scale):
    """Also with logits so far apart that their exponentials overflow."""
    models = language_model(), seq2seq_model()
    lm, seq2seq = (eqx.tree_at(lambda m: m.output.w, m, m.output.w * scale) for m in models)
    src, tgt = draw_tokens(B, S, vocab_size=SRC_VOCAB), draw_tokens(B, T)
    for log_probs, logits in [
        (lm(tgt), lm.logits(tgt)),
        (seq2seq(src, tgt), seq2seq.logits(src, tgt)),
    ]:
        assert log_probs.shape == (B, T, VOCAB) and log_probs.dtype == jnp.float32
        assert (log_probs <= 0).all()
        assert_close(jnp.exp(log_probs).sum(-1), 1)
        assert_close(log_probs, logits - jax.nn.logsumexp(logits, -1, keepdims=True))
