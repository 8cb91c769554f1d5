"""`log_probs_of`: the entries of the models' log-probabilities for targets, and their gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import Transformer, TransformerLM, cast_floating, chunks, language_model_loss
from jaxformers.inspect import trace
from jaxformers.log_probs import log_softmax
from jaxformers.sharding import make_mesh, shard, shard_batch

V, B, T, S = 31, 3, 11, 7
RNG = np.random.default_rng(7)
TEXT = RNG.integers(0, V, (B, T + 1))
TOKENS, TARGETS = jnp.asarray(TEXT[:, :-1]), jnp.asarray(TEXT[:, 1:])
SOURCE = jnp.asarray(RNG.integers(0, V - 2, (B, S)))
REAL = jnp.asarray(np.arange(T) < np.array([[T], [4], [8]]))
WEIGH = RNG.normal(size=(B, T)).astype(np.float32)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def lm():
    return TransformerLM(V, 12, 2, 2, 20, 16, key=KEY)


@pytest.fixture(scope="module")
def pair():
    return Transformer(V - 2, V, 12, 2, 1, 1, 20, 16, tie_embeddings=True, key=KEY)


@pytest.fixture
def in_chunks(monkeypatch):
    """Five rows are a chunk, and the last chunk is not full."""
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", {"cpu": 5 * V})
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 1)


def gathered(log_probs, targets=TARGETS):
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def same(got, wanted, **tolerance):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def compare(model, *tokens, **call):
    """Values and gradients, each in a program traced anew, whatever the chunks."""

    @eqx.filter_jit
    def both(model):
        def fast(model):
            return (model.log_probs_of(*tokens, TARGETS, **call) * WEIGH).sum()

        def plain(model):
            return (gathered(model(*tokens, **call)) * WEIGH).sum()

        return [eqx.filter_value_and_grad(f)(model) for f in (fast, plain)]

    same(*both(model))


@pytest.mark.parametrize("chunked", [False, True])
def test_values_and_gradients_are_those_of_all_log_probabilities(lm, pair, chunked, request):
    if chunked:
        request.getfixturevalue("in_chunks")
    compare(lm, TOKENS)
    compare(lm, TOKENS, key=jax.random.key(1))
    compare(pair, SOURCE, TOKENS, key=jax.random.key(1))


def test_in_chunks_the_logits_are_never_all_there(lm, in_chunks):
    def program(log_probs):
        return str(jax.make_jaxpr(jax.grad(lambda model: log_probs(model).sum()))(lm))

    assert f"[{B},{T},{V}]" in program(lambda model: gathered(model(TOKENS)))
    chunked = program(lambda model: model.log_probs_of(TOKENS, TARGETS))
    assert f"[5,{V}]" in chunked and f"[{B},{T},{V}]" not in chunked


@pytest.mark.usefixtures("no_shape_checker")
def test_an_eager_call_is_the_traced_one(lm, pair, compiled):
    wanted = gathered(lm(TOKENS))
    same(lm.log_probs_of(TOKENS, TARGETS), wanted)
    same(lm.log_probs_of(np.asarray(TOKENS), np.asarray(TARGETS, np.uint8)), wanted)
    same(lm.log_probs_of(TOKENS[1], TARGETS[1]), wanted[1])
    same(pair.log_probs_of(SOURCE, TOKENS, TARGETS), gathered(pair(SOURCE, TOKENS)))
    compiled()
    tokens, targets = (jax.device_put(np.zeros((B, 9), np.int32)) for _ in range(2))
    lm.log_probs_of(tokens, targets)  # 9 tokens have the program of 11
    assert compiled() == []


def test_targets_that_do_not_count_are_zero_as_for_the_losses(lm, pair):
    places = jnp.where(REAL, jnp.arange(T), -1)
    packed = {"positions": places, "segment_ids": REAL.astype(jnp.int32)}
    odd = jnp.where(REAL, TARGETS, V + 5)  # what is at a place of padding does not matter
    for targets, call in (
        (odd, {"padding_mask": REAL}),
        (odd, packed),
        (jnp.where(REAL, TARGETS, -100), {}),
    ):
        wanted = jnp.where(REAL, gathered(lm(TOKENS, **call)), 0)
        run = eqx.filter_jit(TransformerLM.log_probs_of)
        for got in (lm.log_probs_of(TOKENS, targets, **call), run(lm, TOKENS, targets, **call)):
            same(got, wanted)
            assert (got[~REAL] == 0).all()
        loss = language_model_loss(lm, {"tokens": TOKENS, "targets": targets, **call})
        np.testing.assert_allclose(-wanted[REAL].mean(), loss, rtol=1e-6)
    call = {"tgt_padding_mask": REAL, "src_padding_mask": SOURCE > 3}
    got = pair.log_probs_of(SOURCE, TOKENS, odd, **call)
    same(got, jnp.where(REAL, gathered(pair(SOURCE, TOKENS, **call)), 0))


@pytest.mark.usefixtures("no_shape_checker")
@pytest.mark.parametrize("wrong", [V, -1, -V, 2**32 - 100])
def test_a_target_out_of_range_is_an_error_and_nan_under_jit(lm, wrong):
    targets = np.asarray(TARGETS, np.int64 if wrong < 0 else np.uint32)
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=f"targets must be ids from 0 to {V - 1}.* got {wrong}"):
        lm.log_probs_of(TOKENS, targets)
    targets = jnp.asarray(targets)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def compute(model):
        log_probs = model.log_probs_of(TOKENS, jax.lax.optimization_barrier(targets))
        return log_probs.sum(), log_probs

    (_, log_probs), gradient = compute(lm)
    assert jnp.isnan(log_probs).sum() == 1 and jnp.isnan(log_probs[1, 2])
    assert jnp.isnan(gradient.output.w).any()


@pytest.mark.usefixtures("no_shape_checker")
def test_wrong_targets_are_refused(lm, pair):
    for targets, message in (
        (TARGETS[:, 1:], r"targets must have the shape of the tokens, \(3, 11\), got \(3, 10\)"),
        (TARGETS.astype(jnp.float32), "targets must hold integer ids, got dtype float32"),
    ):
        for run in (lambda f: f, jax.jit):
            with pytest.raises(ValueError, match=message):
                run(lambda x: lm.log_probs_of(TOKENS, x))(targets)
            with pytest.raises(ValueError, match=message):
                run(lambda x: pair.log_probs_of(SOURCE, TOKENS, x))(targets)
    with pytest.raises(ValueError, match="has no output layer"):
        eqx.tree_at(lambda m: m.output, lm, None).log_probs_of(TOKENS, TARGETS)


def test_vmap_over_rows_and_forward_mode(lm, in_chunks):
    rows = jax.vmap(lm.log_probs_of)(TOKENS, TARGETS)
    same(rows, lm.log_probs_of(TOKENS, TARGETS))
    norms = jax.vmap(
        jax.grad(lambda w, x, y: with_output(lm, w).log_probs_of(x, y).sum()), (None, 0, 0)
    )
    whole = jax.grad(lambda w: with_output(lm, w).log_probs_of(TOKENS, TARGETS).sum())(lm.output.w)
    same(norms(lm.output.w, TOKENS, TARGETS).sum(0), whole, atol=1e-5)

    def value(w):
        return with_output(lm, w).log_probs_of(TOKENS, TARGETS).sum()

    _, forward = jax.jvp(value, (lm.output.w,), (lm.output.w,))
    np.testing.assert_allclose(forward, (whole * lm.output.w).sum(), rtol=1e-4)


def with_output(model, w):
    return eqx.tree_at(lambda m: m.output.w, model, w)


@pytest.mark.parametrize("chunked", [False, True])
def test_bfloat16(lm, chunked, request):
    """Log-probabilities are float32, and chunks add gradients up in float32."""
    narrow = cast_floating(lm, jnp.bfloat16)
    wanted = gathered(eqx.filter_jit(narrow)(TOKENS))
    if chunked:
        request.getfixturevalue("in_chunks")
    got = eqx.filter_jit(lambda m: m.log_probs_of(TOKENS, TARGETS))(narrow)
    same(got, wanted)
    gradient = jax.grad(lambda m: m.log_probs_of(TOKENS, TARGETS).sum())(narrow)
    assert gradient.output.w.dtype == jnp.bfloat16


def test_on_a_mesh(lm, in_chunks):
    batch = {"tokens": TOKENS[:2], "targets": TARGETS[:2]}

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def compute(model, batch):
        log_probs = model.log_probs_of(**batch)
        return log_probs.mean(), log_probs

    mesh = make_mesh(fsdp=2)
    got = compute(shard(lm, mesh), shard_batch(batch, mesh))
    same(jax.device_get(got), jax.device_get(compute(lm, batch)))


@pytest.mark.usefixtures("in_chunks")
def test_its_logits_can_be_traced(lm):
    result, sites = trace(lm.log_probs_of, ["*logits"])(TOKENS, TARGETS)
    same(gathered(jax.nn.log_softmax(sites["output.logits"])), result)


def test_log_softmax():
    logits = jnp.asarray(RNG.normal(scale=20, size=(4, V)), jnp.float32).at[0, 3].set(-jnp.inf)
    same(log_softmax(logits), jax.nn.log_softmax(logits), rtol=1e-5)
    weigh = jnp.asarray(RNG.normal(size=(4, V)), jnp.float32).at[0, 3].set(0)
    got, wanted = (
        jax.grad(lambda x, f=f: jnp.where(weigh == 0, 0, f(x) * weigh).sum())(logits)
        for f in (log_softmax, jax.nn.log_softmax)
    )
    same(got, wanted, atol=1e-5)
    assert (log_softmax(1e4 * logits[1:]) <= 0).all()
