"""Optimizers, gradient clipping, and the protocol that every optimizer follows."""

from jaxformers.optim.adafactor import Adafactor, relative_step
from jaxformers.optim.adamw import AdamW
from jaxformers.optim.averaged import Averaged
from jaxformers.optim.clipping import clip_by_global_norm, global_norm
from jaxformers.optim.decay import default_decay_mask
from jaxformers.optim.groups import Groups, freeze
from jaxformers.optim.layout import Layout, default_layout
from jaxformers.optim.leafwise import LeafwiseOptimizer
from jaxformers.optim.lion import Lion
from jaxformers.optim.muon import (
    Muon,
    OrthogonalMomentum,
    is_hidden_matrix,
    match_adamw,
    match_width,
)
from jaxformers.optim.optimizer import Model, Optimizer, as_optimizer

__all__ = [
    "Adafactor",
    "AdamW",
    "Averaged",
    "Groups",
    "Layout",
    "LeafwiseOptimizer",
    "Lion",
    "Model",
    "Muon",
    "Optimizer",
    "OrthogonalMomentum",
    "as_optimizer",
    "clip_by_global_norm",
    "default_decay_mask",
    "default_layout",
    "freeze",
    "global_norm",
    "is_hidden_matrix",
    "match_adamw",
    "match_width",
    "relative_step",
]
