"""How probable texts are, and the choice between some."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxformers.files.json_file import shorten
from jaxformers.generation.scoring import score_continuations
from jaxformers.mistakes import special_of
from jaxformers.text.batches import longest_first
from jaxformers.text.call import encode_rows
from jaxformers.tokenizers.tokenizer import Tokenizer
from jaxformers.transformer import Transformer

# A batch has at most so many tokens, because the program holds the log-probabilities of the whole
# vocabulary for each of them.
MOST_TOKENS = 2048


class TextScore(NamedTuple):
    """The log-probability of each token of a text, given all before it.

    Arguments:
        tokens: the ids that are scored.
        log_probs: float32, one for each.
    """

    tokens: list[int]
    log_probs: Float[np.ndarray, " t"]

    @property
    def total(self) -> float:
        """The log-probability of the text."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability per token."""
        return float(np.exp(-self.log_probs.mean(dtype=np.float64)))


def score_texts(
    model: Any, tokenizer: Tokenizer, texts: list[str], given: list[str] | None
) -> list[TextScore]:
    """Returns the score of each text, after what is given.

    Arguments:
        model, tokenizer: of the generator.
        texts: what is scored.
        given: a prompt for each, or the source of an encoder-decoder; None is no prompt.
    """
    sources: list[list[int]] | None = None
    if isinstance(model, Transformer):
        if given is None:
            raise ValueError(
                "an encoder-decoder scores a text as the target of a source, got no source. Pass "
                "it as given=."
            )
        sources, start = encode_rows(tokenizer, given), start_of(model)
        rows = [[start, *row] for row in encode_rows(tokenizer, texts)]
        begins = [1] * len(rows)
    elif given is None:
        rows = encode_rows(tokenizer, texts)
        begins = [1] * len(rows)
    else:
        rows = encode_rows(tokenizer, [a + b for a, b in zip(given, texts, strict=True)])
        pairs = zip(encode_rows(tokenizer, given), rows, strict=True)
        # Nothing comes before the first token, and so it has no score.
        begins = [max(common_length(pair), 1) for pair in pairs]
    for text, row, begin in zip(texts, rows, begins, strict=True):
        if begin >= len(row):
            raise ValueError(
                f"a text must have a token to score, after one that comes before it, got "
                f"{shorten(text)}, which is {len(row)} with what is given. Pass a longer text, or "
                "another one as given=."
            )
    scores: list[Any] = [None] * len(rows)
    for part in cut_batches(list(map(len, rows))):
        targets = [rows[i] for i in part]
        inputs = [targets] if sources is None else [[sources[i] for i in part], targets]
        found = np.asarray(model.score(*inputs))
        for i, line in zip(part, found, strict=True):
            scores[i] = line[len(line) - len(rows[i]) + begins[i] :]
    return [
        TextScore(row[begin:], line) for row, begin, line in zip(rows, begins, scores, strict=True)
    ]


def choose(
    model: Any, tokenizer: Tokenizer, prompt: str, answers: list[str], is_chat: bool = False
) -> dict[str, float]:
    """Returns the probability of each answer, given that one of them continues the prompt.

    Arguments:
        model, tokenizer: of the generator.
        prompt: the text before the answer, or the source of an encoder-decoder.
        answers: at least two different texts.
        is_chat: whether the prompt has its special tokens already.
    """
    if len(set(answers)) < max(2, len(answers)) or "" in answers:
        raise ValueError(
            "answers must be at least two different texts that are not empty, got "
            f"{shorten(answers)}."
        )
    if isinstance(model, Transformer):
        source = encode_rows(tokenizer, [prompt])
        # The end token would ask for the end of the text, which a beginning has not.
        rows = encode_rows(tokenizer, answers, add_special_tokens=False)
        rows = [[start_of(model), *row] for row in rows]
    else:
        source = None
        rows = encode_rows(tokenizer, [prompt + x for x in answers], not is_chat)
    if len(set(map(tuple, rows))) < len(rows):
        raise ValueError(
            f"answers must differ in their tokens, got {shorten(answers)}: this tokenizer writes "
            "some of them with the same tokens. Leave one of these out."
        )
    shared = min(common_length(rows), min(map(len, rows)) - 1)
    if shared < 1:
        raise ValueError(
            "prompt must have at least one token before the answers, got "
            f"{shorten(prompt)}, and this tokenizer adds no start token. Pass a longer prompt."
        )
    scores = score_continuations(model, rows[0][:shared], [row[shared:] for row in rows], source)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    return dict(zip(answers, probabilities.tolist(), strict=True))


def start_of(model: Any) -> int:
    """Returns the first token of an encoder-decoder's targets.

    Raises:
        ValueError: if its checkpoint names none.
    """
    start = special_of(model.origin).start_token
    if start is None:
        raise ValueError("the checkpoint of this encoder-decoder names no start token for targets.")
    return start


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens all rows have in common at their beginning."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return next((i for i, one in enumerate(same) if not one), min(map(len, rows)))


def cut_batches(lengths: list[int]) -> list[list[int]]:
    """Returns the indices of rows in batches of similar length, of at most `MOST_TOKENS` each."""
    found: list[list[int]] = []
    for i in longest_first(lengths).tolist():
        longest = lengths[found[-1][0]] if found else 0
        if not found or (len(found[-1]) + 1) * longest > MOST_TOKENS:
            found.append([])
        found[-1].append(i)
    return found
