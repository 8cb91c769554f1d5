"""Adapters: low-rank changes of weights that are trained in place of the weights."""

from jaxformers.adapters.kinds import Dora, Replaced
from jaxformers.adapters.lora import (
    adapter_names,
    is_classifier,
    is_inner_map,
    lora,
    over_rank,
    over_root_rank,
    unload,
)

__all__ = [
    "Dora",
    "Replaced",
    "adapter_names",
    "is_classifier",
    "is_inner_map",
    "lora",
    "over_rank",
    "over_root_rank",
    "unload",
]
