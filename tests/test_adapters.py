"""Adapters: what is trained of a model that has them, and how they come and go."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    Adafactor,
    AdamW,
    Averaged,
    Checkpoints,
    Classifier,
    Dora,
    Groups,
    Lion,
    LowRank,
    MixtureOfExperts,
    Muon,
    RMSNorm,
    RotaryPositionalEncoding,
    TransformerEncoder,
    TransformerLM,
    cast_floating,
    default_decay_mask,
    evaluate,
    fit,
    freeze,
    language_model_loss,
    load,
    lora,
    merge,
    save,
    scan_layers,
    train_step,
    trainable,
    unload,
)
from jaxformers.adapters import adapter_names, over_root_rank
from jaxformers.paths import path_name
from jaxformers.quantization.quantized import Quantized
from jaxformers.weight_fields import map_weights
from jaxformers.weights import WeightObject, is_object

VOCAB, D, N, G, H, F, RANK = 17, 12, 4, 2, 6, 14, 3
KEY = jax.random.key(0)


def ids(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


BATCH = {"tokens": ids(4, 7), "targets": ids(4, 7, seed=1)}
OPTIONS = dict(loss=language_model_loss, key=KEY)


@pytest.fixture(scope="module")
def model():
    position = RotaryPositionalEncoding()
    sizes = dict(num_layers=2, num_kv_heads=G, head_dim=H, d_ff=F, max_seq_length=20)
    return TransformerLM(VOCAB, D, N, **sizes, position=position, norm=RMSNorm, key=KEY)


def on_queries(model, **options):
    """The model with a `LowRank` for the queries of each layer."""
    at = lambda m: [layer.self_attention.wq for layer in m.decoder.layers]  # noqa: E731
    return eqx.tree_at(at, model, [LowRank.of(w, RANK, **options, key=KEY) for w in at(model)])


def named(tree):
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def arrays(tree):
    return [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]


def size(tree):
    return sum(x.nbytes for x in arrays(tree))


def copied(tree):
    return jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)


class Fixed(eqx.Module, WeightObject):
    """A weight of integers, of which nothing is trained."""

    trained_fields = ()

    integers: jax.Array
    scale: jax.Array

    shape = property(lambda self: self.integers.shape)
    dtype = property(lambda self: self.scale.dtype)
    T = property(lambda self: Fixed(self.integers.T, self.scale))

    def __getitem__(self, i):
        return Fixed(self.integers[i], self.scale)

    def product(self, x):
        return x @ self.dense().reshape(x.shape[-1], -1).astype(x.dtype)

    def rows(self, rows):
        return self.dense()[rows]

    def dense(self):
        return self.scale * self.integers.astype(self.dtype)

    def field_axes(self, axes):
        return {"integers": axes}


def fixed(w):
    """The weight in eight bits; those of a feed-forward as the kind of weight of the package."""
    scale = jnp.abs(w).max() / 127
    integers = jnp.round(w / scale).astype(jnp.int8)
    if w.ndim == 2:
        return Quantized(integers.T, jnp.full((w.shape[1], 1), scale))
    return Fixed(integers, scale)


# What is trained.


def test_trainable_tells_what_is_trained(model):
    """Everything; adapters alone; never the parts of a weight that is fixed."""
    assert all(trained == eqx.is_inexact_array(x) for trained, x in zip(
        jax.tree.leaves(trainable(model)), jax.tree.leaves(model), strict=True))  # fmt: skip
    trained = {path for path, x in named(trainable(on_queries(model))).items() if x}
    layers = [f"decoder.layers.{i}.self_attention.wq" for i in (0, 1)]
    assert trained == {f"{layer}.{name}" for layer in layers for name in "ab"}
    half, rest = eqx.partition(on_queries(model), trainable(on_queries(model)))
    assert len(arrays(half)) == 4 and all(jax.tree.leaves(trainable(half)))
    quantized = eqx.tree_at(lambda m: m.output.w, model, replace_fn=fixed)
    assert named(trainable(quantized)) == {
        **{path: True for path in named(model) if path != "output.w"},
        **dict.fromkeys(("output.w.integers", "output.w.scale"), False),
    }
    at = lambda m: m.output.w  # noqa: E731
    on_top = eqx.tree_at(at, quantized, LowRank.of(at(quantized), RANK, key=KEY))
    assert {path for path, x in named(trainable(on_top)).items() if x} == {
        "output.w.a", "output.w.b"}  # fmt: skip
    twice = eqx.tree_at(at, on_top, LowRank.of(at(on_top), RANK, key=KEY))
    of_output = named(trainable(twice).output.w)
    assert {path for path, x in of_output.items() if x} == {"a", "b"}


def optax_adamw():
    return pytest.importorskip("optax").adamw(1e-2)


def is_first(path, array):
    return ".0." in path


OPTIMIZERS = {
    "adamw": lambda: AdamW(1e-2, weight_decay=0.1, max_grad_norm=1.0),
    "muon": lambda: Muon(1e-2),
    "adafactor": Adafactor,
    "lion": lambda: Lion(1e-3, weight_decay=0.1),
    "averaged": lambda: Averaged(AdamW(1e-2)),
    "groups": lambda: Groups([(is_first, Lion(1e-3))], AdamW(1e-2), max_grad_norm=1.0),
    "freeze": lambda: freeze(AdamW(1e-2), lambda path, array: "embedding" in path),
    "optax": optax_adamw,
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_alone_are_trained(name, model):
    """After 20 steps the base has its bits, and was never copied; the state is that of adapters."""
    optimizer, adapted = OPTIMIZERS[name](), on_queries(model)
    before, factors = copied(model), size(eqx.filter(adapted, trainable(adapted)))
    training = fit(adapted, optimizer, [BATCH], steps=20, progress=False, **OPTIONS)
    after = training.model
    kept = eqx.filter(after, trainable(after), inverse=True)
    assert all(x is y for x, y in zip(arrays(kept), arrays(model), strict=True))
    jax.tree.map(np.testing.assert_array_equal, eqx.filter(model, eqx.is_array), before)
    moved = zip(arrays(factors_of(after)), arrays(factors_of(adapted)), strict=True)
    assert all((x != y).any() for x, y in moved)
    state = size(training.optimizer_state)
    print(f"{name}: model {size(model)} bytes, adapters {factors}, state {state}")
    assert state <= 3 * factors + 64


def factors_of(adapted):
    return eqx.filter(adapted, trainable(adapted))


def test_gradients_of_bases_are_ignored(model):
    """An update has no use for them: neither for the norm nor for the base."""
    adapted, optimizer = on_queries(model), AdamW(1e-2, max_grad_norm=1e-3)
    state = optimizer.init(adapted)
    grads = eqx.filter_grad(lambda m: language_model_loss(m, BATCH, KEY))(adapted)
    alone = eqx.filter(grads, trainable(adapted))
    assert len(arrays(alone)) == 4 < len(arrays(grads))
    expected, _ = optimizer.update(alone, state, adapted)
    changed, _ = optimizer.update(grads, state, adapted)
    jax.tree.map(np.testing.assert_array_equal, changed, expected)


def test_train_step_leaves_the_base_usable(model):
    """It is neither donated nor copied; accumulated gradients are those of the adapters."""
    adapted, optimizer = on_queries(model), AdamW(1e-2)
    own = eqx.combine(copied(factors_of(adapted)), adapted)
    state = optimizer.init(own)
    changed, state, value = train_step(
        own, state, BATCH, optimizer=optimizer, accumulate=2, compute_dtype=jnp.bfloat16, **OPTIONS
    )
    assert jnp.isfinite(value) and changed.output.w is model.output.w
    assert own.decoder.layers[0].self_attention.wq.a.is_deleted()
    assert not any(x.is_deleted() for x in arrays(model))
    factors = changed.decoder.layers[0].self_attention.wq
    assert (factors.b != 0).any() and factors.b.dtype == jnp.float32


def test_quantized_alone_trains_the_rest(model):
    """Norms and biases move. Integers and scales stay, without gradients or state."""
    quantized = eqx.tree_at(lambda m: m.output.w, model, replace_fn=fixed)
    training = fit(quantized, AdamW(1e-2), [BATCH], steps=2, progress=False, **OPTIONS)
    assert training.model.output.w.scale is quantized.output.w.scale
    assert training.optimizer_state.moments.output.w.scale is None
    assert (training.model.decoder.norm.gain != model.decoder.norm.gain).any()


def test_bases_of_16_bits_have_adapters_of_32(model):
    """The base is never widened: the model computes in its type, the factors in float32."""
    half = cast_floating(model, jnp.bfloat16)
    adapted = scan_layers(on_queries(half))
    types = {path: str(x.dtype) for path, x in named(adapted).items()}
    assert {types.pop(path) for path in list(types) if path.endswith(("wq.a", "wq.b"))} == {
        "float32"
    }
    assert set(types.values()) == {"bfloat16"}
    training = fit(adapted, AdamW(1e-2), [BATCH], steps=3, progress=False, **OPTIONS)
    after = training.model.decoder.layers.stacked.self_attention.wq
    assert after.base.dtype == jnp.bfloat16 and after.b.dtype == jnp.float32 and after.b.any()
    assert evaluate(training.model, [BATCH], loss=language_model_loss) < np.log(VOCAB) * 1.5

    def loss(trained, frozen):
        return language_model_loss(eqx.combine(trained, frozen), BATCH, KEY)

    parts = eqx.partition(adapted, trainable(adapted))
    program = str(jax.make_jaxpr(jax.grad(loss))(*parts))
    assert f"f32[2,{D},{N},{H}]" not in program and f"f32[{VOCAB},{D}]" not in program


def test_decay_and_names(model):
    mask = named(default_decay_mask(on_queries(model)))
    assert {path for path, x in mask.items() if x} == {
        path for path, x in named(trainable(on_queries(model))).items() if x
    }


# Adapters come and go.

EXPERTS = partial(MixtureOfExperts, num_experts=3, top_k=2)


def filled(adapted, seed=0):
    """The adapted model with any numbers in place of those at first."""
    trained, rest = eqx.partition(adapted, trainable(adapted))
    leaves, structure = jax.tree.flatten(trained)
    draw = np.random.default_rng(seed).normal
    leaves = [x + jnp.asarray(draw(size=x.shape) * 0.2, x.dtype) for x in leaves]
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)


@eqx.filter_jit
def adapted_loss(trained, rest):
    return language_model_loss(eqx.combine(trained, rest), BATCH, KEY)


logits = eqx.filter_jit(lambda model: model.logits(BATCH["tokens"]))
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [LowRank, Dora])
@pytest.mark.parametrize("form", ["plain", "scanned", "experts", "quantized"])
def test_merged_is_unmerged(form, kind, model):
    if form == "experts":
        sizes = dict(num_layers=1, d_ff=F, max_seq_length=20, feed_forward=EXPERTS)
        model = TransformerLM(VOCAB, D, N, **sizes, norm=RMSNorm, use_bias=False, key=KEY)
    model = scan_layers(model) if form == "scanned" else model
    if form == "quantized":
        model = map_weights(lambda path, w, axes: fixed(w) if "layers" in path else w, model)
    adapted = lora(model, RANK, kind=kind, key=KEY)
    assert_close(logits(adapted), logits(model))
    changed = filled(adapted)
    before = copied(changed)
    grads = jax.tree.leaves(jax.grad(adapted_loss)(*eqx.partition(changed, trainable(changed))))
    assert all(x.any() and jnp.isfinite(x).all() for x in grads)
    merged = merge(changed)
    assert np.abs(logits(changed) - logits(model)).max() > 0.1
    assert_close(logits(merged), logits(changed))
    assert not [x for x in jax.tree.leaves(merged, is_leaf=is_object) if is_object(x)]
    jax.tree.map(np.testing.assert_array_equal, arrays(changed), arrays(before))
    bare = unload(changed)
    assert all(x is y for x, y in zip(arrays(bare), arrays(model), strict=True))


def test_adapted_weights(model):
    paths = {
        path.rpartition(".")[0] for path, x in named(trainable(lora(model, key=KEY))).items() if x
    }
    names = "self_attention.wq self_attention.wk self_attention.wv self_attention.wo"
    names += " feed_forward.w_in feed_forward.w_out"
    assert paths == {f"decoder.layers.{i}.{name}" for i in (0, 1) for name in names.split()}
    some = lora(
        model, 2, 8, where=lambda path, w: path.endswith("wq"), scaling=over_root_rank, key=KEY
    )
    wq = some.decoder.layers[0].self_attention.wq
    assert wq.rank == 2 and wq.scale == 8 / 2**0.5


def test_arrays_that_are_trained_whole(model):
    """Norms and biases, beside the low-rank changes; the type of a base is kept."""
    also = lambda path, x: path.endswith((".gain", ".bo")) or path == "output.b"  # noqa: E731
    half = cast_floating(model, jnp.bfloat16)
    adapted = lora(half, RANK, also=also, key=KEY)
    norm = adapted.decoder.norm.gain
    assert norm.value.dtype == jnp.float32 and norm.base is half.decoder.norm.gain
    np.testing.assert_array_equal(logits(adapted), logits(half))
    training = fit(adapted, AdamW(1e-2), [BATCH], steps=2, progress=False, **OPTIONS)
    after = training.model
    assert (after.output.b.value != 0).any() and (after.output.b.base == 0).all()
    merged = merge(after)
    assert merged.decoder.norm.gain.dtype == jnp.bfloat16
    assert np.abs(logits(merged) - logits(after)).max() < 0.1
    assert unload(after).output.b is half.output.b


def test_several_ranks_beside_a_classifier():
    """A later call for other weights finds the classifier, which the first one trains whole."""
    options = dict(num_layers=1, d_ff=F, max_seq_length=20, key=KEY)
    encoder = TransformerEncoder(
        VOCAB, D, N, **options, classifier=partial(Classifier, num_labels=3)
    )
    on = lambda part: lambda path, weight: part in path  # noqa: E731
    both = lora(lora(encoder, 2, where=on("attention"), key=KEY), 5, where=on("feed"), key=KEY)
    layer = both.encoder.layers[0]
    assert (layer.self_attention.wq.rank, layer.feed_forward.w_in.rank) == (2, 5)
    assert trainable(both).classifier.out.w.value
    none = lora(encoder, 2, also=None, key=KEY)
    assert none.classifier.out.w is encoder.classifier.out.w


def test_several_by_name(model):
    first = filled(lora(model, RANK, name="one", key=KEY))
    both = filled(lora(first, 2, name="two", where=is_first, kind=Dora, key=KEY), 1)
    assert adapter_names(both) == ("one", "two")
    pairs = zip(*(arrays(m.decoder.layers[0]) for m in (unload(both, "two"), first)), strict=True)
    assert all(x is y for x, y in pairs)
    other = unload(both, "one")
    assert adapter_names(other) == ("two",) and adapter_names(unload(both)) == ()
    assert_close(logits(merge(both)), logits(both))
    wq = trainable(both).decoder.layers[0].self_attention.wq
    assert wq.a and wq.magnitude and not wq.base.a  # the outermost


def test_files_and_checkpoints(model, tmp_path):
    pytest.importorskip("safetensors")
    adapted = filled(lora(model, RANK, kind=Dora, also=lambda path, x: "norm" in path, key=KEY))
    save(tmp_path / "model.safetensors", adapted)
    again = load(tmp_path / "model.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    options = dict(progress=False, checkpoint=Checkpoints(tmp_path / "run", every=2), **OPTIONS)
    fit(again, AdamW(1e-2), [BATCH], steps=2, **options)
    resumed = fit(again, AdamW(1e-2), [BATCH], steps=4, **options)
    options["checkpoint"] = None
    whole = fit(again, AdamW(1e-2), [BATCH], steps=4, **options)
    jax.tree.map(np.testing.assert_array_equal, arrays(resumed.model), arrays(whole.model))


def test_refusals(model, no_shape_checker):
    adapted = lora(model, key=KEY)
    for call, message in [
        (lambda: lora(model, rank=0, key=KEY), "rank must be"),
        (lambda: lora(model, alpha=-1.0, key=KEY), "alpha must be"),
        (lambda: lora(model), "key must be"),
        (lambda: lora(model, where="wq", key=KEY), "where must be a function"),
        (lambda: lora(model, where=lambda path, w: "q_proj" in path, key=KEY), "such as .*[.]wo"),
        (lambda: lora(model, also=lambda path, w: "x" == path, key=KEY), "also= holds for none"),
        (lambda: lora(model, name=None, key=KEY), "name must be a text"),
        (lambda: lora(model, kind=dict, key=KEY), "kind.of must be"),
        (lambda: lora(adapted, key=KEY), "wq has an adapter 'default' already"),
        (lambda: unload(model), "must have an adapter, and it has none"),
        (lambda: unload(adapted, "fr"), "the adapter 'fr', and it has 'default'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
