"""Weights that are objects: `LowRank` in every place of a weight, against the merged model."""

import copy
import dataclasses
import itertools
import pickle
import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
from jaxformers import (
    Classifier,
    Dense,
    LowRank,
    MixtureOfExperts,
    MultiHeadAttention,
    Muon,
    OutputLayer,
    RMSNorm,
    RotaryPositionalEncoding,
    T5PositionBias,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    cast_floating,
    default_decay_mask,
    from_pretrained,
    language_model_loss,
    load,
    merge,
    rematerialize,
    save,
    scan_layers,
    train_step,
    unroll_layers,
)
from jaxformers.axes import axes_of
from jaxformers.paths import path_name
from jaxformers.weights import Weight, WeightObject, contract, lookup

VOCAB, D, N, G, H, F, E, RANK, MAX = 17, 12, 4, 2, 6, 14, 3, 5, 20
B, T = 3, 6
KEY = jax.random.key(0)
SIZES = dict(vocab_size=VOCAB, d_model=D, num_heads=N, d_ff=F, max_seq_length=MAX)

mixture = partial(MixtureOfExperts, num_experts=E, top_k=2, shared_d_ff=7)
MODELS = {
    "experts": partial(
        TransformerLM,
        **SIZES,
        num_layers=1,
        num_kv_heads=G,
        head_dim=H,
        position=RotaryPositionalEncoding(),
        norm=RMSNorm,
        feed_forward=mixture,
        tie_embeddings=True,
        key=KEY,
    ),
    "encoder": partial(
        TransformerEncoder,
        **SIZES,
        num_layers=1,
        learnable_pos=True,
        embedding=partial(TransformerEmbedding, num_token_types=2, embedding_dim=9),
        output=partial(OutputLayer, transform=Dense),
        tie_embeddings=False,
        classifier=partial(Classifier, num_labels=8, transform=Dense),
        key=KEY,
    ),
    "seq2seq": partial(
        Transformer,
        *(VOCAB, VOCAB + 2, D, N, 1, 1, F, MAX),
        position=lambda key: T5PositionBias(N, 8, 16, key=key),
        key=KEY,
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)


def is_object(x):
    return isinstance(x, WeightObject)


def numbers(shape, seed, scale=0.4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def plain(name, **options):
    """A model of any numbers: drawing them with NumPy compiles nothing."""
    shapes = eqx.filter_eval_shape(partial(MODELS[name], **options))
    seeds = itertools.count()
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.tree.map(
        lambda x: numbers(x.shape, next(seeds)) if is_shape(x) else x, shapes, is_leaf=is_shape
    )


def adapted(model, scale=0.5):
    """The model with a `LowRank` in place of each weight."""
    seeds = itertools.count(1000)

    def low_rank(module, name, w):
        apart, split = axes_apart(module, w), axes_apart(module, w) + inputs_of(name)
        a = numbers((*w.shape[:split], RANK), next(seeds))
        b = numbers((*w.shape[:apart], RANK, *w.shape[split:]), next(seeds))
        return LowRank(w, a, b, scale)

    return replaced(model, low_rank)


def axes_apart(module, w):
    return int(isinstance(module, MixtureOfExperts) and w.ndim == 3)


def inputs_of(name):
    return 2 if name == "wo" else 1


def replaced(model, new):
    """The model with `new(module, field, weight)` in place of each weight."""

    def change(x):
        if not isinstance(x, eqx.Module):
            return x
        x = copy.copy(x)
        for field in dataclasses.fields(x):
            value = getattr(x, field.name)
            if "Weight" in str(field.type) and value is not None:
                value = new(x, field.name, value)
            elif not field.metadata.get("static"):
                value = jax.tree.map(change, value, is_leaf=lambda y: isinstance(y, eqx.Module))
            object.__setattr__(x, field.name, value)
        return x

    return change(model)


def ids(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


@eqx.filter_jit
def call(model):
    if isinstance(model, Transformer):
        return model(ids(B, T + 1), ids(B, T))
    if isinstance(model, TransformerEncoder):
        out = model.logits(ids(B, T)), model.classify(ids(B, T))
        return jnp.concatenate([x.reshape(-1) for x in out])
    return model.logits(ids(B, T))


def loss(model):
    out = call(model)
    weights = np.random.default_rng(2).normal(size=out.shape).astype(np.float32)
    return (out * weights).mean()


def count(model):
    return sum(map(is_object, jax.tree.leaves(model, is_leaf=is_object)))


@pytest.mark.few(1)
@each_model
def test_every_weight_may_be_an_object(name):
    """Outputs, and the gradients of base, a and b, are those of the merged model."""
    base = plain(name)
    model = adapted(base)
    attention = re.compile("[.]b[qkv]$")
    paths = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(base)]
    weights = [path for path, x in paths if x.ndim > 1 and not attention.search(path)]
    assert count(model) == len(weights), "a field of a weight is annotated Float[Weight, ...]"
    merged = merge(model)
    assert count(merged) == 0
    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    # The same function of base, a and b: a model that is merged first.
    expected, through = jax.jit(jax.value_and_grad(lambda m: loss(merge(m))))(model)
    assert_close(value, expected)
    jax.tree.map(assert_close, gradient, through)
    unused = [path_name(p) for p, x in jax.tree_util.tree_leaves_with_path(gradient) if not x.any()]
    assert unused == []


def test_unchanged_at_first():
    model = plain("experts")
    at = lambda m: m.decoder.layers[0].self_attention.wq  # noqa: E731
    wq, new = at(model), LowRank.of(at(model), RANK, key=KEY)
    np.testing.assert_array_equal(call(eqx.tree_at(at, model, new)), call(model))
    assert (new.shape, new.ndim, new.dtype, new.rank) == (wq.shape, 3, wq.dtype, RANK)
    assert isinstance(new, Weight) and isinstance(wq, Weight) and not isinstance(3.0, Weight)
    assert float(jnp.abs(new.a).max()) > 0 and not new.b.any()


def test_stacks_and_vmap():
    model = adapted(plain("experts", num_layers=2))
    expected, gradient = jax.jit(jax.value_and_grad(loss))(model)
    changed = rematerialize(scan_layers(model), ("queries",))
    assert changed.decoder.layers.stacked.self_attention.wq.shape[0] == 2
    value, other = jax.jit(jax.value_and_grad(loss))(changed)
    assert_close(value, expected)
    jax.tree.map(assert_close, rematerialize(unroll_layers(other), None), gradient)
    merged = unroll_layers(merge(scan_layers(model)))
    jax.tree.map(assert_close, merged, merge(model))
    both = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), model)
    assert_close(eqx.filter_jit(eqx.filter_vmap(loss))(both)[0], expected)
    object.__setattr__(model.decoder.layers[1].self_attention.wq, "scale", 0.25)
    with pytest.raises(ValueError, match="self_attention.wq.scale is 0.5 and 0.25"):
        scan_layers(model)


def test_generation():
    """A cache gives the tokens of the whole sequence, and of the merged model."""
    model = adapted(plain("experts"))
    tokens = model.generate(ids(B, T), 4)
    np.testing.assert_array_equal(tokens, merge(model).generate(ids(B, T), 4))
    again = eqx.filter_jit(model.logits)(tokens).argmax(-1)[:, T - 1 : -1]
    np.testing.assert_array_equal(again, tokens[:, T:])


def test_files(tmp_path):
    model = adapted(plain("experts"))
    save(tmp_path / "model.safetensors", model)
    pickled = pickle.loads(pickle.dumps(model))
    for again in (load(tmp_path / "model.safetensors"), pickled, copy.deepcopy(model)):
        assert jax.tree.structure(again) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, again, model)


def test_checkpoints_are_merged(tmp_path):
    pytest.importorskip("safetensors")
    gelu = partial(jaxformers.FeedForward, activation=jaxformers.activations.gelu_tanh)
    options = dict(learnable_pos=True, tie_embeddings=True, embedding_scale=1.0, feed_forward=gelu)
    model = adapted(TransformerLM(**SIZES, num_layers=1, **options, key=KEY))
    model.save_pretrained(tmp_path)
    loaded, merged = from_pretrained(tmp_path), merge(model)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sixteen_bits():
    model = cast_floating(adapted(plain("experts")), jnp.bfloat16)
    wq = model.decoder.layers[0].self_attention.wq
    assert wq.dtype == wq.a.dtype == wq.dense().dtype == jnp.bfloat16
    assert jnp.abs(call(model) - call(merge(model))).max() < 0.1


def test_training():
    """The factors are matrices of their own, for Muon and for weight decay."""
    model, optimizer = adapted(plain("experts")), Muon(1e-2)
    layer = lambda m: m.decoder.layers[0]  # noqa: E731
    for part, names in (("self_attention", ("wq", "wo")), ("feed_forward", ("w_gate", "w_down"))):
        for name in names:
            decays = getattr(getattr(layer(default_decay_mask(model)), part), name)
            assert not decays.base and decays.a and decays.b
    axes = axes_of(model)
    wo, w_up = layer(axes).self_attention.wo, layer(axes).feed_forward.w_up
    assert (wo.a.names, wo.b.names) == (("n", "h", "r"), ("r", "d"))
    assert (w_up.a.names, w_up.b.apart) == (("e", "d", "r"), (0,))
    batch = {"tokens": ids(B, T), "targets": ids(B, T, seed=1)}
    changed, _, value = train_step(
        jax.tree.map(jnp.copy, model),
        optimizer.init(model),
        batch,
        optimizer=optimizer,
        loss=language_model_loss,
        key=KEY,
    )
    assert jnp.isfinite(value)
    old, new = (layer(m).self_attention.wo for m in (model, changed))
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), old, new)
    assert moved.base == 0 and min(moved.a, moved.b) > 0


class Scaled(eqx.Module, WeightObject):
    """The smallest kind of weight: an array times a number per output."""

    w: jax.Array
    s: jax.Array

    shape = property(lambda self: self.w.shape)
    dtype = property(lambda self: self.w.dtype)
    T = property(lambda self: Scaled(self.w.T, self.s))

    def __getitem__(self, i):
        return Scaled(self.w[i], self.s)

    def product(self, x):
        return x @ self.dense().reshape(x.shape[-1], -1)

    def rows(self, rows):
        return lookup(self.w, rows) * self.s

    def dense(self):
        return self.w * self.s

    def field_axes(self, axes):
        return {"w": axes}


@pytest.mark.parametrize("at", ["wq", "wo"])
def test_the_base_may_be_an_object(at):
    mha = MultiHeadAttention(D, N, num_kv_heads=G, head_dim=H, key=KEY)
    w = getattr(mha, at)
    base = Scaled(w, jnp.float32(2))
    new = LowRank.of(base, RANK, inputs=2 if at == "wo" else 1, scale=0.5, key=KEY)
    new = eqx.tree_at(lambda x: x.b, new, jnp.ones_like(new.b))
    x = jax.random.normal(KEY, (B, T, D))
    adapted = eqx.tree_at(lambda m: getattr(m, at), mha, new)
    assert_close(adapted(x), merge(adapted)(x))
    assert_close(new.dense() - 2 * w, 0.5 * (new.a @ new.b.reshape(RANK, -1)).reshape(w.shape))


def test_of_refuses_what_does_not_fit():
    w = jnp.ones((D, N, H))
    for options, message in [
        (dict(rank=0), "rank must be"),
        (dict(rank=2, inputs=3), "must have axes apart, inputs and outputs, got apart=0 and inp"),
        (dict(rank=2, apart=-1), "apart=-1"),
        (dict(rank=2, scale=0.0), "scale must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            LowRank.of(w, **options, key=KEY)
    with pytest.raises(ValueError, match="key must be"):
        LowRank.of(w, 2)
    with pytest.raises(ValueError, match="is one weight"):
        LowRank.of(w, 2, key=KEY)[0]


def test_a_row_beyond_the_table_is_nan():
    table = LowRank.of(jnp.ones((VOCAB, D)), RANK, key=KEY)
    out = jax.jit(lookup)(table, jnp.array([VOCAB, 1]))
    assert jnp.isnan(out[0]).all() and not jnp.isnan(out[1]).any()


def test_contract_sums_over_the_first_axes():
    x, w, b = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in
               ((B, T, N, H), (N, H, D, F), (D, F)))  # fmt: skip
    assert_close(contract(x, w, b, inputs=2), jnp.einsum("btnh,nhdf->btdf", x, w) + b)
