"""Lists of texts as batches of a few sizes, so that few programs are compiled for them."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformers.checks import check_flag, check_size, check_tokens
from jaxformers.files.json_file import shorten
from jaxformers.masks import AttentionMask
from jaxformers.one_program import TokenRows, bucket, sizes_up_to
from jaxformers.progress import progress_bar
from jaxformers.tokenizers.rows import check_pairs, check_texts
from jaxformers.tokenizers.tokenizer import Tokenizer, check_tokenizer
from jaxformers.transformer import Transformer
from jaxformers.transformer_encoder import TransformerEncoder
from jaxformers.transformer_lm import TransformerLM

Model = TransformerEncoder | TransformerLM | Transformer
Encoded = list[tuple[list[int], list[int]]]  # for each text its ids and their types

AT_ONCE = 32  # batches are tokenized at once, and no more of them are in memory
LONG = 1024  # lists of fewer texts show no progress bar unless they are asked to


class Texts(NamedTuple):
    """The texts of a call.

    Arguments:
        first: the texts.
        second: a second text for each, of models that compare two texts; None without pairs.
        is_list: whether the caller gave a list, rather than one text.
    """

    first: list[str]
    second: list[str] | None
    is_list: bool

    @classmethod
    def of(cls, texts: Any, pairs: Any = None, prompt: str = "") -> "Texts":
        """Returns the texts that a caller gave, which may be an empty list.

        Arguments:
            texts, pairs: as the caller gave them.
            prompt: is put before each text.

        Raises:
            ValueError: if they are no strings, or pairs do not fit them.
        """
        first = [prompt + text for text in _listed("texts", texts)]
        if pairs is None:
            return cls(first, None, not isinstance(texts, str))
        second = _listed("pairs", pairs)
        check_pairs(texts, pairs, first, second)
        return cls(first, second, not isinstance(texts, str))

    def sizes(self) -> list[int]:
        """Returns the number of characters of each text or pair."""
        seconds = self.second or [""] * len(self.first)
        return [len(a) + len(b) for a, b in zip(self.first, seconds, strict=True)]

    def encode(self, numbers: Any, tokenizer: Tokenizer, max_length: int | None) -> Encoded:
        """Returns the tokens of the texts with these numbers."""
        first = [self.first[i] for i in numbers]
        second = None if self.second is None else [self.second[i] for i in numbers]
        return tokenizer.encode_rows(first, second, max_length=max_length)


class Reader(NamedTuple):
    """What reads texts: a model, its tokenizer, and the sizes of batches that it is compiled for.

    The sizes of batches are the powers of two up to `batch_size`, and `batch_size` itself. Their
    lengths are those of `one_program.bucket`.

    Arguments:
        model: of any of the three classes; of an encoder-decoder the encoder reads.
        tokenizer: makes its tokens.
        max_length: the largest number of tokens in a row; the rest of a text is cut off. None is
            no limit.
        batch_size: the number of texts in a batch, but for the last.
    """

    model: Model
    tokenizer: Tokenizer
    max_length: int | None
    batch_size: int

    def batches(self, texts: Texts) -> Iterator[tuple[Int[np.ndarray, " n"], TokenRows]]:
        """Yields the numbers of some texts and their rows, about the longest texts first.

        The order is that of the numbers of characters, and within a few batches that of the numbers
        of tokens. Only those few are tokenized at once. Rows beyond the numbers are padding.
        """
        order, size = longest_first(texts.sizes()), self.batch_size
        for start in range(0, len(order), size * AT_ONCE):
            numbers = order[start : start + size * AT_ONCE]
            encoded = texts.encode(numbers, self.tokenizer, self.limit)
            by_length = longest_first([len(ids) for ids, _ in encoded])
            for begin in range(0, len(numbers), size):
                part = by_length[begin : begin + size]
                yield numbers[part], self.rows([encoded[i] for i in part])

    def run(
        self,
        texts: Texts,
        compute: Callable[[TokenRows], Array],
        width: int,
        progress: bool | None = None,
    ) -> Float[np.ndarray, "n d"]:
        """Returns what a function makes of each text, in float32 and in the order of the texts.

        Arguments:
            texts: of which there may be none.
            compute: gives a vector for each row.
            width: of the vectors.
            progress: whether to show a bar; None shows it for long lists on a terminal.
        """
        if progress is not None:
            check_flag(progress=progress)
        elif len(texts.first) < LONG:
            progress = False
        results = np.zeros((len(texts.first), width), np.float32)
        with progress_bar(len(texts.first), "text", progress) as bar:
            for numbers, vectors in _one_ahead(self.batches(texts), compute):
                results[numbers] = np.asarray(vectors, np.float32)[: len(numbers)]
                bar.update(len(numbers))
        return results

    def rows(self, encoded: Encoded) -> TokenRows:
        """Returns the tokens of at most `batch_size` texts, padded to the next size."""
        longest = max(1, *(len(ids) for ids, _ in encoded))
        shape = self._rows_of(len(encoded)), bucket(longest, self.limit)
        tokens, types = np.full(shape, self._fill, np.int32), np.zeros(shape, np.int32)
        positions = np.full(shape, -1, np.int32)
        for i, (ids, kinds) in enumerate(encoded):
            tokens[i, : len(ids)], types[i, : len(ids)] = ids, kinds
            positions[i, : len(ids)] = np.arange(len(ids))
        return self._as_rows(tokens, positions, types)

    def warm_up(self, compute: Callable[[TokenRows], Array], max_length: int) -> float:
        """Compiles for all sizes up to a length and `batch_size`, and returns the seconds it took.

        Arguments:
            compute: as in `run`.
            max_length: the largest number of tokens in a row.
        """
        begun = time.perf_counter()
        for count in sorted({self._rows_of(n) for n in range(1, self.batch_size + 1)}):
            for length in sizes_up_to(max_length, self.limit):
                tokens = np.full((count, length), self._fill, np.int32)
                jax.block_until_ready(compute(self._as_rows(tokens, tokens * 0, tokens * 0)))
        return time.perf_counter() - begun

    @property
    def limit(self) -> int | None:
        """The largest number of tokens in a row."""
        model = self.model
        known = model.src_embedding if isinstance(model, Transformer) else model
        limits = [n for n in (self.max_length, known.max_seq_length) if n is not None]
        return min(limits, default=None)

    @property
    def _fill(self) -> int:
        """The id in places of padding, which the model does not read."""
        known = self.tokenizer.pad_token, self.tokenizer.end_token
        sizes = [i for i in known if i is not None and i < self._vocab_size]
        return sizes[0] if sizes else 0

    @property
    def _vocab_size(self) -> int:
        model = self.model
        return model.src_vocab_size if isinstance(model, Transformer) else model.vocab_size

    def _rows_of(self, count: int) -> int:
        return min(1 << (count - 1).bit_length(), self.batch_size)

    def _as_rows(self, tokens: np.ndarray, positions: np.ndarray, types: np.ndarray) -> TokenRows:
        places = jax.device_put(positions)
        mask = AttentionMask(q_positions=places, k_positions=places)
        kinds = None
        if isinstance(self.model, TransformerEncoder):
            table = self.model.embedding.type_embedding
            if table is not None and table.vocab_size > 1:
                kinds = self.model.embedding.check_types(types, types.shape)
        return TokenRows(check_tokens(tokens, self._vocab_size), mask, token_types=kinds)


def longest_first(lengths: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Returns the numbers of rows, the longest first; those of one length in their order."""
    return np.argsort(-np.array(lengths, np.int64), kind="stable")


def hidden_states(model: Model, rows: TokenRows) -> Float[Array, "b t d"]:
    """Returns the hidden state of each token, of an encoder-decoder those of its encoder.

    It is called within a compiled program.
    """
    if isinstance(model, TransformerLM):
        return model.forward(rows.tokens, rows.mask)[0]
    if isinstance(model, Transformer):
        return model.encode(rows.tokens, rows.mask)
    return model(rows.tokens, rows.mask, token_types=rows.token_types)


def check_reader(model: Any, tokenizer: Any) -> None:
    """Raises `ValueError` unless these are one of our models and a tokenizer."""
    if not isinstance(model, Model):
        raise ValueError(
            "model must be a TransformerEncoder, a TransformerLM or a Transformer, got "
            f"{shorten(model)}. from_pretrained(directory) reads model and tokenizer."
        )
    check_tokenizer(tokenizer)


def check_length(max_length: Any, limit: int | None) -> int:
    """Returns the length up to which `warm_up` compiles.

    Arguments:
        max_length: as the caller gave it; None is `limit`.
        limit: the longest row that is read; None is no limit.
    """
    if max_length is None:
        if limit is None:
            raise ValueError(
                "warm_up needs max_length=, the largest number of tokens in a row, since neither "
                "the model nor its files have a limit."
            )
        return limit
    check_size(max_length=max_length)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"max_length must be at most {limit}, the longest row that is read, got {max_length}."
        )
    return max_length


def _listed(name: str, texts: Any) -> list[str]:
    """Returns the texts as a list, which may be empty."""
    if isinstance(texts, Sequence) and not isinstance(texts, str | bytes) and not len(texts):
        return []
    return check_texts(name, texts)


def _one_ahead(
    batches: Iterator[tuple[Any, TokenRows]], compute: Callable[[TokenRows], Array]
) -> Iterator[tuple[Any, Array]]:
    """Yields numbers and results of batches, each after the next one was sent to the device."""
    before = None
    for numbers, rows in batches:
        result = numbers, compute(rows)
        if before is not None:
            yield before
        before = result
    if before is not None:
        yield before
