"""The shapes of a model that a config.json describes, where there are no weights."""

import os
from collections.abc import Mapping
from typing import Any

from jaxformers.files.json_file import read_json
from jaxformers.hf.load import read_settings
from jaxformers.hf.model_type import family_of
from jaxformers.hf.plan import abstract


class _AllTensors:
    """The tensors of a checkpoint that has those which config.json speaks of."""

    bare = False
    names = ()

    def has(self, name: str) -> bool:
        return True

    def merge(self, copy: str, of: str) -> bool:
        return True

    def choose(self, names: Any, name: str) -> None:
        pass


def outline_of_config(path: str | os.PathLike, classes: Mapping[str, Any]) -> Any:
    """Returns the model that a config.json describes, with shapes in place of its arrays.

    Arguments:
        path: of the file.
        classes: our classes by shape. A model of another shape is refused.

    Raises:
        ValueError: if it describes no model that can be built, or one of another shape.
    """
    entries = read_json(path)
    family = family_of(entries)
    if family.shape not in classes:
        names = " or ".join(x.__name__ for x in classes.values())
        raise ValueError(
            f"{path} describes a {family.model_type}, a model of shape {family.shape!r}, which "
            f"{names} is not. Pass the config.json of a model of that class."
        )
    try:
        return abstract(read_settings(family, entries, _AllTensors()), classes[family.shape])
    except (ValueError, ArithmeticError) as error:
        if str(error).startswith("config.json"):
            raise
        raise ValueError(f"{path} describes no model that can be built: {error}") from error
