"""What is taken for token ids: arrays of any library, rows of any length; what is not, and why."""

from collections import UserDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import KEY, MAX, V, make_lm, make_seq2seq, prompt_of

from jaxformers import RotaryPositionalEncoding, TransformerEncoder, perplexity
from jaxformers.ids import as_ids

LENGTHS = (5, 2, 3)
ROWS = [prompt_of(length, seed=length).tolist() for length in LENGTHS]
PADDED = np.array([[0] * (5 - len(row)) + row for row in ROWS])
REAL = np.arange(5) >= 5 - np.array(LENGTHS)[:, None]


def torch_rows():
    torch = pytest.importorskip("torch")
    return [torch.tensor(row) for row in ROWS]


def object_array():
    rows = np.empty(3, object)
    rows[:] = [np.array(row) for row in ROWS]
    return rows


WAYS = {
    "lists": lambda: ROWS,
    "tuples": lambda: tuple(map(tuple, ROWS)),
    "numpy": lambda: [np.array(row) for row in ROWS],
    "jax": lambda: [jnp.array(row) for row in ROWS],
    "mixed": lambda: [jnp.array(ROWS[0]), np.array(ROWS[1]), ROWS[2]],
    "integers of many types": lambda: [
        np.array(row, dtype)
        for row, dtype in zip(ROWS, (np.uint64, np.int8, np.uint16), strict=True)
    ],
    "arrays of an array": object_array,
    "torch": torch_rows,
}


@pytest.fixture(scope="module")
def lm():
    return make_lm(position=RotaryPositionalEncoding())


@pytest.fixture(scope="module")
def seq2seq():
    return make_seq2seq()


@pytest.mark.few(3)
@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_any_arrays(lm, seq2seq, way):
    rows, real = WAYS[way](), {"padding_mask": REAL}
    np.testing.assert_array_equal(lm.generate(rows, 3), lm.generate(PADDED, 3, **real))
    np.testing.assert_array_equal(lm.score(rows), lm.score(PADDED, REAL))
    np.testing.assert_array_equal(list(lm.stream(rows, 3)), lm.generate(PADDED, 3, **real)[:, 5:].T)
    np.testing.assert_array_equal(
        lm.generate(rows, 3, draft_model=lm), lm.generate(PADDED, 3, **real)
    )
    rows, source = [row % 29 for row in map(np.asarray, rows)], PADDED % 29
    wanted = seq2seq.generate(source, 4, 0, src_padding_mask=REAL)
    np.testing.assert_array_equal(seq2seq.generate(rows, 4, 0), wanted)
    np.testing.assert_array_equal(
        seq2seq.score(rows, rows), seq2seq.score(source, source, REAL, REAL)
    )


def test_rows_of_one_length_are_an_array(lm):
    rows = [ROWS[0], ROWS[0][::-1]]
    for given in (
        [jnp.array(row) for row in rows],
        (np.array(rows[0], np.uint64), np.array(rows[1], np.int64)),
        [np.array(rows[0]), jnp.array(rows[1])],
    ):
        np.testing.assert_array_equal(as_ids(given, "tokens"), rows)
        np.testing.assert_array_equal(lm.generate(given, 2), lm.generate(np.array(rows), 2))
    one = [np.uint64(5), jnp.int32(6), 7]
    np.testing.assert_array_equal(lm.generate(one, 2), lm.generate(np.array([5, 6, 7]), 2))
    assert perplexity(lm, [jnp.array(row) for row in rows]) == perplexity(lm, np.array(rows))


def test_rows_under_jit(lm):
    rows = [jnp.array(row) for row in ROWS]
    got = jax.jit(lambda rows: lm.generate(rows, 3))(rows)
    np.testing.assert_array_equal(got, lm.generate(ROWS, 3))
    assert as_ids([1, 2], "x").dtype.kind == "i"


def test_rows_say_what_they_lack(lm, no_shape_checker):
    with pytest.raises(ValueError, match="tgt_padding_mask must be left out where tgt is a list"):
        make_seq2seq().score([[1, 2]], [[1], [2, 3]], None, np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"rows with one axis each, .* the shape \(1, 3\)"):
        lm.generate([np.ones((1, 3), int), np.ones((1, 2), int)], 3)
    with pytest.raises(ValueError, match="rectangular array"):
        lm([[1, 2], [3]])
    with pytest.raises(ValueError, match="at least one real token in every row"):
        lm.generate([[1, 2], []], 3)
    with pytest.raises(ValueError, match="a list with a mask in it"):
        lm.generate([np.array([1, 2]), np.array([True, False])], 3)


class Encoding:
    """As fast tokenizers return it."""

    ids = [1, 2]


NO_IDS = {
    "text": (["hello", b"hello", ["hello", "you"], [["a", "b"]], [1, "a"], np.array("hello"),
              np.array(["a"]), [np.array(["a", "b"]), [1]], [b"a"], ""],
             "got dtype .*the text b?'.*load_tokenizer.*tokenizer.encode"),
    "what a tokenizer returns": (
        [{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, UserDict(input_ids=[1, 2]),
         [{"input_ids": [1]}]],
        r'got a (dict|UserDict).*=x\["input_ids"\], padding_mask='),
    "floats": ([[1.0, 2.0], np.ones(3), jnp.ones(3), [[1.0], [2.0, 3.0]], [1, 2.5]],
               r"got dtype float(32|64).*np.asarray\(x\).astype\(int\)"),
    "a mask": ([np.array([True, False])], "got dtype bool. Pass .* as padding_mask="),
    "nothing of the kind": ([None, [1, None], Encoding(), [Encoding()], map(int, "12")],
                            "got dtype object, with .* of type (NoneType|Encoding|map)"),
    "large numbers": ([[2**80, 1]], "got dtype object"),
}  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", NO_IDS)
def test_what_is_no_ids_says_what_to_do(lm, seq2seq, kind, no_shape_checker):
    given, message = NO_IDS[kind]
    encoder = TransformerEncoder(V, 8, 2, 1, 16, key=KEY)
    for x in given:
        for name, call in {
            "prompt": lambda: lm.generate(x, 3),  # noqa: B023
            "tokens": lambda: lm.score(x),  # noqa: B023
            "src": lambda: seq2seq.generate(x, 4, 0),  # noqa: B023
        }.items():
            with pytest.raises(ValueError, match=f"^{name} must .*({message})"):
                call()
        for call in (lm, encoder.embed, lambda x: perplexity(lm, x), lambda x: lm.stream(x, 3)):
            with pytest.raises(ValueError, match=message):
                call(x)


def test_tensors_on_another_device_say_so(lm, no_shape_checker):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="prompt must be token ids, got a Tensor"):
        lm.generate(torch.ones(3, dtype=torch.int64, device="meta"), 3)


# Padding takes no room.


WIDE = MAX + 9  # columns, of which few are tokens


def test_columns_of_padding_do_not_count():
    """A table of 32 positions, and 41 columns."""
    lm, seq2seq = make_lm(learnable_pos=True), make_seq2seq(learnable_pos=True)
    encoder = TransformerEncoder(V, 8, 2, 1, 16, MAX, learnable_pos=True, key=KEY)
    tokens = np.zeros((2, WIDE), int)
    tokens[0, -7:], tokens[1, 3:8] = prompt_of(7, seed=1) % 29, prompt_of(5, seed=2) % 29
    real = np.zeros((2, WIDE), bool)
    real[0, -7:] = real[1, 3:8] = True
    rows = [tokens[0, -7:], tokens[1, 3:8]]
    padded = {"padding_mask": real}
    np.testing.assert_array_equal(
        lm.generate(tokens, 6, **padded)[:, WIDE:], lm.generate(rows, 6)[:, 7:]
    )
    jitted = jax.jit(lambda tokens, real: lm(tokens, padding_mask=real))
    arrays, close = (jnp.asarray(tokens), jnp.asarray(real)), {"rtol": 1e-5, "atol": 1e-5}
    outputs = {
        "score": (lm.score(tokens, real), lm.score),
        "eager": (lm(arrays[0], padding_mask=arrays[1]), lm),
        "jitted": (jitted(*arrays), lm),
    }
    for i, row in enumerate(map(jnp.asarray, rows)):
        for got, wanted in outputs.values():
            np.testing.assert_allclose(got[i][real[i]], wanted(row), **close)
        np.testing.assert_allclose(encoder.embed(*arrays)[i], encoder.embed(row), **close)
    wanted = seq2seq.generate(rows, 5, 0)
    np.testing.assert_array_equal(seq2seq.generate(tokens, 5, 0, src_padding_mask=real), wanted)
    np.testing.assert_allclose(
        seq2seq.score(tokens, tokens, real, real)[0][real[0]], seq2seq.score(rows[0], rows[0]),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_tokens_beyond_the_table_are_refused_wherever_they_stand(no_shape_checker):
    lm, seq2seq = make_lm(learnable_pos=True), make_seq2seq(learnable_pos=True)
    tokens = np.ones((2, WIDE), int)
    real = np.arange(WIDE) >= np.array([[WIDE - MAX - 1], [WIDE - 2]])
    for call in (
        lambda: lm.score(tokens, real),
        lambda: lm(tokens, padding_mask=real),
        lambda: lm.generate(tokens, 1, padding_mask=real),
        lambda: seq2seq.generate(tokens, 4, 0, src_padding_mask=real),
        lambda: seq2seq.score(tokens[:, :3], tokens, None, real),
    ):
        with pytest.raises(ValueError, match=f"max_seq_length = {MAX}.* {MAX + 1}"):
            call()
    jitted = jax.jit(lambda tokens, real: lm(tokens, padding_mask=real))
    with pytest.raises(Exception, match=f"more tokens than max_seq_length = {MAX}"):
        jax.block_until_ready(jitted(tokens, real))
