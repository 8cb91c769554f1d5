"""The command that converts text files to a token file, in constant memory, and can resume.

`progress.json` says how far a job is. It is replaced after each step, when the ids of that step are
on the disk. A resumed job cuts off everything after them and goes on from there, so the result is
the same to the byte. `tokens.json` is written last. A directory without it is not a token file.
"""

import hashlib
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxformers.data.growing_files import HEADER, header, open_array
from jaxformers.data.joined import Joined, Part
from jaxformers.data.text_files import Piece, check_inputs, read_pieces, texts_of
from jaxformers.data.tokens import FORMAT, Tokens, open_tokens, token_dtype
from jaxformers.data.verbatim import verbatim
from jaxformers.files.atomic import replace_json, sync
from jaxformers.files.claim import LOCK, alone
from jaxformers.files.json_file import read_json
from jaxformers.progress import progress_bar
from jaxformers.tokenizers.tokenizer import Tokenizer, load_tokenizer
from jaxformers.tokenizers.training import (
    bytes_tokenizer,
    characters_tokenizer,
    save_new,
)

STEP = 2**21  # the number of bytes of text between two updates of progress.json


@dataclass
class Progress:
    """The progress of a job.

    Attributes:
        job: the settings of the job: tokenizer, inputs and their sizes, and so on.
        input, start: the index of the input that is being read, and the byte at which it resumes.
        offset: the first character after that byte whose ids are not written yet.
        tokens, documents: the numbers of written tokens and documents.
        begun: the index of the first token of the current document.
        empty: the number of documents that had no token and were left out.
        checksum: the CRC-32 of the ids.
    """

    job: dict[str, Any]
    input: int = 0
    start: int = 0
    offset: int = 0
    tokens: int = 0
    documents: int = 0
    begun: int = 0
    empty: int = 0
    checksum: int = 0


def tokenize(
    inputs: list[Path],
    out: Path,
    tokenizer: str = "bytes",
    *,
    field: str = "text",
    end_token: str | None = None,
    add_end: bool = True,
) -> Tokens:
    """Writes a token file of text files, or resumes a job that was stopped.

    The ids of a document are those that the tokenizer gives to the whole text. Only the end token
    is added. So decoding returns the text, unless the tokenizer itself changes texts: tokenizers
    like those of BERT and T5 lowercase letters, join spaces or compose characters. A special token
    that is written in a text is encoded as plain text.

    Arguments:
        inputs: text files in UTF-8, each a document; or `.jsonl` files, each line a document. A
            byte-order mark at the beginning is left out.
        out: the directory to write.
        tokenizer: the directory of a tokenizer, or a name on the hub; "bytes", the default; or
            "characters", whose vocabulary is made of the texts. It is saved as `out/tokenizer`.
        field: the field of a JSON line that has the text, default "text".
        end_token: the text of the token that ends a document; by default the tokenizer's end token.
        add_end: whether documents end with that token, True by default.

    Raises:
        ValueError: if an input is missing, empty or broken (the error says where), or `out` holds
            other files.
        OSError: if `out` cannot be written to, or another `tokenize` is writing to it.
        ImportError: if the `tokenizers` package is missing.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> _ = (directory / "text.txt").write_text("ab")
        >>> tokens = tokenize([directory / "text.txt"], directory / "tokens", "bytes")
        >>> tokens.ids.tolist()
        [97, 98, 256]
    """
    check_inputs(inputs)
    _check_place(out)
    options = (inputs, out, tokenizer, field, end_token, add_end)
    if (out / "tokens.json").exists():  # it may be read-only, and needs no lock
        return _tokenize(*options)
    with alone(out, "tokens", "another tokenize", _clean):
        return _tokenize(*options)


def _check_place(out: Path) -> None:
    """Raises an error if a directory holds other files than those of a token file."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names & {"tokens.json", "progress.json"}:
        return
    others = sorted(
        name
        for name in names - {"progress.json.new", LOCK}
        if not name.startswith(("tokenizer", f"{LOCK}."))
    )
    if others:
        raise ValueError(f"{out} is not empty, it holds {', '.join(others)}. Choose another one.")


def _clean(out: Path) -> None:
    """Removes the files that a killed process has left."""
    for path in out.glob("tokenizer*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)


def _tokenize(
    inputs: list[Path],
    out: Path,
    tokenizer: str,
    field: str,
    end_token: str | None,
    add_end: bool,
) -> Tokens:
    words = _saved_tokenizer(inputs, out, tokenizer, field)
    end = _end_id(words, end_token) if add_end else None
    job = {
        "inputs": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in inputs],
        "tokenizer": hashlib.sha256((out / "tokenizer/tokenizer.json").read_bytes()).hexdigest(),
        "characters": tokenizer == "characters",
        "vocab_size": words.vocab_size,
        "field": field,
        "end_token": end,
    }
    if (out / "tokens.json").exists():
        if read_json(out / "tokens.json").get("job") != job:
            raise ValueError(
                f"{out} holds the token file of other inputs or settings. Choose another "
                "directory, or remove it."
            )
        (out / "progress.json").unlink(missing_ok=True)  # a job stopped between its last two steps
        return open_tokens(out)
    progress = _read_progress(out, job)
    _write(inputs, out, words, end, progress)
    return open_tokens(out)


def _saved_tokenizer(inputs: list[Path], out: Path, name: str, field: str) -> Tokenizer:
    """Returns the tokenizer of this name, and saves it beside the tokens if it is not there yet."""
    saved = out / "tokenizer"
    begun = any((out / name).exists() for name in ("progress.json", "tokens.json"))
    if name == "characters" and begun and saved.exists():
        return load_tokenizer(saved)  # the texts need not be read again for its vocabulary
    if name == "bytes":
        tokenizer = bytes_tokenizer()
    elif name == "characters":
        tokenizer = characters_tokenizer(texts_of(inputs, field))
    else:
        tokenizer = load_tokenizer(name)
    if saved.exists():
        there = load_tokenizer(saved)
        if there.backend.to_str() != tokenizer.backend.to_str():
            raise ValueError(
                f"{out} was begun with another tokenizer. Choose another directory, or remove it."
            )
        return there
    save_new(tokenizer, saved)
    return tokenizer


def _end_id(tokenizer: Tokenizer, text: str | None) -> int:
    end = tokenizer.end_token if text is None else tokenizer.backend.token_to_id(text)
    if end is None:
        raise ValueError(
            "the tokenizer has no end token. Name one of its tokens with --end-token, or pass "
            "--no-end-token."
            if text is None
            else f"the tokenizer has no token {text!r} to end documents with."
        )
    return end


def _read_progress(out: Path, job: dict[str, Any]) -> Progress:
    path = out / "progress.json"
    if path.exists():
        progress = Progress(**read_json(path))
        if progress.job != job:
            raise ValueError(
                f"{out} was begun with other inputs or options. Run the command that began it, "
                "choose another directory, or remove it."
            )
        return progress
    progress = Progress(job)
    replace_json(path, asdict(progress), indent=1)  # from here on the directory belongs to this job
    return progress


def _write(
    inputs: list[Path], out: Path, tokenizer: Tokenizer, end: int | None, progress: Progress
) -> None:
    """Writes everything that is not written yet."""
    dtype = token_dtype(tokenizer.vocab_size)
    backend = verbatim(tokenizer)
    with (
        open_array(out / "tokens.npy", HEADER + progress.tokens * dtype.itemsize) as ids_file,
        open_array(out / "ends.npy", HEADER + progress.documents * 8) as ends_file,
        progress_bar(sum(path.stat().st_size for path in inputs)) as bar,
    ):
        bar.update(sum(path.stat().st_size for path in inputs[: progress.input]) + progress.start)
        for number in range(progress.input, len(inputs)):
            joined, read = Joined(backend, progress.start, progress.offset), progress.start
            for pieces in _steps(inputs[number], progress.start, progress.job["field"]):
                parts = _joined(joined, pieces, inputs[number])
                ids, ends = _count(parts, end, progress)
                data = ids.astype(dtype).tobytes()
                ids_file.write(data)
                ends_file.write(ends.astype("<i8").tobytes())
                bar.update(pieces[-1].stop - read)
                read = pieces[-1].stop
                progress.checksum = zlib.crc32(data, progress.checksum)
                progress.start, progress.offset = joined.start, joined.offset
                _save_progress(out, progress, ids_file, ends_file)
            progress.input, progress.start, progress.offset = number + 1, 0, 0
            _save_progress(out, progress, ids_file, ends_file)
        if not progress.tokens:
            raise ValueError(
                f"{', '.join(map(str, inputs))} hold no text that makes a token. Pass other files."
            )
        for file, count, kind in (
            (ids_file, progress.tokens, dtype),
            (ends_file, progress.documents, np.dtype("<i8")),
        ):
            file.seek(0)
            file.write(header(count, kind))
            sync(file)
    counts = {name: getattr(progress, name) for name in ("tokens", "documents", "empty")}
    said = {"format": FORMAT, "vocab_size": tokenizer.vocab_size, "checksum": progress.checksum}
    replace_json(out / "tokens.json", said | counts | {"job": progress.job}, indent=1)
    (out / "progress.json").unlink(missing_ok=True)


def _steps(path: Path, start: int, field: str) -> Iterator[list[Piece]]:
    """Yields the pieces of a file in groups that are encoded and written together."""
    pieces, begun = [], start
    for piece in read_pieces(path, start, field):
        pieces.append(piece)
        if piece.stop - begun >= STEP:
            yield pieces
            pieces, begun = [], piece.stop
    if pieces:
        yield pieces


def _joined(joined: Joined, pieces: list[Piece], path: Path) -> list[Part]:
    try:
        return joined.add(pieces)
    except ValueError as error:
        stop = pieces[-1].stop + len(pieces[-1].after.encode())
        raise ValueError(
            f"the tokenizer cannot encode a text of {path} before byte {stop}: {error} "
            "A tokenizer of characters knows only the characters of its own texts."
        ) from None


def _count(parts: list[Part], end: int | None, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of these parts and the ends of documents, and counts them in `progress`."""
    ids: list[int] = []
    ends, first = [], progress.tokens
    for part in parts:
        ids.extend(part.ids)
        if not part.ends:
            continue
        if first + len(ids) == progress.begun:
            progress.empty += 1
            continue
        if end is not None:
            ids.append(end)
        progress.begun = first + len(ids)
        ends.append(progress.begun)
    progress.tokens += len(ids)
    progress.documents += len(ends)
    return np.array(ids, np.int64), np.array(ends, np.int64)


def _save_progress(out: Path, progress: Progress, *files: BinaryIO) -> None:
    for file in files:
        sync(file)
    replace_json(out / "progress.json", asdict(progress), indent=1)
