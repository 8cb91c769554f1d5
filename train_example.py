"""Trains a Transformer from scratch on one of three tasks.

    python train_example.py                 an encoder-decoder learns to reverse sequences
    python train_example.py copy            a language model learns to repeat a sequence
    python train_example.py shakespeare     a language model learns to write, by characters

Each task prints its result and saves its loss curve. Ctrl-C ends the training early, and the result
is still printed. With --checkpoint DIR a run that was stopped or killed resumes when it is started
again.
"""

import argparse
import hashlib
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers import (
    AdamW,
    Checkpoints,
    FeedForward,
    RotaryPositionalEncoding,
    Transformer,
    TransformerLM,
    digest,
    evaluate,
    fit,
    keep_compiled_programs,
    language_model_loss,
    sequence_to_sequence_loss,
    warmup_cosine,
)
from jaxformers.data import Windows

try:
    from jaxformers.plot import loss_curve
except ImportError as error:
    sys.exit(str(error))  # before the training

PAD, START, END = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 4, 16
HELD_OUT = 2000

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class Task:
    """A task: a model, its loss, its batches, and a function that prints the result."""

    model: eqx.Module
    loss: Callable
    batches: Any
    report: Callable[[eqx.Module], None]
    eval_batches: Windows | None = None


@dataclass
class Drawn:
    """Batches by number. Each has its own random generator, so a run can resume at any step."""

    draw: Callable[[np.random.Generator], dict[str, np.ndarray]]
    seed: int

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.draw(np.random.default_rng((self.seed, i)))


# Sequences of letters, for the reverse and the copy task.


def letters(rng: np.random.Generator, count: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns random sequences (count, LONGEST) padded on the right, and their lengths.

    A checksum of a sequence decides whether it is held out, so no held-out one is trained on.
    """
    rows: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    while sum(len(row) for row in rows) < count:
        length = rng.integers(SHORTEST, LONGEST + 1, 4 * count)
        row = rng.integers(END + 1, END + 1 + len(LETTERS), (4 * count, LONGEST))
        row = np.where(np.arange(LONGEST) < length[:, None], row, PAD)
        checksum = (row * (np.arange(LONGEST) + 31)).sum(1) % 5
        rows.append(row[(checksum == 0) == held_out])
        lengths.append(length[(checksum == 0) == held_out])
    return np.concatenate(rows)[:count], np.concatenate(lengths)[:count]


def spell(tokens: np.ndarray) -> str:
    """Returns the letters of a sequence."""
    return "".join(LETTERS[t - END - 1] for t in tokens if t > END)


def report_exact_match(kind: str, sources, answers, wanted) -> None:
    """Prints a few examples and the share of held-out sequences without a single mistake."""
    for source, answer in list(zip(sources, answers, strict=True))[:5]:
        print(f"  {spell(source):>{LONGEST}} -> {spell(answer)}")
    exact = np.mean([np.array_equal(a, w) for a, w in zip(answers, wanted, strict=True)])
    print(f"{kind}: {100 * exact:.2f} % of {len(sources)} held-out sequences exactly right")


def until_end(row: np.ndarray) -> np.ndarray:
    """Returns the tokens before the first end token."""
    ends = np.flatnonzero(row == END)
    return row[: ends[0]] if ends.size else row


def reverse_task(args: argparse.Namespace) -> Task:
    """Returns the task of an encoder-decoder whose target is the source backwards."""
    vocabulary = END + 1 + len(LETTERS)
    model = Transformer(
        vocabulary,
        vocabulary,
        d_model=args.d_model,
        num_heads=args.num_heads,
        num_encoder_layers=args.num_layers,
        num_decoder_layers=args.num_layers,
        d_ff=4 * args.d_model,
        max_seq_length=LONGEST + 1,
        dropout_rate=args.dropout,
        key=jax.random.key(args.seed),
    )

    def backwards(row, length):
        return np.where(
            np.arange(LONGEST) < length[:, None],
            np.take_along_axis(row, (length[:, None] - 1 - np.arange(LONGEST)) % LONGEST, 1),
            PAD,
        )

    def batch(rng):
        src, length = letters(rng, args.batch_size, held_out=False)
        answer = np.pad(backwards(src, length), ((0, 0), (1, 1)))
        answer[:, 0] = START
        answer[np.arange(len(src)), length + 1] = END
        real = np.arange(LONGEST + 1) <= length[:, None]
        return {
            "src": src,
            "src_padding_mask": src != PAD,
            "tgt": np.where(real, answer[:, :-1], PAD),
            "targets": answer[:, 1:],
            "tgt_padding_mask": real,
        }

    def report(model):
        src, length = letters(np.random.default_rng(args.seed + 1), HELD_OUT, held_out=True)
        out = model.generate(src, LONGEST + 1, START, END, src_padding_mask=src != PAD)
        answers = [until_end(row[1:]) for row in np.asarray(out)]
        wanted = [row[:n] for row, n in zip(backwards(src, length), length, strict=True)]
        report_exact_match("reverse", src, answers, wanted)

    return Task(model, sequence_to_sequence_loss, Drawn(batch, args.seed), report)


def copy_task(args: argparse.Namespace) -> Task:
    """Returns the task of a language model that repeats the sequence before a separator."""
    model = TransformerLM(
        END + 1 + len(LETTERS),
        d_model=args.d_model,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        d_ff=4 * args.d_model,
        dropout_rate=args.dropout,
        position=RotaryPositionalEncoding(),
        key=jax.random.key(args.seed),
    )

    def batch(rng):
        rows, lengths = letters(rng, args.batch_size, held_out=False)
        text = np.full((len(rows), 2 * LONGEST + 2), PAD)
        for row, n, out in zip(rows, lengths, text, strict=True):
            out[: 2 * n + 2] = [*row[:n], START, *row[:n], END]
        place = np.arange(2 * LONGEST + 1)
        return {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "padding_mask": place < 2 * lengths[:, None] + 1,
            # Only the copy can be predicted, since the sequence itself is random.
            "loss_mask": (place >= lengths[:, None]) & (place < 2 * lengths[:, None] + 1),
        }

    def report(model):
        rows, lengths = letters(np.random.default_rng(args.seed + 1), HELD_OUT, held_out=True)
        prompt = np.pad(rows, ((0, 0), (0, 1)))
        prompt[np.arange(HELD_OUT), lengths] = START
        out = model.generate(prompt, LONGEST + 1, end_token=END, padding_mask=prompt != PAD)
        answers = [until_end(row[LONGEST + 1 :]) for row in np.asarray(out)]
        wanted = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        report_exact_match("copy", rows, answers, wanted)

    return Task(model, language_model_loss, Drawn(batch, args.seed), report)


# Text, for the Shakespeare task.


def shakespeare_text(path: Path | None) -> str:
    """Returns the given text, or tiny-shakespeare, which is downloaded, checked and cached."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            sys.exit(f"--data {path} is not UTF-8 text: {error}")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cached = Path(home) / "jaxformers" / "tinyshakespeare.txt"
    if not cached.exists():
        print(f"downloading tiny-shakespeare to {cached}")
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                data = response.read()
        except (urllib.error.URLError, TimeoutError) as error:
            sys.exit(
                f"could not download tiny-shakespeare: {error}.\nWithout a network, pass the text "
                f"as --data FILE (any UTF-8 text works), or put it at {cached}."
            )
        check_sha256(data, "the download")
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial_file = cached.with_suffix(f".{os.getpid()}")
        partial_file.write_bytes(data)
        partial_file.replace(cached)
    data = cached.read_bytes()
    check_sha256(data, str(cached))
    return data.decode()


def check_sha256(data: bytes, what: str) -> None:
    """Ends the program unless the data is tiny-shakespeare."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        sys.exit(
            f"{what} is not tiny-shakespeare: {len(data)} bytes with SHA-256 {digest}, expected "
            f"1115394 bytes with {SHAKESPEARE_SHA256}. Delete it, or pass a text as --data FILE."
        )


def shakespeare_task(args: argparse.Namespace) -> Task:
    """Returns the task of a language model over characters; the last tenth is held out."""
    text = shakespeare_text(args.data)
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    tokens = np.array([index[c] for c in text], np.int32)
    split = int(0.9 * len(tokens))
    if len(tokens) - split <= args.context:
        sys.exit(
            f"the text has {len(tokens)} characters, too few for a tenth to be longer than "
            f"--context {args.context}. Pass a longer text or a shorter --context."
        )
    train, held_out = tokens[:split], tokens[split:]
    print(f"{len(text):,} characters, {len(characters)} different, the last 10 % held out")
    model = TransformerLM(
        len(characters),
        d_model=args.d_model,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        d_ff=4 * args.d_model,
        dropout_rate=args.dropout,
        feed_forward=partial(FeedForward, activation=jax.nn.gelu),
        position=RotaryPositionalEncoding(),
        window=args.context,  # so that the sample may be longer than the training windows
        key=jax.random.key(args.seed),
    )

    # Windows side by side over the held-out text: every character counts once.
    held_out_windows = Windows(held_out, args.context, batch_size=64)

    def report(model):
        loss = evaluate(model, held_out_windows, loss=language_model_loss)
        print(f"validation loss {loss:.4f} nats per character, perplexity {np.exp(loss):.3f}")
        prompt = jnp.array([[index.get("\n", 0)]])
        sample = model.generate(prompt, 500, temperature=0.8, key=jax.random.key(args.seed))
        print("sample at temperature 0.8:\n")
        print("".join(characters[i] for i in np.asarray(sample)[0]))

    batches = Windows(train, args.context, args.batch_size, args.seed)
    return Task(model, language_model_loss, batches, report, held_out_windows)


# The command line. --help shows the defaults of each task beside the option.

TASKS = {"reverse": reverse_task, "copy": copy_task, "shakespeare": shakespeare_task}
DEFAULTS = {
    "steps": (1200, 1500, 5000),
    "batch_size": (128, 128, 12),
    "learning_rate": (2e-3, 2e-3, 3e-3),
    "d_model": (64, 64, 128),
    "num_heads": (4, 4, 4),
    "num_layers": (2, 3, 4),
    "dropout": (0.0, 0.0, 0.0),
}
HELP = {
    "steps": "number of updates",
    "batch_size": "sequences per update",
    "learning_rate": "highest learning rate, after the warm-up",
    "d_model": "width of the residual stream",
    "num_heads": "attention heads",
    "num_layers": "layers (of the encoder and of the decoder)",
    "dropout": "dropout rate",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=TASKS, default="reverse")
    for name, values in DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        text = (
            f"{HELP[name]} ({', '.join(f'{t}: {v}' for t, v in zip(TASKS, values, strict=True))})"
        )
        parser.add_argument(flag, type=type(values[0]), help=text)
    parser.add_argument(
        "--warmup", type=int, default=100, help="steps of the warm-up (%(default)s)"
    )
    parser.add_argument(
        "--weight-decay", type=float, default=0.1, help="weight decay of AdamW (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and data (%(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="directory to save to, and to resume from if it has a run"
    )
    parser.add_argument(
        "--save-every", type=int, default=500, help="steps between two checkpoints (%(default)s)"
    )
    parser.add_argument("--curve", type=Path, help="file of the loss curve (runs/TASK.png)")
    shakespeare = parser.add_argument_group("shakespeare only")
    shakespeare.add_argument("--data", type=Path, help="a UTF-8 text instead of tiny-shakespeare")
    shakespeare.add_argument("--context", type=int, help="characters per window (128)")
    shakespeare.add_argument("--eval-every", type=int, help="steps between validations (500)")
    args = parser.parse_args(argv)
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, dict(zip(TASKS, values, strict=True))[args.task])
    for name, value in {"data": None, "context": 128, "eval_every": 500}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif args.task != "shakespeare":
            parser.error(f"--{name.replace('_', '-')} goes with the task shakespeare")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    if args.curve is not None and args.curve.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--curve {args.curve}: must end in .png, .pdf or .svg")
    for name in ("steps", "batch_size", "warmup", "save_every", "context", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.warmup = min(args.warmup, args.steps)
    args.curve = args.curve or Path("runs") / f"{args.task}.png"
    try:
        args.curve.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--curve {args.curve}: {error}")
    return args


def train(task: Task, args: argparse.Namespace) -> eqx.Module:
    """Trains with AdamW, warm-up and cosine decay, and draws the loss curve."""
    rate = warmup_cosine(args.learning_rate, args.warmup, args.steps, 0.05 * args.learning_rate)
    begin = time.perf_counter()
    training = fit(
        task.model,
        AdamW(rate, b2=0.99, weight_decay=args.weight_decay, max_grad_norm=1.0),
        task.batches,
        loss=task.loss,
        steps=args.steps,
        key=jax.random.key(args.seed),
        eval_batches=task.eval_batches,
        eval_every=args.eval_every,
        checkpoint=args.checkpoint and Checkpoints(args.checkpoint, every=args.save_every),
        log=args.checkpoint or args.curve.with_suffix(""),
    )
    loss_curve(args.checkpoint or args.curve.with_suffix(""), args.curve, title=args.task)
    seconds = time.perf_counter() - begin
    print(f"trained to step {training.step} of {args.steps} in {seconds:.0f} s")
    print(f"loss curve: {args.curve}")
    return training.model


def main(argv: list[str] | None = None) -> None:
    """Trains on the task that the command line names."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if directory := keep_compiled_programs():
        print(f"compiled programs are kept in {directory}")
    try:
        task = TASKS[args.task](args)
        count = sum(x.size for x in jax.tree.leaves(task.model))
        print(f"{args.task}: a {type(task.model).__name__} with {count:,} parameters")
        model = train(task, args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit("\n".join([f"train_example.py: {error}", *getattr(error, "__notes__", [])]))
    task.report(model)
    print(f"weights sha256 {digest(model)}")


if __name__ == "__main__":
    main()
