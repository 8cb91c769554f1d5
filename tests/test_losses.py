"""The loss against torch's, its masks, that a target out of range is never read silently, and that
in chunks it is the same.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers import Dense, LayerNorm, OutputLayer
from jaxformers.training.losses import chunked_cross_entropy, cross_entropy

B, T, V = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=3.0, size=(B, T, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, size=(B, T)).astype(np.int32)
MASK = RNG.random((B, T)) < 0.6

logits, targets, mask = jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(MASK)


def torch_loss(label_smoothing, ignored):
    torch = pytest.importorskip("torch")
    x = torch.tensor(LOGITS, requires_grad=True)
    y = torch.tensor(np.where(ignored, -100, TARGETS)).long()
    loss = torch.nn.functional.cross_entropy(
        x.flatten(0, 1), y.flatten(), label_smoothing=label_smoothing
    )
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch(label_smoothing, masked):
    def loss(x):
        return cross_entropy(x, targets, mask if masked else None, label_smoothing=label_smoothing)

    expected, expected_grad = torch_loss(label_smoothing, ~MASK & masked)
    value, grad = jax.value_and_grad(loss)(logits)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.jit(loss)(logits), expected, rtol=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, -1, V, 2])
def test_ignored_targets_and_masked_targets_are_the_same(ignore_index):
    ignored = jnp.where(mask, targets, ignore_index)
    counted = mask & (targets != ignore_index)
    expected = cross_entropy(logits, targets, counted, label_smoothing=0.1, z_loss=0.1)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": ignore_index}
    assert cross_entropy(logits, ignored, **options) == expected
    assert cross_entropy(logits, ignored, mask, **options) == expected
    # What stands at a position that does not count is nobody's business.
    assert cross_entropy(logits, ignored, counted, label_smoothing=0.1, z_loss=0.1) == expected


def test_log_probs_and_logits_give_the_same_loss():
    log_probs = jax.nn.log_softmax(logits)
    for smoothing in (0.0, 0.1):
        np.testing.assert_allclose(
            cross_entropy(log_probs, targets, mask, label_smoothing=smoothing),
            cross_entropy(logits, targets, mask, label_smoothing=smoothing),
            rtol=1e-6,
        )


def test_z_loss_is_the_mean_square_of_logsumexp():
    log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))[MASK]
    extra = cross_entropy(logits, targets, mask, z_loss=0.3) - cross_entropy(logits, targets, mask)
    np.testing.assert_allclose(extra, 0.3 * (log_z**2).mean(), rtol=1e-6)
    log_probs = jax.nn.log_softmax(logits)
    extra = cross_entropy(log_probs, targets, z_loss=0.3) - cross_entropy(log_probs, targets)
    np.testing.assert_allclose(extra, 0.0, atol=1e-6)


def test_z_loss_gradient():
    def z_loss(x):
        return (jax.nn.logsumexp(x, axis=-1) ** 2).mean()

    def difference(x):
        return cross_entropy(x, targets, z_loss=1.0) - cross_entropy(x, targets)

    np.testing.assert_allclose(jax.grad(difference)(logits), jax.grad(z_loss)(logits), atol=1e-6)


def test_sequences_without_a_batch_axis():
    rows = [cross_entropy(logits[i], targets[i], label_smoothing=0.1) for i in range(B)]
    together = cross_entropy(logits, targets, label_smoothing=0.1)
    np.testing.assert_allclose(jnp.stack(rows).mean(), together, rtol=1e-6)
    mapped = jax.vmap(lambda x, y: cross_entropy(x, y, label_smoothing=0.1))(logits, targets)
    np.testing.assert_allclose(mapped, jnp.stack(rows), rtol=1e-6)


def test_nothing_counted_is_zero_with_zero_gradient():
    def loss(x):
        none = jnp.zeros((B, T), bool)
        return cross_entropy(x, targets, none, label_smoothing=0.1, z_loss=0.1)

    value, grad = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0
    assert (grad == 0).all()


def test_positions_that_do_not_count_make_no_nan():
    expected = cross_entropy(logits, targets, mask)
    assert cross_entropy(jnp.where(mask[..., None], logits, -jnp.inf), targets, mask) == expected
    with jax.debug_nans(True):
        ignored = jnp.where(mask, targets, -100)
        assert cross_entropy(logits, ignored, ignore_index=-100) == expected


def test_positions_that_do_not_count_get_no_gradient():
    grad = jax.grad(cross_entropy)(logits, targets, mask)
    assert (grad[~mask] == 0).all()
    assert (jnp.abs(grad[mask]).sum(-1) > 0).all()


def test_large_logits_lose_no_digits():
    shifted = LOGITS + np.float32(4096)  # this rounds, so the reference takes the rounded ones
    x = shifted.astype(np.float64) - 4096
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    for smoothing in (0.0, 0.1):
        picked = np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
        expected = -((1 - smoothing) * picked + smoothing * log_p.mean(-1)).mean()
        value = cross_entropy(jnp.asarray(shifted), targets, label_smoothing=smoothing)
        np.testing.assert_allclose(value, expected, rtol=3e-6)


def test_bfloat16_logits_are_normalized_in_float32():
    half = logits.astype(jnp.bfloat16)
    value, grad = jax.value_and_grad(cross_entropy)(half, targets)
    assert (value.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
    full = half.astype(jnp.float32)
    expected, expected_grad = jax.value_and_grad(cross_entropy)(full, targets)
    assert value == expected
    np.testing.assert_array_equal(grad, expected_grad.astype(jnp.bfloat16))


def test_forward_mode_agrees_with_reverse_mode():
    def loss(x):
        return cross_entropy(x, targets, mask, label_smoothing=0.1, z_loss=0.1)

    tangent = jnp.asarray(RNG.normal(size=LOGITS.shape), jnp.float32)
    _, forward = jax.jvp(loss, (logits,), (tangent,))
    np.testing.assert_allclose(forward, (jax.grad(loss)(logits) * tangent).sum(), rtol=1e-5)


@pytest.mark.parametrize("wrong", [-1, -V, V, V + 40])
def test_a_target_out_of_range_is_an_error_and_nan_under_jit(wrong):
    some = targets.at[1, 2].set(wrong)
    with pytest.raises(ValueError, match=f"targets must be ids from 0 to {V - 1}.* got {wrong}"):
        cross_entropy(logits, some)
    assert jnp.isnan(jax.jit(cross_entropy)(logits, some))
    assert jnp.isfinite(jax.jit(cross_entropy)(logits, some, jnp.asarray(some == targets)))


def test_small_unsigned_targets():
    wide = jnp.asarray(RNG.normal(size=(T, 300)), jnp.float32)
    narrow = jnp.asarray([0, 255, 3, 254, 17], jnp.uint8)
    expected = cross_entropy(wide, narrow.astype(jnp.int32))
    assert cross_entropy(wide, narrow, ignore_index=-100) == expected
    jitted = jax.jit(cross_entropy, static_argnames="ignore_index")
    np.testing.assert_allclose(jitted(wide, narrow, ignore_index=-100), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((targets, targets), "logits must have a dtype of kind floating, got int32"),
        ((logits, logits[..., 0]), "targets must have a dtype of kind integer, got float32"),
        ((logits, targets, targets), "mask must have a dtype of kind bool.* mask == 1"),
        ((logits, targets[:, 1:]), r"targets must have the shape .* \(3, 5\), got \(3, 4\)"),
        ((logits, targets[0]), r"targets must have the shape .* \(3, 5\), got \(5,\)"),
        ((logits, targets, mask[..., None]), r"mask must have the shape .* got \(3, 5, 1\)"),
    ],
)
@pytest.mark.usefixtures("no_shape_checker")
def test_shapes_and_dtypes_are_checked_under_jit_too(arguments, message):
    for loss in (cross_entropy, jax.jit(cross_entropy)):
        with pytest.raises(ValueError, match=message):
            loss(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing": -0.1}, "label_smoothing must be a finite number of at least 0"),
        ({"label_smoothing": 1.1}, r"label_smoothing must be in \[0, 1\], got 1\.1"),
        ({"z_loss": float("nan")}, "z_loss must be a finite number of at least 0, got nan"),
    ],
)
def test_coefficients_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets, **options)


# In chunks.

ARGUMENTS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(1, 1), (3, 5), (2, 7), (11,), (4, 4)]),
        "chunk": st.integers(1, 9),
        "masked": st.booleans(),
        "ignored": st.booleans(),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 0.1]),
        "tied": st.booleans(),
        "softcap": st.sampled_from([None, 2.0]),
        "transform": st.sampled_from([None, partial(Dense, activation=jnp.tanh, norm=LayerNorm)]),
        "seed": st.integers(0, 9),
    }
)


@given(ARGUMENTS)
@settings(max_examples=12, deadline=None)
def test_in_chunks_the_loss_and_all_gradients_are_the_dense_ones(a):
    rng = np.random.default_rng(a["seed"])
    hidden_key, key = jax.random.split(jax.random.key(a["seed"]))
    layer = OutputLayer(
        6, V, tied=a["tied"], softcap=a["softcap"], transform=a["transform"], key=key
    )
    table = jax.random.normal(key, (V, 6)) if a["tied"] else None
    hidden = jax.random.normal(hidden_key, (*a["shape"], 6))
    wanted = jnp.asarray(rng.integers(0, V, a["shape"]))
    counted = jnp.asarray(rng.random(a["shape"]) < 0.7) if a["masked"] else None
    options = {name: a[name] for name in ("label_smoothing", "z_loss")}
    options["ignore_index"] = 2 if a["ignored"] else None

    def dense(arrays):
        layer, table, hidden = arrays
        return cross_entropy(layer.logits(hidden, table), wanted, counted, **options)

    def chunked(arrays):
        layer, table, hidden = arrays
        return chunked_cross_entropy(
            lambda x: layer.logits(x, table), hidden, wanted, counted, chunk=a["chunk"], **options
        )

    @eqx.filter_jit
    def compare(arrays):
        gradients = (eqx.filter_value_and_grad(f)(arrays) for f in (dense, chunked))
        return *gradients, chunked(arrays)  # without a gradient it takes another path

    (expected, expected_grads), (value, grads), alone = compare((layer, table, hidden))
    np.testing.assert_allclose([value, alone], [expected, expected], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


W = jnp.asarray(RNG.normal(size=(6, V)), jnp.float32)
hidden = jnp.asarray(RNG.normal(size=(B, T, 6)), jnp.float32)


def in_chunks(w, hidden, targets=targets, mask=None, chunk=4, **options):
    return chunked_cross_entropy(lambda x: x @ w, hidden, targets, mask, chunk=chunk, **options)


def at_once(w, hidden):
    return cross_entropy(hidden @ w, targets)


def test_in_chunks_forward_mode_and_second_derivatives_agree():
    @partial(jax.jit, static_argnums=0)
    def derivatives(loss, w, hidden):
        first = jax.jvp(loss, (w, hidden), (w, hidden))[1]
        second = [mode(jax.grad(loss))(w, hidden) for mode in (jax.jacfwd, jax.jacrev)]
        return first, second, jax.vmap(loss, (None, 0))(w, jnp.stack([hidden, -hidden]))

    values, expected = (jax.tree.leaves(derivatives(f, W, hidden)) for f in (in_chunks, at_once))
    for x, y in zip(values, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moved", [0, 1])
def test_in_chunks_only_what_is_asked_for_is_differentiated(moved):
    """Frozen weights cost no product and no sum of their size."""
    expected, grad = (jax.grad(f, moved)(W, hidden) for f in (at_once, in_chunks))
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    program = str(jax.make_jaxpr(jax.grad(in_chunks, moved))(W, hidden))
    assert program.count("dot_general") == 2


def test_in_chunks_rows_that_do_not_count_may_be_anything():
    spoilt = jnp.where(mask[..., None], hidden, jnp.inf)

    def loss(hidden):
        return in_chunks(W, hidden, jnp.where(mask, targets, V + 3), mask, z_loss=0.1)

    value, grad = jax.jit(jax.value_and_grad(loss))(spoilt)
    np.testing.assert_allclose(value, loss(hidden), rtol=1e-6)
    assert (grad[~mask] == 0).all() and (jnp.abs(grad[mask]).sum(-1) > 0).all()
    none = jnp.zeros((B, T), bool)
    value, grad = jax.value_and_grad(lambda x: in_chunks(W, x, mask=none, z_loss=0.1))(hidden)
    assert value == 0 and (grad == 0).all()


def test_in_chunks_sums_of_gradients_are_float32():
    """In bfloat16 the sum over many chunks would not get beyond 256 times one of them."""
    w, rows = jnp.zeros((1, 2), jnp.bfloat16), jnp.ones((999, 1), jnp.bfloat16)
    zeros = jnp.zeros(999, jnp.int32)

    def loss(w):
        return chunked_cross_entropy(lambda x: x @ w, rows, zeros, chunk=1)

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w), jnp.asarray([[-0.5, 0.5]], w.dtype))


def test_in_chunks_the_same_errors(no_shape_checker):
    wrong = targets.at[1, 2].set(V)
    with pytest.raises(ValueError, match=f"targets must be ids from 0 to {V - 1}.* got {V}"):
        in_chunks(W, hidden, wrong)
    assert jnp.isnan(jax.jit(in_chunks)(W, hidden, wrong))
    for options, message in [
        ({"targets": targets[:, 1:]}, "targets must have the shape"),
        ({"mask": targets}, "mask must have a dtype of kind bool"),
        ({"z_loss": -1.0}, "z_loss must be a finite number"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            in_chunks(W, hidden, **options)
    with pytest.raises(ValueError, match="project must be a function"):
        chunked_cross_entropy(W, hidden, targets)
