"""The algorithms of tokenizers in GGUF files, in the words of tokenizer.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxformers.files.json_file import shorten

NORMAL, BYTE = 1, 6
SPACE = "\u2581"  # SentencePiece's sign for a space
# The longest token that is taken apart into merges, which takes time with the square of its length.
LONGEST = 256


class Vocabulary(NamedTuple):
    """The lists of a GGUF file from which a tokenizer is made.

    Arguments:
        path: the file.
        tokens: the tokens by id.
        types: of each token a number of `tokenizer.ggml.token_type`.
        scores: of each token, or None.
        merges: pairs of tokens that are joined, in order; each is one text with a space.
        pre: the name of the rule by which text is split, or None.
        prefix: whether a space is put before texts.
        unknown: the id of text outside of the vocabulary, or None.
    """

    path: Path
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray | None
    merges: list[str]
    pre: Any
    prefix: bool
    unknown: int | None

    def is_spaces(self, i: int) -> bool:
        """Returns whether a token consists of spaces."""
        return self.tokens[i].strip(" ") == ""

    def ids(self, tokens: list[str]) -> dict[str, int]:
        """Returns the ids of tokens; the spelling may differ from the file's.

        Raises:
            ValueError: if a token comes twice.
        """
        found = {token: i for i, token in enumerate(tokens)}
        if len(found) < len(tokens):
            twice = next(token for i, token in enumerate(tokens) if found[token] != i)
            raise ValueError(f"{self.path}: the vocabulary has the token {shorten(twice)} twice.")
        return found


_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_FIRST = r"[^\r\n\p{L}\p{N}]?"  # a word may begin with one sign


def _by_words(digits: str) -> str:
    """Returns the expression of GPT-4 for numbers of some digits."""
    signs = _SIGNS.replace("/", "")
    return rf"{_ENDINGS}|{_FIRST}\p{{L}}+|\p{{N}}{digits}|{signs}|{_SPACES}"


def _by_capitals(ending: str, digits: str) -> str:
    """Returns the expression of GPT-4o, by which a capital letter begins a word."""
    small, capital = rf"{_LETTERS}*{_SMALL}+{ending}", rf"{_LETTERS}+{_SMALL}*{ending}"
    return rf"{_FIRST}{small}|{_FIRST}{capital}|\p{{N}}{digits}|{_SIGNS}|{_SPACES}"


LLAMA3, QWEN2 = _by_words("{1,3}"), _by_words("")
TEKKEN, GPT4O = _by_capitals("", ""), _by_capitals(f"{_ENDINGS}?", "{1,3}")

# The rules by which text is split before pairs are merged, by `tokenizer.ggml.pre`: None is that of
# GPT-2, "digits" splits digits off before it, and others are expressions.
RULES = {
    "gpt-2": None,
    "smollm": "digits",
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
    "tekken": TEKKEN,
}
# Of these a token may be a whole word that no merges make, and texts have a start token.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")
NORMALIZED = ("qwen2", "deepseek-r1-qwen")


def starts_texts(pre: Any) -> bool:
    """Returns whether texts of a byte-level tokenizer have a start token by its rule."""
    return pre in WHOLE_WORDS


def byte_level(v: Vocabulary) -> dict[str, Any]:
    """Returns the parts of a byte-level BPE, as GPT-2 has it (Radford et al. 2019)."""
    if not isinstance(v.pre, str) or v.pre not in RULES:
        raise ValueError(
            f"{v.path}: tokenizer.ggml.pre must be one of {', '.join(sorted(RULES))}, got "
            f"{shorten(v.pre)}. Load the tokenizer of the checkpoint that the file was made of."
        )
    rule = RULES[v.pre]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole: dict[str, Any] = {**bytes_of, "use_regex": rule in (None, "digits")}
    first: list[dict[str, Any]] = []
    if rule == "digits":
        first = [{"type": "Digits", "individual_digits": True}]
    elif rule is not None:
        first = [
            {
                "type": "Split",
                "pattern": {"Regex": rule},
                "behavior": "Isolated",
                "invert": False,
            }
        ]
    merges = [merge.split(" ") for merge in v.merges]
    ids = v.ids(v.tokens)
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= ids.keys():
            raise ValueError(
                f"{v.path}: a merge must be two tokens that make a third, with a space between "
                f"them, got {shorten(' '.join(merge))}."
            )
    return {
        "normalizer": {"type": "NFC"} if v.pre in NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, whole]},
        "decoder": {**bytes_of, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": merges,
            "ignore_merges": v.pre in WHOLE_WORDS,
        },
    }


def sentence_pieces(v: Vocabulary) -> dict[str, Any]:
    """Returns the parts of a BPE of SentencePiece, which falls back to bytes (Kudo et al. 2018)."""
    if v.scores is None:
        raise ValueError(f"{v.path} has no tokenizer.ggml.scores.")
    # Files have the tokens of several spaces as such, and in texts they are written by the sign.
    tokens = [token.replace(" ", SPACE) if not token.strip(" ") else token for token in v.tokens]
    ids = v.ids(tokens)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if v.prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if v.prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "unk_token": None if v.unknown is None else tokens[v.unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": list(_merges(v, tokens, ids)),
        },
    }


def _merges(v: Vocabulary, tokens: list[str], ids: dict[str, int]) -> Iterator[list[str]]:
    """Yields the pairs of tokens that make a third, the best third first.

    Scores fall with the number of a normal token, and then the number says more: tokens of spaces
    and newlines, which have no score of their own, come where they were trained.
    """
    scores = np.zeros(len(tokens)) if v.scores is None else v.scores
    normal = scores[v.types == NORMAL]
    falls = bool((np.diff(normal) <= 0).all())
    order = range(len(tokens)) if falls else np.argsort(-scores, kind="stable").tolist()
    for i in order:
        token = tokens[i]
        if v.types[i] == BYTE or len(token) > LONGEST:
            continue
        for k in range(len(token) - 1, 0, -1):
            first, second = token[:k], token[k:]
            if first in ids and second in ids:
                yield [first, second]


def word_pieces(v: Vocabulary) -> dict[str, Any]:
    """Returns the parts of BERT's WordPiece (Devlin et al. 2019).

    In the file a token that begins a word has the sign of a space, and one within a word has none.
    A vocabulary without capital letters is one of lower case.
    """
    tokens = [
        _word_piece(token, kind) for token, kind in zip(v.tokens, v.types.tolist(), strict=True)
    ]
    normal = (token for token, kind in zip(tokens, v.types.tolist(), strict=True) if kind == NORMAL)
    lower = all(token == token.lower() for token in normal if not _bracketed(token))
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lower,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]" if v.unknown is None else tokens[v.unknown],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": v.ids(tokens),
        },
    }


def _word_piece(token: str, kind: int) -> str:
    if kind != NORMAL or _bracketed(token):
        return token
    return token[1:] if token.startswith(SPACE) else f"##{token}"


def _bracketed(token: str) -> bool:
    return token.startswith("[") and token.endswith("]") and len(token) > 1
