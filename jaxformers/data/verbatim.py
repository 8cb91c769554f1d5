"""Tokenizers that encode special tokens in a text as plain text."""

import copy
import json
from typing import Any

from jaxformers.tokenizers.files import guarded
from jaxformers.tokenizers.tokenizer import Tokenizer


def verbatim(tokenizer: Tokenizer) -> Any:
    """Returns a `tokenizers.Tokenizer` that encodes all of a text as plain text.

    A special token that is written in a text is encoded like any other text, unless the vocabulary
    cannot encode it so. Other added tokens are found as usual, but they do not remove the spaces
    around them.

    Example:
        >>> from jaxformers.tokenizers.training import bytes_tokenizer
        >>> verbatim(bytes_tokenizer()).encode("<|endoftext|>").ids[:3]
        [60, 124, 101]
    """
    contents = json.loads(tokenizer.backend.to_str())
    contents["post_processor"] = None
    named = tokenizer.special_tokens.values()
    for token in contents["added_tokens"]:
        token["special"] |= token["content"] in named
        if not token["special"]:
            token["lstrip"] = token["rstrip"] = False
    special = {token["content"] for token in contents["added_tokens"] if token["special"]}
    if contents["model"]["type"] != "Unigram" or not special:
        return _built(contents)
    renamed = _built(_renamed(contents, special))
    there = {text for text in special if _decodes(tokenizer.backend, renamed, text)}
    return renamed if there == special else _built(_renamed(contents, there))


def _decodes(backend: Any, renamed: Any, text: str) -> bool:
    """Returns whether a special token's text, encoded as plain text, decodes to itself."""
    try:
        ids = guarded(renamed.encode, text).ids
    except ValueError:  # it has a character outside of the vocabulary and no unknown token
        return False
    return backend.decode(ids, skip_special_tokens=False) == text


def _renamed(contents: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """Renames special tokens, which Unigram would otherwise find in a text by itself."""
    contents = copy.deepcopy(contents)
    names = {text: f"\ufdd0 special token {text} \ufdd0" for text in special}
    for token in contents["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    for piece in contents["model"]["vocab"]:
        piece[0] = names.get(piece[0], piece[0])
    return contents


def _built(contents: dict[str, Any]) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(json.dumps(contents))
    backend.encode_special_tokens = True
    return backend
