"""The activations that the gradient of a layer keeps, from tracing one layer without numbers."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxformers.kernels.choice import fast_attention
from jaxformers.kernels.flash import flash_attention
from jaxformers.layers import Function
from jaxformers.masks import AttentionMask

LENGTHS = 256, 512  # two lengths, whose difference is what tokens take


def kept_by(layer: Any, dtype: str) -> float:
    """Returns the bytes for a token that the gradient of a layer keeps.

    These are the arrays that JAX saves between the two passes, which a scan over layers stacks. The
    kernel of attention is one that keeps no scores, as accelerators have it.

    Arguments:
        layer: a layer of a decoder, with shapes in place of its arrays: those of one device, so
            that its heads and features are divided.
        dtype: the type of numbers that are computed with.
    """
    layer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if hasattr(x, "shape") else x, layer
    )
    attention = layer.self_attention.attention_fn
    if getattr(attention, "function", None) is fast_attention:
        layer = eqx.tree_at(
            lambda x: x.self_attention.attention_fn, layer, Function(flash_attention)
        )

    def kept(length: int) -> int:
        def pull(layer: Any, x: Any) -> Any:
            mask = AttentionMask(causal=True)
            return eqx.filter_vjp(
                lambda layer, x: layer.forward(x, None, mask, AttentionMask())[0], layer, x
            )[1]

        x = jax.ShapeDtypeStruct((1, length, layer.self_attention.wq.shape[0]), jnp.dtype(dtype))
        found = jax.tree.leaves(eqx.filter_eval_shape(pull, layer, x))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in found if hasattr(x, "shape"))

    short, long = map(kept, LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0])
