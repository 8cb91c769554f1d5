"""An eager call is one program, which new lengths inside a bucket do not compile again."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    AttentionMask,
    Classifier,
    Dense,
    DynamicScaling,
    OutputLayer,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
)
from jaxformers.activations import tanh
from jaxformers.one_program import bucket

V, D, N, F, MAX = 29, 12, 2, 20, 60
ROWS = np.random.default_rng(5)
TOKENS = jnp.asarray(ROWS.integers(0, V, (3, 19)))
REAL = jnp.asarray(ROWS.random((3, 19)) < 0.7).at[:, 4].set(True)
SEGMENTS = jnp.asarray(np.sort(ROWS.integers(0, 3, (3, 19))))
MASK = jnp.asarray(ROWS.random((3, 1, 19, 19)) < 0.7)


def language_model(**options):
    return TransformerLM(V, D, N, 2, F, MAX, **options, key=jax.random.key(0))


def encoder_model(pooling="first"):
    heads = {
        "pooler": partial(Dense, activation=tanh),
        "classifier": partial(Classifier, num_labels=3, pooling=pooling),
        "output": OutputLayer,
    }
    return TransformerEncoder(
        V, D, N, 2, F, MAX, learnable_pos=True, **heads, key=jax.random.key(0)
    )


def same(got, wanted):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def traced(method, *args, **kwargs):
    """The method as a part of someone's program."""
    return eqx.filter_jit(lambda *a, **k: method(*a, **k))(*args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": ALiBi(), "window": 5},
        {"position": RotaryPositionalEncoding(scaling=DynamicScaling(2.0, 8))},
    ],
    ids=["plain", "alibi", "by length"],
)
def test_a_language_model(options):
    model = language_model(**options)
    for call in (
        {},
        {"padding_mask": REAL},
        {"segment_ids": SEGMENTS},
        {"mask": MASK},
    ):
        same(model(TOKENS, **call), traced(TransformerLM.__call__, model, TOKENS, **call))
    same(model(TOKENS[0]), traced(TransformerLM.__call__, model, TOKENS[0]))
    key = jax.random.key(3)  # the dropout is that of the given shapes
    same(model(TOKENS, key=key), traced(TransformerLM.__call__, model, TOKENS, key=key))
    same(model.forward(TOKENS)[0], traced(TransformerLM.forward, model, TOKENS)[0])


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["__call__", "logits", "pooled", "classify", "embed"])
def test_an_encoder(name):
    model, method = encoder_model(), getattr(TransformerEncoder, name)
    for call in ({}, {"padding_mask": REAL}):
        same(method(model, TOKENS, **call), traced(method, model, TOKENS, **call))
    same(method(model, TOKENS[1]), traced(method, model, TOKENS[1]))


def test_an_encoder_decoder():
    model = Transformer(V, V, D, N, 1, 1, F, MAX, key=jax.random.key(0))
    src, call = TOKENS[:, :17], Transformer.__call__
    real = {"src_padding_mask": REAL[:, :17], "tgt_padding_mask": REAL}
    same(model(src, TOKENS), traced(call, model, src, TOKENS))
    same(model(src, TOKENS, **real), traced(call, model, src, TOKENS, **real))
    same(model(src, TOKENS[:, :16]), traced(call, model, src, TOKENS[:, :16]))
    memory = model.encode(src)
    same(memory, traced(Transformer.encode, model, src))
    same(model.decode(TOKENS, memory), traced(Transformer.decode, model, TOKENS, memory))


def test_what_is_compiled(compiled):
    model = language_model()
    model(TOKENS)
    compiled()
    for b, t in ((3, 17), (3, 20), (3, 23)):
        model(jax.device_put(np.zeros((b, t), np.int32)))
    assert compiled() == []
    for t in (24, 25):  # without padding, and of another size
        model(jax.device_put(np.zeros((3, t), np.int32)))
        assert len(compiled()) == 1


def test_embed_compiles_once_for_a_size(compiled):
    model = encoder_model()
    model.embed(TOKENS)
    compiled()
    for t in (17, 18):
        model.embed(jax.device_put(np.zeros((3, t), np.int32)))
    assert compiled() == []


def test_long_calls_keep_their_shapes(monkeypatch):
    monkeypatch.setattr("jaxformers.one_program.MOST_PADDED", 50)
    monkeypatch.setattr("jaxformers.one_program._pad", None)
    language_model()(TOKENS)


def test_padding_is_not_counted_under_a_causal_mask():
    model, mask = encoder_model("mean"), AttentionMask(causal=True)
    method = TransformerEncoder.classify
    same(method(model, TOKENS, mask), traced(method, model, TOKENS, mask))


class OfOnesOwn(eqx.Module):
    """A scaling of a user that looks at the length of the row."""

    def frequencies(self, theta, dim, positions):
        scaling = DynamicScaling(2.0, 8)
        return scaling.frequencies(theta, dim, positions)


def test_parts_of_ones_own_that_look_at_the_length():
    model = language_model(position=RotaryPositionalEncoding(scaling=OfOnesOwn()))
    same(model(TOKENS), traced(TransformerLM.__call__, model, TOKENS))


def test_positions_without_a_sign(no_shape_checker):
    model, positions = encoder_model(), np.arange(19, dtype=np.uint8)
    mask = AttentionMask(q_positions=jax.device_put(positions))
    same(model(TOKENS, mask), model(TOKENS))


def test_a_mask_over_the_source_is_checked_before_padding():
    model = Transformer(V, V, D, N, 1, 1, F, MAX, key=jax.random.key(0))
    mask = AttentionMask(k_positions=jnp.arange(6))
    with pytest.raises(ValueError, match=r"must have shape \(3, 7\) or \(7,\), got \(6,\)"):
        model(TOKENS[:, :7], TOKENS, src_tgt_mask=mask)


def test_what_is_transformed_is_traced():
    model = language_model()
    wanted = jax.jit(lambda m, t: m(t))(model, TOKENS)
    assert len(jax.make_jaxpr(lambda t: model(t))(TOKENS).eqns) > 20  # its operations, not a call
    same(eqx.filter_jit(model)(TOKENS), wanted)
    others = encoder_model(), Transformer(V, V, D, N, 1, 1, F, MAX, key=jax.random.key(0))
    for known in (model, others[0], lambda tokens: others[1](tokens, tokens)):
        # The values of all arguments are known, and still it is a part of another program.
        same(jax.jit(lambda x, f=known: f(TOKENS) + x)(0.0), known(TOKENS))
    same(jax.vmap(model)(TOKENS), wanted)
    tangents = jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_array))
    static = eqx.filter(model, eqx.is_array, inverse=True)
    out, slope = jax.jvp(
        lambda m: eqx.combine(m, static)(TOKENS).sum(),
        (eqx.filter(model, eqx.is_array),),
        (tangents,),
    )
    gradient = eqx.filter_grad(lambda m: m(TOKENS).sum())(model)
    same(out, wanted.sum())
    products = jax.tree.map(jnp.sum, eqx.filter(gradient, eqx.is_array))
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=1e-3)


def test_where_results_lie():
    model, second = language_model(), jax.devices()[1]
    there = jax.device_put((model, TOKENS), second)
    result = there[0](there[1])
    assert result.devices() == {second}
    same(result, model(TOKENS))


def test_buckets():
    assert [bucket(n, smallest=1) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49)] == [16, 16, 24, 24, 32, 48, 64]
    assert bucket(17, 20) == 20 and bucket(33, 20) == 33
