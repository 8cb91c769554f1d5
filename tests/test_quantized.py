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
    LayerNorm,
    LowRank,
    MultiHeadAttention,
    Quantized,
    TransformerLM,
    cast_floating,
    digest,
    from_pretrained,
    load,
    merge,
    quantize,
    save,
    scan_layers,
    unroll_layers,
)
from jaxformers.axes import axes_of
from jaxformers.paths import path_name
from jaxformers.quantization.quantized import pack, unpack
from jaxformers.quantization.rounding import GRIDS, rounded
from jaxformers.weight_fields import map_weights
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


@pytest.mark.few(3)
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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [dict(), dict(groups=4), dict(bits=4, groups=4)])
def test_a_loop_keeps_no_copy_of_the_weights_in_float32(options, rows):
    """Integers are read in each turn; XLA would move their conversion out of the loop."""
    if jax.default_backend() != "cpu":
        pytest.skip("the fast spelling is that of XLA's CPU backend")
    size = 128
    w = quantized((size, size), **options)

    def repeat(w, x, n):
        turn = lambda i, x: jnp.tanh(contract(x, w))  # noqa: E731
        return jax.lax.fori_loop(0, n, turn, x)

    x = 0.05 * jax.random.normal(KEY, (rows, size))
    compiled = jax.jit(repeat).lower(w, x, 5).compile()
    # Integers of 4 bits have been unpacked to bytes.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * size * size
    copied = jax.jit(repeat).lower(w.dense(), x, 5).compile()
    assert_close(compiled(w, x, 1), copied(w.dense(), x, 1))


def in_sixteen_bits(size):
    return jax.random.normal(KEY, (size, size)).astype(jnp.bfloat16)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        *itertools.product([{}, dict(groups=4), dict(bits=4, groups=4)], ["product", "gradient"]),
        (None, "product"),  # in 16 bits
    ],
)
def test_many_rows_keep_one_copy_of_the_weights_in_float32(options, native, what, request):
    """XLA would convert the weights of all layers at once, at the beginning."""
    if jax.default_backend() != "cpu":
        pytest.skip("the fast spelling is that of XLA's CPU backend")
    if not native:
        request.getfixturevalue("no_native")
    size, layers, rows = 192, 12, 48
    ws = [quantized((size, size), seed=i, **options) if options is not None
          else in_sixteen_bits(size) for i in range(layers)]  # fmt: skip
    dtype = jnp.bfloat16 if options is None else jnp.float32

    def through(x, ws):
        for w in ws:
            x = jnp.tanh(0.1 * contract(x, w))
        return x.astype(jnp.float32).sum() if what == "gradient" else x

    run = jax.jit(jax.grad(through) if what == "gradient" else through)
    x = jax.random.normal(KEY, (rows, size)).astype(dtype)
    compiled = run.lower(x, ws).compile()
    activations = (layers if what == "gradient" else 0) * 2 * rows * size * 4
    # A gradient may have the integers twice.
    kept = layers * size * size if what == "gradient" else 0
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * size * size * 4 + activations + kept
    dense = [(w.dense() if options is not None else w).astype(jnp.float32) for w in ws]
    expected = run(x.astype(jnp.float32), dense)
    bound = 1e-4 if options is not None else 0.05
    difference = jnp.abs(compiled(x, ws).astype(jnp.float32) - expected).max()
    assert difference < bound * jnp.abs(expected).max()


@pytest.mark.parametrize("first", [jnp.nan, jnp.inf, -jnp.inf])
def test_products_of_rows_that_begin_with_what_is_no_number(first):
    w = quantized((12, 5), groups=3)
    x = jax.random.normal(KEY, (17, 12)).at[0, 0].set(first)
    y = contract(x, w)
    assert not jnp.isfinite(y[0]).any()
    assert_close(y[1:], x[1:] @ w.dense())


def test_many_rows_under_vmap_and_forward_mode():
    w = quantized((12, 5), groups=3)
    x = jax.random.normal(KEY, (2, 17, 12))
    assert_close(jax.vmap(lambda x: contract(x, w))(x), x @ w.dense())
    _, change = jax.jvp(lambda x: contract(x, w), (x,), (2 * x,))
    assert_close(change, 2 * x @ w.dense())


def test_quantize_takes_linear_maps_and_tables_of_tokens():
    kept = {
        "encoder": ["position.weight", "type_embedding.weight"],
        "seq2seq": ["score_bias.weight"],
    }
    for name, ends in kept.items():
        model = eqx.filter_eval_shape(quantize, plain(name))
        for path, w in weights_of(model).items():
            assert isinstance(w, Quantized) != path.endswith(tuple(ends)), path
            if isinstance(w, Quantized):
                table = path.endswith("token_embedding.weight")
                assert w.transposed == table and w.scale.shape[-1] == 1
    wo = quantize(plain("experts")).decoder.layers[0].self_attention.wo
    assert wo.integers.shape == (12, 4, 6) and wo.scale.shape == (12, 1)


def weights_of(model):
    found = {}
    map_weights(lambda path, w, axes: found.setdefault(path, w), model)
    return found


def relative_error(w, array):
    return float(jnp.linalg.norm(w.dense() - array) / jnp.linalg.norm(array))


@pytest.mark.parametrize(
    "bits, group_size, where, bound",
    [
        (8, None, None, 0.006),
        (8, 2, lambda path, w: "self_attention" in path, 0.006),
        (4, None, lambda path, w: not any(n % 2 for n in w.shape), 0.09),
        (4, 3, lambda path, w: path.endswith((".wq", ".w_gate")) and w.shape[-1] != 7, 0.03),
    ],
)
def test_quantize_is_close(bits, group_size, where, bound):
    model = plain("experts")
    before, after = weights_of(model), weights_of(quantize(model, bits, group_size, where))
    changed = [path for path, w in after.items() if isinstance(w, Quantized)]
    assert changed and changed == [
        path
        for path, w in before.items()
        if not path.endswith(("router", "w_shared_gate")) and (where is None or where(path, w))
    ]
    for path in changed:
        w, old = after[path], before[path]
        assert (w.shape, w.dtype, w.bits) == (old.shape, old.dtype, bits)
        assert relative_error(w, old) < bound, path
        if group_size is not None:
            inputs = w.integers.size * (8 // bits) // w.scale[..., 0].size
            assert w.scale.shape[-1] == inputs // group_size and w.scale.dtype == jnp.float16


def at(integers, scale, offset):
    return integers.astype(jnp.float32) * scale[:, None] + offset[:, None]


def test_the_search_finds_grids_and_lowers_the_error():
    """Numbers that lie on a grid of 4 bits stay the same; others are closer than if rounded."""
    rng = np.random.default_rng(0)
    integers = rng.integers(0, 16, (40, 32)).astype(np.float32)
    integers[:, :2] = 0, 15
    line = rng.uniform(0.01, 0.02, (40, 1)), rng.normal(size=(40, 1)) * 0.1
    scale, offset = (x.astype(np.float16).astype(np.float32) for x in line)
    x = jnp.asarray(integers * scale + offset)
    found, *line = rounded(x, GRIDS[4], jnp.float16)
    np.testing.assert_array_equal(found, integers)
    for a, b in zip(line, (scale, offset), strict=True):
        np.testing.assert_array_equal(a, b[:, 0].astype(np.float16))
    x = jnp.asarray(rng.normal(size=(300, 32)), jnp.float32)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    step = (high - low) / 15
    plain_error = jnp.linalg.norm(jnp.round((x - low) / step) * step + low - x)
    integers, scale, offset = rounded(x, GRIDS[4], jnp.float32)
    error = jnp.linalg.norm(at(integers, scale, offset) - x)
    assert error < 0.93 * plain_error


def test_constant_and_zero_weights():
    for value in (0.0, 0.25, -3.0):
        for grid in GRIDS.values():
            x = jnp.full((3, 8), value)
            integers, scale, offset = rounded(x, grid, jnp.float32)
            assert_close(at(integers, scale, offset), x)


def test_quantize_a_base_and_sixteen_bits():
    adapted_lm = adapted(plain("experts"))
    small = quantize(adapted_lm, where=lambda path, w: path.endswith(".wo"))
    wo, old = (m.decoder.layers[0].self_attention.wo for m in (small, adapted_lm))
    assert isinstance(wo, LowRank) and isinstance(wo.base, Quantized)
    np.testing.assert_array_equal(wo.a, old.a)
    assert relative_error(wo, old.dense()) < 0.006
    half = cast_floating(plain("experts"), jnp.bfloat16)
    wo = quantize(half, where=lambda path, w: path.endswith(".wo"))
    wo = wo.decoder.layers[0].self_attention.wo
    assert wo.dtype == jnp.bfloat16 and wo.scale.dtype == jnp.float32


def test_quantize_refuses(no_shape_checker):
    model = plain("experts")
    wq = lambda path, w: path.endswith(".wq")  # noqa: E731
    bad = lambda m: m.decoder.layers[0].self_attention.wq  # noqa: E731
    with_nan = eqx.tree_at(bad, model, bad(model).at[0, 0, 0].set(jnp.nan))
    large = eqx.tree_at(bad, model, bad(model) * 1e6)
    for arguments, message in [
        ((model, 3), "bits must be 8 or 4, got 3"),
        ((model, True), "bits must be 8 or 4, got True"),
        ((model, 8, 0), "group_size must be an integer of at least 1"),
        ((model, 8, None, "wq"), "where must be a function"),
        ((model, 8, 5, wq), r"group_size 5 does not divide the 12 inputs of decoder.layers.0.self_"
         r"attention.wq. Sizes .* weights: 1, 2, 3, 4, 6, 12. Pass one"),
        ((model, 8, 4), r"group_size 4 does not divide the 14 inputs of .*w_down.*weights: 1. "),
        ((model, 4), "w_down has 7. Leave it out with where=, or use bits=8"),
        ((model, 8, None, lambda path, w: False), "no weight is to be quantized: where is called"),
        ((LayerNorm(4),), "no weight is to be quantized: .* no linear map at all"),
        ((quantize(model, where=wq), 8, None, wq), "wq is quantized already"),
        ((with_nan, 8, None, wq), "wq holds NaN, infinity, or numbers beyond"),
        ((large, 4, 4, wq), "wq holds NaN, infinity, or numbers beyond 65504"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quantize(*arguments)


@pytest.mark.parametrize("rows", [1, 9])
def test_forward_mode(rows):
    w = quantized((6, 4))
    x = jax.random.normal(KEY, (rows, 6))
    _, change = jax.jvp(lambda x: contract(x, w), (x,), (x,))
    assert_close(change, x @ w.dense())
