"""Penalties on tokens that a row has already."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformers.generation.processors.processor import History, Processor
from jaxformers.generation.sampling import ANY, POSITIVE, one_or_more

Numbers = Float[Array, ""] | Float[Array, " b"]


class RepetitionPenalty(Processor):
    """Divides the logits of tokens that the row has by a penalty if positive, else multiplies them.

    Keskar et al. 2019 (CTRL), section 4.1, as in transformers' `RepetitionPenaltyLogitsProcessor`.

    Arguments:
        penalty: above 0, one number or one per row; above 1 discourages.

    Raises:
        ValueError: if it is not above 0.

    Example:
        >>> out = model.generate(prompt, 3, processors=[RepetitionPenalty(1.1)])
    """

    penalty: Numbers

    def __init__(self, penalty):
        self.penalty = one_or_more("penalty", penalty, *POSITIVE)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        penalty, limits = history.each_row(self.penalty)[:, None], jnp.finfo(logits.dtype)
        lower = jnp.where(logits < 0, logits * penalty, logits / penalty)
        # Between two infinite logits there would be no difference, and no distribution.
        lower = jnp.where(jnp.isfinite(logits), jnp.clip(lower, limits.min, limits.max), lower)
        seen = history.counts(history.real, logits.shape[1]) > 0
        return None, jnp.where(seen, lower, logits)


class FrequencyPenalty(Processor):
    """Takes a penalty off a logit for each time that its token was generated.

    The formula is that of the OpenAI API, "Frequency and presence penalties".

    Arguments:
        penalty: one number or one per row; above 0 discourages.

    Example:
        >>> out = model.generate(prompt, 3, processors=[FrequencyPenalty(0.5)])
    """

    penalty: Numbers

    def __init__(self, penalty):
        self.penalty = one_or_more("penalty", penalty, *ANY)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        count = history.counts(history.new, logits.shape[1]).astype(logits.dtype)
        return None, logits - history.each_row(self.penalty)[:, None] * count


class PresencePenalty(Processor):
    """Takes a penalty off the logits of tokens that were generated, however often.

    The formula is that of the OpenAI API, "Frequency and presence penalties".

    Arguments:
        penalty: one number or one per row; above 0 discourages.

    Example:
        >>> out = model.generate(prompt, 3, processors=[PresencePenalty(0.5)])
    """

    penalty: Numbers

    def __init__(self, penalty):
        self.penalty = one_or_more("penalty", penalty, *ANY)

    def __call__(
        self, state: None, logits: Float[Array, "r v"], history: History
    ) -> tuple[None, Float[Array, "r v"]]:
        generated = history.counts(history.new, logits.shape[1]) > 0
        penalty = history.each_row(self.penalty)[:, None]
        return None, logits - penalty * generated.astype(logits.dtype)
