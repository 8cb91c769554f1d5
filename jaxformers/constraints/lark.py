"""Constraints by grammars that need a stack, which `llguidance` follows on the host."""

import copy
import json
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool

from jaxformers.constraints.json_schema import read_schema
from jaxformers.constraints.vocabulary import Vocabulary, vocabulary_of
from jaxformers.tokenizers.tokenizer import Tokenizer

# A place is the grammar's state after some tokens. The rows of a batch and its beams are at
# different places, and so many of them are remembered; of a single row fewer suffice.
PLACES, PLACES_OF_ONE = 512, 8


class LarkGrammar:
    """The texts of a context-free grammar, which may be recursive, in the syntax of Lark.

    No table can hold the states of such a grammar. So the compiled program asks the host before
    each token, which costs more than the look-up of the other constraints. It needs the package
    `llguidance`.

    Arguments:
        grammar: in the syntax of Lark as llguidance reads it, with a rule named `start`.
        tokenizer: of the model.

    Raises:
        ValueError: if the grammar is broken or too large.
        ImportError: if the package is missing.

    Example:
        >>> import tokenizers
        >>> from tokenizers.models import BPE
        >>> backend = tokenizers.Tokenizer(BPE({x: i for i, x in enumerate("()ab")}, []))
        >>> backend.decoder = tokenizers.decoders.ByteLevel()
        >>> tokenizer = Tokenizer({"tokenizer.json": backend.to_str().encode()})
        >>> nested = LarkGrammar('start: "(" start ")" | "a"', tokenizer)
        >>> out = model.generate(prompt, 9, constraint=nested, end_token=64)
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer):
        if not isinstance(grammar, str):
            raise ValueError(
                'grammar must be a text such as \'start: "(" start ")" | "a"\', got a '
                f"{type(grammar).__name__}."
            )
        matcher = _llguidance().LLMatcher
        self._begin(matcher.grammar_from_lark(grammar), tokenizer, f"LarkGrammar({grammar!r:.80})")

    @classmethod
    def of_json_schema(cls, schema: Any, tokenizer: Tokenizer) -> "LarkGrammar":
        """Returns the grammar of a JSON Schema, which may be recursive; `{}` is all of JSON.

        llguidance reads the schema. It refuses the keywords of JSON Schema that it does not
        enforce, and ignores names that are none.

        Arguments:
            schema: a dict, its JSON, a dataclass, or a model of pydantic.
            tokenizer: of the model.

        Raises:
            ValueError: if it is no schema, or llguidance refuses it.
            ImportError: if the package is missing.
        """
        grammar, text = cls.__new__(cls), json.dumps(read_schema(schema))
        made = _llguidance().LLMatcher.grammar_from_json_schema(text)
        grammar._begin(made, tokenizer, f"LarkGrammar.of_json_schema({text!r:.80})")
        return grammar

    def _begin(self, grammar: str, tokenizer: Tokenizer, name: str) -> None:
        self.name, self._grammar, self._tokenizer = name, grammar, tokenizer
        self._vocabulary = vocabulary_of(tokenizer)
        self._followers: dict[Any, Follower] = {}
        message = _llguidance().LLMatcher.validate_grammar(grammar, None)
        if message:
            raise ValueError(f"{name} is no grammar that can be followed: {message:.500}")

    def follower(self, vocab_size: int, end_tokens: frozenset[int]) -> "Follower":
        """Returns what follows it over the tokens of a model.

        Arguments:
            vocab_size: of the model.
            end_tokens: the ids that end a row.
        """
        key = vocab_size, end_tokens
        if key not in self._followers:
            known = KNOWN.setdefault(self._tokenizer, {})
            if key not in known:
                given = self._vocabulary, vocab_size, sorted(end_tokens)
                package, tokens = _llguidance(), _Tokens(self._tokenizer, *given)
                wrapped = package.TokenizerWrapper(tokens)
                made = package.LLTokenizer(wrapped, eos_token=tokens.ends, slices=[])
                known[key] = tokens, made
            self._followers[key] = Follower(self.name, self._grammar, *known[key])
        return self._followers[key]

    def __repr__(self) -> str:
        return self.name


class _Tokens:
    """The tokens of a model in the form that llguidance reads."""

    def __init__(
        self, tokenizer: Tokenizer, vocabulary: Vocabulary, vocab_size: int, ends: list[int]
    ):
        count = min(vocab_size, len(vocabulary))
        self.tokens = [vocabulary[i] for i in range(count)] + [b""] * (vocab_size - count)
        self.special_token_ids = [i for i, x in enumerate(self.tokens) if not x]
        self.eos_token_id, self.bos_token_id, self.ends = ends[0], None, ends
        self._backend = tokenizer.backend

    def __call__(self, text: bytes) -> list[int]:
        given = text.decode(errors="replace")
        return list(self._backend.encode(given, add_special_tokens=False).ids)


# What llguidance makes of the tokens of a model, which all grammars share.
KNOWN: WeakKeyDictionary[Tokenizer, dict[Any, tuple[_Tokens, Any]]] = WeakKeyDictionary()


class Follower:
    """A grammar over the tokens of a model, which says what may come after new tokens."""

    def __init__(self, name: str, grammar: str, tokens: _Tokens, known: Any):
        self.name, self._ends = name, tokens.ends
        self._illegal = np.array([not x for x in tokens.tokens])
        self._illegal[tokens.ends] = False
        self._places: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._most = PLACES
        self._start = _llguidance().LLMatcher(known, grammar, log_level=0)
        if self._start.is_error():
            raise ValueError(f"{name} cannot be followed: {self._start.get_error():.500}")

    def legal(self, tokens: tuple[int, ...]) -> Bool[np.ndarray, " v"]:
        """Returns which tokens may come after some; all of them after the end of a text."""
        matcher, count = self._at(tokens), len(self._illegal)
        if matcher is None:
            return np.ones(count, np.bool_)
        if matcher.is_stopped() and not matcher.is_error():  # nothing but an end may come
            return np.isin(np.arange(count), self._ends)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        legal = np.unpackbits(bits, bitorder="little", count=count) == 1
        return legal & ~self._illegal

    def of_one_row(self) -> "Follower":
        """Returns a follower for one row, which remembers a few places of its own."""
        follower = copy.copy(self)
        follower._places, follower._most = OrderedDict(), PLACES_OF_ONE
        return follower

    def may_end(self, tokens: tuple[int, ...]) -> bool:
        """Returns whether the text of some tokens is complete."""
        matcher = self._at(tokens)
        return matcher is None or matcher.is_accepting() or matcher.is_stopped()

    def _at(self, tokens: tuple[int, ...]) -> Any:
        """Returns the matcher after some tokens, None after the end of a text."""
        if not tokens:
            return self._start
        if tokens not in self._places:
            before = self._at(tokens[:-1])
            matcher = None if before is None else before.deep_copy()
            if matcher is not None and not matcher.consume_token(tokens[-1]):
                matcher = None
            self._places[tokens] = matcher
            if len(self._places) > self._most:
                self._places.popitem(last=False)
        return self._places[tokens]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            "a LarkGrammar needs the package llguidance: pip install 'jaxformers[constrained]'"
        ) from error
    return llguidance
