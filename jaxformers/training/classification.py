"""The loss of an encoder that classifies sequences or tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.training.losses import cross_entropy
from jaxformers.training.objectives import Batch, check_batch, check_model
from jaxformers.transformer_encoder import TransformerEncoder


def classification_loss(
    model: TransformerEncoder,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the classes, in nats.

    Arguments:
        model: a `TransformerEncoder` with a classifier of two classes or more.
        batch: `tokens` `(b, t)`, and `targets`: the class of each row `(b,)`, or of each token
            `(b, t)` if the classifier has the pooling "none". A target of -100 does not count.
            It may have `padding_mask` and `token_types` of the tokens' shape.
        key: PRNG key for dropout; None evaluates without dropout.
        label_smoothing: as for `cross_entropy`.

    Raises:
        ValueError: if the batch lacks an array or has an unknown one, the model has no classifier,
            or one of a single class, whose cross-entropy is always 0; and as `cross_entropy` does.

    Example:
        >>> bert = TransformerEncoder(
        ...     65, classifier=partial(Classifier, num_labels=3), key=jax.random.key(0)
        ... )
        >>> batch = {"tokens": jnp.array([[3, 4, 5], [6, 7, 8]]), "targets": jnp.array([2, 0])}
        >>> classification_loss(bert, batch).shape
        ()
    """
    optional = "padding_mask", "token_types"
    check_model(model, "classify", "classification_loss", "TransformerEncoder")
    check_batch(batch, ("tokens", "targets"), optional, "a classifier")
    given = {name: batch.get(name) for name in optional}
    logits = model.classify(batch["tokens"], None, key, **given)
    if logits.shape[-1] == 1:
        raise ValueError(
            "classification_loss is for two classes or more, this classifier has one. Write a loss "
            "of your own for one number per row, such as "
            "((model.classify(batch['tokens'])[:, 0] - batch['targets']) ** 2).mean()."
        )
    targets = jnp.asarray(batch["targets"])
    per_token = targets.ndim == jnp.ndim(batch["tokens"])
    mask = given["padding_mask"] if per_token else None
    return cross_entropy(logits, batch["targets"], mask, label_smoothing=label_smoothing)
