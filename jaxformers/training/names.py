"""Errors that explain the names of other libraries for arguments and arrays of a training."""

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from jaxformers.checks import explain_options
from jaxformers.elsewhere import ARGUMENTS, ARRAYS

P = ParamSpec("P")
R = TypeVar("R")

# These arrays need more than another name.
LABELS = {
    "a language model": "Hugging Face's labels repeat the tokens, and its models shift them; here "
    "targets[:, i] is the token after tokens[:, i]: pass text[:, :-1] as tokens and text[:, 1:] as "
    "targets.",
    "an encoder-decoder": "tgt is what the decoder reads: the start token, then the labels without "
    "the last.",
    "a classifier": "targets has the class of each row.",
    "a masked language model": "loss_mask says which tokens were masked: labels != -100.",
}
MASKS = "A mask is boolean and True where a token is real or a target counts: write mask == 1"
OTHER_MASKS = "PyTorch's key_padding_mask is True where there is padding: write ~mask"


def explain_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of training so that its errors explain names of other libraries."""
    return explain_options(function, ARGUMENTS)


def advise(unknown: Iterable[str], of: str) -> str:
    """Returns advice on arrays of a batch whose meaning differs from that in other libraries.

    Arguments:
        unknown: the names of the arrays.
        of: the use of the batch, such as "a language model".
    """
    advice = []
    meant = {name: ARRAYS.get(name, ()) for name in unknown}
    if any("targets" in here for here in meant.values()):
        advice.append(LABELS[of])
    if any(name.endswith("key_padding_mask") for name in meant):
        advice.append(OTHER_MASKS + ".")
    elif any(here and here[0].endswith("mask") for here in meant.values()):
        advice.append(MASKS + ".")
    return " ".join(advice)
