"""Reads and writes generation_config.json, which holds options of `generate`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformers.files.json_file import read_json
from jaxformers.generation.checkpoint_settings import SETTINGS, TOKEN_KEYS, is_set
from jaxformers.hf.family import Family
from jaxformers.hf.trained_length import trained_length
from jaxformers.origin import Origin, SpecialTokens


def read_origin(
    directory: Path, config: Mapping[str, Any], family: Family, vocab_size: int, bare: bool
) -> Origin:
    """Returns the origin of a model: what a checkpoint holds beside its weights.

    Special tokens that generation_config.json leaves out are those of config.json.

    Arguments:
        directory: the directory of the checkpoint.
        config: the entries of config.json.
        family: the table of the model.
        vocab_size: the number of tokens that may be special.
        bare: whether the names of its tensors lack the prefix of whole models.
    """
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else None
    entries = special_entries(config, family)
    special = read_special(entries, vocab_size, "config.json")
    if generation is not None:
        special = read_special({**entries, **generation}, vocab_size, "generation_config.json")
    return Origin(
        config=json.dumps(config),
        generation_config=None if generation is None else json.dumps(generation),
        directory=str(directory.absolute()),
        special_tokens=special,
        trained_length=trained_length(config, family),
        bare=bare,
    )


def special_entries(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the entries of a config.json that are special tokens, defaults of the class included.

    Older files of BART say with a switch that texts begin with the start token.
    """
    known = {**family.special, **config}
    entries = {key: known[key] for key in TOKEN_KEYS if key in known}
    switch = config.get("force_bos_token_to_be_generated")
    if switch is True and entries.get("forced_bos_token_id") is None:
        entries["forced_bos_token_id"] = entries.get("bos_token_id")
    elif not isinstance(switch, bool | None):
        raise ValueError(
            "config.json: force_bos_token_to_be_generated must be true or false, got "
            f"{switch!r:.80}."
        )
    return entries


def read_special(entries: Mapping[str, Any], vocab_size: int, where: str) -> SpecialTokens:
    """Returns the special tokens among entries. An id outside the vocabulary is left out."""

    def ids(key: str) -> tuple[int, ...]:
        given = entries.get(key)
        given = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(x) is not int for x in given):
            raise ValueError(f"{where}: {key} must be a token id or several, got {given!r:.80}.")
        return tuple(dict.fromkeys(x for x in given if 0 <= x < vocab_size))

    def one(key: str) -> int | None:
        return next(iter(ids(key)), None)

    bos, start = one("bos_token_id"), one("decoder_start_token_id")
    words = entries.get("bad_words_ids")
    words = [] if words is None else words
    if not isinstance(words, list) or not all(
        isinstance(word, list) and word and all(type(x) is int for x in word) for word in words
    ):
        raise ValueError(
            f"{where}: bad_words_ids must be lists of token ids, as [[7], [8, 9]], got "
            f"{words!r:.80}."
        )
    return SpecialTokens(
        start_token=bos if start is None else start,
        end_token=ids("eos_token_id"),
        pad_token=one("pad_token_id"),
        forced_first_token=one("forced_bos_token_id"),
        # The forced ids share one logit, and `argmax` takes the first of equals.
        forced_last_token=min(ids("forced_eos_token_id"), default=None),
        bad_words=tuple(tuple(word) for word in words if all(0 <= x < vocab_size for x in word)),
        suppress_tokens=ids("suppress_tokens"),
        begin_suppress_tokens=ids("begin_suppress_tokens"),
    )


def generation_entries(
    origin: Origin | None, family: Family, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entries of the file, as the checkpoint had them.

    Where the checkpoint had no such file, it holds the entries of config.json that are about
    `generate`: transformers does not read them from config.json beside this file.
    """
    if origin is not None and origin.generation_config is not None:
        return json.loads(origin.generation_config)
    special = special_entries(config, family)
    entries = {key: x for key, x in special.items() if x not in (None, -1, [])}
    others = {key: config[key] for key in SETTINGS if key in config and is_set(key, config[key])}
    return entries | others
