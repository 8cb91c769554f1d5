"""Activations as plain functions, which can be pickled, unlike JAX's compiled functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `max(x, 0)`."""
    return jax.nn.relu(x)


def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `max(x, 0)^2` (So et al. 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x sigmoid(x)`, also called swish."""
    return jax.nn.silu(x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x Phi(x)`, Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the approximation of `gelu` with a tanh (GPT-2)."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the approximation `x sigmoid(1.702 x)` of `gelu`."""
    return x * jax.nn.sigmoid(1.702 * x)


def tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the hyperbolic tangent of `x`."""
    return jnp.tanh(x)
