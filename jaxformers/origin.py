"""The origin of a model: the content of its checkpoint beside the weights."""

import dataclasses
from typing import NamedTuple


class SpecialTokens(NamedTuple):
    """The ids that begin and end the text of a checkpoint, and the ids that it forbids.

    They are None or () where the checkpoint names none. Each of them except the start token has the
    name of an option of `generate`.
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
    """A record of the checkpoint that a model was loaded from, so that it can be saved again.

    Arguments:
        config: its config.json, as text.
        generation_config: its generation_config.json, as text; None if there was none.
        directory: its directory, which holds the tokenizer's files, or its GGUF file; comparisons
            of origins ignore it.
        special_tokens: the defaults of `generate`.
        trained_length: the length in tokens of the texts in its training, by its config.json.
        bare: whether the names of its tensors lack the prefix that they have in files of whole
            models; None if that is not known, as of models that earlier versions saved.
    """

    config: str = dataclasses.field(repr=False)
    generation_config: str | None = dataclasses.field(default=None, repr=False)
    directory: str | None = dataclasses.field(default=None, compare=False)
    special_tokens: SpecialTokens = SpecialTokens()
    trained_length: int | None = None
    bare: bool | None = None
