"""A fresh classifier on the checkpoint of an encoder: what is kept, what is drawn, what is said."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from jaxformers import (  # noqa: E402
    AdamW,
    TransformerEncoder,
    TransformerLM,
    classification_loss,
    count_targets,
    evaluate,
    fit,
    from_pretrained,
)
from jaxformers.files.hub import TensorFiles  # noqa: E402
from jaxformers.hf.families import FAMILIES  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
torch.set_num_threads(1)

TOKENS = np.array([[8, 9, 30, 12, 25, 33, 41, 50, 11], [13, 14, 52, 44, 20, 19, 18, 9, 23]])
KEY = jax.random.key(5)
LABELS = 3
# Every family with a classifier of sequences, and every kind of head that is taken off.
CASES = (
    *("bert", "bert_pooler", "bert_without_pooler", "bert_pretraining", "bert_classify"),
    *("bert_classify_tokens", "roberta", "roberta_without_pooler", "roberta_classify", "camembert"),
    *("xlm_roberta_pooler", "distilbert", "electra", "electra_pretraining", "albert", "mpnet"),
    *("albert_pretraining", "modernbert", "modernbert_plain", "modernbert_classify_tokens"),
    *("nomic_bert", "eurobert"),
)


def raises(*words):
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def reference(directory, **options):
    """The classifier of transformers, and the names of the tensors that it drew."""
    kind = transformers.AutoModelForSequenceClassification
    options |= {"output_loading_info": True, "attn_implementation": "eager"}
    model, info = kind.from_pretrained(directory, **options)
    return model.eval(), {*info["missing_keys"], *(x[0] for x in info["mismatched_keys"])}


def test_all_families_are_tried(made):
    tried = {json.loads((made(name) / "config.json").read_text())["model_type"] for name in CASES}
    assert tried == {name for name, family in FAMILIES.items() if "sequence" in family.classes}


@pytest.mark.few(8)
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_gets_a_classifier_as_in_transformers(name, made, tmp_path):
    source = made(name)
    model = TransformerEncoder.from_pretrained(source, num_labels=LABELS, key=KEY)
    model.save_pretrained(tmp_path / "mine")
    theirs, drawn = reference(source, num_labels=LABELS, ignore_mismatched_sizes=True)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (TensorFiles(tmp_path / x) for x in ("mine", "theirs"))
    names = {x.replace(".gamma", ".weight").replace(".beta", ".bias"): x for x in other.names}
    assert {*mine.names} == names.keys()
    for tensor, name in names.items():
        equal = np.array_equal(mine.read(tensor), other.read(name))
        # Neither draws biases and gains.
        assert equal == (tensor not in drawn or tensor.endswith(("bias", "norm.weight"))), tensor
    loaded, missing = reference(tmp_path / "mine")
    assert not missing and loaded.config.num_labels == LABELS
    with torch.no_grad():
        expected = loaded(torch.tensor(TOKENS)).logits.numpy()
    assert expected.std() > 1e-4
    np.testing.assert_allclose(model.classify(TOKENS), expected, atol=1e-5, rtol=1e-4)


def test_a_classifier_of_that_size_is_kept(made):
    kept, given = (from_pretrained(made("bert_classify"), **x) for x in ({}, {"num_labels": 5}))
    np.testing.assert_array_equal(kept.classify(TOKENS), given.classify(TOKENS))
    # One of tokens has the same names, and is another head.
    plain = from_pretrained(made("bert_classify_tokens"))
    fresh = from_pretrained(made("bert_classify_tokens"), num_labels=5)
    assert fresh.classifier.pooling == "pooler"
    assert not np.array_equal(plain.classifier.out.w, fresh.classifier.out.w)


def test_the_key_and_the_file_give_the_numbers(made, tmp_path):
    shutil.copytree(made("bert"), tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    load = partial(from_pretrained, num_labels=40)
    first, again, other = (load(made("bert"), key=jax.random.key(i)) for i in (0, 0, 1))
    w = [x.classifier.out.w for x in (first, again, other, load(made("bert")))]
    np.testing.assert_array_equal(w[0], w[1])
    np.testing.assert_array_equal(w[0], w[3])
    assert not np.array_equal(w[0], w[2])
    assert 0.018 < w[0].std() < 0.022
    assert 0.45 < load(tmp_path / "wide").classifier.out.w.std() < 0.55
    half = load(made("bert"), dtype=jnp.bfloat16)
    assert half.classifier.out.w.dtype == half.pooler.w.dtype == jnp.bfloat16


def test_names_of_classes_are_written(made, tmp_path):
    def written(model):
        model.save_pretrained(tmp_path / "out")
        return json.loads((tmp_path / "out" / "config.json").read_text())

    names = ["bad", "so-so", "good"]
    for given in (names, dict(enumerate(names))):
        config = written(from_pretrained(made("distilbert"), id2label=given))
        assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
        assert config["label2id"] == {name: i for i, name in enumerate(names)}
        assert config["architectures"] == ["DistilBertForSequenceClassification"]
    config = written(from_pretrained(made("bert_classify_tokens"), num_labels=2))
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    config = written(from_pretrained(made("bert_classify"), id2label=list("abcde")))
    assert config["label2id"] == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}


def test_a_fresh_classifier_is_trained_and_exported(made, tmp_path):
    model = from_pretrained(made("bert"), num_labels=2, key=KEY)
    rng = np.random.default_rng(0)
    rows = rng.integers(8, 61, (64, 7))
    rows[:, 1] = np.where(rng.random(64) < 0.5, 11, 13)
    mask = np.arange(7) < rng.integers(3, 8, (64, 1))
    data = {"tokens": rows, "targets": (rows[:, 1] == 11) * 1, "padding_mask": mask}
    batches = [{name: x[i : i + 16] for name, x in data.items()} for i in range(0, 64, 16)]
    before = evaluate(model, [data], loss=classification_loss)
    options = {"loss": classification_loss, "key": KEY, "progress": False}
    model = fit(model, AdamW(3e-3), batches, steps=40, **options).model
    after = evaluate(model, [data], loss=classification_loss)
    assert after < 0.3 * before
    model.save_pretrained(tmp_path)
    theirs, _ = reference(tmp_path)
    with torch.no_grad():
        mask = torch.tensor(mask[:8])
        logits = theirs(torch.tensor(rows[:8]), attention_mask=mask).logits.numpy()
    mine = model.classify(rows[:8], padding_mask=mask.numpy())
    np.testing.assert_allclose(mine, logits, atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_the_classes(made):
    model = from_pretrained(made("distilbert"), num_labels=4, key=KEY)
    targets = np.array([3, 1])
    batch = {"tokens": TOKENS, "targets": targets, "padding_mask": TOKENS > 11}
    logits = torch.tensor(np.array(model.classify(TOKENS, padding_mask=TOKENS > 11)))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets))
    np.testing.assert_allclose(classification_loss(model, batch), expected.item(), rtol=1e-5)
    assert count_targets(batch) == 2
    assert count_targets(batch | {"targets": np.array([3, -100])}) == 1
    per_token = from_pretrained(made("bert_classify_tokens"))
    batch["targets"] = TOKENS % 5
    logits = torch.tensor(np.array(per_token.classify(TOKENS, padding_mask=TOKENS > 11)))
    real = torch.tensor(TOKENS > 11)
    expected = torch.nn.functional.cross_entropy(logits[real], torch.tensor(TOKENS % 5)[real])
    np.testing.assert_allclose(classification_loss(per_token, batch), expected.item(), rtol=1e-5)
    assert count_targets(batch) == real.sum()


def test_what_is_refused(made):
    with raises("num_labels is for families", "bert, ", "is a llama"):
        from_pretrained(made("llama"), num_labels=3)
    with raises("is a t5"):
        from_pretrained(made("t5"), id2label=["a", "b"])
    with pytest.raises(TypeError):
        TransformerLM.from_pretrained(made("llama"), num_labels=3)
    for wrong in (0, -1, 2.0, True, "3"):
        with raises("num_labels must be an integer"):
            from_pretrained(made("bert"), num_labels=wrong)
    for wrong in ([], "ab", ["a", "a"], [1, 2], {1: "a", 2: "b"}, 5):
        with raises("id2label must have a different name for each class"):
            from_pretrained(made("bert"), id2label=wrong)
    with raises("id2label must name each of the 3 classes", "2 names"):
        from_pretrained(made("bert"), num_labels=3, id2label=["a", "b"])
    with raises("key is for a fresh classifier"):
        from_pretrained(made("bert"), key=KEY)
    with raises("key must be a JAX PRNG key"):
        from_pretrained(made("bert"), num_labels=3, key=0)
    one = from_pretrained(made("bert"), num_labels=1)
    with raises("two classes or more", "loss of your own"):
        classification_loss(one, {"tokens": TOKENS, "targets": np.array([0, 0])})
    with raises("classify|classifier"):
        classification_loss(from_pretrained(made("bert")), {"tokens": TOKENS, "targets": [0, 1]})
    with raises("array 'labels'", "'targets'"):
        classification_loss(one, {"tokens": TOKENS, "labels": [0, 1]})
