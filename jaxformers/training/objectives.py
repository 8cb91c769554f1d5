"""The losses of the three models.

A batch is a dict of arrays:

    language model          tokens (b, t), targets (b, t)
    encoder-decoder         src (b, s), tgt (b, t), targets (b, t)
    masked language model   tokens (b, t), targets (b, t), loss_mask (b, t)

and where there is padding, boolean masks of the same shapes, True where an input token is real:
`padding_mask`; `src_padding_mask`, `tgt_padding_mask`. `loss_mask` marks the targets that count;
without it those of real inputs do. Where a padded text is cut into inputs and targets, the last
real input has padding for a target, so give both:

    real = text != PAD
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:],
             "padding_mask": real[:, :-1], "loss_mask": real[:, 1:]}

Rows of either language model that hold several documents have, in place of a padding mask,
`positions` (b, t), which start again at 0 with each document and are -1 for padding, and
`segment_ids` (b, t), the number of the document: no token sees another document.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_options, check_tokens
from jaxformers.layers import split_key
from jaxformers.losses import check_targets, chunked_cross_entropy
from jaxformers.masks import AttentionMask
from jaxformers.transformer import Transformer
from jaxformers.transformer_encoder import TransformerEncoder
from jaxformers.transformer_lm import TransformerLM

Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch, PRNGKeyArray | None], Float[Array, ""]]


def language_model_loss(
    model: TransformerLM,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Mean cross-entropy per counted token, in nats, of `batch["targets"]` given `batch["tokens"]`.

    Of long texts the logits are never there all at once: see `chunked_cross_entropy`.

    Arguments:
        model: a `TransformerLM`.
        batch: see this module; `targets[:, i]` is the token that follows `tokens[:, i]`.
        key: PRNG key for dropout; None evaluates without.
        label_smoothing, z_loss: as for `cross_entropy`. Give `train_step` or `fit` the loss with
            them as `functools.partial(language_model_loss, z_loss=1e-4)`, made once.

    Raises:
        ValueError: if the batch lacks an array or has one too many; and as model and
            `chunked_cross_entropy` do.

    Example:
        >>> text = jnp.array([[3, 1, 4, 1, 5]])
        >>> loss = language_model_loss(model, {"tokens": text[:, :-1], "targets": text[:, 1:]})
    """
    optional = "padding_mask", "loss_mask", "positions", "segment_ids"
    _check_model(model, "forward", "language_model_loss", "TransformerLM")
    _check_batch(batch, ("tokens", "targets"), optional, "a language model")
    padding_mask, positions = batch.get("padding_mask"), batch.get("positions")
    real = padding_mask if positions is None else jnp.asarray(positions) >= 0
    mask = _packed_mask(positions, batch.get("segment_ids"))
    hidden, _ = model.forward(batch["tokens"], mask, key, padding_mask=padding_mask)
    counted = batch.get("loss_mask")
    counted = real if counted is None else counted
    return _mean(model, hidden, batch, counted, label_smoothing, z_loss)


def sequence_to_sequence_loss(
    model: Transformer,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Mean cross-entropy per counted token, in nats, of `batch["targets"]` given src and tgt.

    Of long texts the logits are never there all at once: see `chunked_cross_entropy`.

    Arguments:
        model: a `Transformer`.
        batch: see this module; `tgt` begins with the start token, and `targets[:, i]` is the
            token that follows `tgt[:, i]`.
        key: PRNG key for dropout; None evaluates without.
        label_smoothing, z_loss: as for `language_model_loss`.

    Raises:
        ValueError: as `language_model_loss` does.

    Example:
        >>> model = Transformer(9, 9, 16, 2, 1, 1, 32, 8, key=jax.random.key(0))
        >>> answer = jnp.array([[1, 5, 4, 3, 2]])  # 1 starts and 2 ends a target
        >>> batch = {"src": jnp.array([[3, 4, 5]]), "tgt": answer[:, :-1], "targets": answer[:, 1:]}
        >>> loss = sequence_to_sequence_loss(model, batch)
    """
    optional = "src_padding_mask", "tgt_padding_mask", "loss_mask"
    _check_model(model, "decode", "sequence_to_sequence_loss", "Transformer")
    _check_batch(batch, ("src", "tgt", "targets"), optional, "an encoder-decoder")
    src_key, tgt_key = split_key(key, 2)
    padding = {name: batch.get(name) for name in ("src_padding_mask", "tgt_padding_mask")}
    memory = model.encode(batch["src"], key=src_key, src_padding_mask=padding["src_padding_mask"])
    hidden = model.decode(batch["tgt"], memory, key=tgt_key, **padding)
    counted = batch.get("loss_mask")
    counted = padding["tgt_padding_mask"] if counted is None else counted
    return _mean(model, hidden, batch, counted, label_smoothing, z_loss)


def masked_language_model_loss(
    model: TransformerEncoder,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Mean cross-entropy per counted token, in nats, of what was hidden from an encoder.

    Arguments:
        model: a `TransformerEncoder` with an output layer (Devlin et al. 2019).
        batch: see this module; `targets[:, i]` is what stood at place i before some of the
            `tokens` were masked, and `loss_mask` says which.
        key: PRNG key for dropout; None evaluates without.
        label_smoothing, z_loss: as for `language_model_loss`.

    Raises:
        ValueError: as `language_model_loss` does, or if the model has no output layer.

    Example:
        >>> bert = TransformerEncoder(9, 16, 2, 1, 32, 8, output=OutputLayer, key=jax.random.key(0))
        >>> tokens, hidden = jnp.array([[3, 4, 5, 6]]), jnp.array([[False, True, False, False]])
        >>> batch = {"tokens": jnp.where(hidden, 8, tokens), "targets": tokens, "loss_mask": hidden}
        >>> loss = masked_language_model_loss(bert, batch)
    """
    needed = "tokens", "targets", "loss_mask"
    optional = "padding_mask", "token_types", "positions", "segment_ids"
    _check_model(model, "embed", "masked_language_model_loss", "TransformerEncoder")
    _check_batch(batch, needed, optional, "a masked language model")
    given = {name: batch.get(name) for name in ("padding_mask", "token_types")}
    mask = _packed_mask(batch.get("positions"), batch.get("segment_ids"))
    hidden = model(batch["tokens"], mask, key, **given)
    return _mean(model, hidden, batch, batch["loss_mask"], label_smoothing, z_loss)


OBJECTIVES = language_model_loss, sequence_to_sequence_loss, masked_language_model_loss


def count_targets(batch: Batch) -> Any:
    """How many targets count: the weight of a batch where a mean over several is taken.

    Those that `loss_mask` marks, or else those of real inputs (`padding_mask`, `tgt_padding_mask`,
    `positions`), or else all; without `targets`, the number of rows.

    Arguments:
        batch: a dict of arrays, see this module.

    Example:
        >>> print(count_targets({"tokens": tokens, "targets": tokens, "loss_mask": tokens > 2}))
        2
    """
    for name in ("loss_mask", "padding_mask", "tgt_padding_mask"):
        if batch.get(name) is not None:
            return batch[name].sum()
    if batch.get("positions") is not None:
        return (batch["positions"] >= 0).sum()
    rows = batch.get("targets")
    return len(next(iter(batch.values()))) if rows is None else np.size(rows)


def check_ids(loss: Loss, model: Any, batch: Batch) -> None:
    """Raise if ids are not in the model's vocabulary: under `jit` nobody can see.

    Only for the losses here, and only for NumPy's arrays: to look at those on a device would wait
    for it.
    """
    if getattr(loss, "func", loss) not in OBJECTIVES:
        return
    for name in ("tokens", "src", "tgt"):
        if isinstance(batch.get(name), np.ndarray):
            size = model.vocab_size if name == "tokens" else getattr(model, f"{name}_vocab_size")
            check_tokens(batch[name], size, name)
    targets, counted = batch.get("targets"), None
    for name in ("loss_mask", "padding_mask", "tgt_padding_mask"):
        counted = batch.get(name) if counted is None else counted
    if isinstance(targets, np.ndarray) and isinstance(counted, np.ndarray | None):
        size = model.vocab_size if "tokens" in batch else model.tgt_vocab_size
        if counted is None and batch.get("positions") is not None:
            counted = np.asarray(batch["positions"]) >= 0
        fits = counted is None or (counted.dtype, counted.shape) == (np.bool_, targets.shape)
        if fits:  # otherwise the loss will say so
            check_targets(targets if counted is None else targets[counted], size)


def _mean(
    model: Any, hidden: Array, batch: Batch, counted: Any, label_smoothing: float, z_loss: float
) -> Float[Array, ""]:
    return chunked_cross_entropy(
        model.project,
        hidden,
        batch["targets"],
        counted,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def _packed_mask(positions: Any, segments: Any) -> AttentionMask | None:
    if (positions is None) != (segments is None):
        raise ValueError(
            "a batch of packed documents has both positions and segment_ids, got one of them."
        )
    if positions is None:
        return None
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    return AttentionMask(q_positions=positions, q_segments=segments, k_segments=segments)


def _check_model(model: Any, method: str, loss: str, of: str) -> None:
    # By its methods: a model of the user's own may have them, too.
    if not hasattr(model, method):
        losses = ", ".join(f.__name__ for f in OBJECTIVES)
        raise ValueError(f"{loss} is for a {of}, got a {type(model).__name__}. There are {losses}.")


def _check_batch(batch: Batch, needed: tuple[str, ...], optional: tuple[str, ...], of: str) -> None:
    if not isinstance(batch, Mapping):
        raise ValueError(f"the batch of {of} must be a dict of arrays, got {type(batch).__name__}.")
    check_options(batch, needed + optional, f"the batch of {of}")
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        raise ValueError(
            f"the batch of {of} must have {', '.join(needed)}, got {', '.join(batch) or 'nothing'}."
        )
