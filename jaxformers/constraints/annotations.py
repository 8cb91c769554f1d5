"""The JSON Schema of a dataclass, by the annotations of its fields."""

import dataclasses
import enum
import types
import typing
from collections.abc import Hashable
from typing import Any

PLAIN = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    None: {"type": "null"},
    list: {"type": "array"},
    Any: {},
}


def schema_of(kind: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Returns the schema of an annotation: a dataclass, or what its fields may be.

    Fields with a default may be left out.

    Raises:
        ValueError: if it has no schema, or a dataclass is within itself.

    Example:
        >>> schema_of(list[int | None])
        {'type': 'array', 'items': {'anyOf': [{'type': 'integer'}, {'type': 'null'}]}}
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return schema_of(arguments[0], within)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(x, within) for x in arguments]}
    if origin is list and len(arguments) == 1:
        return {"type": "array", "items": schema_of(arguments[0], within)}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [x.value for x in kind]}
    if dataclasses.is_dataclass(kind) and kind not in within:
        return _fields(kind, (*within, kind))
    if isinstance(kind, Hashable) and kind in PLAIN:
        return dict(PLAIN[kind])
    is_within = dataclasses.is_dataclass(kind)
    raise ValueError(
        f"the annotation {kind!r:.80} "
        + ("is within itself, which makes a recursive schema" if is_within else "has no schema")
        + ". Fields may be str, int, float, bool, None, list[...], Literal, Enum, unions of these "
        "and dataclasses of them; else pass the schema as a dict."
    )


def _fields(kind: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    fields = [x for x in dataclasses.fields(kind) if x.init]
    missing = dataclasses.MISSING
    return {
        "type": "object",
        "properties": {x.name: schema_of(hints[x.name], within) for x in fields},
        "required": [
            x.name for x in fields if x.default is missing and x.default_factory is missing
        ],
        "additionalProperties": False,
    }
