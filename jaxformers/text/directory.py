"""The directory of a model that reads texts: its files, its tokenizer, its longest text."""

import os
from pathlib import Path
from typing import Any

from jaxformers.files.hub import has_safetensors, locate
from jaxformers.files.json_file import read_json
from jaxformers.hf.load import PATTERNS, TORCH_PATTERNS
from jaxformers.text.sentence_transformers import FILES, Described
from jaxformers.tokenizers.files import TOKENIZER_FILES
from jaxformers.tokenizers.tokenizer import Tokenizer, load_tokenizer


def find_directory(path_or_hub_name: str | os.PathLike) -> Path:
    """Returns the directory of a model, downloaded if it is on the hub."""
    patterns = [*PATTERNS, *TOKENIZER_FILES, *FILES]
    directory = locate(path_or_hub_name, patterns)
    if not any(has_safetensors(directory / x) for x in ("", "0_Transformer")):
        directory = locate(path_or_hub_name, [*patterns, *TORCH_PATTERNS, "0_*/pytorch_model*"])
    return directory


def length_limit(described: Described) -> int | None:
    """Returns the largest number of tokens of a text that the files name."""
    if described.max_seq_length is not None:
        return described.max_seq_length
    limits = []
    for file, name in (
        ("tokenizer_config.json", "model_max_length"),
        ("config.json", "max_position_embeddings"),
    ):
        path = described.transformer / file
        value = read_json(path).get(name) if path.exists() else None
        limits += [value] if type(value) is int and 0 < value < 2**31 else []
    return min(limits, default=None)


def read_tokenizer(described: Described) -> Tokenizer:
    """Returns the tokenizer of a model, which puts texts into lower case if the files say so."""
    tokenizer = load_tokenizer(described.transformer)
    if described.do_lower_case:
        from tokenizers import normalizers

        before = tokenizer.backend.normalizer
        steps = [normalizers.Lowercase()] + ([] if before is None else [before])
        tokenizer.backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def tokenizer_beside(model: Any, path_or_hub_name: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a checkpoint; that of an adapter may be the one of its base."""
    try:
        return load_tokenizer(path_or_hub_name)
    except ValueError:
        base = None if model.origin is None else model.origin.directory
        if base is None or str(base) == str(path_or_hub_name):
            raise
        return load_tokenizer(base)
