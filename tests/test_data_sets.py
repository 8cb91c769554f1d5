"""Data sets of other libraries as batches: each example once per epoch, and exact resuming."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxformers import AdamW, Checkpoints, Every, TransformerLM, fit, language_model_loss
from jaxformers.data import Examples, PackedDocuments

TEXT = np.random.default_rng(0).integers(1, 17, (22, 7))
ROWS = [{"tokens": row[:-1], "targets": row[1:]} for row in TEXT]
run = partial(fit, loss=language_model_loss, steps=8, key=jax.random.key(0), progress=False)


def trained(batches, **options):
    model = TransformerLM(17, 12, 3, 1, 20, 6, key=jax.random.key(3))
    return run(model, AdamW(1e-2), batches, **options)


def same(a, b):
    pairs = zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def check_resumes(batches, where):
    """A run that is stopped after five steps ends as one that is not; and all batches count."""
    whole = trained(batches)
    options = {"checkpoint": Checkpoints(where)}
    stop = Every(1, lambda figures: figures.step == 4)
    assert trained(batches, callbacks=[stop], **options).step == 5
    assert same(trained(batches, **options), whole)
    assert not same(trained(batches, steps=7), whole)


class Mapped:
    """A data set in the style of torch, whose examples come together."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        raise AssertionError("one by one is slower")

    def __getitems__(self, numbers):
        self.asked.append(numbers)
        return [ROWS[i] for i in numbers]


def test_examples_are_a_source():
    source = Examples(ROWS, 4, seed=5)
    batches = [source[i] for i in range(11)]  # two epochs
    rows = sorted(tuple(row) for batch in batches for row in batch["tokens"])
    assert rows == sorted(2 * [tuple(row[:-1]) for row in TEXT.tolist()])
    assert len(source) == 6 and [len(x["tokens"]) for x in source.in_order()] == [4] * 5 + [2]
    halves = [source.shard(k, 2)[3]["tokens"] for k in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), batches[3]["tokens"])
    data = Mapped()
    np.testing.assert_array_equal(Examples(data, 4, seed=5)[2]["tokens"], batches[2]["tokens"])
    assert data.asked == [source.order[2].examples.tolist()]
    counted = Examples(
        ["a", "bcd"], 2, collate=lambda texts: {"n": np.array(list(map(len, texts)))}
    )
    assert sorted(counted[0]["n"].tolist()) == [1, 3]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "data must have at least one example"),
        (iter(ROWS), "Pass a stream of batches to fit as it is"),
        ({"tokens": TEXT}, "data must have a length and examples"),
    ],
)
def test_data_that_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        Examples(data, 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([[1], [2]], "examples must be dicts with the same names"),
        ([{"a": 1}, {"b": 1}], "examples must be dicts with the same names"),
        ([{"a": [1]}, {"a": [1, 2]}], "must have 'a' of one shape, got .*Pass collate="),
    ],
)
def test_examples_that_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        Examples(data, 2)[0]


class Stream:
    """As a stream of `datasets`: what it has by index are columns."""

    def __getitem__(self, name):
        raise AssertionError("an index gives no batch")

    def __iter__(self):
        return iter([Examples(ROWS, 4)[i] for i in range(3)])


def test_a_stream_with_columns_is_iterated(tmp_path):
    pytest.importorskip("safetensors")
    check_resumes(Stream(), tmp_path)
    assert same(trained(Stream()), trained([*Stream()]))


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"tokens": TEXT[:, :-1], "targets": TEXT[:, 1:]})
    assert same(trained(Examples(data, 4)), trained(Examples(ROWS, 4)))
    check_resumes(Examples(data, 4), tmp_path / "source")
    stream = data.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=9)
    check_resumes(stream.batch(4, drop_last_batch=True), tmp_path / "stream")
    ragged = [row[:n].tolist() for n, row in zip(range(2, 24), 4 * [*TEXT], strict=False)]
    column = datasets.Dataset.from_dict({"ids": ragged})["ids"]
    for i in (0, 7):
        ours, theirs = (PackedDocuments(x, 6, 4)[i]["tokens"] for x in (ragged, column))
        np.testing.assert_array_equal(ours, theirs)


def test_grain(tmp_path):
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source(ROWS)
    check_resumes(data.shuffle(seed=1).repeat().batch(4), tmp_path / "by number")
    sampler = grain.samplers.IndexSampler(len(ROWS), shuffle=True, seed=1, num_epochs=1)
    loader = grain.DataLoader(
        data_source=ROWS,
        sampler=sampler,
        operations=[grain.transforms.Batch(4, drop_remainder=True)],
    )
    check_resumes(loader, tmp_path / "loader")
    batches = data.shuffle(seed=1).repeat(2).batch(4)
    assert trained(batches, steps=None, epochs=1).step == 11
    assert same(trained(Examples(data, 4)), trained(Examples(ROWS, 4)))
