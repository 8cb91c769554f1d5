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
from jaxformers.adapters.peft_load import load_adapter
from jaxformers.adapters.peft_save import save_adapter

__all__ = [
    "Dora",
    "Replaced",
    "adapter_names",
    "is_classifier",
    "is_inner_map",
    "load_adapter",
    "lora",
    "over_rank",
    "over_root_rank",
    "save_adapter",
    "unload",
]
