"""Layers that are scanned or computed again in the gradient give what they gave."""

import ast
import copy
import pickle
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
from jaxformers import (
    AdamW,
    ALiBi,
    GatedFeedForward,
    Pieces,
    RMSNorm,
    RotaryPositionalEncoding,
    T5PositionBias,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    default_decay_mask,
    from_pretrained,
    language_model_loss,
    rematerialize,
    scan_layers,
    train_step,
    unroll_layers,
)
from jaxformers.inspect import trace
from jaxformers.layer_stack import _materialized
from jaxformers.sites import LAYER_SITES, SITES

VOCAB, D, N, L, F, MAX = 13, 8, 2, 2, 12, 20
B, T = 3, 5
SIZES = VOCAB, D, N, L, F, MAX
MODELS = {
    "rotary": partial(
        TransformerLM,
        *SIZES,
        position=RotaryPositionalEncoding(),
        norm=RMSNorm,
        feed_forward=GatedFeedForward,
        num_kv_heads=1,
        window=3,
        attention_dropout_rate=0.2,
    ),
    "alibi": partial(TransformerLM, *SIZES, position=ALiBi(), norm_first=False),
    "seq2seq": partial(
        Transformer,
        VOCAB,
        VOCAB,
        D,
        N,
        L,
        L - 1,
        F,
        MAX,
        position=lambda key: T5PositionBias(N, key=key),
    ),
    "encoder": partial(TransformerEncoder, *SIZES, learnable_pos=True),
}
each_model = pytest.mark.parametrize("name", MODELS)
assert_close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def ids(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


def value_and_gradient(model, key):
    """A number that all outputs count in, with dropout, and its gradient."""

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        tokens = ids(B, T)
        padding = jnp.arange(T) < jnp.array([[T], [2], [4]])
        if isinstance(model, Transformer):
            out = model(tokens[:, ::-1], tokens, key=key, src_padding_mask=padding)
        else:
            out = model(tokens, key=key, padding_mask=padding)
        weights = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
        return (out * weights).mean()

    return loss(model)


def assert_same(a, b):
    """Bit for bit, and of the same structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each_model
def test_same_values_and_gradients(name, getkey):
    model, key = MODELS[name](key=getkey()), getkey()
    value, gradient = value_and_gradient(model, key)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-3
    others = [scan_layers(model), rematerialize(model, ("queries", "residual_after"))]
    if name == "rotary":
        others += [scan_layers(rematerialize(model))]
        others += [rematerialize(scan_layers(model), tuple(LAYER_SITES))]
    for other in others:
        other_value, other_gradient = value_and_gradient(other, key)
        assert_close(other_value, value)
        back = rematerialize(unroll_layers(other_gradient), None)
        jax.tree.map(assert_close, back, gradient)


@each_model
def test_there_and_back(name, getkey):
    model = MODELS[name](key=getkey())
    scanned = scan_layers(model)
    assert len(jax.tree.leaves(scanned)) < len(jax.tree.leaves(model))
    assert_same(unroll_layers(scanned), model)
    assert_same(unroll_layers(model), model)
    assert_same(scan_layers(scanned), scanned)
    assert_same(rematerialize(rematerialize(scanned), None), scanned)
    stack = model.encoder if name == "encoder" else model.decoder
    other = scan_layers(stack).layers
    assert len(other) == len(stack.layers)
    assert_same(tuple(other), stack.layers)
    assert_same(other[-1], stack.layers[-1])
    with pytest.raises(IndexError):
        other[len(other)]


def test_generation(getkey):
    """With caches, those of sliding windows too, by one token or in chunks."""
    model, prompt = MODELS["rotary"](key=getkey()), ids(B, T)
    real = jnp.arange(T) >= jnp.array([[0], [2], [1]])
    options = dict(prompt=prompt, max_new_tokens=9, padding_mask=real)
    for change in (scan_layers, rematerialize):
        assert_same(change(model).generate(**options), model.generate(**options))
    options |= dict(num_beams=2, end_token=1)
    assert_same(scan_layers(model).generate(**options), model.generate(**options))


def test_generation_from_source(getkey):
    model, src = MODELS["seq2seq"](key=getkey()), ids(B, T)
    tokens = [m.generate(src, 8, 0, 1) for m in (model, scan_layers(model))]
    assert_same(*tokens)


def training_program(num_layers, change):
    """The lowered gradient of a model with long sequences."""
    model = TransformerLM(VOCAB, 16, 2, num_layers, 64, 64, 0.0, key=jax.random.key(0))
    tokens = ids(4, 64)

    def loss(model):
        return model.logits(tokens).sum()

    return jax.jit(jax.grad(loss)).trace(change(model))


def test_rematerialization_saves_memory():
    """Of six layers, one at a time has its activations."""

    def temporary(change):
        compiled = training_program(6, change).lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(rematerialize) < 0.5 * temporary(lambda model: model)
    both = temporary(lambda model: rematerialize(scan_layers(model)))
    assert both < 0.5 * temporary(scan_layers)


def test_scanned_programs_do_not_grow():
    def size(num_layers):
        def change(model):
            return rematerialize(scan_layers(model))

        return len(str(training_program(num_layers, change).jaxpr).splitlines())

    assert size(2) == size(9) > 100


def test_programs_grow_with_the_depth_alone():
    """Not with its square, as where each layer adds up the residual stream from the start."""

    def size(num_layers):
        compiled = training_program(num_layers, lambda model: model).lower().compile()
        return len(compiled.as_text().splitlines())

    two, four, six = map(size, (2, 4, 6))
    assert six - four < 1.05 * (four - two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stream_is_not_changed_between_layers(dtype):
    numbers = jnp.array([jnp.nan, -0.0, 1e-30, 3.1, -jnp.inf], dtype)
    for first in numbers:
        x = jnp.concatenate([first[None], numbers])
        np.testing.assert_array_equal(
            *(y.astype("float32") for y in (jax.jit(_materialized)(x), x))
        )


def test_layers_that_differ_cannot_be_scanned(getkey):
    def message(**pieces):
        with pytest.raises(ValueError, match="Leave these layers a tuple") as caught:
            scan_layers(TransformerLM(*SIZES, key=getkey(), **pieces))
        return str(caught.value)

    windows = message(per_layer=lambda i: Pieces(window=None if i else 4))
    assert "layers 0 and 1 self_attention.window is 4 and None" in windows
    norms = message(per_layer=lambda i: Pieces(norm=RMSNorm) if i else Pieces())
    assert "layers 0 and 1 self_attention_residual.norm is LayerNorm" in norms
    heads = message(per_layer=lambda i: Pieces(num_kv_heads=2 - i % 2))
    assert "self_attention.wk is 'float32 of shape (8, 2, 4)' and" in heads
    with pytest.raises(ValueError, match="layer_order"):
        scan_layers(TransformerEncoder(*SIZES, layer_order=[0, 1, 0], key=getkey()))


def test_layers_in_an_order_are_rematerialized(getkey):
    model, key = TransformerEncoder(*SIZES, layer_order=[0, 1, 0], key=getkey()), getkey()
    a, b = value_and_gradient(model, key), value_and_gradient(rematerialize(model), key)
    jax.tree.map(assert_close, jax.tree.leaves(a), jax.tree.leaves(b))


@pytest.mark.parametrize("keep", ["queries", ["query"], ("keys", "key")])
def test_sites_that_are_not_there(keep, getkey):
    with pytest.raises(ValueError, match="names of sites, queries, keys, values"):
        rematerialize(MODELS["rotary"](key=getkey()), keep)


@pytest.mark.parametrize("change", [scan_layers, unroll_layers, rematerialize])
def test_models_without_layers(change):
    with pytest.raises(ValueError, match="expected a model with layers.*LayerNorm"):
        change(jaxformers.LayerNorm(4))


def test_sites_are_those_of_the_modules():
    names = set()
    for path in Path(jaxformers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "site":
                names.add(node.args[1].value)
    assert names == set(SITES)


@pytest.mark.parametrize("change", [scan_layers, rematerialize])
def test_a_changed_model_is_a_pytree(change, getkey, tmp_path):
    model = change(MODELS["rotary"](key=getkey()))
    assert_same(pickle.loads(pickle.dumps(model)), model)
    assert_same(copy.deepcopy(model), model)
    assert_same(jax.tree.map(lambda x: x, model), model)
    shapes = eqx.filter_eval_shape(lambda m: m, model)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)


@each_model
def test_decay_masks_agree(name, getkey):
    model = MODELS[name](key=getkey())
    mask, scanned = default_decay_mask(model), default_decay_mask(scan_layers(model))
    for stack in ("encoder", "decoder"):
        if hasattr(mask, stack):
            for layer in getattr(mask, stack).layers:
                assert jax.tree.leaves(layer) == jax.tree.leaves(
                    getattr(scanned, stack).layers.stacked
                )


def test_training(getkey):
    """Two updates of a scanned and rematerialized model are those of the model."""
    optimizer, key = AdamW(1e-2), getkey()
    batch = {"tokens": ids(B, T), "targets": ids(B, T, seed=1)}
    model = MODELS["rotary"](key=getkey())
    changed = rematerialize(scan_layers(model))
    results = []
    for m in (model, changed):
        m, state = jax.tree.map(jnp.copy, m), optimizer.init(m)
        for _ in range(2):
            m, state, value = train_step(
                m, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
            )
        results.append((rematerialize(unroll_layers(m), None), value))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize("change", [scan_layers, rematerialize])
def test_saved_as_a_checkpoint(change, getkey, tmp_path):
    pytest.importorskip("safetensors")
    gelu = partial(jaxformers.FeedForward, activation=jaxformers.activations.gelu_tanh)
    model = TransformerLM(
        *SIZES,
        learnable_pos=True,
        tie_embeddings=True,
        embedding_scale=1.0,
        feed_forward=gelu,
        key=getkey(),
    )
    change(model).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(model))


# Equal layers are traced once.


def counted(layers, **options):
    """A model, and the list that grows by one with each tracing of a layer."""
    traced = []

    def activation(x):
        traced.append(x.shape)
        return jax.nn.gelu(x)

    feed_forward = partial(GatedFeedForward, activation=activation)
    options = {"position": RotaryPositionalEncoding(), "feed_forward": feed_forward} | options
    return TransformerLM(VOCAB, D, N, layers, F, MAX, key=jax.random.key(0), **options), traced


TOKENS = jnp.ones((B, T), jnp.int32)


def test_equal_layers_are_traced_once():
    model, traced = counted(5)
    model(TOKENS)
    assert len(traced) == 1
    model.generate(TOKENS, 4)
    assert len(traced) == 3  # the prompt and the loop are two bodies
    eqx.filter_jit(eqx.filter_grad(lambda model: model(TOKENS, key=jax.random.key(1)).sum()))(model)
    assert len(traced) == 4
    text = jax.jit(model.__call__).lower(TOKENS).as_text()
    assert text.count("call @layer(") == 5 and text.count("func.func private @layer(") == 1


def test_each_kind_of_layer_is_traced():
    model, traced = counted(6, per_layer=lambda i: Pieces(window=3 if i % 3 else None))
    model(TOKENS)
    assert len(traced) == 2


def test_layers_outside_of_a_program_or_watched_are_each_run():
    """A function of their own would be compiled in each call, or lose what is watched."""
    model, traced = counted(3)
    hidden = jnp.ones((B, T, D))
    jax.grad(lambda x: model.decoder(x).sum())(hidden)
    assert len(traced) == 3
    model(TOKENS)
    _, found = trace(model, ["*.activations"])(TOKENS)
    assert len(found) == 3 and len(traced) == 3 + 1 + 3
