"""JSON of a checkpoint, read strictly: config.json, an index of shards, a header of tensors.

Checkpoints come from strangers. Whatever is wrong becomes a `ValueError` that names the file and,
where the file is something else, says what.
"""

import json
import math
import os
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

# The index of a model with 10^12 parameters has about 20 MB, the header of 200 000 tensors
# 1.2 million values. Of each value, however short, Python makes an object.
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_VALUES = 2 * 2**20
MAX_DEPTH = 64

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
shorten = _REPR.repr  # for what an error message shows of a file

# What may lie where a checkpoint's file should be, by its first bytes.
_SIGNATURES = {
    rb"version https://git-lfs": "It is a git-lfs pointer, not the file: run `git lfs pull`.",
    rb"PK\x03\x04|\x80[\x02-\x05]": "It is a pickle under another name.",
    rb"\x89HDF": "It is an HDF5 file under another name.",
    rb"GGUF": "It is a GGUF file under another name.",
    rb"\s*<": "It is a web page, of an error or a login perhaps: download the file again.",
    rb"\0*\Z": "It is empty or begins with zeros: download the file again.",
}


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file such as config.json.

    Refused are keys that come twice, of which a parser would silently keep one, and NaN and
    Infinity, which are not JSON. (transformers once wrote them for settings of state-space models;
    today it writes `{"__float__": "Infinity"}`.)

    Raises:
        ValueError: for anything but one object, of at most 64 MB, 2 million values and 64 levels.

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
    """The path of a file that can be read to its end; links to one are followed."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing or no regular file.")
    return path


def parse_json(data: bytes, where: str) -> dict:
    """The object that `data` spells; `where` names it in errors."""
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
    """A sentence about a file that begins like something else, or nothing."""
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
    """Later steps may recurse: `repr` and `copy.deepcopy` do."""
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
