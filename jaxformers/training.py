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
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxformers.checks import check_key, check_options
from jaxformers.layers import split_key
from jaxformers.losses import chunked_cross_entropy
from jaxformers.optim import Model, as_optimizer
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
) -> tuple[Model, PyTree, Float[Array, ""]]:
    """One update: gradients of the loss, then the optimiser, as one compiled program.

    The arrays of `model` and `state` are donated: their memory is used for the result, so only the
    returned ones may be used afterwards.

    Arguments:
        model: the model to train.
        state: `optimizer.init(model)`, or what the last step returned.
        batch: what `loss` takes.
        optimizer: `AdamW` or another `Optimizer`, or an optax transformation.
        loss: function `(model, batch, key) -> scalar`, such as `language_model_loss`.
        key: PRNG key for dropout, a new one each step.

    Returns:
        The model and the state after the update, and the loss before it.

    Raises:
        ValueError: if there is no key, or a piece does not fit another.

    Example:
        >>> optimizer = AdamW(1e-3)
        >>> state = optimizer.init(model)
        >>> model, state, value = train_step(
        ...     model, state, batch, optimizer=optimizer, loss=language_model_loss, key=key
        ... )
    """
    key = check_key(key)
    return _train_step((as_optimizer(optimizer), loss, batch, key), model, state)


@eqx.filter_jit(donate="all-except-first")
def _train_step(kept, model, state):
    optimizer, loss, batch, key = kept
    value, grads = eqx.filter_value_and_grad(loss)(model, batch, key)
    model, state = optimizer.update(grads, state, model)
    return model, state, value
