"""Tokenizers for texts in which nothing is a command."""

import copy
import json
from typing import Any

from jaxformers.tokenizers.files import guarded
from jaxformers.tokenizers.tokenizer import Tokenizer


def verbatim(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer` that encodes all of a text as text.

    What looks like a special token is encoded as any other text is, unless the vocabulary cannot
    write it so. Other tokens that were added to the vocabulary are found as always, but none takes
    the spaces around it away.

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
    """Whether a text comes back that is encoded without a special token of this name."""
    try:
        ids = guarded(renamed.encode, text).ids
    except ValueError:  # a character that it does not know, and it has no unknown token
        return False
    return backend.decode(ids, skip_special_tokens=False) == text


def _renamed(contents: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """With other names for special tokens, which Unigram would find in a text by itself."""
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
