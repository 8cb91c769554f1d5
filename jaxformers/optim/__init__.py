"""Optimisers written out, gradient clipping, and one protocol for every optimiser."""

from jaxformers.optim.adamw import AdamW
from jaxformers.optim.clipping import clip_by_global_norm, global_norm
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.optimizer import Model, Optimizer, as_optimizer

__all__ = [
    "AdamW",
    "Model",
    "Optimizer",
    "as_optimizer",
    "clip_by_global_norm",
    "default_decay_mask",
    "global_norm",
]
