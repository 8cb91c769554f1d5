"""The text of tokens in pictures: visible, short, and of characters that the fonts have."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from jaxformers.checks import check_callable
from jaxformers.ids import as_ids
from jaxformers.serving.token_text import TokenTexts
from jaxformers.tokenizers.tokenizer import Tokenizer

# Used beside the fonts of the style, where they are installed: the first comes with matplotlib.
MANY_SCRIPTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
)


def token_labels(tokens: Any, vocabulary: Tokenizer | Callable) -> list[str]:
    """Returns the text of each token of a row.

    Arguments:
        tokens: ids, `(t,)`.
        vocabulary: a `Tokenizer`, or a function from a list of ids to a list of as many strings.

    Raises:
        ValueError: if they are not one row of ids, or the function returns anything else.

    Example:
        >>> token_labels([8, 5], lambda ids: [chr(97 + i) for i in ids])
        ['i', 'f']
    """
    ids = np.asarray(as_ids(tokens, "tokens"))
    if ids.ndim != 1:
        raise ValueError(
            f"tokens must be one row of ids, (t,), got shape {ids.shape}. Pass one row, tokens[0]."
        )
    if isinstance(vocabulary, Tokenizer):
        texts = TokenTexts(vocabulary)
        return [texts.text_of(token) for token in ids.tolist()]
    check_callable(vocabulary=vocabulary)
    return check_labels("the result of vocabulary", vocabulary(ids.tolist()), len(ids))


def check_labels(name: str, labels: Any, size: int) -> list[str]:
    """Returns labels as a list, or raises `ValueError` unless they are `size` strings."""
    is_list = isinstance(labels, Sequence | np.ndarray) and not isinstance(labels, str)
    if not is_list or not all(isinstance(label, str) for label in labels):
        raise ValueError(
            f"{name} must be a list of strings, got {labels!r:.80}. token_labels(ids, tokenizer) "
            "gives it; list(text) has the characters of a text."
        )
    if len(labels) != size:
        raise ValueError(
            f"{name} must have one string for each of {size} positions, padding included, got "
            f"{len(labels)}."
        )
    return list(labels)


def visible(token: str, longest: int = 16) -> str:
    """Returns a token with visible spaces, escapes of what has no picture, and a limited length.

    Example:
        >>> print(visible(" the"), visible("\\n"), visible(""), visible("incomprehensibilities"))
        ␣the \\n ∅ incomprehensibi…
    """
    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in families()]
    parts = [
        x
        if x.isprintable() and any(font.get_char_index(ord(x)) for font in fonts)
        else x.encode("unicode_escape").decode()
        for x in token.replace(" ", "␣")
    ]
    if sum(map(len, parts)) <= longest:
        return "".join(parts) or "∅"
    while sum(map(len, parts)) > longest - 1:
        parts.pop()
    return "".join(parts) + "…"


def as_it_is() -> dict[str, Any]:
    """Returns the options of a text without formulas, in which `$` is a character."""
    return {"parse_math": False, "usetex": False, "fontfamily": families()}


def families() -> list[str]:
    """Returns the fonts of the style, then those that have what these lack."""
    installed = {font.name for font in fontManager.ttflist}
    return [*matplotlib.rcParams["font.family"], *(x for x in MANY_SCRIPTS if x in installed)]
