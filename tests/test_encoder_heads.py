"""What stands on an encoder: logits, pooled states, classes and embeddings."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    AttentionMask,
    Classifier,
    Dense,
    LayerNorm,
    OutputLayer,
    TransformerEmbedding,
    TransformerEncoder,
)
from jaxformers.heads import pool

VOCAB, D, N, LAYERS, F, MAX, CLASSES, TYPES = 17, 12, 3, 1, 20, 9, 5, 4
B, T = 3, 7
KEY = jax.random.key(0)
SIZES = (VOCAB, D, N, LAYERS, F, MAX)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
SEGMENTS = jax.random.randint(jax.random.key(2), (B, T), 0, TYPES)
LENGTHS = np.array([T, 4, 1])
RIGHT = jnp.asarray(np.arange(T) < LENGTHS[:, None])
LEFT = RIGHT[:, ::-1]
POOLINGS = ("first", "mean", "late", "pooler", "none")
tanh_dense = partial(Dense, activation=jnp.tanh)
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def classifier(pooling="first", transform=tanh_dense):
    return partial(Classifier, num_labels=CLASSES, pooling=pooling, transform=transform)


def encoder(pooling="first", dropout_rate=0.0, **options):
    """A BERT with every head, whose biases are no zeros."""
    model = TransformerEncoder(
        *SIZES,
        dropout_rate,
        norm_first=False,
        embedding=partial(TransformerEmbedding, norm=LayerNorm, num_token_types=TYPES),
        output=partial(OutputLayer, transform=partial(Dense, activation=jnp.tanh, norm=LayerNorm)),
        tie_embeddings=True,
        use_logits_bias=True,
        pooler=tanh_dense,
        classifier=classifier(pooling),
        key=KEY,
        **options,
    )
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), model)


HEADS = {
    "logits": lambda m, *x, **o: m.logits(*x, **o),
    "pooled": lambda m, *x, **o: m.pooled(*x, **o),
    "classify": lambda m, *x, **o: m.classify(*x, **o),
    "embed": lambda m, *x, **o: m.embed(*x, **o),
}


@eqx.filter_jit
def run_heads(model, tokens, **options):
    """What each head gives, with each pooling."""
    outputs = {"logits": model.logits(tokens, **options), "pooled": model.pooled(tokens, **options)}
    for pooling in POOLINGS:
        outputs[f"classify {pooling}"] = with_pooling(model, pooling).classify(tokens, **options)
    for pooling in ("mean", "first", "pooler"):
        outputs[f"embed {pooling}"] = model.embed(tokens, pooling=pooling, **options)
    return outputs


def with_pooling(model, pooling):
    """The same model with a classifier of the same weights that pools in another way."""
    [head] = (x for x in POOLED_CLASSIFIERS if x.pooling == pooling)
    arrays = jax.tree.leaves(model.classifier)
    head = jax.tree.unflatten(jax.tree.structure(head), arrays)
    return eqx.tree_at(lambda m: m.classifier, model, head)


POOLED_CLASSIFIERS = [classifier(pooling)(D, key=KEY) for pooling in POOLINGS]


def raises(*words):
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


# What they give.


def test_shapes_with_and_without_a_batch():
    model = encoder()
    batched, single = run_heads(model, TOKENS), run_heads(model, TOKENS[1])
    mapped = jax.vmap(partial(run_heads, model))(TOKENS)
    shapes = {"logits": (T, VOCAB), "classify none": (T, CLASSES)}
    for name, x in batched.items():
        assert x.shape == (B, *shapes.get(name, (CLASSES if "classify" in name else D,))), name
        np.testing.assert_allclose(single[name], x[1], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(mapped[name], x, atol=1e-5, err_msg=name)
    assert_close(model.embed(TOKENS), batched["embed mean"])
    assert_close(model.classify(TOKENS), batched["classify first"])


def test_logits_are_a_transform_and_the_token_table():
    model = encoder()
    head = model.output
    hidden = np.asarray(model(TOKENS))
    x = np.tanh(hidden @ head.transform.w + head.transform.b)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * head.transform.norm.gain + head.transform.norm.b
    table = model.embedding.token_embedding.weight
    assert_close(model.logits(TOKENS), x @ table.T + head.b)


def test_classifiers_pool_as_they_say():
    model = encoder()
    hidden, real = np.asarray(model(TOKENS, padding_mask=RIGHT)), np.asarray(RIGHT)[..., None]
    lengths = LENGTHS[:, None].astype(np.float32)
    means = (hidden * real).sum(1) / lengths
    pooled = np.tanh(hidden[:, 0] @ model.pooler.w + model.pooler.b)
    head = model.classifier

    def answers(x):
        x = np.tanh(x @ head.transform.w + head.transform.b) @ head.out.w + head.out.b
        return np.asarray(x)

    expected = {
        "first": answers(hidden[:, 0]),
        "mean": answers(means),
        "late": (answers(hidden) * real).sum(1) / lengths,
        "pooler": answers(pooled),
        "none": answers(hidden),
    }
    got = run_heads(model, TOKENS, padding_mask=RIGHT)
    for pooling in POOLINGS:
        assert_close(got[f"classify {pooling}"], expected[pooling], err_msg=pooling)
    assert_close(got["pooled"], pooled)
    for pooling, x in {"mean": means, "first": hidden[:, 0], "pooler": pooled}.items():
        assert_close(got[f"embed {pooling}"], x / np.linalg.norm(x, axis=-1, keepdims=True))
        assert_close(model.embed(TOKENS, RIGHT, pooling=pooling, normalize=False), x)


def test_padding_changes_nothing_on_either_side():
    model = encoder()
    right = run_heads(model, TOKENS, padding_mask=RIGHT, token_types=SEGMENTS)
    flipped = [
        jnp.stack([jnp.roll(row, T - n) for row, n in zip(x, LENGTHS, strict=True)])
        for x in (TOKENS, SEGMENTS)
    ]
    left = run_heads(model, flipped[0], padding_mask=LEFT, token_types=flipped[1])
    for i, n in enumerate(LENGTHS):
        alone = run_heads(model, TOKENS[i, :n], token_types=SEGMENTS[i, :n])
        for name, x in alone.items():
            kept = (slice(n), slice(T - n, T)) if x.ndim == 2 else (slice(None),) * 2
            np.testing.assert_allclose(right[name][i][kept[0]], x, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(left[name][i][kept[1]], x, atol=1e-5, err_msg=name)


def test_every_weight_has_a_gradient_even_beside_a_row_of_padding():
    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(model):
        outputs = run_heads(model, TOKENS, padding_mask=RIGHT.at[1].set(False))
        # Of different weight everywhere: the sum after a norm is always the same.
        return sum(
            (x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in outputs.values()
        )

    for path, grad in jax.tree_util.tree_leaves_with_path(gradients(encoder())):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert jnp.isfinite(grad).all(), name
        # A bias of the keys moves all scores of a query alike.
        assert jnp.any(grad != 0) or name.endswith("bk"), name


def test_token_types_are_added_and_default_to_the_first():
    model = encoder()
    plain = run_heads(model, TOKENS)
    first = run_heads(model, TOKENS, token_types=jnp.zeros_like(TOKENS))
    other = run_heads(model, TOKENS, token_types=SEGMENTS)
    for name, x in plain.items():
        np.testing.assert_allclose(first[name], x, atol=1e-6, err_msg=name)
        assert jnp.abs(other[name] - x).max() > 1e-3, name


def test_masks_and_dropout_reach_the_heads():
    model = encoder(dropout_rate=0.5)
    own = jnp.eye(T, dtype=bool)
    changed = TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % VOCAB)
    for name in ("logits", "pooled", "classify"):
        run = getattr(model, name)
        seen, unseen = (run(x) for x in (TOKENS, changed))
        assert not np.array_equal(seen[:, 0], unseen[:, 0])
        seen, unseen = (run(x, own) for x in (TOKENS, changed))
        np.testing.assert_array_equal(seen[:, 0], unseen[:, 0])
        first, again, other = (run(TOKENS, key=jax.random.key(i)) for i in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
        assert not np.array_equal(first, run(TOKENS))


def test_heads_of_a_half_precision_model():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), encoder())
    assert model.logits(TOKENS).dtype == jnp.float32
    for vectors in (model.embed(TOKENS), model.pooled(TOKENS), model.classify(TOKENS)):
        assert vectors.dtype == jnp.bfloat16
    lengths = jnp.linalg.norm(model.embed(TOKENS).astype(jnp.float32), axis=-1)
    np.testing.assert_allclose(lengths, 1.0, atol=0.01)


def test_the_first_token_is_the_one_with_the_lowest_position():
    hidden = jax.random.normal(KEY, (2, 4, D))
    positions = jnp.array([[-1, 5, 3, 4], [-1, -1, -1, -1]])
    first = pool(hidden, positions, "first")
    assert_close(first[0], hidden[0, 2])
    assert_close(pool(hidden, positions, "mean")[0], hidden[0, 1:].mean(0))
    np.testing.assert_array_equal(first[1], 0.0)
    # One row of positions serves all.
    assert_close(pool(hidden, jnp.arange(4), "first"), hidden[:, 0])
    model = encoder()
    mask = AttentionMask(q_positions=jnp.arange(T)[::-1])
    assert_close(model.pooled(TOKENS, mask), model.pooled(TOKENS[:, ::-1]))


@pytest.mark.parametrize("first", [0, 2])
def test_all_ways_of_pooling(first):
    """Against a loop, with padding anywhere, and first tokens that do not count."""
    hidden = jax.random.normal(KEY, (3, 5, D))
    positions = np.array([[0, 1, 2, 3, -1], [-1, 0, -1, 1, 2], [-1] * 5])
    ways = {
        "first": lambda x, n: x[0],
        "last": lambda x, n: x[-1],
        "mean": lambda x, n: x.mean(0),
        "mean_sqrt": lambda x, n: x.sum(0) / np.sqrt(len(x)),
        "weighted_mean": lambda x, n: (x * n[:, None]).sum(0) / n.sum(),
        "max": lambda x, n: x.max(0),
    }
    for name, way in ways.items():
        got = pool(hidden, jnp.asarray(positions), name, first)
        for row, at, vector in zip(np.asarray(hidden), positions, got, strict=True):
            counted = at >= first
            assert_close(
                vector, way(row[counted], at[counted] + 1) if counted.any() else 0 * row[0]
            )


# What they refuse.


@pytest.mark.usefixtures("no_shape_checker")
def test_a_head_that_is_not_there():
    model = TransformerEncoder(*SIZES, key=KEY)
    with raises("no output", "output="):
        model.logits(TOKENS)
    with raises("no pooler", "pooler="):
        model.pooled(TOKENS)
    with raises("no pooler", "pooler="):
        model.embed(TOKENS, pooling="pooler")
    with raises("no classifier", "classifier="):
        model.classify(TOKENS)
    with raises("token_types", "num_token_types"):
        model.embed(TOKENS, token_types=SEGMENTS)


@pytest.mark.usefixtures("no_shape_checker")
def test_options_that_contradict_each_other():
    for option in ("tie_embeddings", "use_logits_bias"):
        with raises(option, "output=OutputLayer"):
            TransformerEncoder(*SIZES, key=KEY, **{option: True})
    with raises("pooler", "pooler="):
        TransformerEncoder(*SIZES, classifier=classifier("pooler"), key=KEY)
    with raises("embedding_dim 6", "transform="):
        embedding = partial(TransformerEmbedding, embedding_dim=6)
        TransformerEncoder(*SIZES, embedding=embedding, output=OutputLayer, key=KEY)
    with raises("layer_order", "0 to 0"):
        TransformerEncoder(*SIZES, layer_order=[0, 1], key=KEY)


@pytest.mark.few(2)
@pytest.mark.usefixtures("no_shape_checker")
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_input_that_is_not_tokens(head):
    model = encoder()
    with raises("tokens must be ids from 0 to 16", "got 17"):
        head(model, TOKENS.at[0, 0].set(VOCAB))
    with raises("tokens must hold integer ids"):
        head(model, TOKENS.astype(jnp.float32))
    with raises("at most max_seq_length = 9", "got 10"):
        head(model, jnp.zeros((1, 10), jnp.int32))
    with raises("padding_mask must be boolean", "write padding_mask == 1"):
        head(model, TOKENS, padding_mask=RIGHT.astype(int))
    with raises("padding_mask", f"\\({B}, {T}\\)"):
        head(model, TOKENS, padding_mask=RIGHT[:, :3])
    with raises("token_types must be ids from 0 to 3", "got 4"):
        head(model, TOKENS, token_types=TOKENS * 0 + TYPES)
    with raises("token_types must have the tokens' shape", f"\\({B}, 3\\)"):
        head(model, TOKENS, token_types=SEGMENTS[:, :3])


@pytest.mark.usefixtures("no_shape_checker")
def test_options_out_of_range():
    model = encoder()
    with raises("pooling must be one of first, last, mean, .*, max, pooler", "'late'"):
        model.embed(TOKENS, pooling="late")
    with raises("normalize must be True or False"):
        model.embed(TOKENS, normalize=1)
    with raises("pooling must be one of first, mean, late, pooler, none", "'cls'"):
        Classifier(D, CLASSES, "cls", key=KEY)
    with raises("pooling must be one of first, last, mean", "'none'"):
        pool(jnp.ones((B, T, D)), jnp.arange(T), "none")
    with raises("num_labels must be an integer of at least 1", "0"):
        Classifier(D, 0, key=KEY)
    with raises("d_model must be an integer of at least 1"):
        Classifier(1.5, CLASSES, key=KEY)
    with raises("key must be a JAX PRNG key"):
        Classifier(D, CLASSES)
    with raises("to call"):
        Classifier(D, CLASSES, transform=lambda *sizes, key: 3, key=KEY)


def test_a_classifier_alone():
    head = Classifier(D, CLASSES, key=KEY)
    x = jax.random.normal(KEY, (B, T, D))
    for part in (x, x[0], x[0, 0]):
        assert_close(head(part), part @ head.out.w + head.out.b)
    assert_close(jax.vmap(head)(x), head(x))
