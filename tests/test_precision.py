"""Computing in bfloat16: sums are made in float32, and the weights that are trained stay in it."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import trace

from jaxformers import (
    AdamW,
    ALiBi,
    Dense,
    GatedFeedForward,
    LayerNorm,
    OutputLayer,
    PerHeadNorm,
    RMSNorm,
    RotaryPositionalEncoding,
    T5PositionBias,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    cast_floating,
    cross_entropy,
    language_model_loss,
    sequence_to_sequence_loss,
    train_step,
)
from jaxformers.precision import add
from jaxformers.weights import contract, lookup

VOCAB, T, B, D = 17, 7, 3, 12
rows = np.random.default_rng(0).integers(0, VOCAB, (B, T + 1))
text = {"tokens": jnp.asarray(rows[:, :-1]), "targets": jnp.asarray(rows[:, 1:])}
pair = {"src": text["tokens"][:, :5], "tgt": text["tokens"], "targets": text["targets"]}

DECODERS = {
    "learned": dict(learnable_pos=True, tie_embeddings=True),
    "llama": dict(
        position=RotaryPositionalEncoding(),
        norm=RMSNorm,
        feed_forward=GatedFeedForward,
        num_kv_heads=1,
    ),
    "alibi": dict(position=ALiBi(), qk_norm=partial(PerHeadNorm, LayerNorm), softcap=5.0),
    "t5": dict(position=lambda key: T5PositionBias(3, key=key), norm_first=False),
}


def sums_in_16_bits(loss, model, *args):
    """In the gradient of a loss: which primitive sums what shape, after looking that it does."""

    def half(model):
        return loss(cast_floating(model, jnp.bfloat16), *args)

    program = trace(eqx.filter_value_and_grad(half), model)
    products = {x.outvars[0].aval.dtype for x in program if x.primitive.name == "dot_general"}
    assert jnp.dtype(jnp.bfloat16) in products
    names = "reduce_sum", "scatter-add", "cumsum", "cumlogsumexp", "reduce_window_sum"
    sums = [
        (x.primitive.name, x.invars[0].aval.shape, str(x.outvars[0].aval.dtype))
        for x in program
        if x.primitive.name in names
    ]
    assert len(sums) > 10
    return [x for x in sums if x[2] not in ("float32", "int32")]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_sums_in_float32(name, getkey):
    model = TransformerLM(VOCAB, D, 3, 2, 20, T, key=getkey(), **DECODERS[name])
    masks = {"padding_mask": jnp.arange(T) < jnp.asarray([[T], [2], [5]])}
    for batch in (text, text | masks):
        assert sums_in_16_bits(language_model_loss, model, batch, getkey()) == []


def test_an_encoder_decoder_sums_in_float32(getkey):
    model = Transformer(VOCAB, VOCAB, D, 3, 1, 1, 20, T, learnable_pos=True, key=getkey())
    assert sums_in_16_bits(sequence_to_sequence_loss, model, pair, getkey()) == []


def test_an_encoder_with_token_types_sums_in_float32(getkey):
    embedding = partial(TransformerEmbedding, num_token_types=2, norm=LayerNorm)
    output = partial(OutputLayer, transform=Dense)
    model = TransformerEncoder(
        VOCAB, D, 3, 1, 20, T, learnable_pos=True, embedding=embedding, output=output, key=getkey()
    )

    def loss(model, token_types):
        logits = model.logits(text["tokens"], key=jax.random.key(0), token_types=token_types)
        return cross_entropy(logits, text["targets"])

    for token_types in (None, text["tokens"] % 2):
        assert sums_in_16_bits(loss, model, token_types) == []


def test_a_thousand_ones_are_a_thousand(getkey):
    """In bfloat16, 256 + 1 is 256."""
    ones, many = jnp.ones((1000, 2), jnp.bfloat16), jnp.zeros(1000, jnp.int32)
    table, bias = jnp.ones((3, 2), jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    for gradient in (
        jax.grad(lambda x: lookup(x, many).astype(jnp.float32).sum())(table)[0],
        jax.grad(lambda x: add(ones, x).astype(jnp.float32).sum())(bias),
        jax.grad(lambda x: contract(ones, jnp.eye(2, dtype=ones.dtype), x).astype("f4").sum())(
            bias
        ),
    ):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_array_equal(gradient, jnp.full(2, 1000, jnp.bfloat16))


def test_a_lookup_is_a_lookup(getkey):
    """In the type of the table, with NaN for a row that is not there, in both modes."""
    table, change = (jax.random.normal(getkey(), (5, 3)) for _ in range(2))
    ids = jnp.asarray([[4, 0, 4], [1, 4, 5]])
    values, changes = jax.jvp(lambda x: lookup(x, ids), (table,), (change,))
    np.testing.assert_array_equal(values[:, :2], table[ids[:, :2]])
    np.testing.assert_array_equal(changes[:, :2], change[ids[:, :2]])
    assert jnp.isnan(values[1, 2]).all() and not jnp.isnan(values[0]).any()
    gradient = jax.grad(lambda x: (lookup(x, ids[:, :2]) * jnp.ones(3)).sum())(table)
    np.testing.assert_array_equal(gradient, jnp.asarray([1, 1, 0, 0, 2.0])[:, None] * jnp.ones(3))


def test_cast_floating_casts_what_floats(getkey):
    tree = {"w": jnp.ones(2), "ids": jnp.arange(2), "key": getkey(), "name": "x", "none": None}
    half = cast_floating(tree, "bfloat16")
    assert half["w"].dtype == jnp.bfloat16
    assert all(half[name] is tree[name] for name in ("ids", "key", "name", "none"))
    for dtype, message in [(int, "floating-point type"), ("x", "a type such as"), ("f8", "x64")]:
        with pytest.raises(ValueError, match=message):
            cast_floating(tree, dtype)


def trained(compute_dtype, steps=40):
    """A small model after some steps, its state and its last losses."""
    model = TransformerLM(VOCAB, D, 3, 2, 20, T, 0.0, key=jax.random.key(0))
    optimizer, losses = AdamW(1e-2), []
    state = optimizer.init(model)
    for _ in range(steps):
        model, state, value = train_step(
            model,
            state,
            text,
            optimizer=optimizer,
            loss=language_model_loss,
            key=jax.random.key(0),
            compute_dtype=compute_dtype,
        )
        losses.append(float(value))
    return model, state, losses


def test_training_in_bfloat16_ends_where_float32_does_and_keeps_float32_weights():
    _, _, expected = trained(None)
    model, state, losses = trained(jnp.bfloat16)
    assert losses[0] != expected[0]
    assert expected[-1] < 0.3 * expected[0]
    np.testing.assert_allclose(losses[-1], expected[-1], rtol=0.1)
    arrays = eqx.filter((model, state), eqx.is_inexact_array)
    assert {x.dtype for x in jax.tree.leaves(arrays)} == {jnp.dtype(jnp.float32)}
    # The weights have digits that bfloat16 has not.
    w = model.output.w
    assert (w != w.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("dtype, message", [("float16", "scaled"), (jnp.int32, "floating-point")])
def test_types_that_training_cannot_use_are_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        trained(dtype, steps=1)
