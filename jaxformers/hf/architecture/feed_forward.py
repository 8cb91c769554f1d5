"""The feed-forwards of an architecture, dense or a mixture of experts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxformers.hf.architecture.activation import ACTIVATIONS, activation_name
from jaxformers.hf.architecture.parts import Parts, same
from jaxformers.layers import FeedForward, GatedFeedForward
from jaxformers.mixture_of_experts import MixtureOfExperts
from jaxformers.pieces import Pieces


@dataclass(frozen=True)
class FeedForwardOptions:
    """The feed-forwards of a model, which are all alike.

    Arguments:
        d_ff: the inner width; in a mixture, that of one expert.
        decoder_d_ff: the inner width of the decoder in an encoder-decoder; None for `d_ff`.
        activation: the name of the activation in `ACTIVATIONS`.
        gated: whether there is a gate.
        bias: whether the maps have biases.
        experts: the number of experts; None for a dense feed-forward.
        experts_used: the number of experts per token.
        shared_expert_d_ff: the inner width of the expert that all tokens share, or None.
        renormalize: whether the weights of the chosen experts sum to 1.
    """

    d_ff: int
    decoder_d_ff: int | None = None
    activation: str = "silu"
    gated: bool = False
    bias: bool = False
    experts: int | None = None
    experts_used: int | None = None
    shared_expert_d_ff: int | None = None
    renormalize: bool = True

    def completed(self) -> "FeedForwardOptions":
        """Returns the options with all values that follow from other values."""
        width = self.decoder_d_ff
        return replace(self, decoder_d_ff=self.d_ff if width is None else width)

    @classmethod
    def of(cls, parts: Parts) -> "FeedForwardOptions":
        """Returns the options of a model, read from its layers.

        Raises:
            ValueError: if feed-forwards differ, or have a class that no checkpoint has.
        """
        widths = [_width(stack.layers[0].feed_forward) for stack in parts.stacks]
        own = same("feed-forwards", [_read(layer.feed_forward) for layer in parts.layers])
        return cls(d_ff=widths[0], decoder_d_ff=widths[-1], **own)

    def pieces(self) -> Pieces:
        """Returns the pieces for the constructor of a model."""
        return Pieces(use_bias=self.bias, feed_forward=self._constructor())

    def _constructor(self) -> Callable:
        activation = ACTIVATIONS[self.activation]
        if self.experts is None:
            return partial(GatedFeedForward if self.gated else FeedForward, activation=activation)
        return partial(
            MixtureOfExperts,
            num_experts=self.experts,
            top_k=self.experts_used or 1,
            activation=activation,
            renormalize=self.renormalize,
            shared_d_ff=self.shared_expert_d_ff,
        )


def _width(ff: Any) -> int:
    w = ff.w_down if hasattr(ff, "w_down") else getattr(ff, "w_out", None)
    if w is None:
        raise ValueError(f"the feed-forward {type(ff).__name__} has no name in checkpoints.")
    return w.shape[-2]


def _read(ff: Any) -> dict[str, Any]:
    if isinstance(ff, MixtureOfExperts):
        shared = ff.shared_expert
        own = {
            "experts": ff.num_experts,
            "experts_used": ff.top_k,
            "renormalize": ff.renormalize,
            "shared_expert_d_ff": None if shared is None else shared.w_down.shape[0],
            "gated": True,
        }
    elif isinstance(ff, GatedFeedForward):
        own = {"gated": True, "bias": ff.b_down is not None}
    elif isinstance(ff, FeedForward):
        own = {"gated": False, "bias": ff.b_out is not None}
    else:
        raise ValueError(f"the feed-forward {ff!r} has no name in checkpoints.")
    return {**own, "activation": activation_name(ff.activation)}
