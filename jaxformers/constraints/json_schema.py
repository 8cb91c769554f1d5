"""JSON Schemas as expressions.

What is generated is a part of what a schema allows: objects have the properties that it names in
their order and no others, numbers have a limited number of digits, and values of which nothing is
said are strings, numbers, true, false or null. A keyword that is not enforced is refused.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from jaxformers.constraints import json_text
from jaxformers.constraints.constraint import Constraint
from jaxformers.constraints.expressions import (
    NOTHING,
    Expression,
    Repeat,
    Sequence,
    alternatives,
    optional,
    sequence,
)
from jaxformers.constraints.json_pattern import limit, read_pattern
from jaxformers.constraints.json_text import COLON, COMMA
from jaxformers.tokenizers.tokenizer import Tokenizer

ANNOTATIONS = frozenset(
    "title description default examples $schema $comment deprecated readOnly writeOnly $defs "
    "definitions".split()
)
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
TYPES = "object", "array", "string", "integer", "number", "boolean", "null"
ENFORCED = {"type", "enum", "const", "anyOf", "$ref", *(x for row in OF_TYPE.values() for x in row)}
SCALARS = alternatives([json_text.string(), json_text.numbers(None, None), "true", "false", "null"])


class JSONSchema(Constraint):
    """JSON that a schema allows, with at most one space between its elements.

    Enforced are type, enum, const, properties, required, additionalProperties, items, minItems,
    maxItems, minLength, maxLength, pattern, minimum, maximum and their exclusive forms, anyOf, and
    $ref within the schema. Keywords that assert nothing are ignored, all others refused.

    Arguments:
        schema: a dict, its JSON, a dataclass, or a model of pydantic.
        tokenizer: of the model.

    Raises:
        ValueError: if it is no schema, has a keyword that is not enforced, or is recursive.

    Example:
        >>> schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
        >>> options = {"constraint": JSONSchema(schema, tokenizer), "end_token": 60}
        >>> text = tokenizer.decode(model.generate(prompt, 10, **options)[0, prompt.shape[1]:])
        >>> json.loads(text)["n"] in (1, 2)
        True
    """

    def __init__(self, schema: Any, tokenizer: Tokenizer):
        read = read_schema(schema)
        try:
            expression = _Translation(read).of(read, ())
        except RecursionError:
            raise ValueError("the schema has too many schemas in schemas.") from None
        self.build(expression, tokenizer, f"JSONSchema({json.dumps(read)[:100]})")


def read_schema(schema: Any) -> Any:
    """Returns a schema as a dict, or as True or False.

    Raises:
        ValueError: if it is of another kind, or holds values that JSON does not have.
    """
    if hasattr(schema, "model_json_schema"):
        return schema.model_json_schema()
    if dataclasses.is_dataclass(schema) and isinstance(schema, type):
        from jaxformers.constraints.annotations import schema_of

        return schema_of(schema)
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"schema must be JSON, got {schema!r:.80}: {error}.") from None
    if isinstance(schema, Mapping):
        try:
            return json.loads(json.dumps(dict(schema), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema must hold values of JSON alone: {error}.") from None
    if isinstance(schema, bool):
        return schema
    raise ValueError(
        "schema must be a dict, a string of JSON, a dataclass or a model of pydantic, got "
        f"{type(schema).__name__}."
    )


class _Translation:
    """The translation of one schema, in which references are looked up."""

    def __init__(self, root: Any):
        self.root = root

    def of(self, schema: Any, within: tuple[str, ...]) -> Expression:
        """Returns the expression of a schema; `within` are the references that lead to it."""
        if isinstance(schema, bool):
            return SCALARS if schema else NOTHING
        if not isinstance(schema, dict):
            raise ValueError(f"a schema must be an object, true or false, got {schema!r:.80}.")
        said = {key: x for key, x in schema.items() if key not in ANNOTATIONS}
        if schema is self.root:
            said.pop("$id", None)
        if unknown := sorted(said.keys() - ENFORCED):
            raise ValueError(
                f"the keyword {unknown[0]} of JSON Schema is not enforced, so it is refused. Leave "
                f"it out, or say the same with {', '.join(sorted(ENFORCED))}."
            )
        for keyword in ("$ref", "anyOf"):
            if keyword in said:
                if others := sorted(said.keys() - {keyword}):
                    raise ValueError(
                        f"{keyword} beside {others[0]} is not enforced. Write {others[0]} into "
                        "what it leads to."
                    )
                translate = self.reference if keyword == "$ref" else self.any_of
                return translate(said[keyword], within)
        types = self.types(said)
        if "enum" in said or "const" in said:
            return self.enum(said, types)
        options = [getattr(self, f"_{x}")(said, within) for x in types]
        return alternatives(options) if options else SCALARS

    def types(self, said: dict[str, Any]) -> list[str]:
        """Returns the types that are named or, where none is, that the keywords are about."""
        if "type" not in said:
            return [x for x, words in OF_TYPE.items() if said.keys() & set(words)]
        given = said["type"] if isinstance(said["type"], list) else [said["type"]]
        if (
            not given
            or any(x not in TYPES for x in given if isinstance(x, str))
            or not all(isinstance(x, str) for x in given)
        ):
            raise ValueError(f"type must be of {', '.join(TYPES)}, got {said['type']!r:.80}.")
        return list(dict.fromkeys(given))

    def reference(self, reference: Any, within: tuple[str, ...]) -> Expression:
        if reference in within:
            raise ValueError(
                f"the schema is recursive by {reference!r:.80}, which no finite automaton can "
                "follow. Unroll it to a depth, or take LarkGrammar.of_json_schema."
            )
        if not isinstance(reference, str) or not re.match("#(/|$)", reference):
            raise ValueError(f"$ref must be within the schema, as #/$defs/x, got {reference!r}.")
        found = self.root
        for part in unquote(reference).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(part) if isinstance(found, list) else part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"$ref leads nowhere, got {reference!r:.80}.") from None
        return self.of(found, (*within, reference))

    def any_of(self, schemas: Any, within: tuple[str, ...]) -> Expression:
        if not isinstance(schemas, list) or not schemas:
            raise ValueError(f"anyOf must be a list of schemas, got {schemas!r:.80}.")
        return alternatives([self.of(x, within) for x in schemas])

    def enum(self, said: dict[str, Any], types: list[str]) -> Expression:
        """Returns one of the values of enum, or the one of const."""
        if beside := sorted(said.keys() - {"enum", "const", "type"}):
            raise ValueError(f"enum or const beside {beside[0]} is not enforced. Leave one out.")
        values = said.get("enum", [said.get("const")])
        if not isinstance(values, list):
            raise ValueError(f"enum must be a list, got {values!r:.80}.")
        if "const" in said:
            values = [x for x in values if _same(x, said["const"])]
        kept = [x for x in values if not types or any(_is(x, kind) for kind in types)]
        return alternatives([json_text.value(x) for x in kept]) if kept else NOTHING

    def _boolean(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        return alternatives(["true", "false"])

    def _null(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        return sequence("null")

    def _integer(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        return json_text.integers(*_range(said))

    def _number(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        return json_text.numbers(*_range(said))

    def _string(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        least, most = _count(said, "minLength") or 0, _count(said, "maxLength")
        if most is not None and least > most:
            return NOTHING
        if "pattern" not in said:
            return json_text.string(least, most)
        expression = read_pattern(said["pattern"])
        if least or most is not None:
            expression = limit(expression, least, most)
        return sequence('"', json_text.written(expression), '"')

    def _array(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        least, most = _count(said, "minItems") or 0, _count(said, "maxItems")
        item = self.of(said.get("items", True), within)
        if most is not None and least > most:
            return NOTHING
        more = None if most is None else most - 1
        filled: Expression = NOTHING
        if most != 0:
            filled = sequence(item, Repeat(sequence(COMMA, item), max(least - 1, 0), more))
        return sequence("[", Repeat(filled, 0, 1) if least == 0 else filled, "]")

    def _object(self, said: dict[str, Any], within: tuple[str, ...]) -> Expression:
        properties, required = said.get("properties", {}), said.get("required", [])
        if not isinstance(properties, dict):
            raise ValueError(f"properties must be an object, got {properties!r:.80}.")
        if not isinstance(required, list) or not all(isinstance(x, str) for x in required):
            raise ValueError(f"required must be a list of names, got {required!r:.80}.")
        others = said.get("additionalProperties", True)
        named = properties | {x: others for x in required if x not in properties}
        pairs = []
        for name, schema in named.items():
            if schema is False and name not in required:
                continue
            body = self.of(schema, within)
            pairs.append((sequence(json_text.value(name), COLON, body), name in required))
        return sequence("{", _pairs(pairs), "}")


def _pairs(pairs: list[tuple[Expression, bool]]) -> Expression:
    """Returns properties in their order with commas between them; some may be left out.

    The parts after a property are one expression wherever they come, so that their nodes are made
    once.
    """
    after: list[Expression] = [Sequence(())]  # what follows the last property, the one before, ...
    for pair, is_required in reversed(pairs):
        more = sequence(COMMA, pair)
        after.append(Sequence((more if is_required else optional(more), after[-1])))
    options: list[Expression] = []
    for i, (pair, is_required) in enumerate(pairs):
        options.append(Sequence((pair, after[len(pairs) - 1 - i])))
        if is_required:
            return alternatives(options)
    return alternatives([*options, Sequence(())])


def _range(said: dict[str, Any]) -> tuple[int | None, int | None]:
    """Returns the least and the most whole number."""
    rounded = {
        "minimum": math.ceil,
        "exclusiveMinimum": lambda x: math.floor(x) + 1,
        "maximum": math.floor,
        "exclusiveMaximum": lambda x: math.ceil(x) - 1,
    }
    found = {name: f(_number(said, name)) for name, f in rounded.items() if name in said}
    low = [found[x] for x in ("minimum", "exclusiveMinimum") if x in found]
    high = [found[x] for x in ("maximum", "exclusiveMaximum") if x in found]
    return max(low, default=None), min(high, default=None)


def _number(said: dict[str, Any], name: str) -> int | float:
    if isinstance(said[name], bool) or not isinstance(said[name], int | float):
        raise ValueError(f"{name} must be a number, got {said[name]!r:.80}.")
    return said[name]


def _count(said: dict[str, Any], name: str) -> int | None:
    given = said.get(name)
    if name not in said:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or given < 0 or given % 1:
        raise ValueError(f"{name} must be a whole number of at least 0, got {given!r:.80}.")
    return int(given)


def _is(value: Any, kind: str) -> bool:
    """Returns whether a value is of a type of JSON."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and value % 1 == 0)
    names: dict[str, type] = {"object": dict, "array": list, "string": str, "null": type(None)}
    return kind in names and isinstance(value, names[kind])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True) or (
        isinstance(one, int | float) and isinstance(other, int | float) and one == other
    )
