"""Fine-tuning of a decoder from a checkpoint and a file of texts, as one resumable run.

`python -m jaxformers finetune` is this module on the command line. docs/finetuning.md has the same
written out in fifteen lines.
"""

import dataclasses
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformers.adapters import adapter_names, lora, save_adapter
from jaxformers.checkpoint.directory import Checkpoints
from jaxformers.checks import check_flag, check_positive, check_size
from jaxformers.data.conversations import Text, read_groups
from jaxformers.data.packing import PackedDocuments
from jaxformers.files.atomic import replace_json
from jaxformers.files.json_file import read_json
from jaxformers.optim import AdamW
from jaxformers.optim.schedules import warmup_cosine
from jaxformers.precision import cast_floating
from jaxformers.pretrained import from_pretrained
from jaxformers.tokenizers.tokenizer import Tokenizer, load_tokenizer
from jaxformers.trainability import trainable
from jaxformers.training.evaluation import evaluate
from jaxformers.training.log import read_metrics
from jaxformers.training.loop import fit
from jaxformers.training.objectives import language_model_loss
from jaxformers.transformer_lm import TransformerLM
from jaxformers.weights import merge

SETTINGS = "finetune.json"
LORA_RATE, FULL_RATE = 5e-4, 2e-5
WARMUP = 0.05  # of the steps
EVAL_SHARE = 0.05  # of the lines


@dataclass(frozen=True)
class FineTuning:
    """The settings of a fine-tuning.

    Arguments:
        model: the checkpoint of a decoder with its tokenizer, as `from_pretrained` reads it.
        data: the file of examples, see `jaxformers.data.read_examples`.
        out: the directory of the results, of the log and of the checkpoints of the run.
        rank: the rank of an adapter (LoRA), which is trained alone; None trains all weights.
        alpha: the numerator of the adapter's scale; None is twice the rank.
        steps: the number of steps; None is that of `epochs`.
        epochs: how often each example comes; None is 1, unless there are `steps`.
        batch_size: the number of rows in a batch, 8.
        length: the number of tokens in a row, 1024, or the longest that the model can read. Rows
            hold several examples, and longer examples are cut.
        learning_rate: the highest rate; None is 5e-4 for an adapter and 2e-5 for all weights.
        eval_data: a file of examples to evaluate on; None holds out a share of `data`.
        eval_share: that share of the lines; None is 0.05, unless there is `eval_data`.
        eval_every: the number of steps between evaluations, 100.
        save_every: the number of steps between checkpoints, 100.
        seed: the seed of the order, of the held-out lines, of the adapter and of dropout, 0.
        dtype: the type of the weights that are read, such as "bfloat16"; None is the file's.
        quantized: whether integers of a quantized checkpoint stay so below an adapter, False.
        merged: whether the model with the merged adapter is written too, False.

    Raises:
        ValueError: if a value is of another type or out of its range, two of them contradict each
            other, or `merged` or `quantized` is set without an adapter.
    """

    model: str
    data: str
    out: str
    rank: int | None = None
    alpha: float | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    length: int = 1024
    learning_rate: float | None = None
    eval_data: str | None = None
    eval_share: float | None = None
    eval_every: int = 100
    save_every: int = 100
    seed: int = 0
    dtype: str | None = None
    quantized: bool = False
    merged: bool = False

    def __post_init__(self) -> None:
        self._check_texts()
        sizes = ("batch_size", "length", "eval_every", "save_every")
        check_size(**{name: getattr(self, name) for name in sizes})
        optional = {"rank": self.rank, "steps": self.steps, "epochs": self.epochs}
        check_size(**{name: x for name, x in optional.items() if x is not None})
        rates = {"alpha": self.alpha, "learning_rate": self.learning_rate}
        check_positive(**{name: x for name, x in rates.items() if x is not None})
        check_flag(quantized=self.quantized, merged=self.merged)
        share = 0 if self.eval_share is None else self.eval_share
        if not (isinstance(share, float | int) and 0 <= share < 1):
            raise ValueError(f"eval_share must be a number in [0, 1), got {share!r}.")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise ValueError(f"seed must be an integer in [0, 2**32), got {self.seed!r}.")
        for pair in (("steps", "epochs"), ("eval_data", "eval_share")):
            if all(getattr(self, name) is not None for name in pair):
                raise ValueError(f"{' and '.join(pair)} contradict each other: pass one of them.")
        for name in ("alpha", "quantized", "merged"):
            if self.rank is None and getattr(self, name):
                raise ValueError(f"{name} is for an adapter: pass a rank too (--lora 16).")

    def _check_texts(self) -> None:
        for name in ("model", "data", "out", "eval_data", "dtype"):
            value, optional = getattr(self, name), name in ("eval_data", "dtype")
            if not isinstance(value, str) and not (value is None and optional):
                raise ValueError(f"{name} must be a text, got {value!r:.80}.")


@dataclass(frozen=True)
class FineTuned:
    """The result of a fine-tuning.

    Arguments:
        model: the model at the end.
        done: whether all steps were made; a run that was stopped goes on when it is started again.
        written: the directories of the results.
        summary: lines of text on losses, tokens, time and memory.
    """

    model: TransformerLM
    done: bool
    written: tuple[str, ...]
    summary: tuple[str, ...]


def finetune(settings: FineTuning, progress: bool = True) -> FineTuned:
    """Trains a model on examples, and writes the adapter or the model.

    The run goes on from its last checkpoint if the same settings are given again, and ends with
    the same bits as a run that was not stopped. Ctrl-C saves and stops it.

    Arguments:
        settings: what to train on what, and where results go: `out/adapter` (PEFT's format) and
            with `merged` also `out/merged`, or `out/model` without an adapter; `out/metrics.jsonl`,
            a line per step; `out/checkpoints`.
        progress: whether to show a progress bar on standard error.

    Raises:
        ValueError: if a file has no such content, the model is no decoder, or `out` has a run with
            other settings.
    """
    out, started = Path(settings.out), time.perf_counter()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file. Pass the directory of the results.")
    tokenizer = load_tokenizer(settings.model)
    train, held = split(settings, tokenizer)
    known = recorded(settings, out)
    model = load_model(settings)
    dtype = model.embedding.table.dtype
    batches = packed(settings, model, train)
    held_out = packed(settings, model, held) if held else None
    if held_out is not None and "before" not in known:
        known["before"] = float(evaluate(model, held_out, loss=language_model_loss))
    replace_json(out / SETTINGS, known)
    epochs = settings.epochs or 1
    steps = settings.steps or -(-epochs * batches.order.count // settings.batch_size)
    to_train = [model]  # `fit` frees the weights that it trains, unless a name holds them
    del model
    training = fit(
        to_train.pop(),
        AdamW(warmup_cosine(rate_of(settings), round(WARMUP * steps), steps), max_grad_norm=1.0),
        batches,
        loss=language_model_loss,
        steps=steps,
        key=jax.random.key(settings.seed),
        eval_batches=held_out,
        eval_every=settings.eval_every,
        checkpoint=Checkpoints(out / "checkpoints", every=settings.save_every),
        log=out,
        progress=progress,
    )
    done, model = int(training.step) == steps, training.model
    if settings.rank is None and done:
        model = cast_floating(model, dtype)
    written = write_results(settings, model, tokenizer) if done else ()
    seconds = time.perf_counter() - started
    return FineTuned(model, done, written, summary(out, known, training, seconds))


def load_model(settings: FineTuning) -> TransformerLM:
    """Returns the model to train: that of the checkpoint, on which an adapter may be."""
    base = from_pretrained(settings.model, dtype=settings.dtype, quantized=settings.quantized)
    if not isinstance(base, TransformerLM):
        raise ValueError(
            f"finetune is for decoders, and {settings.model} is a {type(base).__name__}. Train it "
            "with fit, see docs/training.md."
        )
    if adapter_names(base):
        raise ValueError(
            f"{settings.model} is an adapter. Merge it first, and train the result: "
            "merge(from_pretrained(path)).save_pretrained(directory)."
        )
    if settings.rank is None:
        return base
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    return lora(base, settings.rank, alpha, key=jax.random.key(settings.seed))


def split(settings: FineTuning, tokenizer: Tokenizer) -> tuple[list[Text], list[Text]]:
    """Returns the texts to train on and those to evaluate on, which may be none.

    Whole lines are held out. Of a single text it is the end.
    """
    groups = read_groups(settings.data, tokenizer)
    if settings.eval_data is not None:
        held = read_groups(settings.eval_data, tokenizer)
        return _flat(groups), _flat(held)
    share = EVAL_SHARE if settings.eval_share is None else settings.eval_share
    if share == 0:
        return _flat(groups), []
    if len(groups) == 1:
        return _without_end(groups[0], share)
    order = np.random.default_rng(settings.seed).permutation(len(groups)).tolist()
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    parts = sorted(order[:count]), sorted(order[count:])
    held, rest = ([groups[i] for i in part] for part in parts)
    return _flat(rest), _flat(held)


def _without_end(texts: list[Text], share: float) -> tuple[list[Text], list[Text]]:
    """Returns a text whose tokens all count, without its end, and that end; or all and nothing."""
    ids, counts = texts[0]
    at = round((1 - share) * len(ids))
    if len(texts) > 1 or not counts.all() or min(at, len(ids) - at) < 2:
        return texts, []
    return [(ids[:at], counts[:at])], [(ids[at:], counts[at:])]


def packed(settings: FineTuning, model: Any, texts: list[Text]) -> PackedDocuments:
    """Returns batches of texts."""
    length = min(settings.length, model.max_seq_length or settings.length)
    ids, counts = zip(*texts, strict=True)
    return PackedDocuments(list(ids), length, settings.batch_size, settings.seed, counts=counts)


def rate_of(settings: FineTuning) -> float:
    """Returns the highest learning rate."""
    usual = FULL_RATE if settings.rank is None else LORA_RATE
    return usual if settings.learning_rate is None else settings.learning_rate


def recorded(settings: FineTuning, out: Path) -> dict[str, Any]:
    """Returns the settings of the run in a directory, after a check that they are these.

    Raises:
        ValueError: if the directory has a run with other settings or data.
    """
    own = dataclasses.asdict(settings)
    del own["out"], own["merged"]  # the directory may be moved, and merging changes no step
    files = [x for x in (settings.data, settings.eval_data) if x is not None]
    own["digests"] = [hashlib.sha256(Path(x).read_bytes()).hexdigest() for x in files]
    path = out / SETTINGS
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        return {"settings": own}
    known = read_json(path)
    before = known.get("settings")
    before = before if isinstance(before, dict) else {}
    differing = [key for key in own if own[key] != before.get(key)]
    if differing:
        listed = ", ".join(
            f"{key} {before.get(key)!r:.80} (now {own[key]!r:.80})" for key in differing
        )
        raise ValueError(
            f"{out} has a run with other settings: {listed}. Pass the same ones to go on with it, "
            "or another directory."
        )
    return known


def write_results(settings: FineTuning, model: Any, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Writes the adapter and the merged model, or the whole model; returns the directories."""
    out = Path(settings.out)
    if settings.rank is None:
        return (_write_model(out / "model", model, tokenizer),)
    save_adapter(model, out / "adapter")
    if not settings.merged:
        return (os.fspath(out / "adapter"),)
    return os.fspath(out / "adapter"), _write_model(out / "merged", merge(model), tokenizer)


def summary(out: Path, known: dict[str, Any], training: Any, seconds: float) -> tuple[str, ...]:
    """Returns lines on the losses, the tokens, the time and the memory of a run."""
    rows = read_metrics(out)
    tokens = sum(row.get("tokens") or 0 for row in rows)
    held = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    lines = []
    if held and "before" in known:
        lines.append(f"held-out loss: {known['before']:.4f} before, {held[-1]:.4f} after")
    elif "before" not in known:
        lines.append("no example was held out to evaluate on")
    lines.append(
        f"{int(training.step)} steps, {tokens:,} tokens counted in the loss, {seconds:.0f} s in "
        "this process"
    )
    trained = _bytes(_filtered(training.model))
    lines.append(
        f"trained weights {_megabytes(trained)} of {_megabytes(_bytes(training.model))}, state of "
        f"the optimizer {_megabytes(_bytes(training.optimizer_state))}, {_peak()}"
    )
    return tuple(lines)


def _write_model(directory: Path, model: Any, tokenizer: Tokenizer) -> str:
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return os.fspath(directory)


def _filtered(model: Any) -> Any:
    return jax.tree.map(lambda keep, x: x if keep else None, trainable(model), model)


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _peak() -> str:
    """Returns the largest amount of memory that was in use, of the device or of the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return f"peak memory of the device {_megabytes(statistics['peak_bytes_in_use'])}"
    try:
        import resource
    except ImportError:  # Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory of the process {_megabytes(used)}"


def _flat(groups: list[list[Text]]) -> list[Text]:
    return [text for group in groups for text in group]
