"""Looking inside: a model's parameters, the values in its middle, and others in their place."""

from jaxformers.inspect.heads import (
    KeptHeads,
    ablate_heads,
    head_attribution,
    induction_scores,
    logit_lens,
)
from jaxformers.inspect.parameters import Parameter, ParameterTable, describe
from jaxformers.inspect.patching import patch
from jaxformers.inspect.tracing import Trace, trace
from jaxformers.inspect.views import attention_maps, hidden_states

__all__ = [
    "KeptHeads",
    "Parameter",
    "ParameterTable",
    "Trace",
    "ablate_heads",
    "attention_maps",
    "describe",
    "head_attribution",
    "hidden_states",
    "induction_scores",
    "logit_lens",
    "patch",
    "trace",
]
