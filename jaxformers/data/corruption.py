"""Texts with hidden tokens that a model predicts: BERT's masks and T5's spans."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxformers.checks import check_positive, check_rate, check_size
from jaxformers.data.order import uniform
from jaxformers.data.source import Changed
from jaxformers.data.tokens import check_id
from jaxformers.data.windows import Windows


class MaskedTokens(Changed):
    """Batches for a masked language model, from another source's `tokens` (Devlin et al. 2019).

    A share `rate` of the tokens that are neither special nor padding is chosen as targets. Of these
    80 % become the mask token, 10 % become a random token, and 10 % stay as they are. The last
    token of a document or padded text (usually its end token) is only a target in those sources,
    so it does not occur here.

    Arguments:
        source: `Windows`, `PackedDocuments` or another source of `tokens`.
        mask_token: the id of the mask token.
        vocab_size: the size of the vocabulary. Random tokens are below it.
        special_tokens: ids that are never chosen, such as those of [CLS] and [SEP].
        rate: the share of tokens that are chosen, in (0, 1); default 0.15.

    Batches:
        `tokens` after masking; `targets`, the original tokens; `loss_mask`, True for the chosen
        tokens; and `padding_mask`, `positions` and `segment_ids` if the source has them.

    Raises:
        ValueError: if an id is not in the vocabulary, or `rate` is not in (0, 1).

    Example:
        >>> windows = Windows(np.arange(100), length=8, batch_size=3)
        >>> batch = MaskedTokens(windows, mask_token=100, vocab_size=101)[0]
        >>> shown = np.where(batch["loss_mask"], batch["targets"], batch["tokens"])
        >>> np.array_equal(shown, windows[0]["tokens"])
        True
    """

    def __init__(
        self,
        source: Any,
        *,
        mask_token: int,
        vocab_size: int,
        special_tokens: Iterable[int] = (),
        rate: float = 0.15,
    ):
        super().__init__(source)
        check_size(vocab_size=vocab_size)
        check_rate(rate=rate)
        check_positive(rate=rate)
        self.mask_token, self.vocab_size, self.rate = mask_token, vocab_size, rate
        self.special_tokens = list(special_tokens)
        check_id(mask_token=mask_token, below=vocab_size)
        for token in self.special_tokens:
            check_id(special_token=token, below=vocab_size)

    def change(self, batch: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
        tokens = batch["tokens"]
        real = batch.get("padding_mask", batch.get("segment_ids", np.ones(1)) > 0)
        whether, how, which = (uniform(numbers, tokens.shape[1], use) for use in range(3))
        guess = (whether < self.rate) & real & ~np.isin(tokens, self.special_tokens)
        others = (which * self.vocab_size).astype(np.int32)
        shown = np.select([how < 0.8, how < 0.9], [np.int32(self.mask_token), others], tokens)
        changed = {"tokens": np.where(guess, shown, tokens), "targets": tokens, "loss_mask": guess}
        return batch | changed


class SpanCorruption(Changed):
    """Batches for an encoder-decoder that fills gaps, from windows (T5, Raffel et al. 2020).

    Spans of the text at random positions are each replaced by a sentinel. The target is each
    sentinel with the tokens that it replaced. All rows have the same lengths, so there is no
    padding. Of n tokens, `round(n * noise_density)` are hidden in `round(hidden / mean_span)`
    spans, but at least one token is hidden and at least one is not. The last window of
    `in_order()` may have a single token. It is not hidden, and the target is only the end token.

    Arguments:
        source: `Windows` of at least 2 tokens.
        sentinels: ids in order of their use; T5's are `range(32099, 31999, -1)`.
        end_token: the last token of sources and targets.
        start_token: the first input of the decoder; default 0, which is T5's padding.
        noise_density: the share of hidden tokens, in (0, 1); default 0.15.
        mean_span: the mean length of a span in tokens, at least 1; default 3.

    Batches:
        int32: `src` `(b, s)`, `tgt` and `targets` `(b, t)`.

    Raises:
        ValueError: if the source is not `Windows`, there are too few sentinels, or a number is out
            of its range.

    Example:
        >>> length = SpanCorruption.text_length(512)
        >>> windows = Windows(np.arange(5000), length, batch_size=3)
        >>> source = SpanCorruption(windows, range(32099, 31999, -1), end_token=1)
        >>> {name: array.shape for name, array in source[0].items()}
        {'src': (3, 512), 'tgt': (3, 114), 'targets': (3, 114)}
    """

    def __init__(
        self,
        source: Any,
        sentinels: Sequence[int],
        *,
        end_token: int,
        start_token: int = 0,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
    ):
        super().__init__(source)
        if not isinstance(source, Windows):
            raise ValueError(
                f"spans are hidden in texts of one length: source must be Windows, got {source!r}."
            )
        _check_noise(noise_density, mean_span)
        for token in (*sentinels, end_token, start_token):
            check_id(token=token)
        if source.length < 2:
            raise ValueError(
                "windows must have at least 2 tokens, one to read and one to hide, got a length of "
                f"{source.length}. Choose a larger length."
            )
        _, spans = _count(source.length, noise_density, mean_span)
        if len(set(sentinels)) < len(sentinels) or len(sentinels) < spans:
            raise ValueError(
                f"windows of {source.length} tokens need {spans} sentinels, all different; got "
                f"{len(set(sentinels))}. Choose a smaller length or noise_density."
            )
        self.sentinels = np.array(sentinels, np.int32)
        self.end_token, self.start_token = end_token, start_token
        self.noise_density, self.mean_span = noise_density, mean_span

    @staticmethod
    def text_length(src_length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> int:
        """Returns the length of windows whose sources have at most `src_length` tokens.

        Raises:
            ValueError: if a number is out of its range.
        """
        check_size(src_length=src_length)
        if src_length < 3:
            raise ValueError(
                "src_length must be at least 3, for a token, a sentinel and the end, got "
                f"{src_length}."
            )
        _check_noise(noise_density, mean_span)

        def source_of(length: int) -> int:
            noise, spans = _count(length, noise_density, mean_span)
            return length - noise + spans + 1

        length = 2
        while source_of(length + 1) <= src_length:
            length += 1
        return length

    def change(self, batch: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
        src, targets = self._hide(batch["tokens"], numbers)
        end, start = (
            np.full((len(src), 1), i, np.int32) for i in (self.end_token, self.start_token)
        )
        targets = np.concatenate([targets, end], axis=1)
        return {
            "src": np.concatenate([src, end], axis=1),
            "tgt": np.concatenate([start, targets[:, :-1]], axis=1),
            "targets": targets,
        }

    def _hide(self, tokens: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns sources and targets, without their end tokens."""
        b, length = tokens.shape
        noise, spans = _count(length, self.noise_density, self.mean_span)
        if not spans:
            return tokens, tokens[:, :0]
        kept = _segments(uniform(numbers, max(length - noise - 1, 0), 0), length - noise, spans)
        hidden = _segments(uniform(numbers, max(noise - 1, 0), 1), noise, spans)
        # Kept and hidden segments alternate, and a kept one comes first.
        ends = np.cumsum(np.stack([kept, hidden], axis=2).reshape(b, -1), axis=1)
        begins = np.zeros((b, length + 1), np.int64)
        begins[np.arange(b)[:, None], ends[:, :-1]] = 1
        segment = np.cumsum(begins, axis=1)[:, :-1]
        is_begin = begins[:, :-1] == 1
        is_begin[:, 0] = True
        sentinels = self.sentinels[segment // 2]
        is_hidden = segment % 2 == 1
        src, targets = (
            np.where(gone, sentinels, tokens)[~gone | is_begin].reshape(b, -1)
            for gone in (is_hidden, ~is_hidden)
        )
        return src, targets


def _count(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Returns how many tokens to hide, and in how many spans: as in T5, at least one of each.

    A single token is not hidden, since the encoder would have nothing to read.
    """
    noise = min(max(round(length * noise_density), 1), length - 1)
    # There is at least one visible token before each span.
    return noise, max(min(1, noise), min(round(noise / mean_span), length - noise))


def _segments(random: np.ndarray, items: int, count: int) -> np.ndarray:
    """Returns (b, count) random lengths of at least 1 with the sum `items`, all equally likely."""
    b = len(random)
    cuts = np.sort(np.argsort(random, axis=1)[:, : count - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=np.zeros((b, 1), int), append=np.full((b, 1), items))


def _check_noise(noise_density: Any, mean_span: Any) -> None:
    check_rate(noise_density=noise_density)
    check_positive(noise_density=noise_density, mean_span=mean_span)
    if mean_span < 1:
        raise ValueError(f"mean_span must be at least 1 token, got {mean_span!r}.")
