"""The conversion of files of earlier versions.

A change of the fields of a class that files hold needs a line in one of the tables. The tables
apply to model files and to states of trainings. Records of a model file name their class. Arrays of
a state have only paths, and the classes along a path are those of the skeleton.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from jaxformers.checkpoint import names
from jaxformers.checkpoint.training_state import named_leaves
from jaxformers.paths import path_name

T = TypeVar("T")
Table = dict[str, dict[str, Any]]

# The renamed fields by the public name of their class: the old name and the new one. A field that
# moved into a part of its object, or out of it, has a path: {"EncoderLayer": {"scale":
# "residual.scale"}}. An old name is never used again for another field.
RENAMED: dict[str, dict[str, str]] = {
    "EncoderLayer": {
        "attention": "self_attention",
        "attention_residual": "self_attention_residual",
    },
    "Encoder": {"rematerialisation": "rematerialization"},
    "Decoder": {"rematerialisation": "rematerialization"},
    "MixtureOfExperts": {"renormalise": "renormalize"},
}

# The values of new fields for files without these fields. If the table has no line, model files use
# the default that the class declares. In states of trainings every new array needs a line.
ADDED: Table = {}

# The removed fields, with the value for which a field had no effect.
REMOVED: Table = {}


def _joint(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Converts a `Residual`, which was one class with a word for the placement of its norms.

    Unknown fields do not change, and raise an error later.
    """
    kinds = {
        "pre": ("PreNorm", ["norm"]),
        "post": ("PostNorm", ["norm"]),
        "sandwich": ("Sandwich", ["norm", "output_norm"]),
        "output": ("OutputNorm", ["output_norm"]),
        "none": ("NoNorm", []),
    }
    known = {"norm", "output_norm", "placement", "dropout_rate", "scale"}
    word = fields.get("placement")
    if fields.keys() != known or not isinstance(word, str) or word not in kinds:
        return "Residual", fields
    if fields["norm"] is None and word == "pre":  # the first layer of ModernBERT
        word = "none"
    kind, norms = kinds[word]
    add = {name: fields[name] for name in ("dropout_rate", "scale")}
    kept = {name: fields[name] for name in norms}
    return kind, kept | {"add": {"class": "Addition", "fields": add}}


def _layer(kind: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Converts a layer, whose field `parallel` was a word."""
    classes = {"one norm": "OneNorm", "two norms": "TwoNorms"}
    word = fields.get("parallel")
    if isinstance(word, str) and word in classes:
        fields = fields | {"parallel": {"class": classes[word], "fields": {}}}
    return kind, fields


# The conversions that a table of names cannot express, such as that of a word to an object. A
# function gets the fields of a record as JSON, under their present names. It returns the public
# name of the present class, and the fields of that class.
CONVERTED: dict[str, Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "Residual": _joint,
    "EncoderLayer": partial(_layer, "EncoderLayer"),
    "DecoderLayer": partial(_layer, "DecoderLayer"),
}

MISSING = object()


def convert(owner: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the class and the fields that a record has now.

    Arguments:
        owner: public name of the record's class in the file.
        fields: the fields in the file as JSON. They may be changed in place.

    Returns:
        The public name of the class, and its fields as JSON.
    """
    rename_fields(owner, fields)
    if owner not in CONVERTED:
        return owner, fields
    name, fields = CONVERTED[owner](fields)
    return (name, fields) if name == owner else convert(name, fields)


def rename_fields(owner: str, fields: dict[str, Any]) -> None:
    """Renames the fields of a record, as JSON, to their present names.

    Arguments:
        owner: public name of the record's class.
        fields: the fields in the file, which are changed in place.
    """
    for old, new in RENAMED.get(owner, {}).items():
        source, target = _holder(fields, old), _holder(fields, new)
        before, after = old.split(".")[-1], new.split(".")[-1]
        if source is not None and target is not None and before in source and after not in target:
            target[after] = source.pop(before)


def _holder(fields: Any, path: str) -> dict[str, Any] | None:
    """Returns the fields that contain the last name of a path; None if a part is missing."""
    for part in path.split(".")[:-1]:
        inner = fields.get(part)
        fields = inner.get("fields") if isinstance(inner, dict) else None
        if not isinstance(fields, dict):
            return None
    return fields


def default_of(owner: str | None, cls: type, field: str) -> Any:
    """Returns the value of a field that a record lacks; `MISSING` if none is declared."""
    if field in ADDED.get(owner or "", {}):
        return ADDED[owner or ""][field]
    if not dataclasses.is_dataclass(cls):
        return getattr(cls, "_field_defaults", {}).get(field, MISSING)
    declared = next(x for x in dataclasses.fields(cls) if x.name == field)
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    if declared.default is dataclasses.MISSING:
        return MISSING
    return declared.metadata.get("converter", lambda x: x)(declared.default)


def check_removed(value: Any, neutral: Any, what: str) -> None:
    """Checks that a removed field has the value for which it had no effect.

    Raises:
        ValueError: if it has another value.
    """
    array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if not (bool(np.all(np.asarray(value) == neutral)) if array else value == neutral):
        shown = f"{value.dtype} {value.shape}" if array else repr(value)[:80]
        raise ValueError(
            f"{what} is {shown} in the file. This version does not have it, and only {neutral!r} "
            "had no effect: load the file with the version that wrote it."
        )


class Match(NamedTuple):
    """The correspondence between the paths of saved leaves and those of a skeleton.

    Arguments:
        current: the path in the skeleton by the saved path, where they differ.
        added: the leaves that were not saved, by their path in the skeleton.
        removed: for each removed leaf, by its saved path, the value for which it had no effect.
    """

    current: dict[str, str]
    added: dict[str, Any]
    removed: dict[str, Any]

    def renamed(self, saved: Mapping[str, T]) -> dict[str, T]:
        """Returns the saved leaves by the paths of the skeleton, without the removed leaves."""
        kept = {path: x for path, x in saved.items() if path not in self.removed}
        return {self.current.get(path, path): x for path, x in kept.items()}


def match(saved: Collection[str], like: PyTree) -> Match:
    """Returns the correspondence of saved paths and a skeleton, by the tables above.

    Saved paths without a counterpart do not change.
    """
    found = Match({}, {}, {})
    missing = named_leaves(like).keys() - set(saved)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        path = path_name(keys)
        if path not in missing:
            continue
        former = next((x for x in _spellings(like, keys) if x in saved), None)
        if former is not None:
            found.current[former] = path
            continue
        value = _added(like, keys)
        if value is not MISSING:
            found.added[path] = _filled(leaf, value)
    for path in set(saved) - named_leaves(like).keys() - found.current.keys():
        neutral = _removed(like, path)
        if neutral is not MISSING:
            found.removed[path] = neutral
    return found


def _owner(x: Any) -> str:
    """Returns the public name of an object's class; "" if it has none."""
    return next((name for name, known in names.OURS.items() if known is type(x)), "")


def _spellings(x: Any, keys: tuple) -> Iterator[str]:
    """Yields all paths that a leaf below `x` has had, the present one included."""
    if not keys:
        yield ""
        return
    own = [path_name((key,)) for key in keys]
    ways = [(own[:1], own[0])]
    for old, new in RENAMED.get(_owner(x), {}).items():
        parts = new.split(".")
        if own[: len(parts)] == parts:
            ways.append((parts, old))
    for parts, name in ways:
        below = x
        for key in keys[: len(parts)]:
            below = _child(below, key)
        for rest in _spellings(below, keys[len(parts) :]):
            yield f"{name}.{rest}" if rest else name


def _child(x: Any, key: Any) -> Any:
    match key:
        case jax.tree_util.GetAttrKey(name=name):
            return getattr(x, name, None)
        case jax.tree_util.DictKey(key=name):
            return x[name]
        case jax.tree_util.SequenceKey(idx=i):
            return x[i]
    return None


def _added(like: PyTree, keys: tuple) -> Any:
    """Returns the value of a leaf that a file lacks, or `MISSING`."""
    x = like
    for key in keys:
        values = ADDED.get(_owner(x), {})
        if path_name((key,)) in values:
            return values[path_name((key,))]
        x = _child(x, key)
    return MISSING


def _filled(leaf: Any, value: Any) -> Any:
    """Returns a leaf of the same shape and dtype that has one value everywhere."""
    return np.full(leaf.shape, value, leaf.dtype) if hasattr(leaf, "dtype") else type(leaf)(value)


def _removed(like: PyTree, path: str) -> Any:
    """Returns the value for which a removed leaf had no effect, or `MISSING`."""
    x = like
    for name in path.split("."):
        owner = _owner(x)
        if name in REMOVED.get(owner, {}):
            return REMOVED[owner][name]
        name = RENAMED.get(owner, {}).get(name, name)
        if isinstance(x, Mapping):
            x = next((value for key, value in x.items() if str(key) == name), None)
        elif isinstance(x, list | tuple) and name.isdigit() and int(name) < len(x):
            x = x[int(name)]
        else:
            x = getattr(x, name, None)
    return MISSING
