"""The losses of the three models.

A batch is a dict of arrays:

    language model          tokens (b, t), targets (b, t)
    encoder-decoder         src (b, s), tgt (b, t), targets (b, t)
    masked language model   tokens (b, t), targets (b, t), loss_mask (b, t)

Where there is padding, a batch also has boolean masks of the same shapes, True where an input token
is real: `padding_mask`, or `src_padding_mask` and `tgt_padding_mask`. `loss_mask` marks the targets
that count. Without it, the targets of real inputs count. A target of -100 never counts. If a padded
text is cut into inputs and targets, the last real input has padding as its target. Give both masks
then:

    real = text != PAD
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:],
             "padding_mask": real[:, :-1], "loss_mask": real[:, 1:]}

If the rows of a language model hold several documents each, the batch has two other arrays in place
of a padding mask. `positions` (b, t) start again at 0 with each document and are -1 for padding.
`segment_ids` (b, t) are the number of the document. No token sees another document.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_options, check_tokens, is_known
from jaxformers.elsewhere import ARRAYS
from jaxformers.layers import split_key
from jaxformers.log_probs import check_targets, differ
from jaxformers.masks import AttentionMask
from jaxformers.output import check_output
from jaxformers.training.losses import chunked_cross_entropy
from jaxformers.training.names import advise
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
    """Returns the mean cross-entropy per counted token of `targets` given `tokens`, in nats.

    The logits of a long text are never all in memory at once, see `chunked_cross_entropy`.

    Arguments:
        model: a `TransformerLM`.
        batch: see this module; `targets[:, i]` is the token that follows `tokens[:, i]`.
        key: PRNG key for dropout; None evaluates without dropout.
        label_smoothing, z_loss: as for `cross_entropy`. For `train_step` or `fit`, create
            `functools.partial(language_model_loss, z_loss=1e-4)` once and pass it as the loss.

    Raises:
        ValueError: if the batch lacks an array or has an unknown one, or the model has no output
            layer; and as the model and `chunked_cross_entropy` do.

    Example:
        >>> text = jnp.array([[3, 1, 4, 1, 5]])
        >>> loss = language_model_loss(model, {"tokens": text[:, :-1], "targets": text[:, 1:]})
    """
    return _mean(model, _language(model, batch, key), batch, label_smoothing, z_loss)


def _language(model: TransformerLM, batch: Batch, key: PRNGKeyArray | None) -> Array:
    """Returns the hidden states that predict the targets."""
    optional = "padding_mask", "loss_mask", "positions", "segment_ids"
    check_model(model, "forward", "language_model_loss", "TransformerLM")
    check_output(model)
    check_batch(batch, ("tokens", "targets"), optional, "a language model")
    mask = _packed_mask(batch.get("positions"), batch.get("segment_ids"))
    padding_mask = batch.get("padding_mask")
    return model.forward(batch["tokens"], mask, key, padding_mask=padding_mask)[0]


def sequence_to_sequence_loss(
    model: Transformer,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy per counted token of `targets` given `src` and `tgt`, in nats.

    The logits of a long text are never all in memory at once, see `chunked_cross_entropy`.

    Arguments:
        model: a `Transformer`.
        batch: see this module; `tgt` begins with the start token, and `targets[:, i]` is the
            token that follows `tgt[:, i]`.
        key: PRNG key for dropout; None evaluates without dropout.
        label_smoothing, z_loss: as for `language_model_loss`.

    Raises:
        ValueError: as `language_model_loss` does.

    Example:
        >>> model = Transformer(9, 9, 16, 2, 1, 1, 32, 8, key=jax.random.key(0))
        >>> answer = jnp.array([[1, 5, 4, 3, 2]])  # 1 starts and 2 ends a target
        >>> batch = {"src": jnp.array([[3, 4, 5]]), "tgt": answer[:, :-1], "targets": answer[:, 1:]}
        >>> loss = sequence_to_sequence_loss(model, batch)
    """
    return _mean(model, _pair(model, batch, key), batch, label_smoothing, z_loss)


def _pair(model: Transformer, batch: Batch, key: PRNGKeyArray | None) -> Array:
    """Returns the decoder's hidden states, which predict the targets."""
    optional = "src_padding_mask", "tgt_padding_mask", "loss_mask"
    check_model(model, "decode", "sequence_to_sequence_loss", "Transformer")
    check_output(model)
    check_batch(batch, ("src", "tgt", "targets"), optional, "an encoder-decoder")
    src_key, tgt_key = split_key(key, 2)
    padding = {name: batch.get(name) for name in ("src_padding_mask", "tgt_padding_mask")}
    memory = model.encode(batch["src"], key=src_key, src_padding_mask=padding["src_padding_mask"])
    return model.decode(batch["tgt"], memory, key=tgt_key, **padding)


def masked_language_model_loss(
    model: TransformerEncoder,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy per counted token, in nats, of the masked tokens.

    Arguments:
        model: a `TransformerEncoder` with an output layer (Devlin et al. 2019).
        batch: see this module; `targets[:, i]` is the original token at position i, before some
            of the `tokens` were masked, and `loss_mask` marks the masked positions.
        key: PRNG key for dropout; None evaluates without dropout.
        label_smoothing, z_loss: as for `language_model_loss`.

    Raises:
        ValueError: as `language_model_loss` does, or if the model has no output layer.

    Example:
        >>> bert = TransformerEncoder(9, 16, 2, 1, 32, 8, output=OutputLayer, key=jax.random.key(0))
        >>> tokens, hidden = jnp.array([[3, 4, 5, 6]]), jnp.array([[False, True, False, False]])
        >>> batch = {"tokens": jnp.where(hidden, 8, tokens), "targets": tokens, "loss_mask": hidden}
        >>> loss = masked_language_model_loss(bert, batch)
    """
    return _mean(model, _masked(model, batch, key), batch, label_smoothing, z_loss)


def _masked(model: TransformerEncoder, batch: Batch, key: PRNGKeyArray | None) -> Array:
    """Returns the encoder's hidden states, which predict the masked tokens."""
    needed = "tokens", "targets", "loss_mask"
    optional = "padding_mask", "token_types", "positions", "segment_ids"
    check_model(model, "embed", "masked_language_model_loss", "TransformerEncoder")
    check_batch(batch, needed, optional, "a masked language model")
    given = {name: batch.get(name) for name in ("padding_mask", "token_types")}
    mask = _packed_mask(batch.get("positions"), batch.get("segment_ids"))
    return model(batch["tokens"], mask, key, **given)


OBJECTIVES = language_model_loss, sequence_to_sequence_loss, masked_language_model_loss
_HIDDEN = _language, _pair, _masked


def measure(
    loss: Loss, model: Any, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
    """Returns the loss of a batch without dropout, and its cross-entropy.

    The cross-entropy is without label smoothing and z-loss. It is None for other losses than
    those of this module.
    """
    options = _options(loss)
    if options is None:
        return loss(model, batch, None), None
    compute = _HIDDEN[OBJECTIVES.index(getattr(loss, "func", loss))]
    hidden = compute(model, batch, None)
    value = _mean(model, hidden, batch, *options)
    return value, _mean(model, hidden, batch, 0.0, 0.0) if any(options) else value


def is_regularized(loss: Loss) -> bool:
    """Returns whether a loss is known to add label smoothing or z-loss to the cross-entropy."""
    return any(_options(loss) or ())


def _options(loss: Loss) -> tuple[float, float] | None:
    """Returns the label smoothing and z-loss of a loss of this module, None for other losses."""
    given = getattr(loss, "keywords", {})
    known = given.keys() <= {"label_smoothing", "z_loss"} and not getattr(loss, "args", ())
    if not known or getattr(loss, "func", loss) not in OBJECTIVES:
        return None
    return given.get("label_smoothing", 0.0), given.get("z_loss", 0.0)


def count_targets(batch: Batch) -> Any:
    """Returns how many targets count, the weight of a batch in a mean over several batches.

    These are the targets that `loss_mask` marks, or else those of real inputs (`padding_mask`,
    `tgt_padding_mask`, `positions`), or else all. Targets of -100 never count. If the batch of
    your own loss has `labels` and no `targets`, the labels are counted. If it has neither, the
    result is the number of rows.

    Arguments:
        batch: a dict of arrays, see this module.

    Example:
        >>> print(count_targets({"tokens": tokens, "targets": tokens, "loss_mask": tokens > 2}))
        2
    """
    targets, mask = batch.get("targets"), _mask(batch)
    targets = batch.get("labels") if targets is None else targets
    if targets is None:
        return len(next(iter(batch.values()))) if mask is None else mask.sum()
    counted = None
    if jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        counted = differ(targets if hasattr(targets, "dtype") else np.asarray(targets))
    per_row = counted is not None and mask is not None and counted.ndim < mask.ndim
    if batch.get("loss_mask") is None and per_row:
        mask = None  # the class of a whole row counts, whatever of the row is padding
    if mask is None:
        return np.size(targets) if counted is None else counted.sum()
    # For a mask of another kind, only the user's own loss knows what it means.
    alike = counted is not None and (mask.dtype, mask.shape) == (np.bool_, counted.shape)
    return (mask & counted if alike else mask).sum()


def check_ids(loss: Loss, model: Any, batch: Batch, *, wait: bool = False) -> None:
    """Raises an error if ids are not in the model's vocabulary. Under `jit` it cannot know.

    Arguments:
        loss: the loss; only batches of the losses of this module are checked.
        model: the model.
        batch: its arrays are checked if they are of NumPy or on a CPU.
        wait: whether arrays on accelerators are checked as well, which waits for them.
    """
    if getattr(loss, "func", loss) not in OBJECTIVES or not isinstance(batch, Mapping):
        return
    for name, size in _vocabularies(model, batch).items():
        ids = _values(batch[name], wait)
        if ids is not None and np.issubdtype(ids.dtype, np.integer):  # else the loss raises
            check_tokens(ids, size, name)
    width = getattr(model, "vocab_size" if "tokens" in batch else "tgt_vocab_size", None)
    given, targets = _mask(batch), _values(batch.get("targets"), wait)
    mask = None if given is None else _values(given, wait)
    if width is None or targets is None or (mask is None) != (given is None):
        return
    fits = mask is None or (mask.dtype, mask.shape) == (np.bool_, targets.shape)
    if fits and np.issubdtype(targets.dtype, np.integer):
        counted = differ(targets) if mask is None else mask & differ(targets)
        check_targets(targets[counted], width)


def _values(x: Any, wait: bool) -> np.ndarray | None:
    """Returns the values of an array if they are known, or can be read with `wait`; else None."""
    if isinstance(x, jax.Array) and is_known(x) and x.is_fully_addressable:
        here = wait or all(device.platform == "cpu" for device in x.devices())
        return np.asarray(x) if here else None
    return x if isinstance(x, np.ndarray) else None


def _mask(batch: Batch) -> Any:
    """Returns which targets count, except for those of -100; None if all do."""
    if batch.get("loss_mask") is not None:
        return batch["loss_mask"]
    real = [batch[x] for x in ("padding_mask", "tgt_padding_mask") if batch.get(x) is not None]
    if batch.get("positions") is not None:
        positions = batch["positions"]
        real.append((positions if hasattr(positions, "dtype") else np.asarray(positions)) >= 0)
    return functools.reduce(operator.and_, real) if real else None


def _vocabularies(model: Any, batch: Batch) -> dict[str, int]:
    """Returns the size of the vocabulary for each array of input ids in a batch."""
    sizes = {"tokens": "vocab_size", "src": "src_vocab_size", "tgt": "tgt_vocab_size"}
    known = {name: getattr(model, size, None) for name, size in sizes.items()}
    return {name: x for name, x in known.items() if x is not None and batch.get(name) is not None}


def _mean(
    model: Any, hidden: Array, batch: Batch, label_smoothing: float, z_loss: float
) -> Float[Array, ""]:
    loss = chunked_cross_entropy(
        model.logits_of,
        hidden,
        batch["targets"],
        _mask(batch),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    # Ids with known values have been checked. Other ids beyond the vocabulary would read arbitrary
    # rows, so the loss and its gradient are NaN then.
    for name, size in _vocabularies(model, batch).items():
        if not is_known(batch[name]):
            ids = batch[name].astype(jnp.int32)
            exist = jnp.all((ids >= 0) & (ids < size))
            loss *= jnp.where(exist, jnp.float32(1), jnp.nan)
    return loss


def _packed_mask(positions: Any, segments: Any) -> AttentionMask | None:
    if (positions is None) != (segments is None):
        raise ValueError(
            "a batch of packed documents must have both positions and segment_ids, got only one of "
            "them. Add the other one."
        )
    if positions is None:
        return None
    positions, segments = jnp.asarray(positions), jnp.asarray(segments)
    return AttentionMask(q_positions=positions, q_segments=segments, k_segments=segments)


def check_model(model: Any, method: str, loss: str, of: str) -> None:
    """Raises `ValueError` if a model of another shape than the loss is for lacks a method."""
    # The check is by method, since a model of the user's own may have the method, too.
    if not hasattr(model, method):
        losses = ", ".join(f.__name__ for f in OBJECTIVES)
        raise ValueError(f"{loss} is for a {of}, got a {type(model).__name__}. There are {losses}.")


def check_batch(batch: Batch, needed: tuple[str, ...], optional: tuple[str, ...], of: str) -> None:
    """Raises `ValueError` unless a batch has the arrays that it needs, and known ones beside."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"the batch of {of} must be a dict of arrays, got {type(batch).__name__}.")
    known = needed + optional
    advice = advise([str(name) for name in batch if name not in known], of)
    check_options(batch, known, f"the batch of {of}", ARRAYS, "array", advice)
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        hint = " Of targets that are -100 elsewhere it is targets != -100."
        raise ValueError(
            f"the batch of {of} must have {', '.join(needed)}, got {', '.join(batch) or 'nothing'}."
            + (hint if "loss_mask" in missing else "")
        )
