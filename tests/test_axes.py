"""The annotations of fields name the axes of every array, and the names have one rule."""

import functools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float

from jaxformers import (
    AllHeadsNorm,
    Classifier,
    Dense,
    GatedFeedForward,
    LayerNorm,
    MixtureOfExperts,
    OutputLayer,
    PerHeadNorm,
    RMSNorm,
    T5PositionBias,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    scan_layers,
)
from jaxformers.axes import Axes, axes_of, read_axes
from jaxformers.optim.layout import default_layout, leaf_path

# One size for each letter; some axes are written as a product.
SIZES = {
    **{"v": 31, "d": 12, "n": 6, "g": 2, "h": 4, "f": 17, "e": 5, "m": 10, "p": 23, "c": 7, "y": 9},
    **{"u": 13, "l": 3, "1": 1, "n*h": 24, "g*h": 8},
}
V, D, N, G, H, F, E, M, P, C, Y, U, L = (SIZES[x] for x in "vdnghfempcyul")
HEADS = {"num_kv_heads": G, "head_dim": H}
STACK = {**HEADS, "norm": RMSNorm}

MODELS = {
    "experts": partial(
        TransformerLM,
        *(V, D, N, L, F, P),
        **STACK,
        qk_norm=partial(PerHeadNorm, LayerNorm),
        feed_forward=partial(MixtureOfExperts, num_experts=E, top_k=2, shared_d_ff=F),
    ),
    "norm of all heads": partial(
        TransformerLM,
        *(V, D, N, L, F, P),
        **STACK,
        qk_norm=partial(AllHeadsNorm, RMSNorm),
        feed_forward=GatedFeedForward,
        tie_embeddings=True,
    ),
    "encoder-decoder": partial(
        Transformer,
        *(V, V, D, N, L, L, F, P),
        **HEADS,
        qk_norm=RMSNorm,
        position=lambda key: T5PositionBias(N, U, key=key),
        share_embeddings=True,
    ),
    "encoder": partial(
        TransformerEncoder,
        *(V, D, N, L, F, P),
        **HEADS,
        learnable_pos=True,
        embedding=partial(TransformerEmbedding, embedding_dim=M, num_token_types=Y, norm=LayerNorm),
        pooler=partial(Dense, activation=jnp.tanh, norm=LayerNorm),
        classifier=partial(Classifier, num_labels=C, transform=Dense),
        output=partial(OutputLayer, transform=partial(Dense, norm=LayerNorm)),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def shapes_of(name, change=lambda model: model):
    """The model with shapes in place of arrays, which costs no compilation."""
    return eqx.filter_eval_shape(lambda key: change(MODELS[name](key=key)), jax.random.key(0))


def is_shape(x):
    return isinstance(x, jax.ShapeDtypeStruct)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@each_model
def test_every_axis_has_a_name_and_every_name_one_size(name):
    model = shapes_of(name)
    shapes, axes = by_path(eqx.filter(model, is_shape)), by_path(axes_of(model))
    assert shapes.keys() == axes.keys() and len(shapes) > 20
    # Without an embedding of another width, m is d.
    sizes = SIZES if name == "encoder" else SIZES | {"m": D}
    for path, x in shapes.items():
        assert x.shape == tuple(sizes[letter] for letter in axes[path].names), path


@each_model
def test_scanned_layers_are_apart(name):
    axes = by_path(axes_of(shapes_of(name)))
    scanned = by_path(axes_of(shapes_of(name, scan_layers)))
    stacked = {path: x for path, x in scanned.items() if ".stacked." in path}
    assert len(stacked) > 10
    for path, x in stacked.items():
        one = axes[path.replace(".stacked.", ".0.")]
        assert x == Axes(("l", *one.names), ("apart", *one.roles)), path
    rest = scanned.keys() - stacked.keys()
    assert rest and all(scanned[path] == axes[path] for path in rest)


MEANINGS = {
    "experts": {
        "decoder.layers.0.self_attention.wq": ("", "d", "n h"),
        "decoder.layers.0.self_attention.wk": ("", "d", "g h"),
        "decoder.layers.0.self_attention.wo": ("", "n h", "d"),
        "decoder.layers.0.self_attention.bq": ("", "", "n h"),
        "decoder.layers.0.self_attention.bo": ("", "", "d"),
        "decoder.layers.0.self_attention.q_norm.norm.gain": ("", "", "n h"),
        "decoder.layers.0.self_attention.k_norm.norm.b": ("", "", "g h"),
        "decoder.layers.0.feed_forward.router": ("", "d", "e"),
        "decoder.layers.0.feed_forward.w_gate": ("e", "d", "f"),
        "decoder.layers.0.feed_forward.w_down": ("e", "f", "d"),
        "decoder.layers.0.feed_forward.w_shared_gate": ("", "d", "1"),
        "decoder.norm.gain": ("", "", "d"),
        "embedding.token_embedding.weight": ("", "v", "m"),
        "output.w": ("", "m", "v"),
        "output.b": ("", "", "v"),
    },
    "norm of all heads": {
        "decoder.layers.1.self_attention.k_norm.norm.gain": ("", "", "g*h"),
        "decoder.layers.1.feed_forward.w_up": ("", "d", "f"),
        "decoder.layers.1.feed_forward.b_gate": ("", "", "f"),
    },
    "encoder-decoder": {
        "encoder.score_bias.weight": ("", "u", "n"),
        "encoder.layers.0.self_attention.q_norm.gain": ("", "", "h"),
    },
    "encoder": {
        "embedding.position.weight": ("", "p", "m"),
        "embedding.type_embedding.weight": ("", "y", "m"),
        "embedding.norm.b": ("", "", "m"),
        "embedding.projection.w": ("", "m", "d"),
        "output.transform.w": ("", "d", "m"),
        "output.transform.norm.gain": ("", "", "m"),
        "classifier.out.w": ("", "d", "c"),
        "classifier.out.b": ("", "", "c"),
    },
}


def meaning(axes):
    groups = axes.apart, axes.inputs, axes.outputs
    return tuple(" ".join(axes.names[i] for i in group) for group in groups)


@pytest.mark.parametrize("name", MEANINGS)
def test_inputs_and_outputs(name):
    axes = by_path(axes_of(shapes_of(name)))
    found = {path: meaning(axes[path]) for path in MEANINGS[name]}
    assert found == MEANINGS[name]


class Mixer(eqx.Module):
    """A module of a user, with letters of its own."""

    across: Float[Array, "time hidden"]
    banks: list[Float[Array, "bank time hidden"]]
    swapped: Float[Array, "o i"] | None
    b_across: Float[Array, "time hidden"]
    gate: Float[Array, " hidden"]
    anything: Float[Array, "..."]
    raw: jax.Array
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    table: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.across = self.b_across = self.anything = self.raw = jnp.ones((3, 4))
        self.banks, self.swapped, self.gate = [jnp.ones((2, 3, 4))], jnp.ones((4, 3)), jnp.ones(4)
        self.linear, self.conv = eqx.nn.Linear(3, 4, key=key), eqx.nn.Conv2d(2, 4, 3, key=key)
        self.table, self.norm = eqx.nn.Embedding(5, 4, key=key), eqx.nn.LayerNorm(4)


MIXER = {
    "across": ("", "time", "hidden"),
    "banks.0": ("bank", "time", "hidden"),
    "swapped": ("", "i", "o"),
    "b_across": ("", "", "time hidden"),
    "gate": ("", "", "hidden"),
    "anything": ("", "_", "_"),
    "raw": ("", "_", "_"),
    "linear.weight": ("", "i", "o"),
    "linear.bias": ("", "", "o"),
    "conv.weight": ("", "i _ _", "o"),
    "conv.bias": ("", "", "o _ _"),
    "table.weight": ("", "v", "d"),
    "norm.weight": ("", "", "d"),
    "norm.bias": ("", "", "d"),
}


def test_modules_of_users_and_of_equinox():
    key = jax.random.key(0)
    one = eqx.filter_eval_shape(Mixer, key)
    assert {path: meaning(x) for path, x in by_path(axes_of(one)).items()} == MIXER
    stack = eqx.filter_eval_shape(eqx.filter_vmap(Mixer), jax.random.split(key, 6))
    for path, x in by_path(axes_of(stack)).items():
        apart, *rest = MIXER[path]
        assert meaning(x) == (f"_ {apart}".strip(), *rest), path
        assert x.names[0] == "_"
    (pair,) = [x for x in jax.tree_util.tree_leaves_with_path(one) if "conv" in str(x)][:1]
    assert default_layout(leaf_path(one, pair[0]), pair[1]).sizes(pair[1].shape) == (1, 4, 18)


class Sum(eqx.Module):
    """A weight that is a sum of an array and of a product, and says what its axes are."""

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: jax.Array

    def field_axes(self, axes):
        a, b = axes.factors()
        return {"base": axes, "a": a, "b": b, "scale": Axes()}


def with_sums(model):
    axes_at_path = by_path(axes_of(model))

    def change(path, x):
        axes = axes_at_path[jax.tree_util.keystr(path, simple=True, separator=".")]
        a, b = axes.factors()
        sizes = dict(zip(axes.names, x.shape, strict=True)) | {"r": 2}
        arrays = (jnp.ones([sizes[name] for name in y.names]) for y in (a, b))
        return Sum(x, *arrays, jnp.ones(())) if axes.inputs else x

    return jax.tree_util.tree_map_with_path(change, model)


def test_a_weight_may_be_an_object():
    before = by_path(axes_of(shapes_of("experts")))
    axes = by_path(axes_of(shapes_of("experts", with_sums)))
    assert all(axes[f"{path}.base"] == x for path, x in before.items() if x.inputs)
    attention, experts = "decoder.layers.0.self_attention", "decoder.layers.0.feed_forward"
    assert meaning(axes[f"{attention}.wo.a"]) == ("", "n h", "r")
    assert meaning(axes[f"{attention}.wo.b"]) == ("", "r", "d")
    assert meaning(axes[f"{experts}.w_up.a"]) == ("e", "d", "r")
    assert meaning(axes[f"{experts}.w_up.b"]) == ("e", "r", "f")
    assert axes["output.w.scale"] == Axes()
    scanned = by_path(axes_of(eqx.filter_eval_shape(scan_layers, shapes_of("experts", with_sums))))
    layers = "decoder.layers.stacked"
    assert meaning(scanned[f"{layers}.self_attention.wq.b"]) == ("l", "r", "n h")
    assert meaning(scanned[f"{layers}.feed_forward.w_down.a"]) == ("l e", "f", "r")
    assert meaning(scanned[f"{layers}.feed_forward.router.scale"]) == ("l", "", "")


@pytest.mark.parametrize(
    "names, field, found",
    [
        ("d f", "w", ("", "d", "f")),
        ("e d f", "w", ("e", "d", "f")),
        ("n h d", "w", ("", "n h", "d")),
        ("e d g h", "w", ("e", "d", "g h")),
        ("n h", "w", ("", "n", "h")),
        ("n h", "bq", ("", "", "n h")),
        ("e f", "b_in", ("e", "", "f")),
        ("e", "b", ("", "", "e")),
        ("l o i k", "w", ("l", "i k", "o")),
        ("a b c", "wq", ("", "a", "b c")),
        ("a b c", "wo", ("", "a b", "c")),
        ("a b c", "w", ("a", "b", "c")),
        ("d", "w", ("", "", "d")),
        ("", "w", ("", "", "")),
        ("", "scale", ("", "", "")),
    ],
)
def test_the_rule(names, field, found):
    assert meaning(read_axes(tuple(names.split()), field)) == found
