"""Texts of a patched model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import TextGenerator, patch
from jaxformers.inspect import KeptHeads

pytest.importorskip("tokenizers")

from test_text_generator import PROMPTS, lm_of, tokenizer_of  # noqa: E402
from test_token_text import byte_level  # noqa: E402


def test_a_patched_model_writes_what_it_says_of_the_whole_text(no_shape_checker):
    """Prompts of other lengths are padded together, and each token is read once with a cache."""
    model = lm_of()
    steer = jax.random.normal(jax.random.key(1), (24,))
    patched = patch(
        model,
        {
            "decoder.layers.0.residual_after": lambda x: x + steer,
            "decoder.layers.1.self_attention.head_outputs": KeptHeads(jnp.array([1.0, 0, 0, 1])),
        },
    )
    tokenizer = tokenizer_of(byte_level())
    text, plain = TextGenerator(patched, tokenizer), TextGenerator(model, tokenizer)
    results = text(PROMPTS[:3], 8, return_scores=True)
    for prompt, got, other in zip(PROMPTS, results, plain(PROMPTS[:3], 8), strict=False):
        ids = np.asarray(tokenizer.encode(prompt)[0])
        whole = np.concatenate([ids, got.tokens]).astype(np.int32)
        says = np.asarray(patched(whole[None, :-1]))[0, len(ids) - 1 :]
        assert np.array_equal(says.argmax(-1), got.tokens)
        np.testing.assert_allclose(says.max(-1), got.log_probs, atol=1e-5)
        assert got.text != other
        with text.stream(prompt, 8) as stream:
            assert "".join(stream) == got.text
