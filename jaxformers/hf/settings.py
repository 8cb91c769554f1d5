"""How the entries of a config.json relate to an `Architecture`, in both directions.

A family's table is a tuple of settings. Each one reads some keys of the file into fields, and
writes fields back into keys. A file holds only what differs from its class's defaults, so each
setting knows the default of its family.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.generation.checkpoint_settings import SETTINGS
from jaxformers.hf.architecture import Architecture
from jaxformers.hf.harmless import HARMLESS as HARMLESS
from jaxformers.hf.harmless import is_harmless

LARGEST = 2**31 - 1
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38  # that float32 can hold


class Config:
    """A config.json being read: it knows which of its keys somebody has understood.

    Settings may ask `tensors` what the checkpoint holds: see `tensors.py`.
    """

    def __init__(self, entries: Mapping[str, Any], tensors: Any):
        self.entries = dict(entries)
        self.tensors = tensors
        self.used: set[str] = {"model_type"}

    def get(self, key: str, default: Any, kind: str, optional: bool = False) -> Any:
        """An entry of the expected kind, or the default.

        Raises:
            ValueError: if it is of another kind, or null where that is not `optional`.
        """
        self.used.add(key)
        value = self.entries.get(key, default)
        if value is None and (optional or default is None):
            return None
        if not KINDS[kind](value):
            raise ValueError(f"config.json: {key} must be {NAMES[kind]}, got {value!r:.80}.")
        return float(value) if kind == "number" else value

    def rename(self, alias: str, key: str) -> None:
        """Take an entry under its other name as if it had the usual one."""
        self.used.add(alias)
        other = self.entries.get(alias)
        if other is not None and self.entries.setdefault(key, other) != other:
            self.refuse(alias, f"{key} says {self.entries[key]!r:.80}.")

    def refuse(self, key: str, why: str) -> None:
        """Raise for an entry whose meaning is known and not handled."""
        raise ValueError(
            f"config.json: {key} = {self.entries.get(key)!r:.80} is not handled: {why}"
        )

    def unknown(self) -> dict[str, Any]:
        """Entries that nobody has understood and that say more than that something is off."""
        told = self.used | SETTINGS.keys()  # `generate` names what it does not take
        rest = {k: x for k, x in self.entries.items() if k not in told}
        return {k: x for k, x in rest.items() if not is_harmless(self.entries, k)}


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


KINDS: dict[str, Any] = {
    "size": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= LARGEST,
    "layers": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 1024,
    # Buckets are looked up in a table of all distances.
    "distance": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 < x <= 2**16,
    "count": lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= LARGEST,
    "positive": lambda x: _is_number(x) and SMALLEST_FLOAT < x < LARGEST_FLOAT,
    "number": lambda x: _is_number(x) and 0 <= x < LARGEST_FLOAT,
    "flag": lambda x: isinstance(x, bool),
    "text": lambda x: isinstance(x, str),
    "list": lambda x: isinstance(x, list),
    "dict": lambda x: isinstance(x, dict),
}
NAMES = {
    "size": f"an integer from 1 to {LARGEST}",
    "layers": "an integer from 1 to 1024",
    "distance": f"an integer from 1 to {2**16}",
    "count": f"an integer from 0 to {LARGEST}",
    "positive": f"a number above 0 and below {LARGEST_FLOAT}",
    "number": f"a number from 0 to {LARGEST_FLOAT}",
    "flag": "true or false",
    "text": "a string",
    "list": "a list",
    "dict": "an object",
}


def with_defaults(settings: tuple["Setting | Named", ...], **defaults: Any) -> tuple[Any, ...]:
    """Settings of one family with the defaults of another, by key."""
    return tuple(x._replace(default=defaults.get(x.key, x.default)) for x in settings)


class Setting(NamedTuple):
    """One key for one field, of one kind.

    `alias` is another name of the key in some files. `twice` says that some versions of
    transformers know the one name alone and some the other, so that both are written.
    """

    key: str
    field: str
    default: Any
    kind: str = "size"
    optional: bool = False
    alias: str = ""
    twice: bool = False

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.rename(self.alias, self.key)
        fields[self.field] = config.get(self.key, self.default, self.kind, self.optional)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        config.pop(self.alias, None)
        config[self.key] = getattr(a, self.field)
        if config[self.key] is None and not self.optional and self.default is not None:
            del config[self.key]  # it has no word for None: when read again, it is the default
        elif self.twice:
            config[self.alias] = config[self.key]


class Power(NamedTuple):
    """One key for one field, which is a power of the number in the file."""

    key: str
    field: str
    default: Any
    exponent: float
    kind: str = "positive"

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields[self.field] = config.get(self.key, self.default, self.kind) ** self.exponent

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        value = getattr(a, self.field)
        if not _is_number(value):
            raise ValueError(f"{self.field} is {value!r:.80}, not one number")
        number = value ** (1 / self.exponent)
        whole = round(number)
        config[self.key] = whole if math.isclose(number, whole, rel_tol=1e-9) else number


class Named(NamedTuple):
    """One key for one field, whose values have names of their own in the file.

    Several names may stand for one value; the first is written. `disputed` says that versions of
    transformers read some of the names differently, so that the first replaces them at each save.
    """

    key: str
    field: str
    default: Any
    names: Mapping[Any, Any]
    disputed: bool = False

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.used.add(self.key)
        value = config.entries.get(self.key, self.default)
        # Python takes 1 for True, and looks up no lists.
        if not any(value == name and type(value) is type(name) for name in self.names):
            known = ", ".join(repr(name) for name in self.names)
            raise ValueError(f"config.json: {self.key} must be one of {known}, got {value!r:.80}.")
        fields[self.field] = self.names[value]

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        value = getattr(a, self.field)
        for name, meaning in self.names.items():
            if meaning == value and type(meaning) is type(value):
                config[self.key] = name
                return
        raise ValueError(f"{self.key} has no value for {self.field} = {value!r}.")


class Only(NamedTuple):
    """A key of which a single value is handled (or a few that mean the same)."""

    key: str
    values: tuple[Any, ...]
    default: Any

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.used.add(self.key)
        value = config.entries.get(self.key, self.default)
        if not any(value == known and type(value) is type(known) for known in self.values):
            known = " or ".join(repr(x) for x in self.values)
            config.refuse(self.key, f"only {known} is.")

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        if self.default not in self.values:
            config[self.key] = self.values[0]


class Inside(NamedTuple):
    """Settings within an object of the file."""

    key: str
    settings: tuple[Any, ...]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        entries = config.get(self.key, None, "dict", optional=True) or {}
        inner = Config(entries, config.tensors)
        for setting in self.settings:
            setting.read(inner, fields)
        if inner.unknown():
            config.refuse(self.key, f"it has {', '.join(sorted(inner.unknown()))}.")

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        inner = dict(config.get(self.key) or {})
        for setting in self.settings:
            setting.write(a, inner)
        config[self.key] = inner


class Kept(NamedTuple):
    """Keys that say nothing about the numbers a model gives; written if they have a value here."""

    keys: tuple[str, ...]
    values: Mapping[str, Any] = {}

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.used.update(self.keys, self.values)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        for key, value in self.values.items():
            if config.get(key) is None:
                config[key] = value


class Older(NamedTuple):
    """Names that keys had in files of the family's authors, from before transformers had it.

    It comes first, and what is written has the new names alone, since transformers knows no other.
    """

    names: Mapping[str, str]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        for older, key in self.names.items():
            config.rename(older, key)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        for older in self.names:
            config.pop(older, None)


class Fixed(NamedTuple):
    """Fields that are the same for every checkpoint of the family."""

    fields: Mapping[str, Any]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields.update(self.fields)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        pass  # whether a model has them is seen when what was written is read again


class Tied(NamedTuple):
    """Whether the output layer shares the token table: decided by what is in the file.

    One tensor of the two is a tied model, unless config.json says that it is not and then one is
    missing; in families where it has no say (`by_file`) even then. Two that differ are two,
    whatever config.json says.

    What is written is what the model is, since other readers believe it: transformers 4 drops the
    output layer's tensor where config.json says that it is tied.
    """

    default: bool
    head: str = "lm_head.weight"
    table: str = "model.embed_tokens.weight"
    key: str = "tie_word_embeddings"
    by_file: bool = False
    stacks: bool = False  # whether it also says that source and target share a table, as they do
    never: bool = False  # whether files shall have a tensor for the output layer in any case

    @property
    def anew(self) -> bool:
        """That its entries are replaced at each save: see `Tied`."""
        return True

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        says = config.get(self.key, self.default, "flag") or self.by_file
        fields["tied"] = says and config.tensors.merge(self.head, self.table)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        if a.output:
            config[self.key] = a.tied and not self.never
        elif self.stacks:
            config[self.key] = True


class Present(NamedTuple):
    """A field that says whether the file has a tensor."""

    field: str
    tensor: str

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields[self.field] = config.tensors.has(self.tensor)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        pass  # the tensors say it


class Scaled(NamedTuple):
    """A switch for token vectors times `sqrt(d_model)`."""

    key: str = "scale_embedding"
    default: bool = False

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        on = config.get(self.key, self.default, "flag")
        fields["embedding_scale"] = fields["d_model"] ** 0.5 if on else 1.0

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        if a.embedding_scale not in (1.0, a.d_model**0.5):
            raise ValueError(f"it has no words for embedding_scale {a.embedding_scale}.")
        config[self.key] = a.embedding_scale != 1.0


class Derived(NamedTuple):
    """A field that follows from other fields; it has no key of its own."""

    field: str
    rule: Any  # a function from the fields so far to the value

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields[self.field] = self.rule(fields)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        pass  # checked when what was written is read again
