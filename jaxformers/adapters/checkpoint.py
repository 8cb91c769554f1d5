"""Loads a checkpoint, or an adapter together with the checkpoint that it was made for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformers.adapters.peft_config import CONFIG
from jaxformers.adapters.peft_load import PATTERNS as ADAPTER_PATTERNS
from jaxformers.adapters.peft_load import load_adapter
from jaxformers.files.gguf_file import find_gguf
from jaxformers.files.hub import WEIGHTS, locate
from jaxformers.files.json_file import read_json
from jaxformers.hf.fresh_head import FreshHead
from jaxformers.hf.load import PATTERNS, load
from jaxformers.tokenizers.files import TOKENIZER_FILES


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
    directory = _adapter_directory(path)
    base = path if directory is None else base_of(directory)
    model = load(base, classes, dtype, sharding, head, quantized)
    return model if directory is None else load_adapter(model, directory)


def _adapter_directory(path: Any) -> Path | None:
    """Returns the directory of an adapter, None if there is a model or nothing."""
    if find_gguf(path) is not None:
        return None
    directory = locate(path, [*PATTERNS, *ADAPTER_PATTERNS, *TOKENIZER_FILES])
    if not (directory / CONFIG).is_file() or any((directory / x).exists() for x in WEIGHTS):
        return None
    return directory


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
