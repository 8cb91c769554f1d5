"""The operations in C: equal to JAX for all shapes, and replaced by JAX where they cannot run.

Wrong arguments never end the process.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    AttentionMask,
    GatedFeedForward,
    Quantized,
    RotaryPositionalEncoding,
    TransformerLM,
    choose_attention,
    dot_product_attention,
    fast_attention,
    quantize,
)
from jaxformers.native import library, products
from jaxformers.native.attention import native_attention
from jaxformers.positions.bias import ALiBi
from jaxformers.quantization import products as integers
from jaxformers.quantization.quantized import pack
from jaxformers.weights import contract, contract_each

# Other processes use the operations even if this one is told not to.
ENVIRONMENT = {k: x for k, x in os.environ.items() if k != "JAXFORMERS_NATIVE"}
needs_library = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no operations in C: {library.obstacle()}"
)


def normal(draw, *shape, dtype=jnp.float32):
    return jnp.asarray(draw.standard_normal(shape), dtype)


def close(got, want, bound):
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), atol=bound
    )


def calls_c(function, *arguments):
    return "jaxformers_" in jax.jit(function).lower(*arguments).as_text()


# Attention.


def mask_of(draw, b, n, t, s):
    kind = draw.integers(6)
    queries = jnp.asarray(draw.integers(0, s, (b, t)), jnp.int32)
    keys = jnp.asarray(draw.integers(-1, s, (b, s)), jnp.int32)
    return [
        AttentionMask(),
        AttentionMask(causal=True, q_positions=queries, k_positions=keys),
        AttentionMask(causal=True, window=3, q_positions=queries, k_positions=keys),
        AttentionMask(explicit=jnp.asarray(draw.random((b, n, t, s)) < 0.3)),
        AttentionMask(explicit=jnp.asarray(draw.random((1, 1, t, 1)) < 0.7)),
        AttentionMask(bias=ALiBi(), q_positions=queries, k_positions=keys),
    ][kind]


@needs_library
@pytest.mark.parametrize("seed", range(30))
def test_attention_of_any_shape(seed):
    draw = np.random.default_rng(seed)
    b, g, group = draw.integers(1, 4, 3)
    n, t, h = g * group, draw.integers(1, 17), draw.integers(1, 80)
    s = int(draw.choice([1, 15, 16, 17, 100, 511, 512, 513, 1100]))
    dtype, bound = [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)][seed % 2]
    q = normal(draw, b, n, t, h, dtype=dtype)
    k, v = (normal(draw, b, g, s, h, dtype=dtype) for _ in range(2))
    mask, softcap = mask_of(draw, b, n, t, s), [None, 5.0][seed // 2 % 2]
    got = native_attention(q, k, v, mask, softcap=softcap)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    close(got, dot_product_attention(*wide, mask, softcap=softcap), bound)
    assert got.dtype == dtype


@needs_library
def test_large_and_broken_scores():
    q = jnp.ones((1, 1, 1, 4))
    k = jnp.asarray([1e4, -1e4, 0.0, 9e3])[None, None, :, None] * jnp.ones((1, 1, 4, 4))
    v = jnp.arange(16.0).reshape(1, 1, 4, 4)
    close(native_attention(q, k, v, None), v[:, :, :1], 1e-6)
    broken = k.at[0, 0, 2].set(jnp.nan)
    assert jnp.isnan(native_attention(q, broken, v, None)).all()
    hidden = AttentionMask(explicit=jnp.asarray([[True, True, False, True]]))
    close(native_attention(q, broken, v, hidden), v[:, :, :1], 1e-6)
    endless = k.at[0, 0, 2].set(jnp.inf)
    assert jnp.isnan(native_attention(q, endless, v, None)).all()


@needs_library
def test_attention_of_nothing_is_zero_and_hidden_values_do_not_count():
    q, k, v = jnp.ones((2, 2, 3, 8)), jnp.ones((2, 1, 700, 8)), jnp.full((2, 1, 700, 8), jnp.nan)
    none = AttentionMask(explicit=jnp.zeros((1, 1, 3, 700), jnp.bool_))
    close(native_attention(q, k, v, none), jnp.zeros((2, 2, 3, 8)), 0)


@needs_library
def test_a_row_does_not_depend_on_the_other_rows():
    draw = np.random.default_rng(0)
    q, k, v = (normal(draw, 5, 4, s, 24) for s in (1, 2000, 2000))
    together = native_attention(q, k, v, None)
    for i in range(5):
        one = native_attention(*(x[i : i + 1] for x in (q, k, v)), None)
        assert (one == together[i : i + 1]).all()


# Products.


@needs_library
@pytest.mark.parametrize("seed", range(20))
def test_products_of_any_shape(seed):
    draw = np.random.default_rng(seed)
    r, i, o = (int(x) for x in draw.integers(1, [17, 130, 300]))
    dtype = [jnp.float32, jnp.bfloat16][seed % 2]
    x, w = normal(draw, r, i), normal(draw, i, o, dtype=dtype)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    close(products._rows_times(x, w), want, 1e-4)
    none = jnp.zeros((1, 0), jnp.float32)
    close(products._rows_times_transpose(x, w.T, none, none), want, 1e-4)


@needs_library
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("i, o", [(64, 1), (65, 17), (127, 300), (1003, 8190), (71, 8193)])
def test_products_of_one_row_in_blocks_of_inputs(i, o, dtype):
    draw = np.random.default_rng(i)
    x, w = normal(draw, 1, i), normal(draw, i, o, dtype=dtype)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    close(products._rows_times(x, w), want, 1e-3)


@needs_library
@pytest.mark.parametrize("seed", range(20))
def test_products_with_integers_of_any_shape(seed):
    draw = np.random.default_rng(seed)
    bits, k = [8, 4][seed % 2], int(draw.integers(1, 5))
    unit = 32 if bits == 4 else 16 if k > 1 else 7
    r, i, o = (
        int(draw.integers(1, 17)),
        unit * k * int(draw.integers(1, 4 if k > 1 else 20)),
        int(draw.integers(1, 40)),
    )
    x, scale = normal(draw, r, i), normal(draw, o, k)
    offset = normal(draw, o, k) if seed % 3 else None
    low, high, dtype = (-128, 128, jnp.int8) if bits == 8 else (0, 256, jnp.uint8)
    w = jnp.asarray(draw.integers(low, high, (o, i * bits // 8)), dtype)
    unpacked = integers.unpack(w) if bits == 4 else w
    matrix = np.asarray(integers.numbers(unpacked, scale, offset), np.float64)
    want = np.asarray(x, np.float64) @ matrix.T
    assert calls_c(lambda *a: integers.product(*a, offset), x, w, scale)
    close(integers.product(x, w, scale, offset), want, 1e-5 * np.abs(want).max() + 1e-4)


def weight_of(draw, kind, i, shape, dtype):
    """Returns a weight `(i, *shape)`: an array, integers of 8 bits in groups or not, or of 4."""
    if kind == "array":
        return normal(draw, i, *shape, dtype=dtype)
    numbers = jnp.asarray(draw.integers(0, 16, (*shape, i)), jnp.int8)
    groups = 1 if kind == "whole" else i // 32
    scale = normal(draw, *shape, groups)
    if kind != "four":
        return Quantized(numbers, scale, outputs=2)
    return Quantized(pack(numbers), scale, normal(draw, *shape, groups), bits=4, outputs=2)


@needs_library
@pytest.mark.parametrize("seed", range(24))
def test_products_beside_each_other(seed):
    """Rows times several weights are what each of them gives, whatever their kinds."""
    draw = np.random.default_rng(seed)
    dtype, most = [(jnp.float32, 8), (jnp.bfloat16, 16)][seed // 3 % 2]
    r, i = int(draw.integers(1, most + 1)), 32 * int(draw.integers(1, 5))
    x, count = normal(draw, 1, r, i, dtype=dtype), int(draw.integers(1, 5))
    shapes = [(int(n), int(m)) for n, m in draw.integers(1, 12, (count, 2))]
    some = [["array"], ["whole", "groups", "four"], ["array", "whole"]][seed % 3]
    kinds = [str(kind) for kind in draw.choice(some, count)]
    maps = [
        (weight_of(draw, kind, i, shape, dtype), None if draw.integers(2) else normal(draw, *shape))
        for kind, shape in zip(kinds, shapes, strict=True)
    ]
    found = contract_each(x, *maps)
    for got, (w, b), shape in zip(found, maps, shapes, strict=True):
        assert got.shape == (1, r, *shape)
        wide = w.dense() if isinstance(w, Quantized) else w
        want = np.einsum("...i,inm->...nm", *(np.asarray(a, np.float64) for a in (x, wide)))
        bound = 1e-5 if dtype == jnp.float32 else 1e-2
        close(got, want if b is None else want + b, bound * (np.abs(want).max() + 1))
    calls = str(jax.make_jaxpr(lambda x: contract_each(x, *maps))(x)).count("jaxformers_rows")
    assert calls == (1 if len({kind == "array" for kind in kinds}) == 1 else count)


@needs_library
def test_a_layer_reads_weights_of_the_same_input_in_one_call():
    options = dict(position=RotaryPositionalEncoding(), feed_forward=GatedFeedForward)
    model = TransformerLM(65, 64, 4, 1, 96, 32, **options, key=jax.random.key(0))
    for layer in (model.decoder.layers[0], quantize(model).decoder.layers[0]):
        program = str(jax.make_jaxpr(layer)(jnp.ones((1, 1, 64))))
        # Queries, keys and values; the output; gate and up; down.
        assert program.count("jaxformers_rows_times") == 4


@needs_library
def test_many_weights_beside_each_other():
    x, w = jnp.ones((2, 32)), jnp.ones((32, 5))
    assert [y.tolist() for y in contract_each(x, *[(w, None)] * 9)] == [[[32.0] * 5] * 2] * 9


@needs_library
def test_empty_products():
    assert contract(jnp.ones((0, 4)), jnp.ones((4, 5), jnp.float32)).shape == (0, 5)
    assert products._rows_times(jnp.ones((2, 0)), jnp.ones((0, 5))).tolist() == [[0] * 5] * 2
    assert products._rows_times(jnp.ones((2, 3)), jnp.ones((3, 0))).shape == (2, 0)


@pytest.mark.parametrize("seed", range(24))
def test_products_of_many_rows(seed):
    """Their error is that of sums in float32, with and without matrix units."""
    draw = np.random.default_rng(seed)
    m, k, n = (int(x) for x in draw.integers(1, [200, 200, 200]))
    k += 1024 * (seed % 5 == 0)
    wide, narrow = [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.int8),
        (jnp.bfloat16, jnp.int8),
    ][seed % 4]
    left, right = seed // 4 % 2, seed // 8 % 2
    size = 10.0 ** draw.integers(-6, 6, (m, 1))
    pairs = [(), (1,), (3,), (2, 2)][draw.integers(4)]
    x = jnp.asarray(draw.standard_normal((*pairs, m, k)) * size, wide)
    w = normal(draw, *pairs, k, n, dtype=narrow)
    if narrow == jnp.int8:
        w = jnp.asarray(draw.integers(-128, 128, (*pairs, k, n)), narrow)
    given = x.mT if left else x, w.mT if right else w
    got = products.product(*given, left, right)
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    bound = 4e-7 * (abs(x) @ abs(w))
    assert got.shape == (*pairs, m, n) and got.dtype == jnp.float32
    assert (abs(got - x @ w) <= bound).all()


def test_a_product_of_many_inputs_keeps_its_digits():
    draw = np.random.default_rng(0)
    x, w = (draw.random(shape, np.float32) for shape in ((32, 20_000), (20_000, 40)))
    want = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(products.product(jnp.asarray(x), jnp.asarray(w)), want, rtol=2e-6)


def test_a_product_with_one_loses_nothing():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((70, 90)) * 10.0 ** draw.integers(-20, 20, (70, 90)))
    x = x.astype(jnp.float32)
    one = jnp.eye(90)
    np.testing.assert_array_equal(products.product(x, one), x)
    np.testing.assert_array_equal(products.product(one, x, right=1), x.T)


@pytest.mark.usefixtures("no_shape_checker")
@pytest.mark.parametrize("transposed", [False, True])
def test_widths_that_differ_are_an_error(transposed):
    with pytest.raises(TypeError, match="33"):
        contract(jnp.ones((40, 33)), jnp.ones((64, 64)), transposed=transposed)


def test_what_is_not_finite_stays_in_its_row():
    x = jnp.ones((64, 64)).at[3, 5].set(jnp.nan).at[9, 1].set(jnp.inf)
    finite = jnp.isfinite(products.product(x, jnp.ones((64, 40))))
    assert not finite[jnp.array([3, 9])].any() and finite.sum() == 62 * 40


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_derivatives_of_products_of_many_rows(left, right):
    draw = np.random.default_rng(0)
    x, w = normal(draw, 40, 50), normal(draw, 50, 60)
    x, w = x.T if left else x, w.T if right else w

    def f(x, w):
        return jnp.sin(products.product(x, w, left, right)).sum()

    def g(x, w):
        return jnp.sin((x.T if left else x) @ (w.T if right else w)).sum()

    for got, want in zip(jax.grad(f, (0, 1))(x, w), jax.grad(g, (0, 1))(x, w), strict=True):
        close(got, want, 1e-4)
    direction = normal(draw, *x.shape), normal(draw, *w.shape)
    got, want = (jax.jvp(jax.grad(a, (0, 1)), (x, w), direction)[1] for a in (f, g))
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-2)
    each = jax.vmap(jax.grad(f, (0, 1)), (0, None))(jnp.stack([x, 2 * x]), w)
    close(each[0][0], jax.grad(g)(x, w), 1e-4)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gradients_of_products_with_integers(left, right):
    draw = np.random.default_rng(0)
    x, w = normal(draw, 40, 50), jnp.asarray(draw.integers(-9, 9, (50, 60)), jnp.int8)
    given = x.T if left else x, w.T if right else w
    got = jax.grad(lambda x: jnp.sin(products.product(x, given[1], left, right)).sum())(given[0])
    want = jax.grad(lambda x: jnp.sin(x @ w.astype(jnp.float32)).sum())(x)
    close(got, want.T if left else want, 1e-3)


def test_gradients_of_a_model_are_those_of_jax(monkeypatch):
    model = TransformerLM(97, 64, 4, 2, 96, 64, dropout_rate=0.0, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 40), 0, 97)

    def gradient():
        loss = eqx.filter_value_and_grad(lambda m: -m.log_probs_of(tokens, tokens).mean())
        text = str(eqx.filter_make_jaxpr(loss)(model)[0])
        return text.count("jaxformers_product"), eqx.filter_jit(loss)(model)

    count, got = gradient()
    monkeypatch.setattr(library, "obstacle", lambda: "turned off")
    monkeypatch.setattr(products, "many_rows", lambda *_, **__: False)
    jax.clear_caches()
    none, want = gradient()
    assert none == 0 and (count > 15) == library.has_matrix_units()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, 3e-6)


# Where JAX runs instead.


@needs_library
def test_vmap_and_derivatives_run_jax():
    draw = np.random.default_rng(0)
    q, k, v = (normal(draw, 2, 4, s, 8) for s in (3, 9, 9))
    mask = AttentionMask(causal=True, window=4)

    def native(q, k, v):
        return native_attention(q, k, v, mask)

    def plain(q, k, v):
        return dot_product_attention(q, k, v, mask)

    assert calls_c(native, q, k, v)
    each = jax.vmap(native)
    assert not calls_c(each, q[None], k[None], v[None])
    close(each(q[None], k[None], v[None])[0], plain(q, k, v), 1e-6)
    assert not calls_c(jax.grad(lambda *x: native(*x).sum(), (0, 1, 2)), q, k, v)
    for derivative in (jax.jacrev, jax.jacfwd):
        got, want = (jax.tree.leaves(derivative(f, (0, 1, 2))(q, k, v)) for f in (native, plain))
        for x, y in zip(got, want, strict=True):
            close(x, y, 1e-5)
    hessian = jax.hessian(lambda x: native(q * x, k, v).sum())(1.0)
    assert jnp.isfinite(hessian).all()


@needs_library
def test_another_device_gets_jax():
    def f(q):
        return native_attention(q, q, q, None)

    lowered = jax.jit(f).trace(jnp.ones((1, 2, 3, 8))).lower(lowering_platforms=("tpu",))
    assert "jaxformers_" not in lowered.as_text()


@needs_library
def test_an_exported_program_is_of_jax():
    q = jnp.ones((1, 2, 3, 8))
    program = jax.jit(lambda q: fast_attention(q, q, q, None))
    exported = jax.export.export(program)(q)
    close(exported.call(q), q, 1e-6)
    (rows,) = jax.export.symbolic_shape("r")
    x, w = jax.ShapeDtypeStruct((rows, 8), jnp.float32), jnp.ones((8, 5))
    for function in (contract, lambda x, w: contract_each(x, (w, None), (w, None))):
        assert jax.export.export(jax.jit(function))(x, w).in_avals


@needs_library
def test_calls_without_jit():
    q = jnp.ones((1, 2, 3, 8))
    with jax.disable_jit():
        close(native_attention(q, q, q, None), q, 1e-6)
        assert contract(jnp.ones((1, 8)), jnp.ones((8, 5))).shape == (1, 5)


@needs_library
def test_types_that_name_a_mesh_get_jax():
    q, mesh = jnp.ones((2, 4, 1, 8)), jax.make_mesh((1,), ("x",))
    rows = jax.sharding.PartitionSpec("x")
    q = jax.device_put(q, jax.sharding.NamedSharding(mesh, rows))

    def f(q):
        return jax.lax.fori_loop(0, 2, lambda i, q: fast_attention(q, q, q, None), q)

    assert not calls_c(jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows), q)
    assert not calls_c(f, q)


@needs_library
def test_a_bias_in_16_bits():
    class Ones(eqx.Module):
        def bias(self, *_):
            return jnp.ones((1, 2, 3, 3), jnp.bfloat16)

    q = jnp.ones((1, 2, 3, 8))
    close(native_attention(q, q, q, AttentionMask(bias=Ones())), q, 1e-6)


@needs_library
def test_arrays_on_a_mesh_get_jax():
    program = """
import jax, jax.numpy as jnp
from jaxformers import choose_attention, fast_attention
from jaxformers.sharding import make_mesh
from jaxformers.weights import contract
from jax.sharding import NamedSharding, PartitionSpec
mesh = make_mesh(data=2)
q = jax.device_put(jnp.ones((2, 4, 1, 8)), NamedSharding(mesh, PartitionSpec("data")))
print(choose_attention(q, q, q, None).why)
print(jax.jit(lambda q: fast_attention(q, q, q, None)).lower(q).as_text().count("jaxformers_"))
rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
x = jax.device_put(jnp.ones((2, 8), jnp.bfloat16), rows)
w = jax.device_put(jnp.ones((8, 4), jnp.bfloat16), whole)
print(jax.jit(contract).lower(x, w).as_text().count("jaxformers_"), contract(x, w).shape)
"""
    environment = {**ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    why, attention, product = told.stdout.splitlines()
    assert why.endswith("no C call, since the arrays are spread over devices")
    assert (attention, product) == ("0", "0 (2, 4)")


@needs_library
def test_the_choice_says_what_runs():
    q = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 2, 300, 64), jnp.float32)
    choice = choose_attention(q, k, k, None, backend="cpu")
    assert str(choice) == "native_attention: few queries are one call of C"
    half = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float16)
    assert "it takes float32 or bfloat16" in choose_attention(half, half, half, None).why
    assert choose_attention(q, k, k, None, backend="gpu").kernel is dot_product_attention


def model_of(**options):
    key = jax.random.key(0)
    return TransformerLM(65, 16, 2, 2, 32, 64, 0.0, key=key, **options)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_decoding_is_the_same_with_and_without(bits, monkeypatch):
    model = model_of()
    model = model if bits is None else quantize(model, bits=bits)
    prompt = np.random.default_rng(0).integers(0, 65, (3, 5))
    fast = model.generate(prompt, 20)
    jax.clear_caches()
    monkeypatch.setattr(library, "obstacle", lambda: "off")
    assert (fast == model.generate(prompt, 20)).all()
    jax.clear_caches()


@needs_library
def test_the_cache_is_written_in_place():
    """Else a decoding loop copies the caches at each token."""
    model = model_of(num_kv_heads=1)
    tokens = jnp.zeros((1, 5), jnp.int32)
    loop = eqx.filter_jit(lambda model: model.generate(tokens, 9))
    text = loop.lower(model).compile().compiled.as_text()
    bodies = re.findall(r"while\(.*body=(%[\w.\-]+)", text)
    (body,) = (text.split(f"\n{name} ")[1].split("\n}")[0] for name in bodies)
    assert body.count("jaxformers_attend") == 2
    assert not re.findall(r"= f32\[[\d,]+\]\S* copy\(", body)


# Building and loading.


def obstacle_in(environment, tmp_path):
    program = "from jaxformers.native.library import obstacle; print(obstacle())"
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path), **environment}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


def test_without_a_compiler_and_when_turned_off(tmp_path):
    assert obstacle_in({"JAXFORMERS_NATIVE": "0"}, tmp_path) == "JAXFORMERS_NATIVE=0 turns them off"
    nowhere = {"PATH": str(tmp_path), "CC": ""}
    assert obstacle_in(nowhere, tmp_path) == "there is no C compiler (cc) on this machine"


def test_a_compiler_that_fails_is_asked_once(tmp_path):
    asked = tmp_path / "asked"
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\necho x >> {asked}\necho no such option >&2\nexit 3\n")
    compiler.chmod(0o755)
    for again in (False, True):
        told = obstacle_in({"CC": f"{compiler} -with arguments"}, tmp_path)
        assert told.startswith("the C compiler ended with 3: no such option")
        assert ("to try again" in told) == again
    assert asked.read_text().count("x") == 2  # with and without -march=native
    compiler.write_text(compiler.read_text() + "# a newer version\n")
    obstacle_in({"CC": f"{compiler} -with arguments"}, tmp_path)
    assert asked.read_text().count("x") == 4


def test_a_library_that_does_not_load_or_does_not_agree(tmp_path):
    compiler = tmp_path / "wrong"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n')
    compiler.chmod(0o755)
    told = obstacle_in({"CC": str(compiler)}, tmp_path)
    assert told.startswith("their test ended with 1:") and "cannot be loaded" in told
    assert not list(Path(tmp_path).rglob("*.so"))


def test_a_library_that_does_not_load_is_built_again(tmp_path, monkeypatch):
    directory = tmp_path / "jaxformers" / "native"
    directory.mkdir(parents=True)
    (directory / f"{library._key()}.so").write_text("broken")
    monkeypatch.delenv("JAXFORMERS_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(library._Unavailable, match="the C compiler ended with 1"):
        library._load()


def test_without_sources_or_a_home(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("no home")

    monkeypatch.delenv("JAXFORMERS_NATIVE", raising=False)
    monkeypatch.setattr(library, "user_cache", no_home)
    assert library._prepare.__wrapped__() == "no home"
    monkeypatch.setattr(library, "SOURCES", tmp_path / "package.zip" / "source")
    library._key.cache_clear()
    monkeypatch.setattr(library, "user_cache", lambda: tmp_path)
    assert "a source cannot be read" in library._prepare.__wrapped__()
    library._key.cache_clear()


@needs_library
def test_a_library_that_is_there_needs_no_directory_to_write(monkeypatch):
    monkeypatch.setattr(library, "_check_writable", lambda directory: 1 / 0)
    library._load()


def test_a_cache_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "jaxformers").write_text("a file")
    assert "cannot be written" in obstacle_in({}, tmp_path)


@needs_library
def test_wrong_arguments_are_errors():
    name = library.target("rows_times_transpose")
    y = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    f32 = jnp.float32
    good = jnp.ones((2, 32)), jnp.ones((3, 32), jnp.int8), jnp.ones((3, 2)), jnp.ones((1, 0))
    assert jax.ffi.ffi_call(name, y)(*good).shape == (2, 3)
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        shapes = [list(x.shape) for x in good]
        kinds = [f32, jnp.int8, f32, f32]
        i = draw.integers(4)
        if draw.random() < 0.7:
            shapes[i][draw.integers(2)] = int(draw.integers(0, 70))
        else:
            kinds[i] = [jnp.int32, jnp.uint8, jnp.bfloat16, jnp.float16][draw.integers(4)]
        if draw.random() < 0.2:
            shapes[i].append(1)
        arrays = [jnp.zeros(x, kind) for x, kind in zip(shapes, kinds, strict=True)]
        try:
            jax.ffi.ffi_call(name, y)(*arrays).block_until_ready()
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            assert "rows_times_transpose" in str(error)
            refused += 1
    assert refused > 30


def test_fast_attention_still_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="attention takes queries"):
        fast_attention(jnp.ones((1, 3, 1, 4)), jnp.ones((1, 2, 5, 4)), jnp.ones((1, 2, 5, 4)), None)


def compile_with(options, *files):
    compiler = shutil.which("gcc")
    version = compiler and subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if not version or "Free Software Foundation" not in version.stdout:  # on macOS it is clang
        pytest.skip("there is no gcc, whose warnings and sanitizers are used here")
    include = [f"-I{jax.ffi.include_dir()}", f"-I{library.SOURCES}"]
    command = [compiler, "-std=gnu11", *options, *include, *map(str, files), "-lm", "-lpthread"]
    told = subprocess.run(command, capture_output=True, text=True)
    if "bad value" in told.stderr:
        pytest.skip("this gcc does not know the processor")
    assert told.returncode == 0, told.stderr


X86 = ["-mavx2", "-march=skylake-avx512", "-march=sapphirerapids"]  # the last has matrix units


@pytest.mark.parametrize("source", sorted(library.SOURCES.glob("*.c")), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "processor",
    ["-march=native", "-DANY", *(X86 if platform.machine() in ("x86_64", "AMD64") else [])],
)
def test_vectors_fit_in_the_registers(source, processor, tmp_path):
    """GCC keeps longer ones in memory, which makes products with integers six times slower."""
    warning = "-Werror=vector-operation-performance"
    compile_with(["-O1", processor, warning, "-c", "-o", str(tmp_path / "object")], source)


def processors():
    """Yields options that give vectors of different lengths, and that run here."""
    yield from ("-march=native", "-DANY")
    if "avx512" in library._processor():
        yield "-mavx2"


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("processor", list(processors()))
def test_random_arguments_under_sanitizers(sanitizers, processor, tmp_path):
    program = tmp_path / "fuzz"
    options = ["-O1", "-g", "-fno-sanitize-recover=all", f"-fsanitize={sanitizers}", processor]
    compile_with([*options, "-o", str(program)], Path(__file__).parent / "native_fuzz.c")
    told = subprocess.run([program, "1500"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
