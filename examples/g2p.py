"""Trains a small encoder-decoder that predicts the pronunciation of words (grapheme to phoneme).

    python examples/g2p.py --data DIR --language fre           train, evaluate on the dev words
    python examples/g2p.py --data DIR --language fre --test    evaluate on the test words as well

DIR holds LANGUAGE_train.tsv and, optionally, LANGUAGE_dev.tsv and LANGUAGE_test.tsv, as in
SIGMORPHON 2020 task 1 (Gorman et al. 2020). A line is a word, a tab, and its phones with spaces
between them. A word with several pronunciations has several lines.

One model predicts the phones of a word from left to right or from right to left. A tag before the
word selects the direction. Both directions propose the results of a beam search. The prediction is
the proposal with the highest product of its probabilities in both directions. The model learns from
the train words alone. The dev words serve to choose settings.
"""

import argparse
import sys
import time
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import numpy as np

from jaxformers import (
    AdamW,
    Averaged,
    Checkpoints,
    FeedForward,
    RotaryPositionalEncoding,
    Transformer,
    fit,
    keep_compiled_programs,
    sequence_to_sequence_loss,
    warmup_cosine,
)
from jaxformers.data import Changed, PaddedPairs

START, END, UNKNOWN, FORWARDS, BACKWARDS = 1, 2, 3, 4, 5
SPECIAL = 6  # the ids below are these and padding, 0
DIRECTIONS = (FORWARDS, 1), (BACKWARDS, -1)
BEAMS, AT_ONCE = 5, 150  # beams of a word, and words that are predicted together

Form = Literal["NFC", "NFD"]  # of Unicode: composed letters; letters and their marks
FORMS: tuple[Form, ...] = "NFC", "NFD"
Phones = tuple[str, ...]
Words = dict[str, list[Phones]]  # each word with its pronunciations


def read_words(path: Path) -> Words:
    """Returns the words of a file and their pronunciations, in the order of the file."""
    words: Words = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        word, *rest = (field.strip() for field in line.split("\t"))
        if len(rest) != 1 or not word or not rest[0]:
            raise ValueError(
                f"{path}, line {number}: expected a word, one tab, and phones with spaces between "
                f"them, got {line!r}."
            )
        words.setdefault(unicodedata.normalize("NFC", word), []).append(tuple(rest[0].split()))
    if not words:
        raise ValueError(f"{path}: the file is empty, expected lines of a word, a tab, its phones.")
    return words


class Spelling:
    """The ids of the letters and phones of a language."""

    def __init__(self, words: Words):
        pronunciations = [phones for each in words.values() for phones in each]
        forms = {form: sorted(set(unicodedata.normalize(form, "".join(words)))) for form in FORMS}
        # Vietnamese has any tone on any vowel. Split into letters and marks there are half as many
        # symbols, and a pair that never occurred can be read. Elsewhere words only become longer.
        self.form: Form = "NFD" if 2 * len(forms["NFD"]) <= len(forms["NFC"]) else "NFC"
        self.letters = forms[self.form]
        self.phones = sorted({phone for phones in pronunciations for phone in phones})
        self.letter_ids = {x: SPECIAL + i for i, x in enumerate(self.letters)}
        self.phone_ids = {x: SPECIAL + i for i, x in enumerate(self.phones)}
        self.longest = 2 * max(map(len, pronunciations)) + 10  # other words may have more

    def read(self, word: str, direction: int) -> list[int]:
        """Returns the ids of a word for the encoder; letters that never occurred are unknown."""
        letters = unicodedata.normalize(self.form, word)
        return [direction, *(self.letter_ids.get(letter, UNKNOWN) for letter in letters)]

    def pairs(self, words: Words) -> list[tuple[list[int], list[int]]]:
        """Returns the source and the target of each pronunciation in both directions."""
        return [
            (self.read(word, tag), [self.phone_ids[phone] for phone in phones[::order]])
            for word, pronunciations in words.items()
            for phones in pronunciations
            for tag, order in DIRECTIONS
        ]


class SomeUnknown(Changed):
    """Batches in which 3 % of the letters are unknown, so that the model learns to read these."""

    def change(self, batch: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the batch with some letters replaced."""
        src = batch["src"]
        forget = np.random.default_rng(numbers).random(src.shape) < 0.03
        return {**batch, "src": np.where(forget & (src >= SPECIAL), UNKNOWN, src)}


def build_model(spelling: Spelling, args: argparse.Namespace) -> Transformer:
    """Returns a small encoder-decoder, pre-norm, with rotary positions."""
    return Transformer(
        SPECIAL + len(spelling.letters),
        SPECIAL + len(spelling.phones),
        d_model=args.d_model,
        num_heads=4,
        num_encoder_layers=args.num_layers,
        num_decoder_layers=args.num_layers,
        d_ff=4 * args.d_model,
        dropout_rate=args.dropout,
        attention_dropout_rate=args.dropout / 2,
        feed_forward=partial(FeedForward, activation=jax.nn.gelu),
        position=RotaryPositionalEncoding(),
        key=jax.random.key(args.seed),
    )


def train(spelling: Spelling, words: Words, args: argparse.Namespace) -> Transformer:
    """Trains a model and returns the running average of its weights."""
    model = build_model(spelling, args)
    count = sum(x.size for x in jax.tree.leaves(model))
    print(f"{len(words):,} words, a {type(model).__name__} with {count:,} parameters", flush=True)
    pairs = PaddedPairs(
        spelling.pairs(words), args.batch_size, start_token=START, end_token=END, seed=args.seed
    )
    rate = warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    optimizer = Averaged(AdamW(rate, b2=0.98, weight_decay=0.1, max_grad_norm=1.0), decay=0.99)
    training = fit(
        model,
        optimizer,
        SomeUnknown(pairs),
        loss=partial(sequence_to_sequence_loss, label_smoothing=0.1),
        steps=args.steps,
        key=jax.random.key(args.seed + 1),
        checkpoint=args.checkpoint and Checkpoints(args.checkpoint / args.language),
    )
    if training.step < args.steps:
        sys.exit(f"stopped at step {training.step}: a part of a training is not evaluated")
    return optimizer.averaged(training.model, training.optimizer_state)


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Returns ids `(rows, width)`, padded with 0."""
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)


def propose(
    model: Transformer, spelling: Spelling, words: Sequence[str], tag: int
) -> list[list[list[int]]]:
    """Returns the phone ids of each beam of each word, in the direction of `tag`."""
    rows = [spelling.read(word, tag) for word in words]
    src = pad(rows, max(map(len, rows)))
    beams = model.generate(
        src,
        spelling.longest,
        START,
        END,
        src_padding_mask=src != 0,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
    )
    spelled = [[i for i in row if i >= SPECIAL] for row in np.asarray(beams).tolist()]
    return [spelled[k : k + BEAMS] for k in range(0, len(spelled), BEAMS)]


@eqx.filter_jit
def log_probability(model: Transformer, src: np.ndarray, tgt: np.ndarray) -> jax.Array:
    """Returns the log-probability of each target given its source, `(b,)`; 0 is padding."""
    return model.score(src, tgt, src != 0, tgt != 0).sum(axis=1)


def predict(model: Transformer, spelling: Spelling, words: Sequence[str]) -> list[Phones]:
    """Returns the phones of each word: the proposal that is most probable in both directions."""
    proposed = [propose(model, spelling, words, tag) for tag, _ in DIRECTIONS]
    proposals = [
        [*forwards, *(ids[::-1] for ids in backwards)]
        for forwards, backwards in zip(*proposed, strict=True)
    ]
    totals = np.zeros((len(words), 2 * BEAMS))
    for tag, order in DIRECTIONS:
        rows = [spelling.read(word, tag) for word in words for _ in range(2 * BEAMS)]
        targets = [[START, *ids[::order], END] for each in proposals for ids in each]
        src, tgt = pad(rows, max(map(len, rows))), pad(targets, spelling.longest + 1)
        totals += np.asarray(log_probability(model, src, tgt)).reshape(totals.shape)
    best = totals.argmax(axis=1)
    return [
        tuple(spelling.phones[i - SPECIAL] for i in each[k])
        for each, k in zip(proposals, best, strict=True)
    ]


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Returns the least number of insertions, deletions and replacements from `a` to `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(
    predictions: Sequence[Phones], references: Sequence[list[Phones]]
) -> tuple[float, float]:
    """Returns the word error rate and the phone error rate in percent.

    A word is right if it equals one of its references. The phones of a word are compared with the
    nearest reference (the first of several). The sum of the distances is divided by the sum of the
    lengths of these references.
    """
    wrong = distance = length = 0
    for predicted, allowed in zip(predictions, references, strict=True):
        nearest = min(allowed, key=lambda phones: edit_distance(predicted, phones))
        wrong += predicted != nearest
        distance += edit_distance(predicted, nearest)
        length += len(nearest)
    return 100 * wrong / len(references), 100 * distance / length


def report(
    name: str, model: Transformer, spelling: Spelling, words: Words, path: Path | None
) -> None:
    """Prints the error rates, and writes the predictions if a path is given."""
    rows = list(words)
    parts = [rows[k : k + AT_ONCE] for k in range(0, len(rows), AT_ONCE)]
    predictions = [phones for part in parts for phones in predict(model, spelling, part)]
    wer, per = error_rates(predictions, list(words.values()))
    print(f"{name}: WER {wer:.2f} %, PER {per:.2f} % of {len(words)} words", flush=True)
    if path is not None:
        lines = [f"{w}\t{' '.join(p)}\n" for w, p in zip(words, predictions, strict=True)]
        path.write_text("".join(lines), encoding="utf-8")


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="directory of the files"
    )
    parser.add_argument(
        "--language", required=True, metavar="CODE", help="code of a language, such as fre"
    )
    parser.add_argument("--test", action="store_true", help="evaluate on the test words as well")
    parser.add_argument(
        "--predictions", type=Path, metavar="DIR", help="write the predictions to this directory"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="save to this directory and resume from it"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and data (%(default)s)"
    )
    for name, value, text in (
        ("steps", 3000, "number of updates"),
        ("batch-size", 128, "pairs per update"),
        ("learning-rate", 2e-3, "highest learning rate, after the warm-up"),
        ("d-model", 128, "width of the residual stream"),
        ("num-layers", 3, "layers of the encoder and of the decoder"),
        ("dropout", 0.3, "dropout rate; half of it on attention weights"),
    ):
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help=f"{text} (%(default)s)"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and prints the CPU time."""
    args = parse(sys.argv[1:] if argv is None else argv)
    keep_compiled_programs()
    try:
        run(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit("\n".join([f"g2p.py: {error}", *getattr(error, "__notes__", [])]))
    seconds = time.process_time()
    print(f"{seconds / 60:.1f} minutes of CPU time")


def run(args: argparse.Namespace) -> None:
    """Trains and evaluates. All files are read first, so that a missing one is an early error."""
    train_words = read_words(args.data / f"{args.language}_train.tsv")
    spelling = Spelling(train_words)
    held_out = {}
    for name in ("dev", "test") if args.test else ("dev",):
        path = args.data / f"{args.language}_{name}.tsv"
        if name == "dev" and not path.exists():
            print(f"no {path}: there are no dev words to evaluate on")
            continue
        held_out[name] = read_words(path)
    if args.predictions is not None:
        args.predictions.mkdir(parents=True, exist_ok=True)
    model = train(spelling, train_words, args)
    for name, words in held_out.items():
        path = args.predictions and args.predictions / f"{args.language}_{name}.tsv"
        report(name, model, spelling, words, path)


if __name__ == "__main__":
    main()
