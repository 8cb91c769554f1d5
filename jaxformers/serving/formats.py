"""The option `response_format` as what follows an answer."""

import json
from collections import OrderedDict
from typing import Any, NamedTuple

from jaxformers.constraints.json_schema import JSONSchema
from jaxformers.constraints.lark import Follower as GrammarFollower
from jaxformers.constraints.lark import LarkGrammar
from jaxformers.constraints.tables import TableFollower
from jaxformers.serving.errors import Refused, one_line
from jaxformers.serving.fields import Fields
from jaxformers.serving.workers import Workers
from jaxformers.tokenizers.tokenizer import Tokenizer

# The most characters of a schema, the most bytes of its tables, and of all those that are kept.
LONGEST, LARGEST, KEPT = 65_536, 16 * 2**20, 64 * 2**20
WAITING = 16  # the most schemas that wait to be built
GRAMMAR_BYTES = 2**20  # about what a grammar takes
FormatFollower = TableFollower | GrammarFollower  # `of_one_row` gives one for a row


class Format(NamedTuple):
    """What an answer has to be.

    Arguments:
        name: of the field that says it.
        schema: a JSON Schema.
        is_any: whether all that the schema allows has to be possible; tables allow a part of it.
    """

    name: str
    schema: Any
    is_any: bool


class Formats:
    """The formats of answers, of which the last ones are kept.

    Arguments:
        tokenizer: of the model.
        vocab_size: of the model.
        ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]):
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, ends
        self._known: OrderedDict[str, FormatFollower] = OrderedDict()
        self._workers = Workers("schemas", 1, WAITING)

    async def follower(self, format_: Format | None) -> FormatFollower | None:
        """Returns what follows answers of a format; None if they are free.

        Raises:
            Refused: if it cannot be followed.
        """
        if format_ is None:
            return None
        name = format_.name
        if not self._ends:
            raise Refused(
                "this model has no token that ends a text, which formats need.", param=name
            )
        try:
            key = json.dumps(format_.schema)
            if len(key) > LONGEST:
                raise ValueError(f"the schema must have at most {LONGEST} characters as JSON.")
            key += str(format_.is_any)
            return await self._workers.run(self._follower, key, format_)
        except (ValueError, ImportError, RecursionError) as error:
            raise Refused(f"{name} cannot be followed: {one_line(error)}", param=name) from None

    def close(self) -> None:
        """Ends its thread."""
        self._workers.close()

    def _follower(self, key: str, format_: Format) -> FormatFollower:
        """Returns what follows a format; in the only thread for it."""
        if key not in self._known:
            self._known[key] = self._build(format_.schema, format_.is_any)
        self._known.move_to_end(key)
        while sum(map(_size, self._known.values())) > KEPT:
            self._known.popitem(last=False)
        return self._known[key]

    def _build(self, schema: Any, is_any: bool) -> FormatFollower:
        """Returns tables if they are small, and a grammar otherwise."""
        refusal: Exception | None = None
        if not is_any:
            try:
                found = JSONSchema(schema, self._tokenizer).follower(self._vocab_size, self._ends)
                if found.nbytes <= LARGEST:
                    return found
                refusal = ValueError(f"its tables have more than {LARGEST} bytes.")
            except ValueError as error:  # such as a recursive schema
                refusal = error
        try:
            grammar = LarkGrammar.of_json_schema(schema, self._tokenizer)
            return grammar.follower(self._vocab_size, self._ends)
        except (ValueError, ImportError) as error:
            raise (error if refusal is None else refusal) from None


def read_format(fields: Fields) -> Format | None:
    """Returns the format that the field `response_format` names; None if answers are free."""
    group = fields.group("response_format")
    if group is None:
        return None
    kind = group.choice("type", ("text", "json_object", "json_schema"), required=True)
    described = group.group("json_schema", required=True) if kind == "json_schema" else None
    group.finish()
    if described is not None:
        return _read_schema(described)
    return Format(group.name("type"), {"type": "object"}, True) if kind == "json_object" else None


def _read_schema(fields: Fields) -> Format:
    fields.string("name", 64, required=True)
    fields.string("description", 4096)
    fields.flag("strict")  # it is kept to in any case
    schema = fields.take("schema")
    if not isinstance(schema, dict):
        raise fields.wrong("schema", "a JSON Schema, which is an object", schema)
    fields.finish()
    return Format(fields.name("schema"), schema, False)


def _size(follower: FormatFollower) -> int:
    return getattr(follower, "nbytes", GRAMMAR_BYTES)
