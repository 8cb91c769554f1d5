"""The modules of a model, and values that may differ between layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxformers.attention import MultiHeadAttention
from jaxformers.layers import Dense


class Parts(NamedTuple):
    """A model with its embedding and its stacks.

    Arguments:
        shape: "lm", "seq2seq" or "encoder".
        model: the model.
        embedding: its embedding; in an encoder-decoder, that of the decoder.
        stacks: its encoder, its decoder, or both in this order.
    """

    shape: str
    model: Any
    embedding: Any
    stacks: list[Any]

    @classmethod
    def of(cls, model: Any) -> "Parts":
        """Returns the parts of a model.

        Raises:
            ValueError: if a stack has no layers.
        """
        both, decoder = hasattr(model, "tgt_embedding"), hasattr(model, "decoder")
        shape = "seq2seq" if both else "lm" if decoder else "encoder"
        embedding = model.tgt_embedding if both else model.embedding
        names = {"seq2seq": ("encoder", "decoder"), "lm": ("decoder",), "encoder": ("encoder",)}
        stacks = [getattr(model, name) for name in names[shape]]
        if not all(stack.layers for stack in stacks):
            raise ValueError("a stack without layers has no name in checkpoints.")
        return cls(shape, model, embedding, stacks)

    @property
    def layers(self) -> list[Any]:
        """The layers of all stacks."""
        return [layer for stack in self.stacks for layer in stack.layers]

    @property
    def self_attentions(self) -> list[MultiHeadAttention]:
        """The self-attention of each layer."""
        return [layer.self_attention for layer in self.layers]

    @property
    def attentions(self) -> list[MultiHeadAttention]:
        """All attentions: the self-attentions and the cross-attentions."""
        names = ("self_attention", "cross_attention")
        found = [getattr(layer, name, None) for layer in self.layers for name in names]
        return [attention for attention in found if attention is not None]


def same(what: str, values: Sequence[Any]) -> Any:
    """Returns the one value that all layers share.

    Raises:
        ValueError: if the values differ.
    """
    if any(value != values[0] for value in values):
        raise ValueError(f"layers differ in their {what}: {sorted(set(map(str, values)))}.")
    return values[0]


def collapse(value: Any) -> Any:
    """Returns a single value if a tuple has the same value for each layer, else the tuple."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def of_layer(value: Any, i: int) -> Any:
    """Returns the value for layer i; a tuple has one value for each layer."""
    return value[i] if isinstance(value, tuple) else value


def as_dense(module: Any) -> Dense:
    """Returns a dense layer, and raises `ValueError` for any other module."""
    if not isinstance(module, Dense):
        raise ValueError(f"the module {module!r} has no name in checkpoints.")
    return module
