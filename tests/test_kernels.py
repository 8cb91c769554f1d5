"""Every fast kernel of attention gives what the plain form gives, values and gradients."""

import logging
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.interpreters import partial_eval as pe
from programs import equations, largest_array

from jaxformers import (
    ALiBi,
    AttentionMask,
    T5PositionBias,
    TransformerLM,
    blockwise_attention,
    choose_attention,
    dot_product_attention,
    fast_attention,
    flash_attention,
    language_model_loss,
    rematerialize,
)

KERNELS = {
    "blockwise": lambda block: partial(blockwise_attention, block=block),
    "flash": lambda block: partial(flash_attention, blocks=(block, block + 3)),
}


@st.composite
def problems(draw):
    """Sizes and everything a mask can say, seldom all of it."""
    g, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    t, s = draw(st.integers(1, 23)), draw(st.integers(1, 29))
    same = draw(st.booleans())
    return dict(
        b=draw(st.integers(1, 3)),
        g=g,
        n=g * group,
        t=t,
        s=t if same else s,
        h=draw(st.sampled_from([1, 3, 8])),
        block=draw(st.sampled_from([1, 4, 7, 32])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 9)),
        positions=draw(st.sampled_from([None, "padded", "cached", "one row"])),
        segments=draw(st.booleans()),
        explicit=draw(st.sampled_from([None, "full", "heads", "keys", "nothing"])),
        bias=draw(st.sampled_from([None, "alibi", "t5"])),
        softcap=draw(st.sampled_from([None, 2.5])),
        seed=draw(st.integers(0, 2**31)),
    )


def make_mask(p, rng):
    b, n, t, s = p["b"], p["n"], p["t"], p["s"]
    options = dict(causal=p["causal"], window=p["window"])
    if p["positions"] == "padded":
        options["q_positions"] = jnp.array(rng.integers(-1, max(t, s), (b, t)))
        options["k_positions"] = jnp.array(rng.integers(-1, max(t, s), (b, s)))
    elif p["positions"] == "cached":
        options["q_positions"] = jnp.arange(t) + max(s - t, 0)
        options["k_positions"] = jnp.where(jnp.arange(s) < s - 2, jnp.arange(s), -1)
    elif p["positions"] == "one row":
        options["q_positions"] = jnp.array(rng.integers(0, s, t))
    if p["segments"]:
        options["q_segments"] = jnp.array(rng.integers(0, 3, (b, t)))
        options["k_segments"] = jnp.array(rng.integers(0, 3, (b, s)))
    if p["explicit"] is not None:
        shapes = {"full": (b, n, t, s), "heads": (n, t, 1), "keys": (b, 1, 1, s), "nothing": (t, s)}
        chance = 0.0 if p["explicit"] == "nothing" else 0.7
        options["explicit"] = jnp.array(rng.random(shapes[p["explicit"]]) < chance)
    if p["bias"] == "alibi":
        options["bias"] = ALiBi()
    elif p["bias"] == "t5":
        options["bias"] = T5PositionBias(n, 8, 16, key=jax.random.key(p["seed"]))
    return AttentionMask(**options)


def differentiated(kernel, p):
    """Outputs, and gradients of queries, keys, values and of the bias in the mask."""

    @eqx.filter_jit
    def run(q, k, v, mask, weights):
        def loss(inputs):
            out = kernel(*inputs, softcap=p["softcap"])
            return (out * weights).sum(), out

        (_, out), grads = eqx.filter_value_and_grad(loss, has_aux=True)((q, k, v, mask))
        return out, jax.tree.leaves(eqx.filter(grads, eqx.is_inexact_array))

    return run


ODD = dict(b=2, g=1, n=3, h=3, block=4, window=None, positions=None, segments=False)
ODD |= dict(explicit=None, bias=None, softcap=None, seed=0, causal=True)


@pytest.mark.parametrize("name", KERNELS)
@example(p=ODD | dict(t=1, s=1))
@example(p=ODD | dict(t=1, s=27, causal=False, bias="t5"))
@example(p=ODD | dict(t=23, s=5))  # more queries than keys
@example(p=ODD | dict(t=5, s=23, window=2))
@example(p=ODD | dict(t=21, s=1, window=3))  # late queries see nothing
@example(p=ODD | dict(t=13, s=13, explicit="nothing", bias="t5", softcap=2.5))
@example(p=ODD | dict(t=13, s=13, positions="padded", segments=True, window=4))
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(p=problems())
def test_equal_to_the_plain_form(name, p):
    rng = np.random.default_rng(p["seed"])
    q, k, v, weights = (
        jnp.array(rng.normal(size=(p["b"], heads, length, p["h"])), jnp.float32)
        for heads, length in (
            (p["n"], p["t"]),
            (p["g"], p["s"]),
            (p["g"], p["s"]),
            (p["n"], p["t"]),
        )
    )
    mask = make_mask(p, rng)
    plain = differentiated(dot_product_attention, p)(q, k, v, mask, weights)
    fast = differentiated(KERNELS[name](p["block"]), p)(q, k, v, mask, weights)
    assert jax.tree.structure(plain) == jax.tree.structure(fast)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        assert jnp.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_large_scores(name, getkey):
    """What is subtracted before the exponential matters from scores of 89 on."""
    q, k, v = (30 * jax.random.normal(getkey(), (1, 2, 9, 4)) for _ in range(3))
    mask = AttentionMask(causal=True)
    np.testing.assert_allclose(
        jax.jit(KERNELS[name](4))(q, k, v, mask), dot_product_attention(q, k, v, mask), rtol=1e-5
    )


@pytest.mark.parametrize("name", KERNELS)
def test_sixteen_bits_and_no_batch(name, getkey):
    """Both ways as near to float32 as what is given allows."""
    q, k, v = (jax.random.normal(getkey(), (3, 19, 8), jnp.bfloat16) for _ in range(3))

    def differentiated(kernel, *x):
        def total(*x):
            out = kernel(*x, AttentionMask(causal=True, window=5))
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*x)
        return out, *grads

    exact = differentiated(dot_product_attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(differentiated(KERNELS[name](7), q, k, v), exact, strict=True):
        assert a.dtype == jnp.bfloat16 and a.shape == q.shape
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=4e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_vmapped(name, getkey):
    """As an ensemble has it: other rows, so other blocks that can be skipped."""
    q, k, v = (jax.random.normal(getkey(), (2, 3, 2, 19, 4)) for _ in range(3))
    positions = jnp.where(jnp.arange(19) < jnp.array([[7], [19]]), jnp.arange(19), -1)

    def loss(kernel, q, k, v, positions):
        mask = AttentionMask(True, q_positions=positions, k_positions=positions)
        return jnp.sin(kernel(q, k, v, mask)).sum()

    fast, plain = (
        jax.jit(jax.vmap(jax.grad(partial(loss, kernel), argnums=(0, 1, 2))))(q, k, v, positions)
        for kernel in (KERNELS[name](7), dot_product_attention)
    )
    for a, b in zip(fast, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_modes_of_differentiation(getkey):
    """Forwards unless there is a gradient of its own, and forwards over that gradient always."""
    q, k, v, direction = (jax.random.normal(getkey(), (2, 11, 4)) for _ in range(4))
    mask = AttentionMask(causal=True)

    def tangent(kernel):
        forwards = jax.jit(lambda q, dq: jax.jvp(lambda q: kernel(q, k, v, mask), (q,), (dq,)))
        return forwards(q, direction)[1]

    def second(kernel):
        gradient = jax.grad(lambda q: jnp.sin(kernel(q, k, v, mask)).sum())
        return jax.jit(lambda q, dq: jax.jvp(gradient, (q,), (dq,)))(q, direction)[1]

    plain = dot_product_attention
    np.testing.assert_allclose(tangent(KERNELS["blockwise"](4)), tangent(plain), atol=1e-5)
    for name in KERNELS:
        np.testing.assert_allclose(second(KERNELS[name](4)), second(plain), atol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        tangent(KERNELS["flash"](4))


@pytest.mark.parametrize("padded", [False, True])
def test_no_array_of_all_scores(padded):
    """Not in the gradient of a model either, and with padding; the plain form has them."""
    t = 1024

    def largest(attention_fn):
        model = eqx.filter_eval_shape(
            lambda: TransformerLM(
                11, 12, 3, 2, 20, t, attention_fn=attention_fn, key=jax.random.key(0)
            )
        )
        shape = jax.ShapeDtypeStruct((1, t), jnp.int32)
        batch = {"tokens": shape, "targets": shape}
        if padded:
            batch["padding_mask"] = jax.ShapeDtypeStruct((1, t), jnp.bool_)
        grad = eqx.filter_grad(language_model_loss)
        return largest_array(equations(eqx.filter_make_jaxpr(grad)(model, batch)[0]))

    # Beside a block of scores, feed-forwards and logits are the largest.
    assert largest(fast_attention) <= max(3 * 256 * 512, t * 20)
    assert largest(dot_product_attention) >= 3 * t * t


def test_gradient_of_a_bias_in_sixteen_bits(getkey):
    """It is a sum over all blocks, which 16 bits would round at each of them."""
    q, k, v, weights = (jax.random.normal(getkey(), (2, 3, 64, 8)) for _ in range(4))
    bias = T5PositionBias(3, 8, 16, key=getkey())

    def gradient(kernel, dtype):
        @jax.jit
        def run(table):
            mask = AttentionMask(True, bias=eqx.tree_at(lambda b: b.weight, bias, table))
            return (kernel(q, k, v, mask) * weights).sum()

        return jax.grad(run)(bias.weight.astype(dtype)).astype(jnp.float32)

    exact = gradient(dot_product_attention, jnp.float32)
    flash = gradient(KERNELS["flash"](4), jnp.bfloat16)
    assert jnp.abs(flash - exact).max() < 0.01 * jnp.abs(exact).max()


def test_what_rematerialization_keeps_of_flash(getkey):
    """With its outputs kept, none of its loops run again."""
    attention = partial(flash_attention, blocks=(8, 8))
    model = TransformerLM(11, 12, 3, 1, 20, 32, attention_fn=attention, key=getkey())
    batch = {"tokens": jnp.ones((1, 32), int), "targets": jnp.ones((1, 32), int)}

    def exponentials(keep):
        kept = rematerialize(model, keep=keep)
        gradient = eqx.filter_make_jaxpr(eqx.filter_grad(language_model_loss))(kept, batch)[0]
        # Without an effect on what is computed, they are left out when it is compiled.
        jaxpr, _ = pe.dce_jaxpr(gradient.jaxpr, [True] * len(gradient.jaxpr.outvars))
        return sum(x.primitive.name == "exp" for x in equations(jaxpr))

    assert exponentials(("head_outputs",)) == exponentials(None) < exponentials(())


def test_model_with_long_padded_and_packed_sequences(getkey):
    """Everything in one: where the default runs blocks, the model computes the same."""
    t = 640
    options = dict(dropout_rate=0.0, max_seq_length=t, num_kv_heads=1, window=300)
    build = partial(TransformerLM, 17, 12, 3, 2, 20, key=getkey(), **options)
    tokens = jax.random.randint(getkey(), (2, t), 0, 17)
    real = jnp.arange(t) < jnp.array([[t], [t - 101]])
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "padding_mask": real}
    step = eqx.filter_jit(eqx.filter_value_and_grad(language_model_loss))
    fast, plain = (
        step(build(attention_fn=f), batch) for f in (fast_attention, dot_product_attention)
    )
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ["call", "message"],
    [
        (lambda q, k: flash_attention(q, k, k, None, blocks=(0, 5)), "queries_in_a_block must be"),
        (lambda q, k: flash_attention(q, k, k, None, blocks=(4, 5.0)), "keys_in_a_block must be"),
        (lambda q, k: blockwise_attention(q, k, k, None, block=-3), "block must be an integer"),
        (lambda q, k: flash_attention(q[:, :3], k, k, None), "g a divisor of n, got"),
        (lambda q, k: blockwise_attention(q, k, k[..., :2, :], None), "g a divisor of n, got"),
        (lambda q, k: dot_product_attention(q, k[0], k[0], None), "g a divisor of n, got"),
        (lambda q, k: fast_attention(q[0, 0], k[0, 0], k[0, 0], None), "g a divisor of n, got"),
        (lambda q, k: choose_attention(q, k, k, None, backend="cuda"), "backend must be one of"),
    ],
)
def test_errors_at_the_door(call, message, no_shape_checker):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 4, 5, 8)), jnp.ones((2, 2, 5, 8)))


@pytest.mark.parametrize("kernel", [dot_product_attention, fast_attention, flash_attention])
def test_masks_may_be_booleans(kernel, getkey):
    """As everywhere else."""
    q = jax.random.normal(getkey(), (1, 2, 5, 4))
    causal = kernel(q, q, q, AttentionMask(causal=True))
    np.testing.assert_allclose(kernel(q, q, q, jnp.tril(jnp.ones((5, 5), bool))), causal, atol=1e-6)


def shape(t, n=4, h=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, n, t, h), dtype)


@pytest.mark.parametrize(
    ["backend", "t", "options", "kernel"],
    [
        ("cpu", 512, {}, "blockwise_attention: 512 x 512 scores per head are few"),
        ("cpu", 513, {}, "flash_attention: 513 x 513 scores per head are too many"),
        ("cpu", 4096, {"dropout": jnp.cos}, "dot_product_attention: dropout"),
        ("tpu", 2048, {}, "dot_product_attention: 2048 x 2048"),
        ("tpu", 2049, {}, "flash_attention"),
    ],
)
def test_choice(backend, t, options, kernel):
    mask = AttentionMask(causal=True)
    choice = choose_attention(*3 * [shape(t)], mask, backend=backend, **options)
    assert str(choice).startswith(kernel)


def test_one_query_is_never_cut_into_blocks(no_native):
    """As in decoding: a row of scores is linear in the sequence already."""
    choice = choose_attention(shape(1), *2 * [shape(10**6)], AttentionMask(), backend="cpu")
    assert choice.kernel is blockwise_attention


def test_the_log_says_which_kernel_runs(caplog, no_native):
    q = jnp.ones((1, 2, 5, 4))
    with caplog.at_level(logging.DEBUG, logger="jaxformers"):
        fast_attention(q, q, q, AttentionMask())
    text = "blockwise_attention: 5 x 5 scores per head are few enough to keep; no C call, since off"
    assert text in caplog.text


# A GPU as far as it goes without one: JAX is told that there is one, and lowers for it.


@pytest.fixture
def pretended_gpu(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 100}])
def test_cudnn_is_in_the_program_for_a_gpu(pretended_gpu, options):
    q, k = shape(2048), shape(2048, n=2)
    mask = AttentionMask(**options)

    def grad(q, k, v):
        loss = lambda *x: fast_attention(*x, mask).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for platform, count in (("cuda", 2), ("cpu", 0)):
        program = jax.jit(grad).trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()
        assert program.count("custom_call @__cudnn$fmha") == count
        told = program.replace("\\22", "").replace(" ", "")
        assert told.count(f"sliding_window_length:{mask.window or 0}") == count
        assert told.count(f"mask_type:{'CAUSAL' if mask.causal else 'NO_MASK'}") == count


@pytest.mark.parametrize(
    ["options", "problem", "why"],
    [
        ({}, dict(softcap=5.0), "softcap"),
        (dict(explicit=jnp.ones((1, 1), bool)), {}, "explicit"),
        (dict(q_positions=jnp.arange(2048)), {}, "positions"),
        (dict(q_segments=jnp.ones(2048, int), k_segments=jnp.ones(2048, int)), {}, "packed"),
        (dict(bias=ALiBi()), {}, "biased"),
        (dict(window=5), {}, "its windows are causal"),
        (dict(causal=True), dict(s=2000), "as many keys as queries"),
        ({}, dict(dtype=jnp.float32), "16 bits"),
        ({}, dict(h=20), "head dim"),
    ],
)
def test_where_cudnn_cannot_be_used(pretended_gpu, options, problem, why):
    softcap = problem.pop("softcap", None)
    s = problem.pop("s", 2048)
    q, k = shape(2048, **problem), shape(s, **problem)
    choice = choose_attention(q, k, k, AttentionMask(**options), softcap=softcap)
    assert not choice.cudnn and "not cuDNN, since" in choice.why and why in choice.why
    assert str(choice).startswith(f"flash_attention: 2048 x {s}")
