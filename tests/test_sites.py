"""Sites: every named value of a model is in its program, at the path of the part that makes it."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from programs import site_paths

from jaxformers import (
    GatedFeedForward,
    MixtureOfExperts,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    dot_product_attention,
    rematerialize,
    scan_layers,
)
from jaxformers.sites import SITES, site

VOCAB, D, N, G, F, MAX = 13, 12, 2, 1, 10, 8
KEY = jax.random.key(0)
TOKENS = jnp.zeros((3, 5), jnp.int32)
LAYERS = 2
OPTIONS = dict(attention_fn=dot_product_attention, key=KEY)
mixture = partial(MixtureOfExperts, num_experts=3, top_k=2, shared_d_ff=4)
MODELS = {
    "language model": partial(
        TransformerLM,
        *(VOCAB, D, N, LAYERS, F, MAX),
        num_kv_heads=G,
        norm=RMSNorm,
        position=RotaryPositionalEncoding(),
        feed_forward=GatedFeedForward,
        tie_embeddings=True,
        **OPTIONS,
    ),
    "experts": partial(
        TransformerLM, *(VOCAB, D, N, LAYERS, F, MAX), feed_forward=mixture, **OPTIONS
    ),
    "seq2seq": partial(Transformer, VOCAB, VOCAB, D, N, LAYERS, LAYERS, F, MAX, **OPTIONS),
    "encoder": partial(
        TransformerEncoder, VOCAB, D, N, LAYERS, F, MAX, norm_first=False, **OPTIONS
    ),
}
ATTENTION = ("queries", "keys", "values", "scores", "pattern", "head_outputs")
SUBLAYER = ("sublayer_output",)


def layers(stack, scanned, cross=False, experts=False):
    """The paths in the layers of a stack."""
    found = []
    for i in range(LAYERS):
        at = f"{stack}.layers" + ("" if scanned else f".{i}")
        found += [f"{at}.residual_before", f"{at}.residual_between", f"{at}.residual_after"]
        found += [f"{at}.residual_between_2"] if cross else []
        sublayers = ["self_attention", *(["cross_attention"] if cross else [])]
        found += [f"{at}.{part}.{name}" for part in sublayers for name in ATTENTION + SUBLAYER]
        found += [f"{at}.feed_forward.{name}" for name in ("activations", *SUBLAYER)]
        found += [f"{at}.feed_forward.shared_expert.activations"] if experts else []
        if scanned:
            break
    return [*found, f"{stack}.hidden"]


def expected(name, scanned):
    if name == "seq2seq":
        paths = ["src_embedding.embedded", "tgt_embedding.embedded", "output.logits"]
        return [*paths, *layers("encoder", scanned), *layers("decoder", scanned, cross=True)]
    if name == "encoder":
        return ["embedding.embedded", *layers("encoder", scanned)]
    paths = ["embedding.embedded", "output.logits"]
    return [*paths, *layers("decoder", scanned, experts=name == "experts")]


def run(model):
    return model(TOKENS, TOKENS) if isinstance(model, Transformer) else model(TOKENS)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_has_its_path(name, scanned):
    model = eqx.filter_eval_shape(MODELS[name])
    change = scan_layers if scanned else lambda model: model
    for further in (lambda model: model, rematerialize):
        program = eqx.filter_make_jaxpr(lambda m, f=further: run(f(change(m))))(model)[0]
        assert sorted(site_paths(program)) == sorted(expected(name, scanned))


def test_every_name_is_reached():
    names = {path.rpartition(".")[2] for name in MODELS for path in expected(name, False)}
    assert names == set(SITES)


def test_unknown_names_are_refused_when_traced():
    with pytest.raises(ValueError, match="a site must be one of queries.*got 'query'"):
        jax.make_jaxpr(lambda x: site(x, "query"))(jnp.ones(3))


def test_sites_and_scopes_add_no_operation():
    def program(name):
        f = name(lambda x: jnp.sin(x) * 2)
        lowered = jax.jit(f).lower(jnp.ones(3))
        return lowered.as_text().replace(name.__name__, "f")

    def plain(f):
        return f

    def named(f):
        def inside(x):
            with jax.named_scope("layers"):
                return site(f(site(x, "residual_before")), "residual_after")

        return inside

    count = lambda text: text.count(" = ")  # noqa: E731
    assert count(program(named)) == count(program(plain))
