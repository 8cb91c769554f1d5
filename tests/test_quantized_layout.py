"""Quantized matrices of a file, laid out as our weights by the rules of every kind of family."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from jaxformers import from_pretrained, merge  # noqa: E402
from jaxformers.files.hub import TensorFiles  # noqa: E402
from jaxformers.files.quantized_matrix import QuantizedMatrix  # noqa: E402
from jaxformers.hf import load  # noqa: E402
from jaxformers.quantization.quantized import Quantized  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
# A layout of each kind: separate maps, joined rows, joined heads, GPT-2's columns, experts, a pair.
NAMES = ("llama", "phi3", "gpt_neox", "falcon_grouped", "gpt2", "mixtral", "bloom", "t5", "bert")


class Integers(NamedTuple):
    """A tensor of a file that was quantized."""

    stored: QuantizedMatrix
    fits: bool

    @property
    def shape(self):
        return self.read().shape

    @property
    def dtype(self):
        return np.dtype(np.float32)

    def read(self):
        out, k = self.stored.scale.shape
        x = self.stored.integers.reshape(out, k, -1) * self.stored.scale[..., None]
        x = x if self.stored.offset is None else x + self.stored.offset[..., None]
        return self.stored.arrange(x.astype(np.float32).reshape(out, -1))

    def parts(self):
        return self.stored if self.fits else None


@pytest.fixture
def quantized_files(monkeypatch):
    """A function that makes all matrices of the files that are opened quantized."""

    def use(bits, groups, fits=True):
        rng = np.random.default_rng(0)

        def quantize(name, tensor):
            if len(tensor.shape) != 2:
                return tensor
            conv1d = ".c_" in name
            out, width = tensor.shape[::-1] if conv1d else tensor.shape
            scale = rng.random((out, groups), np.float32) / 50
            low, high = (-127, 128) if bits == 8 else (0, 16)
            kind = np.int8 if bits == 8 else np.uint8
            integers = rng.integers(low, high, (out, width)).astype(kind)
            offset = -8 * scale if bits == 4 else None
            turn = {"arrange": np.transpose} if conv1d else {}
            return Integers(QuantizedMatrix(integers, scale, offset, bits, **turn), fits)

        def open_files(directory, complete=True):
            files = TensorFiles(directory, complete)
            tensors = {name: quantize(name, files.find(name)) for name in files.names}
            return TensorFiles.of(directory, tensors)

        monkeypatch.setattr(load, "TensorFiles", open_files)

    return use


def is_quantized(x):
    return isinstance(x, Quantized)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_unpacked_tensors(name, bits, made, quantized_files):
    options = (bits, 2)
    quantized_files(*options)
    kept = from_pretrained(made(name), quantized=True)
    quantized_files(*options)
    plain = from_pretrained(made(name))
    found = [x for x in jax.tree.leaves(kept, is_leaf=is_quantized) if is_quantized(x)]
    assert {x.bits for x in found} == {bits}
    arrays = jax.tree.leaves_with_path(plain)
    matrices = [x for path, x in arrays if path[-1].name.startswith(("w", "router")) and x.ndim > 1]
    assert len(found) == len(matrices)
    for x, y in zip(jax.tree.leaves(merge(kept)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_computes_as_the_unpacked_model(made, quantized_files):
    tokens = jnp.array([[8, 9, 30, 12, 25]])
    outputs = []
    for quantized in (True, False):
        quantized_files(8, 1)
        outputs.append(from_pretrained(made("llama"), quantized=quantized).logits(tokens))
    np.testing.assert_allclose(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_shape_checker")
def test_what_is_not_kept(made, quantized_files):
    with pytest.raises(ValueError, match="(?s)quantized=True keeps.*jaxformers.quantize"):
        from_pretrained(made("llama"), quantized=True)
    with pytest.raises(ValueError, match="quantized must be True or False"):
        from_pretrained(made("llama"), quantized=8)
    quantized_files(8, 1, fits=False)
    with pytest.raises(ValueError, match="quantized=True keeps"):
        from_pretrained(made("llama"), quantized=True)
