"""A call of `TextGenerator`: its texts as tokens, its options checked, and its results as text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxformers.checks import check_flag, check_size
from jaxformers.files.json_file import shorten
from jaxformers.generation.prompts import check_ids
from jaxformers.generation.sampling import keys_of
from jaxformers.mistakes import special_of
from jaxformers.text.row_text import RowText, WholeCharacters
from jaxformers.tokenizers.tokenizer import Tokenizer
from jaxformers.transformer import Transformer

DEFAULT_NEW_TOKENS = 256
# So many tokens at the end of a prompt are decoded with the new ones. They decide whether the first
# new word begins with a space.
BEFORE = 8
# Options that may have one number, or one thing, per row.
PER_ROW = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("forced_first_token", "forced_last_token", "length_penalty", "constraint"),
)
# Options about the tokens of a call, which has text instead.
OF_TOKENS = {
    "cache": "A conversation() keeps a cache",
    "return_cache": "A conversation() keeps a cache",
    "padding_mask": "Texts need no mask",
    "src_padding_mask": "Texts need no mask",
}


class TextGeneration(NamedTuple):
    """A text that was generated, and what is known of it.

    Arguments:
        text: the new text, without an end token or a stop string.
        finish_reason: "stop" for an end token or a stop string, "length" for the largest number of
            new tokens.
        tokens: the new tokens, those of an end included.
        log_probs: float32, the log-probability of each of them under the model itself.
        score: their sum; of beams the score that they were ranked by.
        prompt_tokens: how many tokens the prompt has.
    """

    text: str
    finish_reason: str
    tokens: list[int]
    log_probs: np.ndarray
    score: float
    prompt_tokens: int


class Call(NamedTuple):
    """A call with several prompts, checked.

    Arguments:
        rows: the tokens of each prompt.
        before: the tokens that the text of each row continues.
        max_new_tokens: the most new tokens of each row.
        stop: the strings that end a text.
        skip_special_tokens: whether special tokens are left out of the text.
        options: those of `generate`.
    """

    rows: list[list[int]]
    before: list[list[int]]
    max_new_tokens: int
    stop: tuple[str, ...]
    skip_special_tokens: bool
    options: dict[str, Any]

    def part(self, indices: Sequence[int]) -> "Call":
        """Returns the call with some of its prompts, whose results are the same."""
        index = list(indices)
        if index == list(range(len(self.rows))):
            return self
        options, count = dict(self.options), len(self.rows)
        for name in PER_ROW:
            value: Any = options.get(name)
            if not isinstance(value, list | tuple) and np.ndim(value) != 1:
                continue
            if len(value) != count:
                raise ValueError(
                    f"{name} must be one for all prompts, or one for each of the {count}, got "
                    f"{len(value)}."
                )
            rows = value if isinstance(value, list | tuple) else np.asarray(value)
            options[name] = [rows[i] for i in index]
        if options.get("key") is not None:
            options["key"] = keys_of(options["key"], count, index)
        return self._replace(
            rows=[self.rows[i] for i in index],
            before=[self.before[i] for i in index],
            options=options,
        )

    def row_texts(self, model: Any, tokenizer: Tokenizer, times: int = 1) -> list[RowText]:
        """Returns the texts of the rows, empty so far; of each prompt `times` of them.

        The options are those that `generate` has accepted.
        """

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, self.skip_special_tokens))

        given = self.options.get("end_token")
        single = special_of(model.origin).end_token if given is None else given
        ends = [[x] for x in check_ids("end_token", single).tolist()]
        ends += [np.asarray(x).tolist() for x in self.options.get("stop_sequences") or ()]
        least = self.options.get("min_new_tokens")
        least = np.broadcast_to(0 if least is None else np.asarray(least), (len(self.rows),))
        return [
            RowText(WholeCharacters(decode, before), self.stop, ends, n)
            for before, n in zip(self.before, least.tolist(), strict=True)
            for _ in range(times)
        ]


def read_call(
    model: Any,
    tokenizer: Tokenizer,
    rows: list[list[int]],
    before: list[list[int]],
    max_new_tokens: int | None,
    stop: str | Sequence[str] | None,
    skip_special_tokens: bool,
    options: Mapping[str, Any],
) -> Call:
    """Returns a call, checked as far as `generate` does not.

    Arguments:
        model, tokenizer: of the generator.
        rows: the tokens of the prompts, or of the sources of an encoder-decoder.
        before: the tokens that the text of each row continues, if the model has no source.
        max_new_tokens: None is `DEFAULT_NEW_TOKENS`, or as many as the model has positions for.
        stop, skip_special_tokens, options: as the user gave them.
    """
    check_flag(skip_special_tokens=skip_special_tokens)
    for name, why in OF_TOKENS.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} is not for text. {why}. Leave it out.")
    options = dict(options)
    if options.get("end_token") is None and not special_of(model.origin).end_token:
        options["end_token"] = tokenizer.end_token
    is_pair = isinstance(model, Transformer)
    if max_new_tokens is None:
        max_new_tokens = default_length(model, 1 if is_pair else max(map(len, rows)))
    check_size(max_new_tokens=max_new_tokens)
    before = [[]] * len(rows) if is_pair else before
    return Call(rows, before, max_new_tokens, read_stop(stop), skip_special_tokens, options)


def default_length(model: Any, prompt_tokens: int) -> int:
    """Returns the number of new tokens where none is given: at least 1.

    Arguments:
        model: of the generator.
        prompt_tokens: the length of the longest prompt.
    """
    if model.max_seq_length is None:
        return DEFAULT_NEW_TOKENS
    return max(min(DEFAULT_NEW_TOKENS, model.max_seq_length - prompt_tokens), 1)


def render(tokenizer: Tokenizer, messages: Any, variables: Mapping[str, Any] | None) -> str:
    """Returns a conversation as text.

    Arguments:
        tokenizer: with a chat template.
        messages, variables: as for `TextGenerator.chat`.
    """
    if variables is not None and not isinstance(variables, Mapping):
        raise ValueError(
            "variables must be a dict of what the chat template reads, such as "
            f'{{"enable_thinking": False}}, got {shorten(variables)}.'
        )
    return tokenizer.apply_chat_template(messages, **(variables or {}))


def is_several(messages: Any) -> bool:
    """Returns whether these are several conversations, rather than the messages of one."""
    is_list = isinstance(messages, list | tuple) and len(messages) > 0
    return is_list and isinstance(messages[0], list | tuple)


def encode_rows(
    tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Returns the tokens of each text; an empty text is the start token.

    Raises:
        ValueError: if a text is no string, or has no token and there is no start token.
    """
    tokens, real = tokenizer.encode(texts, add_special_tokens=add_special_tokens)
    rows = [
        row[kept].tolist() for row, kept in zip(np.asarray(tokens), np.asarray(real), strict=True)
    ]
    if not all(rows) and tokenizer.start_token is None:
        raise ValueError(
            f"a text must have at least one token, got {texts[rows.index([])]!r:.60}, and this "
            "tokenizer has no start token to begin with. Pass a text that is not empty."
        )
    return [row or [tokenizer.start_token] for row in rows]


def read_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the stop strings, checked."""
    given = (stop,) if isinstance(stop, str) else () if stop is None else stop
    is_list = isinstance(given, list | tuple)
    if not is_list or not all(isinstance(x, str) and x for x in given):
        raise ValueError(
            "stop must be a string or a list of strings that are not empty, such as "
            f'stop=["\\n\\n"], got {shorten(stop)}. Sequences of tokens are stop_sequences=.'
        )
    return tuple(given)
