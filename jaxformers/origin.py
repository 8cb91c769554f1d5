"""Where a model came from: what its checkpoint says beside the weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class SpecialTokens(NamedTuple):
    """The ids that a checkpoint's text begins and ends with; None and () where it names none."""

    start: int | None = None
    end: tuple[int, ...] = ()
    pad: int | None = None
    forced_first: int | None = None
    forced_last: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model keeps of the checkpoint it was loaded from, so that it can be saved again.

    Arguments:
        config: its config.json, as text.
        generation_config: its generation_config.json, as text; None if there was none.
        directory: where it lay, for the tokenizer's files.
        special_tokens: what `generate` uses where it is told nothing else.
    """

    config: str
    generation_config: str | None = None
    directory: str | None = None
    special_tokens: SpecialTokens = SpecialTokens()


def with_special_tokens(origin: Origin | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate`, completed by the special tokens of the model's checkpoint."""
    if origin is None:
        return dict(options)
    special = origin.special_tokens
    own = {
        "end_token": special.end or None,
        "pad_token": special.pad,
        "forced_first_token": special.forced_first,
        "forced_last_token": special.forced_last,
        "bad_words": [list(words) for words in special.bad_words] or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return {**options, **{k: x for k, x in own.items() if x is not None}, **given}
