"""Texts as classes, and pairs of texts as scores."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformers.checks import check_size, explain_options
from jaxformers.elsewhere import TEXTS
from jaxformers.files.json_file import shorten
from jaxformers.one_program import TokenRows, one_program
from jaxformers.text.batches import Reader, Texts, check_length, check_reader
from jaxformers.text.directory import find_directory, length_limit, read_tokenizer
from jaxformers.text.sentence_transformers import describe_classifier
from jaxformers.tokenizers.tokenizer import Tokenizer
from jaxformers.transformer_encoder import TransformerEncoder

KINDS = ("regression", "single_label_classification", "multi_label_classification")


class Label(NamedTuple):
    """A class of a text.

    Arguments:
        label: its name.
        probability: that the text is of this class; None of a regression.
        score: the logit of the class, or the value of a regression.

    Example:
        >>> Label("good", probability=0.9, score=2.2).label
        'good'
    """

    label: str
    probability: float | None
    score: float


class TextClassifier:
    """A classifier of texts or of pairs of texts, with its tokenizer.

    It is usually made by `from_pretrained`. Texts are sorted by length and read in batches of a few
    sizes, so that a new number of texts and new lengths compile nothing after `warm_up`. A text
    beyond `max_seq_length` is cut off, of a pair first the longer one.

    Arguments:
        model: an encoder with a classifier of sequences.
        tokenizer: makes its tokens.
        labels: the names of the classes; None is those of the checkpoint that the model came from,
            or else LABEL_0, LABEL_1 and so on.
        kind: "single_label_classification", whose probabilities add up to 1,
            "multi_label_classification", whose classes do not exclude each other, or "regression".
            None is what the checkpoint says, or else the first, or the second for a single class.
        max_seq_length: the largest number of tokens of a text or pair, special tokens included;
            None is the model's.
        prompt: a text that is put before each text, and not before the second of a pair.

    Raises:
        ValueError: if the model has no such classifier, or an argument is not of this kind.

    Example:
        >>> import tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = tokenizers.Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
        >>> tokenizer = Tokenizer({"tokenizer.json": words.to_str().encode()})
        >>> head = partial(Classifier, num_labels=2)
        >>> model = TransformerEncoder(3, 16, 2, 1, 32, 32, classifier=head, key=key)
        >>> classifier = TextClassifier(model, tokenizer, labels=["bad", "good"])
        >>> classifier("a").label in ("bad", "good")
        True
        >>> [len(labels) for labels in classifier(["a", "b", "a"], top_k=2)]
        [2, 2, 2]
    """

    model: TransformerEncoder
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    kind: str

    def __init__(
        self,
        model: TransformerEncoder,
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str] | None = None,
        kind: str | None = None,
        max_seq_length: int | None = None,
        prompt: str = "",
    ):
        check_reader(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        count = _count(model)
        config = {} if model.origin is None else json.loads(model.origin.config)
        self.labels = _names(labels, config, count)
        kind = config.get("problem_type") if kind is None else kind
        if kind is None:
            kind = "multi_label_classification" if count == 1 else "single_label_classification"
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shorten(kind)}.")
        self.kind = kind
        if max_seq_length is not None:
            check_size(max_seq_length=max_seq_length)
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a text, got {shorten(prompt)}.")
        self._max_seq_length, self._prompt = max_seq_length, prompt

    @classmethod
    @partial(explain_options, elsewhere=TEXTS)
    def from_pretrained(
        cls,
        path_or_hub_name: str | os.PathLike,
        *,
        dtype: Any = None,
        sharding: Mesh | Sharding | Callable | None = None,
        quantized: bool = False,
        max_seq_length: int | None = None,
    ) -> "TextClassifier":
        """Returns the classifier of a checkpoint, or a CrossEncoder of sentence-transformers.

        Arguments:
            path_or_hub_name: a directory, or a name on the hub, which needs `huggingface_hub`.
            dtype, sharding, quantized: as in `jaxformers.from_pretrained`.
            max_seq_length: the largest number of tokens of a text; None is the least of
                `model_max_length` of the tokenizer and what the model knows.

        Raises:
            ValueError: if a file is missing or damaged, or the model is no classifier of texts.
            ImportError: if a package is missing.
        """
        described = describe_classifier(find_directory(path_or_hub_name))
        options: dict[str, Any] = dict(dtype=dtype, sharding=sharding, quantized=quantized)
        model = TransformerEncoder.from_pretrained(described.transformer, **options)
        tokenizer = read_tokenizer(described)
        limit = length_limit(described) if max_seq_length is None else max_seq_length
        prompt = described.prompts.get(described.default_prompt or "", "")
        return cls(model, tokenizer, max_seq_length=limit, prompt=prompt)

    @property
    def max_seq_length(self) -> int | None:
        """The largest number of tokens of a text, special tokens included; None if no limit."""
        return self._reader(1).limit

    @partial(explain_options, elsewhere=TEXTS)
    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        batch_size: int = 32,
        *,
        top_k: int | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Returns the most probable class of each text, in the order of the texts.

        Arguments:
            texts: one text, or a list of n texts, which may be empty.
            pairs: a second text for each, for models that compare two texts.
            batch_size: the number of texts that are read at once, 32.
            top_k: so many classes of each text, the most probable first, as a list; None is the
                most probable one alone. `len(labels)` gives all.
            progress: whether to show a progress bar on standard error. None shows it for a thousand
                texts and more, on a terminal where tqdm is installed.

        Returns:
            A `Label` for one text, a list of them for a list; with `top_k` lists of them.

        Raises:
            ValueError: if texts are not strings, pairs do not fit them, or an option is not valid.
        """
        if top_k is not None:
            check_size(top_k=top_k)
            if top_k > len(self.labels):
                raise ValueError(
                    f"top_k must be at most the number of classes, {len(self.labels)}, got {top_k}."
                )
        scores = self.scores(texts, pairs, batch_size, progress=progress)
        found = [self._best(row, top_k or 1) for row in np.atleast_2d(scores)]
        answers = found if top_k is not None else [labels[0] for labels in found]
        return answers[0] if isinstance(texts, str) else answers

    def scores(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        batch_size: int = 32,
        *,
        progress: bool | None = None,
    ) -> Float[np.ndarray, "*n c"]:
        """Returns the logits of all classes, in the order of `labels`.

        They are the values of a regression, and what a reranker sorts by. Arguments and errors are
        those of a call.

        Returns:
            float32, `(n, c)`, or `(c,)` for one text.
        """
        check_size(batch_size=batch_size)
        given = Texts.of(texts, pairs, self._prompt)
        reader = self._reader(batch_size)
        scores = reader.run(given, self._compute, len(self.labels), progress)
        return scores if given.is_list else scores[0]

    def probabilities(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        batch_size: int = 32,
        *,
        progress: bool | None = None,
    ) -> Float[np.ndarray, "*n c"]:
        """Returns the probabilities of all classes, as `scores` returns the logits.

        Raises:
            ValueError: if the model is a regression; and as for `scores`.
        """
        if self.kind == "regression":
            raise ValueError("a regression has no probabilities: scores(texts) gives its values.")
        return self._probabilities(self.scores(texts, pairs, batch_size, progress=progress))

    def warm_up(self, max_length: int | None = None, batch_size: int = 32) -> float:
        """Compiles ahead, and returns how many seconds that took.

        After it no call compiles whose `batch_size` is the same and whose texts or pairs have at
        most `max_length` tokens.

        Arguments:
            max_length: the largest number of tokens; None is `max_seq_length`.
            batch_size: as in a call.
        """
        check_size(batch_size=batch_size)
        length = check_length(max_length, self.max_seq_length)
        return self._reader(batch_size).warm_up(self._compute, length)

    def __repr__(self) -> str:
        return (
            f"TextClassifier(labels={shorten(self.labels)}, kind={self.kind!r}, "
            f"max_seq_length={self.max_seq_length})"
        )

    def _reader(self, batch_size: int) -> Reader:
        return Reader(self.model, self.tokenizer, self._max_seq_length, batch_size)

    def _compute(self, rows: TokenRows) -> Array:
        return one_program(_classes, self.model, rows, per_token=False, keep_shapes=True)

    def _probabilities(self, scores: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n c"]:
        if self.kind == "multi_label_classification":
            return np.float32(1) / (1 + np.exp(-np.clip(scores, -80, 80)))
        exp = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
        return exp / exp.sum(-1, keepdims=True)

    def _best(self, scores: Float[np.ndarray, " c"], k: int) -> list[Label]:
        """Returns the k most probable classes."""
        chances = [None] * len(scores)
        if self.kind != "regression":
            chances = self._probabilities(scores).tolist()
        best = np.argsort(-scores, kind="stable")[:k]
        return [Label(self.labels[i], chances[i], float(scores[i])) for i in best]


def _classes(
    model: TransformerEncoder, rows: TokenRows, *, key: PRNGKeyArray | None = None
) -> Float[Array, "b c"]:
    return model.classify(rows.tokens, rows.mask, token_types=rows.token_types)


def _count(model: Any) -> int:
    """Returns the number of classes of a model, or raises if it does not classify texts."""
    head = model.classifier if isinstance(model, TransformerEncoder) else None
    if head is None:
        raise ValueError(
            "model must be an encoder with a classifier, got one without. Load a checkpoint whose "
            "class ends with ForSequenceClassification."
        )
    if head.pooling == "none":
        raise ValueError(
            "model classifies each token (ForTokenClassification), not texts. model.classify("
            "tokens) of from_pretrained gives the logits of each token."
        )
    return int(head.out.w.shape[1])


def _names(labels: Any, config: dict[str, Any], count: int) -> tuple[str, ...]:
    """Returns the names of the classes, given or of config.json."""
    if labels is not None:
        is_list = isinstance(labels, list | tuple) and all(isinstance(x, str) for x in labels)
        if not is_list or len(labels) != count or len(set(labels)) != count:
            raise ValueError(
                f"labels must be a list of names, a different one for each of the {count} classes, "
                f"got {shorten(labels)}."
            )
        return tuple(labels)
    given = config.get("id2label")
    names = [f"LABEL_{i}" for i in range(count)]
    if isinstance(given, dict) and len(given) == count:
        names = [str(given.get(str(i), name)) for i, name in enumerate(names)]
    return tuple(names)
