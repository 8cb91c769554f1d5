"""Norms of the residual stream, and norms of queries and keys per head."""

import inspect
from collections.abc import Callable
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.axes import Letters
from jaxformers.checks import check_flag, check_nonnegative, check_positive, check_size
from jaxformers.layers import as_module, construct


class LayerNorm(eqx.Module):
    """Layer normalization: vectors of mean 0 and variance 1, with a trained gain and bias.

    It is computed in float32 and cast back (Ba et al. 2016).

    Arguments:
        d_model: width of the vectors.
        eps: the number that is added to the variance, 1e-5.
        use_bias: whether there is a bias beside the gain.
        use_gain: whether there is a gain; without a gain there must be no bias either (OLMo).
        gain_offset: the number that is added to the gain, whose initial value is
            `1 - gain_offset`; 1 in Nemotron.

    Example:
        >>> LayerNorm(64)(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    gain: Float[Array, " d"] | None
    b: Float[Array, " d"] | None
    eps: float = eqx.field(static=True)
    gain_offset: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        use_bias: bool = True,
        use_gain: bool = True,
        gain_offset: float = 0.0,
    ):
        check_size(d_model=d_model)
        check_positive(eps=eps)
        check_nonnegative(gain_offset=gain_offset)
        check_flag(use_bias=use_bias, use_gain=use_gain)
        if use_bias and not use_gain:
            raise ValueError("a norm without a gain has no bias either: pass use_bias=False.")
        self.gain = jnp.full(d_model, 1.0 - gain_offset, jnp.float32) if use_gain else None
        self.b = jnp.zeros(d_model, jnp.float32) if use_bias else None
        self.eps = float(eps)
        self.gain_offset = float(gain_offset)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        wide = x.astype(jnp.float32)
        centered = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.eps)
        if self.gain is not None:
            y = y * (self.gain.astype(jnp.float32) + self.gain_offset)
        y = y if self.b is None else y + self.b.astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(eqx.Module):
    """Root mean square normalization: vectors of root mean square 1, with a trained gain.

    It is computed in float32 and cast back (Zhang and Sennrich 2019).

    Arguments:
        d_model: width of the vectors.
        eps: the number that is added to the mean square, 1e-6.
        gain_offset: the number that is added to the gain, whose initial value is
            `1 - gain_offset`; 1 in Gemma, so that weight decay pulls the factor to 1.

    Example:
        >>> RMSNorm(64)(jnp.ones((2, 10, 64))).shape
        (2, 10, 64)
    """

    gain: Float[Array, " d"]
    eps: float = eqx.field(static=True)
    gain_offset: float = eqx.field(static=True)

    def __init__(self, d_model: int, eps: float = 1e-6, gain_offset: float = 0.0):
        check_size(d_model=d_model)
        check_positive(eps=eps)
        check_nonnegative(gain_offset=gain_offset)
        self.gain = jnp.full(d_model, 1.0 - gain_offset, jnp.float32)
        self.eps = float(eps)
        self.gain_offset = float(gain_offset)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        gain = self.gain.astype(jnp.float32) + self.gain_offset
        y = wide * jax.lax.rsqrt(mean_square + self.eps) * gain
        return y.astype(x.dtype)


class PerHeadNorm(eqx.Module):
    """A norm over the features of each head, with a separate gain for each head (Cohere).

    Arguments:
        norm: constructor of the norm, called `norm(head_dim)`.
        head_dim: features per head.
        num_heads: number of heads n.

    Example:
        >>> mha = MultiHeadAttention(64, 8, qk_norm=partial(PerHeadNorm, LayerNorm), key=key)
    """

    norm: Annotated[Callable, Letters(d="n d")]  # its arrays have a leading axis of heads

    def __init__(self, norm: Callable, head_dim: int, num_heads: int):
        self.norm = eqx.filter_vmap(lambda: norm(head_dim), axis_size=num_heads)()

    def __call__(self, x: Float[Array, "*b n t h"]) -> Float[Array, "*b n t h"]:
        return jax.vmap(lambda norm, x: norm(x), in_axes=(0, -3), out_axes=-3)(self.norm, x)


class AllHeadsNorm(eqx.Module):
    """One norm over the features of all heads together (OLMo 2).

    Arguments:
        norm: constructor of the norm, called `norm(num_heads * head_dim)`.
        head_dim: features per head.
        num_heads: number of heads n.

    Example:
        >>> mha = MultiHeadAttention(64, 8, qk_norm=partial(AllHeadsNorm, RMSNorm), key=key)
    """

    norm: Annotated[Callable, Letters(d="n*d")]

    def __init__(self, norm: Callable, head_dim: int, num_heads: int):
        self.norm = norm(num_heads * head_dim)

    def __call__(self, x: Float[Array, "*b n t h"]) -> Float[Array, "*b n t h"]:
        *batch, n, t, h = x.shape
        y = self.norm(jnp.swapaxes(x, -2, -3).reshape(*batch, t, n * h))
        return jnp.swapaxes(y.reshape(*batch, t, n, h), -2, -3)


def build_head_norm(norm: Callable | None, head_dim: int, num_heads: int) -> Callable | None:
    """Returns a norm on queries or keys, or None where `norm` is None.

    A constructor with a parameter `num_heads` also receives the number of heads.
    """
    if norm is None:
        return None
    sizes = {"head_dim": head_dim}
    if callable(norm) and "num_heads" in inspect.signature(norm).parameters:
        return as_module(construct("qk_norm", norm, {}, **sizes, num_heads=num_heads))
    return as_module(construct("qk_norm", norm, sizes))
