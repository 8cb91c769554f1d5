"""How files of earlier versions are brought into the form of this one.

Whoever changes the fields of a class that files hold adds a line to one of the tables. They
serve native files, whose records name their class, and states of trainings, whose arrays have paths
alone: the classes along a path are those of the skeleton that is restored.
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

# By the public name of a class: the fields that have another name now. A field that moved into a
# part of its object, or out of one, has a path: {"EncoderLayer": {"scale": "residual.scale"}}. A
# name that was given up is not used again for something else.
RENAMED: dict[str, dict[str, str]] = {
    "EncoderLayer": {
        "attention": "self_attention",
        "attention_residual": "self_attention_residual",
    },
    "Encoder": {"rematerialisation": "rematerialization"},
    "Decoder": {"rematerialisation": "rematerialization"},
    "MixtureOfExperts": {"renormalise": "renormalize"},
}

# What a file means that does not have a new field. In native files the default that the class
# declares holds without a line here; in states of trainings every new array needs one.
ADDED: Table = {}

# The fields that are gone, with the value by which they had no effect.
REMOVED: Table = {}


def _joint(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Converts a `Residual`, which was one class with a word for the place of its norms.

    Other fields than those of earlier versions stay as they are, and are refused later.
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


# What a table of names cannot say, such as a word that became an object. A function gets the fields
# of a record, as JSON and under their names of today, and returns the public name of the class that
# the record has now, and the fields of that class.
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
        fields: what the file has, as JSON; it may be changed in place.

    Returns:
        The public name of the class, and its fields as JSON.
    """
    rename_fields(owner, fields)
    if owner not in CONVERTED:
        return owner, fields
    name, fields = CONVERTED[owner](fields)
    return (name, fields) if name == owner else convert(name, fields)


def rename_fields(owner: str, fields: dict[str, Any]) -> None:
    """Gives the fields of a record, as JSON, the names that they have now.

    Arguments:
        owner: public name of the record's class.
        fields: what the file has, changed in place.
    """
    for old, new in RENAMED.get(owner, {}).items():
        source, target = _holder(fields, old), _holder(fields, new)
        before, after = old.split(".")[-1], new.split(".")[-1]
        if source is not None and target is not None and before in source and after not in target:
            target[after] = source.pop(before)


def _holder(fields: Any, path: str) -> dict[str, Any] | None:
    """Returns the fields among which the last name of a path is; None if there is no such part."""
    for part in path.split(".")[:-1]:
        inner = fields.get(part)
        fields = inner.get("fields") if isinstance(inner, dict) else None
        if not isinstance(fields, dict):
            return None
    return fields


def default_of(owner: str | None, cls: type, field: str) -> Any:
    """Returns what a record means that does not have a field; `MISSING` if that is not declared."""
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
    """Raises unless a field that is gone has the value by which it had no effect."""
    array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if not (bool(np.all(np.asarray(value) == neutral)) if array else value == neutral):
        shown = f"{value.dtype} {value.shape}" if array else repr(value)[:80]
        raise ValueError(
            f"{what} is {shown} in the file. This version does not have it, and only {neutral!r} "
            "had no effect: load the file with the version that wrote it."
        )


class Match(NamedTuple):
    """How the paths of what was saved fit a skeleton.

    Arguments:
        current: the path in the skeleton, by the path that was saved, where these differ.
        added: leaves that were not saved, by their path in the skeleton.
        removed: by the path that was saved, the value with which a leaf had no effect that is gone.
    """

    current: dict[str, str]
    added: dict[str, Any]
    removed: dict[str, Any]

    def renamed(self, saved: Mapping[str, T]) -> dict[str, T]:
        """Returns what was saved by the paths of the skeleton, without what is gone."""
        kept = {path: x for path, x in saved.items() if path not in self.removed}
        return {self.current.get(path, path): x for path, x in kept.items()}


def match(saved: Collection[str], like: PyTree) -> Match:
    """Returns how the paths of what was saved fit a skeleton, by the tables above.

    Paths that fit nowhere are left as they are.
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
    """Returns the public name of an object's class, "" if it has none."""
    return next((name for name, known in names.OURS.items() if known is type(x)), "")


def _spellings(x: Any, keys: tuple) -> Iterator[str]:
    """Yields the paths that a leaf below `x` has had, its present one among them."""
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
    """Returns what files mean that do not have a leaf, or `MISSING`."""
    x = like
    for key in keys:
        values = ADDED.get(_owner(x), {})
        if path_name((key,)) in values:
            return values[path_name((key,))]
        x = _child(x, key)
    return MISSING


def _filled(leaf: Any, value: Any) -> Any:
    """Returns a leaf like another one that has one value everywhere."""
    return np.full(leaf.shape, value, leaf.dtype) if hasattr(leaf, "dtype") else type(leaf)(value)


def _removed(like: PyTree, path: str) -> Any:
    """Returns the value with which a leaf that is gone had no effect, or `MISSING`."""
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
