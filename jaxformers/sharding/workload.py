"""What a step of training must do, whatever the devices: its arrays and its operations."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jaxformers.axes import Axes, axes_of
from jaxformers.checks import check_choice, check_size
from jaxformers.layer_stack import ScannedLayers
from jaxformers.mixture_of_experts import MixtureOfExperts
from jaxformers.operations import heads_operations, map_operations
from jaxformers.sharding.activations import kept_by
from jaxformers.sharding.mesh import TENSOR
from jaxformers.sharding.rules import NamedArray, named_arrays, spec_of
from jaxformers.transformer_lm import TransformerLM

# The bytes of a number: weights, their gradients' sums and moments; token ids; what is computed.
STORED = 4
INTEGER = 4
COMPUTED = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Workload:
    """A step of training of a decoder-only model.

    Arguments:
        model: a `TransformerLM`, with shapes in place of its arrays.
        rows: of the batch, on all devices together.
        length: tokens of a row.
        dtype: the type of numbers while they are computed with, "bfloat16" or "float32".

    Example:
        >>> Workload(model, rows=4, length=32).tokens
        128
    """

    model: Any
    rows: int
    length: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_size(rows=self.rows, length=self.length)
        check_choice(tuple(COMPUTED), dtype=self.dtype)
        if not isinstance(self.model, TransformerLM) or self.model.output is None:
            raise ValueError(
                "a plan is for a decoder-only model with an output layer, such as a Llama, got "
                f"{type(self.model).__name__}. Pass its sizes to plan for a decoder of its size."
            )
        longest = self.model.embedding.max_seq_length
        if longest is not None and self.length > longest:
            raise ValueError(
                f"the model has a table of {longest} positions, got rows of {self.length} tokens. "
                "Pass shorter rows."
            )

    @property
    def width(self) -> int:
        """The bytes of a number that is computed with."""
        return COMPUTED[self.dtype]

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @cached_property
    def arrays(self) -> list[NamedArray]:
        return named_arrays(self.model, axes_of(self.model))

    @property
    def numbers(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(array.shape) for array in self.arrays)

    @property
    def scanned(self) -> bool:
        return isinstance(self.model.decoder.layers, ScannedLayers)

    @property
    def tied(self) -> bool:
        return self.model.output.tied

    @cached_property
    def layers(self) -> list[tuple[Any, int]]:
        """The layers that differ, and how many there are of each."""
        layers = self.model.decoder.layers
        if not isinstance(layers, ScannedLayers):
            return [(layer, 1) for layer in layers]
        return [(_one_of(layers.stacked), len(layers))]

    @property
    def has_experts(self) -> bool:
        return any(isinstance(layer.feed_forward, MixtureOfExperts) for layer, _ in self.layers)

    def kept(self, tensor: int) -> tuple[float, float]:
        """Returns the bytes of activations that a token has on a device for the gradient.

        The first number is that of all layers, the second that of the largest.

        Arguments:
            tensor: over how many devices heads and features are divided.
        """
        if tensor not in self._kept:
            found = [
                (number, kept_by(_divided(layer, tensor), self.dtype))
                for layer, number in self.layers
            ]
            self._kept[tensor] = sum(n * x for n, x in found), max(x for _, x in found)
        return self._kept[tensor]

    @cached_property
    def _kept(self) -> dict[int, tuple[float, float]]:
        return {}

    @cached_property
    def map_operations(self) -> int:
        """The operations of the linear maps in a forward pass."""
        return self.tokens * map_operations(self.model)

    @property
    def output_operations(self) -> int:
        """Those of them that are the output layer's, which is never computed again."""
        return 2 * self.tokens * self.model.vocab_size * self.model.embedding.table.shape[-1]

    @cached_property
    def attention_operations(self) -> int:
        """The operations of attention in a forward pass, of the pairs that queries see alone."""
        return self.rows * sum(
            number * heads_operations(layer.self_attention) * self._pairs(layer.self_attention)
            for layer, number in self.layers
        )

    def _pairs(self, attention: Any) -> int:
        """Returns the pairs of query and key of a row, under a causal mask."""
        window = min(attention.window or self.length, self.length)
        return window * (window + 1) // 2 + (self.length - window) * window

    @property
    def operations(self) -> int:
        """The operations of a step: a backward pass has twice those of the forward pass."""
        return 3 * (self.map_operations + self.attention_operations)


def _one_of(stacked: Any) -> Any:
    """Returns one of the layers whose arrays are stacked."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if hasattr(x, "shape") else x, stacked
    )


def _divided(layer: Any, tensor: int) -> Any:
    """Returns the part of a layer that a device has of it over "tensor"."""

    def part(axes: Axes | None, x: Any) -> Any:
        if axes is None:
            return x
        spec = spec_of(axes, {TENSOR: tensor} if tensor > 1 else {})
        over = (*spec, *(None,) * (len(x.shape) - len(spec)))
        shape = tuple(n // tensor if axis else n for n, axis in zip(x.shape, over, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(
        part, axes_of(layer), layer, is_leaf=lambda x: x is None or isinstance(x, Axes)
    )
