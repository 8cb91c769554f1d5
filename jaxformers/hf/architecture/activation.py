"""Activations: our functions, and their names in an `Architecture` and in a config.json."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers import activations

ACTIVATIONS: dict[str, Callable] = {
    "relu": activations.relu,
    "relu_squared": activations.relu_squared,
    "silu": activations.silu,
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "quick_gelu": activations.quick_gelu,
    "tanh": activations.tanh,
}
# The same functions under their names in JAX, for models that were built with those.
ALSO = [
    ("relu", jax.nn.relu),
    ("silu", jax.nn.silu),
    ("gelu_tanh", jax.nn.gelu),
    ("tanh", jnp.tanh),
]
# The names in transformers with ours. The first of several names is the one that is written.
ACTIVATION_NAMES = {
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "tanh": "tanh",
}


def activation_name(activation: Any) -> str:
    """Returns the name of an activation in an `Architecture`.

    Raises:
        ValueError: if it has none.
    """
    function: Callable = getattr(activation, "function", activation)
    if isinstance(function, partial) and function.func is jax.nn.gelu and not function.args:
        exact = function.keywords == {"approximate": False}
        function = ACTIVATIONS["gelu"] if exact else function
    for name, known in [*ACTIVATIONS.items(), *ALSO]:
        if known is function:
            return name
    raise ValueError(f"the activation {function!r} has no name in checkpoints.")
