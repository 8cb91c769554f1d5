"""The length of the texts that a model was trained on, read from its config.json."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from jaxformers.hf.config.settings import Kept
from jaxformers.hf.family import Family

# The keys of the length, the most usual first.
KEYS = (
    *("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"),
    *("seq_length", "n_ctx", "model_max_length"),
)
# Scalings of rotary positions that extend the length in the file. With the other scalings, the
# length in the file is the extended one.
STRETCHING = ("linear", "dynamic", "yarn")


def trained_length(config: Mapping[str, Any], family: Family) -> int | None:
    """Returns the length in tokens; None if the file and the family's defaults name none.

    Example:
        >>> from jaxformers.hf.families import FAMILIES
        >>> trained_length({"max_position_embeddings": 256}, FAMILIES["llama"])
        256
        >>> rope = {"rope_type": "linear", "factor": 4.0}
        >>> trained_length({"rope_scaling": rope}, FAMILIES["llama"])
        8192
    """
    defaults = [x.values for x in family.settings if isinstance(x, Kept)]
    named = {key: x for values in defaults for key, x in values.items()} | {**config}
    length = next((named[key] for key in KEYS if _is_length(named.get(key))), None)
    if length is None:
        return None
    for key in ("rope_scaling", "rope_parameters"):
        rope: dict[str, Any] = config[key] if isinstance(config.get(key), dict) else {}
        kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
        before = rope.get("original_max_position_embeddings")
        if kind in STRETCHING and isinstance(factor, int | float) and factor > 1:
            return max(length, int((before if _is_length(before) else length) * factor))
    return length


def _is_length(x: Any) -> TypeGuard[int]:
    return type(x) is int and 0 < x < 10**9  # files say 10^30 for no limit
