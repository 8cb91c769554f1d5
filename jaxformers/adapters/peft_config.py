"""The settings of an adapter, adapter_config.json of PEFT."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxformers.files.json_file import read_json, shorten

CONFIG = "adapter_config.json"
EVERYWHERE = "all-linear"

# Entries that do not change what an adapter computes, or do so only together with another that is
# refused. Dropout acts in PEFT's own training alone.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout"),
    *(
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ),
}
# Ways to draw the first numbers that leave the base as it is; others change it.
DRAWN = (True, False, None, "gaussian", "eva", "orthogonal")
LARGEST_RANK = 2**16


class AdapterConfig(NamedTuple):
    """The entries of an adapter_config.json about the shapes and the scales of an adapter.

    Modules have the names that they have in transformers.

    Arguments:
        target_modules: names of modules, or one regular expression, or "all-linear".
        r: the rank.
        lora_alpha: numerator of the scale.
        exclude_modules: names of modules without an adapter, or one regular expression.
        rank_pattern, alpha_pattern: other ranks and numerators, by regular expression.
        layers_to_transform: the numbers of the layers that have an adapter; None is all.
        layers_pattern: names before the number of a layer.
        modules_to_save: names of modules that are trained whole.
        bias: "none", "all" or "lora_only", the biases that are trained.
        use_rslora: whether the scale is `lora_alpha / sqrt(r)`.
        use_dora: whether there are magnitudes.
        ensure_weight_tying: whether a shared table stays shared where it is trained.
    """

    target_modules: tuple[str, ...] | str
    r: int = 8
    lora_alpha: float = 8
    exclude_modules: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, float] = {}
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False

    @classmethod
    def read(cls, directory: Path) -> "AdapterConfig":
        """Returns the settings in a directory.

        Raises:
            ValueError: if the file is damaged, an entry has a wrong value, or one that changes
                numbers is not handled.
        """
        entries = _Entries(read_json(directory / CONFIG))
        entries.check_kind()
        config = cls(
            target_modules=entries.names("target_modules", required=True),
            r=entries.rank("r", entries.get("r", 8)),
            lora_alpha=entries.number("lora_alpha", entries.get("lora_alpha", 8)),
            exclude_modules=entries.names("exclude_modules"),
            rank_pattern=entries.pattern("rank_pattern", entries.rank),
            alpha_pattern=entries.pattern("alpha_pattern", entries.number),
            layers_to_transform=entries.layers("layers_to_transform"),
            layers_pattern=entries.expressions("layers_pattern"),
            modules_to_save=_as_tuple(entries.names("modules_to_save")),
            bias=entries.one_of("bias", ("none", "all", "lora_only"), "none"),
            use_rslora=entries.one_of("use_rslora", (False, True), False),
            use_dora=entries.one_of("use_dora", (False, True), False),
            ensure_weight_tying=entries.one_of("ensure_weight_tying", (False, True), False),
        )
        entries.one_of("fan_in_fan_out", (False, True), False)  # numbers are stored in one way
        entries.check_rest()
        return config

    def targets(self, module: str) -> bool:
        """Returns whether a module has an adapter; with "all-linear" the file says it."""
        if _named(module, self.exclude_modules) or self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            everywhere = self.target_modules == EVERYWHERE
            return everywhere or re.fullmatch(self.target_modules, module) is not None
        if not _named(module, self.target_modules):
            return False
        if self.layers_to_transform is None:
            return True
        patterns = [rf"(?:^|.*?\.){x}" for x in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{x}\.(\d+)\.", module) for x in patterns)
        layer = next((int(x[1]) for x in found if x), None)
        return layer in self.layers_to_transform

    def saves(self, name: str) -> bool:
        """Returns whether a module, or one that it lies in, is trained whole."""
        return any(re.match(rf"(.*\.)?{re.escape(x)}(\..*)?$", name) for x in self.modules_to_save)

    def rank(self, module: str) -> int:
        """Returns the rank of a module's adapter."""
        return _matching(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Returns the factor on the product of a module's adapter."""
        rank, alpha = self.rank(module), _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class _Entries:
    """The entries of an adapter_config.json while they are read."""

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = entries
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        value = self.entries.get(key, default)
        return default if value is None else value

    def refuse(self, key: str, why: str) -> None:
        raise ValueError(f"{CONFIG}: {key} = {shorten(self.entries.get(key))} {why}")

    def check_kind(self) -> None:
        if self.get("peft_type") != "LORA":
            self.refuse("peft_type", "is not read: adapters of the type LORA are.")
        if not any(self.get("init_lora_weights") is x for x in DRAWN[:3]):
            if self.get("init_lora_weights") not in DRAWN[3:]:
                why = "changes the base, which the file does not hold. Convert the adapter with "
                self.refuse("init_lora_weights", f"{why}PEFT, or merge it there.")

    def check_rest(self) -> None:
        """Refuses what could change numbers and has no meaning here."""
        rest = {k: x for k, x in self.entries.items() if k not in self.used | HARMLESS}
        for key, value in rest.items():
            if value not in (None, False, "", [], {}):
                self.refuse(key, "is not handled. Merge the adapter in PEFT, and load the result.")

    def names(self, key: str, required: bool = False) -> tuple[str, ...] | str:
        value = self.get(key)
        if isinstance(value, list) and all(isinstance(x, str) and x for x in value):
            found: tuple[str, ...] | str = tuple(value)
        elif isinstance(value, str) and value:
            self.check_expression(key, value)
            found = value
        elif value is None or value == "":
            found = ()
        else:
            self.refuse(key, "must be a list of names or a regular expression.")
        if required and not found:
            self.refuse(key, "must name the modules that the adapter changes.")
        return found

    def expressions(self, key: str) -> tuple[str, ...]:
        found = _as_tuple(self.names(key))
        for text in found:
            self.check_expression(key, text)
        return found

    def check_expression(self, key: str, text: str) -> None:
        # Python takes exponential time for a repetition of a repetition, such as (.*)*x.
        if len(text) > 2**12 or _repeats_a_choice(text):
            self.refuse(key, "is a regular expression that could take for ever.")
        try:
            re.compile(text)
        except re.error as error:
            self.refuse(key, f"is no regular expression: {error}.")

    def rank(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_RANK:
            self.refuse(key, f"must be a rank, a whole number from 1 to {LARGEST_RANK}.")
        return value

    def number(self, key: str, value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 < value < 1e9:
            self.refuse(key, "must be a number above 0, and below 1e9.")
        return float(value)

    def pattern(self, key: str, check: Any) -> dict[str, Any]:
        found = self.get(key, {})
        if not isinstance(found, dict):
            self.refuse(key, "must be an object from names to numbers.")
        for name in found:
            self.check_expression(key, name)
        return {name: check(key, value) for name, value in found.items()}

    def layers(self, key: str) -> tuple[int, ...] | None:
        value = self.get(key)
        if value is None or value == []:
            return None
        value = value if isinstance(value, list) else [value]
        if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value):
            self.refuse(key, "must be numbers of layers.")
        return tuple(value)

    def one_of(self, key: str, values: tuple, default: Any) -> Any:
        value = self.get(key, default)
        if type(value) is not type(default) or value not in values:
            self.refuse(key, f"must be one of {', '.join(map(repr, values))}.")
        return value


def _repeats_a_choice(expression: str) -> bool:
    r"""Returns whether an expression repeats a group that can match a text in several ways.

    Example:
        >>> _repeats_a_choice(r"(a*b?)*c"), _repeats_a_choice(r".*\.(q|v)_proj")
        (True, False)
    """
    symbols = re.sub(r"\\.|\[\^?\]?[^\]]*\]|\(\?(P<\w+>|[:=!]|<[=!])?", _without_signs, expression)
    choices = [False]  # of each group that is open, whether it can match in several ways
    for sign, following in zip(symbols, f"{symbols} "[1:], strict=True):
        if sign == "(":
            choices.append(False)
        elif sign == ")" and len(choices) > 1:
            inner = choices.pop()
            if inner and following in "*+{":
                return True
            choices[-1] |= inner
        elif sign in "*+?{|":
            choices[-1] = True
    return False


def _without_signs(match: re.Match) -> str:
    return "(" if match[0].startswith("(") else "x"


def _as_tuple(names: tuple[str, ...] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _named(module: str, names: tuple[str, ...] | str) -> bool:
    """Returns whether a list has a module's name or the end of it, or an expression matches it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the number of the first expression that matches the end of a module's name."""
    found = (x for key, x in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)
