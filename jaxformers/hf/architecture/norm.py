"""The norms of an architecture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxformers.hf.architecture.parts import same
from jaxformers.norms import LayerNorm, RMSNorm


@dataclass(frozen=True)
class NormOptions:
    """The norms of a model, which are all alike.

    Arguments:
        kind: "layer" or "rms".
        eps: the number that is added to the variance.
        bias: whether a layer norm has a bias.
        gain: whether a layer norm has a gain.
        offset: the number that is added to the gain.
    """

    kind: str = "layer"
    eps: float = 1e-5
    bias: bool = True
    gain: bool = True
    offset: float = 0.0

    @classmethod
    def of(cls, norm: Any) -> "NormOptions":
        """Returns the options of a norm.

        Raises:
            ValueError: if the norm has a class that no checkpoint has.
        """
        if isinstance(norm, RMSNorm):
            return cls("rms", norm.eps, offset=norm.gain_offset)
        if isinstance(norm, LayerNorm):
            has = {"bias": norm.b is not None, "gain": norm.gain is not None}
            return cls("layer", norm.eps, offset=norm.gain_offset, **has)
        raise ValueError(f"the norm {type(norm).__name__} has no name in checkpoints.")

    @classmethod
    def of_all(cls, norms: Sequence[Any]) -> "NormOptions":
        """Returns the options that these norms share; None stands for an absent norm.

        Raises:
            ValueError: if the norms differ, or all of them are absent.
        """
        found = [cls.of(norm) for norm in norms if norm is not None]
        if not found:
            raise ValueError("layers without any norm have no name in checkpoints.")
        return same("norms", found)

    def constructor(self, use_bias: bool | None = None) -> Callable:
        """Returns the constructor of the norms; a `use_bias` other than None replaces `bias`."""
        if self.kind == "rms":
            return partial(RMSNorm, eps=self.eps, gain_offset=self.offset)
        use_bias = self.bias if use_bias is None else use_bias
        has = {"use_bias": use_bias, "use_gain": self.gain}
        return partial(LayerNorm, eps=self.eps, gain_offset=self.offset, **has)
