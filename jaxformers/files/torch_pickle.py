"""The pickles of a PyTorch file, read as data.

A pickle is a program for a small stack machine. Two of its instructions look up a Python object by
name and call it. Here no object is looked up, and nothing from the file is called. The names with
which tensors are saved (`torch._utils._rebuild_tensor_v2` and a few more) are implemented in
`torch_names`. Every other name is an error, and so is every instruction that `torch.save` does not
use.

The machine does not recurse. The bytes that it reads and its instructions are bounded, and so is
its memory.
"""

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from jaxformers.files.json_file import shorten
from jaxformers.files.torch_names import Name, Storage, find_name, set_item

# A tensor needs about 35 instructions and 250 bytes, so 30,000 tensors in a file are possible.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_INSTRUCTIONS = 2**20
MAX_LINE = 256
MAX_LONG_BYTES = 16


def load_pickle(file: BinaryIO, size: int = MAX_PICKLE_BYTES) -> tuple[Any, dict[str, np.dtype]]:
    """Returns the object that the pickle at the file's position describes, and its storages.

    Arguments:
        file: the file, which is read up to the end of the pickle.
        size: the largest size of the pickle in bytes, 16 MB by default.

    Returns:
        An object of dictionaries, lists, tuples, texts, numbers, `Tensor`s and `Storage`s; and the
        dtype of each storage by its key.

    Raises:
        ValueError: if the pickle has anything else, or is damaged or too large.
    """
    machine = _Machine(file, size)
    return machine.run(), machine.storages


class _Machine:
    """A stack machine, with its stack, the stacks below its marks, and its memo."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.bytes_left = min(size, MAX_PICKLE_BYTES)
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, np.dtype] = {}

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.read(1)
            if code == b".":
                return self.pop()
            if code in _CONSTANTS:
                self.stack.append(_CONSTANTS[code])
            elif code in _INSTRUCTIONS:
                _INSTRUCTIONS[code](self)
            else:
                raise ValueError(
                    f"it has the pickle instruction {_describe(code)}, which no file of plain "
                    "tensors needs"
                )
        raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    def read(self, size: int) -> bytes:
        data = self.file.read(size) if size <= self.bytes_left else b""
        if len(data) < size:
            raise ValueError(f"its pickle is truncated, or longer than {MAX_PICKLE_BYTES} bytes")
        self.bytes_left -= size
        return data

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.read(size), "little")

    def text(self, size: int) -> str:
        return self.read(size).decode()

    def line(self) -> str:
        data = self.file.readline(min(MAX_LINE, self.bytes_left))
        self.bytes_left -= len(data)
        if not data.endswith(b"\n"):
            raise ValueError(f"its pickle has a name of more than {MAX_LINE} bytes, or is cut off")
        return data[:-1].decode()

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes more from the stack than there is")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("its pickle goes back to a mark that is not there")
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"its pickle needs a {kind.__name__} on the stack, which is not there")
        return self.stack[-1]

    def remember(self, index: int) -> None:
        self.memo[index] = self.top(object)

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"its pickle recalls number {index}, which it did not remember")
        self.stack.append(self.memo[index])


def _describe(code: bytes) -> str:
    import pickletools

    names = {known.code: known.name for known in pickletools.opcodes}
    return names.get(code.decode("latin-1"), repr(code))


def _protocol(m: _Machine) -> None:
    version = m.unsigned(1)
    if version > 5:
        raise ValueError(f"its pickle has the protocol {version}, known are those up to 5")


def _frame(m: _Machine) -> None:
    m.read(8)  # the length of a frame, which only a buffering reader needs


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _long(m: _Machine, size: int) -> None:
    if size > MAX_LONG_BYTES:
        raise ValueError(f"its pickle has an integer of {size} bytes")
    m.stack.append(int.from_bytes(m.read(size), "little", signed=True))


def _integer_line(m: _Machine) -> None:
    text = m.line().removesuffix("L")
    if not text.removeprefix("-").isdecimal() or len(text) > 40:
        raise ValueError(f"its pickle has the integer {shorten(text)}")
    # Protocol 1 writes booleans as these integers.
    m.stack.append({"00": False, "01": True}.get(text, int(text)))


def _tuple(m: _Machine, size: int) -> None:
    if len(m.stack) < size:
        raise ValueError("its pickle takes more from the stack than there is")
    items = m.stack[-size:]
    del m.stack[-size:]
    m.stack.append(tuple(items))


def _tuple_from_mark(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _append(m: _Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    m.top(list).extend(items)


def _set(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    set_item(m.top(dict), key, value)


def _set_many(m: _Machine) -> None:
    items = m.pop_mark()
    container = m.top(dict)
    if len(items) % 2:
        raise ValueError("its pickle has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        set_item(container, key, value)


def _global(m: _Machine) -> None:
    module, name = m.line(), m.line()
    m.stack.append(find_name(module, name))


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise ValueError(f"its pickle has the name {shorten(name)} in {shorten(module)}")
    m.stack.append(find_name(module, name))


def _reduce(m: _Machine) -> None:
    args, function = m.pop(), m.pop()
    if not (isinstance(function, Name) and function.call and isinstance(args, tuple)):
        raise ValueError(f"its pickle calls {shorten(function)} with {shorten(args)}")
    m.stack.append(function.call(args))


def _build(m: _Machine) -> None:
    """Drops the attributes of a dictionary, such as the versions of its modules."""
    m.pop()
    m.top(dict)


def _persistent(m: _Machine) -> None:
    """Pushes a storage, given by class, key, device and size, and in older files a part of one."""
    match m.pop():
        case ("storage", np.dtype() as dtype, str() as key, _, int() as size, *view):
            if size >= 0 and len(view) <= 1 and m.storages.setdefault(key, dtype) == dtype:
                storage = Storage(key, dtype, size)
                m.stack.append(_view(storage, view[0]) if view and view[0] else storage)
                return
        case other:
            raise ValueError(f"its pickle refers to {shorten(other)}, which is no storage")
    raise ValueError(f"its pickle has a storage {shorten(key)} of {size} {dtype}, {shorten(view)}")


def _view(storage: Storage, view: Any) -> Storage:
    match view:
        case (_, int() as start, int() as size) if 0 <= start <= start + size <= storage.size:
            return storage._replace(size=size, start=start)
    raise ValueError(f"its pickle has the view {shorten(view)} of {storage.size} numbers")


_CONSTANTS: dict[bytes, Any] = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _mark,
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b"J": lambda m: _long(m, 4),
    b"K": lambda m: m.stack.append(m.unsigned(1)),
    b"M": lambda m: m.stack.append(m.unsigned(2)),
    b"\x8a": lambda m: _long(m, m.unsigned(1)),
    b"\x8b": lambda m: _long(m, m.unsigned(4)),
    b"I": _integer_line,
    b"L": _integer_line,
    b"G": lambda m: m.stack.append(struct.unpack(">d", m.read(8))[0]),
    b"X": lambda m: m.stack.append(m.text(m.unsigned(4))),
    b"\x8c": lambda m: m.stack.append(m.text(m.unsigned(1))),
    b"\x8d": lambda m: m.stack.append(m.text(m.unsigned(8))),
    b"U": lambda m: m.stack.append(m.text(m.unsigned(1))),  # texts of Python 2
    b"T": lambda m: m.stack.append(m.text(m.unsigned(4))),
    b"t": _tuple_from_mark,
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"a": _append,
    b"e": _appends,
    b"s": _set,
    b"u": _set_many,
    b"q": lambda m: m.remember(m.unsigned(1)),
    b"r": lambda m: m.remember(m.unsigned(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.unsigned(1)),
    b"j": lambda m: m.recall(m.unsigned(4)),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": _build,
    b"Q": _persistent,
}
