"""Constraints on generated text: a pattern, or one of several texts."""

from collections.abc import Sequence
from typing import Any

from jaxformers.constraints.automaton import determine
from jaxformers.constraints.expressions import Expression, alternatives
from jaxformers.constraints.regex_syntax import parse
from jaxformers.constraints.tables import TableFollower, Tables, make_tables
from jaxformers.constraints.utf8 import ByteAutomaton, to_bytes
from jaxformers.constraints.vocabulary import Vocabulary, vocabulary_of
from jaxformers.tokenizers.tokenizer import Tokenizer


class Constraint:
    """The texts that a row of `generate` may become, as an automaton over tokens.

    It is what `Regex`, `Choices` and `JSONSchema` have in common.
    """

    automaton: ByteAutomaton
    vocabulary: Vocabulary
    name: str  # for errors

    def build(self, expression: Expression, tokenizer: Tokenizer, name: str) -> None:
        """Sets the fields; `name` is for errors."""
        self.vocabulary = vocabulary_of(tokenizer)
        self.automaton = to_bytes(determine(expression))
        self.name = name
        self._tables: dict[Any, Tables] = {}

    def tables(self, vocab_size: int, end_tokens: frozenset[int]) -> Tables:
        """Returns the automaton over the tokens of a model.

        Arguments:
            vocab_size: of the model, which may be more or less than the tokenizer's.
            end_tokens: the ids that end a row.

        Raises:
            ValueError: if no tokens write a text of the constraint, or the tables are too large.
        """
        key = vocab_size, end_tokens
        if key not in self._tables:
            made = make_tables(self.automaton, self.vocabulary, vocab_size, end_tokens)
            if made is None:
                raise ValueError(
                    f"{self.name} has no text that the tokens of this tokenizer can write, so that "
                    "there is nothing to generate. Loosen it, or take another tokenizer; special "
                    "tokens and end tokens are no text."
                )
            self._tables[key] = made
        return self._tables[key]

    def follower(self, vocab_size: int, end_tokens: frozenset[int]) -> TableFollower:
        """Returns what follows it on the host, token by token.

        Arguments and errors are those of `tables`.
        """
        return TableFollower(self.tables(vocab_size, end_tokens))

    def __repr__(self) -> str:
        return self.name


class Regex(Constraint):
    """The texts that match a pattern as a whole.

    Arguments:
        pattern: in the syntax of Python's `re`. It has no look-around, no references to groups, no
            borders of words, no possessive quantifiers and no atomic groups; `(?i)` is for ASCII.
        tokenizer: of the model.

    Raises:
        ValueError: if the pattern is none, has one of those, or its automaton is too large.

    Example:
        >>> date = Regex(r"20[0-9]{2}-[01][0-9]", tokenizer)
        >>> out = model.generate(prompt, 10, constraint=date, end_token=tokenizer.end_token)
        >>> text = tokenizer.decode(out[0, prompt.shape[1]:])
        >>> text[:2], text[4], len(text)
        ('20', '-', 7)
    """

    def __init__(self, pattern: str, tokenizer: Tokenizer):
        if not isinstance(pattern, str):
            raise ValueError(
                f"pattern must be a string such as '[0-9]+', got {type(pattern).__name__}. Of a "
                "compiled pattern pass .pattern, with flags written in it as (?i)."
            )
        self.build(parse(pattern), tokenizer, f"Regex({pattern!r:.100})")


class Choices(Constraint):
    """One of several texts.

    Arguments:
        texts: at least one.
        tokenizer: of the model.

    Raises:
        ValueError: if they are no list of texts.

    Example:
        >>> answer = Choices(["yes", "no"], tokenizer)
        >>> out = model.generate(prompt, 10, constraint=answer, end_token=tokenizer.end_token)
        >>> tokenizer.decode(out[0, prompt.shape[1]:]) in ("yes", "no")
        True
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer):
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError(f'texts must be a list such as ["yes", "no"], got {texts!r:.80}.')
        if wrong := [x for x in texts if not isinstance(x, str)]:
            raise ValueError(f"texts must be strings, got {wrong[0]!r:.80} among them.")
        self.build(alternatives(dict.fromkeys(texts)), tokenizer, f"Choices({texts!r:.100})")
