"""A function on the logits as a processor."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.generation.processors.processor import History, Processor


class LogitsFunction(Processor):
    """Calls a function on the logits; it is the option `logits_fn`.

    Arguments:
        function: `(logits, tokens, real) -> logits`: logits `(r, v)`, and tokens `(r, s)` of the
            row so far where `real` is True. Arrays in it are traced if it is a pytree, such as a
            `jax.tree_util.Partial` or an Equinox module.

    Example:
        >>> function = lambda logits, tokens, real: logits.at[:, 5].set(-jnp.inf)
        >>> out = model.generate(prompt, 3, processors=[LogitsFunction(function)])
    """

    function: Callable

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        changed = self.function(logits, history.tokens, history.real)
        return None, changed.astype(jnp.float32)
