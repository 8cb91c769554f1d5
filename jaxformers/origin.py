"""Where a model came from: what its checkpoint says beside the weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class SpecialTokens(NamedTuple):
    """The ids that a checkpoint's text begins and ends with; None and () where it names none."""

    start_token: int | None = None
    end_token: tuple[int, ...] = ()
    pad_token: int | None = None
    forced_first_token: int | None = None
    forced_last_token: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model keeps of the checkpoint it was loaded from, so that it can be saved again.

    Arguments:
        config: its config.json, as text.
        generation_config: its generation_config.json, as text; None if there was none.
        directory: where it lay, for the tokenizer's files; models that differ in nothing else are
            of one kind.
        special_tokens: what `generate` uses where it is told nothing else.
    """

    config: str = dataclasses.field(repr=False)
    generation_config: str | None = dataclasses.field(default=None, repr=False)
    directory: str | None = dataclasses.field(default=None, compare=False)
    special_tokens: SpecialTokens = SpecialTokens()


def with_special_tokens(origin: Origin | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate`, completed by the special tokens of the model's checkpoint."""
    if origin is None:
        return dict(options)
    own = origin.special_tokens._asdict()
    del own["start_token"]
    if options.get("end_token") is not None:
        del own["forced_last_token"]  # whose purpose is to end as the checkpoint's texts do
    missing = {
        name: value
        for name, value in own.items()
        if value not in (None, ()) and options.get(name) is None
    }
    return {**options, **missing}
