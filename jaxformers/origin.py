"""Where a model came from: what its checkpoint says beside the weights."""

import dataclasses
from typing import NamedTuple


class SpecialTokens(NamedTuple):
    """The ids that a checkpoint's text begins and ends with, and those that must not come.

    They are None and () where it names none. Beside the start token, each has the name of an option
    of `generate`.
    """

    start_token: int | None = None
    end_token: tuple[int, ...] = ()
    pad_token: int | None = None
    forced_first_token: int | None = None
    forced_last_token: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model keeps of the checkpoint it was loaded from, so that it can be saved again.

    Arguments:
        config: its config.json, as text.
        generation_config: its generation_config.json, as text; None if there was none.
        directory: where it lay, for the tokenizer's files; models that differ in nothing else are
            of one kind.
        special_tokens: what `generate` uses where it is told nothing else.
        trained_length: how many tokens the texts had that it was trained on, by its config.json.
    """

    config: str = dataclasses.field(repr=False)
    generation_config: str | None = dataclasses.field(default=None, repr=False)
    directory: str | None = dataclasses.field(default=None, compare=False)
    special_tokens: SpecialTokens = SpecialTokens()
    trained_length: int | None = None
