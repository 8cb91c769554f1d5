"""Texts as vectors, for search and clustering."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import ArrayLike, Float

from jaxformers.checks import check_choice, check_flag, check_size, explain_options
from jaxformers.elsewhere import TEXTS
from jaxformers.files.json_file import read_json, shorten
from jaxformers.heads import unit_length
from jaxformers.one_program import TokenRows, one_program
from jaxformers.pretrained import from_pretrained
from jaxformers.text.batches import Model, Reader, Texts, check_length, check_reader
from jaxformers.text.directory import find_directory, length_limit, read_tokenizer
from jaxformers.text.save import write_description
from jaxformers.text.sentence_transformers import Described, describe
from jaxformers.text.similarity import SIMILARITIES, compare, to_unit_length
from jaxformers.text.vectors import Vectors, embed
from jaxformers.tokenizers.tokenizer import Tokenizer
from jaxformers.transformer import Transformer

# These prompts may always be named, and are empty if the model has none of that name. A prompt of
# documents has further names.
USUAL_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


class TextEmbedder:
    """A model that gives vectors of texts, with its tokenizer.

    It is usually made by `from_pretrained`. Texts are sorted by length and read in batches of a few
    sizes, so that a new number of texts and new lengths compile nothing after `warm_up`. A text
    beyond `max_seq_length` is cut off, as sentence-transformers does.

    Arguments:
        model: an encoder, a decoder, or an encoder-decoder, whose encoder is used.
        tokenizer: makes its tokens.
        pooling: what a vector is made of: the "mean" of the hidden states, the "first", the "last",
            "max", "mean_sqrt" or "weighted_mean" (see `jaxformers.heads.pool`); several are joined.
        layers: functions or modules that are applied to the pooled vector, in this order.
        normalize: whether vectors are scaled to length 1, so that their product is the cosine.
        prompts: texts that may be put before each text, by name.
        default_prompt: the name of the prompt that is used if a call names none.
        include_prompt: whether the tokens of the prompt are pooled.
        max_seq_length: the largest number of tokens of a text, special tokens included; None is the
            model's.
        similarity: how vectors are compared: "cosine", "dot", "euclidean" or "manhattan".
        truncate_dim: the number of features that are kept, of models that were trained for it;
            None keeps all.

    Raises:
        ValueError: if an argument is not of this kind.

    Example:
        >>> import tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = tokenizers.Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer({"tokenizer.json": words.to_str().encode()})
        >>> embedder = TextEmbedder(TransformerEncoder(3, 16, 2, 1, 32, 32, key=key), tokenizer)
        >>> embedder(["a b", "b", "a b a"]).shape, embedder("a").shape
        ((3, 16), (16,))
    """

    model: Model
    tokenizer: Tokenizer
    vectors: Vectors
    prompts: dict[str, str]

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        pooling: str | Sequence[str] = "mean",
        layers: Sequence[Callable] = (),
        normalize: bool = True,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        include_prompt: bool = True,
        max_seq_length: int | None = None,
        similarity: str = "cosine",
        truncate_dim: int | None = None,
    ):
        check_reader(model, tokenizer)
        check_flag(normalize=normalize, include_prompt=include_prompt)
        check_choice(SIMILARITIES, similarity=similarity)
        if max_seq_length is not None:
            check_size(max_seq_length=max_seq_length)
        self.model, self.tokenizer = model, tokenizer
        self.vectors = Vectors(pooling, layers)
        self.prompts = dict(prompts or {})
        if not all(isinstance(x, str) for x in self.prompts.values()):
            raise ValueError(f"prompts must be texts by name, got {shorten(prompts)}.")
        if default_prompt is not None and default_prompt not in self.prompts:
            raise ValueError(
                f"default_prompt must be one of prompts, {list(self.prompts)}, got "
                f"{shorten(default_prompt)}."
            )
        self._default_prompt, self._include_prompt = default_prompt, include_prompt
        self._normalize, self._similarity = normalize, similarity
        self._max_seq_length, self._do_lower_case = max_seq_length, False
        self._width = self._measure()
        self._kept = self._check_dim(truncate_dim, self._width)

    @classmethod
    @partial(explain_options, elsewhere=TEXTS)
    def from_pretrained(
        cls,
        path_or_hub_name: str | os.PathLike,
        *,
        dtype: Any = None,
        sharding: Mesh | Sharding | Callable | None = None,
        quantized: bool = False,
        max_seq_length: int | None = None,
    ) -> "TextEmbedder":
        """Returns the model of a directory of sentence-transformers.

        A checkpoint without files of sentence-transformers gets the mean as pooling, or the last
        token if its config.json names a language model, and is not normalized, as there.

        Arguments:
            path_or_hub_name: a directory, or a name on the hub, which needs `huggingface_hub`.
            dtype, sharding, quantized: as in `jaxformers.from_pretrained`. Pooling and the layers
                after it compute in float32.
            max_seq_length: the largest number of tokens of a text; None is that of the files, or
                else the least of `model_max_length` of the tokenizer and what the model knows.

        Raises:
            ValueError: if a file is missing or damaged, or asks for what we do not have.
            ImportError: if a package is missing.
        """
        described = describe(find_directory(path_or_hub_name))
        options: dict[str, Any] = dict(dtype=dtype, sharding=sharding, quantized=quantized)
        model = from_pretrained(described.transformer, **options)
        tokenizer = read_tokenizer(described)
        layers = list(described.layers)
        normalize = layers[-1:] == [unit_length]
        embedder = cls(
            model,
            tokenizer,
            pooling=described.pooling or _usual_pooling(described.transformer),
            layers=layers[:-1] if normalize else layers,
            normalize=normalize,
            prompts=described.prompts,
            default_prompt=described.default_prompt,
            include_prompt=described.include_prompt,
            max_seq_length=length_limit(described) if max_seq_length is None else max_seq_length,
            similarity=described.similarity,
            truncate_dim=described.truncate_dim,
        )
        embedder._do_lower_case = described.do_lower_case
        return embedder

    @property
    def max_seq_length(self) -> int | None:
        """The largest number of tokens of a text, special tokens included; None if no limit."""
        return self._reader(1).limit

    @property
    def default_prompt(self) -> str | None:
        """The name of the prompt that is used if a call names none."""
        return self._default_prompt

    @property
    def dimension(self) -> int:
        """The number of features of a vector."""
        return self._kept

    @partial(explain_options, elsewhere=TEXTS)
    def __call__(
        self,
        texts: str | Sequence[str],
        batch_size: int = 32,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        progress: bool | None = None,
    ) -> Float[np.ndarray, "*n d"]:
        """Returns a vector for each text, in the order of the texts.

        Arguments:
            texts: one text, or a list of n texts, which may be empty.
            batch_size: the number of texts that are read at once, 32.
            prompt: a text that is put before each text.
            prompt_name: the name of one of `prompts` instead. "query" and "document" may always be
                named, and are empty if the model has none; "document" is also "passage" or
                "corpus". The default is the default prompt of the model, if it has one.
            normalize: whether vectors are scaled to length 1; None is as the model was trained.
            truncate_dim: the number of features that are kept; None is as the model says. Only
                `normalize=True` scales them after that.
            progress: whether to show a progress bar on standard error. None shows it for a thousand
                texts and more, on a terminal where tqdm is installed.

        Returns:
            float32, `(n, d)`, or `(d,)` for one text. A text without any token gives what the
            layers after the pooling make of zeros.

        Raises:
            ValueError: if texts are not strings, or an option is not valid.
        """
        check_size(batch_size=batch_size)
        before = self._prompt(prompt, prompt_name)
        given = Texts.of(texts, prompt=before)
        kept = self._check_dim(truncate_dim, self._kept)
        if normalize is not None:
            check_flag(normalize=normalize)
        first = 0 if self._include_prompt else self._count(before)
        reader = self._reader(batch_size)
        vectors = reader.run(given, self._compute(first), self._width, progress)
        if self._normalize and normalize is not False:
            vectors = to_unit_length(vectors)
        vectors = vectors[:, :kept]
        vectors = to_unit_length(vectors) if normalize else vectors
        return vectors if given.is_list else vectors[0]

    def similarity(self, a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "..."]:
        """Returns the similarity of each vector of `a` to each of `b`, as the model says.

        It is the cosine unless the model was trained for another one.

        Arguments:
            a: `(n, d)` or `(d,)`.
            b: `(m, d)` or `(d,)`.

        Returns:
            float32, `(n, m)`, without the axis of an argument that is one vector. Distances are
            negative, so that the most similar is the largest in any case.

        Raises:
            ValueError: if the arrays are no vectors of one width.
        """
        return compare(a, b, self._similarity)

    def warm_up(self, max_length: int | None = None, batch_size: int = 32) -> float:
        """Compiles ahead, and returns how many seconds that took.

        After it no call compiles whose `batch_size` is the same and whose texts have at most
        `max_length` tokens.

        Arguments:
            max_length: the largest number of tokens of a text; None is `max_seq_length`.
            batch_size: as in a call.
        """
        check_size(batch_size=batch_size)
        length = check_length(max_length, self.max_seq_length)
        return self._reader(batch_size).warm_up(self._compute(0), length)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes a directory that sentence-transformers and `from_pretrained` read.

        Arguments:
            path: directory, made if it is not there.

        Raises:
            ValueError: if the model or a layer after the pooling has no form in such files.
            ImportError: if the `safetensors` package is missing.
        """
        self.model.save_pretrained(path)
        self.tokenizer.save(path)
        normalizing = (unit_length,) if self._normalize else ()
        described = Described(
            Path(path),
            self.vectors.pooling,
            self._include_prompt,
            (*self.vectors.layers, *normalizing),
            self.max_seq_length,
            self._do_lower_case,
            self.prompts,
            self._default_prompt,
            self._similarity,
            self._kept if self._kept < self._width else None,
        )
        model = self.model
        source = model.src_embedding if isinstance(model, Transformer) else model.embedding
        write_description(described, source.d_model)

    def __repr__(self) -> str:
        return (
            f"TextEmbedder({type(self.model).__name__}, dimension={self.dimension}, "
            f"pooling={self.vectors.pooling}, max_seq_length={self.max_seq_length}, "
            f"prompts={list(self.prompts)})"
        )

    def _reader(self, batch_size: int) -> Reader:
        return Reader(self.model, self.tokenizer, self._max_seq_length, batch_size)

    def _compute(self, first: int) -> Callable[[TokenRows], jax.Array]:
        """Returns a function from rows to vectors; the first position that counts is `first`."""
        parts = self.model, self.vectors, jax.device_put(np.int32(first))
        return lambda rows: one_program(embed, parts, rows, per_token=False, keep_shapes=True)

    def _measure(self) -> int:
        """Returns the width of the vectors, which checks that the parts fit together."""
        parts = self.model, self.vectors, jax.device_put(np.int32(0))
        rows = self._reader(1).rows([([0], [0])])
        return int(eqx.filter_eval_shape(embed, parts, rows).shape[-1])

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None and name is not None:
            raise ValueError("prompt and prompt_name say the same, got both. Pass one of them.")
        if prompt is not None:
            if not isinstance(prompt, str):
                raise ValueError(f"prompt must be a text, got {shorten(prompt)}.")
            return prompt
        name = self._default_prompt if name is None else name
        if name is None:
            return ""
        for also in (name, *(USUAL_PROMPTS.get(name, ()) if isinstance(name, str) else ())):
            if isinstance(also, str) and also in self.prompts:
                return self.prompts[also]
        if not isinstance(name, str) or name not in USUAL_PROMPTS:
            raise ValueError(
                f"prompt_name must be one of {', '.join({**self.prompts, **USUAL_PROMPTS})}, got "
                f"{shorten(name)}. Pass the text itself as prompt=."
            )
        return ""

    def _count(self, prompt: str) -> int:
        """Returns the number of tokens that a prompt adds at the beginning of a text."""
        if not prompt:
            return 0
        [(ids, _)] = self.tokenizer.encode_rows(prompt, max_length=self.max_seq_length)
        added = self.tokenizer.backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        return len(ids) - (ids[-1:] != [] and ids[-1] in special)

    def _check_dim(self, dim: int | None, most: int) -> int:
        if dim is None:
            return most
        check_size(truncate_dim=dim)
        if dim > self._width:
            raise ValueError(f"truncate_dim must be at most {self._width}, got {dim}.")
        return dim


def _usual_pooling(directory: Path) -> str:
    """Returns the pooling of a checkpoint without a file about it, as sentence-transformers."""
    config = read_json(directory / "config.json")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else ""
    is_causal = isinstance(name, str) and name.endswith("ForCausalLM")
    return "last" if is_causal and config.get("is_causal", True) else "mean"
