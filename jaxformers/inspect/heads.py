"""What layers and heads do: the logits of each layer, and what each head adds to them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from jaxformers.checks import check_callable, check_key, check_size, check_tokens
from jaxformers.inspect.patching import patch
from jaxformers.inspect.tracing import trace
from jaxformers.inspect.views import attention_maps, hidden_states
from jaxformers.norms import LayerNorm, RMSNorm
from jaxformers.output import check_output
from jaxformers.residual import PreNorm
from jaxformers.transformer_lm import TransformerLM
from jaxformers.weights import merge


def logit_lens(
    model: TransformerLM, tokens: Int[ArrayLike, "b t"], **options: Any
) -> Float[Array, "l b t v"]:
    """Returns the logits that the residual stream gives before the first and after each layer.

    The final norm and the output layer read each of them (nostalgebraist 2020).

    Arguments:
        model: a `TransformerLM`.
        tokens: ids, `(b, t)`.
        **options: as for a call of the model, such as `padding_mask=`.

    Returns:
        float32, `(layers + 1, b, t, vocab_size)`. The last are the model's own logits.

    Example:
        >>> logit_lens(model, tokens).shape
        (2, 1, 4, 65)
    """
    check_decoder(model)
    stream = jnp.stack(hidden_states(model, tokens, **options))
    norm = model.decoder.norm
    return jax.vmap(lambda x: model.logits_of(x if norm is None else norm(x)))(stream)


def head_attribution(
    model: TransformerLM, tokens: Int[ArrayLike, "b t"], targets: Int[ArrayLike, "b t"]
) -> Float[Array, "l n b t"]:
    """Returns what each head adds directly to the logits of the targets.

    A head adds its output, times its part of the output projection, to the residual stream, which
    the output layer reads linearly once the scale of the final norm is taken as it is (Elhage et
    al. 2021, "A Mathematical Framework for Transformer Circuits"). With a `LayerNorm`, the mean of
    what is added does not count.

    Arguments:
        model: a `TransformerLM` with pre-norm layers, a `LayerNorm` or `RMSNorm` at the end, and an
            output layer without a transform or soft-cap.
        tokens: ids, `(b, t)`.
        targets: the id whose logit counts at each position, `(b, t)`.

    Returns:
        float32, `(layers, heads, b, t)`.

    Raises:
        ValueError: for a model in which heads do not add to the logits linearly, and for targets
            of another shape than the tokens or outside of the vocabulary.

    Example:
        >>> head_attribution(model, tokens, tokens).shape
        (1, 2, 1, 4)
    """
    check_decoder(model)
    targets = jnp.asarray(check_tokens(targets, model.vocab_size, "targets"))
    if targets.ndim != 2 or targets.shape != jnp.shape(tokens):
        raise ValueError(
            f"targets must have the shape (b, t) of the tokens, got {targets.shape} and "
            f"{jnp.shape(tokens)}. Add an axis to a single row, tokens[None]."
        )
    only = ["decoder.layers.*.self_attention.head_outputs", "decoder.layers.*.residual_after"]
    sites = trace(model, only)(tokens).sites
    last = sites[f"decoder.layers.{len(model.decoder.layers) - 1}.residual_after"]
    model = merge(model)
    direction = _direction(model, last, targets)
    found = []
    for i, layer in enumerate(model.decoder.layers):
        joint = layer.self_attention_residual
        if not isinstance(joint, PreNorm):
            raise ValueError(
                "head_attribution needs pre-norm layers, in which attention is added to the "
                f"residual stream as it is, got {type(joint).__name__}."
            )
        heads = sites[f"decoder.layers.{i}.self_attention.head_outputs"].astype(jnp.float32)
        wo = layer.self_attention.wo.astype(jnp.float32)
        found.append(joint.add.scale * jnp.einsum("bnth,nhd,btd->nbt", heads, wo, direction))
    return jnp.stack(found)


def _direction(
    model: TransformerLM, x: Float[Array, "b t d"], targets: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """Returns the gradient of the targets' logits by the stream, the norm's scale constant."""
    output, norm = check_output(model), model.decoder.norm
    if output.transform is not None or output.softcap is not None:
        raise ValueError(
            "head_attribution needs an output layer without a transform or soft-cap, after which "
            "logits are no sums over heads. Use ablate_heads."
        )
    table = model.embedding.table if output.tied else output.w.T
    w = table[targets].astype(jnp.float32) * output.scale
    x = x.astype(jnp.float32)
    if isinstance(norm, RMSNorm):
        gain = norm.gain.astype(jnp.float32) + norm.gain_offset
        return w * gain * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + norm.eps)
    if isinstance(norm, LayerNorm):
        w = w if norm.gain is None else w * (norm.gain.astype(jnp.float32) + norm.gain_offset)
        w = w - w.mean(-1, keepdims=True)
        return w * lax.rsqrt(x.var(-1, keepdims=True) + norm.eps)
    raise ValueError(
        "head_attribution needs a LayerNorm or RMSNorm at the end of the decoder, got "
        f"{type(norm).__name__}. Use ablate_heads."
    )


class KeptHeads(eqx.Module):
    """A function of the outputs of heads that multiplies each head by a number.

    Example:
        >>> KeptHeads(jnp.array([1.0, 0.0]))(jnp.ones((1, 2, 5, 4)))[0, :, 0, 0].tolist()
        [1.0, 0.0]
    """

    kept: Float[Array, " n"]

    def __call__(self, x: Float[Array, "*b n t h"]) -> Float[Array, "*b n t h"]:
        return x * self.kept[:, None, None].astype(x.dtype)


def ablate_heads(model: TransformerLM, score: Callable[[Any], Any]) -> Float[Array, "l n"]:
    """Returns by how much a score changes if one head alone gives zeros, for each head.

    One program computes all of them, one head after another (Michel et al. 2019).

    Arguments:
        model: a `TransformerLM`.
        score: function `model -> scalar`, as `lambda model: language_model_loss(model, batch)`.

    Returns:
        float32, `(layers, heads)`. Where it is a loss, positive numbers are those of heads that
        help.

    Example:
        >>> ablate_heads(model, lambda model: language_model_loss(model, batch)).shape
        (1, 2)
    """
    check_decoder(model)
    check_callable(score=score)
    layers = model.decoder.layers
    path = "decoder.layers.{}.self_attention.head_outputs"
    heads = [layer.self_attention.num_heads for layer in layers]
    if len(set(heads)) > 1:
        raise ValueError(f"ablate_heads needs layers of as many heads each, got {heads}.")

    def scored(model: Any, kept: Array) -> Array:
        return score(patch(model, {path.format(i): KeptHeads(x) for i, x in enumerate(kept)}))

    @eqx.filter_jit
    def changes(model: Any) -> Array:
        number = len(heads) * heads[0]
        masks = 1.0 - jnp.eye(number).reshape(number, len(heads), heads[0])
        return lax.map(lambda kept: scored(model, kept), masks) - scored(
            model, jnp.ones(masks.shape[1:])
        )

    return changes(model).reshape(len(heads), heads[0])


def induction_scores(
    model: TransformerLM, *, length: int = 50, rows: int = 4, key: PRNGKeyArray
) -> Float[Array, "l n"]:
    """Returns how much each head attends to what followed the same token the time before.

    Rows are `length` random tokens, twice. The score of a head is its mean weight, over the second
    half, on the token after the earlier occurrence of the query's token: 1 for a head that does
    nothing else (Olsson et al. 2022, "In-context Learning and Induction Heads").

    Arguments:
        model: a `TransformerLM`.
        length: the number of random tokens, 50.
        rows: the number of rows, 4.
        key: PRNG key of the tokens.

    Returns:
        float32, `(layers, heads)`.

    Example:
        >>> induction_scores(model, length=3, key=key).shape
        (1, 2)
    """
    check_decoder(model)
    check_size(length=length, rows=rows)
    tokens = jax.random.randint(check_key(key), (rows, length), 0, model.vocab_size)
    maps = attention_maps(model, jnp.concatenate([tokens, tokens], axis=1))
    # The query at length + i has the token at i; what followed that is at i + 1.
    return jnp.stack(
        [
            jnp.diagonal(pattern[:, :, length:, 1:], axis1=2, axis2=3)[..., :length].mean((0, 2))
            for pattern in maps
        ]
    )


def check_decoder(model: Any) -> None:
    """Raises an error unless the model is a `TransformerLM`."""
    if not isinstance(model, TransformerLM):
        raise ValueError(
            f"this function is for a TransformerLM, got {type(model).__name__}. For other models "
            "use trace, patch, hidden_states or attention_maps."
        )
