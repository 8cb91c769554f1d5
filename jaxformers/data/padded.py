"""Padded texts of different lengths: pairs for encoder-decoders, and answers for fine-tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxformers.data.order import Bucketed, Picked
from jaxformers.data.source import Source
from jaxformers.data.tokens import Tokens, check_id, open_tokens


class PaddedPairs(Source):
    """Batches of pairs of texts of about equal length, for an encoder-decoder.

    Each pair comes exactly once per epoch, in shuffled order. There are at most `buckets` shapes
    (`source.shapes` lists them), so a training step is compiled that often. If the pairs do not
    fill all batches of an epoch, one batch has empty rows.

    Arguments:
        pairs: a sequence of `(source, target)`, each a sequence of ids. A source ends with an end
            token if its encoder was trained so. A target is without start and end token.
        batch_size: the number of rows in a batch, b.
        start_token: the first input of the decoder.
        end_token: the last target.
        buckets: the largest number of shapes, default 4.
        seed: the seed of the order, an integer from 0 on; default 0.

    Batches:
        int32: `src` `(b, s)`, `tgt` and `targets` `(b, t)`; boolean, True where a token is real:
        `src_padding_mask` `(b, s)`, `tgt_padding_mask` `(b, t)`.

    Raises:
        ValueError: if there are no pairs, a source is empty, or an item is not an id.

    Example:
        >>> pairs = PaddedPairs([([5, 6, 7], [8, 9]), ([6], [7])], 2, start_token=1, end_token=2)
        >>> (batch,) = pairs.in_order()
        >>> batch["tgt"]
        array([[1, 8, 9],
               [1, 7, 0]], dtype=int32)
        >>> batch["targets"]
        array([[8, 9, 2],
               [7, 2, 0]], dtype=int32)
    """

    order: Bucketed

    def __init__(
        self,
        pairs: Sequence[tuple[Any, Any]],
        batch_size: int,
        *,
        start_token: int,
        end_token: int,
        buckets: int = 4,
        seed: int = 0,
    ):
        start, end = check_id(start_token=start_token), check_id(end_token=end_token)
        sources, targets = split_pairs("pairs", "(source, target)", pairs)
        self.sources = open_tokens(check_rows("source", sources))
        rows = check_rows("target", targets)
        self.targets = open_tokens([np.concatenate([[start], row, [end]]) for row in rows])
        sizes = [self.sources.lengths, self.targets.lengths - 1]
        if (sizes[0] == 0).any():
            raise ValueError(
                f"every source must have at least one token, pair {int(sizes[0].argmin())} has "
                "none. Leave it out."
            )
        self.order = Bucketed(np.stack(sizes, axis=1), batch_size, buckets, seed)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """All shapes `(s, t)` of batches."""
        return self.order.shapes

    def collect(self, picked: Picked) -> dict[str, np.ndarray]:
        s, t = picked.shape
        src, src_real = pad(self.sources, picked.examples, s)
        text, real = pad(self.targets, picked.examples, t + 1)
        real = real[:, 1:]
        return {
            "src": src,
            "tgt": np.where(real, text[:, :-1], 0),
            "targets": text[:, 1:],
            "src_padding_mask": src_real,
            "tgt_padding_mask": real,
        }


class PaddedTexts(Source):
    """Batches of texts in which only some tokens count, for fine-tuning a language model.

    Each text comes exactly once per epoch, in shuffled order. Batches have texts of about equal
    length and at most `buckets` shapes, see `PaddedPairs`.

    Arguments:
        texts: a sequence of `(ids, counts)`: the tokens, and for each whether it counts as a
            target. `answer` and `chat` return such pairs.
        batch_size: the number of rows in a batch, b.
        buckets: the largest number of shapes, default 4.
        seed: the seed of the order, an integer from 0 on; default 0.

    Batches:
        int32 `(b, t)`: `tokens`, `targets`; boolean `(b, t)`: `padding_mask`, True where a token
        is real, and `loss_mask`, True where the target counts.

    Raises:
        ValueError: if there are no texts, an item is not an id, or no target of a text counts.

    Example:
        >>> source = PaddedTexts([answer([5, 6, 7], [8], end_token=2), answer([5], [9], 2)], 2)
        >>> (batch,) = source.in_order()
        >>> batch["targets"]
        array([[6, 7, 8, 2],
               [9, 2, 0, 0]], dtype=int32)
        >>> batch["loss_mask"]
        array([[False, False,  True,  True],
               [ True,  True, False, False]])
    """

    order: Bucketed

    def __init__(
        self,
        texts: Sequence[tuple[Any, Any]],
        batch_size: int,
        *,
        buckets: int = 4,
        seed: int = 0,
    ):
        ids, counts = split_pairs("texts", "(ids, counts)", texts)
        self.tokens = open_tokens(check_rows("text", ids))
        masks = [_check_counts(k, *text) for k, text in enumerate(zip(ids, counts, strict=True))]
        self.counts = open_tokens(masks)
        sizes = self.tokens.lengths[:, None] - 1
        self.order = Bucketed(sizes, batch_size, buckets, seed)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """All shapes `(t,)` of batches."""
        return self.order.shapes

    def collect(self, picked: Picked) -> dict[str, np.ndarray]:
        (t,) = picked.shape
        text, real = pad(self.tokens, picked.examples, t + 1)
        counts, _ = pad(self.counts, picked.examples, t + 1)
        real = real[:, 1:]
        return {
            "tokens": np.where(real, text[:, :-1], 0),
            "targets": text[:, 1:],
            "padding_mask": real,
            "loss_mask": counts[:, 1:] == 1,
        }


def answer(prompt: Any, reply: Any, end_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a text for `PaddedTexts` in which only the reply and its end count.

    Arguments:
        prompt: ids, at least one.
        reply: ids.
        end_token: the id that follows the reply.

    Returns:
        `(ids, counts)`, two arrays of the same length.

    Raises:
        ValueError: if an item is not an id, or the prompt is empty.

    Example:
        >>> answer([5, 6], [7], end_token=2)
        (array([5, 6, 7, 2]), array([False, False,  True,  True]))
    """
    end = check_id(end_token=end_token)
    (first,), (second,) = check_rows("prompt", [prompt]), check_rows("reply", [reply])
    if not len(first):
        raise ValueError(
            "the prompt must have at least one token, got none. Begin it with a start token."
        )
    ids = np.concatenate([first, second, [end]])
    return ids, np.arange(len(ids)) >= len(first)


def chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a conversation for `PaddedTexts` in which only the assistant's answers count.

    The chat template of the tokenizer makes one text of the messages, which is encoded at once, as
    for generation. A token counts if a part of it is in an answer or its end.

    Arguments:
        tokenizer: a `jaxformers.Tokenizer` with a chat template.
        messages: dicts such as `{"role": "user", "content": "Hello"}`, at least one of them with
            the role "assistant".
        variables: `template=` and other variables of the template, see
            `Tokenizer.apply_chat_template`.

    Returns:
        `(ids, counts)`, two arrays of the same length.

    Raises:
        ValueError: if there is no answer, the template has no such variable, or it writes earlier
            messages differently when later ones follow.

    Example:
        >>> import tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = tokenizers.Tokenizer(WordLevel({"U": 0, "A": 1, "hi": 2, "yes": 3, ".": 4}))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> template = (
        ...     "{% for m in messages %}{{ 'A ' if m.role == 'assistant' else 'U ' }}"
        ...     "{{ m.content }} . {% endfor %}{% if add_generation_prompt %}A {% endif %}"
        ... )
        >>> tokenizer = Tokenizer({
        ...     "tokenizer.json": words.to_str().encode(),
        ...     "chat_template.jinja": template.encode(),
        ... })
        >>> question, reply = ({"role": r, "content": c} for r, c in
        ...                    [("user", "hi"), ("assistant", "yes")])
        >>> chat(tokenizer, [question, reply])
        (array([0, 2, 4, 1, 3, 4]), array([False, False, False, False,  True,  True]))
    """
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in variables:
            raise ValueError(
                f"{name} is for a text that the model goes on with, got it for a conversation to "
                "learn. Leave it out."
            )
    if messages and messages[0].get("role") == "assistant":
        raise ValueError(
            "a chat must not begin with an answer: message 0 is of the assistant. Put a message of "
            "the user or of the system before it."
        )
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **variables)
    spans = []
    for k, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, after = (
            tokenizer.apply_chat_template(part, add_generation_prompt=prompt, **variables)
            for part, prompt in ((messages[:k], True), (messages[: k + 1], False))
        )
        if not (text.startswith(after) and after.startswith(before)):
            raise Rewritten(
                f"the chat template must write message {k} in the same way whatever follows, and "
                "after the opening that it writes for an answer. It does not: pass each answer as "
                "a conversation of its own that ends with it."
            )
        # Whitespace after the end of an answer belongs to the template, so it does not count.
        spans.append((len(before), len(after.rstrip())))
    if not spans:
        raise ValueError(
            'messages must have at least one of the role "assistant" to learn, got none.'
        )
    return count_spans(tokenizer, text, spans)


class Rewritten(ValueError):
    """The error for a chat template that writes a message differently when others follow."""


def count_spans(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a text, and for each whether a part of it lies in one of the spans.

    A token may begin before a span, if a space ahead of an answer is a part of its first token.
    """
    check_unicode(text)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    counts = np.zeros(len(begins), np.bool_)
    for first, last in spans:
        counts |= (ends > first) & (begins < last)
    return np.array(encoding.ids), counts


def check_unicode(text: str) -> None:
    """Raises `ValueError` if a text has half of a character, as JSON can write it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has {text[error.start : error.end]!r}, which is half of a character."
        ) from error


def pad(documents: Tokens, examples: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns documents padded to `width`, and which tokens are real. Document -1 is empty."""
    ends = documents.documents()
    there = np.maximum(examples, 0)  # an index that exists
    starts = np.where(there > 0, ends[there - 1], 0)
    lengths = np.where(examples >= 0, ends[there] - starts, 0)
    return documents.rows(starts, lengths, width)


def split_pairs(name: str, form: str, pairs: Any) -> tuple[list[Any], list[Any]]:
    """Returns the first and the second items of a sequence of pairs."""
    if not isinstance(pairs, Sequence) or not pairs:
        raise ValueError(f"{name} must be a list of at least one {form}, got {pairs!r:.80}.")
    for k, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"{name} must be a list of {form}, number {k} is {pair!r:.80}.")
    return [first for first, _ in pairs], [second for _, second in pairs]


def check_rows(name: str, documents: list[Any]) -> list[np.ndarray]:
    """Returns each document as an array of ids, or raises an error with its number."""
    rows = []
    for k, ids in enumerate(documents):
        row = np.asarray(ids)
        integers = row.dtype.kind in "iu" and (not row.size or 0 <= row.min() <= row.max() < 2**31)
        if row.ndim != 1 or row.size and not integers:
            raise ValueError(
                f"a {name} must be a row of ids, integers from 0 on; number {k} is {ids!r:.80}."
            )
        rows.append(row.astype(np.int64))
    return rows


def _check_counts(k: int, ids: Any, counts: Any) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.dtype != np.bool_ or counts.shape != np.shape(ids):
        raise ValueError(
            f"counts must be booleans, one for each id; those of text {k} are "
            f"{counts.shape} of {counts.dtype} for ids of shape {np.shape(ids)}."
        )
    if not counts[1:].any():
        raise ValueError(
            f"text {k} has nothing to learn: of the tokens after its first none counts. "
            "Leave it out."
        )
    return counts.astype(np.int64)
