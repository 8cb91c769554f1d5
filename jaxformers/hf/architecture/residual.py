"""The residual stream: the places of norms, parallel layers, and the scale of sublayers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx

from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.parts import Parts, same
from jaxformers.pieces import Pieces
from jaxformers.residual import PARALLELS, PLACEMENTS, NoNorm, OneNorm, Parallel


@dataclass(frozen=True)
class ResidualOptions:
    """How sublayers read from the residual stream and write to it.

    Arguments:
        placement: where their norms stand, as in `Pieces`.
        first_attention_norm: whether the first attention of an encoder has a norm (ModernBERT has
            none there).
        final_norm: whether a norm stands at the end of each stack.
        parallel: whether attention and feed-forward read the same, as in `Pieces`.
        scale: the factor on what a sublayer adds.
    """

    placement: str = "pre"
    first_attention_norm: bool = True
    final_norm: bool = True
    parallel: str | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, parts: Parts) -> "ResidualOptions":
        """Returns the options of a model, read from its layers.

        Raises:
            ValueError: if layers differ, or have joints that no checkpoint has.
        """
        joints, parallel = _joints(parts), _parallel(parts)
        placements = [_short_form(PLACEMENTS, type(joint)) for joint in joints]
        return cls(
            placement=same("placement of norms", placements),
            first_attention_norm=not _first_lacks_norm(parts),
            final_norm=same("final norms", [stack.norm is not None for stack in parts.stacks]),
            parallel=None if parallel is None else _short_form(PARALLELS, parallel),
            scale=same("residual scale", [joint.add.scale for joint in joints]),
        )

    def pieces(self) -> Pieces:
        """Returns the pieces for the constructor of a model."""
        return Pieces(
            norm_placement=self.placement, residual_scale=self.scale, parallel=self.parallel
        )

    def finish(self, model: Any, norm: NormOptions, d_model: int) -> Any:
        """Returns the model without the first attention's norm, where it has none."""
        if self.first_attention_norm:
            return model
        first = model.encoder.layers[0].self_attention_residual
        bare = NoNorm(norm.constructor(), d_model, first.add)
        return eqx.tree_at(lambda m: m.encoder.layers[0].self_attention_residual, model, bare)


def norms_of_sublayers(parts: Parts) -> list[Any]:
    """Returns the norms of all sublayers; None stands for one that is left out."""
    names = ("norm", "output_norm")
    return [getattr(joint, name, None) for joint in _joints(parts) for name in names]


def _parallel(parts: Parts) -> Parallel | None:
    return same("parallel", [layer.parallel for layer in parts.layers])


def _joints(parts: Parts) -> list[Any]:
    """The joints to the stream that have norms."""
    names = ("self_attention_residual", "cross_attention_residual")
    found = [getattr(layer, name, None) for layer in parts.layers for name in names]
    joints = [joint for joint in found if joint is not None]
    joints = joints[1:] if _first_lacks_norm(parts) else joints
    if not isinstance(_parallel(parts), OneNorm):
        joints += [layer.feed_forward_residual for layer in parts.layers]
    return joints


def _first_lacks_norm(parts: Parts) -> bool:
    first = parts.layers[0]
    return (
        parts.shape != "lm"
        and isinstance(first.self_attention_residual, NoNorm)
        and not isinstance(first.feed_forward_residual, NoNorm)
    )


def _short_form(table: Mapping[str, Any], x: Any) -> str:
    """The word that the tables of families have for an object."""
    for word, known in table.items():
        if known == x:
            return word
    raise ValueError(f"{x!r:.80} has no name in checkpoints.")
