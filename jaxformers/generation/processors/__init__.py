"""Processors: what may come next, given what came before.

A processor is a small module that changes the logits before a token is chosen. `generate` takes a
list of them, and its options with the names of Hugging Face are short forms of those here.
`Processor` says how to write one of your own.
"""

from jaxformers.generation.processors.automaton import Automaton
from jaxformers.generation.processors.bans import (
    BadWords,
    NoRepeatNgram,
    SuppressFirstTokens,
    SuppressTokens,
)
from jaxformers.generation.processors.followed import Followed
from jaxformers.generation.processors.forced import ForcedFirstToken, ForcedLastToken, MinNewTokens
from jaxformers.generation.processors.function import LogitsFunction
from jaxformers.generation.processors.penalties import (
    FrequencyPenalty,
    PresencePenalty,
    RepetitionPenalty,
)
from jaxformers.generation.processors.processor import History, Processor
from jaxformers.generation.processors.stop_table import StopTable

__all__ = [
    "Automaton",
    "BadWords",
    "Followed",
    "ForcedFirstToken",
    "ForcedLastToken",
    "FrequencyPenalty",
    "History",
    "LogitsFunction",
    "MinNewTokens",
    "NoRepeatNgram",
    "PresencePenalty",
    "Processor",
    "RepetitionPenalty",
    "StopTable",
    "SuppressFirstTokens",
    "SuppressTokens",
]
