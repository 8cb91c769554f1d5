"""Looking inside: the values in the middle of a model, and what changes if they are others."""

from jaxformers.inspect.heads import (
    KeptHeads,
    ablate_heads,
    head_attribution,
    induction_scores,
    logit_lens,
)
from jaxformers.inspect.patching import patch
from jaxformers.inspect.tracing import Trace, trace
from jaxformers.inspect.views import attention_maps, hidden_states

__all__ = [
    "KeptHeads",
    "Trace",
    "ablate_heads",
    "attention_maps",
    "head_attribution",
    "hidden_states",
    "induction_scores",
    "logit_lens",
    "patch",
    "trace",
]
