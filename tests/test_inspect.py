"""Looking inside: traces, patches and what is built of them."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    GatedFeedForward,
    LayerNorm,
    MixtureOfExperts,
    OutputLayer,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    flash_attention,
    language_model_loss,
    quantize,
    rematerialize,
    scan_layers,
)
from jaxformers.inspect import (
    KeptHeads,
    ablate_heads,
    attention_maps,
    head_attribution,
    hidden_states,
    induction_scores,
    logit_lens,
    patch,
    trace,
)
from jaxformers.paths import path_name
from jaxformers.sites import site

V, D, N, F, LAYERS = 23, 24, 4, 10, 2
KEY = jax.random.key(5)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, 7)), jnp.int32)
LLAMA = dict(
    norm=RMSNorm,
    feed_forward=GatedFeedForward,
    position=RotaryPositionalEncoding(),
    use_bias=False,
    num_kv_heads=2,
    tie_embeddings=True,
)


def decoder(**options):
    return TransformerLM(V, D, N, LAYERS, F, 20, 0.0, **options, key=KEY)


def call(model):
    return model(TOKENS, TOKENS[:, :5]) if isinstance(model, Transformer) else model(TOKENS)


def traced(model, *only, **options):
    given = (TOKENS, TOKENS[:, :5]) if isinstance(model, Transformer) else (TOKENS,)
    return trace(model, only or None, **options)(*given)


MODELS = {
    "default": decoder,
    "llama": partial(decoder, **LLAMA),
    "parallel": partial(decoder, parallel="one norm"),
    "seq2seq": partial(
        Transformer, V, V, D, N, 1, LAYERS, F, 20, 0.0, share_embeddings=True, key=KEY
    ),
    "encoder": partial(
        TransformerEncoder, V, D, N, LAYERS, F, 20, 0.0, output=OutputLayer, key=KEY
    ),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", MODELS)
def test_traces_of_all_models(name):
    model = MODELS[name]()
    result, sites = traced(model)
    assert np.array_equal(result, call(model))
    scanned, same = traced(scan_layers(model))
    assert np.array_equal(scanned, call(scan_layers(model)))
    assert list(sites) == list(same)
    for path in sites:
        np.testing.assert_allclose(same[path], sites[path], atol=1e-5, err_msg=path)
    shapes = traced(model, shapes=True)
    assert {path: x.shape for path, x in shapes.sites.items()} == {
        path: x.shape for path, x in sites.items()
    }
    assert shapes.result.shape == result.shape


def test_the_stream_is_the_sum_of_its_parts():
    sites = traced(decoder()).sites
    for i in range(LAYERS):
        layer = {path.removeprefix(f"decoder.layers.{i}."): x for path, x in sites.items()}
        attention = layer["self_attention.sublayer_output"]
        between = layer["residual_before"] + attention
        np.testing.assert_allclose(layer["residual_between"], between, atol=1e-5)
        after = between + layer["feed_forward.sublayer_output"]
        np.testing.assert_allclose(layer["residual_after"], after, atol=1e-5)
        heads = jnp.einsum(
            "bnts,bnsh->bnth", layer["self_attention.pattern"], layer["self_attention.values"]
        )
        np.testing.assert_allclose(layer["self_attention.head_outputs"], heads, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_stream_is_what_the_parts_wrote(name):
    model, sites = MODELS[name](), traced(MODELS[name]()).sites
    stacks = [x for x in ("encoder", "decoder") if getattr(model, x, None) is not None]
    for stack in stacks:
        layers = len(getattr(model, stack).layers)
        written = [path for path in sites if path.startswith(f"{stack}.layers.")]
        written = [sites[path] for path in written if path.endswith(".sublayer_output")]
        assert len(written) == layers * (3 if (name, stack) == ("seq2seq", "decoder") else 2)
        total = sites[f"{stack}.layers.0.residual_before"] + sum(written)
        last = sites[f"{stack}.layers.{layers - 1}.residual_after"]
        np.testing.assert_allclose(last, total, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_without_heads_attention_is_its_bias_alone(name):
    """A projection of zeros, beside a bias that is none, is the model without attention."""
    attention = "*_attention.head_outputs"
    model = jax.tree.map(lambda x: x + 0.1 if x.ndim == 1 else x, MODELS[name]())
    removed = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path_name(path).endswith("_attention.wo") else x, model
    )
    assert abs(call(removed) - call(model)).max() > 1e-2
    for zero in (0, KeptHeads(jnp.zeros(N))):
        np.testing.assert_allclose(call(patch(model, {attention: zero})), call(removed), atol=1e-6)


@pytest.mark.parametrize(
    "change", [lambda x: x, scan_layers, lambda x: rematerialize(scan_layers(x))]
)
def test_patches(change):
    model = change(decoder(**LLAMA))
    same = patch(model, {"*.queries": lambda x: x, "decoder.layers.1.residual_after": lambda x: x})
    compiled = eqx.filter_jit(lambda model: model(TOKENS))
    assert np.array_equal(compiled(same), compiled(model))
    sites = traced(model).sites
    path = "decoder.layers.1.self_attention.head_outputs"
    own = patch(model, {path: sites[path]})
    np.testing.assert_allclose(own(TOKENS), model(TOKENS), atol=1e-5)
    # Without heads a layer is what is left of it without attention.
    without = patch(model, {path: 0})
    assert isinstance(without, TransformerLM)
    found = traced(without).sites
    before, between = (found[f"decoder.layers.1.residual_{x}"] for x in ("before", "between"))
    np.testing.assert_array_equal(before, between)
    np.testing.assert_array_equal(found[path], 0)
    first = "decoder.layers.0.residual_after"
    np.testing.assert_allclose(found[first], sites[first], atol=1e-6)
    assert abs(without(TOKENS) - model(TOKENS)).max() > 1e-2


def test_a_patched_model_generates(no_shape_checker):
    model = patch(decoder(), {"blocks.1.hook_attn_out": lambda x: -2 * x})
    tokens = model.generate(TOKENS, 5)
    best = np.asarray(model.logits(tokens[:, :-1]).argmax(-1))
    assert np.array_equal(best[:, 6:], tokens[:, 7:])
    assert not np.array_equal(tokens, decoder().generate(TOKENS, 5))
    assert model.generate(TOKENS, 4, num_beams=3).shape == (2, 11)
    source = MODELS["seq2seq"]()
    other = patch(source, {"src_embedding.embedded": 0.0})
    assert abs(call(other) - call(source)).max() > 1e-2
    tokens = other.generate(TOKENS, 5, start_token=1)
    assert np.array_equal(other(TOKENS, tokens[:, :-1]).argmax(-1), tokens[:, 1:])
    assert not np.array_equal(tokens, source.generate(TOKENS, 5, start_token=1))


class Steer(eqx.Module):
    by: jax.Array

    def __call__(self, x):
        return x + self.by


@pytest.mark.parametrize("change", [lambda x: x, lambda x: rematerialize(scan_layers(x))])
def test_gradients_and_transformations(change):
    model = change(decoder(**LLAMA))

    def score(by):
        steered = patch(model, {"decoder.layers.1.residual_before": Steer(by)})
        return (steered.logits(TOKENS) ** 2).mean()

    by = jnp.linspace(-1.0, 1.0, D)
    gradient = jax.grad(score)(by)
    step = jnp.zeros(D).at[2].set(1e-2)
    difference = (score(by + step) - score(by - step)) / 2e-2
    np.testing.assert_allclose(gradient[2], difference, rtol=2e-2)
    np.testing.assert_allclose(jax.jit(jax.grad(score))(by), gradient, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(score)(by[None])[0], score(by), rtol=1e-6)
    # Arrays of a patch are trained like those of the model.
    steered = patch(model, {"decoder.layers.1.residual_before": Steer(by)})
    found = eqx.filter_grad(lambda model: (model.logits(TOKENS) ** 2).mean())(steered)
    np.testing.assert_allclose(found.decoder.patches.patches[0].value.by, gradient, atol=1e-6)


def test_gradients_of_a_trace():
    model = rematerialize(scan_layers(decoder()))

    def size(model):
        return traced(model, "decoder.layers.0.feed_forward.activations").sites.popitem()[1].sum()

    found = eqx.filter_grad(size)(model)
    by_layer = abs(found.decoder.layers.stacked.feed_forward.w_in).sum((1, 2))
    assert by_layer[0] > 0 and by_layer[1] == 0
    traces = jax.vmap(lambda x: trace(model, ["*.hidden"])(x).sites["decoder.hidden"])
    np.testing.assert_allclose(traces(TOKENS), traced(model).sites["decoder.hidden"], atol=1e-5)


def test_a_cache_is_traced():
    model, cache = decoder(), decoder().init_cache(2, 9)
    _, cache = model.forward(TOKENS[:, :4], cache=cache)
    path = "decoder.layers.1.self_attention.pattern"

    def step(tokens, cache):
        return model.forward(tokens, cache=cache)

    found = trace(step, [path])(TOKENS[:, 4:], cache).sites[path]
    whole = traced(model).sites[path]
    np.testing.assert_allclose(found[..., :7], whole[:, :, 4:], atol=1e-5)


def test_experts_have_sites_outside():
    experts = partial(MixtureOfExperts, num_experts=3, top_k=2, shared_d_ff=4)
    model = decoder(feed_forward=experts)
    sites = traced(model).sites
    assert "decoder.layers.0.feed_forward.sublayer_output" in sites
    assert "decoder.layers.0.feed_forward.activations" not in sites
    without = patch(model, {"decoder.layers.*.feed_forward.sublayer_output": 0})
    assert abs(without(TOKENS) - model(TOKENS)).max() > 1e-3


def test_what_is_no_site():
    model = decoder()
    with pytest.raises(
        ValueError, match=r"no site 'decoder.layers.9.hidden'. Near it are .*layers"
    ):
        traced(model, "decoder.layers.9.hidden")
    with pytest.raises(ValueError, match="no site 'blocks.0.hook_nothing'"):
        patch(model, {"blocks.0.hook_nothing": 0})
    with pytest.raises(
        ValueError, match=r"decoder.hidden must have its shape \(2, 7, 24\), got \(5"
    ):
        patch(model, {"decoder.hidden": jnp.ones(5)})(TOKENS)
    with pytest.raises(ValueError, match="list of names"):
        trace(model, "decoder.hidden")
    with pytest.raises(ValueError, match="fast_attention or dot_product_attention"):
        traced(decoder(attention_fn=flash_attention), "*.pattern")


def test_names_of_transformer_lens():
    model = decoder()
    names = {
        "hook_embed": "embedding.embedded",
        "blocks.1.attn.hook_pattern": "decoder.layers.1.self_attention.pattern",
        "blocks.0.hook_resid_pre": "decoder.layers.0.residual_before",
        "blocks.1.mlp.hook_post": "decoder.layers.1.feed_forward.activations",
        "ln_final.hook_normalized": "decoder.hidden",
    }
    assert set(traced(model, *names).sites) == set(names.values())
    encoder = MODELS["encoder"]()
    assert list(traced(encoder, "blocks.0.attn.hook_z").sites) == [
        "encoder.layers.0.self_attention.head_outputs"
    ]


def test_views():
    model, both = decoder(), MODELS["seq2seq"]()
    states, maps = hidden_states(model, TOKENS), attention_maps(scan_layers(model), TOKENS)
    assert [x.shape for x in states] == [(2, 7, D)] * 3
    assert [x.shape for x in maps] == [(2, N, 7, 7)] * 2
    np.testing.assert_allclose(maps[1].sum(-1), 1, atol=1e-6)
    found = attention_maps(both, TOKENS, TOKENS[:, :5])
    assert [len(found[x]) for x in ("encoder", "decoder", "cross")] == [1, LAYERS, LAYERS]
    assert found["cross"][0].shape == (2, N, 5, 7)
    assert len(hidden_states(both, TOKENS, TOKENS)["decoder"]) == LAYERS + 1
    headless = eqx.tree_at(lambda model: model.output, model, None)
    assert len(hidden_states(headless, TOKENS)) == 3


def test_logit_lens():
    model = decoder(**LLAMA)
    lens = logit_lens(model, TOKENS)
    assert lens.shape == (LAYERS + 1, 2, 7, V)
    np.testing.assert_allclose(lens[-1], model.logits(TOKENS), atol=1e-5)


@pytest.mark.parametrize("options", [LLAMA, dict(norm=partial(LayerNorm, eps=1e-3))])
def test_heads_add_up_to_what_attention_adds(options):
    """Beside the other parts of the stream, each by the same direction, they are the logit."""
    model = decoder(**options)
    model = quantize(model, 8) if options is LLAMA else model
    targets = np.roll(np.asarray(TOKENS), 1, axis=1)
    heads = head_attribution(model, TOKENS, targets)
    assert heads.shape == (LAYERS, N, 2, 7)
    sites = traced(model).sites
    whole = np.take_along_axis(np.asarray(model.logits(TOKENS)), targets[..., None], -1)[..., 0]
    # The logit is linear in the stream where the scale of the norm stays: the rest of the stream
    # is what is left when the outputs of all heads are taken out of it after the fact.
    last = sites[f"decoder.layers.{LAYERS - 1}.residual_after"]
    attention = sum(
        sites[f"decoder.layers.{i}.self_attention.sublayer_output"] for i in range(LAYERS)
    )
    biases = sum(
        0 if layer.self_attention.bo is None else layer.self_attention.bo
        for layer in model.decoder.layers
    )
    rest = last - (attention - biases)
    norm, w = model.decoder.norm, model.output.w
    table = model.embedding.table.T if w is None else w
    table = table.dense() if hasattr(table, "dense") else table
    x = np.asarray(last, np.float64)
    scale = 1 / np.sqrt((x.var(-1) if isinstance(norm, LayerNorm) else (x**2).mean(-1)) + norm.eps)
    rest = rest - rest.mean(-1, keepdims=True) if isinstance(norm, LayerNorm) else rest
    y = rest * scale[..., None] * norm.gain + (0 if getattr(norm, "b", None) is None else norm.b)
    left = y @ table + (0 if model.output.b is None else model.output.b)
    left = np.take_along_axis(np.asarray(left * model.output.scale), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(heads.sum((0, 1)) + left, whole, atol=2e-5)


def test_ablating_heads(no_shape_checker):
    model = decoder()
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}

    def loss(model):
        return language_model_loss(model, batch)

    found = ablate_heads(model, loss)
    assert found.shape == (LAYERS, N)
    path = "decoder.layers.1.self_attention.head_outputs"
    one = patch(model, {path: lambda x: x.at[:, 2].set(0)})
    np.testing.assert_allclose(found[1, 2], loss(one) - loss(model), atol=1e-5)
    with pytest.raises(ValueError, match="for a TransformerLM, got TransformerEncoder"):
        ablate_heads(MODELS["encoder"](), loss)


def test_induction_scores_find_a_head_that_copies():
    """A pattern is put in whose head attends to what followed the same token."""
    model, length = decoder(), 6
    pattern = np.zeros((1, N, 12, 12), np.float32)
    pattern[:, :, :, 0] = 1
    for i in range(length):
        pattern[:, 3, length + i, 0] = 0
        pattern[:, 3, length + i, i + 1] = 1
    copying = patch(model, {"decoder.layers.1.self_attention.pattern": pattern})
    found = induction_scores(copying, length=length, rows=2, key=KEY)
    np.testing.assert_allclose(found[1], [0, 0, 0, 1])
    assert found[0].max() < 0.9


def test_patterns_that_end_with_a_star_reach_scores():
    found = traced(decoder(), "decoder*").sites
    assert "decoder.layers.1.self_attention.pattern" in found
    assert list(found) == [path for path in traced(decoder()).sites if path.startswith("decoder")]


def test_each_part_has_its_own_patches_alone():
    path = "decoder.layers.1.self_attention.head_outputs"
    model = decoder()
    patched = patch(model, {"embedding.embedded": jnp.zeros(D), path: KeptHeads(jnp.ones(N))})
    numbers = [sum(x.size for x in jax.tree.leaves(each)) for each in (model, patched)]
    assert numbers[1] - numbers[0] == D + N


def test_sites_of_no_part_are_refused():
    class Own(eqx.Module):
        def __call__(self, x):
            return site(x, "hidden")

    assert list(traced(Own()).sites) == ["hidden"]
    with pytest.raises(ValueError, match="a site is in a part of a model"):
        patch(Own(), {"hidden": 0})


def test_what_cannot_be_traced():
    model = decoder()
    with pytest.raises(ValueError, match="the loop of model.generate"):
        trace(model.generate, ["*.residual_after"])(TOKENS, 2)
    with pytest.raises(ValueError, match="inside of a transformation"):
        trace(jax.vmap(model))(TOKENS)
    with pytest.raises(ValueError, match="has no sites"):
        trace(lambda x: x + 1)(TOKENS)


def test_targets_beside_the_vocabulary_are_refused():
    for wrong in (-100, V):
        with pytest.raises(ValueError, match=f"targets must be ids from 0 to {V - 1}"):
            head_attribution(decoder(), TOKENS, TOKENS.at[0, 0].set(wrong))


def test_programs_inside_of_a_model_are_not_shared_with_its_patches():
    """A part that compiles itself has one program with the patch and one without."""

    class Compiled(eqx.Module):
        w: jax.Array

        @eqx.filter_jit
        def __call__(self, x):
            return site(jnp.tanh(x @ self.w), "activations") @ self.w.T

    model = eqx.tree_at(
        lambda model: [layer.feed_forward for layer in model.decoder.layers],
        decoder(),
        [Compiled(jax.random.normal(jax.random.key(i), (D, F))) for i in (1, 2)],
    )
    expected = jax.jit(lambda x: model.logits(x))(TOKENS)
    path = "decoder.layers.0.feed_forward.activations"
    patched = patch(model, {path: lambda x: x * 0})
    changed = jax.jit(lambda x: patched.logits(x))(TOKENS)
    assert abs(changed - expected).max() > 1e-2
    np.testing.assert_array_equal(jax.jit(lambda x: model.logits(x))(TOKENS), expected)
    again = jax.jit(lambda x: patch(model, {path: lambda x: x * 0}).logits(x))(TOKENS)
    np.testing.assert_array_equal(again, changed)
    with pytest.raises(ValueError, match="inside of a transformation, such as jax.jit"):
        traced(model, path)


def test_a_function_is_traced_as_it_is_now():
    models = [decoder(), patch(decoder(), {"decoder.hidden": 0.0})]
    found = [
        trace(function, ["decoder.hidden"])(TOKENS).sites["decoder.hidden"]
        for function in (lambda x: models[0](x), lambda x: models[1](x))
    ]
    assert abs(found[0]).max() > 0.1 and abs(found[1]).max() == 0

    def last(tokens):
        return models[-1](tokens)

    assert abs(trace(last, ["*.hidden"])(TOKENS).sites["decoder.hidden"]).max() == 0
    models.append(models[0])
    assert abs(trace(last, ["*.hidden"])(TOKENS).sites["decoder.hidden"]).max() > 0.1


def test_patched_models_keep_their_paths_and_are_no_checkpoints(tmp_path):
    model = patch(decoder(**LLAMA), {"output.logits": lambda x: -x, "*.0.residual_after": 0.0})
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)}
    assert "decoder.layers.1.self_attention.wq" in names
    with pytest.raises(ValueError, match="Save the model that was patched"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("value", [None, "text", 1j, lambda x: None])
def test_what_is_no_value(value):
    with pytest.raises(ValueError, match="place of decoder.hidden must be an array or a number"):
        patch(decoder(), {"decoder.hidden": value})(TOKENS)
