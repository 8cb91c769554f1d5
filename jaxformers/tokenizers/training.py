"""New tokenizers: byte-level BPE trained on texts, and tokenizers of bytes and of characters."""

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
    """Trains a byte-level BPE tokenizer like GPT-2's, which has tokens for every text.

    Arguments:
        texts: the texts to train on.
        vocab_size: the largest number of tokens: 256 bytes, the special tokens and learned tokens.
        special_tokens: special tokens by role; default `{"eos_token": "<|endoftext|>"}`.
        others: more special tokens, without a role.
        min_frequency: how often a pair must occur to become a token, default 2.
        progress: whether to show progress on the terminal, False by default.

    Raises:
        ValueError: if the vocabulary has no room for the bytes.
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
    """Returns a tokenizer whose ids are the bytes of a text, and 256 for its end.

    Raises:
        ImportError: if the `tokenizers` package is missing.

    Example:
        >>> bytes_tokenizer().encode("hé")[0]
        Array([104, 195, 169], dtype=int32)
    """
    package = _package()
    backend = _byte_level(package, package.models.BPE(byte_letters(), []))
    backend.add_special_tokens([END])
    return _with_files(backend, {"eos_token": END})


def byte_letters() -> dict[str, int]:
    """Returns the byte that each character stands for in a byte-level vocabulary.

    188 printable bytes are written as themselves, and the others as chr(256), chr(257) and so on
    (GPT-2's `bytes_to_unicode`).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(x): x for x in printable} | {chr(256 + i): x for i, x in enumerate(others)}


def characters_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer whose ids are the sorted characters of these texts, then the end token.

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
        raise ValueError("texts must have at least one character, got none.")
    # There is no unknown token, so another character is an error and nothing is lost.
    backend = package.Tokenizer(
        package.models.WordLevel({c: k for k, c in enumerate(sorted(characters))})
    )
    backend.pre_tokenizer = package.pre_tokenizers.Split(package.Regex(r"[\s\S]"), "isolated")
    backend.decoder = package.decoders.Fuse()
    backend.add_special_tokens([END])
    return _with_files(backend, {"eos_token": END})


def save_new(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a tokenizer's files to a directory that appears only when they are complete.

    Raises:
        ValueError: if the directory is not empty.
    """
    check_new(directory)
    # The name is unique, so two processes that write at once do not mix their files.
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
    """Raises an error if a directory is not empty."""
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
    """Returns the tokenizer, with the settings that transformers reads beside it."""
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
