"""How entries of a config.json relate to the fields of an `Architecture`, in both directions.

A family's table is a tuple of settings. Each setting reads some entries of the file into fields and
writes fields back into entries. A file holds an entry only where it differs from the default of its
class, so each setting knows the default of its family.

Fields have the names that `Architecture.flat` gives them, such as "norm.eps".
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from jaxformers.hf.config.entries import Config, is_number


class ConfigSetting(Protocol):
    """A relation between entries of a config.json and fields."""

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        """Reads entries of the file into fields."""

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        """Writes fields into entries of a file."""


def with_defaults(settings: tuple["Setting | Named", ...], **defaults: Any) -> tuple[Any, ...]:
    """Returns the settings of one family with the defaults of another, by key."""
    return tuple(x._replace(default=defaults.get(x.key, x.default)) for x in settings)


class Setting(NamedTuple):
    """One key for one field.

    Arguments:
        key: the key in the file.
        field: the field.
        default: the value where the file has no such key.
        kind: the kind of the value, one of `entries.KINDS`.
        optional: whether null is a value.
        alias: another name of the key in some files.
        twice: whether both names are written, because versions of transformers know one each.
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

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        config.pop(self.alias, None)
        config[self.key] = fields[self.field]
        if config[self.key] is None and not self.optional and self.default is not None:
            del config[self.key]  # the file cannot say None: it is read again as the default
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

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        value = fields[self.field]
        if not is_number(value):
            raise ValueError(f"{self.field} is {value!r:.80}, not one number")
        number = value ** (1 / self.exponent)
        whole = round(number)
        config[self.key] = whole if math.isclose(number, whole, rel_tol=1e-9) else number


class Named(NamedTuple):
    """One key for one field, whose values have names of their own in the file.

    Several names may mean one value. The first of them is written.

    Arguments:
        key: the key in the file.
        field: the field.
        default: the name where the file has no such key.
        names: the names with their values.
        disputed: whether versions of transformers read some of the names differently, so that
            each save replaces them by the first.
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

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        value = fields[self.field]
        for name, meaning in self.names.items():
            if meaning == value and type(meaning) is type(value):
                config[self.key] = name
                return
        raise ValueError(f"{self.key} has no value for {self.field} = {value!r}.")


class Only(NamedTuple):
    """A key that may have one value only, or a few that mean the same."""

    key: str
    values: tuple[Any, ...]
    default: Any

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.used.add(self.key)
        value = config.entries.get(self.key, self.default)
        if not any(value == known and type(value) is type(known) for known in self.values):
            known = " or ".join(repr(x) for x in self.values)
            config.refuse(self.key, f"only {known} is.")

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        if self.default not in self.values:
            config[self.key] = self.values[0]


class Inside(NamedTuple):
    """Settings within an object of the file."""

    key: str
    settings: tuple[ConfigSetting, ...]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        entries = config.get(self.key, None, "dict", optional=True) or {}
        inner = Config(entries, config.tensors)
        for setting in self.settings:
            setting.read(inner, fields)
        if inner.unknown():
            config.refuse(self.key, f"it has {', '.join(sorted(inner.unknown()))}.")

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        inner = dict(config.get(self.key) or {})
        for setting in self.settings:
            setting.write(fields, inner)
        config[self.key] = inner


class Kept(NamedTuple):
    """Keys that change no number of a model. Those that have a value here are written."""

    keys: tuple[str, ...]
    values: Mapping[str, Any] = {}

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.used.update(self.keys, self.values)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        for key, value in self.values.items():
            if config.get(key) is None:
                config[key] = value


class Older(NamedTuple):
    """Names that keys had in files of the family's authors, before transformers had the family.

    This setting comes first in its table. Only the new names are written, because transformers
    knows no other.
    """

    names: Mapping[str, str]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        for older, key in self.names.items():
            config.rename(older, key)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        for older in self.names:
            config.pop(older, None)


class Fixed(NamedTuple):
    """Fields that are the same for every checkpoint of the family."""

    fields: Mapping[str, Any]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields.update(self.fields)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        pass  # the written file is read again, which shows whether the model has them


class Present(NamedTuple):
    """A field that says whether the checkpoint has a tensor."""

    field: str
    tensor: str

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields[self.field] = config.tensors.has(self.tensor)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        pass  # the tensors say it


class Derived(NamedTuple):
    """A field that follows from other fields; it has no key of its own."""

    field: str
    rule: Any  # a function from the fields so far to the value

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        fields[self.field] = self.rule(fields)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        pass  # the written file is read again, which shows whether the model has it
