"""The files of a checkpoint: written and read bit by bit, hostile ones refused, the hub."""

import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.files import json_file
from jaxformers.files.hub import INDEX, SINGLE, TensorFiles, locate, read_json, write_tensors
from jaxformers.files.safetensors_file import DTYPES, NAMES, allocate, read_header

safetensors = pytest.importorskip("safetensors")


def some_bits(rng, shape, dtype):
    """An array of any bits, NaN and infinities among them."""
    if dtype == np.bool:
        return np.asarray(rng.integers(0, 2, shape).astype(np.bool))
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(size), np.uint8).view(dtype).reshape(shape)


@pytest.fixture
def arrays():
    """One of every dtype, in shapes of no, one and several axes, one of them empty."""
    rng = np.random.default_rng(4)
    shapes = itertools.cycle([(3, 5), (), (7,), (2, 0, 3), (1, 1, 9)])
    return {f"{n}.weight": some_bits(rng, next(shapes), d) for n, d in DTYPES.items()}


def save(directory, arrays, **options):
    tensors = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]
    write_tensors(directory, tensors, **options)


def load(directory):
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.names}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


# Writing and reading.


@pytest.mark.parametrize("limit", [5 * 10**9, 64, 1])
def test_what_is_written_is_read(tmp_path, arrays, limit):
    save(tmp_path, arrays, max_shard_bytes=limit)
    assert_same_bits(load(tmp_path), arrays)
    files = sorted(path.name for path in tmp_path.iterdir())
    if limit > 1000:
        assert files == [SINGLE]
    else:
        count = len(files) - 1
        assert count > 2 and files[-1] == INDEX and f"model-00001-of-{count:05}" in files[0]
        sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
        assert limit == 1 or max(sizes) < 1500
        total = read_json(tmp_path / INDEX)["metadata"]["total_size"]
        assert total == sum(a.nbytes for a in arrays.values())


def test_shape_and_dtype_are_known_without_reading(tmp_path, arrays):
    save(tmp_path, arrays)
    files = TensorFiles(tmp_path)
    os.truncate(tmp_path / SINGLE, 0)
    for name, array in arrays.items():
        assert (files.shape(name), files.dtype(name)) == (array.shape, array.dtype)
    with pytest.raises(ValueError, match="model.safetensors has become shorter"):
        files.read("F32.weight")
    with pytest.raises(ValueError, match="has no tensor 'F32.wieght'. Did you mean 'F32.weight'"):
        files.read("F32.wieght")


def test_other_readers_read_it(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    save(tmp_path, arrays)
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(found[name].shape) == array.shape
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), name
    with safetensors.safe_open(tmp_path / SINGLE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [10**9, 4000])
def test_transformers_reads_it_and_we_what_it_writes(tmp_path, limit):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=34, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=10)
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert (tmp_path / "theirs" / INDEX).exists() == (limit < 10**9)
    arrays = load(tmp_path / "theirs")
    weights = model.state_dict()
    assert arrays.keys() == weights.keys()
    for name, weight in weights.items():
        assert arrays[name].tobytes() == weight.view(torch.uint8).numpy().tobytes()

    config.save_pretrained(tmp_path / "ours")
    save(tmp_path / "ours", arrays, max_shard_bytes=limit)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_tensors_are_aligned(tmp_path, arrays):
    """So that readers may use the bytes in place."""
    save(tmp_path, arrays)
    stored = read_header(tmp_path / SINGLE).values()
    assert all(tensor.begin % tensor.dtype.itemsize == 0 for tensor in stored)


def test_jax_takes_the_memory_over():
    array = allocate((1000, 300), np.dtype(np.float32))
    array[...] = 1
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_views_and_jax_arrays_are_written(tmp_path):
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    save(tmp_path, {"t": np.asarray(x).T, "jax": x, "every second": np.arange(9)[::2]})
    found = load(tmp_path)
    assert (found["t"] == np.asarray(x).T).all() and (found["jax"] == x).all()
    assert found["every second"].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([], "at least one tensor"),
        ([("a", (2,), np.float32, lambda: np.ones(2))], r"announced .*float32.*float64"),
        ([("a", (2,), np.float64, lambda: np.ones(3))], r"announced .*\(2,\).*\(3,\)"),
        ([("a", (), np.str_, str)], "no dtype <U0"),
        ([("a", (), ">f4", float)], "no dtype >f4"),
        ([("a", (), float, lambda: 0.0)] * 2, "'a' is taken"),
        ([("__metadata__", (), float, lambda: 0.0)], "is taken"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path, tensors)
    assert list(tmp_path.iterdir()) == []


# Saving over an earlier save.

OLD = {f"w{i}": np.full(4, i, np.float32) for i in range(5)}
NEW = {f"w{i}": np.full(4, -i, np.float32) for i in range(5)}
LIMITS = {"single": 10**9, "two shards": 48, "five shards": 16}


class Crash(BaseException):
    """The process ends here: nothing that follows happens."""


@pytest.mark.parametrize("before", LIMITS)
@pytest.mark.parametrize("after", LIMITS)
def test_wherever_a_save_breaks_off_one_whole_checkpoint_is_there(tmp_path, before, after):
    """Every step that changes names is tried as the last one, from the first to the end."""
    for steps in range(100):
        directory = tmp_path / str(steps)
        save(directory, OLD, max_shard_bytes=LIMITS[before])
        (directory / "tokenizer.json").write_text("{}")
        left = itertools.count(steps, -1)

        def step(function, left=left):
            def run(*args, **kwargs):
                if next(left) <= 0:
                    raise Crash
                return function(*args, **kwargs)

            return run

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", step(os.replace))
            patch.setattr(Path, "unlink", step(Path.unlink))
            try:
                save(directory, NEW, max_shard_bytes=LIMITS[after])
                break
            except Crash:
                pass
        found = load(directory)
        assert found.keys() == OLD.keys()
        assert_same_bits(found, OLD if found["w1"][0] == 1 else NEW)
        # The next save clears up.
        save(directory, OLD)
        assert sorted(os.listdir(directory)) == [SINGLE, "tokenizer.json"]
    assert steps > 1
    assert_same_bits(load(directory), NEW)
    assert (directory / SINGLE).exists() == (after == "single") != (directory / INDEX).exists()
    assert len(list(directory.glob("*.safetensors"))) == {"s": 1, "t": 2, "f": 5}[after[0]]
    assert not list(directory.glob("*.tmp")) and (directory / "tokenizer.json").exists()


def test_a_failing_function_leaves_the_earlier_save_alone(tmp_path):
    save(tmp_path, OLD, max_shard_bytes=16)
    before = sorted(os.listdir(tmp_path))
    broken = [("a", (), np.float64, lambda: np.ones(())), ("b", (), np.float64, lambda: 1 / 0)]
    for limit in 1, 1000:
        with pytest.raises(ZeroDivisionError):
            write_tensors(tmp_path, broken, limit)
        assert sorted(os.listdir(tmp_path)) == before
    assert_same_bits(load(tmp_path), OLD)


def test_a_save_may_read_what_it_replaces(tmp_path):
    save(tmp_path, OLD)
    files = TensorFiles(tmp_path)
    tensors = [(n, files.shape(n), files.dtype(n), lambda n=n: -files.read(n)) for n in files.names]
    write_tensors(tmp_path, tensors)
    assert_same_bits(load(tmp_path), {name: -array for name, array in OLD.items()})


# Memory.


def test_writing_holds_one_tensor(tmp_path):
    shape, size = (2, 10**6), 2 * 10**6
    tensors = [(str(i), shape, np.uint8, lambda: np.ones(shape, np.uint8)) for i in range(9)]
    tracemalloc.start()
    write_tensors(tmp_path, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size <= peak < 1.5 * size


def test_reading_holds_what_was_read(tmp_path):
    """In a fresh process: what one reads into JAX is there once, not beside a map of the file."""
    program = """
import re, sys
import jax, numpy as np
from jaxformers.files.hub import TensorFiles

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

TensorFiles(sys.argv[2]), jax.device_put(np.ones(3)) + 1  # everything is started
files, before = TensorFiles(sys.argv[1]), status("VmRSS")
arrays = [jax.device_put(files.read(name)) for name in files.names]
print((status("VmHWM") - before) / sum(array.nbytes for array in arrays))
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak is read from /proc")
    save(tmp_path / "small", OLD)
    rng = np.random.default_rng(0)
    large = {str(i): rng.integers(0, 9, (1000, 4000 + i), np.int32) for i in range(6)}
    save(tmp_path / "large", large)
    command = [sys.executable, "-c", program, tmp_path / "large", tmp_path / "small"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.1


# Hostile files. Everything is one ValueError that names the file.

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
BYTES = bytes(range(32))


def raw(header, data=BYTES, length=None):
    """A file of this header, which need not be one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(name, **fields):
    header = copy.deepcopy(GOOD)
    header[name] |= fields
    return raw(header)


TWICE = json.dumps(GOOD).replace('"b"', '"a"').encode()
FILES = {
    "empty": (b"", "empty"),
    "three bytes": (b"\x02\0\0", "announce a header of 2 bytes, in a file of 3"),
    "length only": (raw(b""), "no safetensors file"),
    "zeros": (bytes(1000), "begins with zeros"),
    "header longer than the file": (raw(GOOD, length=10**4), "of 10000 bytes, in a file of"),
    "header of 2**64 bytes": (raw(GOOD, length=2**64 - 1), "of 18446744073709551615 bytes"),
    "header one too short": (raw(GOOD, length=len(json.dumps(GOOD)) - 1), "not valid JSON"),
    "header one too long": (raw(GOOD, length=len(json.dumps(GOOD)) + 1), "not valid JSON"),
    "one byte missing": (raw(GOOD, BYTES[:-1]), "is truncated"),
    "no data": (raw(GOOD, b""), "is truncated"),
    "one byte more": (raw(GOOD, BYTES + b"\0"), "has bytes left over"),
    "a list": (raw([GOOD]), r"must hold a JSON object"),
    "not an entry": (raw({"a": 3}), "tensor 'a' must have a shape"),
    "bad UTF-8": (raw(b'{"\xff": {}}'), "can't decode byte 0xff"),
    "lone surrogate": (raw(b'{"\\ud800": ' + json.dumps(GOOD["a"]).encode() + b"}", bytes(24)), ""),
    "deep": (raw(b"[" * 10**5 + b"]" * 10**5), "recursion|levels deep"),
    "deep in an entry": (raw(b'{"a":' * 99 + b"1" + b"}" * 99), "levels deep"),
    "a name twice": (raw(TWICE), "'a' comes more than once"),
    "a field twice": (raw(json.dumps(GOOD).encode().replace(b'"shape"', b'"dtype"')), "'dtype' co"),
    "metadata no object": (raw(GOOD | {"__metadata__": 3}), "no valid safetensors file"),
    "metadata no strings": (raw(GOOD | {"__metadata__": {"format": 1}}), "no valid safetensors"),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "must have a shape"),
    "negative shape": (changed("a", shape=[-2, -3]), r"none below 0 or.*\[-2, -3\]"),
    "fractional shape": (changed("a", shape=[2.0, 3]), "integers"),
    "boolean shape": (changed("b", shape=[True, 4]), "integers"),
    "shape of 33 axes": (changed("a", shape=[2, 3] + [1] * 31), "up to 32"),
    "huge shape": (changed("a", shape=[2**40, 2**40]), "does not fit"),
    "shape beyond 64 bits": (changed("a", shape=[2**64]), "64 bits"),
    "shape of many digits": (changed("a", shape=[10**4000]), "64 bits"),
    "shape of too many digits": (raw(b'{"a": 1' + b"0" * 5000 + b"}"), "not valid JSON"),
    "shape that overflows to fit": (changed("a", shape=[2**63 + 3, 2]), "64 bits"),
    "wrong shape": (changed("a", shape=[2, 4]), "does not fit"),
    "huge shape of no bytes": (
        raw({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
        "absurd",
    ),
    "wrong dtype": (changed("a", dtype="F64"), "does not fit"),
    "unknown dtype": (changed("a", dtype="F4"), "has the dtype 'F4'"),
    "dtype no string": (changed("a", dtype=["F32"]), r"has the dtype \['F32'\]"),
    "three offsets": (changed("a", data_offsets=[0, 12, 24]), "two data_offsets"),
    "offsets no numbers": (changed("a", data_offsets=["0", "24"]), "two data_offsets"),
    "backward offsets": (changed("a", data_offsets=[24, 0]), "does not fit"),
    "huge offsets": (changed("b", data_offsets=[2**62, 2**62 + 8]), "must not overlap"),
    "overlap": (changed("b", data_offsets=[20, 28]), "begins at byte .*must not overlap"),
    "the same place": (changed("b", data_offsets=[0, 24], shape=[12]), "must not overlap"),
    "gap": (changed("b", data_offsets=[26, 34]), "or leave gaps"),
    "gap at the start": (raw({"b": GOOD["b"]}), "or leave gaps"),
    "NaN": (raw(b'{"a": NaN}'), "'NaN' is not a finite number"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>" + bytes(99), "a web page"),
    "pickle": (b"\x80\x04" + bytes(10) + b"\xff" * 99, "is a pickle"),
    "torch's pickle": (b"PK\x03\x04\0\0\x08\x08" + bytes(99), "is a pickle"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\1" * 99, "GGUF"),
}


def test_the_file_that_the_hostile_ones_vary(tmp_path):
    (tmp_path / SINGLE).write_bytes(raw(GOOD))
    found = load(tmp_path)
    assert found["a"].tobytes() + found["b"].tobytes() == BYTES


@pytest.mark.parametrize("name", FILES)
def test_hostile_file(tmp_path, name, small_memory):
    content, message = FILES[name]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){SINGLE}.*({message})") as caught:
        TensorFiles(tmp_path)
    assert len(str(caught.value)) < 1500


def test_a_header_of_a_size_that_no_model_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxformers.files.safetensors_file.MAX_JSON_BYTES", 100)
    (tmp_path / SINGLE).write_bytes(raw(GOOD))
    with pytest.raises(ValueError, match="at most 100"):
        TensorFiles(tmp_path)


def test_a_pipe_or_folder_in_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(ValueError, match="no regular file"):
        TensorFiles(tmp_path)
    (tmp_path / "folder" / SINGLE).mkdir(parents=True)
    with pytest.raises(ValueError, match="no regular file"):
        TensorFiles(tmp_path / "folder")
    with pytest.raises(ValueError, match="no directory"):
        TensorFiles(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "files, message",
    [
        ([], r"has no model.safetensors and no model.safetensors.index.json\.$"),
        (["config.json"], "has no model.safetensors"),
        (
            ["pytorch_model.bin"],
            "pytorch_model.bin is no file of tensors .* is empty or begins with",
        ),
        (["model.pt"], "pickle"),
        (["model.pth"], "pickle"),
        (["flax_model.msgpack"], "from_flax=True"),
        (["tf_model.h5"], "from_tf=True"),
        (["a.bin", "b.h5"], "'a.bin', 'b.h5'. A pickle.*Flax"),
        (["model-00001-of-00002.safetensors"], "shards need their index"),
        (["adapter_model.safetensors"], "adapter has to be merged"),
        ([f"pytorch_model-{i}.bin" for i in range(9)], "and 4 more"),
    ],
)
def test_nothing_to_open(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        TensorFiles(tmp_path)


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path):
    save(tmp_path, OLD)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert_same_bits(load(tmp_path), OLD)


# Hostile indices.

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def shards(tmp_path):
    """A directory with a checkpoint of two shards."""
    save(tmp_path, OLD, max_shard_bytes=48)
    index = read_json(tmp_path / INDEX)["weight_map"]
    assert index == {"w0": ONE, "w1": ONE, "w2": ONE, "w3": TWO, "w4": TWO}
    return tmp_path


@pytest.mark.parametrize(
    "shard",
    [
        "../elsewhere/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        ".safetensors",
        "~.safetensors",
        "a\0.safetensors",
        "model.safetensors\n",
        "pytorch_model.bin",
        "\ud800.safetensors",
        7,
        None,
        [ONE],
    ],
)
def test_a_shard_has_a_plain_name(shards, shard):
    """Even where a path leads to what the index promises."""
    for place in "sub", "../elsewhere":
        save(shards / place, {"w4": OLD["w4"]})
    for name in "sub\\model.safetensors", "C:model.safetensors", ".safetensors", "~.safetensors":
        shutil.copy(shards / "sub" / SINGLE, shards / name)
    names = read_json(shards / INDEX)["weight_map"] | {"w4": shard}
    (shards / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=f"{INDEX}: tensor 'w4' must be in a .safetensors file"):
        TensorFiles(shards)


def test_links_are_followed(shards):
    """The hub's cache is made of links into a folder of blobs."""
    blobs = shards / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(shards.glob("model*"))):
        path.rename(blobs / f"{i}")
        path.symlink_to(Path("blobs") / f"{i}")
    assert_same_bits(load(shards), OLD)
    (blobs / "1").unlink()
    with pytest.raises(ValueError, match=f"{TWO} is missing"):
        TensorFiles(shards)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w | {"w9": ONE}, f"{ONE} does not hold .* missing 'w9'; not listed .* none"),
        (lambda w: w | {"w4": ONE}, f"{ONE} does not hold .* missing 'w4'"),
        (lambda w: w | {"w9": "model-3.safetensors"}, "model-3.safetensors is missing"),
        (lambda w: {"w0": ONE, "w1": ONE, "w2": ONE, "w3": TWO}, "missing none; not .* 'w4'"),
        (lambda w: {f"x{i}": ONE for i in range(9)}, "'x4' and 4 more"),
        (lambda w: {}, "must have a 'weight_map'"),
        (lambda w: None, "must have a 'weight_map'"),
        (lambda w: [*w], "must have a 'weight_map'"),
    ],
)
def test_an_index_must_agree_with_its_shards(shards, change, message):
    names = read_json(shards / INDEX)["weight_map"]
    (shards / INDEX).write_text(json.dumps({"weight_map": change(names)}))
    with pytest.raises(ValueError, match=message):
        TensorFiles(shards)


def test_a_tensor_in_two_shards(shards):
    """One of them would win, and which is nobody's choice."""
    save(shards / "new", {name: OLD[name] for name in ("w1", "w3", "w4")})
    (shards / "new" / SINGLE).rename(shards / TWO)
    with pytest.raises(ValueError, match=f"{TWO} does not hold .* not listed .* 'w1'"):
        TensorFiles(shards)


def test_a_tensor_listed_twice(shards):
    text = (shards / INDEX).read_text().replace('"w3"', '"w2"')
    (shards / INDEX).write_text(text)
    with pytest.raises(ValueError, match="'w2' comes more than once"):
        TensorFiles(shards)


def test_a_single_file_comes_before_an_index(shards):
    """As in transformers."""
    save(shards / "new", NEW)
    (shards / "new" / SINGLE).rename(shards / SINGLE)
    assert_same_bits(load(shards), NEW)


# Fuzz: the right tensors or a ValueError.

NASTY = [-1, 0, 1, 2**31, 2**63, 10**400, 1.5, 1e308, True, None, "", "F32", "I8", [], [0], {}]
NASTY += [[2**62, 4], [0, 32], "../x", "model.safetensors", "\ud800", "x" * 1000]


def damage(data, rng):
    """Some bytes changed, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        until = min(len(data), at + rng.choice([1, 2, 8, 50]))
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:until] = b""
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at:until]
            case 4:
                data[at:until] = rng.choice([b"0", b"9", b"}", b'"', b",", b"[", b"\\u0000", b"a"])
    return bytes(data)


def distort(value, rng):
    """A JSON value with one part replaced."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        value = copy.copy(value)
        value[key] = distort(value[key], rng)
        return value
    return rng.choice(NASTY)


def reference(path):
    """The tensors by the package, of which NumPy gets the bytes."""
    with path.open("rb") as file:
        return {
            name: (list(view["shape"]), view["dtype"], bytes(view["data"]))
            for name, view in safetensors.deserialize(file.read())
        }


@pytest.mark.parametrize("seed", range(4))
def test_fuzz_header(tmp_path, seed, small_memory):
    rng = random.Random(seed)
    path = tmp_path / SINGLE
    good = raw(GOOD | {"__metadata__": {"format": "pt"}})
    opened = 0
    for _ in range(400):
        if rng.random() < 0.6:
            cut = rng.choice([8, len(good) - len(BYTES), len(good)])
            path.write_bytes(damage(good[:cut], rng) + good[cut:])
        else:
            path.write_bytes(raw(distort(GOOD, rng)))
        try:
            found = load(tmp_path)
        except ValueError as error:
            assert SINGLE in str(error)
            continue
        ours = {n: (list(a.shape), NAMES[a.dtype], a.tobytes()) for n, a in found.items()}
        assert ours == reference(path)
        opened += 1
    assert 4 < opened < 200


@pytest.mark.parametrize("seed", range(4))
def test_fuzz_index(shards, seed, small_memory):
    rng = random.Random(seed)
    good = (shards / INDEX).read_bytes()
    opened = 0
    for _ in range(250):
        if rng.random() < 0.6:
            (shards / INDEX).write_bytes(damage(good, rng))
        else:
            (shards / INDEX).write_text(json.dumps(distort(json.loads(good), rng)))
        try:
            assert_same_bits(load(shards), OLD)
            opened += 1
        except ValueError as error:
            assert str(shards) in str(error)
    assert 2 < opened < 150


# JSON.


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"[1]", r"must hold a JSON object, got \[1\]"),
        (b'{"a": 1, "b": {"c": 2, "c": 2}}', "'c' comes more than once"),
        (b'{"a": NaN}', "'NaN' is not a finite number"),
        (b'{"a": [-Infinity]}', "'-Infinity' is not"),
        (b'{"a": 1e999}', "'1e999' is not"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\xe9"}', "can't decode byte"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": 1}{', "Extra data"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels"),
        (b'{"a":' * 10**6, "recursion"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<html>", "web page"),
    ],
)
def test_hostile_json(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json.*({message})"):
        read_json(path)


def test_short_json_does_not_become_large_objects(tmp_path, small_memory):
    """Each `[],` would take 25 times its length."""
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": [' + b"[]," * 2**21 + b"0]}")
    with pytest.raises(ValueError, match="config.json must have at most 2097152 values"):
        read_json(path)


def test_json_has_limits_and_is_read_up_to_them(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a":' * 63 + b'"\xc3\xa9"' + b"}" * 63)
    value = read_json(path)
    for _ in range(63):
        value = value["a"]
    assert value == "é"
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", path.stat().st_size)
    read_json(path)
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="config.json must have at most"):
        read_json(path)
    with pytest.raises(ValueError, match="is missing or no regular file"):
        read_json(tmp_path / "nothing.json")


# Where a checkpoint is.


def test_a_directory_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert locate(tmp_path, []) == tmp_path
    assert locate("owner/name", []) == Path("owner/name")
    assert locate("~/owner", []) == tmp_path / "owner"


@pytest.mark.parametrize("path", ["./no", "/no/thing", "a/b/c", "no/", "~/no", "", "a b", "a\0b"])
def test_a_path_is_not_looked_up(path, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("a look-up"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no directory"):
        locate(path, ["*"])


@pytest.mark.parametrize("path", ["no.gguf", "./no.gguf", "a/b/no.gguf", "/no/thing/no.gguf"])
def test_a_missing_gguf_file_is_not_looked_up(path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("a look-up"))
    with pytest.raises(ValueError, match="there is no file .*no.gguf'.*hf download"):
        locate(path, ["*"])


def test_a_missing_path_object_is_not_looked_up(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("a look-up"))
    with pytest.raises(ValueError, match="no directory 'owner/name'"):
        locate(Path("owner/name"), ["*"])
    with pytest.raises(ValueError, match="is a file. Pass the directory"):
        locate(__file__, ["*"])


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "Owner-1/name_2.5-it"])
def test_a_name_is_fetched(name, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert locate(name, ("*.json",)) == tmp_path
    assert asked == [((name,), {"allow_patterns": ["*.json"]})]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that is not to be reached, with a cache of one checkpoint, made as the hub makes it."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    save(repository / "blobs", OLD)
    snapshot.mkdir(parents=True)
    (snapshot / SINGLE).symlink_to(Path("..") / ".." / "blobs" / SINGLE)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_offline_what_is_in_the_cache_is_found(offline):
    directory = locate("owner/name", ["*.safetensors"])
    assert directory == offline
    assert_same_bits(load(directory), OLD)


def test_offline_the_error_says_what_was_tried(offline):
    with pytest.raises(ValueError, match=r"(?s)no directory 'owner/other'.*hub did not give it"):
        locate("owner/other", ["*"])


def test_missing_packages_are_named(monkeypatch, tmp_path):
    save(tmp_path, OLD)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[hf\]'"):
        locate("owner/name", ["*"])
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[hf\]'"):
        TensorFiles(tmp_path)
