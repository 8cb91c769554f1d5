"""The output layer, which maps the residual stream to the vocabulary."""

from collections.abc import Callable
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.axes import Letters
from jaxformers.checks import check_flag, check_key, check_positive, check_size
from jaxformers.initializers import Initializer, xavier_uniform
from jaxformers.layers import as_module, construct
from jaxformers.log_probs import log_softmax
from jaxformers.sites import scope, site
from jaxformers.weights import Weight, contract


class OutputLayer(eqx.Module):
    """A map from the residual stream to log-probabilities over the vocabulary.

    The logits are `x w + b`. With all options they are
    `softcap tanh(scale (transform(x) w + b) / softcap)`.

    Arguments:
        d_model: width of the input.
        vocab_size: number of tokens v.
        use_bias: whether there is a bias per token.
        tied: True for a layer without weights of its own, which receives the token table.
        scale: factor on the logits, 1.
        softcap: the bound c of the logits, `c tanh(logits / c)` (Gemma 2); None is no bound.
        transform: constructor `transform(d_model, embedding_dim, key=key)` of a module before the
            map to the vocabulary, such as `Dense` (BERT's masked-LM head); None is no module.
        embedding_dim: width of the transform's output; None is `d_model`.
        init: initializer of the weights.
        key: PRNG key, required.

    Example:
        >>> OutputLayer(64, 65, key=jax.random.key(0))(jnp.ones((2, 10, 64))).shape
        (2, 10, 65)
    """

    w: Float[Weight, "m v"] | None
    b: Float[Array, " v"] | None
    transform: Annotated[Callable | None, Letters(i="d", o="m")]
    scale: float = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        use_bias: bool = True,
        tied: bool = False,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        transform: Callable | None = None,
        embedding_dim: int | None = None,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray | None = None,
    ):
        width = d_model if embedding_dim is None else embedding_dim
        check_size(d_model=d_model, vocab_size=vocab_size, embedding_dim=width)
        check_flag(use_bias=use_bias, tied=tied)
        check_positive(scale=scale, **({} if softcap is None else {"softcap": softcap}))
        if transform is None and width != d_model:
            raise ValueError(
                f"embedding_dim {width} beside d_model {d_model} needs a transform= from one to "
                "the other, such as Dense."
            )
        shape = width, vocab_size
        self.w = None if tied else init(check_key(key), shape, *shape)
        self.b = jnp.zeros(vocab_size, jnp.float32) if use_bias else None
        self.transform = None
        if transform is not None:
            sizes = {"d_model": d_model, "embedding_dim": width}
            transform_key = jax.random.fold_in(check_key(key), 1)
            self.transform = as_module(construct("transform", transform, sizes, key=transform_key))
        self.scale = float(scale)
        self.softcap = None if softcap is None else float(softcap)

    @property
    def tied(self) -> bool:
        return self.w is None

    def __call__(
        self, x: Float[Array, "*b t d"], table: Float[Weight, "v m"] | None = None
    ) -> Float[Array, "*b t v"]:
        """Returns log-probabilities in float32; arguments and errors are those of `logits`."""
        return log_softmax(self.logits(x, table))

    @scope("output")
    def logits(
        self, x: Float[Array, "*b t d"], table: Float[Weight, "v m"] | None = None
    ) -> Float[Array, "*b t v"]:
        """Returns unnormalized log-probabilities `(b, t, vocab_size)` in float32.

        Arguments:
            x: `(b, t, d_model)`.
            table: the token table `(vocab_size, embedding_dim)` if the layer is tied, else None.

        Raises:
            ValueError: if a tied layer receives no table, or another layer receives one.
        """
        if (self.w is None) == (table is None):
            raise ValueError(
                "a tied output layer needs the token table at each call and one with weights of "
                f"its own takes none, got w = {self.w!r} and table = {table!r}."
            )
        w: Any = table if self.w is None else self.w
        x = x if self.transform is None else self.transform(x)
        logits = contract(x, w, self.b, transposed=self.w is None).astype(jnp.float32)
        logits = logits if self.scale == 1.0 else logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return site(logits, "logits")


def check_output(model: Any) -> Any:
    """Returns the output layer of a generative model.

    Raises:
        ValueError: if the model has none.
    """
    output = getattr(model, "output", model)  # a model of the user's own may have another name
    if output is not None:
        return output
    hidden = "decode" if hasattr(model, "decode") else "forward"
    holds = "" if model.origin is None else " (LM head), because its checkpoint has none"
    raise ValueError(
        f"this model has no output layer{holds}: it gives hidden states, by model.{hidden}(...), "
        "and neither logits nor tokens. For these, load a checkpoint of the whole language model, "
        "or build the model without output=None."
    )
