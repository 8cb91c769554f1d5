"""Heads of an encoder beside its output layer: pooling and classification."""

from collections.abc import Callable
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.axes import Letters
from jaxformers.checks import check_choice, check_key, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import Dense, as_module, construct, split_key

POOLINGS = ("first", "mean", "late", "pooler", "none")  # of a classifier
POOLED = ("first", "last", "mean", "mean_sqrt", "weighted_mean", "max")


def pool(
    hidden: Float[Array, "*b t d"],
    positions: Int[Array, "*#b t"],
    pooling: str,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "*b d"]:
    """Returns one vector `(b, d)` per sequence, made of the hidden states of its tokens.

    Padding does not count. The vector of a sequence without a token that counts is 0.

    Arguments:
        hidden: `(b, t, d)`.
        positions: position of each token, -1 for padding.
        pooling: "first" and "last" are that token, "mean" is the mean and "max" the largest value
            of each feature; "mean_sqrt" is the sum divided by the root of the number of tokens, and
            "weighted_mean" weights each token by its position, counted from 1.
        first: the first position that counts, 0.
    """
    check_choice(POOLED, pooling=pooling)
    counted = positions >= first
    wide = hidden.astype(jnp.float32)
    if pooling == "max":
        largest = jnp.where(counted[..., None], wide, -jnp.inf).max(-2)
        return jnp.where(counted.any(-1, keepdims=True), largest, 0.0).astype(hidden.dtype)
    if pooling == "first":
        beyond = jnp.iinfo(positions.dtype).max
        lowest = jnp.where(counted, positions, beyond).min(-1, keepdims=True)
        counted &= positions == lowest
    elif pooling == "last":
        counted &= positions == positions.max(-1, keepdims=True)
    weights = jnp.broadcast_to(counted, hidden.shape[:-1]).astype(jnp.float32)
    if pooling == "weighted_mean":
        weights = weights * (positions + 1).astype(jnp.float32)
    # Packed documents have several first tokens, and a row of padding has none.
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1.0)
    total = jnp.sqrt(total) if pooling == "mean_sqrt" else total
    pooled = jnp.einsum("...t,...td->...d", weights / total, wide)
    return pooled.astype(hidden.dtype)


def unit_length(vectors: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Returns vectors scaled to length 1; vectors of length 0 stay as they are."""
    wide = vectors.astype(jnp.float32)
    square = jnp.square(wide).sum(-1, keepdims=True)
    # The length has no gradient at 0, and the vector of a row of padding is 0.
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(vectors.dtype)


class Classifier(eqx.Module):
    """A classifier of whole sequences or of each token, which returns the scores of classes.

    Arguments:
        d_model: width of the hidden states.
        num_labels: number of classes.
        pooling: "first", "mean" and "pooler" classify a sequence by its first token, by the mean of
            its tokens, or by the output of the model's pooler; "late" is the mean of the scores of
            its tokens; "none" classifies each token.
        transform: constructor `transform(d_model, d_model, key=key)` of a module before the last
            map, such as `Dense` (RoBERTa); None is no module.
        init: initializer of the weights.
        key: PRNG key, required.

    Raises:
        ValueError: if a size is not positive, or the pooling is not one of these.

    Example:
        >>> model = TransformerEncoder(65, classifier=partial(Classifier, num_labels=3), key=key)
        >>> model.classify(jnp.array([[1, 2, 3]])).shape
        (1, 3)
    """

    transform: Annotated[Callable | None, Letters(i="d", o="d")]
    out: Annotated[Dense, Letters(i="d", o="c")]
    pooling: str = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_labels: int,
        pooling: str = "first",
        transform: Callable | None = None,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(d_model=d_model, num_labels=num_labels)
        check_choice(POOLINGS, pooling=pooling)
        transform_key, out_key = split_key(check_key(key), 2)
        self.transform = None
        if transform is not None:
            sizes = {"d_in": d_model, "d_out": d_model}
            self.transform = as_module(construct("transform", transform, sizes, key=transform_key))
        self.out = Dense(d_model, num_labels, init=init, key=out_key)
        self.pooling = pooling

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        return self.out(x if self.transform is None else self.transform(x))
