"""Text to token ids and back, as the `tokenizer.json` of a checkpoint says."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxformers.checks import check_flag, check_size
from jaxformers.files.found import describe_directory
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


def load_tokenizer(path_or_hub_name: str | os.PathLike) -> "Tokenizer":
    """The tokenizer of a Hugging Face checkpoint.

    Arguments:
        path_or_hub_name: a directory with `tokenizer.json`, that file itself, or a name on the hub.

    Raises:
        ValueError: if there is no `tokenizer.json`, or a file is broken.
        ImportError: if the `tokenizers` package is missing.

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
    if path.is_file():
        check_kind(path)
        return Tokenizer(read_files(path.parent) | {"tokenizer.json": path.read_bytes()})
    directory = locate(path_or_hub_name, TOKENIZER_FILES)
    files = read_files(directory)
    if not files:
        found = describe_directory(directory) or "Is this the directory of the tokenizer?"
        raise ValueError(f"there is no tokenizer.json in {directory}. {found}")
    return Tokenizer(files)


class Tokenizer:
    """Text to token ids and back, with the special tokens and chat templates of a checkpoint.

    Usually made by `load_tokenizer`. Lengths in `tokenizer.json` do not count: nothing is cut
    unless a call says `max_length=`, and rows are padded to the longest.

    Arguments:
        files: contents of the checkpoint's tokenizer files by name, at least of `tokenizer.json`.

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

    backend: Any  # the tokenizers.Tokenizer, for what is not offered here
    special_tokens: dict[str, str]  # such as {"bos_token": "<s>"}
    chat_templates: dict[str, str]  # by name; the usual one is "default"
    vocab_size: int  # the highest id + 1, which is the least that a model needs
    padding_side: str

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
        """The id before a text: of `bos_token`, or else of `cls_token`."""
        return self._special_id("bos_token", "cls_token")

    @property
    def end_token(self) -> int | None:
        """The id after a text: of `eos_token`, or else of `sep_token`."""
        return self._special_id("eos_token", "sep_token")

    @property
    def pad_token(self) -> int | None:
        """The id that fills short rows."""
        return self._special_id("pad_token")

    @property
    def unknown_token(self) -> int | None:
        """The id of what is not in the vocabulary."""
        return self._special_id("unk_token")

    @property
    def mask_token(self) -> int | None:
        """The id that hides a token, for a masked language model to guess."""
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
        """The token ids of a text, or of several padded to the longest, and which of them are real.

        Padding has the id `pad_token`, where there is none `end_token`, where there is none 0:
        whatever it is, the mask tells it apart.

        Arguments:
            texts: one text, or a list of b texts.
            pairs: a second text to each, for models that compare two.
            max_length: rows are cut to this length, special tokens included (of two texts first
                the longer one); None cuts nothing.
            add_special_tokens: whether to add the tokens that the model expects around a text;
                False after `apply_chat_template`, which writes them.
            padding_side: "right" or "left", by default what the checkpoint says, or else "right".

        Returns:
            `(tokens, padding_mask)`, int32 and boolean (True where a token is real), of shape
            `(t,)` for one text and `(b, t)` for a list.

        Raises:
            ValueError: if texts are no strings, pairs do not fit them, or an option does not exist.
        """
        rows = self._encode_rows(texts, pairs, max_length, add_special_tokens)
        fill = next(i for i in (self.pad_token, self.end_token, 0) if i is not None)
        tokens = self._stack([ids for ids, _ in rows], fill, padding_side)
        real = self._stack([[1] * len(ids) for ids, _ in rows], 0, padding_side) == 1
        if isinstance(texts, str):
            tokens, real = tokens[0], real[0]
        return jax.device_put(tokens), jax.device_put(real)

    def token_types(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
    ) -> Int[Array, "*b t"]:
        """For each token of `encode`, 1 in the second text of a pair and 0 elsewhere (for BERT).

        Arguments and errors are those of `encode`, and the shape is that of its tokens.
        """
        rows = self._encode_rows(texts, pairs, max_length, add_special_tokens)
        types = self._stack([row for _, row in rows], 0, padding_side)
        return jax.device_put(types[0] if isinstance(texts, str) else types)

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str | list[str]:
        """The text of token ids, or a list of texts for a batch.

        Ids without a token, such as those that pad the vocabulary of a model, decode to nothing.

        Arguments:
            tokens: an array or a list of shape `(t,)` or `(b, t)`; the rows of a list may differ
                in length.
            skip_special_tokens: whether to leave special tokens out, padding among them.

        Raises:
            ValueError: if these are no ids: integers from 0 to 2^31 - 1.
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
        """A conversation as text in the form that the model was trained on.

        Pass it to `encode` with `add_special_tokens=False`: the template has written them.

        Arguments:
            messages: such as `{"role": "user", "content": "Hello"}`, in order.
            add_generation_prompt: whether to end with the opening of the model's answer; by default
                True, unless the final message is to be continued.
            continue_final_message: whether to end within the final message, for the model to write
                its rest.
            template: the name of one of `chat_templates`, or the text of another one; by default
                "default", or with `tools=` "tool_use" where there is one.
            variables: what else the template reads (`tools=`, `documents=`, `enable_thinking=`,
                ...), plain data. A name that none of the tokenizer's templates reads is refused.

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
        """Write the files that this tokenizer was made from, unchanged.

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
        """The id of the first of these special tokens that there is."""
        there = [self.special_tokens[name] for name in names if name in self.special_tokens]
        return self.backend.token_to_id(there[0]) if there else None

    def _encode_rows(
        self, texts: Any, pairs: Any, max_length: Any, add_special_tokens: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and token types of each text or pair, cut but not yet padded."""
        check_flag(add_special_tokens=add_special_tokens)
        inputs: list[Any] = _check_texts("texts", texts)
        if pairs is not None:
            seconds = _check_texts("pairs", pairs)
            if isinstance(texts, str) != isinstance(pairs, str) or len(inputs) != len(seconds):
                raise ValueError(
                    f"pairs must be one text to each of texts, got {len(seconds)} to "
                    f"{len(inputs)}. Pass two strings, or two lists of equal length."
                )
            inputs = list(zip(inputs, seconds, strict=True))
        encode = self.backend.encode_batch
        encodings = guarded(encode, inputs, add_special_tokens=add_special_tokens)
        if max_length is None:
            return [(encoding.ids, encoding.type_ids) for encoding in encodings]
        check_size(max_length=max_length)
        return [self._cut(encoding, max_length) for encoding in encodings]

    def _cut(self, encoding: Any, max_length: int) -> tuple[list[int], list[int]]:
        """Ids and token types of a row, as many as there is room for.

        In the backend this is a setting, which threads would change under each other; and it keeps
        all that it cuts off, for two texts in each combination.
        """
        if len(encoding.ids) <= max_length:
            return encoding.ids, encoding.type_ids
        source = np.array([2 if i is None else i for i in encoding.sequence_ids])  # 2: special
        first, second, specials = (np.flatnonzero(source == i) for i in range(3))
        if max_length < len(specials):
            raise ValueError(
                f"max_length must have room for the {len(specials)} special tokens of a row, "
                f"got {max_length}."
            )
        lengths = _share(max_length - len(specials), len(first), len(second))
        kept = [
            text[:length] if self._truncation_side == "right" else text[len(text) - length :]
            for text, length in zip((first, second), lengths, strict=True)
        ]
        places = np.sort(np.concatenate([specials, *kept]))
        ids, types = (np.array(row)[places].tolist() for row in (encoding.ids, encoding.type_ids))
        return ids, types

    def _stack(self, rows: list[list[int]], fill: int, padding_side: Any) -> Int[np.ndarray, "b t"]:
        """The rows in one array, with `fill` where they are short."""
        side = self.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", got {side!r}.')
        stacked = np.full((len(rows), max(map(len, rows))), fill, np.int32)
        for i, row in enumerate(rows):
            stacked[i, : len(row)] = row
            if side == "left":
                stacked[i] = np.roll(stacked[i], -len(row))
        return stacked

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
                f"padding of its model's vocabulary, got {wrong}. Leave out what is no token, such "
                "as -100 at a target that does not count."
            )
        # An id that the tokenizer lacks decodes to nothing.
        text = guarded(self.backend.decode, ids.astype(int).tolist(), skip_special_tokens)
        for before, after in self._clean_up:
            text = text.replace(before, after)
        return text


def _check_texts(name: str, texts: Any) -> list[str]:
    """The texts as a list with at least one, or an error."""
    listed = [texts] if isinstance(texts, str) else texts
    if not (isinstance(listed, Sequence) and listed and all(isinstance(x, str) for x in listed)):
        raise ValueError(
            f"{name} must be a string or a list of at least one string, got {shorten(texts)}."
        )
    for text in listed:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} must be valid Unicode, got {shorten(text)}: {error.reason}. "
                'Repair it, for instance with .encode("utf-8", "replace").decode().'
            ) from None
    return list(listed)


def _share(room: int, first: int, second: int) -> tuple[int, int]:
    """How many tokens to keep of two texts of these lengths: the longer one is cut first."""
    half = room // 2 if first <= second else room - room // 2
    kept = min(first, max(half, room - second))
    return kept, min(second, room - kept)
