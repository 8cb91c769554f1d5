"""Finds the family of a checkpoint, by the name in config.json or by its tensors."""

import difflib
from collections.abc import Callable, Container, Mapping
from typing import Any

from jaxformers.files.hub import TensorFiles
from jaxformers.files.json_file import shorten
from jaxformers.hf.families import FAMILIES
from jaxformers.hf.family import Family
from jaxformers.hf.tensors import FileTensors

KEY = "model_type"


def family_of(config: Mapping[str, Any], shape: str | None = None) -> Family:
    """Returns the table for a config.json.

    Arguments:
        config: the entries of config.json.
        shape: the shape of the model, "encoder" for the encoder alone of an encoder-decoder; None
            for the shape of the family.

    Raises:
        ValueError: if it names none of them.
    """
    name = config.get(KEY)
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name] if shape is None else FAMILIES[name].of_shape(shape)
    known = sorted(FAMILIES)
    close = difflib.get_close_matches(str(name).lower().replace("_", "-")[:80], known, n=1)
    named = _named_by_class(config)
    hint = f" Did you mean {close[0]!r}?" if close and isinstance(name, str) else ""
    if named and isinstance(config.get("architectures"), list):
        hint = f' "architectures" names a class of {named[0]!r}: write {_entry(named[0])} if it is.'
    raise ValueError(
        f"config.json: {KEY} must be one of {', '.join(known)}, got {name!r:.80}.{hint}"
    )


def choose_table(
    family: Family, config: Mapping[str, Any], files: TensorFiles, shapes: Container[str]
) -> Family:
    """Returns the table of a family for a checkpoint, which may hold the encoder alone.

    It does if `architectures` says so, or names no class of the family and there is no decoder. The
    encoder of a whole model is taken where only an encoder is asked for.

    Arguments:
        family: the family of the checkpoint.
        config: the entries of config.json.
        files: the tensors.
        shapes: the shapes that are asked for.
    """
    if family.encoder is None:
        return family
    named = config.get("architectures")
    if named in [[x] for x in family.encoder.classes.values()]:
        return family.encoder
    if family.shape not in shapes and family.encoder.shape in shapes:
        return family.encoder
    whole = named in [[x] for x in family.classes.values()]
    has_decoder = any("decoder." in name for name in files.names)
    return family if whole or has_decoder else family.encoder


def guess_family(
    config: Mapping[str, Any], files: TensorFiles, fits: Callable[[Family], bool]
) -> Family:
    """Returns the family of a checkpoint whose config.json has no `model_type`.

    It is the family that has the class in `architectures`, or else the only one that fits.

    Arguments:
        config: the entries of config.json.
        files: the tensors.
        fits: whether a family understands these entries and calls for just these tensors.

    Raises:
        ValueError: if none or several can be it.
    """
    named = _named_by_class(config)
    fitting = named or [x for x, y in FAMILIES.items() if _has_names(y, files) and fits(y)]
    if len(fitting) == 1:
        return FAMILIES[fitting[0]]
    if not fitting:
        raise ValueError(
            f"config.json has no {KEY}, and the tensors of {files.directory}, such as "
            f"{', '.join(map(shorten, files.names[:3]))}, are with these settings not those of one "
            f"family. If it is one of {', '.join(sorted(FAMILIES))}, add the entry, such as "
            f"{_entry('llama')}; what does not fit is told then."
        )
    raise ValueError(
        f"config.json has no {KEY}, and its settings and tensors could be those of "
        f"{', '.join(fitting)}. Add the one that it is, such as {_entry(fitting[0])}."
    )


def _entry(name: str) -> str:
    return f'"{KEY}": "{name}"'


def _named_by_class(config: Mapping[str, Any]) -> list[str]:
    """Returns the families that have a class of `architectures`."""
    names = config.get("architectures")
    names = [x for x in names if isinstance(x, str)] if isinstance(names, list) else []
    return [name for name, family in FAMILIES.items() if set(_classes(family)) & set(names)]


def known_classes(model_type: str) -> list[str]:
    """Returns the classes of transformers that are in a family's tables."""
    family = FAMILIES[model_type]
    of_encoder = {} if family.encoder is None else family.encoder.classes
    return [*family.classes.values(), *of_encoder.values()]


def _classes(family: Family) -> list[str]:
    """Returns the family's classes, with those that transformers has for further tasks."""
    base = family.classes.get("base", "").removesuffix("Model")
    return [*known_classes(family.model_type), *(f"{base}For{task}" for task in TASKS if base)]


TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


def _has_names(family: Family, files: TensorFiles) -> bool:
    """Returns whether the family's table has all names: a quick check before settings are read."""
    try:
        return not FileTensors(family, files).unknown
    except ValueError:
        return False
