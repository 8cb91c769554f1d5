"""Quantized GGUF files: unpacked as the `gguf` package unpacks them, or kept as they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import gguf_files  # noqa: E402
from hf_cases import LOCAL_GLOBAL, MAX, SPECIAL, TIED, V  # noqa: E402
from hf_checkpoints import randomize  # noqa: E402

from jaxformers import from_pretrained, merge  # noqa: E402
from jaxformers.files.gguf_blocks import KINDS, take_apart  # noqa: E402
from jaxformers.files.gguf_file import read_gguf  # noqa: E402
from jaxformers.quantization.quantized import Quantized  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

TYPES = gguf.GGMLQuantizationType
# What is unpacked by the package and never kept.
UNPACKED = ["IQ4_NL", "IQ4_XS", "IQ2_XXS", "TQ1_0", "MXFP4", "BF16", "F16", "F32"]
# Where float16 scales lie in a block.
SCALES = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "TQ1_0": (52,)},
}


def blocks(kind, shape, seed=0):
    """Bytes of random blocks whose scales are small numbers, some of them below 0."""
    rng = np.random.default_rng(seed)
    numbers, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    rows = rng.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), np.uint8)
    for at in SCALES.get(kind, ()):
        scale = (rng.normal(size=rows.shape[:-1]) * 0.01).astype(np.float16)
        rows[..., at : at + 2] = scale[..., None].view(np.uint8)
    if kind == "MXFP4":
        rows[..., 0] = rng.integers(118, 124, rows.shape[:-1])
    if kind in ("F32", "F16", "BF16"):
        floats = jnp.asarray(rng.normal(size=shape), kind.replace("F", "float").replace("B", "b"))
        return np.asarray(floats).view(np.uint8)
    return rows.reshape(*shape[:-1], -1)


def write_tensor(path, kind, shape):
    writer = gguf.GGUFWriter(path, "llama")
    content = blocks(kind, shape)
    content = content.view(np.float32) if kind == "F32" else content
    writer.add_tensor("x", content, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return content


@pytest.mark.parametrize("kind", [*KINDS, *UNPACKED])
def test_a_tensor_is_what_the_package_unpacks(kind, tmp_path):
    content = write_tensor(tmp_path / "x.gguf", kind, (7, 512))
    [tensor] = read_gguf(tmp_path / "x.gguf").tensors.values()
    got, wanted = tensor.read(), gguf.dequantize(content, TYPES[kind])
    assert tensor.shape == got.shape == (7, 512) and got.dtype == tensor.dtype
    assert np.isfinite(wanted).all() and len(np.unique(wanted)) > 20
    assert np.array_equal(got.astype(np.float32), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_taken_apart_are_what_the_package_unpacks(kind):
    rows = blocks(kind, (7, 512), seed=1)
    parts = take_apart(kind, rows)
    wanted = gguf.dequantize(rows, TYPES[kind])
    fields = (parts.integers, parts.scale, parts.offset)
    if parts.bits == 4:
        assert 0 <= parts.integers.min() and parts.integers.max() <= 15
        fields = (parts.integers[:, ::2] | parts.integers[:, 1::2] << 4, *fields[1:])
    weight = Quantized(*(x if x is None else jnp.asarray(x) for x in fields), bits=parts.bits)
    assert np.array_equal(weight.dense(), wanted.T)
    assert np.array_equal(jax.jit(lambda w: w.dense())(weight), wanted.T)


def test_other_blocks_are_not_taken_apart():
    assert all(take_apart(kind, blocks(kind, (2, 512))) is None for kind in UNPACKED)


def test_an_offset_beyond_float16(tmp_path):
    rows = blocks("Q4_0", (2, 32))
    rows[0, :2] = np.float16([30000]).view(np.uint8)
    parts = take_apart("Q4_0", rows)
    assert parts.offset.dtype == np.float32 and parts.offset[0, 0] == -240000


# Models.

SIZES = {"vocab_size": V, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96,
         "num_hidden_layers": 2, "max_position_embeddings": MAX}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"vocab_size": V, "n_positions": MAX, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}
MODELS = {
    "llama": ("llama", "LlamaForCausalLM", GROUPED),
    "gemma3": (
        "gemma3",
        "Gemma3ForCausalLM",
        GROUPED | LOCAL_GLOBAL | {"query_pre_attn_scalar": 16},
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", GROUPED | TIED | {"sliding_window": None}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "bert": ("bert", "BertModel", SIZES | {"type_vocab_size": 2}),
}


def write_model(directory, name, pack):
    """Writes the GGUF file of a case; `pack` is as in `gguf_files.write`."""
    architecture, cls, settings = MODELS[name]
    kind = getattr(transformers, cls)
    config = kind.config_class(**SPECIAL | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config, **gguf_files.BARE if cls == "BertModel" else {})
        randomize(model)
    model.save_pretrained(directory)
    gguf_files.write(directory, directory / "x.gguf", architecture, config, pack)
    (directory / "model.safetensors").unlink()
    return directory / "x.gguf"


def mixed(name, x):
    """Types as they are mixed in files: the widths here are multiples of 32."""
    if x.ndim < 2 or "position" in name or "types" in name:
        return TYPES.F32
    order = "token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"
    types = TYPES.Q8_0, TYPES.Q4_1, TYPES.Q4_0, TYPES.Q5_1, TYPES.Q5_0, TYPES.Q4_1
    return next((kind for part, kind in zip(order, types, strict=True) if part in name), TYPES.Q4_1)


def is_quantized(x):
    return isinstance(x, Quantized)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", MODELS)
def test_kept_is_what_is_unpacked(name, tmp_path):
    path = write_model(tmp_path, name, mixed)
    unpacked, kept = from_pretrained(path), from_pretrained(path, quantized=True)
    objects = [x for x in jax.tree.leaves(kept, is_leaf=is_quantized) if is_quantized(x)]
    matrices = [x for x in jax.tree.leaves(unpacked) if x.ndim > 1]
    tables = 2 if name == "bert" else 1 if name == "gpt2" else 0
    biases = len([x for x in matrices if x.shape in ((4, 16), (2, 16))])
    assert len(objects) == len(matrices) - tables - biases
    assert {x.bits for x in objects} == {4, 8}
    merged = merge(kept)
    assert jax.tree.structure(merged) == jax.tree.structure(unpacked)
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(unpacked), strict=True):
        assert np.array_equal(x, y)
    tokens = jnp.array([[8, 9, 30, 12, 25], [13, 14, 52, 44, 20]])
    np.testing.assert_allclose(kept(tokens), unpacked(tokens), atol=1e-4)


def test_the_layouts_of_unpacked_arrays(tmp_path):
    """Against the package's numbers, with llama.cpp's order of rows undone here once more."""
    path = write_model(tmp_path, "llama", mixed)
    model, reader = from_pretrained(path), gguf.GGUFReader(path)
    numbers = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in reader.tensors}
    layer = model.decoder.layers[1]
    assert np.array_equal(model.embedding.token_embedding.weight, numbers["token_embd.weight"])
    assert np.array_equal(layer.feed_forward.w_down, numbers["blk.1.ffn_down.weight"].T)
    value = numbers["blk.1.attn_v.weight"]
    assert np.array_equal(layer.self_attention.wv, value.T.reshape(64, 2, 16))
    pairs = numbers["blk.1.attn_q.weight"].reshape(4, 8, 2, 64)
    query = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(64, 64)
    assert np.array_equal(layer.self_attention.wq, query.T.reshape(64, 4, 16))


def test_blocks_of_256(tmp_path):
    """The K-quants, in a model whose rows they fill."""
    kinds = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_K", "Q6_K"]
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    wide = {"embedding_length": 256, "feed_forward_length": 256, "context_length": MAX}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    for key, value in {**wide, "block_count": 1, "attention.head_count": 4}.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        content = blocks(kind, (256, 256), seed=i)
        writer.add_tensor(f"blk.0.{name}.weight", content, raw_dtype=TYPES[kind])
        if name in names[:3]:
            writer.add_tensor(f"blk.0.{name}.bias", np.ones(256, np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.add_tensor("token_embd.weight", blocks("Q6_K", (V, 256)), raw_dtype=TYPES.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kept = from_pretrained(tmp_path, quantized=True)
    objects = [x for x in jax.tree.leaves(kept, is_leaf=is_quantized) if is_quantized(x)]
    assert [x.bits for x in objects].count(4) == 4 and len(objects) == 8
    unpacked = from_pretrained(tmp_path)
    for x, y in zip(jax.tree.leaves(merge(kept)), jax.tree.leaves(unpacked), strict=True):
        assert np.array_equal(x, y)


def test_types_and_greedy_tokens(tmp_path):
    """`dtype=` is the type that weights give, and tokens are those of the unpacked model."""
    path = write_model(tmp_path, "llama", mixed)
    kept = from_pretrained(path, quantized=True, dtype=jnp.bfloat16)
    wq = kept.decoder.layers[0].self_attention.wq
    assert wq.dtype == jnp.bfloat16 and wq.scale.dtype == jnp.float16
    unpacked = from_pretrained(path, dtype=jnp.bfloat16)
    assert np.array_equal(wq.dense(), unpacked.decoder.layers[0].self_attention.wq)
    prompt = jnp.array([[8, 9, 30]])
    kept, unpacked = (from_pretrained(path, quantized=x) for x in (True, False))
    assert np.array_equal(kept.generate(prompt, 8), unpacked.generate(prompt, 8))


def test_nothing_to_keep(tmp_path):
    path = write_model(tmp_path, "llama", None)
    with pytest.raises(ValueError, match="quantized=True keeps .* none whose layout is kept"):
        from_pretrained(path, quantized=True)


def test_sharded(tmp_path):
    path = write_model(tmp_path, "gpt2", mixed)
    device = jax.devices()[1]
    kept = from_pretrained(path, quantized=True, sharding=jax.sharding.SingleDeviceSharding(device))
    assert all(x.devices() == {device} for x in jax.tree.leaves(eqx.filter(kept, eqx.is_array)))
