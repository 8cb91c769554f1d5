"""Tokenizers made here: byte-level BPE that is trained, and those of bytes and characters."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxformers.checks import check_size
from jaxformers.tokenizers.tokenizer import Tokenizer

END = "<|endoftext|>"


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: dict[str, str] | None = None,
    others: Iterable[str] = (),
    min_frequency: int = 2,
    progress: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's, of which no text is unknown.

    Arguments:
        texts: what to learn from.
        vocab_size: how many tokens at most: 256 bytes, the special tokens, and what is learned.
        special_tokens: by role, as `{"eos_token": "<|endoftext|>"}`, which is the default.
        others: more special tokens, without a role.
        min_frequency: how often a pair must occur to become a token.
        progress: whether to show progress on the terminal.

    Raises:
        ValueError: if the vocabulary has no room for the bytes, or there is no text.
        ImportError: if the `tokenizers` package is missing.

    Example:
        >>> tokenizer = train_bpe(["to be or not to be"] * 9, vocab_size=262)
        >>> tokens, _ = tokenizer.encode("to be")
        >>> tokenizer.decode(tokens)
        'to be'
    """
    check_size(vocab_size=vocab_size, min_frequency=min_frequency)
    package = _package()
    roles = {"eos_token": END} if special_tokens is None else special_tokens
    special = list(dict.fromkeys([*roles.values(), *others]))
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special)}, for 256 bytes and "
            f"{len(special)} special tokens, got {vocab_size}."
        )
    backend = _byte_level(package, package.models.BPE())
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    return _with_files(backend, roles)


def bytes_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are the bytes of a text, and 256 its end.

    Raises:
        ImportError: if the `tokenizers` package is missing.

    Example:
        >>> bytes_tokenizer().encode("hé")[0]
        Array([104, 195, 169], dtype=int32)
    """
    package = _package()
    # The package writes the 188 printable bytes as themselves, and the others as what follows.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + k): byte for k, byte in enumerate(others)}
    backend = _byte_level(package, package.models.BPE(letters, []))
    backend.add_special_tokens([END])
    return _with_files(backend, {"eos_token": END})


def characters_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer whose ids are the characters of these texts in their order, and last the end.

    Raises:
        ValueError: if there is no text.
        ImportError: if the `tokenizers` package is missing.

    Example:
        >>> characters_tokenizer(["hello"]).encode("hole")[0]
        Array([1, 3, 2, 0], dtype=int32)
    """
    package = _package()
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("characters are those of at least one text, got none.")
    # Without an unknown token, what is not among them is an error, and nothing is lost.
    backend = package.Tokenizer(
        package.models.WordLevel({c: k for k, c in enumerate(sorted(characters))})
    )
    backend.pre_tokenizer = package.pre_tokenizers.Split(package.Regex(r"[\s\S]"), "isolated")
    backend.decoder = package.decoders.Fuse()
    backend.add_special_tokens([END])
    return _with_files(backend, {"eos_token": END})


def save_new(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a tokenizer's files to a directory that appears only once they are complete.

    Raises:
        ValueError: if there is something already.
    """
    check_new(directory)
    # A name that no other process has: two that write at once do not mix their files.
    unfinished = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        tokenizer.save(unfinished)
        os.replace(unfinished, directory)
    except OSError:
        check_new(directory)  # another process may have been first
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_new(directory: Path) -> None:
    """Raise if there is something in a directory."""
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty. Choose another directory, or remove it.")


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizers are made by the tokenizers package: pip install 'jaxformers[hf]'."
        ) from None
    return tokenizers


def _byte_level(package: Any, model: Any) -> Any:
    backend = package.Tokenizer(model)
    backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = package.decoders.ByteLevel()
    backend.post_processor = package.processors.ByteLevel(trim_offsets=False)
    return backend


def _with_files(backend: Any, roles: dict[str, str]) -> Tokenizer:
    """The tokenizer, with the settings that transformers reads beside it."""
    config = {
        **roles,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return Tokenizer(
        {
            "tokenizer.json": backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }
    )
