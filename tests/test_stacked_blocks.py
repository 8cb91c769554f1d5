"""Blocks of one's own, stacked by `eqx.filter_vmap`, are optimized as single ones are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from jaxformers import (
    Adafactor,
    AdamW,
    GatedFeedForward,
    Groups,
    LayerNorm,
    Lion,
    MultiHeadAttention,
    Muon,
    default_decay_mask,
)
from jaxformers.optim import OrthogonalMomentum, default_layout, is_hidden_matrix

L, D, F = 3, 6, 10


class OwnNorm(eqx.Module):
    """A norm that says nothing of its axes but by the name of its class."""

    w: jax.Array


class Unit(eqx.Module):
    """A vector that only its annotation tells."""

    coefficients: Float[Array, " d"]
    mixing: Float[Array, "d d"] | None


def draw(key, *shape):
    return jax.random.normal(key, shape) + 1.0


class Block(eqx.Module):
    pre: eqx.nn.LayerNorm
    post: eqx.nn.RMSNorm
    third: OwnNorm
    group: eqx.nn.GroupNorm
    image: eqx.nn.LayerNorm
    unit: Unit
    layer_scale: jax.Array
    ln_1: dict
    up: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell
    attention: MultiHeadAttention
    feed_forward: GatedFeedForward
    norm: LayerNorm
    table: eqx.nn.Embedding
    raw: jax.Array

    def __init__(self, key):
        keys = iter(jax.random.split(key, 20))
        self.pre, self.post = eqx.nn.LayerNorm(D), eqx.nn.RMSNorm(D)
        self.third, self.group = OwnNorm(draw(next(keys), D)), eqx.nn.GroupNorm(2, D)
        self.image = eqx.nn.LayerNorm((2, 4))
        self.unit = Unit(draw(next(keys), D), draw(next(keys), D, D))
        self.layer_scale, self.ln_1 = draw(next(keys), D), {"weight": draw(next(keys), D)}
        self.up = eqx.nn.Linear(D, F, key=next(keys))
        self.conv = eqx.nn.Conv1d(2, 4, 3, key=next(keys))
        self.cell = eqx.nn.GRUCell(D, 4, key=next(keys))
        self.attention = MultiHeadAttention(D, 2, key=next(keys))
        self.feed_forward = GatedFeedForward(D, F, key=next(keys))
        self.norm = LayerNorm(D)
        self.table = eqx.nn.Embedding(5, D, key=next(keys))
        self.raw = draw(next(keys), D, F)


MATRICES = {
    *("up.weight", "conv.weight", "cell.weight_ih", "cell.weight_hh", "unit.mixing", "raw"),
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}" for name in ("w_gate", "w_up", "w_down")),
    "table.weight",
}


@eqx.filter_jit
def build():
    keys = jax.random.split(jax.random.key(0), L)
    return [Block(key) for key in keys], eqx.filter_vmap(Block)(keys)


def paths_where(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, x in leaves if x}


def stacked(blocks):
    arrays = [eqx.filter(block, eqx.is_inexact_array) for block in blocks]
    return jax.tree.map(lambda *x: jnp.stack(x), *arrays)


def test_matrices_decay_and_vectors_do_not():
    blocks, stack = build()
    twice = jax.tree.map(lambda x: x[None] if eqx.is_array(x) else x, stack)
    for tree in (blocks[0], stack, twice, eqx.filter(stack, eqx.is_inexact_array)):
        assert paths_where(default_decay_mask(tree)) == MATRICES
        # As for an optimizer that has some of the leaves.
        part = eqx.tree_at(lambda b: (b.up, b.raw), tree, (None, None), is_leaf=lambda x: x is None)
        mask = default_decay_mask(part)
        assert paths_where(mask) == MATRICES - {"up.weight", "raw"}


def is_hidden(path, array):
    return is_hidden_matrix(path, array) and "conv" not in path


OPTIMIZERS = {
    "adamw": AdamW(0.1, weight_decay=0.3),
    "lion": Lion(0.1, weight_decay=0.3),
    "adafactor": Adafactor(0.1, weight_decay=0.3),
    "muon": Muon(0.1, weight_decay=0.3),
    "groups": Groups([(is_hidden, OrthogonalMomentum(0.1))], rest=Adafactor(0.1, weight_decay=0.2)),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_blocks_are_updated_as_single_ones(name):
    optimizer, (blocks, stack) = OPTIMIZERS[name], build()
    states = [optimizer.init(block) for block in blocks]
    state = optimizer.init(stack)
    for step in (1, 2):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape), jnp.float32), stacked(blocks)
        )
        stack, state = optimizer.update(grads, state, stack)
        for i in range(L):
            own = jax.tree.map(lambda g, i=i: g[i], grads)
            blocks[i], states[i] = optimizer.update(own, states[i], blocks[i])
    # Adafactor has one root mean square for a bias, be it of one layer or of a stack.
    elsewhere = name in ("adafactor", "groups")
    for path, x in jax.tree_util.tree_leaves_with_path(stacked(blocks)):
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        if elsewhere and text.split(".")[-1].startswith(("b", "gain")):
            continue
        found = stack
        for key in path:
            found = found[key.key] if hasattr(key, "key") else getattr(found, key.name)
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-5, err_msg=text)


def test_matrices_of_muon_and_factors_of_adafactor():
    _, stack = build()
    matrices, _ = Muon(0.1).init(stack)
    paths = paths_where(jax.tree.map(lambda x: True, matrices))
    hidden = {path.removeprefix("moments.").removesuffix(".momentum") for path in paths}
    assert hidden - {"step"} == MATRICES
    moments = Adafactor(0.1).init(stack).moments
    assert {k: x.shape for k, x in moments.pre.weight.items()} == {"squares": (L, 1, D)}
    assert {k: x.shape for k, x in moments.third.w.items()} == {"squares": (L, 1, D)}
    assert {k: x.shape for k, x in moments.up.weight.items()} == {"rows": (L, F), "columns": (L, D)}


@pytest.mark.parametrize(
    "path, shape, inputs",
    [
        ("blocks.norm1.weight", (L, D), 0),
        ("blocks.input_layernorm.scale", (L, D), 0),
        ("h.ln_2.weight", (L, D), 0),
        ("h.ln_f_scale", (L, D), 0),
        ("h.attn_norm", (L, D), 0),
        ("h.layer_scale1", (L, D), 0),
        ("h.mlp.norm_proj", (D, F), 1),
        ("h.norm.linear.weight", (D, F), 1),
        ("h.normalizer.w", (D, F), 1),
        ("w", (D, F), 1),
        ("w", (D,), 0),
        ("", (D, F), 1),
    ],
)
def test_names_tell_where_modules_do_not(path, shape, inputs):
    assert default_layout(path, np.zeros(shape)).inputs == inputs
