"""GGUF files: the same models as the checkpoints that they were made of."""

import equinox as eqx
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import gguf_files  # noqa: E402
import tokenizers  # noqa: E402

from jaxformers import TransformerLM, from_pretrained, load_tokenizer  # noqa: E402
from jaxformers.hf.load import with_origin  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A function that gives the directory and the GGUF file of a case, which are made once."""
    known = {}

    def paths(name):
        if name not in known:
            directory = tmp_path_factory.mktemp(name)
            known[name] = directory, gguf_files.make(name, directory)
        return known[name]

    return paths


def assert_same(got, wanted, close=False):
    """The same structure, which includes every option, and the same arrays."""
    got = with_origin(got, wanted.origin)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    for (path, x), y in leaves:
        norm = close and "norm" in jax.tree_util.keystr(path)
        assert np.allclose(x, y, atol=1e-6) if norm else np.array_equal(x, y), path


@pytest.mark.parametrize("name", gguf_files.CASES)
def test_the_model_is_that_of_the_checkpoint(name, files):
    directory, path = files(name)
    got, wanted = from_pretrained(path), from_pretrained(directory)
    # One is added to Gemma's gains and taken away again.
    assert_same(got, wanted, close=name.startswith("gemma"))
    special = got.origin.special_tokens
    if not name.startswith(("bert", "nomic")):
        assert special.start_token == 1 and special.end_token == (7,) and special.pad_token == 3


def test_a_directory_with_one_file(files):
    _, path = files("llama")
    got = TransformerLM.from_pretrained(path.parent, dtype=jax.numpy.bfloat16)
    assert eqx.filter(got, eqx.is_array).output.w.dtype == jax.numpy.bfloat16


def test_it_is_saved_as_a_checkpoint(files, tmp_path):
    """With the tokenizer of the file, or a warning that it has none."""
    _, path = files("llama_llama3")
    model = from_pretrained(path)
    with pytest.warns(UserWarning, match="gets no tokenizer: .*tokenizer.ggml.model must be"):
        model.save_pretrained(tmp_path / "a")
    assert_same(from_pretrained(tmp_path / "a"), model)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:61]

    def add_tokenizer(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(alphabet)

    gguf_files.write(
        files("gpt2")[0], tmp_path / "x.gguf", *gguf_files.of("gpt2"), None, add_tokenizer
    )
    from_pretrained(tmp_path / "x.gguf").save_pretrained(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").vocab_size == 61
    assert load_tokenizer(tmp_path / "b").end_token == 7
