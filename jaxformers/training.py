"""One step of training, compiled, and the losses of the two generative models.

A batch is a dict of arrays:

    language model      tokens (b, t), targets (b, t)
    encoder-decoder     src (b, s), tgt (b, t), targets (b, t)

and where there is padding, boolean masks of the same shapes, True where an input token is real:
`padding_mask`; `src_padding_mask`, `tgt_padding_mask`. `loss_mask` marks the targets that count;
without it those of real inputs do. Where a padded text is cut into inputs and targets, the last
real input has padding for a target, so give both:

    real = text != PAD
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:],
             "padding_mask": real[:, :-1], "loss_mask": real[:, 1:]}
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxformers.checks import check_key, check_options
from jaxformers.layers import split_key
from jaxformers.losses import chunked_cross_entropy
from jaxformers.optim import Model, as_optimizer
from jaxformers.precision import cast_floating, check_float_dtype
from jaxformers.transformer import Transformer
from jaxformers.transformer_lm import TransformerLM

Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch, PRNGKeyArray | None], Float[Array, ""]]


def language_model_loss(
    model: TransformerLM, batch: Batch, key: PRNGKeyArray | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy per counted token, in nats, of `batch["targets"]` given `batch["tokens"]`.

    Of long texts the logits are never there all at once: see `chunked_cross_entropy`.

    Arguments:
        model: a `TransformerLM`.
        batch: see this module; `targets[:, i]` is the token that follows `tokens[:, i]`.
        key: PRNG key for dropout; None evaluates without.

    Example:
        >>> text = jnp.array([[3, 1, 4, 1, 5]])
        >>> loss = language_model_loss(model, {"tokens": text[:, :-1], "targets": text[:, 1:]})
    """
    names = "tokens", "targets", "padding_mask", "loss_mask"
    check_options(batch, names, "the batch of a language model")
    padding_mask = batch.get("padding_mask")
    hidden, _ = model.forward(batch["tokens"], None, key, padding_mask=padding_mask)
    mask = batch.get("loss_mask", padding_mask)
    return chunked_cross_entropy(model.project, hidden, batch["targets"], mask)


def sequence_to_sequence_loss(
    model: Transformer, batch: Batch, key: PRNGKeyArray | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy per counted token, in nats, of `batch["targets"]` given src and tgt.

    Of long texts the logits are never there all at once: see `chunked_cross_entropy`.

    Arguments:
        model: a `Transformer`.
        batch: see this module; `tgt` begins with the start token, and `targets[:, i]` is the
            token that follows `tgt[:, i]`.
        key: PRNG key for dropout; None evaluates without.

    Example:
        >>> model = Transformer(9, 9, 16, 2, 1, 1, 32, 8, key=jax.random.key(0))
        >>> answer = jnp.array([[1, 5, 4, 3, 2]])  # 1 starts and 2 ends a target
        >>> batch = {"src": jnp.array([[3, 4, 5]]), "tgt": answer[:, :-1], "targets": answer[:, 1:]}
        >>> loss = sequence_to_sequence_loss(model, batch)
    """
    names = "src", "tgt", "targets", "src_padding_mask", "tgt_padding_mask", "loss_mask"
    check_options(batch, names, "the batch of an encoder-decoder")
    src_key, tgt_key = split_key(key, 2)
    padding = {name: batch.get(name) for name in ("src_padding_mask", "tgt_padding_mask")}
    memory = model.encode(batch["src"], key=src_key, src_padding_mask=padding["src_padding_mask"])
    hidden = model.decode(batch["tgt"], memory, key=tgt_key, **padding)
    mask = batch.get("loss_mask", padding["tgt_padding_mask"])
    return chunked_cross_entropy(model.project, hidden, batch["targets"], mask)


def train_step(
    model: Model,
    state: PyTree,
    batch: Batch,
    *,
    optimizer: Any,
    loss: Loss,
    key: PRNGKeyArray,
    compute_dtype: Any = None,
) -> tuple[Model, PyTree, Float[Array, ""]]:
    """One update: gradients of the loss, then the optimiser, as one compiled program.

    The arrays of `model` and `state` are donated: their memory is used for the result, so only the
    returned ones may be used afterwards.

    With `compute_dtype=jnp.bfloat16` the loss is computed by a copy of the weights in 16 bits, and
    what is updated stays in 32 (Micikevicius et al. 2018): small updates are not rounded away.
    Sums over tokens, softmax, norms and the loss are computed in float32 either way.

    Arguments:
        model: the model to train.
        state: `optimizer.init(model)`, or what the last step returned.
        batch: what `loss` takes.
        optimizer: `AdamW` or another `Optimizer`, or an optax transformation.
        loss: function `(model, batch, key) -> scalar`, such as `language_model_loss`.
        key: PRNG key for dropout, a new one each step.
        compute_dtype: the type to compute the loss and its gradients in, `jnp.bfloat16`; None is
            that of the weights. It saves time where the hardware has it, as GPUs and TPUs do.

    Returns:
        The model and the state after the update, and the loss before it.

    Raises:
        ValueError: if there is no key, a piece does not fit another, or `compute_dtype` is no
            floating-point type, or float16, whose range is too small for gradients.

    Example:
        >>> optimizer = AdamW(1e-3)
        >>> state = optimizer.init(model)
        >>> model, state, value = train_step(
        ...     model, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
        ... )
    """
    key = check_key(key)
    if compute_dtype is not None:
        compute_dtype = _check_compute_dtype(compute_dtype)
    return _train_step((as_optimizer(optimizer), loss, batch, key, compute_dtype), model, state)


@eqx.filter_jit(donate="all-except-first")
def _train_step(kept, model, state):
    optimizer, loss, batch, key, compute_dtype = kept

    @eqx.filter_value_and_grad
    def value_and_grad(model):
        model = model if compute_dtype is None else cast_floating(model, compute_dtype)
        return loss(model, batch, key)

    value, grads = value_and_grad(model)
    model, state = optimizer.update(grads, state, model)
    return model, state, value


def _check_compute_dtype(dtype: Any) -> np.dtype:
    dtype = check_float_dtype(dtype)
    if dtype == jnp.float16:
        raise ValueError(
            "compute_dtype float16 is refused: gradients below 6e-8 would be zero unless the loss "
            "were scaled. Pass jnp.bfloat16, which has the range of float32."
        )
    return dtype
