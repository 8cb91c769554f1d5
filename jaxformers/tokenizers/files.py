"""The files of a tokenizer. They are checked carefully, since they may come from anywhere.

`tokenizer.json` has the algorithm, the vocabulary and the special tokens around a text. The
`tokenizers` package reads it. The files beside it say which tokens start and end a text, on which
side to pad, and how a chat is written as text. Their other settings (`do_lower_case`,
`add_bos_token`) say how `tokenizer.json` was made. As in transformers, they have no effect here.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxformers.files.json_file import parse_json, shorten, what_it_is

# The names and patterns of the files that belong to a tokenizer.
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
]

# The files of formats that are older than tokenizer.json.
OLDER_FILES = TOKENIZER_FILES[TOKENIZER_FILES.index("vocab.txt") :]

# The formats of SentencePiece, tiktoken and fastBPE.
OTHER_FORMATS = (".model", ".spm", ".tiktoken", ".codes")

# The special tokens in the settings, and the usual spellings of each.
SPECIAL_TOKENS = {
    "bos_token": ("<s>", "<bos>", "<|endoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]", "<|endoftext|>"),
    "sep_token": ("[SEP]",),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("[CLS]",),
    "mask_token": ("<mask>", "[MASK]"),
}

# The replacements of `clean_up_tokenization_spaces`: the spaces in these texts are removed.
CLEAN_UP = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")]
CLEAN_UP += [(f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")]


class Parts(NamedTuple):
    """The parts of a tokenizer, as its files define them."""

    backend: Any  # the tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    padding_side: str
    truncation_side: str
    clean_up: list[tuple[str, str]]  # replacements in a decoded text
    vocab_size: int


def read_files(directory: Path) -> dict[str, bytes]:
    """Returns the contents of the tokenizer files of a directory, by name."""
    found = (path for pattern in TOKENIZER_FILES for path in sorted(directory.glob(pattern)))
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in found if p.is_file()}


def check_kind(path: Path) -> None:
    """Raises an error for a file that, by its name, is a tokenizer in another format."""
    beside = path.parent / "tokenizer.json"
    is_other = path.suffix in OTHER_FORMATS or path.name in OLDER_FILES
    if is_other and beside.exists():
        raise ValueError(f"{path} is not read, and {beside} is: pass that, or the directory.")
    if is_other:
        raise ValueError(_how_to_convert({path.name: b""}))


def read_parts(files: Mapping[str, bytes]) -> Parts:
    """Returns the parts of a tokenizer, from the contents of its files by name.

    Raises:
        ValueError: if `tokenizer.json` is missing, or a file is broken.
        ImportError: if the `tokenizers` package is missing.
    """
    backend = _read_backend(files)
    config = _read_json(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # newer files have it, and it is complete
        config |= _read_json(files, "special_tokens_map.json")
    # The sides on which tokenizer.json pads and truncates are used, its lengths are not.
    padding, truncation = backend.padding or {}, backend.truncation or {}
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = _read_flag(config, "split_special_tokens")
    _add_missing_tokens(backend, config)
    # BPE tokens have their own spaces: removing some would lose text.
    cleans_up = _read_flag(config, "clean_up_tokenization_spaces")
    return Parts(
        backend,
        _read_special_tokens(backend, config),
        _read_chat_templates(files, config),
        _read_side(config, "padding_side", padding.get("direction", "right")),
        _read_side(config, "truncation_side", truncation.get("direction", "right")),
        CLEAN_UP if cleans_up and type(backend.model).__name__ != "BPE" else [],
        _measure_vocabulary(backend),
    )


def guarded(function: Callable, *arguments: Any, **options: Any) -> Any:
    """Returns the result of a function of `tokenizers`. Its failure means a broken file.

    Raises:
        ValueError: if the function fails, even by a panic.
    """
    try:
        return function(*arguments, **options)
    except BaseException as error:
        # The package is written in Rust, and a panic there is not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizer.json is broken: {error}.") from None


def _read_backend(files: Mapping[str, bytes]) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "text needs the tokenizers package: pip install 'jaxformers[hf]'. Models take token "
            "ids without it."
        ) from None
    if "tokenizer.json" not in files:
        raise ValueError(_how_to_convert(files))
    try:
        return guarded(tokenizers.Tokenizer.from_str, _decode(files, "tokenizer.json"))
    except ValueError as error:
        raise ValueError(f"{error}{what_it_is(files['tokenizer.json'][:64])}") from None


def _how_to_convert(files: Mapping[str, bytes]) -> str:
    """Returns the error for a missing `tokenizer.json`, depending on the other files."""
    older = [name for name in files if name in OLDER_FILES or Path(name).suffix in OTHER_FORMATS]
    if not older:
        return "there is no tokenizer.json. Is this the directory of the tokenizer?"
    if "source.spm" in older:
        return (
            "there is no tokenizer.json, only source.spm and target.spm. The tokenizers package "
            "cannot read them: make the ids with transformers.MarianTokenizer. A conversion, where "
            "a tool offers one, has to be compared with it on texts of yours."
        )
    return (
        f"there is no tokenizer.json, only {', '.join(older)}. Convert it once with transformers: "
        "AutoTokenizer.from_pretrained(directory).save_pretrained(directory). Then compare what "
        "both give for texts of yours, since not every conversion is exact."
    )


def _decode(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is broken: {error}.") from None


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Returns the object of a JSON file without its nulls, empty if there is no such file."""
    content = parse_json(files[name], name) if name in files else {}
    return {key: value for key, value in content.items() if value is not None}


def _read_flag(config: Mapping[str, Any], name: str) -> bool:
    if not isinstance(config.get(name, False), bool):
        raise _wrong(name, "must be true or false", config[name])
    return config.get(name, False)


def _read_side(config: Mapping[str, Any], name: str, default: str) -> str:
    if config.get(name, default) not in ("left", "right"):
        raise _wrong(name, 'must be "left" or "right"', config[name])
    return config.get(name, default)


def _read_special_tokens(backend: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens that the settings name.

    Some older checkpoints (gpt2, bert-base-uncased) name none and rely on their class in
    transformers. Their special tokens are recognized by the usual spellings.
    """
    named = {name: _content(name, config[name]) for name in SPECIAL_TOKENS if name in config}
    if named:
        return named
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    return {
        name: [text for text in spellings if text in special][0]
        for name, spellings in SPECIAL_TOKENS.items()
        if special.intersection(spellings)
    }


def _listed_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int | None]]:
    """Yields the tokens that the settings list: the setting, the token, and its id or None."""
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(
        key.isdecimal() and len(key) < 12 for key in decoder
    ):
        raise _wrong("added_tokens_decoder", "must be an object from ids to tokens", decoder)
    for key in sorted(decoder, key=int):
        yield f"added_tokens_decoder {key}", decoder[key], int(key)
    for name in SPECIAL_TOKENS:
        if name in config:
            yield name, config[name], None
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name, [])
        if not isinstance(extra, list | dict):
            raise _wrong(name, "must be a list or an object of tokens", extra)
        for token in extra.values() if isinstance(extra, dict) else extra:
            yield name, token, None


def _add_missing_tokens(backend: Any, config: Mapping[str, Any]) -> None:
    """Adds the tokens that the settings list and `tokenizer.json` lacks, as transformers does."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for where, token, expected in _listed_tokens(config):
        content = _content(where, token)
        if content in known:
            continue
        options = {"special": True} | (token if isinstance(token, dict) else {})
        names = ("special", "lstrip", "rstrip", "single_word", "normalized")
        chosen = {name: _read_flag(options, name) for name in names if name in options}
        backend.add_tokens([AddedToken(content, **chosen)])
        known.add(content)
        if expected not in (None, backend.token_to_id(content)):
            raise ValueError(
                f"tokenizer_config.json gives {content!r} the id {expected}, but after the "
                f"vocabulary of tokenizer.json comes {backend.token_to_id(content)}. These files "
                "do not belong together."
            )


def _read_chat_templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name, from files of their own or else from the settings."""
    own = {Path(name).stem: _decode(files, name) for name in files if name.endswith(".jinja")}
    if "chat_template" in own:
        own["default"] = own.pop("chat_template")
    given = config.get("chat_template", [])
    if own:
        return own
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else [given]
    try:
        templates = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise _wrong("chat_template", "must be a text, or a list of named ones", given)
    return templates


def _measure_vocabulary(backend: Any) -> int:
    """Returns the highest id + 1. All ids are below it, even if the vocabulary has gaps."""
    highest = max(backend.get_vocab().values(), default=-1)
    if not 0 <= highest < 2**31 - 1:
        raise ValueError(
            "tokenizer.json must hold a vocabulary whose ids fit into int32, got a highest id of "
            f"{highest}."
        )
    around = [*guarded(backend.encode, "").ids, *guarded(backend.encode, "", "").ids]
    if max(around, default=0) > highest:
        raise ValueError(
            f"tokenizer.json puts the id {max(around)} around texts, but its vocabulary ends at "
            f"{highest}."
        )
    return highest + 1


def _content(where: str, token: Any) -> str:
    """Returns the text of a token, which files write as a string or as an object with options."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise _wrong(where, 'must be a token (a string, or an object with "content")', token)
    return content


def _wrong(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"tokenizer_config.json: {name} {expected}, got {shorten(got)}.")
