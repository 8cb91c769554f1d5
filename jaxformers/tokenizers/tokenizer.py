"""Text to token ids and back, as defined by the `tokenizer.json` of a checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxformers.checks import check_flag, check_size
from jaxformers.files.found import describe_directory
from jaxformers.files.gguf_file import find_gguf
from jaxformers.files.hub import locate
from jaxformers.files.json_file import shorten
from jaxformers.tokenizers.chat import choose_template, continue_chat, render_chat
from jaxformers.tokenizers.files import (
    TOKENIZER_FILES,
    check_kind,
    guarded,
    read_files,
    read_parts,
)
from jaxformers.tokenizers.gguf import read_gguf_tokenizer
from jaxformers.tokenizers.rows import check_pairs, check_texts, stack, truncate


def load_tokenizer(path_or_hub_name: str | os.PathLike) -> "Tokenizer":
    """Returns the tokenizer of a Hugging Face checkpoint.

    Arguments:
        path_or_hub_name: a directory with `tokenizer.json`, that file itself, or a name on the hub;
            or a GGUF file, or a directory with one.

    Raises:
        ValueError: if there is no `tokenizer.json`, or a file is broken.
        ImportError: if the `tokenizers` package is missing, or for a GGUF file `gguf`.

    Example:
        >>> import tempfile, tokenizers
        >>> from tokenizers.models import WordLevel
        >>> directory = tempfile.mkdtemp()
        >>> tokenizers.Tokenizer(WordLevel({"yes": 0, "no": 1})).save(f"{directory}/tokenizer.json")
        >>> tokens, padding_mask = load_tokenizer(directory).encode("no")
        >>> tokens
        Array([1], dtype=int32)
    """
    path = Path(path_or_hub_name).expanduser()
    gguf = find_gguf(path) if path.is_file() else None
    if gguf is not None:
        return Tokenizer(read_gguf_tokenizer(gguf))
    if path.is_file():
        check_kind(path)
        return Tokenizer(read_files(path.parent) | {"tokenizer.json": path.read_bytes()})
    directory = locate(path_or_hub_name, TOKENIZER_FILES)
    files = read_files(directory)
    gguf = None if "tokenizer.json" in files else find_gguf(directory)
    if gguf is not None:
        return Tokenizer(read_gguf_tokenizer(gguf))
    if not files:
        found = describe_directory(directory) or "Is this the directory of the tokenizer?"
        raise ValueError(f"there is no tokenizer.json in {directory}. {found}")
    return Tokenizer(files)


class Tokenizer:
    """A tokenizer: text to token ids and back, with special tokens and chat templates.

    It is usually made by `load_tokenizer`. The lengths in `tokenizer.json` are not used: texts are
    truncated only by `max_length=`, and rows are padded to the longest one.

    Arguments:
        files: the contents of the checkpoint's tokenizer files by name, at least `tokenizer.json`.

    Raises:
        ValueError: if a file is missing or broken, or holds a value of the wrong type.
        ImportError: if the `tokenizers` package is missing.

    Example:
        >>> import tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = tokenizers.Tokenizer(WordLevel({"no": 0, "yes": 1, "but": 2}))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer({"tokenizer.json": words.to_str().encode()})
        >>> tokens, padding_mask = tokenizer.encode(["yes", "no but yes"])
        >>> tokens
        Array([[1, 0, 0],
               [0, 2, 1]], dtype=int32)
        >>> padding_mask
        Array([[ True, False, False],
               [ True,  True,  True]], dtype=bool)
        >>> tokenizer.decode(tokens[1])
        'no but yes'
    """

    backend: Any  # the tokenizers.Tokenizer, for functions that are not offered here
    special_tokens: dict[str, str]  # by role, such as {"bos_token": "<s>"}
    chat_templates: dict[str, str]  # by name; the usual one is "default"
    vocab_size: int  # the highest id + 1, the smallest vocabulary of a model
    padding_side: str  # "right" or "left"

    def __init__(self, files: Mapping[str, bytes]):
        self._files = dict(files)
        parts = read_parts(files)
        self.backend = parts.backend
        self.special_tokens = parts.special_tokens
        self.chat_templates = parts.chat_templates
        self.vocab_size = parts.vocab_size
        self.padding_side = parts.padding_side
        self._truncation_side = parts.truncation_side
        self._clean_up = parts.clean_up

    @property
    def start_token(self) -> int | None:
        """The id before a text, of `bos_token` or else of `cls_token`; None if there is none."""
        return self._special_id("bos_token", "cls_token")

    @property
    def end_token(self) -> int | None:
        """The id after a text, of `eos_token` or else of `sep_token`; None if there is none."""
        return self._special_id("eos_token", "sep_token")

    @property
    def pad_token(self) -> int | None:
        """The id of padding, or None."""
        return self._special_id("pad_token")

    @property
    def unknown_token(self) -> int | None:
        """The id of text outside of the vocabulary, or None."""
        return self._special_id("unk_token")

    @property
    def mask_token(self) -> int | None:
        """The id that replaces a token for a masked language model, or None."""
        return self._special_id("mask_token")

    def encode(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
    ) -> tuple[Int[Array, "*b t"], Bool[Array, "*b t"]]:
        """Returns the ids of a text or of several texts, and a mask of real tokens.

        Rows are padded to the longest one. The id of padding is `pad_token`, or else `end_token`,
        or else 0. Use the mask to recognize it.

        Arguments:
            texts: one text, or a list of b texts.
            pairs: a second text for each, for models that compare two texts.
            max_length: the largest number of tokens in a row, special tokens included. The end is
                cut off, of two texts first that of the longer one. None, the default, cuts nothing.
            add_special_tokens: whether to add the tokens that the model expects around a text.
                Pass False after `apply_chat_template`, which writes them.
            padding_side: "right" or "left". The default is the checkpoint's, or else "right".

        Returns:
            `(tokens, padding_mask)`, int32 and boolean (True where a token is real), of shape
            `(t,)` for one text and `(b, t)` for a list.

        Raises:
            ValueError: if texts are not strings, pairs do not fit them, or an option is not valid.
        """
        rows = self.encode_rows(
            texts, pairs, max_length=max_length, add_special_tokens=add_special_tokens
        )
        fill = next(i for i in (self.pad_token, self.end_token, 0) if i is not None)
        side = self.padding_side if padding_side is None else padding_side
        tokens = stack([ids for ids, _ in rows], fill, side)
        real = stack([[1] * len(ids) for ids, _ in rows], 0, side) == 1
        if isinstance(texts, str):
            tokens, real = tokens[0], real[0]
        return jax.device_put(tokens), jax.device_put(real)

    def encode_rows(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[tuple[list[int], list[int]]]:
        """Returns ids and token types of each text or pair, truncated but not padded.

        Arguments and errors are those of `encode`.
        """
        check_flag(add_special_tokens=add_special_tokens)
        inputs: list[Any] = check_texts("texts", texts)
        if pairs is not None:
            seconds = check_texts("pairs", pairs)
            check_pairs(texts, pairs, inputs, seconds)
            inputs = list(zip(inputs, seconds, strict=True))
        encode = self.backend.encode_batch
        encodings = guarded(encode, inputs, add_special_tokens=add_special_tokens)
        if max_length is None:
            return [(encoding.ids, encoding.type_ids) for encoding in encodings]
        check_size(max_length=max_length)
        return [truncate(encoding, max_length, self._truncation_side) for encoding in encodings]

    def token_types(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
    ) -> Int[Array, "*b t"]:
        """Returns for each token of `encode` 1 in the second text of a pair and 0 elsewhere (BERT).

        Arguments and errors are those of `encode`, and the shape is that of its tokens.
        """
        rows = self.encode_rows(
            texts, pairs, max_length=max_length, add_special_tokens=add_special_tokens
        )
        side = self.padding_side if padding_side is None else padding_side
        types = stack([row for _, row in rows], 0, side)
        return jax.device_put(types[0] if isinstance(texts, str) else types)

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str | list[str]:
        """Returns the text of token ids, or a list of texts for a batch.

        Ids without a token, such as the padding of a model's vocabulary, decode to nothing.

        Arguments:
            tokens: an array or a list of shape `(t,)` or `(b, t)`. The rows of a list may differ
                in length.
            skip_special_tokens: whether to leave out special tokens and padding, True by default.

        Raises:
            ValueError: if the tokens are not integers from 0 to 2^31 - 1.
        """
        check_flag(skip_special_tokens=skip_special_tokens)
        if hasattr(tokens, "shape"):
            tokens = np.asarray(tokens)
            is_batch = tokens.ndim == 2
        elif isinstance(tokens, list | tuple):
            is_batch = len(tokens) > 0 and np.ndim(tokens[0]) > 0
        else:
            raise ValueError(
                "tokens must be an array or a list of ids, of shape (t,) or (batch, t), "
                f"got {shorten(tokens)}. A single id is written [id]."
            )
        if is_batch:
            return [self._decode_row(row, skip_special_tokens) for row in tokens]
        return self._decode_row(tokens, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as text in the form that the model was trained on.

        Encode it with `add_special_tokens=False`, since the template writes special tokens itself.

        Arguments:
            messages: dicts such as `{"role": "user", "content": "Hello"}`, in order.
            add_generation_prompt: whether to end with the opening of the model's answer. The
                default is True, or False with `continue_final_message=True`.
            continue_final_message: whether to end within the final message, so that the model
                continues it; False by default.
            template: the name of one of `chat_templates`, or the text of another template. The
                default is "default", or "tool_use" for `tools=` if there is one.
            variables: other variables of the template (`tools=`, `documents=`, `enable_thinking=`,
                ...), plain data. A name that no template of the tokenizer reads is an error.

        Raises:
            ValueError: if there is no such template or variable, the template refuses the messages
                or is broken, or the final message has no text that can be continued.
            ImportError: if the `jinja2` package is missing.
        """
        check_flag(continue_final_message=continue_final_message)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        check_flag(add_generation_prompt=add_generation_prompt)
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt opens a new answer and continue_final_message goes on with "
                "the last one, got both. Pass one of them."
            )
        text = choose_template(self.chat_templates, template, variables)
        known = {"tools": None, "documents": None} | self.special_tokens | variables
        known["add_generation_prompt"] = add_generation_prompt
        render = continue_chat if continue_final_message else render_chat
        return render(text, messages, known)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files from which this tokenizer was made, unchanged.

        Raises:
            ValueError: if the directory holds tokenizer files that would mix with these.
        """
        directory = Path(directory)
        others = sorted(read_files(directory).keys() - self._files.keys())
        if others:
            raise ValueError(
                f"{directory} holds {', '.join(others)} of another tokenizer, which would change "
                "this one. Remove them, or save elsewhere."
            )
        for name, content in self._files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"

    def _special_id(self, *names: str) -> int | None:
        """Returns the id of the first of these special tokens that the tokenizer has."""
        there = [self.special_tokens[name] for name in names if name in self.special_tokens]
        return self.backend.token_to_id(there[0]) if there else None

    def _decode_row(self, row: Any, skip_special_tokens: bool) -> str:
        ids = np.asarray(row)
        if ids.ndim != 1 or ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                "tokens must be integer ids of shape (t,) or (batch, t), got a row of dtype "
                f"{ids.dtype} and shape {ids.shape}."
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"tokens must be ids of this tokenizer, from 0 to {self.vocab_size - 1}, or of the "
                f"padding of its model's vocabulary, got {wrong}. Leave out other numbers, such as "
                "-100 for a target that does not count."
            )
        # An id that the tokenizer does not have decodes to nothing.
        text = guarded(self.backend.decode, ids.astype(int).tolist(), skip_special_tokens)
        for before, after in self._clean_up:
            text = text.replace(before, after)
        return text


def check_tokenizer(tokenizer: Any) -> None:
    """Raises `ValueError` unless this is a `Tokenizer`."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"tokenizer must be a Tokenizer, got {shorten(tokenizer)}. Pass "
            "load_tokenizer(directory)."
        )
