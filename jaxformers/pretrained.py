"""Checkpoints of any shape."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, Sharding
from jaxtyping import PRNGKeyArray

from jaxformers.adapters.checkpoint import load_checkpoint
from jaxformers.hf.fresh_head import FreshHead
from jaxformers.transformer import Transformer
from jaxformers.transformer_encoder import TransformerEncoder
from jaxformers.transformer_lm import TransformerLM


def from_pretrained(
    path_or_hub_name: str | os.PathLike,
    *,
    dtype: Any = None,
    sharding: Mesh | Sharding | Callable | None = None,
    quantized: bool = False,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    key: PRNGKeyArray | None = None,
) -> TransformerLM | Transformer | TransformerEncoder:
    """Returns the model of a Hugging Face checkpoint, in our class for its shape.

    Tensors are read from safetensors one at a time and put where they belong, so that loading
    needs the memory of the model and of one tensor. Where there are no safetensors, they are read
    from pytorch_model.bin in the same way: without PyTorch, and without running any code that this
    pickle may hold. Of generation_config.json `generate` uses the special tokens, and the tokens to
    suppress, where it is told no others; beams, temperatures and penalties are yours to choose, and
    a warning names those that a call neglects.

    The directory of an adapter of PEFT gives the model that it was made for, with the adapter on
    it, see `jaxformers.load_adapter`.

    A checkpoint without an output layer gives a model that has none, `output` is None: its hidden
    states can be had, by `model.forward(tokens)` or, of an encoder, `model(tokens)`.

    A GGUF file of llama.cpp is read as the checkpoint that it was made of. Its blocks of quantized
    numbers are unpacked.

    Arguments:
        path_or_hub_name: a directory with config.json and model.safetensors or pytorch_model.bin
            (or shards and their index), or a name on the hub such as "openai-community/gpt2",
            which needs the `huggingface_hub` package; or a GGUF file, or a directory with one.
        dtype: type of the weights, such as `jnp.bfloat16`; None is that of the file, and float32
            for blocks of GGUF.
        sharding: where the arrays go: a mesh of `jaxformers.sharding.make_mesh`, on which they lie
            as `layout` says, and of a safetensors file each host reads only the parts of its
            devices; a `jax.sharding.Sharding` for all; or a function
            `(path, jax.ShapeDtypeStruct) -> Sharding` with paths such as
            "decoder.layers.0.self_attention.wq"; None is the default device.
        quantized: whether weights that the file has as integers of eight or four bits stay so, as
            `Quantized`, where it has their layout. Such a weight is placed by paths such as
            "...wq.integers", "...wq.scale" and "...wq.offset". False, the default, unpacks all.
        num_labels: the number of classes of a classifier of sequences, for an encoder. Unless the
            checkpoint has one of that size it is fresh, as in transformers: another head is left
            out, and a pooler or a dense layer that the classifier needs is kept where it is there.
            None leaves the heads as they are.
        id2label: the names of the classes, `{0: "bad", 1: "good"}` or a list, which
            `save_pretrained` writes; `num_labels` may be left out then.
        key: PRNG key of the fresh weights; None is `jax.random.key(0)`.

    Raises:
        ValueError: if there is no such checkpoint, a file is damaged, config.json asks for what we
            do not have, or the tensors are not those it calls for.
        ImportError: if the `safetensors` package is missing, or for a GGUF file `gguf`.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> options = {"learnable_pos": True, "tie_embeddings": True, "embedding_scale": 1.0}
        >>> model = TransformerLM(65, 16, 2, 1, 32, 32, 0.0, **options, key=key)  # as GPT-2 is
        >>> model.save_pretrained(directory)
        >>> bool((from_pretrained(directory)(tokens) == model(tokens)).all())
        True
    """
    classes = {"lm": TransformerLM, "seq2seq": Transformer, "encoder": TransformerEncoder}
    head = FreshHead.of(num_labels, id2label, key)
    return load_checkpoint(path_or_hub_name, classes, dtype, sharding, head, quantized)
