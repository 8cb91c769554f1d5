"""The output layer: from the residual stream to the vocabulary."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_flag, check_key, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import linear


class OutputLayer(eqx.Module):
    """From the residual stream to log-probabilities over the vocabulary.

    Arguments:
        d_model: width of the input.
        vocab_size: number of tokens v.
        use_bias: whether there is a bias per token.
        tied: True for a layer without weights of its own, which is handed the token table.
        init: how the weights are drawn.
        key: PRNG key, required.

    Example:
        >>> OutputLayer(64, 65, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 65)
    """

    w: Float[Array, "d v"] | None
    b: Float[Array, " v"] | None

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        use_bias: bool = True,
        tied: bool = False,
        *,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        check_size(d_model=d_model, vocab_size=vocab_size)
        check_flag(use_bias=use_bias, tied=tied)
        shape = d_model, vocab_size
        self.w = None if tied else init(check_key(key), shape, *shape)
        self.b = jnp.zeros(vocab_size, jnp.float32) if use_bias else None

    @property
    def tied(self) -> bool:
        return self.w is None

    def __call__(
        self, x: Float[Array, "*b t d"], table: Float[Array, "v d"] | None = None
    ) -> Float[Array, "*b t v"]:
        """Log-probabilities in float32; arguments and errors as for `logits`."""
        return jax.nn.log_softmax(self.logits(x, table))

    def logits(
        self, x: Float[Array, "*b t d"], table: Float[Array, "v d"] | None = None
    ) -> Float[Array, "*b t v"]:
        """Unnormalised log-probabilities in float32.

        Arguments:
            x: `(b, t, d_model)`.
            table: the token table `(vocab_size, d_model)` if the layer is tied, else None.

        Raises:
            ValueError: if a tied layer is given no table, or another one is given one.
        """
        if (self.w is None) == (table is None):
            raise ValueError(
                "a tied output layer needs the token table at each call and one with weights of "
                f"its own takes none, got w = {self.w!r} and table = {table!r}."
            )
        w = table.T if self.w is None else self.w  # type: ignore[union-attr]
        return linear(x, w, self.b).astype(jnp.float32)
