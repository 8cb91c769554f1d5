"""The files beside the weights of a saved checkpoint: those of its tokenizer."""

import shutil
import warnings
from pathlib import Path

from jaxformers.origin import Origin
from jaxformers.tokenizers.files import TOKENIZER_FILES
from jaxformers.tokenizers.gguf import read_gguf_tokenizer

# The files that the sentence-transformers package reads beside a checkpoint.
SENTENCE_FILES = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    "*_Pooling/config.json",
)


def copy_tokenizer(origin: Origin | None, directory: Path) -> None:
    """Copies the files beside the weights of the checkpoint that the model came from."""
    if origin is None or origin.directory is None:
        return
    source = Path(origin.directory)
    if source.is_file():
        _write_tokenizer(source, directory)
        return
    if not source.is_dir():
        warnings.warn(
            f"{source}, from where this model was loaded, is gone, and with it its tokenizer: copy "
            f"the tokenizer's files to {directory} yourself.",
            stacklevel=4,
        )
        return
    if source.resolve() == directory.resolve():
        return
    names = (*TOKENIZER_FILES, *SENTENCE_FILES)
    for file in (file for name in names for file in source.glob(name)):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _write_tokenizer(source: Path, directory: Path) -> None:
    """Writes the tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json."""
    try:
        files = read_gguf_tokenizer(source)
    except ValueError as error:
        warnings.warn(f"{directory} gets no tokenizer: {error}", stacklevel=5)
        return
    for name, content in files.items():
        (directory / name).write_bytes(content)
