"""GGUF files that are wrong, by malice or by mistake.

Whatever a file says, reading it ends with a `ValueError` that names the file, or with the tensors
that the `gguf` package reads: quickly, and without memory for what the file has not.
"""

import random
import struct
import sys

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from jaxformers import from_pretrained, load_tokenizer  # noqa: E402
from jaxformers.files.gguf_file import read_gguf  # noqa: E402
from jaxformers.hf.gguf.checkpoint import open_gguf  # noqa: E402

U8, BOOL, STRING, ARRAY, U32, F32 = 0, 7, 8, 9, 4, 6
DATA = bytes(range(32)) * 3


def text(x):
    x = x if isinstance(x, bytes) else x.encode()
    return struct.pack("<Q", len(x)) + x


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def number(x):
    return struct.pack("<I", x)


def tensor(name, shape, kind=0, offset=0):
    """The entry of a tensor whose shape is in the order of the file, the longest rows first."""
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


NAME = entry("general.architecture", STRING, text("llama"))
KEYS = [NAME, entry("llama.block_count", U32, number(2))]
TENSORS = [tensor("a", (4, 2)), tensor("b", (16,), 1, 32)]


def raw(keys=KEYS, tensors=TENSORS, data=DATA, version=3, counts=None):
    """A file, of which any part may be wrong; `counts` are those in the header."""
    counts = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data


def more(*keys):
    return raw(keys=[*KEYS, *keys])


def array(kind, count, content=b""):
    return struct.pack("<IQ", kind, count) + content


BIG = 2**63 + 5
FILES = {
    "empty": (b"", "no GGUF file"),
    "the magic alone": (b"GGUF", "no GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(99), "no GGUF file.* pickle"),
    "web page": (b"<html>" + bytes(99), "a web page"),
    "version 1": (raw(version=1), "version is 1, and only 2 and 3"),
    "version 4": (raw(version=4), "version is 4, and only 2 and 3"),
    "big-endian": (raw(version=3 << 24), "big-endian. gguf-convert-endian"),
    "2**63 keys": (raw(counts=(2, BIG)), f"announces {BIG} keys"),
    "2**63 tensors": (raw(counts=(BIG, 2)), f"announces {BIG} tensors"),
    "one key more": (raw(counts=(2, 3)), "truncated|unknown type|bytes of a name|comes twice"),
    "one tensor more": (raw(counts=(3, 2)), "axes|truncated|bytes"),
    "a name of 2**63 bytes": (more(struct.pack("<Q", BIG)), f"announces {BIG} bytes of a name"),
    "a name of 1 MB": (more(entry("x" * 2**20, U8, b"1")), "1048576 bytes of a name"),
    "a name not in UTF-8": (more(entry(b"\xff", U8, b"1")), "a name is no text in UTF-8"),
    "a text of 2**63 bytes": (
        more(entry("x", STRING, struct.pack("<Q", BIG))),
        f"{BIG} bytes of the value of 'x'",
    ),
    "a text not in UTF-8": (more(entry("x", STRING, text(b"\xff"))), "value of 'x' is no text"),
    "an unknown type": (more(entry("x", 13, b"")), "value of 'x' has the unknown type 13"),
    "a boolean of 2": (more(entry("x", BOOL, b"\2")), "must be 0 or 1 .*got 2"),
    "2**63 numbers": (more(entry("x", ARRAY, array(U8, BIG))), f"{BIG} numbers in the value"),
    "2**63 texts": (more(entry("x", ARRAY, array(STRING, BIG))), f"{BIG} strings in the value"),
    "more numbers than bytes": (
        more(entry("x", ARRAY, array(F32, 2**20, bytes(64)))),
        "1048576 numbers in the value",
    ),
    "an array of arrays": (
        more(entry("x", ARRAY, array(ARRAY, 1, array(U8, 1, b"1")))),
        "arrays within an array",
    ),
    "arrays without end": (more(entry("x", ARRAY, array(ARRAY, 1) * 999)), "arrays within an ar"),
    "an array of an unknown type": (more(entry("x", ARRAY, array(99, 1))), "unknown type 99"),
    "a key twice": (more(NAME), "'general.architecture' comes twice"),
    "a tensor twice": (raw(tensors=[TENSORS[0], TENSORS[0]]), "'a' comes twice"),
    "no axes": (raw(tensors=[tensor("a", ())]), "1 to 8 axes, got 0"),
    "many axes": (raw(tensors=[tensor("a", (1,) * 9)]), "1 to 8 axes, got 9"),
    "4 billion axes": (
        raw(tensors=[text("a") + number(2**32 - 1) + bytes(24)]),
        "1 to 8 axes, got 4294967295",
    ),
    "a size of 0": (raw(tensors=[tensor("a", (4, 0))]), "absurd shape"),
    "a huge size": (raw(tensors=[tensor("a", (2**61,))]), "absurd shape"),
    "sizes that overflow to fit": (raw(tensors=[tensor("a", (2**32, 2**32))]), "absurd shape"),
    "a size beyond the file": (
        raw(tensors=[tensor("a", (2**40,))]),
        "'a' ends at byte .*truncated",
    ),
    "an unknown type of tensors": (raw(tensors=[tensor("a", (32,), 999)]), "has the type 999"),
    "a removed type of tensors": (raw(tensors=[tensor("a", (32,), 4)]), "has the type 4"),
    "rows that blocks do not fill": (
        raw(tensors=[tensor("a", (33,), 2)]),
        "Q4_0 has rows of 33 numbers, which blocks of 32 do not fill",
    ),
    "an offset beyond the file": (raw(tensors=[tensor("a", (4,), 0, 96)]), "ends at byte"),
    "a huge offset": (raw(tensors=[tensor("a", (4,), 0, 2**64 - 32)]), "ends at byte"),
    "an odd offset": (raw(tensors=[tensor("a", (4,), 0, 33)]), "must be a multiple of 32"),
    "an overlap": (raw(tensors=[TENSORS[0], tensor("b", (16,))]), "not before 32, where"),
    "one byte missing": (raw(data=DATA[:63]), "truncated: download it again"),
    "no data": (raw(data=b""), "truncated"),
    "alignment 0": (more(entry("general.alignment", U32, number(0))), "a power of two, got 0"),
    "alignment 24": (more(entry("general.alignment", U32, number(24))), "a power of two, got 24"),
    "alignment as text": (more(entry("general.alignment", STRING, text("32"))), "a power of two"),
}


def test_the_file_that_the_hostile_ones_vary(tmp_path):
    (tmp_path / "x.gguf").write_bytes(raw())
    file = read_gguf(tmp_path / "x.gguf")
    assert file.metadata == {"general.architecture": "llama", "llama.block_count": 2}
    assert file.tensors["a"].shape == (2, 4) and file.tensors["b"].dtype == np.float16
    assert file.tensors["a"].read().tobytes() + file.tensors["b"].read().tobytes() == DATA[:64]


@pytest.mark.parametrize("name", FILES)
def test_hostile_file(tmp_path, name, small_memory):
    content, message = FILES[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for read in (read_gguf, from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match=rf"(?s)x\.gguf.*({message})") as caught:
            read(path)
        assert len(str(caught.value)) < 1500


def test_limits(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(more(entry("x", ARRAY, array(STRING, 9, text("a") * 9))))
    assert read_gguf(path).metadata["x"] == ["a"] * 9
    for name in ("MAX_STRINGS", "MAX_KEYS", "MAX_TENSORS"):
        with monkeypatch.context() as changed:
            changed.setattr(f"jaxformers.files.gguf_file.{name}", 1)
            with pytest.raises(ValueError, match="announces . (strings|keys|tensors).*at most 1 "):
                read_gguf(path)


SIZES = {
    **{"context_length": 40, "embedding_length": 24, "block_count": 1, "feed_forward_length": 34},
    **{"attention.head_count": 6, "attention.head_count_kv": 2},
}


def small_model(path, add=None):
    """Writes a Llama with random weights; `add(writer)` writes more."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in SIZES.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(97 + i) for i in range(20)])
    shapes = {"token_embd": (20, 24), "output_norm": (24,), "blk.0.attn_norm": (24,)}
    shapes |= {"blk.0.attn_q": (24, 24), "blk.0.attn_k": (8, 24), "blk.0.attn_v": (8, 24)}
    shapes |= {"blk.0.attn_output": (24, 24), "blk.0.ffn_norm": (24,), "blk.0.ffn_gate": (34, 24)}
    shapes |= {"blk.0.ffn_up": (34, 24), "blk.0.ffn_down": (24, 34)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    if add is not None:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "add, message",
    [
        (lambda w: w.add_uint32("llama.some_switch", 1), "metadata that are not.*some_switch"),
        (
            lambda w: w.add_expert_count(8),
            "llama.expert_count is not handled unless it is 0, got 8",
        ),
        (lambda w: w.add_value_length(7), "llama.attention.value_length is not handled unless"),
        (lambda w: w.add_key_length(0), "key_length must be a whole number above 0, got 0"),
        (
            lambda w: w.add_string("llama.rope.freq_base", "x"),
            "freq_base must be a number, got 'x'",
        ),
        (lambda w: w.add_vocab_size(21), "vocab_size is not handled unless it is 20, got 21"),
        (lambda w: w.add_causal_attention(False), "attention.causal is not handled unless it is T"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "must be none, linear"),
        (lambda w: w.add_tensor("blk.0.x.weight", np.ones(4, "f")), "tensors .* 'blk.0.x.weight'"),
        (lambda w: w.add_tensor("blk.00.attn_q.weight", np.ones(4, "f")), "'blk.00.attn_q.weight'"),
        (lambda w: w.add_tensor("blk.1.attn_q.weight", np.ones((24, 24), "f")), "1 surplus: model"),
        (lambda w: w.add_feed_forward_length([34, 35]), "length must be the same in all layers"),
        (lambda w: w.add_feed_forward_length([34, 34]), None),
        (lambda w: w.add_bos_token_id(-1 % 2**32), None),
        (
            lambda w: w.add_array("tokenizer.ggml.eos_token_id", [1, 2]),
            "eos_token_id of its tokenizer must be",
        ),
        (lambda w: w.add_type("adapter"), "is no model: its general.type is 'adapter'"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts of a model.*gguf-split --merge"),
    ],
)
def test_what_is_not_handled_is_named(add, message, tmp_path):
    path = small_model(tmp_path / "x.gguf", add)
    if message is None:
        assert from_pretrained(path).origin.special_tokens.start_token is None
        return
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        from_pretrained(path)


@pytest.mark.parametrize("name", ["mamba", "", "llama4", 7])
def test_an_unknown_architecture(name, tmp_path):
    key = "general.architecture"
    own = entry(key, STRING, text(name)) if isinstance(name, str) else entry(key, U32, number(name))
    (tmp_path / "x.gguf").write_bytes(raw(keys=[own]))
    with pytest.raises(ValueError, match="general.architecture must be one of bert, .* qwen3, got"):
        from_pretrained(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["Q8_K", "Q8_1"])
def test_a_type_that_the_package_does_not_unpack(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    size, block = gguf.GGML_QUANT_SIZES[number]
    content = raw(tensors=[tensor("a", (size,), number)], data=bytes(block))
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=f"type {kind}, which the gguf package does not unpack"):
        read_gguf(tmp_path / "x.gguf").tensors["a"].read()


@pytest.mark.parametrize("read", [from_pretrained, load_tokenizer])
def test_the_missing_package_is_named(read, monkeypatch, tmp_path):
    path = small_model(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[gguf\]'"):
        read(path)


def test_several_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        small_model(tmp_path / name)
    with pytest.raises(ValueError, match="has 2 GGUF files, 'a.gguf', 'b.gguf'. Pass the path of"):
        from_pretrained(tmp_path)


def test_numbers_that_are_not_finite(tmp_path):
    bad = np.full((24, 34), np.inf, np.float32)
    path = small_model(tmp_path / "x.gguf")
    content = path.read_bytes()
    tensor = read_gguf(path).tensors["blk.0.ffn_down.weight"]
    path.write_bytes(content[: tensor.begin] + bad.tobytes() + content[tensor.end :])
    with pytest.raises(ValueError, match="ffn_down|down_proj.* NaN or infinite"):
        from_pretrained(path)


def damage(data, rng):
    """Some bytes changed, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data))
        until = min(len(data), at + rng.choice([1, 2, 4, 8, 50]))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:until] = b""
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at:until]
            case 4:
                filler = rng.choice([b"\xff", b"\0", b"\x7f", b"\1"])
                data[at:until] = filler * (until - at)
        data = data or bytearray(b"G")
    return bytes(data)


@pytest.mark.parametrize("seed", range(2))
def test_fuzz(tmp_path, seed, small_memory):
    """An error that names the file, or the tensors that the package reads, model and tokenizer."""
    rng = random.Random(seed)
    good = small_model(tmp_path / "good.gguf").read_bytes()
    header = min(x.begin for x in read_gguf(tmp_path / "good.gguf").tensors.values())
    path = tmp_path / "x.gguf"
    opened = 0
    for _ in range(300):
        path.write_bytes(damage(good[:header], rng) + good[header:])
        try:
            file = read_gguf(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        opened += 1
        theirs = {x.name: x for x in gguf.GGUFReader(path).tensors}
        assert theirs.keys() == file.tensors.keys()
        for name, x in file.tensors.items():
            assert (x.begin, x.end - x.begin) == (theirs[name].data_offset, theirs[name].n_bytes)
            assert x.shape == tuple(theirs[name].shape[::-1].tolist())
        for read in (open_gguf, load_tokenizer):
            try:
                read(path)
            except ValueError as error:
                assert str(error)
    assert 4 < opened < 250


def test_fuzz_whole_models(tmp_path):
    """A model or an error, where the header is a valid one with other numbers."""
    rng = random.Random(0)
    path, loaded = tmp_path / "x.gguf", 0
    numbers = [0, 1, 2, 3, 7, 24, 2**31 - 1, 2**32 - 1]
    for _ in range(40):
        key = rng.choice(sorted(SIZES))
        sizes = SIZES | {key: rng.choice(numbers)}
        writer = gguf.GGUFReader(small_model(path), "r+")
        for name, value in sizes.items():
            writer.fields[f"llama.{name}"].parts[-1][0] = value
        writer.data.flush()
        del writer
        try:
            from_pretrained(path)
            loaded += 1
        except ValueError as error:
            assert len(str(error)) < 1500
    assert 0 < loaded < 30
