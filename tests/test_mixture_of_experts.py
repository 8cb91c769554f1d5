"""The mixture of experts: against transformers, against its definition, and within models."""

import copy
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import AdamW, TransformerLM, depth_scaled, language_model_loss, train_step
from jaxformers.mixture_of_experts import MixtureOfExperts, _blocks

B, T, D, F, EXPERTS, K, SHARED = 2, 17, 12, 7, 5, 2, 9
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mixture(d_ff=F, num_experts=EXPERTS, top_k=K, *args, **options):
    return MixtureOfExperts(D, d_ff, num_experts, top_k, *args, key=jax.random.key(0), **options)


def silu(x):
    return x / (1 + np.exp(-x))


def definition(module, x):
    """Token by token, expert by expert, in float64."""
    router, w_gate, w_up, w_down = (
        np.asarray(w, np.float64)
        for w in (module.router, module.w_gate, module.w_up, module.w_down)
    )
    rows = np.asarray(x, np.float64).reshape(-1, D)
    y = np.zeros_like(rows)
    for t, row in enumerate(rows):
        probabilities = np.exp(row @ router)
        probabilities /= probabilities.sum()
        experts = np.argsort(-probabilities)[: module.top_k]
        scale = probabilities[experts].sum() if module.renormalize else 1.0
        for i in experts:
            hidden = silu(row @ w_gate[i]) * (row @ w_up[i])
            y[t] += probabilities[i] / scale * (hidden @ w_down[i])
    return y.reshape(x.shape)


@jax.jit
def output_and_routes(module, x):
    return module(x), module.route(x)


# Against transformers.


def mixtral(torch, renormalize):
    from transformers.models.mixtral import modeling_mixtral

    assert renormalize
    config = modeling_mixtral.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=EXPERTS, num_experts_per_tok=K
    )
    return modeling_mixtral.MixtralSparseMoeBlock(config)


def qwen3(torch, renormalize):
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    config = modeling_qwen3_moe.Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        norm_topk_prob=renormalize,
    )
    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)


def qwen2(torch, renormalize):
    from transformers.models.qwen2_moe import modeling_qwen2_moe

    config = modeling_qwen2_moe.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        norm_topk_prob=renormalize,
    )
    return modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config)


def arrays_of(block, read):
    """Our names for the arrays of one of the blocks above, in our layout."""
    gate, up = np.split(read(block.experts.gate_up_proj), 2, axis=1)
    arrays = {
        ".router": read(block.gate.weight).T,
        ".w_gate": gate.swapaxes(1, 2),
        ".w_up": up.swapaxes(1, 2),
        ".w_down": read(block.experts.down_proj).swapaxes(1, 2),
    }
    if hasattr(block, "shared_expert"):
        for name in ("gate", "up", "down"):
            w = getattr(block.shared_expert, f"{name}_proj").weight
            arrays[f".shared_expert.w_{name}"] = read(w).T
        arrays[".w_shared_gate"] = read(block.shared_expert_gate.weight).T
    return arrays


@pytest.mark.parametrize(
    "reference, renormalize, shared_d_ff",
    [(mixtral, True, None), (qwen3, True, None), (qwen3, False, None), (qwen2, False, SHARED)],
)
def test_parity(reference, renormalize, shared_d_ff):
    """Values, and gradients by the input and by all weights."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    block, rng = reference(torch, renormalize), np.random.default_rng(1)
    with torch.no_grad():
        for parameter in block.parameters():
            scale = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.tensor(rng.normal(0.0, scale, parameter.shape)))
    x, weights = inputs(B, T, D), inputs(B, T, D, seed=2)
    their_x = torch.tensor(np.asarray(x), requires_grad=True)
    their_y = block(their_x)
    (their_y * torch.tensor(np.asarray(weights))).sum().backward()

    values = arrays_of(block, lambda parameter: parameter.detach().numpy())
    ours = mixture(F, EXPERTS, K, jax.nn.silu, renormalize, shared_d_ff)
    ours = jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(values.pop(jax.tree_util.keystr(path))), ours
    )
    assert not values
    assert_close(ours(x), their_y.detach().numpy())

    def loss(ours, x):
        return (ours(x) * weights).sum()

    gradient, x_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(ours, x)
    assert_close(x_gradient, their_x.grad.numpy())
    expected = arrays_of(block, lambda parameter: parameter.grad.numpy())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 1e-2
        assert_close(leaf, expected[jax.tree_util.keystr(path)])


def test_load_balancing_loss_is_that_of_mixtral():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    module, x = mixture(), inputs(B, T, D)
    logits = torch.tensor(np.asarray(x.reshape(-1, D) @ module.router), requires_grad=True)
    expected = modeling.load_balancing_loss_func((logits,), EXPERTS, K)
    expected.backward()
    value_and_grad = jax.jit(jax.value_and_grad(lambda module: module.load_balancing_loss(x)))
    value, gradient = value_and_grad(module)
    assert_close(value, expected.item())
    assert_close(gradient.router, np.asarray(x.reshape(-1, D)).T @ logits.grad.numpy())


def test_load_balancing_loss_is_least_where_tokens_spread_evenly():
    """Tokens that agree with one expert each, against tokens that agree with the first."""
    module = eqx.tree_at(lambda m: m.router, mixture(F, D, 1), 20 * jnp.eye(D))
    loss = jax.jit(lambda x: module.load_balancing_loss(x))
    assert_close(loss(jnp.eye(D)), 1.0)
    assert loss(jnp.eye(D)[:1]) > 0.99 * D


# Against its definition.


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "d_ff, num_experts, top_k", [(F, 5, 5), (F, 5, 1), (F, 1, 1), (1, 3, 2), (F, 40, 3)]
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_definition(d_ff, num_experts, top_k, renormalize):
    """All, one and one of one; fewer tokens than experts and more."""
    module = mixture(d_ff, num_experts, top_k, renormalize=renormalize)
    for shape in ((D,), (B, T, D)):
        x = inputs(*shape)
        y, (weights, experts) = output_and_routes(module, x)
        assert_close(y, definition(module, x))
        assert weights.shape == experts.shape == (*shape[:-1], top_k)
        assert len(np.unique(experts.reshape(-1, top_k)[0])) == top_k
        assert np.allclose(weights.sum(-1), 1.0) == (renormalize or top_k == num_experts)


def test_one_expert_is_a_gated_feed_forward():
    module, x = mixture(F, 1, 1), inputs(B, T, D)
    hidden = silu(x @ module.w_gate[0]) * (x @ module.w_up[0])
    assert_close(module(x), hidden @ module.w_down[0])


@pytest.mark.parametrize("tokens, top_k", [(1, 1), (5, 2), (65, 1), (400, 2), (70, EXPERTS)])
def test_nothing_is_dropped_where_all_want_the_same_expert(tokens, top_k):
    router = jnp.zeros((D, EXPERTS)).at[:, 3].set(1.0)
    # Nearly: equal scores below the first would be ordered differently here and there.
    router = router + 0.01 * inputs(D, EXPERTS)
    module = eqx.tree_at(lambda m: m.router, mixture(F, EXPERTS, top_k), router)
    x = jnp.abs(inputs(tokens, D))
    y, (_, experts) = output_and_routes(module, x)
    assert (experts[:, 0] == 3).all()
    assert_close(y, definition(module, x))


@pytest.mark.few(6)
@pytest.mark.parametrize("num_experts", [1, 3, 40])
@pytest.mark.parametrize("pairs", [1, 2, 39, 41, 129, 1000])
def test_every_pair_has_a_slot_of_its_own(pairs, num_experts):
    """In a block of its expert, however the pairs are spread."""
    rng, blocks = np.random.default_rng(pairs), jax.jit(_blocks, static_argnums=1)
    size = max(1, min(128, pairs // num_experts))
    # Each expert with one row more than fills its blocks, which is the most blocks there can be.
    fullest = np.repeat(np.arange(num_experts), size + 1)[:pairs]
    spreads = [
        rng.integers(0, num_experts, pairs),
        np.full(pairs, num_experts - 1),
        np.zeros(pairs, int),
        rng.permutation(np.resize(fullest, pairs)),
        rng.permutation(np.append(np.arange(num_experts), np.zeros(pairs, int))[:pairs]),
    ]
    for experts in spreads:
        _, slots, block_experts = blocks(jnp.asarray(experts, jnp.int32), num_experts)
        assert len(np.unique(slots)) == pairs
        assert 0 <= slots.min() and slots.max() < len(block_experts) * size
        np.testing.assert_array_equal(block_experts[slots // size], experts)


def test_tokens_do_not_influence_each_other():
    """Alone as among others, whose gradient is exactly zero, and whose NaN stays with them."""
    module, x = mixture(), inputs(B, T, D)
    for i in (0, 8, T - 1):
        assert_close(module(x[1, i]), module(x)[1, i])
    gradient = jax.jit(jax.grad(lambda x: module(x)[1, 8].sum()))(x)
    others = np.ones((B, T), bool)
    others[1, 8] = False
    assert np.abs(gradient[1, 8]).max() > 0 and not np.any(gradient[others])
    for bad in (jnp.nan, jnp.inf):
        y = module(x.at[1, 8].set(bad))
        assert_close(y[others], module(x)[others])
        assert not np.isfinite(y[1, 8]).any()


def test_equal_scores():
    """A tie goes to the first experts, with finite gradients."""
    module = eqx.tree_at(lambda m: m.router, mixture(), jnp.zeros((D, EXPERTS)))
    x = inputs(B, T, D)
    y, (weights, experts) = output_and_routes(module, x)
    np.testing.assert_array_equal(experts, np.broadcast_to([0, 1], (B, T, K)))
    assert_close(weights, 0.5)
    first = [silu(x @ module.w_gate[i]) * (x @ module.w_up[i]) for i in (0, 1)]
    assert_close(y, (first[0] @ module.w_down[0] + first[1] @ module.w_down[1]) / 2)
    gradient = jax.jit(jax.grad(lambda module: jnp.square(module(x)).sum()))(module)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient.router).max() > 0 and not gradient.w_gate[2:].any()


def test_no_tokens():
    assert mixture()(jnp.zeros((3, 0, D))).shape == (3, 0, D)


# As a pytree of arrays.


def test_transformations():
    """jit, vmap over inputs and over modules, checkpoint; forward against reverse mode."""
    module, x = mixture(shared_d_ff=SHARED), inputs(B, T, D)
    minus = jax.tree.map(jnp.negative, module)
    tangent = jax.tree.map(lambda leaf: inputs(*leaf.shape, seed=3), module)

    def loss(module):
        return jnp.sin(module(x)).sum()

    @jax.jit
    def transform(module, minus, tangent):
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), module, minus)
        outputs = module(x), minus(x), jax.vmap(lambda module: module(x))(both)
        batched = jax.vmap(module)(x), jax.vmap(jax.vmap(module))(x)
        gradients = jax.grad(loss)(module), jax.grad(jax.checkpoint(loss))(module)
        return outputs, batched, gradients, jax.jvp(loss, (module,), (tangent,))[1]

    outputs, batched, (gradient, saved), forward = transform(module, minus, tangent)
    assert_close(outputs[0], module(x))
    assert_close(outputs[2], outputs[:2])
    for y in batched:
        assert_close(y, outputs[0])
    jax.tree.map(assert_close, saved, gradient)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
    np.testing.assert_allclose(forward, sum((a * b).sum() for a, b in pairs), rtol=1e-5)


def test_the_backward_pass_keeps_no_copies_of_weights():
    """What it keeps is the module itself and activations, here few against a copy per block."""
    module = MixtureOfExperts(64, 64, 16, 2, key=jax.random.key(0))
    backward = jax.eval_shape(lambda module: jax.vjp(module, inputs(16, 64))[1], module)
    weights = sum(leaf.size for leaf in jax.tree.leaves(module))
    kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert weights < kept < 1.5 * weights


def test_a_call_outside_of_jit_compiles_once():
    traced = []

    def activation(x):
        traced.append(x.shape)
        return jax.nn.silu(x)

    module, x = mixture(activation=activation), inputs(B, T, D)
    module(x)
    count = len(traced)
    assert count > 0
    module(x + 1.0)
    assert len(traced) == count


class Swish(eqx.Module):
    """An activation with a weight."""

    beta: jax.Array

    def __call__(self, x):
        return x * jax.nn.sigmoid(self.beta * x)


@pytest.mark.parametrize("options", [{}, {"shared_d_ff": SHARED}])
@pytest.mark.parametrize("with_weight", [False, True])
def test_copies(options, with_weight, getkey):
    """All leaves are arrays, none is there twice, and copies are of the same tree."""
    chosen = {"activation": Swish(jnp.ones(()))} if with_weight else {}
    module, x = mixture(**options, **chosen), inputs(B, T, D)
    leaves, structure = jax.tree.flatten(module)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)
    assert len(leaves) == 4 + 4 * bool(options) + with_weight * (1 + bool(options))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert jax.tree.structure(twin) == structure
        np.testing.assert_array_equal(twin(x), module(x))
    again = MixtureOfExperts(D, F, EXPERTS, K, key=getkey(), **options, **chosen)
    assert jax.tree.structure(again) == structure
    assert_close(mixture(**options)(x), module(x))


def test_weights_are_drawn_per_expert():
    """Xavier's bound is that of one expert; no two experts are alike; w_down has its own."""
    module = mixture(residual_init=depth_scaled(8))
    bound = (6 / (D + F)) ** 0.5
    for name, scale in {"w_gate": 1.0, "w_up": 1.0, "w_down": 0.25}.items():
        w = getattr(module, name)
        assert 0.8 * bound * scale < np.abs(w).max() <= bound * scale
        assert len(np.unique(w)) > 0.99 * w.size


def test_half_precision():
    """The type of the input comes out, the weights of the sum stay in float32."""
    dtype = jnp.bfloat16
    module, x = mixture(shared_d_ff=SHARED), inputs(B, T, D)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), module)
    expected, (_, experts) = output_and_routes(module, x)
    y, (weights, half_experts) = output_and_routes(half, x.astype(dtype))
    assert y.dtype == dtype and weights.dtype == jnp.float32
    # The same, where rounding does not move a token to another expert.
    same = np.asarray(half_experts == experts).all(-1)
    assert same.mean() > 0.8
    np.testing.assert_allclose(y.astype(jnp.float32)[same], expected[same], atol=0.05)


def test_x64():
    with jax.enable_x64(True):
        module, x = mixture(), inputs(B, T, D)
        y = module(x)
        assert y.dtype == jnp.float32
        assert_close(y, definition(module, x))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), module)
        wide_y = wide(x.astype(jnp.float64))
        assert wide_y.dtype == jnp.float64
        assert_close(wide_y, y)
        assert np.isfinite(jax.jit(lambda module: module.load_balancing_loss(x))(module))


# Within models.


def language_model(**options):
    feed_forward = partial(MixtureOfExperts, num_experts=EXPERTS, top_k=K)
    sizes = 13, D, 2, 1, F, 20
    return TransformerLM(*sizes, feed_forward=feed_forward, key=jax.random.key(1), **options)


def test_generation_with_a_cache_is_that_without():
    model, prompt = language_model(), jnp.asarray([[3, 1, 4, 1], [2, 7, 1, 8]])
    out = model.generate(prompt, 5)
    np.testing.assert_array_equal(out[:, :4], prompt)
    # Greedy: the best token at each place, given all those before it at once.
    np.testing.assert_array_equal(out[:, 4:], eqx.filter_jit(model.logits)(out).argmax(-1)[:, 3:-1])


def test_training():
    """A batch is fitted, and every array takes part."""
    model = language_model(use_bias=False, residual_init=depth_scaled(2))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (3, 9)), jnp.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    _, gradient = eqx.filter_jit(eqx.filter_value_and_grad(language_model_loss))(model, batch)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    optimizer = AdamW(1e-2)
    state, losses = optimizer.init(model), []
    for key in jax.random.split(jax.random.key(0), 20):
        step = train_step(
            model, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
        )
        model, state, loss = step
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


# Hostile arguments.


@pytest.mark.parametrize(
    "change, words",
    [
        ({"d_model": 0}, "d_model must be an integer of at least 1, got 0"),
        ({"d_ff": 7.0}, "d_ff must be an integer of at least 1, got 7.0"),
        ({"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        ({"num_experts": True}, "num_experts must be an integer of at least 1, got True"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": None}, "top_k must be an integer of at least 1, got None"),
        ({"top_k": EXPERTS + 1}, "top_k must be at most num_experts = 5, got 6"),
        ({"renormalize": "no"}, "renormalize must be True or False, got 'no'"),
        ({"renormalize": None}, "renormalize must be True or False, got None"),
        ({"shared_d_ff": 0}, "shared_d_ff must be an integer of at least 1, got 0"),
        ({"shared_d_ff": False}, "shared_d_ff must be an integer of at least 1, got False"),
        ({"use_bias": True}, "experts have no biases.*use_bias=False"),
        ({"use_bias": 0}, "use_bias must be True or False, got 0"),
        ({"activation": "silu"}, "expected a function or a module to call, got 'silu'"),
        ({"activation": Swish}, "expected a function or a module to call"),
        ({"key": None}, "key must be a JAX PRNG key, got None"),
        ({"key": 0}, "key must be a JAX PRNG key, got 0"),
    ],
)
def test_hostile_arguments(change, words, no_shape_checker):
    sizes = {"d_model": D, "d_ff": F, "num_experts": EXPERTS, "top_k": K}
    with pytest.raises(ValueError, match=words):
        MixtureOfExperts(**sizes | {"key": jax.random.key(0)} | change)


def test_biases_asked_of_a_model_are_refused(no_shape_checker):
    with pytest.raises(ValueError, match="experts have no biases"):
        language_model(use_bias=True)


def test_other_widths_are_refused(no_shape_checker):
    with pytest.raises(TypeError, match=rf"contracting dimensions.*{D + 1}.*{D}"):
        mixture()(jnp.ones((3, D + 1)))
