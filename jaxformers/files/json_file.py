"""JSON files of a checkpoint, read strictly: config.json, an index of shards, a header of tensors.

Checkpoints are not trusted. Every fault becomes a `ValueError` that names the file. If the file is
of another format, the error says so.
"""

import json
import math
import os
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

# The index of a model with 10^12 parameters has about 20 MB, and the header of 200 000 tensors has
# 1.2 million values. Python makes an object of each value, even of a short one.
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_VALUES = 2 * 2**20
MAX_DEPTH = 64

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
shorten = _REPR.repr  # shortens values of a file for error messages

# The formats of files that are found in place of a checkpoint's file, by their first bytes.
_SIGNATURES = {
    rb"version https://git-lfs": "It is a git-lfs pointer, not the file: run `git lfs pull`.",
    rb"PK\x03\x04|\x80[\x02-\x05]": "It is a pickle under another name.",
    rb"\x89HDF": "It is an HDF5 file under another name.",
    rb"GGUF": "It is a GGUF file under another name.",
    rb"\s*<": "It is a web page, of an error or a login perhaps: download the file again.",
    rb"\0*\Z": "It is empty or begins with zeros: download the file again.",
}


def read_json(path: str | os.PathLike) -> dict:
    """Returns the object in a JSON file such as config.json.

    Keys that come twice are an error, because a parser would keep only one of them. NaN and
    Infinity are errors as well, because they are not JSON. (transformers once wrote them for
    settings of state-space models; today it writes `{"__float__": "Infinity"}`.)

    Raises:
        ValueError: unless the file has one object of at most 64 MB, 2 million values and 64 levels.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"model_type": "llama"}')
        >>> read_json(path)
        {'model_type': 'llama'}
    """
    path = regular_file(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {MAX_JSON_BYTES} bytes of JSON.")
    return parse_json(data, str(path))


def regular_file(path: str | os.PathLike) -> Path:
    """Returns a path after a check that it is a regular file. Links are followed."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing or no regular file.")
    return path


def parse_json(data: bytes, where: str) -> dict:
    """Returns the object in a JSON text. `where` is the name of the text in errors."""
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise ValueError(f"{where} must have at most {MAX_JSON_VALUES} values, it has more.")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_with_unique_keys,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}.{what_it_is(data[:64])}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {shorten(value)}.")
    return value


def what_it_is(start: bytes) -> str:
    """Returns a sentence about a file that begins like another format, or an empty text."""
    return next((f" {hint}" for begin, hint in _SIGNATURES.items() if re.match(begin, start)), "")


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shorten(twice)} comes more than once in an object")
    return unique


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shorten(text)} is not a finite number")
    return number


def _check_depth(value: Any) -> None:
    """Checks the depth of a value, because `repr` and `copy.deepcopy` recurse into it later."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
