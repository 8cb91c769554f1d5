"""The fields that chat completions and completions have in common."""

import secrets
from typing import Any, NamedTuple

from jaxformers.serving.errors import Refused
from jaxformers.serving.fields import Fields
from jaxformers.serving.job import Sampling

MOST_STOPS, LONGEST_STOP = 4, 256
MOST_BIASES = 1024
MOST_CHOICES = 128
MOST_METADATA, LONGEST_METADATA = 16, 512
MOST_NUMBER = 2**31 - 1
# Fields that say nothing about the answer, with the values that are accepted.
HARMLESS: dict[str, Any] = {"store": (False,), "service_tier": ("auto", "default")}
NOTES = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


class Options(NamedTuple):
    """What a request says about its answers.

    Arguments:
        n: the number of answers to each prompt.
        sampling: how tokens are chosen.
        stop: the strings that end an answer.
        lists: whether the log-probabilities of tokens are told.
        streams: whether the answers come as events.
        tells_usage: whether the last event tells the number of tokens.
    """

    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    lists: bool
    streams: bool
    tells_usage: bool


def read_options(fields: Fields, vocab_size: int, top: int | None) -> Options:
    """Returns the common fields of a request.

    Arguments:
        fields: of the request.
        vocab_size: of the model.
        top: of so many of the likeliest tokens log-probabilities are told; None tells none at all.

    Raises:
        Refused: if one of them is not what it must be.
    """
    fields.accept(HARMLESS)
    for name in NOTES:
        fields.string(name, 1024)
    _check_metadata(fields)
    streams = fields.flag("stream")
    return Options(
        fields.whole("n", 1, 1, MOST_CHOICES),
        _read_sampling(fields, vocab_size, top or 0),
        _read_stop(fields),
        top is not None,
        streams,
        _read_stream_options(fields, streams),
    )


def _check_metadata(fields: Fields) -> None:
    """Raises unless the metadata are a few short texts, which nobody reads here."""
    given = fields.take("metadata")
    is_object = given is None or (isinstance(given, dict) and len(given) <= MOST_METADATA)
    texts = [x for pair in (given or {}).items() for x in pair] if is_object else [None]
    if not all(isinstance(x, str) and len(x) <= LONGEST_METADATA for x in texts):
        wanted = f"up to {MOST_METADATA} texts of up to {LONGEST_METADATA} characters by name"
        raise fields.wrong("metadata", wanted, given)


def _read_sampling(fields: Fields, vocab_size: int, top: int) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0.0, 2.0)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    seed = fields.whole("seed", None, 0, MOST_NUMBER)
    return Sampling(
        temperature=temperature if top_p > 0 else 0.0,  # the likeliest token alone
        top_k=fields.whole("top_k", 0, 0, MOST_NUMBER),
        top_p=top_p if top_p > 0 else 1.0,
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        seed=secrets.randbelow(MOST_NUMBER) if seed is None else seed,
        logit_bias=_read_bias(fields, vocab_size),
        top=top,
    )


def _read_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    group = fields.take("logit_bias")
    if group is None:
        return {}
    if not isinstance(group, dict) or len(group) > MOST_BIASES:
        wanted = f"an object of at most {MOST_BIASES} numbers by token id"
        raise fields.wrong("logit_bias", wanted, group)
    numbers, bias = Fields(group, "logit_bias."), {}
    for name in group:
        is_id = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size
        if not is_id:
            wanted = f"numbers by token ids from 0 to {vocab_size - 1}"
            raise fields.wrong("logit_bias", wanted, name)
        bias[int(name)] = numbers.number(name, 0.0, -100.0, 100.0)
    return bias


def _read_stop(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop")
    listed = [given] if isinstance(given, str) else [] if given is None else given
    is_list = isinstance(listed, list) and len(listed) <= MOST_STOPS
    if not is_list or not all(isinstance(x, str) and 0 < len(x) <= LONGEST_STOP for x in listed):
        wanted = f"a string or up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters"
        raise fields.wrong("stop", wanted, given)
    return tuple(listed)


def _read_stream_options(fields: Fields, streams: bool) -> bool:
    group = fields.group("stream_options")
    if group is None:
        return False
    if not streams:
        raise Refused(
            "stream_options may only be given with stream = true. Leave it out.",
            param="stream_options",
        )
    group.accept({"include_obfuscation": (False,)})
    tells = group.flag("include_usage")
    group.finish()
    return tells
