"""Conversion of objects to JSON and arrays, and back.

Reading a file imports and runs nothing that the file names. Names are looked up in the table of
`names`, and objects are built from their fields without calling `__init__`. `migration` converts
the records of earlier versions.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.checkpoint.migration import (
    MISSING,
    REMOVED,
    check_removed,
    convert,
    default_of,
)
from jaxformers.checkpoint.names import field_names, is_record, known_objects, public_name
from jaxformers.files.json_file import shorten
from jaxformers.files.safetensors_file import DTYPES, NAMES
from jaxformers.sharding.hosts import check_here

_PARTIALS = {"functools": functools.partial, "jax": jax.tree_util.Partial}


class Encoder:
    """An encoder of objects as JSON, which collects their arrays by path in `arrays`.

    An array that occurs at two places is stored once. `found` holds the known arrays by their `id`:
    each array itself and the JSON that is written in its place.
    """

    arrays: dict[str, Any]
    found: dict[int, tuple[Any, dict]]

    def __init__(self) -> None:
        self.arrays, self.found = {}, {}
        self._names = {id(x): name for name, x in reversed(known_objects().items())}
        self._inside: set[int] = set()

    def encode(self, x: Any, path: str = "") -> Any:
        """Returns `x` as JSON.

        Raises:
            ValueError: if an object cannot be encoded; the error names its path.
        """
        if x is None or type(x) in (bool, int, str):
            return x
        if type(x) is float:
            return x if math.isfinite(x) else {"float": repr(x)}
        if isinstance(x, np.dtype):
            return {"dtype": str(x)}
        if id(x) in self._names:
            return {"name": self._names[id(x)]}
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return self._array(x, path)
        if id(x) in self._inside:
            raise ValueError(f"{_at(path)} holds itself, so that it has no end.")
        self._inside.add(id(x))
        try:
            return self._container(x, path)
        finally:
            self._inside.remove(id(x))

    def _container(self, x: Any, path: str) -> dict | list:
        inner = functools.partial(_join, path)
        if type(x) in (list, tuple):
            items = [self.encode(item, inner(i)) for i, item in enumerate(x)]
            return items if type(x) is list else {"tuple": items}
        if type(x) is dict:
            pairs = [[self.encode(k, inner(k)), self.encode(v, inner(k))] for k, v in x.items()]
            return {"dict": pairs}
        if type(x) in _PARTIALS.values():
            return {
                "partial": self.encode(x.func, inner("func")),
                "of": next(name for name, kind in _PARTIALS.items() if kind is type(x)),
                "args": self.encode(list(x.args), inner("args")),
                "keywords": self.encode(x.keywords, inner("keywords")),
            }
        if is_record(type(x)):
            return self._record(x, path)
        if callable(x) and hasattr(x, "__qualname__"):
            return {"name": _importable_name(x, path)}
        raise ValueError(
            f"{_at(path)} is a {type(x).__module__}.{type(x).__qualname__}, which cannot be saved. "
            "Modules, dataclasses, NamedTuples, arrays, numbers, texts, functions with a name, and "
            "lists, tuples and dicts of these can."
        )

    def _record(self, x: Any, path: str) -> dict:
        names = field_names(x)
        surplus = sorted(getattr(x, "__dict__", {}).keys() - set(names))
        if surplus:
            raise ValueError(
                f"{_at(path)} has the attributes {', '.join(surplus)} beside the fields of its "
                f"class {type(x).__name__}: make them fields, or save what it was made of."
            )
        fields = {name: self.encode(getattr(x, name), _join(path, name)) for name in names}
        name = self._names.get(id(type(x))) or _importable_name(type(x), path)
        return {"class": name, "fields": fields}

    def _array(self, x: Any, path: str) -> dict:
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"{_at(path)} has no numbers inside of jit, grad or vmap: save outside of it."
            )
        if id(x) in self.found:
            return self.found[id(x)][1]
        name = path or "array"
        while name in self.arrays or name == "__metadata__":
            name += "'"  # {"a.b": x} and {"a": {"b": x}} have the same path
        kind, data = kind_of(x), x
        if kind.startswith("key "):
            data = jax.random.key_data(x)
        elif kind == "scalar":
            data = np.asarray(x)
        if data.dtype not in NAMES:
            raise ValueError(f"{_at(path)} has the dtype {x.dtype}, which a file cannot hold.")
        check_here(_at(path), data)
        self.arrays[name] = data
        entry = {"array": name, "as": kind}
        self.found[id(x)] = x, entry  # keeps x alive, so that no other object gets its id
        return entry


def kind_of(x: Any) -> str:
    """Returns the kind of an array that a file stores beside its numbers."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"key {jax.random.key_impl(x)}"
    if isinstance(x, jax.Array):
        return "jax"
    return "scalar" if isinstance(x, np.generic) else "numpy"


def _importable_name(x: Any, path: str) -> str:
    """Returns the name by which another program can find a class or function."""
    module, name = getattr(x, "__module__", None), x.__qualname__
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not x:
        raise ValueError(
            f"{_at(path)} is made of {module}.{name}, which no other program finds by this name. A "
            "lambda, a function or a class from inside of a function cannot be saved: define it at "
            "the top level of a module, or make it an eqx.Module whose fields are what it needs."
        )
    return f"{module}:{name}"


class Decoder:
    """A decoder, which builds objects from the JSON of an `Encoder`.

    Arguments:
        read: function `(name, kind) -> array` that reads a tensor of the file. The kinds are "jax",
            "numpy", "scalar" (of NumPy) and "key <implementation>".
        known: classes and functions that the file may name, besides those of `known_objects`.
    """

    def __init__(self, read: Callable[[str, str], Any], known: Iterable[Any] = ()):
        self._read = read
        self._objects = known_objects()
        self._given: dict[str, Any] = {}
        for x in known:
            if not callable(x) or not hasattr(x, "__qualname__"):
                raise ValueError(f"known must be classes and functions, got {x!r:.200}.")
            if self._given.setdefault(x.__qualname__, x) is not x:
                raise ValueError(f"known has two different objects named {x.__qualname__}.")
        self._arrays: dict[tuple, Any] = {}

    def decode(self, x: Any, path: str = "") -> Any:
        """Returns the object that JSON of an `Encoder` describes.

        Raises:
            ValueError: if a part has an invalid form, an unknown name or other fields; the error
                names its path.
        """
        if isinstance(x, list):
            return [self.decode(item, _join(path, i)) for i, item in enumerate(x)]
        if not isinstance(x, dict):
            return x
        match x:
            case {"float": "inf" | "-inf" | "nan" as text} if len(x) == 1:
                return float(text)
            case {"dtype": str(name)} if len(x) == 1 and name in map(str, DTYPES.values()):
                return jnp.dtype(name)
            case {"name": str(name)} if len(x) == 1:
                return self._find(name, path)
            case {"tuple": list(items)} if len(x) == 1:
                return tuple(self.decode(items, path))
            case {"dict": list(pairs)} if len(x) == 1:
                return self._dict(pairs, path)
            case {"array": str(name), "as": str(kind)} if len(x) == 2:
                return self._array(name, kind)
            case {"partial": f, "of": str(of), "args": list(), "keywords": {"dict": list()}} if (
                len(x) == 4
            ):
                return self._partial(x, f, of, path)
            case {"class": str(name), "fields": dict(fields)} if len(x) == 2:
                return self._record(name, fields, path)
        raise ValueError(f"{_at(path)} is described by {shorten(x)}, which is not understood.")

    def _array(self, name: str, kind: str) -> Any:
        if (name, kind) not in self._arrays:
            self._arrays[name, kind] = self._read(name, kind)
        return self._arrays[name, kind]

    def _dict(self, pairs: list, path: str) -> dict:
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"{_at(path)} must be a dict in pairs, got {shorten(pairs)}.")
        try:
            keys = [self.decode(key, path) for key, _ in pairs]
            found = {
                key: self.decode(value, _join(path, key))
                for key, (_, value) in zip(keys, pairs, strict=True)
            }
        except TypeError as error:
            raise ValueError(f"{_at(path)} has a key that no dict can have: {error}.") from error
        return found

    def _partial(self, x: dict, f: Any, of: str, path: str) -> Any:
        function = self.decode(f, _join(path, "func"))
        args = self.decode(x["args"], _join(path, "args"))
        keywords = self.decode(x["keywords"], _join(path, "keywords"))
        named = all(isinstance(name, str) for name in keywords)
        if not callable(function) or of not in _PARTIALS or not named:
            raise ValueError(f"{_at(path)} is no partial function: {shorten(x)}.")
        return _PARTIALS[of](function, *args, **keywords)

    def _record(self, name: str, fields: dict, path: str) -> Any:
        cls, owner = self._find(name, path), None
        if self._objects.get(public_name(name)) is cls:
            owner, fields = convert(public_name(name), fields)
            cls = self._find(owner, path)
        if not is_record(cls):
            raise ValueError(f"{_at(path)}: {name} is no class of modules or of fields alone.")
        values = self._fields(name, owner, cls, fields, path)
        if issubclass(cls, tuple):
            return tuple.__new__(cls, [values[k] for k in field_names(cls)])
        try:
            made = object.__new__(cls)
        except TypeError as error:
            raise ValueError(f"{_at(path)} cannot be a {name}: {error}.") from error
        for k, value in values.items():
            object.__setattr__(made, k, value)
        return made

    def _fields(
        self, name: str, owner: str | None, cls: type, fields: dict, path: str
    ) -> dict[str, Any]:
        """Returns the value of each field of a record of any version."""
        own = field_names(cls)
        gone = REMOVED.get(owner or "", {})
        new = {k: default_of(owner, cls, k) for k in own if k not in fields}
        missing = sorted(k for k, value in new.items() if value is MISSING)
        surplus = sorted(fields.keys() - set(own) - gone.keys())
        if missing or surplus:
            raise ValueError(
                f"{_at(path)} is a {name}, which has other fields here than in the file: missing "
                f"there {', '.join(missing) or 'none'}; not known here "
                f"{', '.join(map(shorten, surplus)) or 'none'}. The file is of another version: "
                "load it with that one."
            )
        values = {k: self.decode(v, _join(path, k)) for k, v in fields.items()}
        for k in values.keys() - set(own):
            check_removed(values[k], gone[k], f"the field {k} of the {name} at {_at(path)}")
        return {k: values[k] if k in values else new[k] for k in own}

    def _find(self, name: str, path: str) -> Any:
        known = self._objects.get(public_name(name))
        if known is not None:
            return known
        given = self._given.get(name.partition(":")[2])
        if given is None and ":" not in name:
            raise ValueError(
                f"{_at(path)} is or is made of {shorten(name)}, which is not looked for: this "
                "version of jaxformers has no such name. The file may be of a newer one."
            )
        if given is None:
            raise ValueError(
                f"{_at(path)} is or is made of {shorten(name)}, which is not looked for, since a "
                "file could name anything. If you know and trust it, import it and pass it: "
                "load(path, known=[...])."
            )
        return given


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _at(path: str) -> str:
    """Returns the name of a place for an error."""
    return shorten(path) if path else "the whole"
