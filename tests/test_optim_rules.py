"""Lion, Adafactor and Muon against optax's, torch's and transformers', over many updates."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import optim, schedules
from jaxformers.hf.plan import arrays_by_path
from jaxformers.optim import Adafactor, Lion, Muon, OrthogonalMomentum, default_decay_mask
from jaxformers.optim.muon import orthogonalize


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Programs that run a few times on tiny arrays are not worth optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


TOLERANCE = {"rtol": 0.0, "atol": 1e-6}
STEPS = 40

# Ours beside what they are to a reference: attention's axes of heads and features are one.
SHAPES = {
    "w": ((5, 7), (5, 7)),
    "tall": ((9, 4), (9, 4)),
    "wq": ((6, 2, 5), (6, 10)),
    "wo": ((2, 4, 3), (8, 3)),
    "bq": ((2, 6), (12,)),
    "gain": ((11,), (11,)),
}
MATRICES = ("w", "tall", "wq", "wo")


def draw(seed, flat=False, scale=0.5):
    random = np.random.default_rng(seed)
    tree = {name: random.normal(scale=scale, size=ours) for name, (ours, _) in SHAPES.items()}
    return {
        name: jnp.asarray(x.reshape(SHAPES[name][flat]), jnp.float32) for name, x in tree.items()
    }


def gradients(step, flat=False):
    """Gradients that differ from step to step, with norms on both sides of 1."""
    return draw(100 + step, flat, scale=1e-3 if step % 3 == 0 else 2.0)


def train(optimizer, names=tuple(SHAPES), flat=False, steps=STEPS):
    """The weights after training by ours or optax's, with the references' shapes."""
    optimizer = optim.as_optimizer(optimizer)

    def chosen(tree):
        return {name: tree[name] for name in names}

    weights = chosen(draw(7, flat))
    state = optimizer.init(weights)
    for step in range(steps):
        weights, state = optimizer.update(chosen(gradients(step, flat)), state, weights)
    return {name: x.reshape(SHAPES[name][1]) for name, x in weights.items()}


def train_torch(make, rate=None, max_norm=None, names=tuple(SHAPES)):
    """The weights after training by torch, in float64; `make` takes matrices and vectors."""
    torch = pytest.importorskip("torch")

    def twin(x):
        return torch.tensor(np.asarray(x)).double()

    twins = {name: torch.nn.Parameter(twin(draw(7, True)[name])) for name in names}
    matrices = [p for name, p in twins.items() if name in MATRICES]
    vectors = [p for name, p in twins.items() if name not in MATRICES]
    optimizers = make(torch, matrices, vectors)
    for step in range(STEPS):
        for name, p in twins.items():
            p.grad = twin(gradients(step, True)[name])
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(twins.values(), max_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups if rate is not None else ():
                group["lr"] = float(rate(step)) if callable(rate) else rate
            optimizer.step()
    return {name: p.detach().numpy() for name, p in twins.items()}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        moved = np.abs(x - draw(7, True)[name]).max()
        assert moved > 1e-3, f"{name} was not trained"
        np.testing.assert_allclose(x, theirs[name], err_msg=name, **(tolerance or TOLERANCE))


COSINE = schedules.warmup_cosine(0.02, 5, 35, end=0.001)
CASES = pytest.mark.parametrize(
    "rate, max_norm", [(0.01, None), (0.01, 1.0), (COSINE, None), (COSINE, 1.0)]
)


def clipped(max_norm, transformation):
    import optax

    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    return optax.chain(clip, transformation)


@CASES
def test_lion_equals_optax(rate, max_norm):
    optax = pytest.importorskip("optax")
    theirs = optax.lion(rate, b1=0.8, b2=0.95, weight_decay=0.3, mask=default_decay_mask)
    ours = Lion(rate, 0.8, 0.95, weight_decay=0.3, max_grad_norm=max_norm)
    assert_same(train(ours), train(clipped(max_norm, theirs), flat=True))


def test_lion_is_that_of_the_paper():
    """Chen et al. 2023, algorithm 2, in float64."""
    expected = {name: np.asarray(x, np.float64) for name, x in draw(7, True).items()}
    for name, p in expected.items():
        m = np.zeros_like(p)
        for step in range(STEPS):
            g = np.asarray(gradients(step, True)[name], np.float64)
            decay = 0.1 if name in MATRICES else 0.0
            p -= 0.01 * (np.sign(0.9 * m + 0.1 * g) + decay * p)
            m = 0.99 * m + 0.01 * g
    assert_same(train(Lion(0.01)), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("max_rms, scale", [(1.0, 1e-3), (None, 1e-3), (0.7, None)])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_adafactor_equals_optax(max_rms, scale, max_norm):
    """Theirs decays the weights without the learning rate: here it is in their number."""
    optax = pytest.importorskip("optax")
    theirs = optax.adafactor(
        0.02,
        min_dim_size_to_factor=1,
        decay_rate=0.7,
        clipping_threshold=max_rms,
        multiply_by_parameter_scale=scale is not None,
        weight_decay_rate=0.02 * 0.3,
        weight_decay_mask=default_decay_mask,
    )
    ours = Adafactor(0.02, 0.7, max_rms, scale, weight_decay=0.3, max_grad_norm=max_norm)
    assert_same(train(ours), train(clipped(max_norm, theirs), flat=True))


def test_adafactor_with_a_schedule_equals_optax():
    optax = pytest.importorskip("optax")
    theirs = optax.adafactor(COSINE, min_dim_size_to_factor=1)
    assert_same(train(Adafactor(COSINE)), train(theirs, flat=True))


def test_adafactor_of_the_paper_equals_transformers():
    """With the relative step and the scale of the parameters."""
    optimization = pytest.importorskip("transformers.optimization")

    def make(torch, matrices, vectors):
        return [optimization.Adafactor(matrices + vectors)]

    assert_same(train(Adafactor()), train_torch(make))


def test_adafactor_equals_torch():
    """Torch puts eps elsewhere, which at 1e-30 makes no difference."""

    def make(torch, matrices, vectors):
        adafactor = partial(torch.optim.Adafactor, lr=0.02, eps=(1e-30, 1e-3), d=1.5)
        return [adafactor(matrices, weight_decay=0.3), adafactor(vectors)]

    assert_same(train(Adafactor(0.02, max_rms=1.5, weight_decay=0.3)), train_torch(make))


def test_relative_step_equals_torch():
    def make(torch, matrices, vectors):
        return [torch.optim.Adafactor(matrices + vectors, lr=0.3, eps=(1e-30, 1e-3))]

    assert_same(train(Adafactor(optim.relative_step(0.3))), train_torch(make))


def test_adafactor_remembers_rows_and_columns():
    state = Adafactor().init(draw(1))
    counts = {name: sum(x.size for x in m.values()) for name, m in state.moments.items()}
    flat = {name: shape for name, (_, shape) in SHAPES.items()}
    assert counts == {
        name: sum(shape) if name in MATRICES else int(np.prod(shape))
        for name, shape in flat.items()
    }


def test_adafactor_bears_gradients_that_are_zero_or_tiny():
    for size in (0.0, 1e-18, 1e-12):
        weights = draw(7)
        grads = jax.tree.map(lambda x, size=size: size * x, draw(8))
        optimizer = Adafactor()
        trained, _ = optimizer.update(grads, optimizer.init(weights), weights)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(trained))


# Muon.


@pytest.fixture
def exact_torch(monkeypatch):
    """Torch's Muon with its Newton-Schulz iteration in the type of the gradient, not bfloat16."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("torch.optim._muon")
    iterate = module._zeropower_via_newtonschulz

    def exact(grad, *args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
            return iterate(grad, *args)

    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", exact)
    return torch


SCALES = {"original": optim.match_width, "match_rms_adamw": optim.match_adamw}


@pytest.mark.parametrize("adjust", SCALES)
@pytest.mark.parametrize("rate, max_norm, nesterov", [(0.01, None, False), (COSINE, 1.0, True)])
def test_muon_equals_torch(exact_torch, adjust, rate, max_norm, nesterov):
    torch = exact_torch

    class TransposedMuon(torch.optim.Muon):
        """Torch's weights are (outputs, inputs), which their factor by shape goes by."""

        def step(self):
            params = [p for group in self.param_groups for p in group["params"]]
            for p in params:
                grad, p.grad = p.grad, None
                p.data, p.grad = p.data.T.contiguous(), grad.T.contiguous()
            super().step()
            for p in params:
                grad, p.grad = p.grad, None
                p.data = p.data.T.contiguous()

    def make(torch, matrices, vectors):
        muon = TransposedMuon(matrices, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=adjust)
        return [muon, torch.optim.AdamW(vectors, weight_decay=0.0)]

    ours = Muon(
        rate, weight_decay=0.3, max_grad_norm=max_norm, nesterov=nesterov, scale=SCALES[adjust]
    )
    assert_same(train(ours), train_torch(make, rate, max_norm))


@pytest.mark.parametrize("consistent_rms, scale", [(0.2, optim.match_adamw), (None, None)])
def test_muon_equals_optax(consistent_rms, scale):
    """Without Nesterov: theirs corrects the bias of both its terms, as Nadam does."""
    optax = pytest.importorskip("optax")
    theirs = optax.contrib.muon(
        0.01,
        beta=0.9,
        weight_decay=0.3,
        nesterov=False,
        consistent_rms=consistent_rms,
        adam_weight_decay=0.0,
        ns_coeffs=((4.0, -6.0, 2.5), (3.5, -4.8, 2.0), (2.9, -3.1, 1.2)),
        ns_steps=3,
    )
    ours = Muon(
        0.01,
        0.9,
        0.3,
        nesterov=False,
        scale=scale or optim.match_width,
        coefficients=((4.0, -6.0, 2.5), (3.5, -4.8, 2.0), (2.9, -3.1, 1.2)),
        rest=optim.AdamW(0.01, weight_decay=0.0),
    )
    names = [name for name in SHAPES if name != "bq"]  # theirs goes by axes
    assert_same(train(ours, names), train(theirs, names, flat=True))


def test_nesterov_in_muon_is_torch_s_and_not_optax_s():
    """What the docstring says of both, by their formulas."""
    optax = pytest.importorskip("optax")
    gradients = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    weight = {"w": jnp.zeros((6, 5))}
    ours = Muon(1.0, 0.9, 0.0, scale=lambda inputs, outputs: 1.0)
    theirs = optax.contrib.muon(1.0, beta=0.9)  # a matrix of 6 inputs and 5 outputs is not scaled
    our_state, their_state = ours.init(weight), theirs.init(weight)
    momentum = np.zeros((6, 5))
    for t, g in enumerate(gradients, start=1):
        momentum = 0.9 * momentum + 0.1 * g
        moved, our_state = ours.update({"w": jnp.asarray(g)}, our_state, weight)
        with jax.numpy_dtype_promotion("standard"):
            direction, their_state = theirs.update({"w": jnp.asarray(g)}, their_state, weight)
        plain = 0.9 * momentum + 0.1 * g
        corrected = 0.9 * momentum / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        for wanted, got in ((plain, -moved["w"]), (corrected, -direction["w"])):
            wanted = orthogonalize(jnp.asarray(wanted, jnp.float32))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert np.abs(moved["w"] - direction["w"]).max() > 1e-2


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (13, 4)])
def test_orthogonalize_changes_singular_values_alone(shape):
    """Each by the polynomial, computed in float64; and as optax does it."""
    x = np.random.default_rng(3).normal(size=(2, *shape))
    made = orthogonalize(jnp.asarray(x, jnp.float32))
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    values /= np.linalg.norm(x, axis=(-2, -1))[:, None]
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(made, (u * values[:, None]) @ vt, rtol=0, atol=1e-5)
    optax = pytest.importorskip("optax")
    coefficients = jnp.asarray((3.4445, -4.7750, 2.0315))
    for one, ours in zip(jnp.asarray(x, jnp.float32), made, strict=True):
        theirs = optax.contrib._muon.orthogonalize_via_newton_schulz(one, coefficients)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_muon_takes_hidden_matrices_and_leaves_the_rest(deep):
    chosen = {
        path
        for path, x in arrays_by_path(deep).items()
        if "layers.0" in path and optim.is_hidden_matrix(path, x)
    }
    attention = {f"self_attention.{name}" for name in ("wq", "wk", "wv", "wo")}
    experts = {f"feed_forward.{name}" for name in ("router", "w_gate", "w_up", "w_down")}
    shared = {f"feed_forward.shared_expert.{name}" for name in ("w_gate", "w_up", "w_down")}
    assert chosen == {f"decoder.layers.0.{name}" for name in attention | experts | shared}
    matrices, rest = Muon(0.1).init(deep)
    assert rest.moments.decoder.layers[0].self_attention.wq is None
    assert set(rest.moments.output.w) == set(rest.moments.embedding.position.weight) == {"mu", "nu"}
    assert matrices.moments.output.w is matrices.moments.embedding.position.weight is None


def test_muon_refuses_vectors_and_models_without_matrices():
    with pytest.raises(ValueError, match="Muon is for matrices, got bq of shape .*is_hidden"):
        OrthogonalMomentum(0.1).init(draw(1))
    with pytest.raises(ValueError, match="predicate 0.* such as b, embedding"):
        Muon(0.1).init({"b": jnp.ones(3), "embedding": jnp.ones((4, 2))})


# What all share.

ALL = {
    "adamw": partial(optim.AdamW, 0.01, weight_decay=0.1),
    "lion": partial(Lion, 0.01),
    "adafactor": partial(Adafactor, 0.01, weight_decay=0.1),
    "muon": partial(Muon, 0.01),
}


def with_layers_that_differ(model, seed):
    """The model with other numbers, as gradients are."""
    leaves, structure = jax.tree.flatten(model)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(
        structure, [jnp.asarray(random.normal(size=x.shape), jnp.float32) for x in leaves]
    )


@pytest.fixture(scope="module")
def deep():
    """A model with every kind of leaf that layers have."""
    build = partial(
        jf.TransformerLM,
        *(13, 12, 3, 2, 10, 9),
        learnable_pos=True,
        head_dim=5,
        num_kv_heads=1,
        qk_norm=partial(jf.PerHeadNorm, jf.LayerNorm),
        feed_forward=partial(
            jf.MixtureOfExperts, num_experts=3, top_k=2, shared_d_ff=7, use_bias=False
        ),
    )
    return eqx.filter_jit(build)(key=jax.random.key(5))


@pytest.mark.parametrize("name", ALL)
def test_scanned_layers_are_updated_as_unrolled_ones(deep, name):
    optimizer = ALL[name](max_grad_norm=1.0)
    unrolled = with_layers_that_differ(deep, 1)
    scanned = jf.scan_layers(unrolled)
    states = optimizer.init(unrolled), optimizer.init(scanned)
    for step in (2, 3):
        grads = with_layers_that_differ(deep, step)
        unrolled, first = optimizer.update(grads, states[0], unrolled)
        scanned, second = optimizer.update(jf.scan_layers(grads), states[1], scanned)
        states = first, second
    expected = jf.scan_layers(unrolled)
    assert jax.tree.structure(expected) == jax.tree.structure(scanned)
    for x, y in zip(jax.tree.leaves(scanned), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", [Muon(0.1), Adafactor(0.1)], ids=["muon", "adafactor"])
def test_experts_are_matrices_of_their_own_and_heads_are_not(optimizer):
    """What is apart is updated as it would be alone."""
    random = np.random.default_rng(4)
    shapes = {"w_down": (3, 5, 4), "wq": (5, 3, 4)}

    def updated(weights, grads):
        return optimizer.update(grads, optimizer.init(weights), weights)[0]

    weights, grads = (
        {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    together = updated(*jax.tree.map(jnp.asarray, (weights, grads)))
    for i in range(3):
        parts = ({"w": jnp.asarray(x["w_down"][i])} for x in (weights, grads))
        np.testing.assert_allclose(together["w_down"][i], updated(*parts)["w"], rtol=0, atol=1e-6)
        parts = ({"w": jnp.asarray(x["wq"][:, i])} for x in (weights, grads))
        assert np.abs(together["wq"][:, i] - updated(*parts)["w"]).max() > 1e-3


def in_type(x, dtype):
    return jnp.asarray(np.asarray(x).astype(dtype))  # NumPy compiles nothing


@pytest.mark.parametrize("name", ALL)
def test_weights_of_16_bits_are_rounded_once(name):
    """All is computed in float32, then the weights are rounded: an update that fits is not lost."""
    optimizer = ALL[name]()
    half, grads = ({k: in_type(x, jnp.bfloat16) for k, x in draw(i).items()} for i in (1, 2))
    with pytest.warns(UserWarning, match="of 16 bits are trained"):
        trained, state = optimizer.update(grads, optimizer.init(half), half)
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}
    wide, wide_grads = (
        {k: in_type(x, jnp.float32) for k, x in tree.items()} for tree in (half, grads)
    )
    expected, _ = optimizer.update(wide_grads, optimizer.init(wide), wide)
    for key, x in trained.items():
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, in_type(expected[key], jnp.bfloat16))


@pytest.mark.parametrize("name", ALL)
def test_leaves_without_gradients_stay_and_new_rates_compile_nothing(name):
    traces = []

    def scale(inputs, outputs):
        traces.append(inputs)
        return 1.0

    def mask(model):
        traces.append(model)
        return default_decay_mask(model)

    extra = {"scale": scale} if name == "muon" else {"decay_mask": mask}
    weights, grads, counts = draw(1), draw(2), []
    grads["w"] = grads["bq"] = None
    for rate in (0.1, 0.2, jnp.asarray(0.3)):
        optimizer = ALL[name].func(rate, **extra)
        state = optimizer.init(weights)
        np.testing.assert_allclose(optimizer.rate(state), rate)
        trained, _ = optimizer.update(grads, state, weights)
        counts.append(len(traces))
        assert trained["w"] is weights["w"] or (trained["w"] == weights["w"]).all()
        assert (trained["bq"] == weights["bq"]).all()
        assert (trained["tall"] != weights["tall"]).all()
    assert counts[0] == counts[2] > 0


@pytest.mark.parametrize("rule", [jf.AdamW, Lion, Adafactor])
def test_an_update_that_is_not_good_changes_nothing(rule):
    optimizer, weights = rule(1e-2), draw(7)
    first = optimizer.update(gradients(1), optimizer.init(weights), weights)
    spoilt = jax.tree.map(lambda g: g * jnp.nan, gradients(2))
    kept = optimizer.update(spoilt, first[1], first[0], good=jnp.asarray(False))
    again = optimizer.update(gradients(2), first[1], first[0], good=jnp.asarray(True))
    plain = optimizer.update(gradients(2), first[1], first[0])
    for got, wanted, rounding in ((kept, first, 0), (again, plain, 1e-5)):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=rounding)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Lion(-0.1), "learning_rate must be a finite number"),
        (lambda: Lion(0.1, b1=1.0), r"b1 must be a number in \[0, 1\)"),
        (lambda: Lion(0.1, weight_decay=-1.0), "weight_decay must be a finite number"),
        (lambda: Lion(0.1, max_grad_norm=0.0), "max_grad_norm must be a finite number above 0"),
        (lambda: Adafactor(decay_rate=0.0), "decay_rate must be a finite number above 0"),
        (lambda: Adafactor(max_rms=-1.0), "max_rms must be a finite number above 0"),
        (lambda: Adafactor(smallest_scale=0.0), "smallest_scale must be a finite number above 0"),
        (lambda: Adafactor(eps=0.0), "eps must be a finite number above 0"),
        (lambda: optim.relative_step(-1.0), "largest must be a finite number"),
        (lambda: Muon(0.1, momentum=1.0), r"momentum must be a number in \[0, 1\)"),
        (lambda: Muon(0.1, nesterov=1), "nesterov must be True or False"),
        (lambda: Muon(0.1, coefficients=()), "coefficients must be triples"),
        (lambda: Muon(0.1, coefficients=(1.0, 2.0, 3.0)), "coefficients must be triples"),
        (lambda: Muon(0.1, rest="adamw"), "optimizer must be an Optimizer"),
        (lambda: Muon(0.1, hidden="w"), "must be a function"),
    ],
)
def test_bad_arguments_are_refused(build, message, no_shape_checker):
    with pytest.raises(ValueError, match=message):
        build()
