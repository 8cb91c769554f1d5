"""Texts as classes: what transformers and sentence-transformers make of the same files."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxformers import TextClassifier, TextEmbedder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("sentence_transformers")
import sentence_models  # noqa: E402

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1", "w2 " * 50, ""]
PAIRS = ["w3 w1", "w9 w8 w7", "w2 " * 40, "w1 w2 w3 w4", "w7"]
NAMES = {0: "bad", 1: "fair", 2: "good"}


def logits_of(directory, texts, pairs=None):
    """The logits of transformers, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    rows = []
    for text, pair in zip(texts, pairs or [None] * len(texts), strict=True):
        inputs = tokenizer(text, pair, truncation=True, max_length=34, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


def test_classes_and_probabilities(tmp_path):
    directory = sentence_models.save_plain(tmp_path, "bert", head=True, id2label=NAMES)
    classifier = TextClassifier.from_pretrained(directory)
    assert classifier.labels == ("bad", "fair", "good") and classifier.max_seq_length == 34
    for pairs in (None, PAIRS):  # with pairs the tokens have types
        wanted = logits_of(directory, TEXTS, pairs)
        got = classifier.scores(TEXTS, pairs, batch_size=2)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
        chances = torch.softmax(torch.tensor(wanted), -1).numpy()
        got = classifier.probabilities(TEXTS, pairs, batch_size=2)
        np.testing.assert_allclose(got, chances, rtol=0, atol=1e-5)
        for text, pair, row, score in zip(
            TEXTS, pairs or [None] * len(TEXTS), chances, wanted, strict=True
        ):
            best = classifier(text, pair)
            assert best.label == NAMES[row.argmax()]
            np.testing.assert_allclose(best[1:], (row.max(), score.max()), rtol=0, atol=1e-5)
    ordered = classifier(TEXTS, top_k=3)
    for labels, row in zip(ordered, logits_of(directory, TEXTS), strict=True):
        assert [x.label for x in labels] == [NAMES[i] for i in np.argsort(-row)]
        assert sum(x.probability for x in labels) == pytest.approx(1)
    assert classifier([]) == [] and classifier.scores([]).shape == (0, 3)
    for kind, answer in (
        ("multi_label_classification", lambda x: 1 / (1 + np.exp(-x))),
        ("regression", None),
    ):
        path = Path(directory, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": kind}))
        classifier = TextClassifier.from_pretrained(directory)
        scores = logits_of(directory, TEXTS[:1])[0]
        [*labels] = classifier(TEXTS[0], top_k=3)
        assert [x.label for x in labels] == [NAMES[i] for i in np.argsort(-scores)]
        np.testing.assert_allclose([x.score for x in labels], np.sort(scores)[::-1], atol=1e-5)
        if answer is None:
            assert {x.probability for x in labels} == {None}
            with pytest.raises(ValueError, match="a regression has no probabilities"):
                classifier.probabilities("w1")
        else:
            got = classifier.probabilities(TEXTS[0])
            np.testing.assert_allclose(got, answer(scores), rtol=0, atol=1e-5)


def test_a_reranker(tmp_path):
    plain = sentence_models.save_plain(tmp_path / "a", "xlm-roberta", head=True, num_labels=1)
    prompts = {"search": "w5 w6 "}
    reference = st.CrossEncoder(
        plain, device="cpu", prompts=prompts, default_prompt_name="search", max_length=32
    )
    reference.save_pretrained(str(tmp_path / "b"))
    reference = st.CrossEncoder(str(tmp_path / "b"), device="cpu")
    classifier = TextClassifier.from_pretrained(tmp_path / "b")
    assert classifier.max_seq_length == 32
    pairs = list(zip(TEXTS, PAIRS, strict=True))
    scores = classifier.scores(TEXTS, PAIRS, batch_size=2)[:, 0]
    wanted = reference.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    probabilities = [x.probability for x in classifier(TEXTS, PAIRS)]
    np.testing.assert_allclose(probabilities, reference.predict(pairs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds a 'CrossEncoder'.*TextClassifier reads it"):
        TextEmbedder.from_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="one without"):
        TextClassifier.from_pretrained(sentence_models.save_plain(tmp_path / "c", "bert"))
