"""From text to text: models with their tokenizers.

Read `generator` (generation, chat, scores), `conversation` (a chat that keeps its cache),
`row_text` (tokens to whole characters, and the end of a text), `embedder` (vectors
of texts) and `classifier` (their classes).
"""

from jaxformers.text.call import TextGeneration
from jaxformers.text.classifier import Label, TextClassifier
from jaxformers.text.conversation import Conversation
from jaxformers.text.embedder import TextEmbedder
from jaxformers.text.generator import TextGenerator
from jaxformers.text.scores import TextScore
from jaxformers.text.stream import TextStream

__all__ = [
    "Conversation",
    "Label",
    "TextClassifier",
    "TextEmbedder",
    "TextGeneration",
    "TextGenerator",
    "TextScore",
    "TextStream",
]
