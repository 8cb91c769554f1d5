"""A model is a pytree of arrays: every tool of JAX and Equinox works on it as on any other."""

import io
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    GatedFeedForward,
    LayerNorm,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
)

VOCAB, D, N, F, MAX = 13, 8, 2, 12, 20
B, T = 3, 5
MODELS = {
    "language model": partial(
        TransformerLM, VOCAB, D, N, 1, F, MAX, position=RotaryPositionalEncoding(), norm=RMSNorm
    ),
    "seq2seq": partial(
        Transformer, VOCAB, VOCAB, D, N, 1, 1, F, MAX, position=ALiBi(), share_embeddings=True
    ),
    "encoder": partial(
        TransformerEncoder,
        *(VOCAB, D, N, 2, F, MAX),
        learnable_pos=True,
        norm=partial(LayerNorm, use_bias=False),
        norm_first=False,
        feed_forward=partial(GatedFeedForward, activation=partial(jax.nn.gelu, approximate=True)),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def ids(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


def call(model, tokens):
    """The outputs of any of the models."""
    arguments = (tokens[..., ::-1], tokens) if isinstance(model, Transformer) else (tokens,)
    return model(*arguments)


def loss(model, tokens):
    weights = np.random.default_rng(1).normal(size=(D if hasattr(model, "encoder") else VOCAB))
    out = call(model, tokens)
    return (out * jnp.resize(jnp.asarray(weights, jnp.float32), out.shape)).sum()


def assert_same(a, b):
    """Bit for bit, and of the same structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_all_close(a, b):
    jax.tree.map(assert_close, a, b)


@each_model
def test_leaves_are_arrays(name, getkey):
    """So a plain `jax.jit` takes a model, and no function or number is in the way."""
    model, tokens = MODELS[name](key=getkey()), ids(B, T)
    leaves = jax.tree.leaves(model)
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert_same(jax.tree.map(lambda leaf: leaf, model), model)
    assert_close(jax.jit(call)(model, tokens), call(model, tokens))


def test_no_array_is_there_twice(getkey):
    """Shared tables, norms and position schemes are one leaf each, so donation works."""
    for build in MODELS.values():
        leaves = jax.tree.leaves(build(key=getkey()))
        assert len({id(leaf) for leaf in leaves}) == len(leaves)


def test_a_second_model_compiles_nothing_again(getkey):
    """The same construction gives the same structure."""
    for build in MODELS.values():
        traced = []
        compiled = jax.jit(lambda model, traced=traced: traced.append(jax.tree.structure(model)))
        for _ in range(2):
            compiled(build(key=getkey()))
        assert len(traced) == 1


@each_model
def test_transformations_of_a_call(name, getkey):
    """vmap over inputs; grad, with checkpoint too; forward mode against reverse mode."""
    model, tokens = MODELS[name](key=getkey()), ids(B, T)
    assert_close(jax.vmap(partial(call, model))(tokens), call(model, tokens))
    split = tokens[:, None]
    assert_close(jax.vmap(partial(call, model))(split)[:, 0], call(model, tokens))

    @jax.jit
    def transform(model, tangent):
        value, gradient = jax.value_and_grad(loss)(model, tokens)
        saved = jax.value_and_grad(jax.checkpoint(loss))(model, tokens)
        forward = jax.jvp(lambda m: loss(m, tokens), (model,), (tangent,))
        # Equinox's gradient is that of JAX, since there are arrays only.
        filtered = value, eqx.filter_grad(loss)(model, tokens)
        return (value, gradient), saved, filtered, forward

    leaves, structure = jax.tree.flatten(model)
    rng = np.random.default_rng(0)
    tangent = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]
    plain, saved, filtered, forward = transform(model, structure.unflatten(tangent))
    value, gradient = plain
    assert_all_close(saved, plain)
    assert_all_close(filtered, plain)
    along = sum((a * b).sum() for a, b in zip(jax.tree.leaves(gradient), tangent, strict=True))
    assert_all_close(forward, (value, along))
    flat = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)]
    assert np.isfinite(flat).all() and max(flat) > 0


def test_gradient_is_the_slope(getkey):
    """Central differences in one direction, where relu and float32 allow three digits."""
    model, tokens = MODELS["language model"](key=getkey()), ids(B, T)
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)), model)
    direction = jax.tree.map(lambda d, x: d.reshape(x.shape), direction, model)
    run = jax.jit(
        lambda step: loss(jax.tree.map(lambda x, d: x + step * d, model, direction), tokens)
    )
    _, slope = jax.jvp(run, (jnp.float32(0),), (jnp.float32(1),))
    step = 3e-4
    np.testing.assert_allclose((run(step) - run(-step)) / (2 * step), slope, rtol=1e-2)


@pytest.mark.few(1)
@each_model
def test_ensembles(name, getkey):
    """Several models in one pytree: constructed, called, stacked and taken apart."""
    keys, tokens = jax.random.split(getkey(), 2), ids(B, T)
    ensemble = eqx.filter_vmap(lambda key: MODELS[name](key=key))(keys)
    together = eqx.filter_vmap(call, in_axes=(eqx.if_array(0), None))(ensemble, tokens)
    each_its_own = jax.vmap(call)(ensemble, jnp.stack([tokens, tokens[::-1]]))
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], ensemble) for i in range(2)]
    assert_close(together[0], call(members[0], tokens))
    assert_close(together[1], call(members[1], tokens))
    assert_close(each_its_own[1], call(members[1], tokens[::-1]))
    assert not np.allclose(together[0], together[1], atol=1e-3)
    assert_all_close(members[1], MODELS[name](key=keys[1]))
    assert_same(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), ensemble)


@each_model
def test_surgery_partition_and_shapes(name, getkey):
    key = getkey()
    model, tokens = MODELS[name](key=key), ids(B, T)
    arrays, rest = eqx.partition(model, eqx.is_array)
    assert not jax.tree.leaves(rest)
    assert_same(eqx.combine(arrays, rest), model)

    stack = model.encoder if hasattr(model, "encoder") else model.decoder
    gain = stack.layers[0].feed_forward_residual.norm.gain
    assert (gain == 1).all()

    def where(m):
        stack = m.encoder if hasattr(m, "encoder") else m.decoder
        return stack.layers[0].feed_forward_residual.norm.gain

    other = eqx.tree_at(where, model, gain * jnp.arange(D, dtype=gain.dtype))
    assert (where(model) == 1).all()
    assert not np.allclose(call(other, tokens), call(model, tokens), atol=1e-3)

    shapes = eqx.filter_eval_shape(MODELS[name], key=key)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)]
    assert described == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
    out = eqx.filter_eval_shape(call, shapes, tokens)
    assert out.shape == call(model, tokens).shape
    # A model is itself a pytree, so JAX's own function will do as well.
    assert jax.tree.structure(jax.eval_shape(lambda key: MODELS[name](key=key), key)) == (
        jax.tree.structure(model)
    )


@each_model
def test_saved_is_loaded_bit_for_bit(name, getkey):
    model, skeleton = MODELS[name](key=getkey()), MODELS[name](key=getkey())
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    assert_same(eqx.tree_deserialise_leaves(file, skeleton), model)


@each_model
def test_devices(name, getkey):
    """To another device, and spread over both: the same numbers."""
    model, tokens = MODELS[name](key=getkey()), ids(2, T)
    expected = call(model, tokens)
    first, second = jax.devices()[:2]
    moved = jax.device_put(model, second)
    assert {leaf.device for leaf in jax.tree.leaves(moved)} == {second}
    assert_same(jax.device_put(moved, first), model)
    out = call(moved, jax.device_put(tokens, second))
    assert out.device == second
    assert_close(out, expected)

    mesh = jax.make_mesh((2,), ("batch",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("batch"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    spread = jax.jit(call)(jax.device_put(model, everywhere), jax.device_put(tokens, rows))
    assert_close(spread, expected)


def test_cache_is_a_pytree(getkey):
    """It passes through `scan`, which wants the same types and shapes in and out."""
    model, tokens = MODELS["language model"](key=getkey()), ids(B, T)
    cache = model.init_cache(B, T)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cache))

    def step(cache, token):
        hidden, cache = model.forward(token[:, None], cache=cache)
        return cache, model.logits_of(hidden)[:, 0]

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    assert_close(jnp.swapaxes(logits, 0, 1), model.logits(tokens))
    assert int(cache.length) == T
