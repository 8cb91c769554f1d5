"""Sites: the names of the values that flow through a model.

The modules of this package name these values with `site`, which gives the value back as it is.
Whoever keeps, spreads, reads or changes values in the middle of a model refers to them by name:
`rematerialize` today. No module knows of any of that.

The scopes of the program (`jax.named_scope`) say which part of the model has a site. A scope has
the name of the part's field, and the scope of a sublayer holds its residual too. The queries of
layer 3 are at `decoder/layers.3/self_attention/queries`. Scanned layers are one body, at
`decoder/layers`. Profiles show the same scopes. Neither names nor scopes add an operation to the
compiled program.
"""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

# The sites inside a layer, which a gradient may keep or compute again. `attention.py` explains the
# letters.
LAYER_SITES = {
    "queries": "the queries (b, n, t, h), normed, rotated and scaled",
    "keys": "the keys (b, g, s, h) of the new tokens, normed and rotated",
    "values": "the values (b, g, s, h) of the new tokens",
    "scores": "the scores (b, n, t, s) of plain attention, the lowest number where hidden",
    "attention_weights": "the weights (b, n, t, s) of plain attention, after dropout",
    "head_outputs": "the values that each head has gathered (b, n, t, h)",
    "feed_forward": "the activations (b, t, f) between the maps of a feed-forward",
    "sublayer_output": "the output (b, t, d) of attention or a feed-forward",
    "residual": "the residual stream (b, t, d) after each sublayer",
}

SITES = LAYER_SITES | {
    "embedding": "the embedded tokens (b, t, d), which enter a stack",
    "layer_input": "the residual stream (b, t, d) before a layer",
    "hidden": "the output (b, t, d) of a stack, after its norm",
    "logits": "the logits (b, t, v) in float32",
}


def site(x: Shaped[Array, "..."], name: str) -> Shaped[Array, "..."]:
    """Returns `x` itself, which is the site `name` of the program from here on.

    Raises:
        ValueError: if there is no such name in `SITES`.

    Example:
        >>> site(jnp.ones((2, 8, 10, 4)), "queries").shape
        (2, 8, 10, 4)
    """
    if name not in SITES:
        raise ValueError(f"a site must be one of {', '.join(SITES)}, got {name!r}.")
    return checkpoint_name(x, name)
