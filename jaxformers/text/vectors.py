"""From the hidden states of the tokens of a text to its vector."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformers.checks import check_choice
from jaxformers.heads import POOLED, pool
from jaxformers.layers import as_module
from jaxformers.one_program import TokenRows
from jaxformers.text.batches import Model, hidden_states


class Vectors(eqx.Module):
    """Pooling, and the layers after it, which give the vector of a text, in float32.

    Arguments:
        pooling: one of "first", "last", "mean", "mean_sqrt", "weighted_mean" and "max", or several,
            whose vectors are joined; see `jaxformers.heads.pool`.
        layers: functions or modules that are applied to the vector in this order.

    Raises:
        ValueError: if there is no such pooling, or a layer cannot be called.
    """

    pooling: tuple[str, ...] = eqx.field(static=True)
    layers: tuple[Callable, ...]

    def __init__(self, pooling: str | Sequence[str] = "mean", layers: Sequence[Callable] = ()):
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        for name in self.pooling or [None]:
            check_choice(POOLED, pooling=name)
        self.layers = tuple(as_module(layer) for layer in layers)

    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        first: Int[Array, ""],
    ) -> Float[Array, "b e"]:
        wide = hidden.astype(jnp.float32)
        pooled = [pool(wide, positions, name, first) for name in self.pooling]
        vector = jnp.concatenate(pooled, axis=-1)
        for layer in self.layers:
            vector = layer(vector)
        return vector


def embed(
    parts: tuple[Model, Vectors, Int[Array, ""]],
    rows: TokenRows,
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b e"]:
    """Returns the vector of each row; a body for `one_program`.

    Arguments:
        parts: the model, what makes vectors of its hidden states, and the first position that
            counts.
        rows: texts.
        key: None; nothing is drawn.
    """
    model, vectors, first = parts
    return vectors(hidden_states(model, rows), rows.positions, first)
