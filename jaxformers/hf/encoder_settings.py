"""Settings of encoders: what stands on them, and what some do with their embeddings and layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxformers.hf.architecture import Architecture
from jaxformers.hf.settings import Config, Named

OUTPUT_FIELDS = ("tied", "logits_bias", "transform", "transform_bias")
CLASSIFIER_FIELDS = ("classifier", "classifier_transform", "classifier_norm", "classifier_bias")
PER_TOKEN = ("ForTokenClassification", "ForQuestionAnswering")


class Heads(NamedTuple):
    """What stands on an encoder, told from the tensors that are there.

    A classifier is known by the tensor of its last map, whose rows are the classes. Where one of
    sequences and one of tokens have the same, `architectures` decides.

    Arguments:
        output: a tensor of the masked-LM head.
        pooler: one of the pooler; "" is none in this family.
        sequence: the fields of each classifier of sequences, by that tensor.
        tokens: the same for classifiers of tokens.
        shared: whether classifiers have the tensor `output` as well.
    """

    output: str
    pooler: str
    sequence: Mapping[str, Mapping[str, Any]]
    tokens: Mapping[str, Mapping[str, Any]]
    shared: bool = False

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        tensors = config.tensors
        classifiers = self._classifiers(config)
        fields["pooler"] = bool(self.pooler) and tensors.has(self.pooler)
        fields["output"] = tensors.has(self.output) and not (self.shared and classifiers)
        unused = () if fields["output"] else OUTPUT_FIELDS
        for name in (*unused, *(() if classifiers else CLASSIFIER_FIELDS)):
            fields.pop(name, None)
        if classifiers:
            tensor, own = classifiers[0]
            fields |= {"labels": next(iter(tensors.shape(tensor)), 0), **own}

    def _classifiers(self, config: Config) -> list[tuple[str, Mapping[str, Any]]]:
        """Those that are there, the likeliest first."""
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

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        names = config.get("id2label")
        if a.labels is not None and (not isinstance(names, dict) or len(names) != a.labels):
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(a.labels)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(a.labels)}
            config.pop("num_labels", None)  # that of others


class OutputBias(NamedTuple):
    """Under which of two names the bias of the masked-LM head stands.

    Where both are in the file and differ, transformers uses that of `layer`, the map itself; where
    its weight is the token table's, it writes the other one alone.
    """

    alone: str
    layer: str

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        config.tensors.choose(
            (self.layer, self.alone), self.alone if fields["tied"] else self.layer
        )

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        pass  # the tensors' names say it


class AfterPadding(NamedTuple):
    """Learned positions in a table that begins with a row for each id up to that of padding.

    RoBERTa counts positions from that id on, so that a table of 514 rows is for 512 tokens.
    """

    pad: int = 1
    rows: int = 512
    key: str | None = "pad_token_id"  # None: it is `pad`, whatever the file says

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        pad = self.pad if self.key is None else config.get(self.key, self.pad, "count")
        rows = config.get("max_position_embeddings", self.rows, "size")
        if rows <= pad + 1:
            config.refuse("max_position_embeddings", f"with pad_token_id {pad} no token has room.")
        fields |= {"position_offset": pad + 1, "max_seq_length": rows - pad - 1}

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        # Where it has no words for the positions, the usual ones are read back: that tells.
        pad = a.position_offset - 1 if a.position_offset > 0 else self.pad
        config[self.key or "pad_token_id"] = pad
        config["max_position_embeddings"] = pad + 1 + (a.max_seq_length or self.rows)


class EmbeddingSize(NamedTuple):
    """The width of token vectors, which are mapped to the stack's only if it is another."""

    default: int
    key: str = "embedding_size"

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        size = config.get(self.key, self.default, "size")
        fields["embedding_dim"] = None if size == fields["d_model"] else size

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        config[self.key] = a.d_model if a.embedding_dim is None else a.embedding_dim


class Pooling(NamedTuple):
    """How a classifier of sequences gathers the tokens' states."""

    default: str
    names: Mapping[str, str]

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        self._named.read(config, fields)

    def write(self, a: Architecture, config: dict[str, Any]) -> None:
        if a.classifier not in (None, "none"):
            self._named.write(a, config)

    @property
    def _named(self) -> Named:
        return Named("classifier_pooling", "classifier", self.default, self.names)
