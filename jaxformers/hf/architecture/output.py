"""The output layer of an architecture, which returns logits over the vocabulary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jaxformers.hf.architecture.activation import ACTIVATIONS, activation_name
from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.parts import Parts, as_dense
from jaxformers.hf.config.entries import Config
from jaxformers.initializers import Initializer
from jaxformers.layers import Dense
from jaxformers.output import OutputLayer
from jaxformers.pieces import Pieces


@dataclass(frozen=True)
class OutputOptions:
    """The output layer of a model.

    Arguments:
        present: whether the model has an output layer.
        tied: whether the output layer shares the token table.
        bias: whether the logits have a bias.
        scale: the factor on the logits.
        softcap: the bound of the logits, or None.
        transform: the layer before the output layer: None, "linear", or the activation of a dense
            layer with a norm.
        transform_bias: whether that layer has a bias.
    """

    present: bool = True
    tied: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    transform: str | None = None
    transform_bias: bool = True

    @classmethod
    def of(cls, parts: Parts) -> "OutputOptions":
        """Returns the options of a model, read from its output layer.

        Raises:
            ValueError: if the layer before it has a kind that no checkpoint has.
        """
        output = parts.model.output
        if output is None:
            return cls(present=False)
        options = partial(
            cls,
            tied=output.tied,
            bias=output.b is not None,
            scale=output.scale,
            softcap=output.softcap,
        )
        if output.transform is None:
            return options()
        transform = as_dense(output.transform)
        plain = transform.activation is None and transform.norm is None
        if not plain and transform.norm is None:
            raise ValueError("an activation before the vocabulary has a norm in checkpoints.")
        name = "linear" if plain else activation_name(transform.activation)
        return options(transform=name, transform_bias=transform.b is not None)

    def completed(self) -> "OutputOptions":
        """Returns the options; without an output layer they are the defaults."""
        return self if self.present else OutputOptions(present=False)

    def pieces(self, norm: NormOptions, init: Initializer) -> Pieces:
        """Returns the pieces for the constructor of a model."""
        if not self.present:
            return Pieces(output=None)
        transform = self._transform(norm, init)
        output = partial(OutputLayer, scale=self.scale, softcap=self.softcap, transform=transform)
        return Pieces(use_logits_bias=self.bias, output=output)

    def _transform(self, norm: NormOptions, init: Initializer) -> Callable | None:
        if self.transform is None:
            return None
        dense = partial(Dense, use_bias=self.transform_bias, init=init)
        if self.transform == "linear":
            return dense
        return partial(dense, activation=ACTIVATIONS[self.transform], norm=norm.constructor())


class Tied(NamedTuple):
    """The setting for an output layer that shares the token table, which the tensors decide.

    A file that has one tensor for both holds a tied model. If config.json says that the two are
    not tied, a tensor is missing, except in families where config.json does not count (`by_file`).
    A file with two tensors that differ holds a model that is not tied, even if config.json says
    that it is.

    A file of a bare model that lacks what the output layer needs holds a model without one. A file
    is bare if its `architectures` names the class without a head, or if its tensors lack the prefix
    that they have in files of whole models. If config.json says tied, nothing is missing.

    The written entry agrees with the model, because other readers rely on it: transformers 4 drops
    the tensor of the output layer if config.json says that it is tied.

    Arguments:
        default: the value if the file does not have the key.
        head: the tensor of the output layer.
        table: the tensor of the token table.
        key: the key in the file.
        by_file: whether only the tensors count, so that a bare model has no output layer.
        never: whether each written file has a tensor for the output layer.
    """

    default: bool
    head: str = "lm_head.weight"
    table: str = "model.embed_tokens.weight"
    key: str = "tie_word_embeddings"
    by_file: bool = False
    never: bool = False

    @property
    def anew(self) -> bool:
        """Whether each save replaces the entry, even one that the original file has."""
        return True

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        says = config.get(self.key, self.default, "flag")
        lacking = not says or self.by_file or fields.get("output.bias", False)
        if fields["shape"] != "encoder" and lacking and not config.tensors.has(self.head):
            fields["output.present"] = not config.is_bare
        fields["output.tied"] = (says or self.by_file) and config.tensors.merge(
            self.head, self.table
        )

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        if fields["output.present"]:
            config[self.key] = fields["output.tied"] and not self.never
        elif fields["shape"] != "encoder" and not self.by_file:
            config[self.key] = False


class OutputBias(NamedTuple):
    """The two names that the bias of a masked-LM head may have.

    If a file has both and they differ, transformers uses the bias of the map itself, `layer`. If
    the map shares the token table, transformers writes only `alone`.
    """

    alone: str
    layer: str

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        kept = self.alone if fields["output.tied"] else self.layer
        config.tensors.choose((self.layer, self.alone), kept)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        pass  # the names of the tensors are enough
