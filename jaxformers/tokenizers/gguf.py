"""The tokenizer in a GGUF file, as the tokenizer.json and tokenizer_config.json of a checkpoint.

A GGUF file has a list of tokens with their types, merges or scores, and names of algorithms.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxformers.files.gguf_file import GgufFile, read_gguf
from jaxformers.files.json_file import shorten
from jaxformers.tokenizers import gguf_models
from jaxformers.tokenizers.gguf_models import Vocabulary

# The roles of special tokens, and the names of their ids.
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
KEY = "tokenizer.ggml."
# The types of tokens that are found in a text before it is split, and are special or not.
UNKNOWN, CONTROL, DEFINED = 2, 3, 4


class Kind(NamedTuple):
    """A `tokenizer.ggml.model`.

    Arguments:
        parts: a function from a vocabulary to the parts of a tokenizer.json.
        start: whether `bos_token` begins a text if the file does not say.
        cleans_up: whether spaces before punctuation are removed from decoded text.
    """

    parts: Callable[[Vocabulary], dict[str, Any]]
    start: bool = False
    cleans_up: bool = False


KINDS = {
    "gpt2": Kind(gguf_models.byte_level),
    "llama": Kind(gguf_models.sentence_pieces, start=True),
    "bert": Kind(gguf_models.word_pieces, cleans_up=True),
}


def read_gguf_tokenizer(path: Path) -> dict[str, bytes]:
    """Returns the contents of the tokenizer files that a GGUF file stands for, by name.

    Raises:
        ValueError: if the file has no tokenizer, or one that is not read.
        ImportError: if the `gguf` package is missing.
    """
    file = read_gguf(path)
    name = file.metadata.get(f"{KEY}model")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model must be one of {', '.join(KINDS)}, got {shorten(name)}. "
            "Load the tokenizer of the checkpoint that the file was made of."
        )
    kind = KINDS[name]
    special = _special(file)
    vocabulary = _vocabulary(file, special)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocabulary, special),
        **kind.parts(vocabulary),
    }
    ends = _ends(file, kind, vocabulary.pre, special)
    tokenizer["post_processor"] = _around(ends, vocabulary.tokens)
    config = {
        "clean_up_tokenization_spaces": kind.cleans_up,
        **{role: vocabulary.tokens[i] for role, i in special.items()},
        **_chat_templates(file),
    }
    contents = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: json.dumps(x, ensure_ascii=False).encode() for name, x in contents.items()}


def _vocabulary(file: GgufFile, special: Mapping[str, int]) -> Vocabulary:
    """Returns the lists of a file, checked."""
    tokens = _list(file, "tokens", list)
    types = _list(file, "token_type", np.ndarray, len(tokens))
    scores = _list(file, "scores", np.ndarray, len(tokens))
    merges = _list(file, "merges", list)
    wrong = [i for i in special.values() if not 0 <= i < len(tokens)]
    if not tokens or wrong:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} tokens, among them the special "
            f"ones {sorted(special.values())} must be."
        )
    pre = file.metadata.get(f"{KEY}pre")
    prefix = _flag(file, "add_space_prefix", True)
    types = np.ones(len(tokens), int) if types is None else types.astype(int)
    unknown = [special.get("unk_token"), *np.flatnonzero(types == UNKNOWN).tolist()]
    first = next((i for i in unknown if i is not None), None)
    return Vocabulary(file.path, tokens, types, scores, merges, pre, prefix, first)


def _list(file: GgufFile, name: str, kind: Any, length: int | None = None) -> Any:
    """Returns a list of the file; None, or an empty one of texts, if it is absent."""
    value = file.metadata.get(f"{KEY}{name}")
    if value is None:
        return [] if kind is list else None
    fits = isinstance(value, kind) and length in (None, len(value))
    if not fits or (isinstance(value, np.ndarray) and not np.isfinite(value).all()):
        what = "strings" if kind is list else f"{length} finite numbers, one for each token"
        raise ValueError(f"{file.path}: {KEY}{name} must be a list of {what}.")
    return value


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"{KEY}{name}", default)
    if not isinstance(value, bool):
        raise ValueError(f"{file.path}: {KEY}{name} must be true or false, got {shorten(value)}.")
    return value


def _special(file: GgufFile) -> dict[str, int]:
    """Returns the ids of the special tokens by role."""
    found = {}
    for role, name in ROLES.items():
        value = file.metadata.get(f"{KEY}{name}")
        if value is None:
            continue
        if type(value) is not int:
            raise ValueError(f"{file.path}: {KEY}{name} must be an id, got {shorten(value)}.")
        found[role] = value
    return found


def _added(vocabulary: Vocabulary, special: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns the tokens that are found in a text before it is split."""
    types = vocabulary.types.copy()
    types[list(special.values())] = CONTROL
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": vocabulary.tokens[i], **plain, "special": bool(types[i] != DEFINED)}
        for i in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, DEFINED))).tolist()
        if not vocabulary.is_spaces(i)
    ]


class Ends(NamedTuple):
    """The tokens around a text: those before it, between two texts, and after it.

    Arguments:
        first: ids before a text.
        between: ids after the first of two texts.
        last: ids after a text.
        second: the type of the tokens of a second text.
    """

    first: list[int]
    between: list[int]
    last: list[int]
    second: int


def _ends(file: GgufFile, kind: Kind, pre: Any, special: Mapping[str, int]) -> Ends:
    """Returns the tokens that a tokenizer puts around texts."""
    roles: list[tuple[str, ...]] = [("bos_token",), ("eos_token",)]
    pairs = kind.parts is gguf_models.word_pieces
    if pairs:
        roles = [("cls_token", "bos_token"), ("sep_token", "eos_token")]
    first, last = ([special[role] for role in names if role in special][:1] for names in roles)
    start = kind.start or pairs or gguf_models.starts_texts(pre)
    first = first if _flag(file, "add_bos_token", start) else []
    last = last if _flag(file, "add_eos_token", pairs) else []
    return Ends(first, last if pairs else last + first, last, int(pairs))


def _around(ends: Ends, tokens: list[str]) -> dict[str, Any] | None:
    """Returns the part of tokenizer.json about the tokens around texts."""
    if not ends.first and not ends.last:
        return None

    def special(ids: list[int], kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": tokens[i], "type_id": kind}} for i in ids]

    a, b = ({"Sequence": {"id": x, "type_id": kind}} for x, kind in (("A", 0), ("B", ends.second)))
    first, between = special(ends.first, 0), special(ends.between, 0)
    return {
        "type": "TemplateProcessing",
        "single": [*first, a, *special(ends.last, 0)],
        "pair": [*first, a, *between, b, *special(ends.last, ends.second)],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
            for i in {*ends.first, *ends.last}
        },
    }


def _chat_templates(file: GgufFile) -> dict[str, Any]:
    """Returns the entry of tokenizer_config.json about chat templates."""
    key = "tokenizer.chat_template"
    found = {
        name.removeprefix(key).removeprefix(".") or "default": text
        for name, text in file.metadata.items()
        if name == key or name.startswith(f"{key}.")
    }
    wrong = [name for name, text in found.items() if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{file.path}: the chat template {shorten(wrong[0])} must be a text.")
    listed = [{"name": name, "template": text} for name, text in found.items()]
    return {"chat_template": listed} if listed else {}
