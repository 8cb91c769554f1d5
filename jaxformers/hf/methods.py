"""The methods by which the models read and write checkpoints of Hugging Face."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, Sharding
from jaxtyping import PRNGKeyArray

from jaxformers.adapters.checkpoint import load_checkpoint
from jaxformers.hf.fresh_head import FreshHead
from jaxformers.hf.save import save


def loads(shape: str) -> Any:
    """Returns the class method `from_pretrained` of a model.

    Arguments:
        shape: of its families, "lm" or "seq2seq".
    """

    def from_pretrained(
        cls: type,
        path_or_hub_name: str | os.PathLike,
        *,
        dtype: Any = None,
        sharding: Mesh | Sharding | Callable | None = None,
        quantized: bool = False,
    ) -> Any:
        """Returns the model of a Hugging Face checkpoint; see `jaxformers.from_pretrained`.

        Raises:
            ValueError: if the checkpoint holds a model of another shape; and as there.
        """
        return load_checkpoint(path_or_hub_name, {shape: cls}, dtype, sharding, None, quantized)

    return classmethod(from_pretrained)


def loads_encoder() -> Any:
    """Returns the class method `from_pretrained` of an encoder, which may get a classifier."""

    def from_pretrained(
        cls: type,
        path_or_hub_name: str | os.PathLike,
        *,
        dtype: Any = None,
        sharding: Mesh | Sharding | Callable | None = None,
        quantized: bool = False,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """Returns the model of a Hugging Face checkpoint; see `jaxformers.from_pretrained`.

        Raises:
            ValueError: if the checkpoint holds a model of another shape; and as there.
        """
        head = FreshHead.of(num_labels, id2label, key)
        return load_checkpoint(path_or_hub_name, {"encoder": cls}, dtype, sharding, head, quantized)

    return classmethod(from_pretrained)


def save_pretrained(
    self: Any, path: str | os.PathLike, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes the model as a checkpoint that transformers loads.

    The directory gets config.json, the weights as safetensors, generation_config.json if the model
    generates, and the tokenizer's files if the model was loaded from a checkpoint that has them. A
    model that was built here gets the format of the family whose options it has.

    Weights that are objects, such as `LowRank`, are written as the dense weights that they are.

    Arguments:
        path: directory, made if it is not there.
        max_shard_bytes: the most bytes of weights in one file.

    Raises:
        ValueError: if the model has a part that no family of transformers has, or its arrays are of
            different types.
        ImportError: if the `safetensors` package is missing.
    """
    save(self, path, max_shard_bytes)
