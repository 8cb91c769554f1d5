"""The compiled training step, and the optimizer on a real model against optax and torch."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import largest_array, trace

from jaxformers import (
    AdamW,
    ALiBi,
    GatedFeedForward,
    OutputLayer,
    RMSNorm,
    RotaryPositionalEncoding,
    Transformer,
    TransformerEncoder,
    TransformerLM,
    as_optimizer,
    chunks,
    cross_entropy,
    language_model_loss,
    masked_language_model_loss,
    sequence_to_sequence_loss,
    train_step,
    warmup_cosine,
)
from jaxformers.training import count_targets
from jaxformers.training.step import Gradients, _train_step

VOCAB, T, B, STEPS = 17, 9, 5, 50
SCHEDULE = warmup_cosine(3e-3, 5, STEPS, 1e-4)


# Each side trains its own copy on its own gradients. Attention's key biases are left out: their
# gradient is zero but for rounding, and Adam makes a step of full size from any rounding.


def language_model(key, **options):
    return TransformerLM(VOCAB, 12, 3, 2, 20, T, 0.0, key=key, **options)


def text_batch(seed=0):
    text = np.random.default_rng(seed).integers(0, VOCAB, (B, T + 1))
    return {"tokens": jnp.asarray(text[:, :-1]), "targets": jnp.asarray(text[:, 1:])}


@eqx.filter_jit
def gradients(model, batch):
    return eqx.filter_grad(language_model_loss)(model, batch, None)


def assert_same_weights(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_adamw_trains_a_model_as_optax_does(getkey, clip):
    optax = pytest.importorskip("optax")
    numbers = {"b1": 0.85, "b2": 0.97, "eps": 1e-6, "weight_decay": 0.2}
    ours = theirs = language_model(getkey(), position=ALiBi(), norm=RMSNorm, use_bias=False)
    mask = jax.tree.map(lambda x: x.ndim > 1, eqx.filter(ours, eqx.is_array))
    optimizer = AdamW(SCHEDULE, **numbers, max_grad_norm=clip, decay_mask=lambda _: mask)
    chain = [] if clip is None else [optax.clip_by_global_norm(clip)]
    reference = optax.chain(*chain, optax.adamw(SCHEDULE, **numbers, mask=mask))
    state, their_state = optimizer.init(ours), reference.init(eqx.filter(theirs, eqx.is_array))
    start = ours
    for step in range(STEPS):
        batch = text_batch(step)
        ours, state = optimizer.update(gradients(ours, batch), state, ours)
        grads = gradients(theirs, batch)
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            updates, their_state = reference.update(
                grads, their_state, eqx.filter(theirs, eqx.is_array)
            )
        theirs = eqx.apply_updates(theirs, updates)
    assert_same_weights(ours, theirs)
    assert np.abs(ours.output.w - start.output.w).max() > 0.01


@pytest.mark.parametrize("clip", [None, 0.05])
def test_adamw_trains_a_model_as_torch_does(getkey, clip):
    torch = pytest.importorskip("torch")
    numbers = {"eps": 1e-7, "weight_decay": 0.3}
    ours = language_model(
        getkey(), feed_forward=GatedFeedForward, tie_embeddings=True, use_bias=False
    )
    leaves, structure = jax.tree.flatten(ours)
    weights = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in leaves]
    reference = torch.optim.AdamW(weights, lr=1.0, betas=(0.8, 0.95), **numbers)
    optimizer = AdamW(
        SCHEDULE,
        b1=0.8,
        b2=0.95,
        **numbers,
        max_grad_norm=clip,
        decay_mask=lambda model: jax.tree.map(lambda _: True, model),
    )
    state = optimizer.init(ours)
    for step in range(STEPS):
        batch = text_batch(step)
        ours, state = optimizer.update(gradients(ours, batch), state, ours)
        theirs = structure.unflatten([jnp.asarray(w.detach().numpy()) for w in weights])
        for weight, grad in zip(weights, jax.tree.leaves(gradients(theirs, batch)), strict=True):
            weight.grad = torch.tensor(np.array(grad))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(weights, clip)
        reference.param_groups[0]["lr"] = float(SCHEDULE(step))
        reference.step()
    assert_same_weights(ours, [w.detach().numpy() for w in weights])


def test_a_step_is_gradient_then_update(getkey):
    model, batch = language_model(getkey(), use_bias=False), text_batch()
    optimizer = AdamW(1e-2)
    state = optimizer.init(model)
    expected, _ = optimizer.update(gradients(model, batch), state, model)
    loss = cross_entropy(model.logits(batch["tokens"]), batch["targets"])
    trained, state, value = train_step(
        model, state, batch, optimizer=optimizer, loss=language_model_loss, key=getkey()
    )
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    assert_same_weights(trained, expected)
    assert state.step == 1


def test_a_step_donates_the_model_and_the_state_but_not_the_batch(getkey):
    model, batch, optimizer = language_model(getkey()), text_batch(), AdamW(1e-2)
    state = optimizer.init(model)
    old = jax.tree.leaves((model, state))
    train_step(model, state, batch, optimizer=optimizer, loss=language_model_loss, key=getkey())
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in batch.values())


@pytest.mark.parametrize("compute_dtype", [None, jnp.dtype(jnp.bfloat16)])
def test_the_memory_of_every_array_is_used_again(getkey, compute_dtype):
    """The program writes each array of the result over one of the model and the state."""
    model, optimizer = language_model(getkey(), tie_embeddings=True), AdamW(1e-2)
    state = optimizer.init(model)
    gradients = Gradients(language_model_loss, compute_dtype, 1, count_targets)
    kept = gradients, optimizer, text_batch(), getkey(), None, (None, None)
    program = _train_step.lower(kept, model, state).compile().compiled.as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", program)
    inputs = re.findall(r"\((\d+), \{\}, \S+-alias\)", aliases[1])
    assert len(set(inputs)) == len(inputs) == len(jax.tree.leaves((model, state)))


def test_a_loss_that_can_be_learned_falls_and_the_step_compiles_once(getkey):
    model, batch, optimizer = language_model(getkey()), text_batch(), AdamW(1e-2)
    state, losses = optimizer.init(model), []
    for step in range(60):
        model, state, loss = train_step(
            model, state, batch, optimizer=optimizer, loss=language_model_loss, key=getkey()
        )
        losses.append(float(loss))
        if step == 0:
            compiled = _train_step._cached._cache_size()
    assert _train_step._cached._cache_size() == compiled
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_with_unequal_counts_are_as_the_whole_batch(getkey, parts):
    """Rows have from no to all targets that count, so a mean of means would be another one."""
    rng = np.random.default_rng(parts)
    text = rng.integers(0, VOCAB, (6, T + 1))
    counted = np.arange(T) < rng.permutation([0, 0, 1, 4, T, T])[:, None]
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "loss_mask": counted}
    batch = jax.device_put(batch)
    loss = partial(language_model_loss, label_smoothing=0.1, z_loss=1e-3)
    model, optimizer = language_model(getkey(), tie_embeddings=True), AdamW(1.0)
    value, grads = Gradients(loss, None, 1, count_targets)(optimizer, model, batch, getkey())
    split = Gradients(loss, None, parts, count_targets)
    value_of_parts, grads_of_parts = eqx.filter_jit(split)(optimizer, model, batch, getkey())
    np.testing.assert_allclose(value_of_parts, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads_of_parts), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_parts_of_a_batch_in_which_nothing_counts(getkey):
    """Even for a loss that divides by their number."""

    def loss(model, batch, key):
        mean = language_model_loss(model, batch, key)
        return mean / (batch["loss_mask"].sum().astype(jnp.float32) > 0).astype(jnp.float32)

    batch = text_batch() | {"loss_mask": jnp.zeros((B, T), jnp.bool_)}
    split = Gradients(loss, None, B, count_targets)
    value, grads = split(AdamW(1.0), language_model(getkey()), batch, getkey())
    assert value == 0 and not any(jnp.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "batch",
    [
        text_batch(),
        {"tokens": np.ones(4, int), "targets": np.ones(4, int)},
        {"tokens": np.ones(())},
    ],
)
def test_rows_that_cannot_be_divided_are_refused(getkey, batch):
    with pytest.raises(ValueError, match="accumulate=4 needs"):
        train_step(
            language_model(getkey()),
            None,
            batch,
            optimizer=AdamW(1.0),
            loss=language_model_loss,
            key=getkey(),
            accumulate=4,
        )


def test_packed_documents_are_as_separate_ones(getkey):
    """Each by itself, weighted by its length; 2 of the places are padding."""
    model = language_model(getkey(), position=RotaryPositionalEncoding())
    text, lengths = np.random.default_rng(8).integers(0, VOCAB, (2, 12)), [[4, 3, 5], [6, 4]]
    batch = {
        "tokens": text,
        "targets": (text * 5 + 2) % VOCAB,
        "positions": np.array([[*range(4), *range(3), *range(5)], [*range(6), *range(4), -1, -1]]),
        "segment_ids": np.array([[0] * 4 + [1] * 3 + [2] * 5, [0] * 6 + [1] * 4 + [-1] * 2]),
    }
    batch, apart, begin = jax.device_put(batch), [], [0, 0]
    for row, row_lengths in enumerate(lengths):
        for length in row_lengths:
            part = np.s_[row : row + 1, begin[row] : begin[row] + length]
            own = {name: batch[name][part] for name in ("tokens", "targets")}
            apart.append((float(language_model_loss(model, own)), length))
            begin[row] += length
    expected = np.average(*np.transpose(apart)[:1], weights=np.transpose(apart)[1])
    np.testing.assert_allclose(language_model_loss(model, batch), expected, rtol=1e-5)
    assert count_targets(batch) == 22


def test_a_masked_language_model_is_scored_where_it_was_masked(getkey):
    model = TransformerEncoder(
        VOCAB, 12, 3, 1, 20, T, 0.0, output=OutputLayer, tie_embeddings=True, key=getkey()
    )
    text, hidden = text_batch()["targets"], np.random.default_rng(3).random((B, T)) < 0.3
    padding, hidden = jnp.arange(T) < jnp.array([T, 3, 5, T, 4])[:, None], jnp.asarray(hidden)
    batch = {"tokens": jnp.where(hidden, 0, text), "targets": text, "loss_mask": hidden & padding}
    batch["padding_mask"] = padding
    logits = model.logits(batch["tokens"], padding_mask=padding)
    loss = masked_language_model_loss(model, batch)
    expected = cross_entropy(logits, text, hidden & padding)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert count_targets(batch) == (hidden & padding).sum()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"tokens": np.ones((2, 3), int)}, "must have tokens, targets, got tokens"),
        ({}, "got nothing"),
        ([1, 2], "must be a dict of arrays, got list"),
        (text_batch() | {"position": 1}, "Did you mean 'positions'"),
        (text_batch() | {"positions": np.zeros((B, T), int)}, "both positions and segment_ids"),
    ],
)
def test_batches_that_lack_something(getkey, no_shape_checker, batch, words):
    with pytest.raises(ValueError, match=words):
        language_model_loss(language_model(getkey()), batch)


def test_padding_does_not_count(getkey):
    """Neither in the loss of a language model nor in that of an encoder-decoder."""
    batch = text_batch()
    real = np.arange(T) < np.arange(T - B + 1, T + 1)[:, None]
    model = language_model(getkey())
    losses = [
        language_model_loss(model, {k: jnp.where(real, x, junk) for k, x in batch.items()} | pad)
        for junk in (0, 5)
        for pad in [{"padding_mask": jnp.asarray(real)}]
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)

    seq2seq = Transformer(VOCAB, VOCAB, 12, 3, 1, 1, 20, T, key=getkey())
    masks = {"src_padding_mask": jnp.asarray(real), "tgt_padding_mask": jnp.asarray(real[::-1])}
    losses = []
    for junk in (0, 5):
        src = jnp.where(real, batch["tokens"], junk)
        tgt, targets = (jnp.where(real[::-1], batch[k], junk) for k in ("tokens", "targets"))
        arrays = {"src": src, "tgt": tgt, "targets": targets}
        losses.append(sequence_to_sequence_loss(seq2seq, arrays | masks))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_many_logits_are_never_there_at_once(getkey, monkeypatch):
    """In the gradient neither, and with the same result."""
    rows, vocab, batch = B * T, 97, text_batch()
    decoder = TransformerLM(vocab, 12, 3, 1, 20, T, 0.0, tie_embeddings=True, key=getkey())
    encoder_decoder = Transformer(vocab, vocab, 12, 3, 1, 1, 20, T, 0.0, key=getkey())
    pairs = batch | {"src": batch["tokens"][:, :5], "tgt": batch["tokens"]}
    del pairs["tokens"]
    for loss, *arguments in [
        (language_model_loss, decoder, batch),
        (sequence_to_sequence_loss, encoder_decoder, pairs),
    ]:
        step = eqx.filter_value_and_grad(loss)
        assert largest_array(trace(step, *arguments)) == rows * vocab
        expected = eqx.filter_jit(step)(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_LOGITS", {"cpu": 7 * vocab})
            patch.setattr(chunks, "CHUNK_ROWS", 1)
            step = eqx.filter_value_and_grad(lambda *args, loss=loss: loss(*args))  # traced anew
            assert largest_array(trace(step, *arguments)) < rows * vocab / 2
            value = eqx.filter_jit(step)(*arguments)
        for x, y in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_optax_is_accepted(getkey):
    optax = pytest.importorskip("optax")
    model, batch, lion = language_model(getkey()), text_batch(), optax.lion(1e-3)
    before = np.array(model.output.w)
    state = as_optimizer(lion).init(model)
    with jax.numpy_dtype_promotion("standard"):
        model, state, _ = train_step(
            model, state, batch, optimizer=lion, loss=language_model_loss, key=getkey()
        )
    assert 0 < np.abs(model.output.w - before).max() < 2e-3


def test_bad_pieces_are_refused(getkey, no_shape_checker):
    model, batch, optimizer = language_model(getkey()), text_batch(), AdamW(1e-3)
    state = optimizer.init(model)
    with pytest.raises(ValueError, match="key must be a JAX PRNG key"):
        train_step(model, state, batch, optimizer=optimizer, loss=language_model_loss, key=None)
    with pytest.raises(ValueError, match="optimizer must be an Optimizer"):
        train_step(model, state, batch, optimizer="adam", loss=language_model_loss, key=getkey())
