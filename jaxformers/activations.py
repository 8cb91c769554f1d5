"""Activations: plain functions, which unlike JAX's compiled ones and partials can be pickled."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)`."""
    return jax.nn.relu(x)


def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)^2` (So et al. 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x sigmoid(x)`, also called swish."""
    return jax.nn.silu(x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x Phi(x)` with the normal distribution's own function (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same by its approximation with a tanh (GPT-2)."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same by its approximation `x sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


def tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The hyperbolic tangent."""
    return jnp.tanh(x)
