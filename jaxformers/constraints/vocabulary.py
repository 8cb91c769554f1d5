"""The bytes that each token of a tokenizer adds to a text."""

import json
import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from jaxformers.tokenizers.tokenizer import Tokenizer, check_tokenizer
from jaxformers.tokenizers.training import byte_letters

Step = Callable[[str], str]


class Vocabulary:
    """The bytes of all tokens, one after the other.

    Special tokens, and ids without a token, have none.

    Arguments:
        tokens: the bytes by id; None is a token that never is text.
    """

    content: np.ndarray  # uint8
    starts: np.ndarray  # where the bytes of each id begin
    lengths: np.ndarray  # how many there are

    def __init__(self, tokens: list[bytes | None]):
        known = [x or b"" for x in tokens]
        self.content = np.frombuffer(b"".join(known), np.uint8)
        self.lengths = np.array([len(x) for x in known], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, token: int) -> bytes:
        start = self.starts[token]
        return self.content[start : start + self.lengths[token]].tobytes()


KNOWN: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Returns the bytes that each token of a tokenizer adds to a text.

    Raises:
        ValueError: if it is no `Tokenizer`, or the text of a token depends on those beside it.
    """
    check_tokenizer(tokenizer)
    if tokenizer not in KNOWN:
        KNOWN[tokenizer] = Vocabulary(_read(tokenizer))
    return KNOWN[tokenizer]


def _read(tokenizer: Tokenizer) -> list[bytes | None]:
    backend = tokenizer.backend
    to_bytes = _decoder(json.loads(backend.to_str())["decoder"])
    added = backend.get_added_tokens_decoder()
    special = set(tokenizer.special_tokens.values())
    special |= {x.content for x in added.values() if x.special}
    tokens: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if token not in special:
            tokens[index] = to_bytes(token)
    return tokens


def _decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """Returns the function from a token's name to its bytes, for the decoder of a tokenizer."""
    steps = _flatten(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    rewrite: list[Step] = []
    for i, step in enumerate(steps):
        if step["type"] == "Replace" and "String" in step["pattern"]:
            rewrite.append(_replace(step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            rewrite.append(_replace(step["replacement"], " "))
        elif step["type"] == "Strip" and "Fuse" in kinds[:i]:
            continue  # it is about the beginning of a text, and new tokens continue one
        elif step["type"] not in ("ByteFallback", "Fuse"):
            raise _depends(f"has the decoder {step['type']}")
    if not steps:
        raise _depends("has no decoder")
    falls_back = "ByteFallback" in kinds

    def to_bytes(token: str) -> bytes:
        if falls_back and (found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            return bytes([int(found[1], 16)])
        for step in rewrite:
            token = step(token)
        return token.encode(errors="replace")

    return to_bytes


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


def _replace(old: str, new: str) -> Step:
    return lambda token: token.replace(old, new)


def _depends(why: str) -> ValueError:
    return ValueError(
        f"the tokenizer {why}, so that the text of a token depends on the tokens beside it. "
        "Constraints need a decoder that joins the bytes of tokens, such as ByteLevel, Metaspace, "
        "or ByteFallback with Fuse; most language models have one of these."
    )


BYTES = byte_letters()


def _byte_level(token: str) -> bytes:
    if all(x in BYTES for x in token):
        return bytes(BYTES[x] for x in token)
    return token.encode(errors="replace")  # an added token, which is its own text
