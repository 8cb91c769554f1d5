"""What is allowed and seldom meant, and so no error: it is warned of, once."""

from typing import Any

import numpy as np

from jaxformers.checks import is_known
from jaxformers.origin import Origin, SpecialTokens
from jaxformers.warn import warn_once


def special_of(origin: Origin | None) -> SpecialTokens:
    """Returns the special tokens of the checkpoint that a model came from; none without one."""
    return SpecialTokens() if origin is None else origin.special_tokens


def warn_of_padding(tokens: Any, name: str, mask_name: str, special: SpecialTokens) -> None:
    """Warns if rows begin or end with padding, of tokens for which there is no mask.

    The token of padding is often one that texts begin or end with as well. As the only one at an
    end of a row it may be text then; several of them are padding. Where no token is known for
    padding, the end tokens are taken for that. A row of this token alone is nobody's text.

    Arguments:
        tokens: `(b, t)` or `(t,)`.
        name: what they are called: "src", "tgt", or another name for what is both at once.
        mask_name: what their mask is called.
        special: the special tokens that are known.
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
    """Returns the tokens that a text begins with, and those that it ends with."""
    ends: set[int | None] = set(special.end_token)
    both = ends | {special.start_token}
    return {"src": (ends, ends), "tgt": (both, ends)}.get(name, (both, both))


def warn_of_length(
    length: int, origin: Origin | None, max_seq_length: int | None, what: str
) -> None:
    """Warns if there are more tokens than the model was trained with, which no table limits.

    Arguments:
        length: how many tokens the longest row has, padding not counted.
        origin: where the model came from.
        max_seq_length: of the model; with one, longer rows are errors already.
        what: what is so long, with a verb.
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
    """Both warnings, for the tokens of a call outside of `jit`.

    Arguments:
        tokens: `(b, t)` or `(t,)`.
        is_masked: whether a mask was given, of whatever kind.
        positions: of the tokens, -1 for padding; None is 0 .. t-1.
        origin, max_seq_length, name, mask_name: see above.
    """
    if origin is None or not is_known(tokens):
        return
    if not is_masked:
        warn_of_padding(tokens, name, mask_name, origin.special_tokens)
    if positions is None or is_known(positions):
        longest = tokens.shape[-1] if positions is None else int(np.asarray(positions).max()) + 1
        warn_of_length(longest, origin, max_seq_length, f"{name} has rows that reach")
