"""From text to text: models with their tokenizers.

Read `generator` (generation, chat, scores), `conversation` (a chat that keeps its cache),
`row_text` (tokens to whole characters, and the end of a text), and `embedder` (vectors of texts).
"""

from jaxformers.text.conversation import Conversation
from jaxformers.text.embedder import TextEmbedder
from jaxformers.text.generator import TextGenerator
from jaxformers.text.stream import TextStream

__all__ = ["Conversation", "TextEmbedder", "TextGenerator", "TextStream"]
