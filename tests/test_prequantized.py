"""Checkpoints that were quantized before: every layout, number by number, and broken files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from hf_checkpoints import randomize  # noqa: E402
from quantized_files import KINDS, UNPACKED, quantize  # noqa: E402

from jaxformers import from_pretrained, merge  # noqa: E402
from jaxformers.files.hub import TensorFiles, write_tensors  # noqa: E402
from jaxformers.quantization.quantized import Quantized  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_shape_checker", "quick_compilation")
torch.set_num_threads(1)
TOKENS = np.array([[8, 9, 30, 12, 25, 33, 41, 50, 11]])
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small Llama whose matrices fit every layout."""
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        randomize(model)
    path = tmp_path_factory.mktemp("plain")
    model.save_pretrained(path)
    return path


def raises(*words):
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def is_quantized(x):
    return isinstance(x, Quantized)


def quantized_in(model):
    leaves = jax.tree.leaves(model, is_leaf=is_quantized)
    return [x for x in leaves if is_quantized(x)]


def assert_equal(model, other):
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.few(10)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_definition(kind, plain, tmp_path):
    expected = quantize(kind, plain, tmp_path / "made")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_bytes((plain / "config.json").read_bytes())
    listed = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in expected.items()]
    write_tensors(tmp_path / "dense", listed)
    dense = from_pretrained(tmp_path / "dense")
    assert_equal(from_pretrained(tmp_path / "made"), dense)
    if any(word in kind for word in UNPACKED):
        with raises("quantized=True", "jaxformers.quantize"):
            from_pretrained(tmp_path / "made", quantized=True)
        return
    kept = from_pretrained(tmp_path / "made", quantized=True)
    assert len(quantized_in(kept)) == 7
    assert {x.bits for x in quantized_in(kept)} == {8 if "8" in kind else 4}
    no_offset = kind in ("int8", "int8, one scale", "gptq 8 bits")
    assert no_offset == all(x.offset is None for x in quantized_in(kept))
    # A product with a scale of 16 bits is exact in float32, and so is its sum with the offset.
    bound = 1e-6 if kind == "int8, zero points" else 0.0
    for x, y in zip(jax.tree.leaves(merge(kept)), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=bound)


def test_what_is_kept_computes_and_is_saved(plain, tmp_path):
    quantize("awq", plain, tmp_path / "made")
    kept, dense = (from_pretrained(tmp_path / "made", quantized=x) for x in (True, False))
    np.testing.assert_allclose(kept.logits(TOKENS), dense.logits(TOKENS), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(kept.generate(TOKENS, 6), dense.generate(TOKENS, 6))
    kept.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert_equal(from_pretrained(tmp_path / "saved"), dense)
    half = from_pretrained(tmp_path / "made", quantized=True, dtype=jnp.bfloat16)
    assert {x.dtype for x in quantized_in(half)} == {np.dtype(jnp.bfloat16)}
    assert {x.scale.dtype for x in quantized_in(half)} == {np.dtype(np.float16)}


def test_unpacked_weights_have_the_type_of_the_others(plain, tmp_path):
    def halve(tensors):
        for name, x in tensors.items():
            if x.dtype == np.float32:
                tensors[name] = x.astype(jnp.bfloat16)

    quantize("packed", plain, tmp_path / "made", halve)
    assert {x.dtype for x in jax.tree.leaves(from_pretrained(tmp_path / "made"))} == {
        np.dtype(jnp.bfloat16)
    }
    wide = from_pretrained(tmp_path / "made", dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype(np.float32)}


def test_modules_that_were_left_out_are_plain(plain, tmp_path):
    whole = TensorFiles(plain).read(f"{Q_PROJ}.weight")

    def restore(tensors):
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{Q_PROJ}.{part}"]
        tensors[f"{Q_PROJ}.weight"] = whole

    quantize("awq", plain, tmp_path / "made", restore, modules_to_not_convert=["q_proj"])
    kept = from_pretrained(tmp_path / "made", quantized=True)
    assert len(quantized_in(kept)) == 6
    wq = kept.decoder.layers[0].self_attention.wq
    np.testing.assert_array_equal(wq.reshape(32, -1).T, whole)


def test_biases_of_zero_beside_maps_without_one(plain, tmp_path):
    def add(tensors):
        tensors[f"{Q_PROJ}.bias"] = np.full(32, value, np.float16)

    value = 0
    quantize("gptq", plain, tmp_path / "made", add)
    assert from_pretrained(tmp_path / "made").decoder.layers[0].self_attention.bq is None
    value = 1
    quantize("gptq", plain, tmp_path / "other", add)
    with raises("surplus", "q_proj.bias"):
        from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("kind", ["gptq", "gptq in another order"])
def test_maps_that_the_family_stores_as_in_by_out(kind, tmp_path):
    """GPT-2 stores `(in, out)`, GPTQ packs every map as `(out, in)`; one map is square."""
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=20, n_embd=32, n_layer=1, n_head=4, n_inner=96
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")

    def turn(tensors):
        for name in [x for x in tensors if ".c_" in x and x.endswith(".weight")]:
            tensors[name] = tensors[name].T

    def rewrite(path, edit):
        files = TensorFiles(path)
        tensors = {name: files.read(name) for name in files.names}
        edit(tensors)
        listed = [(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()]
        write_tensors(path, listed)

    rewrite(tmp_path / "plain", turn)

    def restore(tensors):
        for name in [x for x in tensors if ".wte." in x or ".wpe." in x]:
            del tensors[name]
        for name in ("transformer.wte.weight", "transformer.wpe.weight"):
            tensors[name] = files.read(name)

    files = TensorFiles(tmp_path / "plain")
    expected = quantize(kind, tmp_path / "plain", tmp_path / "made", restore)
    model = from_pretrained(tmp_path / "made")
    out = model.decoder.layers[0].self_attention.wo
    [name] = (x for x in expected if x.endswith("attn.c_proj.weight"))
    np.testing.assert_array_equal(out.reshape(32, 32), expected[name].T)
    if kind == "gptq":
        assert_equal(merge(from_pretrained(tmp_path / "made", quantized=True)), model)


# What others make of the same files.


# Without the order of groups, which compressed-tensors has removed.
COMPRESSED = [kind for kind in KINDS if kind.startswith(("packed", "int8", "float8", "mxfp4"))]


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSED if "order" not in kind])
def test_compressed_tensors_reads_the_same(kind, plain, tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    expected = quantize(kind, plain, tmp_path / "made")
    config = json.loads((tmp_path / "made/config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    tensors = safetensors_torch(tmp_path / "made")
    for name in (x for x in expected if "proj" in x):
        module = name.removesuffix("weight")
        parts = {x.removeprefix(module): y for x, y in tensors.items() if x.startswith(module)}
        parts["weight_scale"] = to_float32(parts["weight_scale"])
        weight = compressor.decompress(parts, scheme)["weight"]
        np.testing.assert_array_equal(weight.float().numpy(), expected[name], err_msg=name)


def safetensors_torch(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def to_float32(x):
    """The scales in float32, so that nothing is rounded; exponents stay as they are."""
    return x if x.dtype == torch.uint8 else x.float()


def test_transformers_reads_8_bit_floats_as_the_same(plain, tmp_path):
    expected = quantize(
        "fp8", plain, tmp_path / "made", modules_to_not_convert=["lm_head"], dequantize=True
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "made", dtype="float32")
    for name, x in theirs.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), expected[name], err_msg=name)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    mine = from_pretrained(tmp_path / "made").logits(TOKENS)
    np.testing.assert_allclose(mine, logits, atol=1e-4, rtol=1e-4)


# What is refused.


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("gptq", {"bits": 3}, "bits of quantization_config must be 4 or 8 .*got 3"),
        ("gptq", {"bits": True}, "bits .*got True"),
        ("gptq", {"bits": 8}, "scales must be of the shape"),
        ("gptq", {"group_size": 0}, "group_size .*got 0"),
        ("gptq", {"group_size": 10**30}, "group_size .*got 1000"),
        ("gptq", {"group_size": "x"}, "group_size .*got 'x'"),
        ("gptq", {"group_size": 8}, "scales must be of the shape \\(12, 32\\)"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format .*got 'marlin'"),
        ("gptq", {"dynamic": {"-:.*": {}}}, "dynamic .* is not read"),
        ("awq", {"version": "gemv"}, "version .*must be 'gemm'.*got 'gemv'"),
        ("awq", {"bits": 8}, "bits .*must be 4 .*got 8"),
        ("awq", {"group_size": 40}, "qweight must be of inputs in groups of 40"),
        ("packed", {"format": "nvfp4-pack-quantized"}, "format .*got 'nvfp4-pack-quantized'"),
        ("packed", {"quantization_status": "frozen"}, "quantization_status .*got 'frozen'"),
        ("packed", {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
        ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("packed", {"config_groups": []}, "config_groups must be an object"),
        ("packed", {"config_groups": {"a": {"weights": {"num_bits": 3}}}}, "num_bits .*got 3"),
        ("packed", {"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "weight_shape must be"),
        ("packed", {"config_groups": {"a": {"weights": {"num_bits": 4}}}}, "weight_scale must be"),
        ("fp8", {"fmt": "e5m2"}, "fmt .*got 'e5m2'"),
        ("fp8", {"weight_block_size": [0, 16]}, "weight_block_size .*two integers"),
        ("fp8", {"weight_block_size": [8, 8]}, "weight_scale_inv must be of the shape \\(4, 12\\)"),
        ("fp8", {"weight_block_size": None}, "weight_scale_inv must be of the shape"),
        ("awq", {"quant_method": "bitsandbytes"}, "by bitsandbytes, which is not read .read are"),
        ("awq", {"quant_method": "mxfp4"}, "by mxfp4, which is not read"),
        ("awq", {"quant_method": ["awq"]}, "which is not read"),
        ("awq", {"quant_method": "fp8"}, "qweight|surplus|weight_scale_inv"),
    ],
)
def test_settings_that_are_not_read(kind, settings, words, plain, tmp_path):
    quantize(kind, plain, tmp_path / "made", **settings)
    with raises(words):
        from_pretrained(tmp_path / "made")


def change(part, change_it):
    def edit(tensors):
        x = tensors.pop(f"{Q_PROJ}.{part}")
        x = change_it(x)
        if x is not None:
            tensors[f"{Q_PROJ}.{part}"] = np.ascontiguousarray(x)

    return edit


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        ("gptq", change("scales", lambda x: None), "q_proj' has no tensor scales"),
        ("gptq", change("qzeros", lambda x: None), "q_proj' has no tensor qzeros"),
        ("gptq", change("qweight", lambda x: None), "q_proj' has a tensor (qzeros|scales|g_idx)"),
        ("gptq", change("scales", lambda x: x[:1]), "scales must be of the shape \\(2, 32\\)"),
        (
            "gptq",
            change("scales", lambda x: x * np.nan),
            "q_proj.weight holds numbers that are NaN",
        ),
        ("gptq", change("qzeros", lambda x: x[:, :2]), "qzeros must be of the shape"),
        ("gptq", change("qweight", lambda x: x.astype(np.int64)), "qweight must be of int32"),
        ("gptq", change("qweight", lambda x: x[0]), "qweight must be of 2 axes"),
        (
            "gptq",
            change("qweight", lambda x: x[:0]),
            "qweight must be of 2 axes that are not empty",
        ),
        ("gptq", change("g_idx", lambda x: x + 5), "g_idx must be of groups from 0 to 1"),
        ("gptq", change("g_idx", lambda x: x - 1), "g_idx must be of groups from 0 to 1"),
        ("awq", change("qweight", lambda x: x[:16]), "shape than config.json says.*q_proj|qzeros"),
        ("awq", change("qzeros", lambda x: x[:1]), "qzeros must be of the shape"),
        ("packed", change("weight_shape", lambda x: x * 2), "weight_shape must be"),
        ("packed", change("weight_shape", lambda x: -x), "weight_shape must be"),
        ("packed", change("weight_shape", lambda x: x * 2**40), "weight_shape must be"),
        ("packed", change("weight_scale", lambda x: None), "q_proj' has a tensor weight_"),
        ("packed", change("weight_scale", lambda x: x[:7]), "weight_scale must be of a grid"),
        ("packed", change("weight_packed", lambda x: x.view(np.int8)), "weight_packed must be of"),
        ("packed, zero points", change("weight_zero_point", lambda x: x[:1]), "of the shape"),
        ("int8", change("weight_scale", lambda x: None), "q_proj' has a tensor weight"),
        ("int8", change("weight", lambda x: x.astype(np.int16)), "weight must be of int8"),
        ("int8", change("weight", lambda x: None), "q_proj' has no tensor weight"),
        ("mxfp4", change("weight_scale", lambda x: x | 255), "NaN or infinite"),
        ("mxfp4", change("weight_scale", lambda x: x[:, :0]), "weight_scale must be of"),
        ("fp8", change("weight_scale_inv", lambda x: None), "none that is weight_scale_inv"),
        ("fp8", change("weight", lambda x: x.astype(np.float32)), "weight must be of float8_e4m3"),
        ("fp8", change("weight_scale_inv", lambda x: x[0]), "weight_scale_inv must be of"),
    ],
)
def test_broken_files(kind, edit, words, plain, tmp_path):
    quantize(kind, plain, tmp_path / "made", edit)
    for quantized in (False, True):
        with raises(words if not quantized else f"{words}|quantized=True"):
            from_pretrained(tmp_path / "made", quantized=quantized)


def test_a_config_that_speaks_of_others(plain, tmp_path):
    path = tmp_path / "made"
    quantize("gptq", plain, path)
    config = json.loads((path / "config.json").read_text())
    listed = TensorFiles(plain)
    tensors = [
        (n, listed.shape(n), listed.dtype(n), lambda n=n: listed.read(n)) for n in listed.names
    ]
    write_tensors(path, tensors)
    with raises("quantized by gptq", "no module", "qweight", "remove this entry"):
        from_pretrained(path)
    del config["quantization_config"]
    quantize("gptq", plain, tmp_path / "silent")
    (tmp_path / "silent/config.json").write_text(json.dumps(config))
    with raises("surplus", "qweight"):
        from_pretrained(tmp_path / "silent")
