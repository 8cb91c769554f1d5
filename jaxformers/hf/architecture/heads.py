"""The pooler and the classifier of an encoder."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jaxformers.heads import Classifier
from jaxformers.hf.architecture.activation import ACTIVATIONS, activation_name
from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.parts import Parts, as_dense
from jaxformers.hf.config.entries import Config
from jaxformers.hf.config.settings import Named
from jaxformers.initializers import Initializer
from jaxformers.layers import Dense

PER_TOKEN = ("ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class HeadOptions:
    """The heads of an encoder beside its output layer.

    Arguments:
        pooler: whether the encoder has BERT's pooler.
        labels: the number of classes; None for no classifier.
        pooling: the pooling of the classifier, see `Classifier`.
        transform: the activation of the dense layer before the classes; None for no such layer.
        norm: whether that layer has a norm.
        bias: whether that layer has a bias.
    """

    pooler: bool = False
    labels: int | None = None
    pooling: str | None = None
    transform: str | None = None
    norm: bool = False
    bias: bool = True

    @classmethod
    def of(cls, parts: Parts) -> "HeadOptions":
        """Returns the options of a model, read from its heads.

        Raises:
            ValueError: if a head has a kind that no checkpoint has.
        """
        if parts.shape != "encoder":
            return cls()
        pooler, head = parts.model.pooler, parts.model.classifier
        if pooler is not None and activation_name(as_dense(pooler).activation) != "tanh":
            raise ValueError("a pooler has a tanh in checkpoints, this one has another activation.")
        if head is None:
            return cls(pooler=pooler is not None)
        options = partial(cls, pooler is not None, head.out.w.shape[1], head.pooling)
        if head.transform is None:
            return options()
        transform = as_dense(head.transform)
        return options(
            transform=activation_name(transform.activation),
            norm=transform.norm is not None,
            bias=transform.b is not None,
        )

    def constructors(self, norm: NormOptions, init: Initializer) -> dict[str, Callable | None]:
        """Returns the arguments for the constructor of an encoder."""
        pooler = partial(Dense, activation=ACTIVATIONS["tanh"], init=init) if self.pooler else None
        return {"pooler": pooler, "classifier": self._classifier(norm, init)}

    def _classifier(self, norm: NormOptions, init: Initializer) -> Callable | None:
        if self.labels is None:
            return None
        transform = None
        if self.transform is not None:
            transform = partial(
                Dense,
                activation=ACTIVATIONS[self.transform],
                norm=norm.constructor() if self.norm else None,
                use_bias=self.bias,
                init=init,
            )
        return partial(
            Classifier,
            num_labels=self.labels,
            pooling=self.pooling or "first",
            transform=transform,
            init=init,
        )


def norms_of_heads(parts: Parts) -> list[Any]:
    """Returns the norms before the vocabulary and before the classes; None stands for no norm."""
    heads = (parts.model.output, getattr(parts.model, "classifier", None))
    return [getattr(getattr(head, "transform", None), "norm", None) for head in heads]


class Heads(NamedTuple):
    """The heads of an encoder, which are read from the tensors in the file.

    The tensor of a classifier's last map identifies the classifier, and its rows are the classes.
    If a classifier of sequences and one of tokens have the same tensor, `architectures` decides.

    Arguments:
        output: a tensor of the masked-LM head.
        pooler: a tensor of the pooler; "" in families without one.
        sequence: the fields of each classifier of sequences, by the tensor of its last map.
        tokens: the fields of each classifier of tokens, by that tensor.
        shared: whether files with a classifier also have the tensor `output`.
    """

    output: str
    pooler: str
    sequence: Mapping[str, Mapping[str, Any]]
    tokens: Mapping[str, Mapping[str, Any]]
    shared: bool = False

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        tensors = config.tensors
        classifiers = self._classifiers(config)
        output = tensors.has(self.output) and not (self.shared and classifiers)
        for name in () if classifiers else _CLASSIFIER:
            fields.pop(name, None)
        fields["heads.pooler"] = bool(self.pooler) and tensors.has(self.pooler)
        fields["output.present"] = output
        if classifiers:
            tensor, own = classifiers[0]
            fields |= {"heads.labels": next(iter(tensors.shape(tensor)), 0), **own}

    def _classifiers(self, config: Config) -> list[tuple[str, Mapping[str, Any]]]:
        """Returns the classifiers in the file, the most probable one first."""
        named = config.entries.get("architectures")
        named = named if isinstance(named, list) else []
        per_token = any(isinstance(name, str) and name.endswith(PER_TOKEN) for name in named)
        kinds = (self.tokens, self.sequence) if per_token else (self.sequence, self.tokens)
        return [
            (tensor, own)
            for kind in kinds
            for tensor, own in kind.items()
            if config.tensors.has(tensor)
        ]

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        names, labels = config.get("id2label"), fields["heads.labels"]
        if labels is not None and (not isinstance(names, dict) or len(names) != labels):
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
            config.pop("num_labels", None)  # the number of the former classifier


_CLASSIFIER = tuple(f"heads.{field.name}" for field in dataclasses.fields(HeadOptions))


class Pooling(NamedTuple):
    """The setting for the pooling of a classifier of sequences."""

    default: str
    names: Mapping[str, str]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        self._named.read(config, fields)

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        if fields["heads.pooling"] not in (None, "none"):
            self._named.write(fields, config)

    @property
    def _named(self) -> Named:
        return Named("classifier_pooling", "heads.pooling", self.default, self.names)
