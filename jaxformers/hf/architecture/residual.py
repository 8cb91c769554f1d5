"""The residual stream of an architecture: norm placement, parallel layers, residual scale."""

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
    """The joints of sublayers to the residual stream.

    Arguments:
        placement: the placement of norms, as `norm_placement` in `Pieces`.
        first_attention_norm: whether the first attention of an encoder has a norm; ModernBERT has
            none there.
        final_norm: whether each stack ends with a norm.
        parallel: the short form of parallel layers, as in `Pieces`, or None.
        scale: the factor on the output of a sublayer.
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
            ValueError: if layers differ, or they have joints that no checkpoint has.
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
        """Returns the model without a norm of the first attention, if it must have none."""
        if self.first_attention_norm:
            return model
        first = model.encoder.layers[0].self_attention_residual
        bare = NoNorm(norm.constructor(), d_model, first.add)
        return eqx.tree_at(lambda m: m.encoder.layers[0].self_attention_residual, model, bare)


def norms_of_sublayers(parts: Parts) -> list[Any]:
    """Returns the norms of all sublayers; None stands for an absent norm."""
    names = ("norm", "output_norm")
    return [getattr(joint, name, None) for joint in _joints(parts) for name in names]


def _parallel(parts: Parts) -> Parallel | None:
    return same("parallel", [layer.parallel for layer in parts.layers])


def _joints(parts: Parts) -> list[Any]:
    """Returns the joints to the residual stream that have norms."""
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
    """Returns the short form of an object, which the tables of families use."""
    for word, known in table.items():
        if known == x:
            return word
    raise ValueError(f"{x!r:.80} has no name in checkpoints.")
