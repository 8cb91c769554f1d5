"""Initializers of weights: functions `(key, shape, fan_in, fan_out) -> array`."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_accepts, check_positive, check_size

Initializer = Callable[[PRNGKeyArray, tuple[int, ...], int, int], Float[Array, "..."]]


def check_initializer(**initializers: Callable | None) -> None:
    """Checks that initializers take `(key, shape, fan_in, fan_out)`; None is skipped.

    Raises:
        ValueError: if one takes other arguments, as those of `jax.nn.initializers` do.
    """
    for name, init in initializers.items():
        if init is None:
            continue
        check_accepts(name, init, ["key", "shape", "fan_in", "fan_out"])
        if "dtype" in inspect.signature(init).parameters:
            raise ValueError(
                f"{name} must be a function (key, shape, fan_in, fan_out) -> array, got one that "
                "takes a dtype, as the functions of jax.nn.initializers do. Write "
                f"{name}=lambda key, shape, fan_in, fan_out: theirs(key, shape)."
            )


def xavier_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int, fan_out: int
) -> Float[Array, "..."]:
    """Draws uniformly in `+-sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio 2010).

    Activations and gradients then keep their variance from layer to layer. The fans are separate
    from the shape because an axis of heads is part of the fan: `(d, heads, head_dim)` maps d to
    heads * head_dim features.

    Example:
        >>> xavier_uniform(jax.random.key(0), (64, 8, 4), 64, 32).shape
        (64, 8, 4)
    """
    limit = (6.0 / (fan_in + fan_out)) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def normal(stddev: float = 0.02) -> Initializer:
    """Returns a normal initializer with mean 0 and this standard deviation (0.02 in GPT-2).

    Example:
        >>> model = TransformerLM(65, init=normal(0.02), embedding_scale=1.0, key=key)
    """
    check_positive(stddev=stddev)

    def init(key, shape, fan_in, fan_out):
        return stddev * jax.random.normal(key, shape, jnp.float32)

    return init


def depth_scaled(num_layers: int, init: Initializer = xavier_uniform) -> Initializer:
    """Returns `init` scaled by `1 / sqrt(2 num_layers)`, for projections into the residual stream.

    Each layer adds the outputs of two sublayers to the residual stream. With this scale the
    variance of the stream is that of one sublayer at any depth (Radford et al. 2019, GPT-2,
    section 2.3).

    Example:
        >>> model = TransformerLM(65, num_layers=24, residual_init=depth_scaled(24), key=key)
    """
    check_size(num_layers=num_layers)

    def scaled(key, shape, fan_in, fan_out):
        return init(key, shape, fan_in, fan_out) / (2 * num_layers) ** 0.5

    return scaled
