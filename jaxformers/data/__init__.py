"""Token files, and batches of them as functions of a seed and a number, so that runs can resume."""

from jaxformers.data.conversations import read_examples
from jaxformers.data.corruption import MaskedTokens, SpanCorruption
from jaxformers.data.examples import Examples
from jaxformers.data.order import Bucketed, Picked, Shuffled
from jaxformers.data.packing import PackedDocuments
from jaxformers.data.padded import PaddedPairs, PaddedTexts, answer, chat
from jaxformers.data.source import Changed, Source
from jaxformers.data.tokens import Tokens, open_tokens
from jaxformers.data.windows import Windows

__all__ = [
    "Bucketed",
    "Changed",
    "Examples",
    "MaskedTokens",
    "PackedDocuments",
    "PaddedPairs",
    "PaddedTexts",
    "Picked",
    "Shuffled",
    "Source",
    "SpanCorruption",
    "Tokens",
    "Windows",
    "answer",
    "chat",
    "open_tokens",
    "read_examples",
]
