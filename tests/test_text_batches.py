"""Lists of texts in batches: few programs, the order of the input, and odd input."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxformers import (
    Classifier,
    TextClassifier,
    TextEmbedder,
    Tokenizer,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
)
from jaxformers.text.batches import AT_ONCE, Reader, Texts

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[UNK]", "[PAD]", *(f"w{i}" for i in range(21))]
KEY = jax.random.key(0)
SIZES = (len(WORDS), 12, 2, 1, 20, 40)


def words():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    config = b'{"pad_token": "[PAD]", "unk_token": "[UNK]"}'
    return Tokenizer({"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config})


@pytest.fixture(scope="module")
def embedder():
    return TextEmbedder(TransformerEncoder(*SIZES, key=KEY), words())


@pytest.fixture(scope="module")
def classifier():
    head = partial(Classifier, num_labels=3, pooling="mean")
    typed = partial(TransformerEmbedding, num_token_types=2)
    model = TransformerEncoder(*SIZES, embedding=typed, classifier=head, key=KEY)
    return TextClassifier(model, words(), labels=["bad", "fair", "good"])


def texts_of(count, longest, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[2:], n)) for n in draw.integers(1, longest, count)]


def test_each_text_gets_its_own_vector(embedder):
    texts = texts_of(3 * AT_ONCE + 2, 39)  # more than are tokenized at once
    together = embedder(texts, batch_size=2)
    for text, vector in zip(texts[:9], together, strict=False):
        np.testing.assert_allclose(embedder(text), vector, rtol=0, atol=1e-5)
    np.testing.assert_allclose(embedder(texts[::-1], batch_size=16), together[::-1], atol=1e-5)
    hidden = embedder.model(embedder.tokenizer.encode(texts[0])[0])
    wanted = np.asarray(hidden).mean(0)
    np.testing.assert_allclose(embedder(texts[0], normalize=False), wanted, rtol=0, atol=1e-5)
    lengths = np.linalg.norm(together, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_batches_have_the_longest_first_and_few_sizes(embedder):
    texts = texts_of(100, 60)
    sizes, seen = [], []
    for numbers, rows in Reader(embedder.model, embedder.tokenizer, 33, 8).batches(Texts.of(texts)):
        sizes.append(rows.tokens.shape)
        seen += numbers.tolist()
        real = np.asarray(rows.mask.q_positions) >= 0
        wanted = [min(len(texts[i].split()), 33) for i in numbers]
        assert real.sum(1).tolist() == wanted + [0] * (len(real) - len(numbers))
    assert sorted(seen) == list(range(100))
    assert [t for _, t in sizes] == sorted((t for _, t in sizes), reverse=True)
    assert {t for _, t in sizes} == {16, 24, 32, 33}  # no more than max_length
    assert [b for b, _ in sizes] == [8] * 12 + [4]


def test_nothing_compiles_after_the_warm_up(embedder, classifier, compiled):
    for model in (embedder, classifier):
        seconds = model.warm_up(max_length=20, batch_size=4)
        assert 0 < seconds < 600
        compiled()
        for seed, count in enumerate((1, 2, 3, 4, 5, 11)):
            model(texts_of(count, 21, seed), batch_size=4)
        model("w3 w2")
        model("")
        if model is classifier:
            model(["w1 w2", "w3"], ["w4", "w5"], batch_size=4)
        else:
            model(texts_of(7, 21), batch_size=4, normalize=False, truncate_dim=5)
            model.similarity(model(["w1", "w2"]), model(["w3"]))
        assert compiled() == []
        model(["w1"] * 5, batch_size=5)
        assert len(compiled()) == 1
    assert embedder.warm_up(max_length=3, batch_size=1) < seconds


def test_an_encoder_decoder_and_a_decoder_embed_too():
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    lm = TransformerLM(*SIZES, key=KEY)
    got = TextEmbedder(lm, words(), pooling=("last", "max"), normalize=False)(texts)
    for text, vector in zip(texts, got, strict=True):
        hidden = np.asarray(lm.forward(words().encode(text)[0])[0])
        wanted = np.concatenate([hidden[-1], hidden.max(0)])
        np.testing.assert_allclose(vector, wanted, rtol=0, atol=1e-5)
    both = Transformer(SIZES[0], 9, 12, 2, 1, 1, 20, 40, key=KEY)
    got = TextEmbedder(both, words(), normalize=False)(texts)
    for text, vector in zip(texts, got, strict=True):
        wanted = np.asarray(both.encode(words().encode(text)[0])).mean(0)
        np.testing.assert_allclose(vector, wanted, rtol=0, atol=1e-5)


ODD = [
    *(
        "",
        " ",
        "\0",
        "w1\0w2",
        "😀",
        "👩‍👩‍👧‍👦 🇩🇪",
        "\ufeff",
        "\u202e w1",
        "é" * 50,
        "w1 " * 50_000,
    ),
    *("x" * 100_000, "\n\t\r", "[PAD]", "[UNK] [PAD] w1", "\U0010ffff", "ﷺ" * 99, "\x7f\x1b[0m"),
    *("\ud800", "w1 \udfff", b"w1", b"", 3, 3.5, None, True, object(), {"w1": 2}, {"w1"}),
    *([], (), [[]], [["w1"]], [None], ["w1", None], [3], [b"w1"], ["w1", 2.0], ["\ud83d"]),
    *(["w1", ""], ["", ""], ("w1", "w2"), iter(["w1"]), range(3), np.array(["w1", "w2"])),
    *(np.array(3), np.array([]), np.zeros((2, 3)), jax.numpy.ones(3), [np.str_("w1")], "w1".split),
    *(["w1"] * 33, [""] * 5, ["x" * 9999] * 3, float("nan"), Exception("w1"), type, [[1, 2]]),
]


@pytest.mark.usefixtures("no_shape_checker")
@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_texts_give_a_result_or_an_error_of_ours(embedder, classifier, number):
    odd = ODD[number]
    for model in (embedder, classifier):
        try:
            answers = model(odd)
        except ValueError as error:
            assert len(str(error)) < 700 and "texts must be" in str(error)
            continue
        assert isinstance(odd, str | list | tuple)
        if model is embedder:
            many = () if isinstance(odd, str) else (len(odd),)
            assert answers.shape == (*many, 12) and np.isfinite(answers).all()
        else:
            listed = [answers] if isinstance(odd, str) else answers
            assert len(listed) == (1 if isinstance(odd, str) else len(odd))
            assert all(0 <= x.probability <= 1 for x in listed)


@pytest.mark.usefixtures("no_shape_checker")
def test_options_that_are_not_valid(embedder, classifier):
    def refused(match, model, *args, **options):
        with pytest.raises(ValueError, match=match):
            model(*args, **options)

    for size in (0, -1, 2.5, None, "8", True):
        refused("batch_size must be an integer of at least 1", embedder, "w1", size)
        refused("batch_size must be an integer of at least 1", classifier, "w1", None, size)
    refused("truncate_dim must be at most 12, got 13", embedder, "w1", truncate_dim=13)
    refused("truncate_dim must be an integer", embedder, "w1", truncate_dim="3")
    refused("normalize must be True or False", embedder, "w1", normalize=1)
    refused("progress must be True or False", embedder, ["w1"], progress="yes")
    refused("prompt must be a text", embedder, "w1", prompt=3)
    refused("prompt_name must be one of", embedder, "w1", prompt_name=["query"])
    refused("Did you mean 'progress'", embedder, "w1", show_progress_bar=True)
    refused("Did you mean 'normalize'", embedder, "w1", normalize_embeddings=True)
    refused("top_k must be at most the number of classes, 3", classifier, "w1", top_k=4)
    refused("pairs must be one text to each", classifier, ["w1"], "w2")
    refused("pairs must be one text to each", classifier, ["w1"], [])
    refused("pairs must be a string or a list", classifier, "w1", 3)
    refused("max_length must be at most 40", embedder.warm_up, 41)
    refused("max_length must be an integer", classifier.warm_up, "long")
    refused("must be vectors", embedder.similarity, "w1", "w2")
    refused("of one width", embedder.similarity, np.ones(3), np.ones(4))
    model, tokenizer = embedder.model, embedder.tokenizer
    refused("model must be a TransformerEncoder", TextEmbedder, tokenizer, model)
    refused("tokenizer must be a Tokenizer", TextEmbedder, model, "directory")
    refused("pooling must be one of", TextEmbedder, model, tokenizer, pooling="cls")
    refused("pooling must be one of", TextEmbedder, model, tokenizer, pooling=[])
    refused("similarity must be one of", TextEmbedder, model, tokenizer, similarity="l2")
    refused("default_prompt must be one of", TextEmbedder, model, tokenizer, default_prompt="a")
    refused("truncate_dim must be at most", TextEmbedder, model, tokenizer, truncate_dim=99)
    refused("one without", TextClassifier, model, tokenizer)
    many = Classifier, TransformerEncoder
    per_token = many[1](*SIZES, classifier=partial(many[0], num_labels=3, pooling="none"), key=KEY)
    refused("classifies each token", TextClassifier, per_token, tokenizer)
    refused("labels must be", TextClassifier, classifier.model, tokenizer, labels=["a", "a", "b"])
    refused("labels must be", TextClassifier, classifier.model, tokenizer, labels=[1, 2, 3])
    refused("prompt must be a text", TextClassifier, classifier.model, tokenizer, prompt=3)
    refused("prompts must be texts", TextEmbedder, model, tokenizer, prompts={"query": 3})
    refused("kind must be one of", TextClassifier, classifier.model, tokenizer, kind="ranking")


def test_a_tokenizer_with_more_ids_than_the_model():
    small = TransformerEncoder(5, 12, 2, 1, 20, 40, key=KEY)
    embedder = TextEmbedder(small, words())
    assert embedder("w1 w2").shape == (12,)
    with pytest.raises(ValueError, match="tokens must be ids from 0 to 4"):
        embedder("w20")


def test_the_bar(embedder, capsys):
    pytest.importorskip("tqdm")
    embedder(["w1", "w2 w3"], progress=True)
    assert "2.00/2.00" in capsys.readouterr().err
    embedder(["w1"] * 1200, batch_size=600)  # no terminal
    assert capsys.readouterr().err == ""
