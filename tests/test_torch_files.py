"""pytorch_model.bin: read as PyTorch reads it, without PyTorch; hostile ones refused."""

import fnmatch
import io
import itertools
import json
import os
import pickletools
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    FeedForward,
    LayerNorm,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    from_pretrained,
)
from jaxformers.files import torch_names, torch_pickle, zip_file
from jaxformers.files.hub import (
    TORCH_INDEX,
    TORCH_SINGLE,
    TensorFiles,
    has_safetensors,
    write_tensors,
)
from jaxformers.files.torch_file import read_torch_file

# Of each call, the checker of shapes would take longer than what is tested.
pytestmark = pytest.mark.usefixtures("no_shape_checker")
MADE_BY_TORCH = Path(__file__).parent / "torch_files"


# A writer, from the definition of the formats alone.


class Name(NamedTuple):
    """A name that the pickle looks up."""

    module: str
    name: str


class Call(NamedTuple):
    """A call of a name."""

    function: Name
    args: tuple


class Reference(NamedTuple):
    """What the pickle leaves to its reader to find."""

    to: tuple


class Code(NamedTuple):
    """Instructions, as they are."""

    code: bytes


def instructions(x):
    """What pushes a value, in protocol 2."""
    match x:
        case Code(code):
            return code
        case Name(module, name):
            return b"c" + f"{module}\n{name}\n".encode()
        case Call(function, args):
            return instructions(function) + instructions(args) + b"R"
        case Reference(to):
            return instructions(to) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if x else b"\x89"
        case int():
            size = x.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + x.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case tuple():
            return b"(" + b"".join(map(instructions, x)) + b"t"
        case list():
            return b"](" + b"".join(map(instructions, x)) + b"e"
        case dict():
            start = instructions(Call(ORDERED_DICT, ())) if isinstance(x, OrderedDict) else b"}"
            items = itertools.chain.from_iterable(x.items())
            return start + b"(" + b"".join(map(instructions, items)) + b"u"
    raise TypeError(x)


def pickled(x):
    return b"\x80\x02" + instructions(x) + b"."


ORDERED_DICT = Name("collections", "OrderedDict")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
FLOAT = Name("torch", "FloatStorage")
STORAGE_OF = {dtype: Name("torch", name) for name, dtype in torch_names.STORAGES.items()}
STORAGE_OF[np.dtype(np.uint8)] = Name("torch", "ByteStorage")


def storage(key="0", size=6, kind=FLOAT, legacy=False):
    view = (None,) if legacy else ()
    return Reference(("storage", kind, key, "cpu", size, *view))


def tensor(shape=(2, 3), strides=(3, 1), offset=0, of=None):
    """A tensor of the numbers of a storage; six of them if it is not said otherwise."""
    hooks = Call(ORDERED_DICT, ())
    return Call(REBUILD, (of or storage(), offset, shape, strides, False, hooks))


def describe(arrays, legacy=False):
    """Tensors for arrays, of which those that share memory share a storage; and the storages."""
    bases, tensors = [], OrderedDict()
    for name, array in arrays.items():
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        if not any(base is known for known in bases):
            bases.append(base)
        [key] = (str(i) for i, known in enumerate(bases) if base is known)
        offset = (array.ctypes.data - base.ctypes.data) // array.itemsize
        strides = tuple(stride // array.itemsize for stride in array.strides)
        if base.dtype in STORAGE_OF:
            of = storage(key, base.size, STORAGE_OF[base.dtype], legacy)
            tensors[name] = tensor(array.shape, strides, offset, of)
        else:
            plain = Name("torch.storage", "UntypedStorage")
            of = storage(key, base.nbytes, plain, legacy)
            args = (of, offset, array.shape, strides, False, Call(ORDERED_DICT, ()))
            dtype = Name("torch", str(array.dtype))
            tensors[name] = Call(Name("torch._utils", "_rebuild_tensor_v3"), (*args, dtype))
    return tensors, {str(i): base for i, base in enumerate(bases)}


def swapped(array):
    """The bytes of a big-endian machine."""
    part = array.itemsize // (2 if array.dtype.kind == "c" else 1)
    return np.ascontiguousarray(array).reshape(-1).view(f"u{part}").byteswap().tobytes()


def zipped(content, storages, order="little", folder="archive", compression=zipfile.ZIP_STORED):
    """The newer format: a zip file of a pickle and the storages' bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        code = content if isinstance(content, bytes) else pickled(content)
        file.writestr(f"{folder}/data.pkl", code)
        if order is not None:
            file.writestr(f"{folder}/byteorder", order)
        for key, x in storages.items():
            data = x if isinstance(x, bytes) else swapped(x) if order == "big" else x.tobytes()
            file.writestr(f"{folder}/data/{key}", data)
        file.writestr(f"{folder}/version", "3\n")
    return out.getvalue()


ABOUT = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
BEFORE = b"".join(map(pickled, (0x1950A86A20F9469CFC6C, 1001, ABOUT)))


def in_sequence(content, storages):
    """The older format: pickles, then the storages with their sizes."""
    code = content if isinstance(content, bytes) else pickled(content)
    parts = [BEFORE, code, pickled([*storages])]
    for x in storages.values():
        size = x.size if x.dtype in STORAGE_OF else x.nbytes  # the newest have plain bytes
        parts += [struct.pack("<q", size), x.tobytes()]
    return b"".join(parts)


def write(directory, arrays, legacy=False, **options):
    directory.mkdir(exist_ok=True)
    tensors, storages = describe(arrays, legacy)
    make = in_sequence if legacy else zipped
    (directory / TORCH_SINGLE).write_bytes(make(tensors, storages, **options))


def load(directory):
    """All tensors, of which those of PyTorch are read."""
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.names}


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def arrays():
    """Every dtype, and views of every kind."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7)).astype(np.float32)
    found = {"whole": x, "tied": x[:], "transposed": x.T, "rows": x[1:4], "column": x[:, 3]}
    found |= {"steps": x[::2, 1::3], "one": x[2:3, 4:5], "number": x[3, 6, ...], "none": x[:0]}
    y = rng.normal(size=(3, 2, 5, 4)).astype(np.float64)
    found |= {"permuted": y.transpose(3, 1, 0, 2), "inner": y[1:, :, 2, :3].transpose(1, 2, 0)}
    found["repeated"] = np.broadcast_to(np.arange(4), (3, 4))
    found["windows"] = np.ndarray((6, 4), np.int16, np.arange(9, dtype=np.int16), 0, (2, 2))
    found["large"] = rng.normal(size=(600, 900)).astype(np.float32).T
    found["large parts"] = rng.normal(size=(3, 700, 512)).astype(np.float32).transpose(0, 2, 1)
    shapes = itertools.cycle([(3, 5), (), (7,), (2, 0, 3), (1, 1, 9)])
    for dtype in {**torch_names.DTYPES, "complex128": np.dtype(np.complex128)}.values():
        bits = np.asarray(np.abs(rng.normal(size=next(shapes))) > 0.5)
        found[f"of {dtype}"] = bits if dtype.kind == "b" else np.asarray(bits * 3).astype(dtype)
    return found


# Reading.


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_written_is_read(tmp_path, arrays, legacy):
    write(tmp_path, arrays, legacy)
    files = TensorFiles(tmp_path)
    assert [files.shape(name) for name in files.names] == [x.shape for x in arrays.values()]
    assert [files.dtype(name) for name in files.names] == [x.dtype for x in arrays.values()]
    assert_same_bits(load(tmp_path), arrays)


@pytest.mark.parametrize("order", ["big", "little", None])
def test_the_order_of_bytes(tmp_path, arrays, order):
    """Without a mark they are little-endian, as in files of PyTorch before 2.1."""
    write(tmp_path, arrays, order=order)
    assert_same_bits(load(tmp_path), arrays)


X = np.arange(35, dtype=np.float32).reshape(5, 7)
BY_TORCH = {
    "linear.weight": X,
    "tied.weight": X,
    "transposed": X.T,
    "part": X[1:4, 2:7:2],
    "bfloat16": (X[0] / 4).astype(jnp.bfloat16),
    "int64": np.arange(3),
    "bool": X[0] > 3,
    "scalar": np.array(0.5),
    "empty": np.zeros((2, 0, 3), np.float32),
    "parameter": -X[:2],
    "uint16": np.arange(4, dtype=np.uint16),
}


@pytest.mark.parametrize("name", ["zip", "zip_protocol_4", "sequence"])
def test_files_that_torch_wrote(name):
    found = read_torch_file(MADE_BY_TORCH / f"{name}.bin")
    assert_same_bits({key: stored.read() for key, stored in found.items()}, BY_TORCH)


def test_the_tensors_of_a_training_that_torch_saved():
    found = read_torch_file(MADE_BY_TORCH / "training.bin")
    assert found["weight"].read().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found["bias"].read().tolist() == [0, -1, -2] and len(found) == 2
    assert found["bias"].dtype == np.float16


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_torch_and_we_read_the_same(tmp_path, arrays, legacy, protocol):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 11, generator=generator)
    state = OrderedDict(x=x, tied=x, t=x.T, rows=x[2:5], every_third=x[::2, 1::3], number=x[3, 4])
    state |= {"expanded": x[0].expand(3, 11), "none": torch.zeros(0, 3), "parameter": x[1:3]}
    state["parameter"] = torch.nn.Parameter(x[1:3])
    state["with attributes"] = torch.nn.Parameter(x.clone())
    state["with attributes"].partition = "rows"
    state["tensor with attributes"] = x.clone()
    state["tensor with attributes"].note = (1, 2)
    names = "float16 bfloat16 float64 int8 uint8 int16 int32 int64 bool complex64 complex128 uint16"
    for dtype in f"{names} uint32 uint64 float8_e4m3fn float8_e5m2 float8_e8m0fnu".split():
        state[dtype] = (9 * x).abs().to(getattr(torch, dtype)).T
    path = tmp_path / TORCH_SINGLE
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = load(tmp_path)
    assert list(found) == list(state)
    for name, value in state.items():
        value = value.detach().contiguous()
        assert found[name].shape == tuple(value.shape)
        assert found[name].tobytes() == value.reshape(-1).view(torch.uint8).numpy().tobytes(), name


TENSORS = {"a": tensor(), "b": tensor((6,), (1,))}
ONE = {"0": np.arange(6, dtype=np.float32)}


@pytest.mark.parametrize("make", [zipped, in_sequence])
@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        OrderedDict(TENSORS),
        {"state_dict": OrderedDict(TENSORS), "epoch": 3, "loss": [0.5, None], "name": "a"},
        {
            "model": TENSORS,
            "optimizer": {"state": {0: {"mean": tensor()}}, "groups": [{"lr": 1.0}]},
        },
        {"step": 1, "anything": {"module.a": TENSORS["a"], "module.b": TENSORS["b"]}},
        {f"_orig_mod.{name}": x for name, x in TENSORS.items()},
        {f"module._orig_mod.{name}": x for name, x in TENSORS.items()},
        TENSORS | {"rate": 0.1, "_extra_state": None, 3: "x"},
        Call(ORDERED_DICT, ([[name, x] for name, x in TENSORS.items()],)),  # Python 2
        Code(instructions(OrderedDict(TENSORS)) + instructions({"_metadata": {"": 1}}) + b"b"),
    ],
    ids=range(10),
)
def test_a_dictionary_of_tensors_is_found(tmp_path, make, content):
    (tmp_path / TORCH_SINGLE).write_bytes(make(content, ONE))
    found = load(tmp_path)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].tolist() == [0, 1, 2, 3, 4, 5] and len(found) == 2


def test_texts_and_numbers_of_every_protocol(tmp_path):
    """Names are written as bytes by Python 2, and whole numbers as lines in protocol 1."""
    for name in (b"U\1a", b"T\1\0\0\0a", b"X\1\0\0\0a", b"\x8c\1a", b"\x8d\1" + bytes(7) + b"a"):
        for two in (
            b"K\2",
            b"M\2\0",
            b"J\2\0\0\0",
            b"\x8a\1\2",
            b"\x8b\1\0\0\0\2",
            b"I2\n",
            b"L2L\n",
        ):
            shape = Code(two + b"K\3\x86")
            content = Code(b"}" + name + instructions(tensor(shape)) + b"s")
            (tmp_path / TORCH_SINGLE).write_bytes(zipped(content, ONE))
            assert load(tmp_path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("view, numbers", [(None, [0, 1]), (("9", 3, 2), [3, 4])])
def test_part_of_a_storage(tmp_path, view, numbers):
    """Old files know storages that are views of others."""
    of = Reference(("storage", FLOAT, "0", "cpu", 6, view))
    content = {"a": tensor((2,), (1,), 0, of)}
    (tmp_path / TORCH_SINGLE).write_bytes(in_sequence(content, ONE))
    assert load(tmp_path)["a"].tolist() == numbers


def test_older_functions(tmp_path):
    """Without the gradient's settings, as in PyTorch 0.3."""
    content = {"a": Call(Name("torch._utils", "_rebuild_tensor"), (storage(), 1, (2, 2), (3, 1)))}
    (tmp_path / TORCH_SINGLE).write_bytes(zipped(content, ONE))
    assert load(tmp_path)["a"].tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize("legacy", [False, True])
def test_reading_holds_what_was_read(tmp_path, legacy):
    """In a fresh process: what one reads into JAX is there once, also where it lies transposed."""
    program = """
import re, sys
import jax, numpy as np
from jaxformers.files.hub import TensorFiles

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

small = TensorFiles(sys.argv[2])
jax.device_put(small.read("0")) + 1  # everything is started
files, before = TensorFiles(sys.argv[1]), status("VmRSS")
arrays = [jax.device_put(files.read(name)) for name in files.names]
print((status("VmHWM") - before) / sum(array.nbytes for array in arrays))
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak is read from /proc")
    rng = np.random.default_rng(0)
    large = {str(i): rng.integers(0, 9, (1000, 4000 + i), np.int32) for i in range(6)}
    large |= {"0": large["0"].T, "3": large["3"].T}
    write(tmp_path / "small", {"0": np.arange(2000.0).reshape(40, 50).T}, legacy)
    write(tmp_path / "large", large, legacy)
    command = [sys.executable, "-c", program, tmp_path / "large", tmp_path / "small"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.1


# Hostile files. Everything is one ValueError that names the file, and nothing is run.


@pytest.fixture
def small_memory():
    """No more than 100 MB may be allocated, by Python or NumPy, and 20 seconds pass."""
    tracemalloc.start()
    start = time.monotonic()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 and time.monotonic() - start < 20


def calls(module, name, *args):
    return {"a": tensor(), "b": Call(Name(module, name), args)}


def with_tensor(**changes):
    return {"a": tensor(**changes)}


MANY = 2**15
PICKLES = {
    "os.system": (calls("os", "system", "touch hacked"), "asks for 'os.system'.* Nothing was run"),
    "posix.system": (calls("posix", "system", "touch hacked"), "asks for 'posix.system'"),
    "eval": (calls("builtins", "eval", "open('hacked', 'w')"), "asks for 'builtins.eval'"),
    "exec of Python 2": (calls("__builtin__", "exec", "open('hacked', 'w')"), "__builtin__.exec"),
    "getattr": (calls("builtins", "getattr", FLOAT, "__class__"), "builtins.getattr"),
    "a name only": ({"a": tensor(), "b": Name("os", "system")}, "asks for 'os.system'"),
    "torch.load": (calls("torch", "load", "x"), "asks for 'torch.load'"),
    "a whole module": (calls("torch.nn.modules.linear", "Linear"), "linear.Linear.*state_dict"),
    "a dotted name": (calls("torch", "_utils._rebuild_tensor_v2"), "asks for"),
    "name by the stack": (Code(b"}\x8c\2os\x8c\6system\x93s."), "asks for 'os.system'"),
    "name of numbers": (Code(b"K\1K\2\x93."), "has the name 2 in 1"),
    "instance": (Code(b"(ios\nsystem\n."), "instruction INST"),
    "object": (Code(b"(}o."), "instruction OBJ"),
    "new object": (Code(b"})\x81."), "instruction NEWOBJ"),
    "extension": (Code(b"\x82\1."), "instruction EXT1"),
    "text reference": (Code(b"P0\n."), "instruction PERSID"),
    "buffer": (Code(b"\x97."), "instruction NEXT_BUFFER"),
    "unknown instruction": (Code(b"\xff."), r"instruction b'\\xff'"),
    "calls of a value": (Code(b"})R."), "calls {}"),
    "calls of a class": (calls("torch", "Tensor"), "calls Name"),
    "calls of a dtype": (calls("torch", "float32"), "calls dtype"),
    "arguments no tuple": (Code(instructions(REBUILD) + b"}R."), "calls Name"),
    "state of a text": (Code(b"X\1\0\0\0a}b."), "needs a dict"),
    "empty": (b"", "truncated"),
    "only the end": (b".", "more from the stack"),
    "without an end": (b"\x80\x02}", "truncated"),
    "nothing below": (Code(b"0."), "instruction POP"),
    "mark without items": (Code(b"t."), "mark that is not there"),
    "a tuple of nothing": (Code(b"\x87."), "more from the stack"),
    "recall of nothing": (Code(b"h\5."), "recalls number 5"),
    "append to a dictionary": (Code(b"}K\1a."), "needs a list"),
    "item of a list": (Code(b"]K\1K\2s."), "needs a dict"),
    "key without a value": (Code(b"}(K\1u."), "without a value"),
    "key of a tuple": (Code(b"})K\1s."), r"integer for its key, got \(\)"),
    "key of many bytes": ({2**61 - 1: 1}, "integer for its key"),
    "a name twice": (
        Code(instructions({"a": 1})[:-1] + instructions({"a": 2})[2:]),
        "more than once",
    ),
    "protocol 6": (b"\x80\x06}.", "protocol 6"),
    "bad UTF-8": (Code(b"X\1\0\0\0\xff"), "can't decode byte 0xff"),
    "name without an end": (Code(b"c" + b"o" * 1000), "name of more than 256 bytes"),
    "integer of words": (Code(b"Ione\n."), "the integer 'one'"),
    "integer of many digits": (Code(b"L" + b"9" * 200 + b"L\n."), "has the integer"),
    "integer of many bytes": (Code(b"\x8a\xff" + bytes(255) + b"."), "integer of 255 bytes"),
    "integer of 2 GB": (Code(b"\x8b\xff\xff\xff\x7f."), "integer of 2147483647 bytes"),
    "text of 4 GB": (Code(b"X\xff\xff\xff\xff."), "or longer than"),
    "text of 2**64 bytes": (Code(b"\x8d" + b"\xff" * 8 + b"."), "or longer than"),
    "bytes": (Code(b"B\xff\xff\xff\xff."), "instruction BINBYTES"),
    "byte array": (Code(b"\x96" + b"\xff" * 8 + b"."), "instruction BYTEARRAY8"),
    "memo of 2**32": (Code(b"}r\xff\xff\xff\xff00."), "instruction POP"),
    "frame that lies": (Code(b"\x95" + b"\xff" * 8 + b"}."), "it has 0"),
    "frame that is cut off": (Code(b"\x95\xff"), "truncated"),
    "copies without end": (Code(b"]" + b"2" * MANY), "instruction DUP"),
    "marks without end": (Code(b"(" * 2 * MANY), "more than 16384 instructions"),
    "lists without end": (Code(b"]" * 2 * MANY), "more than 16384 instructions"),
    "dictionaries without end": (Code(b"}q\0" * MANY), "more than 16384 instructions"),
    "deep": (Code(b"]" * MANY + b"a" * (MANY - 1) + b"."), "more than 16384 instructions"),
    "deeper than Python recurses": (Code(b"]" * 6000 + b"a" * 5999), "must hold a dictionary"),
    "texts without end": (b"X\1\0\1\0" + b"a" * 2**16, "truncated"),
    "a list in itself": (Code(b"]q\0h\0a."), "must hold a dictionary"),
    "a dictionary in itself": (Code(b"}q\0K\1h\0s."), "it has 0"),
    "tensors in itself": (
        Code(instructions(TENSORS) + b"q\0K\1h\0s."),
        "it has 2 .'the whole file', 1",
    ),
    "doubling": (Code(b"]q\0" + b"h\0h\0\x86q\0" * 3000), "must hold a dictionary"),
    "doubling as arguments": (
        Code(b")q\0" + b"h\0h\0\x86q\0" * 99 + b"ctorch\nSize\nh\0\x85R"),
        "torch.Size is made of",
    ),
    "a number": (3, "must hold a dictionary"),
    "one tensor": (tensor(), "must hold a dictionary"),
    "no tensors": ({"a": 1, "b": {"c": 2}}, "it has 0"),
    "two of them": ({"a": TENSORS, "b": 1, "c": TENSORS}, "it has 2 .'a', 'c'.. Save the one"),
    "two of one text": ({1: TENSORS, "1": TENSORS}, "it has 2 .1, '1'"),
    "tensors beside them": (TENSORS | {"c": TENSORS}, "it has 2 .'the whole file', 'c'"),
    "deeper down": ({"a": {"b": TENSORS}}, "it has 0"),
    "numbers for names": ({3: tensor()}, "must have names"),
    "reference to a text": ({"a": Reference("x")}, "refers to 'x'"),
    "reference to a module": (
        {"a": Reference(("module", FLOAT, "x.py", "import os"))},
        "no storage",
    ),
    "storage of another kind": ({"a": storage(kind=ORDERED_DICT)}, "no storage"),
    "storage of a text": ({"a": storage(kind="FloatStorage")}, "no storage"),
    "storage of 8 bits": ({"a": storage(kind=Name("torch", "QInt8Storage"))}, "QInt8Storage"),
    "negative storage": ({"a": storage(size=-6)}, "a storage '0' of -6"),
    "storage with a number for a key": ({"a": storage(key=0)}, "no storage"),
    "two dtypes": (
        with_tensor() | {"b": storage(kind=Name("torch", "IntStorage"))},
        "'0' of 6 int32",
    ),
    "missing storage": (with_tensor(of=storage("7")), "storage '7' is missing"),
    "path for a key": (with_tensor(of=storage("../../etc/passwd")), "is missing"),
    "storage longer than its entry": (
        with_tensor(of=storage(size=7)),
        "should have 7 numbers of 4 bytes",
    ),
    "storage of 2**62": (with_tensor(of=storage(size=2**62)), "should have"),
    "shape too large": (with_tensor(shape=(2, 4)), "does not fit its storage of 24 bytes"),
    "shape of 2**62": (with_tensor(shape=(2**62, 2**62)), "does not fit"),
    "shape of 2**70": (with_tensor(shape=(2**70, 1)), "integers from 0"),
    "negative shape": (with_tensor(shape=(-2, -3)), "integers from 0"),
    "fractional shape": (with_tensor(shape=(2.0, 3)), "integers from 0"),
    "boolean shape": (with_tensor(shape=(True, 3)), "integers from 0"),
    "shape no tuple": (with_tensor(shape=[2, 3]), "integers from 0"),
    "shape of a text": (with_tensor(shape="23"), "integers from 0"),
    "shape of 33 axes": (with_tensor(shape=(1,) * 33, strides=(1,) * 33), "up to 32 axes"),
    "shape of 6000 axes": (with_tensor(shape=(1,) * 6000, strides=(1,) * 6000), "up to 32 axes"),
    "shape of no numbers": (with_tensor(shape=(0, 2**62, 4), strides=(0, 0, 0)), "does not fit"),
    "one stride": (with_tensor(strides=(1,)), "a stride for each"),
    "negative strides": (with_tensor(strides=(-3, -1), offset=5), "integers from 0"),
    "strides too large": (with_tensor(strides=(4, 1)), "does not fit"),
    "strides of 2**62": (with_tensor(strides=(2**62, 1)), "does not fit"),
    "offset too large": (with_tensor(offset=1), "does not fit"),
    "negative offset": (with_tensor(offset=-1), "integers from 0"),
    "offset of 2**62": (with_tensor(offset=2**62), "does not fit"),
    "no offset": (with_tensor(offset=None), "integers from 0"),
    "one number repeated": (with_tensor(shape=(2**40,), strides=(0,)), "would have 4398046511104"),
    "rows repeated": (with_tensor(shape=(10**5, 10**5, 6), strides=(0, 0, 1)), "would have"),
    "windows": (with_tensor(shape=(3, 2**30), strides=(1, 0)), "would have"),
    "many copies": (
        {str(i): tensor((1000, 1000), (0, 0)) for i in range(30)},
        "would have 120000000",
    ),
    "tensor of a tensor": ({"a": tensor(of=tensor())}, "made of a storage"),
    "too few arguments": (
        calls("torch._utils", "_rebuild_tensor_v2", storage(), 0, (2, 3)),
        "made of",
    ),
    "conjugated": (
        calls(
            "torch._utils",
            "_rebuild_tensor_v2",
            storage(),
            0,
            (2,),
            (1,),
            False,
            None,
            {"conj": True},
        ),
        "negated or conjugated",
    ),
    "newer without a dtype": (
        calls(
            "torch._utils", "_rebuild_tensor_v3", storage(), 0, (2,), (1,), False, None, "float32"
        ),
        "must name it",
    ),
    "newer that does not fit": (
        calls(
            "torch._utils",
            "_rebuild_tensor_v3",
            storage(),
            0,
            (6,),
            (1,),
            False,
            None,
            Name("torch", "float64"),
        ),
        "does not fit",
    ),
    "parameter of nothing": (
        calls("torch._utils", "_rebuild_parameter", None, True, None),
        "parameter is",
    ),
    "type by os.system": (
        calls(
            "torch._tensor",
            "_rebuild_from_type_v2",
            Name("os", "system"),
            Name("torch", "Tensor"),
            ("x",),
            None,
        ),
        "asks for 'os.system'",
    ),
    "type by itself": (
        calls(
            "torch._tensor",
            "_rebuild_from_type_v2",
            Name("torch._tensor", "_rebuild_from_type_v2"),
            Name("torch", "Tensor"),
            (),
            None,
        ),
        "with attributes is made of",
    ),
    "pairs of three": (
        calls("collections", "OrderedDict", [[1, 2, 3]]),
        "made of nothing or of pairs",
    ),
    "pairs twice": (calls("collections", "OrderedDict", [["a", 2], ["a", 3]]), "more than once"),
    "sparse": (calls("torch._utils", "_rebuild_sparse_tensor", 1, 2), "_rebuild_sparse_tensor"),
}


SMALL_LIMIT = 2**14


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("make", [zipped, in_sequence])
def test_hostile_pickle(tmp_path, monkeypatch, name, make, small_memory):
    content, message = PICKLES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", SMALL_LIMIT)
    code = content if isinstance(content, bytes) else pickled(content)
    (tmp_path / TORCH_SINGLE).write_bytes(make(code, ONE))
    # In the older format other bytes follow than an end, and other things may be found wrong.
    message = message if make is zipped else ""
    with pytest.raises(ValueError, match=rf"(?s){TORCH_SINGLE}.*({message})") as caught:
        TensorFiles(tmp_path)
    assert len(str(caught.value)) < 1500
    assert os.listdir(tmp_path) == [TORCH_SINGLE]


def test_instructions_are_bounded_and_so_is_memory(tmp_path, monkeypatch):
    """The objects of which the most memory is held per instruction."""
    assert torch_pickle.MAX_INSTRUCTIONS * 150 + torch_pickle.MAX_PICKLE_BYTES * 5 < 250e6
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", SMALL_LIMIT)
    numbered = b"".join(b"]r" + struct.pack("<I", i) for i in range(2**14))
    many = [b"]", b"}", b"(", b"G12345678", b"\x8a\x10" + b"a" * 16, b"\x8c\4\xf0\x9f\x98\x80"]
    for code in [numbered, *(x * 2**15 for x in many)]:
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"more than {SMALL_LIMIT} instructions"):
            torch_pickle.load_pickle(io.BytesIO(code))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150 * SMALL_LIMIT


# Hostile zip files.

GOOD = zipped(TENSORS, ONE)


def entries(*pairs, **options):
    """A zip file of these entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that come twice
        for name, data in pairs:
            file.writestr(name, data)
    return out.getvalue()


def replaced(old, new, which=0, data=GOOD):
    """The file with other bytes in a place, counted from the end if `which` is negative."""
    parts = data.split(old)
    at = which % (len(parts) - 1) + 1
    return old.join(parts[:at]) + new + old.join(parts[at:])


def end(count=4, length=None, begin=None):
    """The file with another end of its directory."""
    was = struct.unpack("<IIH", GOOD[-10:])
    numbers = [was[0] if length is None else length, was[1] if begin is None else begin]
    return GOOD[:-14] + struct.pack("<HHIIH", count, count, *numbers, 0)


PICKLE = ("archive/data.pkl", pickled(TENSORS))
NUMBERS = ("archive/data/0", ONE["0"].tobytes())
ZIPS = {
    "compressed": (zipped(TENSORS, ONE, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "bomb": (entries(PICKLE, ("archive/data/0", bytes(10**7)), compression=8), "is compressed"),
    "encrypted": (replaced(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"), "encrypted"),
    "one byte missing": (GOOD[:-1], "no directory at its end"),
    "half": (GOOD[: len(GOOD) // 2], "no directory at its end"),
    "no directory": (GOOD[: GOOD.index(b"PK\1\2")], "no directory at its end"),
    "its beginning": (GOOD[:8], "no directory at its end"),
    "one byte more": (GOOD + b"\0", "no directory at its end"),
    "a comment": (GOOD[:-2] + b"\1\0a", "no directory at its end"),
    "bytes before": (b"PK\3\4" + GOOD, "that end begins at"),
    "nothing in it": (b"PK\3\4" + entries(), "that end begins at"),
    "an entry less": (end(count=3), "4 entries and|3 entries and"),
    "an entry more": (end(count=5), "directory is damaged"),
    "65535 entries": (end(count=65535), "directory is damaged"),
    "a longer directory": (end(length=10**9), "a directory of 4 entries in 1000000000 bytes"),
    "a later directory": (end(begin=2**32 - 1), "from byte 4294967295 on"),
    "an earlier directory": (end(begin=0), "from byte 0 on"),
    "a directory from the start": (end(length=len(GOOD) - 22, begin=0), "directory is damaged"),
    "a damaged directory": (replaced(b"PK\1\2", b"PK\1\3", -1), "directory is damaged"),
    "a damaged header": (replaced(b"PK\3\4", b"PK\3\5", -1), "does not begin where"),
    "another header": (replaced(b"archive/data/0", b"archive/data/1"), "another header than"),
    "another name": (replaced(b"archive/data/0", b"archive/data/1", -1), "another header than"),
    "a name twice": (entries(PICKLE, PICKLE, NUMBERS), "'archive/data.pkl' comes more than once"),
    "numbers twice": (entries(PICKLE, NUMBERS, NUMBERS), "'archive/data/0' comes more than once"),
    "two pickles": (entries(PICKLE, ("b/data.pkl", b"."), NUMBERS), "one entry data.pkl .* has 2"),
    "no pickle": (entries(NUMBERS), "one entry data.pkl .* has 0"),
    "no folder": (
        entries(("data.pkl", pickled(TENSORS)), ("data/0", b"")),
        "in a folder, it has 0",
    ),
    "no numbers": (entries(PICKLE), "storage '0' is missing"),
    "numbers elsewhere": (entries(PICKLE, ("other/data/0", NUMBERS[1])), "'0' is missing"),
    "numbers cut off": (entries(PICKLE, ("archive/data/0", bytes(23))), "it has 23 bytes"),
    "more than a pickle": (entries((PICKLE[0], PICKLE[1] + b"."), NUMBERS), "does not end where"),
    "less than a pickle": (entries((PICKLE[0], PICKLE[1][:-1]), NUMBERS), "pickle is truncated"),
    "a program": (entries(PICKLE, NUMBERS, ("archive/constants.pkl", b"")), "TorchScript"),
    "middle-endian": (zipped(TENSORS, ONE, order="middle"), "must be little or big, got b'middle'"),
    "a byte order without end": (zipped(TENSORS, ONE, order="big" * 9**6), "little or big"),
    "names no text": (GOOD.replace(b"archive/version", b"archive/v\xffrsion"), "can't decode byte"),
    "a word document": (entries(("[Content_Types].xml", "<a/>")), "one entry data.pkl"),
}


def overlapping():
    """A file of which two entries are the same bytes."""
    data = bytearray(entries(PICKLE, NUMBERS, ("archive/data/1", NUMBERS[1])))
    second, third = (data.index(b"PK\3\4", at) for at in (4, data.index(b"archive/data/1") - 30))
    at = data.rindex(b"archive/data/1") - 4
    assert struct.unpack("<I", data[at : at + 4]) == (third,)
    data[at : at + 4] = struct.pack("<I", second)
    return bytes(data).replace(b"archive/data/0", b"archive/data/1")


def nested():
    """A file of which one entry lies in another, with a header of its own."""
    inner = GOOD[GOOD.rindex(b"PK\3\4") : GOOD.index(b"PK\1\2")]
    data = entries(PICKLE, ("archive/data/0", inner), ("archive/version", "3\n"))
    at = data.rindex(b"archive/version") - 4
    return data[:at] + struct.pack("<I", data.index(inner)) + data[at + 4 :]


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_zip(tmp_path, name, small_memory):
    content, message = ZIPS[name]
    (tmp_path / TORCH_SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){TORCH_SINGLE}.*({message})") as caught:
        TensorFiles(tmp_path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("make", [overlapping, nested])
def test_entries_that_share_bytes(tmp_path, make):
    (tmp_path / TORCH_SINGLE).write_bytes(make())
    with pytest.raises(ValueError, match="comes more than once|overlaps another"):
        TensorFiles(tmp_path)


def test_a_directory_has_limits(tmp_path, monkeypatch):
    (tmp_path / TORCH_SINGLE).write_bytes(GOOD)
    for limit, value in {"MAX_ENTRIES": 3, "MAX_DIRECTORY_BYTES": 100}.items():
        with monkeypatch.context() as patch:
            patch.setattr(zip_file, limit, value)
            with pytest.raises(ValueError, match=r"allowed are (3 entries|.* in 100 bytes)"):
                TensorFiles(tmp_path)
    assert load(tmp_path)["b"].tolist() == [0, 1, 2, 3, 4, 5]


def test_numbers_of_64_bits(tmp_path):
    """As in files of more than 4 GB: in the directory and at its end."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in (PICKLE, NUMBERS):
            with file.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                entry.write(data)
    data, length = out.getvalue(), ONE["0"].nbytes
    begin = data.index(b"PK\1\2")
    # The second entry's sizes and place move to a field of their own, and so do the end's numbers.
    at = data.rindex(b"PK\1\2")
    fixed = bytearray(data[at : at + 46])
    (header,) = struct.unpack("<I", fixed[42:46])
    fixed[20:28], fixed[42:46], fixed[30:32] = b"\xff" * 8, b"\xff" * 4, struct.pack("<H", 34)
    other = struct.pack("<HH", 9, 2) + b"ab"
    extra = other + struct.pack("<HHQQQ", 1, 24, length, length, header)
    directory = data[begin:at] + bytes(fixed) + NUMBERS[0].encode() + extra
    where = begin + len(directory)
    last = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), begin)
    last += struct.pack("<4sIQI", b"PK\6\7", 0, where, 1)
    last += b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)
    (tmp_path / TORCH_SINGLE).write_bytes(data[:begin] + directory + last)
    assert load(tmp_path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for damaged in (last.replace(b"PK\6\6", b"PK\6\5"), b"\0" + last):
        (tmp_path / TORCH_SINGLE).write_bytes(data[:begin] + directory + damaged)
        with pytest.raises(ValueError, match="end of its directory is damaged"):
            TensorFiles(tmp_path)


# Hostile files of the older format, and what is no such file.

OLD = in_sequence(TENSORS, ONE)
SEQUENCES = {
    "empty": (b"", "empty"),
    "zeros": (bytes(1000), "begins with zeros"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>" + bytes(99), "a web page"),
    "safetensors": (b"\x40" + bytes(7) + b'{"a": {}}', ""),
    "a plain pickle": (pickled({"a": 1}), "does not begin with the numbers"),
    "another magic number": (
        pickled(5) + OLD[len(pickled(0x1950A86A20F9469CFC6C)) :],
        "begin with",
    ),
    "another version": (OLD.replace(pickled(1001), pickled(1002)), "begin with the numbers"),
    "one byte missing": (OLD[:-1], "is truncated, in its storage '0'"),
    "no numbers": (OLD[:-24], "is truncated, in its storage '0'"),
    "no size": (OLD[:-28], "is truncated, in its storage '0'"),
    "one byte more": (OLD + b"\0", "1 bytes left over"),
    "size of 2**63": (OLD[:-32] + b"\xff" * 8 + OLD[-24:], "is truncated, in its storage '0'"),
    "size of 5": (OLD[:-32] + struct.pack("<q", 5) + OLD[-24:-4], "should have 6 numbers"),
    "no list": (OLD.replace(pickled(["0"]), pickled("0")), "must list its storages"),
    "numbers listed": (OLD.replace(pickled(["0"]), pickled([0])), "must list its storages"),
    "nothing listed": (OLD[: OLD.index(pickled(["0"]))] + pickled([]), "storage '0' is missing"),
    "another listed": (OLD.replace(pickled(["0"]), pickled(["0", "1"])), "'1' twice, or without"),
    "listed twice": (OLD.replace(pickled(["0"]), pickled(["0", "0"])), "'0' twice, or without"),
    "view beyond": (
        in_sequence(with_tensor(of=Reference(("storage", FLOAT, "0", "cpu", 6, ("9", 4, 3)))), ONE),
        "the view .* of 6 numbers",
    ),
    "negative view": (
        in_sequence(
            with_tensor(of=Reference(("storage", FLOAT, "0", "cpu", 6, ("9", -1, 3)))), ONE
        ),
        "the view .* of 6 numbers",
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_hostile_sequence(tmp_path, name, small_memory):
    content, message = SEQUENCES[name]
    (tmp_path / TORCH_SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){TORCH_SINGLE}.*({message})"):
        TensorFiles(tmp_path)


def test_a_file_that_becomes_shorter(tmp_path):
    for content in GOOD, OLD:
        (tmp_path / TORCH_SINGLE).write_bytes(content)
        files = TensorFiles(tmp_path)
        os.truncate(tmp_path / TORCH_SINGLE, 10)
        with pytest.raises(ValueError, match="pytorch_model.bin has become shorter"):
            files.read("a")


# Fuzz: the right shapes and types, or a ValueError.


def damage(data, rng):
    """Some bytes changed, cut out, doubled, put in, or put elsewhere."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        until = min(len(data), at + rng.choice([1, 2, 8, 50]))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:until] = b""
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at:until]
            case 4:
                data[at:until] = rng.choice(
                    [b"\0", b"\xff" * 8, b"PK\1\2", b"\x80\2", b"2", b"h\0"]
                )
            case 5 if at < len(data):
                data[at] = rng.randrange(256)
    return bytes(data)


def shuffled(code, rng):
    """A pickle with some instructions doubled, left out, put elsewhere or in from another list."""
    parts = [code[a:b] for a, b in itertools.pairwise(starts(code))]
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(5):
            case 0:
                parts.insert(i, parts[j])
            case 1:
                parts.pop(i)
                parts = parts or [b"."]
            case 2:
                parts[i], parts[j] = parts[j], parts[i]
            case 3:
                parts[i] = rng.choice(KNOWN)
            case 4:
                parts[i] = parts[j]
    return b"".join(parts)


def starts(code):
    return [at for _, _, at in pickletools.genops(code)] + [len(code)]


KNOWN = [
    x for x in torch_pickle._INSTRUCTIONS if x not in b"cILXTJG\x8c\x8d\x8a\x8bUMKqrhj\x95\x80"
]
KNOWN += [*torch_pickle._CONSTANTS, b".", b"K\0", b"K\7", b"h\0", b"q\1", b"\x8a\x09" + b"\x7f" * 9]
KNOWN += [instructions(x) for x in (FLOAT, REBUILD, ORDERED_DICT, Name("os", "system"), 2**40, -1)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [zipped, in_sequence])
def test_fuzz(tmp_path, seed, make, small_memory):
    rng = random.Random(seed)
    path = tmp_path / TORCH_SINGLE
    content = OrderedDict(TENSORS, c=tensor((3, 2), (1, 3)), d=tensor((2,), (3,), 1))
    code, opened = pickled(content), 0
    for _ in range(300):
        if rng.random() < 0.5:
            path.write_bytes(damage(make(content, ONE), rng))
        else:
            path.write_bytes(make(shuffled(code, rng), ONE))
        try:
            files = TensorFiles(tmp_path)
            found = {name: files.read(name) for name in files.names}
        except ValueError as error:
            assert TORCH_SINGLE in str(error) and len(str(error)) < 1500
            continue
        for name, array in found.items():
            assert (array.shape, array.dtype) == (files.shape(name), files.dtype(name))
            assert array.nbytes < 10**6
        opened += 1
    assert 2 < opened < 200


# Directories.


def save_shards(directory, endings=("00001-of-00002", "00002-of-00002")):
    """A checkpoint of two shards with an index."""
    directory.mkdir(exist_ok=True)
    numbers = {f"w{i}": np.full((2, i + 1), i, np.float32) for i in range(5)}
    parts = [["w0", "w3"], ["w1", "w2", "w4"]]
    weight_map = {}
    for ending, names in zip(endings, parts, strict=True):
        file = f"pytorch_model-{ending}.bin"
        write(directory, {name: numbers[name] for name in names})
        (directory / TORCH_SINGLE).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 120}, "weight_map": weight_map}
    (directory / TORCH_INDEX).write_text(json.dumps(index))
    return numbers


def test_shards(tmp_path):
    numbers = save_shards(tmp_path)
    found = load(tmp_path)
    assert found.keys() == numbers.keys()
    assert all((found[name] == numbers[name]).all() for name in numbers)


@pytest.mark.parametrize(
    "shard, message",
    [
        ("../pytorch_model-00002-of-00002.bin", "must be in a .bin file"),
        ("/etc/model.bin", "must be in a .bin file"),
        ("model.safetensors", "must be in a .bin file"),
        ("pytorch_model-00002-of-00002.pt", "must be in a .bin file"),
        (7, "must be in a .bin file"),
        ("pytorch_model-00000-of-00002.bin", "is missing"),
        (
            "pytorch_model-00002-of-00002.bin",
            "00001-of-00002.bin does not hold .*not listed .*'w0'",
        ),
    ],
)
def test_an_index_must_agree_with_its_shards(tmp_path, shard, message):
    save_shards(tmp_path)
    index = json.loads((tmp_path / TORCH_INDEX).read_text())
    index["weight_map"]["w0"] = shard
    (tmp_path / TORCH_INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"({TORCH_INDEX}|pytorch_model).*{message}"):
        TensorFiles(tmp_path)


def test_which_file_is_read(tmp_path):
    """As in transformers: safetensors first, and a single file before an index."""
    save_shards(tmp_path)
    assert len(load(tmp_path)) == 5
    write(tmp_path, {"single": np.ones(3)})
    assert [*load(tmp_path)] == ["single"] and not has_safetensors(tmp_path)
    pytest.importorskip("safetensors")
    x = np.zeros(2)
    write_tensors(tmp_path, [(name, x.shape, x.dtype, lambda: x) for name in ("a", "b")], 16)
    assert [*load(tmp_path)] == ["a", "b"] and has_safetensors(tmp_path)


def test_links_and_other_things_in_place_of_a_file(tmp_path):
    write(tmp_path / "blobs", {"a": np.ones(3)})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / TORCH_SINGLE).symlink_to(Path("..") / "blobs" / TORCH_SINGLE)
    assert load(tmp_path / "model")["a"].tolist() == [1, 1, 1]
    (tmp_path / "folder" / TORCH_SINGLE).mkdir(parents=True)
    with pytest.raises(ValueError, match="no regular file"):
        TensorFiles(tmp_path / "folder")


# Models.


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 and the directory of its checkpoint."""
    pytest.importorskip("safetensors")
    options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
    model = TransformerLM(65, 16, 2, 3, 40, 32, 0.0, **options, key=jax.random.key(0))
    directory = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(directory)
    return model, directory


def read_all(directory):
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.names}


TOKENS = np.array([[3, 61, 5, 7, 0, 12], [9, 4, 4, 20, 33, 64]])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_model_of_pytorch_model_bin(tmp_path, gpt2, legacy):
    """With the masks that older files hold, without the prefix, and as a model in a training."""
    model, directory = gpt2
    arrays = read_all(directory)
    for i in range(3):
        mask = np.tril(np.ones((1, 1, 32, 32), np.uint8))
        arrays |= {f"transformer.h.{i}.attn.bias": mask}
        arrays |= {f"transformer.h.{i}.attn.masked_bias": np.array(-1e4, np.float32)}
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"]  # tied: the same storage
    bare = {name.removeprefix("transformer."): x for name, x in arrays.items()}
    for i, renamed in enumerate((arrays, bare, {f"module.{n}": x for n, x in arrays.items()})):
        path = tmp_path / str(i)
        write(path, renamed, legacy)
        (path / "config.json").write_text((directory / "config.json").read_text())
        found = from_pretrained(path)
        assert (found(TOKENS) == model(TOKENS)).all()


def test_it_is_read_without_torch_and_without_safetensors(tmp_path, gpt2, monkeypatch):
    model, directory = gpt2
    write(tmp_path, read_all(directory))
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for name in "torch", "safetensors", "pickle", "zipfile":
        monkeypatch.setitem(sys.modules, name, None)
    assert (from_pretrained(tmp_path)(TOKENS) == model(TOKENS)).all()


def as_torch_saves_it(directory, path, rename=lambda name: name, extra=None):
    """The same checkpoint with pytorch_model.bin."""
    arrays = {rename(name): x for name, x in read_all(directory).items()} | (extra or {})
    write(path, arrays)
    (path / "config.json").write_text((directory / "config.json").read_text())


def older(name):
    """What BERT's first files call the two halves of a norm."""
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return name.replace("LayerNorm.bias", "LayerNorm.beta")


def assert_same_arrays(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(x) for x in (a, b))
    assert len(a) > 5
    for (path, x), (other, y) in zip(a, b, strict=True):
        assert path == other and x.dtype == y.dtype and (x == y).all(), path


def test_older_names_of_norms(tmp_path):
    pytest.importorskip("safetensors")
    model = TransformerEncoder(
        *(61, 24, 3, 2, 40, 32, 0.0),
        norm_first=False,
        learnable_pos=True,
        embedding_scale=1.0,
        embedding=partial(TransformerEmbedding, norm=LayerNorm, num_token_types=2),
        feed_forward=partial(FeedForward, activation=partial(jax.nn.gelu, approximate=False)),
        key=jax.random.key(1),
    )
    shift = partial(jax.random.normal, jax.random.key(2))
    model = jax.tree.map(lambda x: x + 0.1 * shift(x.shape), model)
    model.save_pretrained(tmp_path / "new")
    as_torch_saves_it(tmp_path / "new", tmp_path / "old", lambda name: f"bert.{older(name)}")
    assert sum(name.endswith("gamma") for name in TensorFiles(tmp_path / "old").names) == 5
    assert_same_arrays(from_pretrained(tmp_path / "old"), model)


EXTRA = {
    "position_ids": np.arange(32)[None],
    "layers.0.rotary_emb.inv_freq": np.ones(4),
    "h.0.attn.masked_bias": np.array(-1e9, np.float32),
}


@pytest.mark.parametrize(
    "name",
    [
        *("bert_pretraining", "roberta", "albert_pooler", "electra", "distilbert", "mpnet"),
        *("gpt2_older_file", "llama_older_file", "gpt_neox", "bloom", "opt", "falcon"),
        *("t5_older_file", "bart_bare", "marian", "m2m_100", "llama_bfloat16"),
    ],
)
def test_families(tmp_path, name):
    """With older names, and constants that no family needs."""
    for package in "torch", "transformers", "safetensors":
        pytest.importorskip(package)
    from hf_checkpoints import make

    make(name, tmp_path / "new")
    as_torch_saves_it(tmp_path / "new", tmp_path / "old", older, EXTRA)
    assert_same_arrays(from_pretrained(tmp_path / "old"), from_pretrained(tmp_path / "new"))


def test_what_is_fetched(tmp_path, gpt2, monkeypatch):
    """pytorch_model.bin only where the repository has no safetensors."""
    hub = pytest.importorskip("huggingface_hub")
    model, directory = gpt2
    arrays = read_all(directory)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text((directory / "config.json").read_text())
        if name == "owner/new":
            shutil.copy(directory / "model.safetensors", path)
        elif any(fnmatch.fnmatch(TORCH_SINGLE, pattern) for pattern in allow_patterns):
            write(path, arrays)
        return str(path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path / "..")
    assert (from_pretrained("owner/new")(TOKENS) == model(TOKENS)).all()
    [patterns] = asked
    for name in TORCH_SINGLE, TORCH_INDEX, "pytorch_model-00001-of-00002.bin":
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    assert (from_pretrained("owner/old")(TOKENS) == model(TOKENS)).all()
    first, second = asked[1:]
    assert first == patterns and set(patterns) < set(second)
    for name in TORCH_SINGLE, TORCH_INDEX, "pytorch_model-00001-of-00002.bin":
        assert any(fnmatch.fnmatch(name, pattern) for pattern in second)
    assert not any(fnmatch.fnmatch("training_args.bin", pattern) for pattern in second)
