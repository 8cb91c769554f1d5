"""The route /v1/embeddings."""

import base64
import threading
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxformers.serving.errors import Refused, one_line, too_long
from jaxformers.serving.fields import Fields, check_ids
from jaxformers.serving.workers import Workers
from jaxformers.text.embedder import TextEmbedder

MOST_INPUTS = 2048
AT_ONCE = 64  # so many texts are read before a look whether the client is still there
WAITING = 64  # the most requests that wait for vectors
# The most tokens of a text where the model has no limit, and of a batch.
LONGEST, MOST_TOKENS = 8192, 16384


class Embedder:
    """A model of vectors behind the server.

    Arguments:
        name: what clients call it.
        embedder: the model.
    """

    def __init__(self, name: str, embedder: TextEmbedder):
        self.name, self.embedder = name, embedder
        self._workers = Workers("vectors", 1, WAITING)

    def close(self) -> None:
        """Ends its thread."""
        self._workers.close()

    async def embed(self, fields: Fields) -> dict[str, Any]:
        """Returns the vectors that a request asks for.

        Arguments:
            fields: of the request, of which the model is known already.
        """
        given = fields.inputs("input", MOST_INPUTS)
        if "" in given:
            raise Refused("input must have no empty text. Leave it out.", param="input")
        form = fields.choice("encoding_format", ("float", "base64")) or "float"
        kept = fields.whole("dimensions", None, 1, self.embedder.dimension)
        fields.string("user", 1024)
        fields.finish()
        is_gone = threading.Event()
        try:
            vectors, count = await self._workers.run(self._embed, given, kept, is_gone)
        finally:
            is_gone.set()  # the vectors are there, or nobody waits for them
        data = [
            {"object": "embedding", "index": i, "embedding": _write(vector, form)}
            for i, vector in enumerate(vectors)
        ]
        used = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": self.name, "usage": used}

    def _embed(
        self, given: list[Any], kept: int | None, is_gone: threading.Event
    ) -> tuple[Float[np.ndarray, "n d"], int]:
        """Returns the vectors of texts, and the number of their tokens; in the only thread."""
        texts = [self._text(i, x) for i, x in enumerate(given)]
        begins, parts = range(0, len(texts), AT_ONCE), []
        lengths = [x for i in begins for x in self._lengths(texts[i : i + AT_ONCE], i)]
        options: dict[str, Any] = {} if kept is None else {"truncate_dim": kept, "normalize": True}
        # A power of two, so that there are few programs.
        size = 1 << (min(32, max(MOST_TOKENS // max(lengths), 1)).bit_length() - 1)
        for i in begins:
            if is_gone.is_set():
                raise Refused("the client has gone away.", 499)
            part = texts[i : i + AT_ONCE]
            parts.append(self.embedder(part, size, progress=False, **options))
        return np.concatenate(parts), sum(lengths)

    def _text(self, index: int, given: Any) -> str:
        """Returns an input as text, which token ids are the tokens of."""
        if isinstance(given, str):
            return given
        check_ids(given, self.embedder.tokenizer.vocab_size, f"input[{index}]", "input")
        return str(self.embedder.tokenizer.decode(given))

    def _lengths(self, texts: list[str], begin: int) -> list[int]:
        """Returns the numbers of tokens of some texts, none of which may be too long.

        Those of the model's default prompt count too, since they are read with each text.
        """
        limit = self.embedder.max_seq_length or LONGEST
        prompt = self.embedder.prompts.get(self.embedder.default_prompt or "", "")
        given = [prompt + text for text in texts]
        try:
            lengths = [len(ids) for ids, _ in self.embedder.tokenizer.encode_rows(given)]
        except ValueError as error:
            raise Refused(f"input: {one_line(error)}", param="input") from None
        for i, length in enumerate(lengths):
            if length > limit:
                raise too_long(
                    f"This model's maximum context length is {limit} tokens. However, "
                    f"input[{begin + i}] has {length} tokens. Shorten it.",
                    "input",
                )
        return lengths


def _write(vector: Float[np.ndarray, " d"], form: str) -> Any:
    """Returns a vector as numbers, or as the bytes of float32 in base64."""
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
