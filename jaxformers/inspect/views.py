"""What is asked for most: hidden states and attention maps."""

from typing import Any

from jaxtyping import Array

from jaxformers.inspect.tracing import body_of, trace


def hidden_states(model: Any, *tokens: Any, **options: Any) -> Any:
    """Returns the residual stream before the first layer and after each layer.

    Arguments:
        model: a `TransformerLM`, `Transformer` or `TransformerEncoder`.
        *tokens: what the model is called with: ids `(b, t)`, or two of them for a `Transformer`.
        **options: as for a call of the model, such as `padding_mask=`.

    Returns:
        A list of one more than the layers, each `(b, t, d)`. For a `Transformer` a dict of them by
        "encoder" and "decoder". transformers' `output_hidden_states` has the same, but for the
        last, which it takes after the final norm.

    Example:
        >>> [x.shape for x in hidden_states(model, tokens)]
        [(1, 4, 16), (1, 4, 16)]
    """
    only = ["*.layers.0.residual_before", "*.layers.*.residual_after"]
    sites = trace(body_of(model), only)(*tokens, **options).sites
    return _by_stack(model, {stack: _of(sites, f"{stack}.") for stack in ("encoder", "decoder")})


def attention_maps(model: Any, *tokens: Any, **options: Any) -> Any:
    """Returns the weights of attention, of each query over all keys, in each layer.

    Arguments:
        model, *tokens, **options: as for `hidden_states`.

    Returns:
        A list with an array `(b, n, t, s)` per layer, for n heads, t queries and s keys. For a
        `Transformer` a dict of them by "encoder", "decoder" and "cross".

    Example:
        >>> [x.shape for x in attention_maps(model, tokens)]
        [(1, 2, 4, 4)]
    """
    sites = trace(body_of(model), ["*.pattern"])(*tokens, **options).sites
    found = {
        "encoder": _of(sites, "encoder."),
        "decoder": _of(sites, "decoder.", ".self_attention.pattern"),
        "cross": _of(sites, "decoder.", ".cross_attention.pattern"),
    }
    return _by_stack(model, found)


def _of(sites: dict[str, Array], begin: str, end: str = "") -> list[Array]:
    return [x for path, x in sites.items() if path.startswith(begin) and path.endswith(end)]


def _by_stack(model: Any, found: dict[str, list[Array]]) -> Any:
    """Returns what was found of the only stack of a model, or all of it."""
    both = hasattr(model, "encoder") and hasattr(model, "decoder")
    return found if both else found["decoder" if hasattr(model, "decoder") else "encoder"]
