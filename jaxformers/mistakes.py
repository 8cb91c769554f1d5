"""Warnings, given once, of calls that are allowed but are probably mistakes."""

from typing import Any

import numpy as np

from jaxformers.checks import is_known, least_and_most
from jaxformers.origin import Origin, SpecialTokens
from jaxformers.warn import warn_once


def special_of(origin: Origin | None) -> SpecialTokens:
    """Returns the special tokens of a model's checkpoint; without a checkpoint, there are none."""
    return SpecialTokens() if origin is None else origin.special_tokens


def warn_of_padding(tokens: Any, name: str, mask_name: str, special: SpecialTokens) -> None:
    """Warns if tokens without a mask have rows that begin or end with padding.

    The padding token is often a start token or an end token as well. Then a single one at an end of
    a row may be text, and several of them are padding. If the padding token is unknown, the end
    tokens count as padding. A row that consists of this token alone is not text.

    Arguments:
        tokens: `(b, t)` or `(t,)`.
        name: the name of the tokens: "src", "tgt", or another name for both at once.
        mask_name: the name of their mask.
        special: the known special tokens.
    """
    pads = special.end_token if special.pad_token is None else (special.pad_token,)
    if not pads or not is_known(tokens) or not getattr(tokens, "is_fully_addressable", True):
        return
    begins, ends = _ends_of_text(special, name)
    rows = np.atleast_2d(np.asarray(tokens))
    for pad in pads:
        is_text = rows[(rows != pad).any(-1)] != pad
        before, after = is_text.argmax(-1), is_text[:, ::-1].argmax(-1)
        if (before > (pad in begins)).any() or (after > (pad in ends)).any():
            warn_once(
                f"{name} has rows that begin or end with the padding token {pad}, and no "
                f"{mask_name} says that it is padding: the model takes it for text, and its "
                f"answers are others. Pass {mask_name}=, False where a token is padding, which "
                "tokenizer.encode returns beside the tokens. If it is text, pass "
                f"{mask_name}=np.ones({name}.shape, bool)."
            )


def _ends_of_text(special: SpecialTokens, name: str) -> tuple[set[int | None], set[int | None]]:
    """Returns the tokens that may begin a text, and those that may end it."""
    ends: set[int | None] = set(special.end_token)
    both = ends | {special.start_token}
    return {"src": (ends, ends), "tgt": (both, ends)}.get(name, (both, both))


def warn_of_length(
    length: int, origin: Origin | None, max_seq_length: int | None, what: str
) -> None:
    """Warns if rows are longer than those of the model's training and no table limits them.

    Arguments:
        length: the number of tokens of the longest row, padding not counted.
        origin: the origin of the model.
        max_seq_length: that of the model; if there is one, longer rows already raise errors.
        what: the subject and the verb of the warning.
    """
    trained = None if origin is None else origin.trained_length
    if trained is not None and max_seq_length is None and length > trained:
        warn_once(
            f"{what} beyond {trained} tokens, for which this model was trained by what its "
            "checkpoint's config.json says. Nothing stops it there, but what it makes of longer "
            "texts is often poor: shorten the text or ask for fewer tokens, or ignore this "
            "warning with warnings.filterwarnings."
        )


def warn_of_text(
    tokens: Any,
    is_masked: bool,
    positions: Any,
    origin: Origin | None,
    max_seq_length: int | None,
    name: str = "tokens",
    mask_name: str = "padding_mask",
) -> None:
    """Gives both warnings, of padding and of length, for the tokens of a call outside of `jit`.

    Arguments:
        tokens: `(b, t)` or `(t,)`.
        is_masked: whether a mask of any kind was given.
        positions: positions of the tokens, -1 for padding; None is 0 .. t-1.
        origin, max_seq_length: see `warn_of_length`.
        name, mask_name: see `warn_of_padding`.
    """
    if origin is None or not is_known(tokens):
        return
    if not is_masked:
        warn_of_padding(tokens, name, mask_name, origin.special_tokens)
    if positions is None or is_known(positions):
        longest = tokens.shape[-1] if positions is None else least_and_most(positions)[1] + 1
        warn_of_length(longest, origin, max_seq_length, f"{name} has rows that reach")
