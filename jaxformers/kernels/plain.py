"""Plain attention, which makes all scores at once, and the protocol of all kernels.

The tests hold the other kernels to this one.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformers.checks import check_accepts
from jaxformers.masks import AttentionMask, Mask, as_mask
from jaxformers.native.products import many_rows, product
from jaxformers.sites import site


@runtime_checkable
class AttentionFunction(Protocol):
    """A kernel of attention, which `attention_fn=` takes.

    It computes what `dot_product_attention` computes, in its own way. `softcap` and `dropout` are
    always handed over. They are None where the attention has none. A kernel that lacks one of them
    raises a `ValueError` if it is not None.

    Example:
        >>> def sigmoid_attention(q, k, v, mask, *, softcap, dropout):
        ...     if softcap is not None or dropout is not None:
        ...         raise ValueError("sigmoid_attention has neither softcap nor dropout.")
        ...     scores, allowed = attention_scores(q, k, mask)
        ...     weights = jax.nn.sigmoid(scores)
        ...     return mix(weights if allowed is None else weights * allowed, v)
        >>> mha = MultiHeadAttention(64, 8, attention_fn=sigmoid_attention, key=key)
    """

    def __call__(
        self,
        q: Float[Array, "*b n t h"],
        k: Float[Array, "*b g s h"],
        v: Float[Array, "*b g s h"],
        mask: AttentionMask,
        *,
        softcap: float | None,
        dropout: Callable[[Array], Array] | None,
    ) -> Float[Array, "*b n t h"]: ...


def check_kernel(kernel: Callable, softcap: float | None, dropout_rate: float) -> None:
    """Checks that a function is an `AttentionFunction`, and that it has what an attention needs.

    Raises:
        ValueError: if it cannot be called as one, or has no dropout where there is a rate.
    """
    arguments = ["q", "k", "v", "mask"]
    needed = {"softcap": softcap is not None, "dropout": dropout_rate > 0}
    try:
        check_accepts("attention_fn", kernel, arguments, list(needed))
    except ValueError:  # the error says first what this attention needs
        check_accepts("attention_fn", kernel, arguments, [name for name in needed if needed[name]])
        raise
    if needed["dropout"]:  # a kernel without dropout says so now, and not in the first step
        x = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
        options = {"softcap": softcap, "dropout": lambda weights: weights}
        jax.eval_shape(lambda x: kernel(x, x, x, AttentionMask(), **options), x)


def refuse_dropout(kernel: str, dropout: Callable[[Array], Array] | None) -> None:
    """Raises a `ValueError` if there is dropout, for kernels that never have all weights."""
    if dropout is not None:
        raise ValueError(
            f"{kernel} has no dropout on the attention weights, since it never has all of them. "
            "Pass attention_fn=fast_attention or dot_product_attention, or leave out "
            "attention_dropout_rate."
        )


def check_inputs(q: Array, k: Array, v: Array) -> None:
    """Checks that queries, keys and values fit together."""
    same_batch = q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
    pairs = k.shape[-3:-1] == v.shape[-3:-1] and q.shape[-1] == k.shape[-1]
    if min(q.ndim, k.ndim, v.ndim) < 3 or not (same_batch and pairs) or q.shape[-3] % k.shape[-3]:
        raise ValueError(
            "attention takes queries (b, n, t, h), keys and values (b, g, s, h) with g a divisor "
            f"of n, got {q.shape}, {k.shape} and {v.shape}."
        )


def match(q: Float[Array, "*b n t h"], k: Float[Array, "*b g s h"]) -> Float[Array, "*b n t s"]:
    """Returns `q k^T` in float32, where each of the g key heads serves n / g query heads.

    Ainslie et al. 2023 (grouped queries).
    """
    *batch, n, t, h = q.shape
    g, s = k.shape[-3:-1]
    # The queries of a group are folded into t, so that shared keys are read once, not repeated.
    grouped = q.reshape(*batch, g, n // g * t, h)
    if many_rows(grouped, k, right=1):
        scores = product(grouped, k, right=1)
    else:
        scores = jnp.einsum("...gth,...gsh->...gts", grouped, k, preferred_element_type=jnp.float32)
    return scores.reshape(*batch, n, t, s)


def mix(weights: Float[Array, "*b n t s"], v: Float[Array, "*b g s h"]) -> Float[Array, "*b n t h"]:
    """Returns the sums of the values, weighted by the weights, in float32."""
    *batch, n, t, s = weights.shape
    g, h = v.shape[-3], v.shape[-1]
    grouped = weights.astype(v.dtype).reshape(*batch, g, n // g * t, s)
    if many_rows(grouped, v):
        mixed = product(grouped, v)
    else:
        mixed = jnp.einsum("...gts,...gsh->...gth", grouped, v, preferred_element_type=jnp.float32)
    return mixed.reshape(*batch, n, t, h)


def attention_scores(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    mask: AttentionMask,
    softcap: float | None = None,
) -> tuple[Float[Array, "*b n t s"], Bool[Array, "..."] | None]:
    """Returns the scores `q k^T / sqrt(h)` in float32, and where a query may attend.

    Scores are the lowest number where a query may not attend. With a soft-cap c they are
    `c tanh(scores / c)` before that (Gemma 2). The second result broadcasts to the scores; None
    means everywhere.
    """
    n, t, h = q.shape[-3:]
    s = k.shape[-2]
    scores = match(q * h**-0.5, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    bias, allowed = mask.score_bias(t, s, n), mask.materialize(t, s)
    scores = scores if bias is None else scores + bias
    if allowed is not None:
        # The lowest number rather than -inf, which would make a row without any key NaN.
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    return scores, allowed


def attention_weights(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    mask: AttentionMask,
    softcap: float | None = None,
) -> Float[Array, "*b n t s"]:
    """Returns `softmax(q k^T / sqrt(h))` in float32.

    A query that may attend to nothing gets zeros.
    """
    scores, allowed = attention_scores(q, k, mask, softcap)
    weights = jax.nn.softmax(site(scores, "scores"))
    return weights if allowed is None else jnp.where(allowed.any(-1, keepdims=True), weights, 0.0)


def dot_product_attention(
    q: Float[Array, "*b n t h"],
    k: Float[Array, "*b g s h"],
    v: Float[Array, "*b g s h"],
    mask: Mask | None,
    *,
    softcap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "*b n t h"]:
    """Returns plain attention, `softmax(q k^T / sqrt(h)) v`, which makes all `t x s` scores.

    It differentiates in any mode (Vaswani et al. 2017, equation 1).

    Arguments:
        q: queries, `(b, n, t, h)`.
        k, v: keys and values, `(b, g, s, h)`; g divides n.
        mask: an `AttentionMask`, booleans that broadcast to `(b, n, t, s)`, or None.
        softcap: c bounds the scores to `c tanh(scores / c)`; None does not.
        dropout: a function that is applied to the weights; None is no dropout.

    Returns:
        `(b, n, t, h)`.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> q, k = jnp.ones((2, 8, 5, 4)), jnp.ones((2, 2, 5, 4))
        >>> dot_product_attention(q, k, k, AttentionMask(causal=True)).shape
        (2, 8, 5, 4)
    """
    check_inputs(q, k, v)
    mask = as_mask(mask)
    weights = attention_weights(q, k, mask, softcap)
    weights = weights if dropout is None else dropout(weights)
    return mix(site(weights, "pattern"), v).astype(v.dtype)


def scaled_dot_product_attention(
    query: Float[Array, "*b t h"],
    keys: Float[Array, "*b s h"],
    values: Float[Array, "*b s j"],
    mask: Mask | None = None,
) -> tuple[Float[Array, "*b t j"], Float[Array, "*b t s"]]:
    """Returns `softmax(query keys^T / sqrt(h)) values` (Vaswani et al. 2017, equation 1).

    Arguments:
        query: `(..., t, h)`.
        keys: `(..., s, h)`.
        values: `(..., s, j)`.
        mask: True where a query may attend, broadcastable to `(..., t, s)`.

    Returns:
        The output `(..., t, j)` and the attention weights `(..., t, s)`, whose rows sum to 1 (to
        0 where a query may attend to nothing).

    Raises:
        ValueError: if shapes do not fit, or the mask is not boolean.

    Example:
        >>> q, k, v = jnp.ones((2, 4, 10, 16)), jnp.ones((2, 4, 12, 16)), jnp.ones((2, 4, 12, 16))
        >>> output, weights = scaled_dot_product_attention(q, k, v)
        >>> output.shape, weights.shape
        ((2, 4, 10, 16), (2, 4, 10, 12))
    """
    for name, x in {"query": query, "keys": keys, "values": values}.items():
        if x.ndim < 2 or x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"query, keys and values must share their leading axes, got {name} {x.shape} "
                f"beside query {query.shape}."
            )
    if query.shape[-1] != keys.shape[-1] or keys.shape[-2] != values.shape[-2]:
        raise ValueError(
            "keys must have the query's features and as many positions as values, got query "
            f"{query.shape}, keys {keys.shape}, values {values.shape}."
        )
    # Inputs without an axis of heads get one, so that one body serves both.
    headless = query.ndim == 2
    q, k, v = (x[None] if headless else x for x in (query, keys, values))
    mask = as_mask(mask)
    mask.check(q.shape[:-1] + keys.shape[-2:-1])
    weights = attention_weights(q, k, mask)
    output = mix(weights, v).astype(v.dtype)
    return (output[0], weights[0]) if headless else (output, weights)
