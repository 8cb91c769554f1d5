"""The text of single tokens, as answers with log-probabilities show them."""

from typing import Any, NamedTuple

from jaxformers.constraints.vocabulary import Vocabulary, vocabulary_of
from jaxformers.serving.job import Token
from jaxformers.tokenizers.tokenizer import Tokenizer

# JSON has no minus infinity; this is what OpenAI writes for it.
LEAST = -9999.0


class Listed(NamedTuple):
    """A new token whose log-probability is told.

    Arguments:
        token: with its alternatives.
        offset: the number of characters of the text that were certain before it.
    """

    token: Token
    offset: int


class TokenTexts:
    """The bytes and the text of each token of a tokenizer.

    Arguments:
        tokenizer: whose tokens may be any.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary | None
        try:
            self._vocabulary = vocabulary_of(tokenizer)
        except ValueError:  # the text of a token depends on those beside it
            self._vocabulary = None

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes of a token."""
        known = self._vocabulary
        if known is not None and token < len(known) and known.lengths[token]:
            return known[token]
        return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()

    def text_of(self, token: int) -> str:
        """Returns a token as text, or its bytes in letters if they are no characters by themselves.

        OpenAI writes them so: "bytes:\\xe2\\x80".
        """
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def chat(self, listed: list[Listed]) -> list[dict[str, Any]]:
        """Returns tokens in the form of chat completions."""
        return [
            self._entry(x.token.id, x.token.log_prob)
            | {"top_logprobs": [self._entry(*pair) for pair in x.token.top]}
            for x in listed
        ]

    def completion(self, listed: list[Listed]) -> dict[str, Any]:
        """Returns tokens in the form of completions."""
        return {
            "tokens": [self.text_of(x.token.id) for x in listed],
            "token_logprobs": [_finite(x.token.log_prob) for x in listed],
            "top_logprobs": [self._likeliest(x.token) for x in listed],
            "text_offset": [x.offset for x in listed],
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        """Returns the alternatives by their text, with the token itself."""
        if not token.top:
            return None
        found: dict[str, float] = {}
        for id_, log_prob in [*token.top, (token.id, token.log_prob)]:
            found.setdefault(self.text_of(id_), _finite(log_prob))
        return found

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        content = list(self.bytes_of(token))
        return {"token": self.text_of(token), "logprob": _finite(log_prob), "bytes": content}


def _finite(log_prob: float) -> float:
    return float(log_prob) if log_prob > LEAST else LEAST
