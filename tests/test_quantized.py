"""Weights of eight and four bits: `Quantized` in every place, against the dense model."""

import copy
import itertools
import pickle
from math import prod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_weights import (
    KEY,
    MODELS,
    adapted,
    assert_close,
    axes_apart,
    call,
    count,
    each_model,
    ids,
    inputs_of,
    loss,
    plain,
    replaced,
)

from jaxformers import (
    LowRank,
    MultiHeadAttention,
    Quantized,
    TransformerLM,
    cast_floating,
    digest,
    from_pretrained,
    load,
    merge,
    save,
    scan_layers,
    unroll_layers,
)
from jaxformers.axes import axes_of
from jaxformers.paths import path_name
from jaxformers.quantization.quantized import pack, unpack
from jaxformers.weights import contract, lookup

B, T = 3, 6


def quantized(shape, *, inputs=1, apart=0, bits=8, groups=1, table=False, seed=0, **options):
    """A `Quantized` of any numbers in place of an array `(apart, i, o)` or a table `(o, i)`."""
    rng = np.random.default_rng(seed)
    split = apart + inputs
    outputs, inside = (shape[:1], shape[1:]) if table else (shape[split:], shape[apart:split])
    stored = (*shape[:apart], *outputs, *inside)
    low, high = (-128, 128) if bits == 8 else (0, 16)
    integers = jnp.asarray(rng.integers(low, high, stored), jnp.int8)
    scales = (*shape[:apart], *outputs, groups)
    scale = rng.uniform(0.5, 1, scales) * (0.01 if bits == 8 else 0.1)
    offset = jnp.asarray(rng.normal(size=scales) * 0.1 - 0.6, jnp.float32) if bits == 4 else None
    return Quantized(
        integers if bits == 8 else pack(integers),
        jnp.asarray(scale, jnp.float16 if groups > 2 else jnp.float32),
        offset,
        bits=bits,
        outputs=len(outputs),
        transposed=table,
        **options,
    )


def by_hand(w, k):
    """The array that a weight stands for, number by number with NumPy."""
    integers = np.asarray(w.integers)
    if w.bits == 4:
        integers = np.stack([integers % 16, integers // 16], -1)
        integers = integers.reshape(*w.integers.shape[:-1], -1)
    split = w.scale.ndim - 1
    rows = integers.reshape(*integers.shape[:split], -1).astype(np.float32)
    wide = [None if x is None else np.repeat(np.asarray(x, np.float32), rows.shape[-1] // k, -1)
            for x in (w.scale, w.offset)]  # fmt: skip
    numbers = (rows * wide[0] + (0 if wide[1] is None else wide[1])).reshape(integers.shape)
    if w.transposed:
        return numbers
    apart = split - w.outputs
    order = [*range(apart), *range(split, integers.ndim), *range(apart, split)]
    return numbers.transpose(order)


def in_every_place(model):
    """The model with a `Quantized` in place of each weight, of many kinds."""
    seeds = itertools.count()

    def new(module, name, w):
        seed, apart = next(seeds), axes_apart(module, w)
        table = name == "weight"
        inputs = inputs_of(name)
        inside = w.shape[1:] if table else w.shape[apart : apart + inputs]
        groups = [k for k in (1, 2, 3, 6) if prod(inside) % k == 0]
        bits = 4 if seed % 2 and inside[-1] % 2 == 0 else 8
        options = dict(groups=groups[seed % len(groups)], table=table, seed=seed)
        return quantized(w.shape, inputs=inputs, apart=apart, bits=bits, **options)

    return replaced(model, new)


CASES = {
    "8 bits": dict(shape=(12, 5)),
    "8 bits, an odd width": dict(shape=(7, 5)),
    "groups": dict(shape=(12, 5), groups=3),
    "heads": dict(shape=(12, 3, 5), groups=4),
    "inputs of two axes": dict(shape=(3, 4, 7), inputs=2, groups=2),
    "4 bits": dict(shape=(12, 5), bits=4),
    "4 bits, heads": dict(shape=(12, 3, 5), bits=4, groups=3),
    "4 bits, inputs of two axes": dict(shape=(3, 4, 7), inputs=2, bits=4, groups=6),
    "experts": dict(shape=(2, 12, 5), apart=1, bits=4, groups=3),
    "table": dict(shape=(13, 6), table=True),
    "table of 4 bits": dict(shape=(13, 6), table=True, bits=4, groups=3),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_numbers(name):
    case = CASES[name]
    w = quantized(**case)
    assert (w.shape, w.ndim, w.dtype) == (case["shape"], len(case["shape"]), jnp.float32)
    expected = by_hand(w, case.get("groups", 1))
    np.testing.assert_array_equal(w.dense(), expected)
    np.testing.assert_array_equal(w.cast(jnp.bfloat16).dense(), w.dense().astype(jnp.bfloat16))
    if case.get("apart"):
        np.testing.assert_array_equal(w[1].dense(), expected[1])
        np.testing.assert_array_equal(jax.jit(lambda i: w[i].dense())(jnp.int32(1)), expected[1])
    if w.ndim == 2:
        assert w.T.shape == w.shape[::-1]
        np.testing.assert_array_equal(w.T.dense(), expected.T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [(), (0,), (2, 17)])
def test_products(rows, dtype):
    for case in CASES.values():
        w, inputs = quantized(**case, dtype=dtype), case.get("inputs", 1)
        if case.get("apart"):
            w = w[0]
        x = jnp.asarray(np.random.default_rng(3).normal(size=(*rows, *w.shape[:inputs])), dtype)
        y = contract(x, w, inputs=inputs)
        expected = jnp.tensordot(x.astype(jnp.float32), w.cast(jnp.float32).dense(), inputs)
        assert y.dtype == dtype and y.shape == expected.shape
        bound = 1e-5 if dtype == jnp.float32 else 0.05
        np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=bound, atol=bound)
        if w.ndim == 2:
            back = contract(y, w.T)
            assert back.dtype == dtype and back.shape == x.shape


def test_double_precision():
    with jax.enable_x64(True):
        x = jnp.ones((2, 12), jnp.float64)
        for options in (dict(), dict(groups=3), dict(bits=4)):
            w = quantized((12, 5), dtype=jnp.float64, **options)
            y = contract(x, w)
            assert y.dtype == w.dense().dtype == jnp.float64
            assert_close(y, x @ w.dense())


def test_rows_of_a_table():
    for w in (quantized(**CASES["table"]), quantized(**CASES["table of 4 bits"])):
        rows = jnp.array([[12, 0], [3, 13]])
        for table in (w, w.T.T, LowRank.of(w, 4, key=KEY)):
            out = jax.jit(lookup)(table, rows)
            np.testing.assert_array_equal(out[:1], w.dense()[rows[:1]])
            assert jnp.isnan(out[1, 1]).all() and not jnp.isnan(out[1, 0]).any()
        turned = lookup(w.T, jnp.array([5, 6]))
        np.testing.assert_array_equal(turned[0], w.dense().T[5])
        assert jnp.isnan(turned[1]).all()
        assert lookup(w.cast(jnp.bfloat16), rows).dtype == jnp.bfloat16
        assert lookup(w, jnp.zeros((0, 2), jnp.int32)).shape == (0, 2, 6)


@each_model
def test_in_every_place_of_a_weight(name):
    """Outputs, and the gradients of the other arrays, are those of the dense model."""
    model = in_every_place(plain(name))
    merged = merge(model)
    assert count(model) == count(adapted(plain(name))) and count(merged) == 0

    is_ours = lambda x: isinstance(x, Quantized)  # noqa: E731
    kept = jax.tree.map(lambda x: not is_ours(x), model, is_leaf=is_ours)

    @eqx.filter_jit
    def value_and_gradient(others, rest, change):
        return jax.value_and_grad(lambda x: loss(change(eqx.combine(x, rest))))(others)

    value, gradient = value_and_gradient(*eqx.partition(model, kept), lambda model: model)
    expected, through = value_and_gradient(*eqx.partition(model, kept), merge)
    assert_close(value, expected)
    jax.tree.map(assert_close, gradient, through)
    assert jax.tree.leaves(gradient)


def test_stacks():
    model = in_every_place(plain("experts", num_layers=2))
    scanned = scan_layers(model)
    assert scanned.decoder.layers.stacked.self_attention.wq.shape == (2, 12, 4, 6)
    assert_close(call(scanned), call(model))
    jax.tree.map(np.testing.assert_array_equal, unroll_layers(scanned), model)
    merged = unroll_layers(merge(scanned))
    jax.tree.map(np.testing.assert_array_equal, merged, merge(model))


def test_vmap():
    mha = in_every_place(MultiHeadAttention(12, 4, num_kv_heads=2, head_dim=6, key=KEY))
    x = jax.random.normal(KEY, (B, T, 12))
    expected = eqx.filter_jit(merge(mha))(x)
    assert_close(eqx.filter_jit(eqx.filter_vmap(mha))(x), expected)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), mha)
    by_both = eqx.filter_jit(eqx.filter_vmap(lambda mha, x: mha(x)))(both, x[:2])
    assert_close(by_both, expected[:2])


def test_generation():
    """A cache gives the tokens of the whole sequence; beams and streams work."""
    model = in_every_place(plain("experts"))
    merged, prompt = merge(model), ids(B, T)
    tokens = model.generate(prompt, 4)
    np.testing.assert_array_equal(tokens, merged.generate(prompt, 4))
    again = eqx.filter_jit(model.logits)(tokens).argmax(-1)[:, T - 1 : -1]
    np.testing.assert_array_equal(again, tokens[:, T:])
    np.testing.assert_array_equal(jnp.stack([*model.stream(prompt, 4)], 1), tokens[:, T:])
    beams = [m.generate(prompt, 4, num_beams=2) for m in (model, merged)]
    np.testing.assert_array_equal(*beams)


def test_files(tmp_path):
    model = in_every_place(plain("experts"))
    save(tmp_path / "model.safetensors", model)
    for again in (
        load(tmp_path / "model.safetensors"),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert jax.tree.structure(again) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, again, model)
        assert digest(again) == digest(model)
    at = lambda m: m.decoder.layers[0].self_attention.wq.scale  # noqa: E731
    assert digest(eqx.tree_at(at, model, 2 * at(model))) != digest(model)


def test_checkpoints_are_dense(tmp_path):
    pytest.importorskip("safetensors")
    options = {**MODELS["experts"].keywords, "feed_forward": None}
    options = {name: x for name, x in options.items() if name not in ("feed_forward", "key")}
    model = TransformerLM(**options, use_bias=False, embedding_scale=1.0, key=KEY)
    model = in_every_place(model)
    model.save_pretrained(tmp_path)
    loaded, merged = from_pretrained(tmp_path), merge(model)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sixteen_bits():
    """The type that weights give changes, and their own arrays do not."""
    model = in_every_place(plain("experts"))
    half = cast_floating(model, jnp.bfloat16)
    wq, before = (m.decoder.layers[0].self_attention.wq for m in (half, model))
    assert wq.dtype == wq.dense().dtype == half.decoder.norm.gain.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, wq, before.cast(jnp.bfloat16))
    assert wq.scale.dtype == before.scale.dtype
    assert jnp.abs(call(half) - call(model)).max() < 0.2
    back = cast_floating(half, jnp.float32)
    assert jax.tree.structure(back) == jax.tree.structure(model)


def test_low_rank_on_top():
    base = in_every_place(plain("experts"))
    model = replaced(base, lambda module, name, w: LowRank.of(
        w, 5, inputs=inputs_of(name), apart=axes_apart(module, w), key=KEY))  # fmt: skip
    assert_close(call(model), call(base))
    half = cast_floating(model, jnp.bfloat16)
    wq = half.decoder.layers[0].self_attention.wq
    assert (wq.dtype, wq.base.dtype, wq.a.dtype) == (jnp.bfloat16,) * 3


def test_axes():
    axes = axes_of(in_every_place(plain("experts", num_layers=2)))
    scanned = axes_of(scan_layers(in_every_place(plain("experts", num_layers=2))))
    found = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(axes)}
    layer = "decoder.layers.0."
    kinds = {name: (found[name].names, found[name].roles) for name in found}
    wo, scale = (kinds[f"{layer}self_attention.wo.{x}"] for x in ("integers", "scale"))
    assert wo[0] in (("d", "n", "h"), ("d", "n", "h/2"))
    assert wo[1] == ("output", "input", "input")
    assert scale == (("d", "z"), ("output", "output"))
    up = kinds[f"{layer}feed_forward.w_up.integers"]
    assert up[0][:2] == ("e", "f") and up[1] == ("apart", "output", "input")
    table = kinds["embedding.token_embedding.weight.scale"]
    assert table == (("v", "z"), ("output", "output"))
    integers = scanned.decoder.layers.stacked.self_attention.wq.integers
    assert (integers.names[:3], integers.apart) == (("l", "n", "h"), (0,))


def test_four_bits_are_packed_in_pairs():
    integers = jnp.arange(16).reshape(2, 8) % 16
    packed = pack(integers)
    np.testing.assert_array_equal(packed[0], [0x10, 0x32, 0x54, 0x76])
    np.testing.assert_array_equal(unpack(packed), integers)


def test_refuses_what_does_not_fit():
    eight, four = jnp.ones((5, 12), jnp.int8), jnp.ones((5, 6), jnp.uint8)
    scale = jnp.ones((5, 1))
    for arguments, options, message in [
        ((eight, scale), dict(bits=3), "bits must be 8 or 4, got 3"),
        ((four, scale), {}, "of 8 bits must be int8, got uint8"),
        ((eight, scale), dict(bits=4), "of 4 bits must be uint8, got int8"),
        ((eight, jnp.ones((4, 1))), {}, r"the shapes \(5, 12\) and \(4, 1\)"),
        ((eight, scale), dict(outputs=2), "with 2 axes of outputs"),
        ((eight, scale), dict(outputs=0), "with 0 axes of outputs"),
        ((eight, scale, jnp.ones((5, 2))), {}, "offset must have the shape"),
        ((eight, jnp.ones((5, 5))), {}, "5 groups do not divide 12 inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            Quantized(*arguments, **options)
    with pytest.raises(ValueError, match="even number of inputs.*Use 8 bits"):
        pack(jnp.ones((5, 7), jnp.uint8))
    with pytest.raises(ValueError, match=r"is one weight: there is no \[0\]"):
        Quantized(eight, scale)[0]
    with pytest.raises(ValueError, match="only a matrix is transposed"):
        quantized((12, 3, 5)).T  # noqa: B018
