"""Batches: every example exactly once per epoch, and batch i the same whoever asks when."""

import bisect
import itertools
from collections import Counter

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxformers import Tokenizer, TransformerLM, language_model_loss
from jaxformers.data import (
    Bucketed,
    Changed,
    MaskedTokens,
    PackedDocuments,
    PaddedPairs,
    PaddedTexts,
    Picked,
    Shuffled,
    SpanCorruption,
    Windows,
    answer,
    chat,
    open_tokens,
)
from jaxformers.data.order import least_padding, permute, scramble, uniform
from jaxformers.data.packing import pack

quick = settings(max_examples=40, deadline=None)
SENTINELS = range(32099, 31999, -1)


def documents_of(lengths, seed=0):
    """Texts in which no two tokens are alike, so each can be found again."""
    ends = np.cumsum(lengths)
    ids = np.random.default_rng(seed).permutation(ends[-1]) + 1
    return [ids[end - n : end].tolist() for n, end in zip(lengths, ends, strict=True)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


PAIRS = [
    (list(range(5, 5 + n)), list(range(40, 40 + m)))
    for n, m in [
        (3, 4),
        (9, 2),
        (1, 1),
        (7, 0),
        (2, 11),
        (5, 5),
        (4, 4),
        (6, 3),
        (8, 9),
        (3, 3),
        (2, 2),
    ]
]
TEXTS = [answer(a, b, end_token=2) for a, b in PAIRS]
SOURCES = {
    "windows": lambda seed: Windows(np.arange(1, 100), 7, 4, seed),
    "packed": lambda seed: PackedDocuments(documents_of([3, 9, 14, 2, 6, 5, 1, 23]), 8, 4, seed),
    "pairs": lambda seed: PaddedPairs(PAIRS, 4, start_token=1, end_token=2, buckets=3, seed=seed),
    "texts": lambda seed: PaddedTexts(TEXTS, 4, buckets=2, seed=seed),
    "masked": lambda seed: MaskedTokens(
        Windows(np.arange(3, 200), 11, 4, seed), mask_token=2, vocab_size=200, rate=0.4
    ),
    "masked packed": lambda seed: MaskedTokens(
        PackedDocuments(documents_of([30, 9, 14, 25]), 12, 4, seed), mask_token=0, vocab_size=99
    ),
    "spans": lambda seed: SpanCorruption(
        Windows(np.arange(300) + 3, 31, 4, seed), SENTINELS, end_token=1, noise_density=0.3
    ),
}  # fmt: skip


# What holds for all.


@pytest.mark.parametrize("name", SOURCES)
def test_batch_i_depends_on_the_seed_and_i_alone(name):
    source = SOURCES[name](5)
    batches = [source[i] for i in range(12)]
    for i in (11, 0, 7, 3):
        assert same(SOURCES[name](5)[i], batches[i])
        assert same(source[i], batches[i])
    assert same(SOURCES[name](5)[np.int64(10**9)], source[10**9])
    assert not same(SOURCES[name](6)[3], batches[3])
    assert all(same(a, b) for a, b in zip(itertools.islice(source, 12), batches, strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_types_and_shapes_are_those_of_batches(name):
    for batch in (SOURCES[name](1)[2], *SOURCES[name](1).in_order()):
        for part, array in batch.items():
            assert array.dtype == (bool if part.endswith("mask") else np.int32), part
        assert len({array.shape[0] for array in batch.values()}) == 1


@pytest.mark.parametrize("name", SOURCES)
def test_shards_are_the_rows_of_the_batch(name):
    source = SOURCES[name](4)
    shards = [source.shard(k, 2) for k in range(2)]
    for i in range(6):
        parts = [shard[i] for shard in shards]
        joined = {part: np.concatenate([p[part] for p in parts]) for part in parts[0]}
        assert same(joined, source[i])
    assert same(shards[1].shard(0, 1)[3], shards[1][3])
    rows = Counter(row.tobytes() for batch in source.in_order() for row in rows_of(batch))
    shares = [batch for shard in shards for batch in shard.in_order()]
    assert Counter(row.tobytes() for batch in shares for row in rows_of(batch)) == rows


def rows_of(batch):
    """Rows without their padding, which differs where batches do."""
    names = ("src", "targets") if "src" in batch else ("tokens", "targets")
    return [np.trim_zeros(np.concatenate(row), "b") for row in
            zip(*(batch[name] for name in names), strict=True)]  # fmt: skip


def test_a_shard_costs_its_rows_only():
    asked = []
    source = Windows(np.arange(100), 7, 4)
    rows = source.tokens.rows
    source.tokens.rows = lambda starts, *rest: asked.append(len(starts)) or rows(starts, *rest)
    source.shard(1, 2)[0]
    assert asked == [2]


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_no_number_of_a_batch_is_refused(name, no_shape_checker):
    source = SOURCES[name](0)
    for i in (-1, 1.0, True, "0", slice(3)):
        with pytest.raises(ValueError, match="batches are numbered 0, 1, 2"):
            source[i]
    for part, message in [((0, 3), "4 rows does not divide into 3"), ((2, 2), "from 0 to 1"),
                          ((0.0, 2), "index must be an integer"), ((0, 0), "count")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            source.shard(*part)
    for seed in (-1, 0.5, None, True, 2**63):
        with pytest.raises(ValueError, match="seed must be an integer"):
            SOURCES[name](seed)


# The order.


@quick
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**63 - 1))
def test_each_number_comes_once_per_epoch(count, batch_size, seed):
    order = Shuffled(count, batch_size, seed)
    seen = np.concatenate([order[i].examples for i in range(3 * count // batch_size + 1)])
    for epoch in range(len(seen) // count):
        assert sorted(seen[epoch * count :][:count]) == list(range(count))
    assert np.concatenate([p.examples for p in order.in_order()]).tolist() == list(range(count))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(Shuffled(9, 9, seed)[epoch].examples) for seed in range(9) for epoch in range(9)
    }
    assert len(orders) == 81
    numbers = [n for i in range(30) for n in Shuffled(4, 5, 1)[i].numbers]
    assert len(set(numbers)) == 150


def test_ten_billion_windows_take_no_memory_and_no_time():
    order = Shuffled(10**10 + 19, 8, 3)
    far = order[10**15].examples
    assert ((far >= 0) & (far < 10**10 + 19)).all() and len(set(far)) == 8
    text = np.broadcast_to(np.uint16(7), (10**10,))
    assert (Windows(text, 1024, 4, seed=1)[10**12]["targets"] == 7).all()
    # A stretch of one epoch has no twins.
    place = np.arange(10**9, 10**9 + 10**5)
    assert len(np.unique(permute(place, 10**10 + 19, scramble(1)))) == 10**5


def test_permutations_are_random():
    """Chi-squared of where each number goes, of which pairs are neighbors, and of whole orders."""
    keys = scramble(7, np.arange(24_000))
    goes = np.stack([permute(np.full(24_000, x), 6, keys) for x in range(6)], axis=1)
    assert (np.sort(goes, axis=1) == np.arange(6)).all()
    for x in range(6):
        expected(np.bincount(goes[:, x], minlength=6), degrees=5)
    for x in range(5):
        expected(np.bincount(6 * goes[:, x] + goes[:, x + 1], minlength=36).reshape(6, 6)[
            ~np.eye(6, dtype=bool)], degrees=29)  # fmt: skip
    four = np.stack([permute(np.full(24_000, x), 4, keys) for x in range(4)], axis=1)
    expected(np.unique(four, axis=0, return_counts=True)[1], degrees=23)
    # Large ones: distances of neighbors are spread as those of any two.
    where = permute(np.arange(40_000), 40_000, scramble(3))
    gaps = np.abs(np.diff(where)) / 40_000
    assert abs(gaps.mean() - 1 / 3) < 0.005 and abs((gaps < 0.01).mean() - 0.0199) < 0.003


def expected(counts, degrees):
    """Whether counts of equally likely events differ no more than chance would have it."""
    assert len(counts) == degrees + 1
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi - degrees) < 5 * np.sqrt(2 * degrees)


def test_hashes_are_uniform():
    u = uniform(scramble(np.arange(300)), 400, use=1)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.003
    expected(np.histogram(u, 64, (0, 1))[0], degrees=63)
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.01
    assert not np.isin(u, uniform(scramble(np.arange(300)), 400, use=2)).any()


@quick
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=40),
       st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))  # fmt: skip
def test_buckets_hold_each_example_once_per_epoch(lengths, batch_size, buckets, seed):
    lengths = np.array(lengths)
    order = Bucketed(lengths, batch_size, buckets, seed)
    n = order.num_batches
    assert n == -(-len(lengths) // batch_size)
    for epoch in (0, 2):
        picks = [order[i] for i in range(epoch * n, (epoch + 1) * n)]
        seen = np.concatenate([picked.examples for picked in picks])
        assert sorted(seen[seen >= 0]) == list(range(len(lengths)))
        assert len(seen) == n * batch_size
        for picked in picks:
            inside = picked.examples[picked.examples >= 0]
            assert len(inside) and (lengths[inside] <= picked.shape).all()
            assert picked.shape in order.shapes
    assert len(set(order.shapes)) <= buckets
    assert order.shapes[-1] == tuple(lengths.max(0))
    ordered = list(order.in_order())
    assert np.concatenate([p.examples for p in ordered]).tolist() == list(range(len(lengths)))


@quick
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4))
def test_no_other_buckets_have_less_padding(sizes, count):
    sizes, values = np.array(sizes), sorted(set(sizes))

    def padded(bounds):
        return np.array(bounds)[np.searchsorted(bounds, sizes)].sum()

    every = [
        [*inner, values[-1]]
        for k in range(count)
        for inner in itertools.combinations(values[:-1], min(k, len(values) - 1))
    ]
    bounds = least_padding(sizes, count)
    assert len(bounds) <= count and padded(bounds) == min(map(padded, every))


def test_buckets_save_padding():
    lengths = np.random.default_rng(0).geometric(0.05, (2000, 1))
    padded = {}
    for buckets in (1, 4, 8):
        order = Bucketed(lengths, 16, buckets)
        padded[buckets] = sum(16 * order[i].shape[0] for i in range(order.num_batches))
    real = lengths.sum()
    assert padded[1] > 5 * real and padded[4] < 1.7 * real and padded[8] < 1.35 * real


# Windows.


@quick
@given(st.integers(1, 12), st.integers(0, 60), st.integers(1, 7), st.integers(0, 9))
def test_windows_tile_the_text(length, more, batch_size, seed):
    text = np.arange(1000, 1000 + length + 1 + more)
    windows = Windows(text, length, batch_size, seed)
    count = windows.order.count
    n = -(-4 * count // batch_size)
    batches = [windows[i] for i in range(n)]
    tokens, targets = (np.concatenate([b[k] for b in batches]) for k in ("tokens", "targets"))
    assert (targets == tokens + 1).all() and (tokens[:, 1:] == tokens[:, :-1] + 1).all()
    starts = tokens[:, 0] - 1000
    assert starts.min() >= 0 and starts.max() + length < len(text)
    for epoch in range(4):
        tiles = np.sort(starts[epoch * count : (epoch + 1) * count])
        assert (np.diff(tiles) == length).all()  # no gap, no overlap, none twice
        assert len(text) - count * length < 2 * length + 1 or count == 1
    ordered = np.concatenate([b["targets"].ravel() for b in windows.in_order()])
    assert ordered.tolist() == text[1:].tolist()


def test_offsets_differ_by_epoch_and_reach_all_of_the_text():
    windows = Windows(np.arange(50), 8, 5, seed=2)  # an epoch is one batch
    seen = np.concatenate([windows[i]["targets"].ravel() for i in range(300)])
    assert set(seen) == set(range(1, 50))
    offsets = {windows[i]["tokens"].min() for i in range(300)}
    assert offsets == set(range(50 - 1 - 5 * 8 + 1))


def test_windows_need_a_text(no_shape_checker):
    with pytest.raises(ValueError, match=r"at least length \+ 1 = 9 tokens, got 8. Choose"):
        Windows(np.arange(8), 8, 2)
    assert Windows(np.arange(9), 8, 2)[0]["tokens"].shape == (2, 8)  # one window, twice
    for bad in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="length must be an integer of at least 1"):
            Windows(np.arange(99), bad, 2)
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            Windows(np.arange(99), 3, bad)


# Packed documents.


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=15), st.integers(1, 11),
       st.integers(1, 4), st.integers(0, 5))  # fmt: skip
def test_packing_uses_each_token_once(lengths, length, batch_size, seed):
    documents = documents_of(lengths, seed)
    steps = Counter(step for d in documents for step in itertools.pairwise(d))
    if not steps:
        with pytest.raises(ValueError, match="at least one document must have two tokens"):
            PackedDocuments(documents, length, batch_size, seed)
        return
    source = PackedDocuments(documents, length, batch_size, seed)
    n = source.order.count
    rows = [
        {name: array[row] for name, array in source[i].items()}
        for i in range(-(-2 * n // batch_size))
        for row in range(batch_size)
    ]
    ordered = [
        {name: array[row] for name, array in batch.items()}
        for batch in source.in_order()
        for row in range(len(batch["tokens"]))
    ]
    assert (len(source) - 1) * batch_size < n <= len(source) * batch_size
    for epoch in (rows[:n], rows[n : 2 * n], ordered):
        assert Counter(step for row in epoch for step in check_packed(row, documents)) == steps
    assert 0 < source.fill <= 1


def check_packed(row, documents):
    """The inputs with their targets of a row, after a look at everything else."""
    real = row["loss_mask"]
    assert (real == (row["segment_ids"] > 0)).all() and (real == (row["positions"] >= 0)).all()
    assert (row["positions"][~real] == -1).all() and not row["tokens"][~real].any()
    assert sorted(set(row["segment_ids"][real])) == list(range(1, row["segment_ids"].max() + 1))
    for segment in range(1, row["segment_ids"].max() + 1):
        at = np.flatnonzero(row["segment_ids"] == segment)
        assert (np.diff(at) == 1).all()
        assert row["positions"][at].tolist() == list(range(len(at)))
        piece = [*row["tokens"][at], row["targets"][at[-1]]]
        (whole,) = [d for d in documents if piece[0] in d]
        start = whole.index(piece[0])
        assert whole[start : start + len(piece)] == piece
        assert start % len(real) == 0  # a document is divided only where a row is full
    return list(zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True))


def best_fit_decreasing(sizes, length):
    """How many rows there are if each piece, the longest first, goes where it leaves least."""
    spaces = []  # ascending
    for size in sorted(sizes.tolist(), reverse=True):
        at = bisect.bisect_left(spaces, size)
        bisect.insort(spaces, (spaces.pop(at) if at < len(spaces) else length) - size)
    return len(spaces)


@quick
@given(st.lists(st.integers(1, 17), min_size=1, max_size=60))
def test_packing_is_best_fit(sizes):
    patterns = pack(np.bincount(sizes, minlength=18))
    assert sum(p.repeats for p in patterns) == best_fit_decreasing(np.array(sizes), 17)
    assert all(sum(p.sizes) <= 17 for p in patterns)
    pieces = Counter(
        (size, rank + k)
        for p in patterns
        for size, rank in zip(p.sizes, p.ranks, strict=True)
        for k in range(p.repeats)
    )
    counts = Counter(sizes)
    assert pieces == Counter((size, k) for size in counts for k in range(counts[size]))


def test_rows_are_full_and_neighbors_change():
    lengths = np.random.default_rng(0).integers(2, 65, 3000).tolist()
    source = PackedDocuments(documents_of(lengths), 64, 16, seed=1)
    assert source.fill > 0.97
    assert source.order.count == best_fit_decreasing(np.array(lengths) - 1, 64)
    rows = np.arange(source.order.count)
    neighbors = [
        {
            tuple(sorted(pieces))
            for pieces in source._pieces_of(Picked(rows, 0 * rows + epoch, rows))
        }
        for epoch in range(2)
    ]
    assert len(neighbors[0] & neighbors[1]) < 0.2 * len(neighbors[0])


def test_packed_is_separate():
    """The loss of packed documents is that of the same ones in rows of their own."""
    model = TransformerLM(67, 16, 2, 1, 24, 32, dropout_rate=0.0, key=jax.random.key(3))
    documents = [np.array(d) % 67 for d in documents_of([5, 9, 3, 12, 4, 7])]
    (packed,) = PackedDocuments(documents, 16, 4, seed=2).in_order()
    alone = PaddedTexts([(d, np.full(len(d), True)) for d in documents], 8, buckets=1)[0]
    assert alone["padding_mask"].any(1).sum() == 6  # and two rows are empty
    real = packed["loss_mask"]
    mixed = packed | {"segment_ids": real.astype(np.int32)}
    loss = eqx.filter_jit(language_model_loss)
    losses = [loss(model, jax.device_put(batch)) for batch in (packed, alone, mixed)]
    assert packed["segment_ids"].max() >= 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-6)
    assert abs(losses[2] - losses[0]) > 1e-4


# Padded.


@pytest.mark.parametrize("batch_size", [1, 3, 4, 20])
def test_pairs(batch_size):
    source = PaddedPairs(PAIRS, batch_size, start_token=1, end_token=2, buckets=3, seed=7)
    n = -(-len(PAIRS) // batch_size)
    for batches in ([source[i] for i in range(n, 2 * n)], list(source.in_order())):
        found = [pair for batch in batches for pair in check_pairs(batch)]
        assert sorted(found) == sorted(PAIRS)
        assert {(b["src"].shape[1], b["tgt"].shape[1]) for b in batches} <= set(source.shapes)
    assert len(source.shapes) <= 3
    assert found == PAIRS  # in order


def check_pairs(batch):
    """The pairs of a batch, after a look at its masks, starts and ends."""
    for name, array in batch.items():
        assert array.shape[0] == len(batch["src"]), name
    for row in range(len(batch["src"])):
        b = {name: array[row] for name, array in batch.items()}
        n, m = b["src_padding_mask"].sum(), b["tgt_padding_mask"].sum()
        assert b["src_padding_mask"].tolist() == [True] * n + [False] * (len(b["src"]) - n)
        assert b["tgt_padding_mask"].tolist() == [True] * m + [False] * (len(b["tgt"]) - m)
        assert not any(b[k][m:].any() for k in ("tgt", "targets")) and not b["src"][n:].any()
        if n:  # no empty row
            assert b["tgt"][0] == 1 and b["targets"][m - 1] == 2
            assert b["tgt"][1:m].tolist() == b["targets"][: m - 1].tolist()
            yield b["src"][:n].tolist(), b["targets"][: m - 1].tolist()
        else:
            assert m == 0


def test_answers_alone_are_learned():
    source = PaddedTexts(TEXTS, 4, buckets=2, seed=7)
    for batches in ([source[i] for i in range(3)], list(source.in_order())):
        found = []
        for b in batches:
            for row in range(len(b["tokens"])):
                n = b["padding_mask"][row].sum()
                if n:
                    text = [*b["tokens"][row, :n], b["targets"][row, n - 1]]
                    assert b["tokens"][row, 1:n].tolist() == b["targets"][row, : n - 1].tolist()
                    learned = b["targets"][row][b["loss_mask"][row]]
                    assert not b["loss_mask"][row, n:].any() and learned[-1] == 2
                    found.append((text[: len(text) - len(learned)], learned[:-1].tolist()))
        assert sorted(found) == sorted(PAIRS)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What is the capital of France?\n"},
    {"role": "assistant", "content": "Paris, of course – naïve 日本語 👩‍👩‍👧."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "\n\nuser "},
]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A directory with a byte-level tokenizer that has the template of ChatML."""
    pytest.importorskip("tokenizers")
    from jaxformers.tokenizers.training import save_new, train_bpe

    texts = [m["content"] + m["role"] for m in TALK] * 5
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = train_bpe(texts, 320, special_tokens={"eos_token": specials[1]}, others=specials)
    directory = tmp_path_factory.mktemp("chat") / "tokenizer"
    save_new(tokenizer, directory)
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


def test_chats_are_masked_as_transformers_does(chatty):
    transformers = pytest.importorskip("transformers")
    from jaxformers import load_tokenizer

    ids, counts = chat(load_tokenizer(chatty), TALK)
    theirs = transformers.AutoTokenizer.from_pretrained(chatty).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == theirs["input_ids"]
    assert counts.astype(int).tolist() == theirs["assistant_masks"]
    learned = load_tokenizer(chatty).decode(ids[counts], skip_special_tokens=False)
    assert learned == "".join(TALK[k]["content"] + "<|im_end|>" for k in (2, 4))


def test_chats_that_cannot_be_masked(chatty, no_shape_checker):
    from jaxformers import load_tokenizer

    with pytest.raises(ValueError, match='at least one of the role "assistant"'):
        chat(load_tokenizer(chatty), TALK[:2])
    # It writes all but the last answer without its first word, as some do with thoughts.
    changes = CHATML.replace(
        "{{ m.content }}<|im_end|>{% endgen",
        "{{ m.content if loop.last else m.content[9:] }}<|im_end|>{% endgen",
    )
    tokenizer = load_tokenizer(chatty)
    files = {"tokenizer.json": tokenizer.backend.to_str().encode()}
    tokenizer = Tokenizer(files | {"chat_template.jinja": changes.encode()})
    with pytest.raises(ValueError, match="must write message 2 in the same way whatever follows"):
        chat(tokenizer, TALK)
    assert chat(tokenizer, TALK[:3])[1].any()
    for name in ("add_generation_prompt", "continue_final_message"):
        with pytest.raises(ValueError, match=f"{name} is for a text that the model goes on with"):
            chat(tokenizer, TALK, **{name: False})
    with pytest.raises(ValueError, match="has no option 'documnts'"):
        chat(tokenizer, TALK, documnts=[])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PaddedPairs([], 2, start_token=1, end_token=2), "at least one .source, target"),
        (lambda: PaddedPairs([([1], [2], [3])], 2, start_token=1, end_token=2), "number 0 is"),
        (lambda: PaddedPairs([([1], [2]), ([], [3])], 2, start_token=1, end_token=2), "pair 1 has"),
        (lambda: PaddedPairs([([1], [2]), ([1.5], [3])], 2, start_token=1, end_token=2),
         "a source must be a row of ids, integers from 0 on; number 1 is"),
        (lambda: PaddedPairs([([1], [2, -1])], 2, start_token=1, end_token=2), "a target must be"),
        (lambda: PaddedPairs([([[1]], [2])], 2, start_token=1, end_token=2), "a source must be"),
        (lambda: PaddedPairs([([1], "ab")], 2, start_token=1, end_token=2), "a target must be"),
        (lambda: PaddedPairs([([1], [2])], 2, start_token=None, end_token=2), "start_token must"),
        (lambda: PaddedPairs([([1], [2])], 2, start_token=1, end_token=-2), "end_token must be an"),
        (lambda: PaddedPairs([([1], [2])], 2, start_token=1, end_token=2, buckets=0), "buckets"),
        (lambda: PaddedTexts([], 2), "at least one .ids, counts"),
        (lambda: PaddedTexts([([1, 2], [True])], 2), "one for each id; those of text 0"),
        (lambda: PaddedTexts([([1, 2], [0, 1])], 2), "counts must be booleans"),
        (lambda: PaddedTexts([([1, 2], [True, False])], 2), "text 0 has nothing to learn"),
        (lambda: answer([], [1], 2), "the prompt must have at least one token"),
        (lambda: answer([1], [0.5], 2), "a reply must be a row of ids"),
        (lambda: answer([True], [1], 2), "a prompt must be a row of ids"),
        (lambda: PackedDocuments(np.arange(9), 4, 2), "must say where its documents end"),
        (lambda: PackedDocuments([[1], [2]], 4, 2), "at least one document must have two"),
        (lambda: PackedDocuments([[1, 2], [0.5]], 4, 2), "document 1 must hold integer ids"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(make, message, no_shape_checker):
    with pytest.raises(ValueError, match=message):
        make()


# Hidden tokens.


def test_masks_are_berts():
    """80 % hidden, 10 % random, 10 % as they are, of 15 %; against transformers' collator too."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, 50, 60_001)
    source = MaskedTokens(
        Windows(text, 100, 32, seed=5), mask_token=4, vocab_size=50, special_tokens=[2, 3, 4]
    )
    batches = [source[i] for i in range(18)]
    true, shown, guess = (
        np.concatenate([b[k].ravel() for b in batches]) for k in ("targets", "tokens", "loss_mask")
    )
    ours = shares(true, shown, guess)
    assert not guess[np.isin(true, [2, 3, 4])].any() and (shown == true)[~guess].all()
    n = len(true)
    for share, want in zip(ours, (0.15 * 47 / 50, 0.8, 0.1 * 0.98, 0.1 * 1.02), strict=True):
        assert abs(share - want) < 5 * np.sqrt(want / (0.15 * n if want != ours[0] else n))
    theirs = shares(*bert_by_transformers(true.reshape(-1, 100)))
    assert np.abs(np.array(ours) - theirs).max() < 0.02


def shares(true, shown, guess):
    """How many are to be guessed, and of these hidden, replaced by another, and kept."""
    hidden, kept = shown[guess] == 4, (shown == true)[guess]
    return guess.mean(), hidden.mean(), (~hidden & ~kept).mean(), kept.mean()


def bert_by_transformers(true):
    transformers = pytest.importorskip("transformers")

    class Words:
        """As much of a tokenizer as the collator asks for."""

        mask_token_id, pad_token_id, mask_token = 4, 0, "[MASK]"

        def __len__(self):
            return 50

        def get_special_tokens_mask(self, ids, already_has_special_tokens):
            return [int(i in (2, 3, 4)) for i in ids]

    collator = transformers.DataCollatorForLanguageModeling(Words(), return_tensors="np", seed=1)
    collator.create_rng()
    shown, labels = collator.numpy_mask_tokens(true.copy())
    return true.ravel(), shown.ravel(), (labels != -100).ravel()


def test_padding_and_other_documents_are_never_guessed():
    source = MaskedTokens(
        PackedDocuments(documents_of([3, 9, 14, 2]), 20, 2), mask_token=0, vocab_size=99, rate=0.9
    )
    (batch,) = source.in_order()
    assert batch["loss_mask"].any() and not batch["loss_mask"][batch["positions"] < 0].any()
    assert batch.keys() == {"tokens", "targets", "loss_mask", "positions", "segment_ids"}
    padded = MaskedTokens(PaddedTexts(TEXTS, 4), mask_token=0, vocab_size=99, rate=0.9)
    for batch in padded.in_order():
        assert batch["loss_mask"].any() and not batch["loss_mask"][~batch["padding_mask"]].any()


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.15, 10.0)])
@pytest.mark.parametrize("length", [2, 7, 50, 129])
def test_spans_are_t5s(length, density, mean):
    """What is put together again is the text; lengths and spans are those of T5's own code."""
    text = np.random.default_rng(0).integers(3, 31000, 40 * length)
    windows = Windows(text, length, 6, seed=2)
    options = dict(end_token=1, noise_density=density, mean_span=mean)
    source = SpanCorruption(windows, SENTINELS, **options)
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean), 1)
    masks = []
    for i in range(5):
        batch, plain = source[i], windows[i]["tokens"]
        assert batch["src"].shape == (6, length - noise + spans + 1)
        assert batch["targets"].shape == batch["tgt"].shape == (6, noise + spans + 1)
        assert (batch["tgt"][:, 0] == 0).all()
        assert (batch["tgt"][:, 1:] == batch["targets"][:, :-1]).all()
        for src, targets, tokens in zip(batch["src"], batch["targets"], plain, strict=True):
            assert src[-1] == targets[-1] == 1
            assert src[src > 31999].tolist() == targets[targets > 31999].tolist()
            assert src[src > 31999].tolist() == list(SENTINELS[:spans])
            assert src[0] <= 31999 and targets[0] > 31999  # a text begins with something to read
            filled, hidden = fill_in(src[:-1], targets[:-1])
            assert filled == tokens.tolist()
            masks.append(hidden)
    assert len({tuple(mask) for mask in masks}) > 1 or spans == 1  # one is always the end


def fill_in(src, targets):
    """The text of a source and its target, and which of its tokens were hidden."""
    starts = np.flatnonzero(targets > 31999)
    assert len(starts) or not len(targets)
    spans = {targets[a]: targets[a + 1 : b].tolist()
             for a, b in zip(starts, [*starts, len(targets)][1:], strict=True)}  # fmt: skip
    assert all(spans.values())
    parts = [(spans[t], True) if t > 31999 else ([t], False) for t in src.tolist()]
    return sum((p for p, _ in parts), []), [h for p, h in parts for _ in p]


@quick
@given(
    st.integers(3, 300),
    st.integers(2, 40),
    st.integers(1, 7),
    st.floats(0.01, 0.99),
    st.floats(1, 12),
    st.integers(0, 2**40),
)
@example(11, 5, 3, 0.15, 3.0, 0)  # ten targets after 5 and 5 tokens: nothing is left
@example(12, 5, 3, 0.15, 3.0, 0)  # a last window of one token
@example(7, 2, 1, 0.15, 3.0, 0)
def test_no_row_asks_for_what_its_source_does_not_show(
    tokens, length, batch_size, density, mean, seed
):
    """Each sentinel of a target is in its source, in order, and the gaps filled make the text."""
    length = min(length, tokens - 1)
    windows = Windows(np.arange(3, 3 + tokens), length, batch_size, seed)
    options = dict(end_token=1, noise_density=density, mean_span=mean)
    source = SpanCorruption(windows, SENTINELS, **options)
    batches = list(source.in_order())
    for batch, plain in [
        *zip(batches, windows.in_order(), strict=True),
        *((source[i], windows[i]) for i in range(3)),
    ]:
        for src, tgt, targets, text in zip(
            batch["src"], batch["tgt"], batch["targets"], plain["tokens"], strict=True
        ):
            used = src[src > 31999].tolist()
            assert used == targets[targets > 31999].tolist() == list(SENTINELS[: len(used)])
            assert bool(used) == (len(text) > 1) and src[0] == text[0]
            assert src[-1] == targets[-1] == 1 and tgt.tolist() == [0, *targets[:-1]]
            assert fill_in(src[:-1], targets[:-1])[0] == text.tolist()
    read = sum((plain["tokens"].ravel().tolist() for plain in windows.in_order()), [])
    assert read == list(range(3, 2 + tokens))
    if batch_size % 2 == 0:  # the same rows, whichever process makes them
        parts = [list(source.shard(k, 2).in_order()) for k in range(2)]
        rows = Counter(str(row) for part in parts for batch in part for row in batch["targets"])
        assert rows == Counter(str(row) for batch in batches for row in batch["targets"])


def test_the_rest_of_a_text_may_be_a_single_token():
    """By hand: of 12 tokens, windows of 5 leave one before the last target."""
    source = SpanCorruption(Windows(np.arange(3, 15), 5, 2), SENTINELS, end_token=1)
    (*_, last) = source.in_order()
    assert {name: array.tolist() for name, array in last.items()} == {
        "src": [[13, 1]],
        "tgt": [[0]],
        "targets": [[1]],
    }


def test_lengths_are_those_of_the_flax_example():
    """As `compute_input_and_target_lengths` gives them for T5's own 512, and by its search."""
    assert SpanCorruption.text_length(512) == 568
    batch = SpanCorruption(Windows(np.arange(600), 568, 1), SENTINELS, end_token=1)[0]
    assert (batch["src"].shape[1], batch["targets"].shape[1]) == (512, 114)
    for length, density, mean in itertools.product((16, 61, 256), (0.15, 0.3), (3.0, 2.0)):

        def source_length(n, density=density, mean=mean):
            noise = int(round(n * density))
            return n - noise + int(round(noise / mean)) + 1

        n = length
        while source_length(n + 1) <= length:
            n += 1
        assert SpanCorruption.text_length(length, density, mean) == n


def test_all_places_of_spans_are_equally_likely():
    """Of 7 tokens, 3 in 2 spans: 2 ways to divide 3, times 3 to divide the 4 that stay."""
    source = SpanCorruption(
        Windows(np.arange(3, 4000), 7, 50), SENTINELS, end_token=1, noise_density=0.4, mean_span=2.0
    )
    found = Counter()
    for i in range(60):
        batch = source[i]
        for src, targets in zip(batch["src"], batch["targets"], strict=True):
            found[tuple(fill_in(src[:-1], targets[:-1])[1])] += 1
    expected(np.array(list(found.values())), degrees=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: MaskedTokens(w, mask_token=50, vocab_size=50), "an id from 0 to 49"),
        (lambda w: MaskedTokens(w, mask_token=1, vocab_size=50, special_tokens=[-1]), "got -1"),
        (lambda w: MaskedTokens(w, mask_token=1, vocab_size=50, rate=0.0), "rate must be"),
        (lambda w: MaskedTokens(w, mask_token=1, vocab_size=50, rate=1.0), "rate must be"),
        (lambda w: MaskedTokens([{"tokens": 1}], mask_token=1, vocab_size=5), "source of batches"),
        (lambda w: SpanCorruption(w, SENTINELS, end_token=1, mean_span=0.5), "mean_span must be"),
        (lambda w: SpanCorruption(w, SENTINELS, end_token=1, noise_density=1), "noise_density"),
        (lambda w: SpanCorruption(w, [9], end_token=1), "need 2 sentinels, all different; got 1"),
        (lambda w: SpanCorruption(w, [9, 9], end_token=1), "need 2 sentinels, all different; got"),
        (lambda w: SpanCorruption(w, [9, 8], end_token=None), "must be the id of a token"),
        (lambda w: SpanCorruption(PaddedTexts(TEXTS, 2), [9], end_token=1), "must be Windows"),
        (lambda w: SpanCorruption(Windows(np.arange(9), 1, 2), [9], end_token=1), "at least 2 tok"),
        (lambda w: SpanCorruption.text_length(0), "src_length must be"),
        (lambda w: SpanCorruption.text_length(2), "src_length must be at least 3"),
    ],
)  # fmt: skip
def test_what_cannot_hide_is_refused(make, message, no_shape_checker):
    with pytest.raises(ValueError, match=message):
        make(Windows(np.arange(100), 40, 2))


def test_changes_of_ones_own():
    class Upside(Changed):
        def change(self, batch, numbers):
            assert numbers.dtype == np.uint64
            return {"tokens": batch["tokens"][:, ::-1]}

    windows = open_tokens(np.arange(20)), 3, 4
    assert (Upside(Windows(*windows))[1]["tokens"] == Windows(*windows)[1]["tokens"][:, ::-1]).all()
    twice = Upside(Upside(Windows(*windows)))
    assert (twice[1]["tokens"] == Windows(*windows)[1]["tokens"]).all()
    assert (twice.shard(1, 2)[1]["tokens"] == twice[1]["tokens"][2:]).all()
    assert len(list(twice.in_order())) == len(list(Windows(*windows).in_order()))


def test_one_example_fills_a_batch_as_far_as_it_goes():
    pairs = PaddedPairs([([5, 6], [7])], 3, start_token=1, end_token=2)
    assert pairs[4]["src"].tolist().count([5, 6]) == 1
    assert pairs[4]["tgt_padding_mask"].sum() == 2
    texts = PaddedTexts([answer([5, 6], [7, 8], end_token=2)], 2)
    assert texts[0]["loss_mask"].sum() == 3
