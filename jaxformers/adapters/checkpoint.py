"""Loads a checkpoint, or an adapter together with the checkpoint that it was made for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformers.adapters.peft_config import CONFIG
from jaxformers.adapters.peft_load import load_adapter
from jaxformers.files.hub import WEIGHTS
from jaxformers.files.json_file import read_json
from jaxformers.hf.fresh_head import FreshHead
from jaxformers.hf.load import find_checkpoint, load


def load_checkpoint(
    path: Any,
    classes: Mapping[str, Any],
    dtype: Any = None,
    sharding: Any = None,
    head: FreshHead | None = None,
    quantized: bool = False,
) -> Any:
    """Returns the model of a checkpoint, or the adapted model of an adapter.

    A directory with a whole model is a checkpoint, also if an adapter lies beside it.

    Arguments:
        path, classes, dtype, sharding, head, quantized: as in `jaxformers.hf.load.load`.
    """
    options = classes, dtype, sharding, head, quantized
    found = find_checkpoint(path)
    if not (found / CONFIG).is_file() or any((found / x).exists() for x in WEIGHTS):
        return load(path, found, *options)
    base = base_of(found)
    return load_adapter(load(base, find_checkpoint(base), *options), found)


def base_of(directory: Path) -> str:
    """Returns the directory or the name of the checkpoint that an adapter was made for.

    A relative path counts from the current directory, or else from that of the adapter.

    Raises:
        ValueError: if the adapter names none, or one revision of it.
    """
    entries = read_json(directory / CONFIG)
    base, revision = entries.get("base_model_name_or_path"), entries.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{directory / CONFIG} names no model in base_model_name_or_path. Load the model, and "
            f"put the adapter on it: load_adapter(model, {str(directory)!r})."
        )
    if revision not in (None, "main"):
        raise ValueError(
            f"{directory / CONFIG} is for the revision {revision!r:.80} of {base!r:.80}. Download "
            "it, load the model, and put the adapter on it: load_adapter(model, "
            f"{str(directory)!r})."
        )
    beside = directory / base
    return os.fspath(beside) if not os.path.isdir(base) and beside.is_dir() else base
