"""The embedding of an architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jaxformers.embedding import TransformerEmbedding
from jaxformers.hf.architecture.norm import NormOptions
from jaxformers.hf.architecture.parts import Parts
from jaxformers.hf.config.entries import Config
from jaxformers.pieces import Pieces


@dataclass(frozen=True)
class EmbeddingOptions:
    """The embedding of a model.

    Arguments:
        scale: the factor on token vectors.
        norm: whether a norm follows the embedding.
        dim: the width of token vectors; None for `d_model`.
        project_tokens: whether the map to `d_model` applies to token vectors alone, and not to
            their sum with positions and types.
        token_types: the number of token types, or None.
        shared: whether source and target share a token table.
    """

    scale: float = 1.0
    norm: bool = False
    dim: int | None = None
    project_tokens: bool = False
    token_types: int | None = None
    shared: bool = False

    @classmethod
    def of(cls, parts: Parts) -> "EmbeddingOptions":
        """Returns the options of a model, read from its embedding."""
        embedding = parts.embedding
        projection, types = embedding.projection, embedding.type_embedding
        both = parts.shape == "seq2seq"
        return cls(
            scale=embedding.scale,
            norm=embedding.norm is not None,
            dim=None if projection is None else projection.w.shape[0],
            project_tokens=embedding.project_tokens,
            token_types=None if types is None else types.vocab_size,
            shared=both and parts.model.src_embedding.token_embedding is None,
        )

    def width(self, d_model: int) -> int:
        """Returns the width of the sum of token vectors and positions."""
        return d_model if self.dim is None or self.project_tokens else self.dim

    def pieces(self, norm: NormOptions) -> Pieces:
        """Returns the pieces for the constructor of a model."""
        return Pieces(
            embedding=partial(
                TransformerEmbedding,
                norm=norm.constructor() if self.norm else None,
                embedding_dim=self.dim,
                project_tokens=self.project_tokens,
                num_token_types=self.token_types,
            )
        )


class Scaled(NamedTuple):
    """A setting that scales token vectors by `sqrt(d_model)`."""

    key: str = "scale_embedding"
    default: bool = False

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        on = config.get(self.key, self.default, "flag")
        fields["embedding.scale"] = fields["d_model"] ** 0.5 if on else 1.0

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        scale = fields["embedding.scale"]
        if scale not in (1.0, fields["d_model"] ** 0.5):
            raise ValueError(f"it has no words for embedding_scale {scale}.")
        config[self.key] = scale != 1.0


class EmbeddingSize(NamedTuple):
    """The width of token vectors, which are mapped to `d_model` if it differs from that."""

    default: int
    key: str = "embedding_size"

    def read(self, config: Config, fields: dict[str, Any]) -> None:
        size = config.get(self.key, self.default, "size")
        fields["embedding.dim"] = None if size == fields["d_model"] else size

    def write(self, fields: Mapping[str, Any], config: dict[str, Any]) -> None:
        size = fields["embedding.dim"]
        config[self.key] = fields["d_model"] if size is None else size
