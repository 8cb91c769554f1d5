"""Positions and documents that a call says: the same names for all models, each fact said once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import MAX, V, make_lm, make_seq2seq, prompt_of

from jaxformers import AttentionMask, RotaryPositionalEncoding, TransformerEncoder
from jaxformers.places import place

TOKENS = jnp.asarray(prompt_of(7, 2))
REAL = jnp.array([[True] * 7, [False, True, True, True, True, True, False]])
PLACES = jnp.array([[0, 1, 2, 3, 4, 5, 6], [-1, 0, 1, 2, 3, 4, -1]])
SEGMENTS = jnp.array([[4, 4, 4, 2, 2, 2, 2], [9, 9, 9, 9, 1, 1, 1]])


def close(got, wanted, where=True):
    np.testing.assert_allclose(
        np.where(where, got, 0.0), np.where(where, wanted, 0.0), rtol=1e-5, atol=1e-5
    )


def test_positions_are_counted_in_each_segment():
    got = place(None, (2, 7), REAL, None, SEGMENTS)
    wanted = [[0, 1, 2, 0, 1, 2, 3], [-1, 0, 1, 2, 0, 1, -1]]
    np.testing.assert_array_equal(got.q_positions, wanted)
    assert (got.k_segments == SEGMENTS).all()
    np.testing.assert_array_equal(place(None, (2, 7), REAL).q_positions, PLACES)


def test_models_take_positions_and_segments():
    lm = make_lm(position=RotaryPositionalEncoding())
    encoder = TransformerEncoder(V, 24, 4, 1, 48, 32, 0.0, key=jax.random.key(0))
    for model in (lm, encoder):
        where = REAL[..., None]
        close(model(TOKENS, positions=PLACES), model(TOKENS, padding_mask=REAL), where)
        packed = model(TOKENS[:1], segment_ids=SEGMENTS[:1])
        close(packed[:, 3:], model(TOKENS[:1, 3:]))
        close(packed[:, :3], model(TOKENS[:1, :3]))
    cache, hidden = lm.init_cache(2, 8), []
    for part in (slice(0, 4), slice(4, 7)):
        out, cache = lm.forward(TOKENS[:, part], positions=PLACES[:, part], cache=cache)
        hidden.append(out)
    wanted, _ = lm.forward(TOKENS, padding_mask=REAL)
    close(jnp.concatenate(hidden, axis=1), wanted, REAL[..., None])


def test_packed_pairs_see_their_own_source():
    model, src, tgt = make_seq2seq(), TOKENS[:1] % 29, TOKENS[:1, :6]
    of_tgt = jnp.array([[4, 4, 2, 2, 2, 2]])
    packed = model(src, tgt, src_segment_ids=SEGMENTS[:1], tgt_segment_ids=of_tgt)
    close(packed[:, :2], model(src[:, :3], tgt[:, :2]))
    close(packed[:, 2:], model(src[:, 3:], tgt[:, 2:]))
    # Padding that positions say is hidden from the target, too, and a cache keeps it.
    both, places = TOKENS % 29, {"src_positions": PLACES}
    wanted = model.logits(both, TOKENS[:, :4], src_padding_mask=REAL)
    close(model.logits(both, TOKENS[:, :4], **places), wanted)
    cache = model.init_cache(model.encode(both, **places), 8, **places)
    close(model.logits_of(model.forward(TOKENS[:, :4], cache=cache)[0]), wanted)


def test_what_is_said_twice_or_does_not_fit_is_refused(no_shape_checker):
    lm, pair = make_lm(), make_seq2seq()
    src = TOKENS % 29
    placed = AttentionMask(q_positions=PLACES)
    together = AttentionMask(q_segments=SEGMENTS, k_segments=SEGMENTS)
    for call, match in (
        (lambda: lm(TOKENS, padding_mask=REAL, positions=PLACES), "positions already say what is"),
        (lambda: lm(TOKENS, placed, positions=PLACES), "q_positions already says .* positions as"),
        (lambda: lm(TOKENS, together, segment_ids=SEGMENTS), "q_segments already says .*together"),
        (lambda: lm(TOKENS, positions=PLACES[:1]), r"^positions must be integers .*\(2, 7\)"),
        (
            lambda: lm(TOKENS, positions=PLACES.astype(jnp.float32)),
            "^positions must be integers .* float32",
        ),
        (lambda: lm(TOKENS, segment_ids=np.full((2, 7), 2**32)), "fit in 32 bits, got 4294967296"),
        (lambda: lm(TOKENS, positions="abc"), "^positions must be integers"),
        (lambda: lm(TOKENS, positions=PLACES - 1), "positions must be at least 0.* -2"),
        (
            lambda: lm(TOKENS, positions=PLACES + MAX),
            f"less than max_seq_length = {MAX}.* {MAX + 6}",
        ),
        (lambda: lm(TOKENS, segment_ids=REAL), "^segment_ids must be integers .* bool"),
        (
            lambda: lm.forward(TOKENS, segment_ids=SEGMENTS, cache=lm.init_cache(2, 8)),
            "segment_ids do not go with a cache",
        ),
        (lambda: pair(src, TOKENS, src_segment_ids=SEGMENTS), "src_segment_ids and tgt_segment_"),
        (lambda: pair(src, TOKENS, src_positions=PLACES - 1), "src_positions must be at least 0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
