"""The comparison of a checkpoint here with the same checkpoint under transformers and torch.

These things are compared, on random tokens: the outputs in float32 (without padding, with padding
on the right and on the left), generated tokens, the outputs with weights of 16 bits, and the
outputs after saving the checkpoint again.

The allowed difference follows from the rounding of torch itself. Its outputs in float32 differ from
its outputs in float64, and the difference grows with the depth of the model. Ours may differ from
its float32 by a few times as much. Outputs with 16 bits are compared with float32, and ours may be
at most about twice as far from it as those of torch. JAX is set to compute products in full
float32, which is not its default on GPUs and TPUs.

Positions are counted over the real tokens here. Some models of transformers always count them over
padding as well. Their rows with padding on the left are compared one by one, without the padding.
"""

import os
import tempfile
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.cli.reference import (
    Batch,
    Model,
    Outputs,
    Reference,
    Sample,
    load_reference,
    torch_without_gradients,
)
from jaxformers.pretrained import from_pretrained
from jaxformers.transformer import Transformer
from jaxformers.transformer_encoder import TransformerEncoder
from jaxformers.transformer_lm import TransformerLM

# Ours may differ from torch in float32 by `ROUNDINGS` times the difference between torch's float32
# and float64, and by `LEAST` in any case. With 16 bits its distance from float32 may be `FARTHER`
# times the distance of torch.
ROUNDINGS, LEAST = 8, 1e-5
FARTHER = 2
SOURCE_LENGTH, TARGET_LENGTH, NEW_TOKENS = 11, 9, 8  # less if the model does not take so many
NUM_BEAMS = 3
RATIO = " by torch's"  # part of the names of rows that have a ratio of distances
NO_PADDING, RIGHT, LEFT = "no padding", "right padding", "left padding"


class Row(NamedTuple):
    """One comparison: the largest difference or the number of differences, and the allowed value.

    With 16 bits the difference is a ratio: our distance from float32 divided by that of torch.
    """

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed  # False if it is NaN


def verify(
    path: str | os.PathLike, *, seed: int = 0, generate: bool = True, sixteen_bits: bool = True
) -> list[Row]:
    """Compares a checkpoint under transformers and torch with the same checkpoint here.

    Arguments:
        path: the directory of the checkpoint.
        seed: the seed of the random tokens, default 0.
        generate: whether to compare generated tokens as well, which takes longest; default True.
        sixteen_bits: whether to compare with weights of 16 bits as well, default True. They are
            those of the file, or bfloat16 if the file has wider ones.

    Returns:
        A `Row` per comparison; `row.passed` says whether the difference is allowed.

    Raises:
        ImportError: if transformers or torch is missing.
        ValueError: if the checkpoint cannot be loaded.

    Example:
        >>> all(row.passed for row in verify("gpt2"))  # doctest: +SKIP
        True
    """
    with torch_without_gradients(), jax.default_matmul_precision("highest"):
        ours = from_pretrained(path, dtype=jnp.float32)
        theirs = load_reference(path, ours, "float32")
        samples = draw_samples(ours, theirs.model.config, np.random.default_rng(seed))
        allowed = _allow(path, ours, theirs, samples[NO_PADDING])
        rows = _compare_outputs(ours, theirs, samples, allowed)
        if generate and not isinstance(ours, TransformerEncoder) and ours.output is not None:
            rows += _compare_generated(ours, theirs, samples, allowed["log-probs"])
        if sixteen_bits:
            rows += _compare_sixteen_bits(path, samples)
        return rows + _compare_saved(path, samples[NO_PADDING])


def table(rows: list[Row]) -> str:
    """Returns the rows as text in columns."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  difference  allowed"]
    for row in rows:
        verdict = "" if row.passed else "  <- differs"
        lines.append(f"{row.name:{width}}  {row.difference:10.2g}  {row.allowed:7.2g}{verdict}")
    return "\n".join(lines)


def draw_samples(ours: Model, config: Any, rng: np.random.Generator) -> dict[str, Sample]:
    """Returns random rows of tokens in three layouts, one batch each for source and target."""
    if isinstance(ours, Transformer):
        sizes = [
            (ours.src_vocab_size, SOURCE_LENGTH, ours.src_embedding.max_seq_length),
            (ours.tgt_vocab_size, TARGET_LENGTH, ours.max_seq_length),
        ]
    else:
        sizes = [(ours.vocab_size, SOURCE_LENGTH, ours.max_seq_length)]
    sample = [_draw(config, v, min(t, limit or t), rng) for v, t, limit in sizes]
    return {
        NO_PADDING: sample,
        RIGHT: [_pad(batch, config, left=False) for batch in sample],
        LEFT: [_pad(batch, config, left=True) for batch in sample],
    }


def _draw(config: Any, vocab_size: int, length: int, rng: np.random.Generator) -> Batch:
    """Returns three rows without special tokens, since some models mask the padding id."""
    names = ("pad", "bos", "eos", "decoder_start")
    given = [getattr(config, f"{name}_token_id", None) for name in names]
    special = np.hstack([[], *(x for x in given if x is not None)])
    tokens = rng.choice(np.setdiff1d(np.arange(vocab_size), special), (3, length))
    segments = getattr(config, "type_vocab_size", None) or 0
    return Batch(tokens, None, rng.integers(0, segments, tokens.shape) if segments > 1 else None)


def _pad(batch: Batch, config: Any, left: bool) -> Batch:
    """Returns the batch with padding: the first row stays whole, others keep 2/3 and 1/3."""
    length = batch.tokens.shape[1]
    mask = np.arange(length) < np.maximum(1, length * np.array([[3], [2], [1]]) // 3)
    # A stable sort by `mask` moves padding to the front and keeps the order of the other tokens.
    order = np.argsort(mask, axis=1, kind="stable") if left else np.arange(length)[None]

    def pad(x: np.ndarray, filler: int) -> np.ndarray:
        return np.take_along_axis(np.where(mask, x, filler), order, axis=1)

    types = None if batch.types is None else pad(batch.types, 0)
    tokens = pad(batch.tokens, getattr(config, "pad_token_id", None) or 0)
    return Batch(tokens, np.take_along_axis(mask, order, axis=1), types)


def _allow(
    path: str | os.PathLike, ours: Model, theirs: Reference, sample: Sample
) -> dict[str, float]:
    """Returns the allowed difference of each output, from their float32 and float64."""
    exact = load_reference(path, ours, "float32").calculate_in("float64")(sample)
    rounded = theirs(sample)
    differences = {name: float(np.abs(rounded[name] - exact[name]).max()) for name in exact}
    return {name: max(LEAST, ROUNDINGS * difference) for name, difference in differences.items()}


def _compare_outputs(
    ours: Model, theirs: Reference, samples: dict[str, Sample], allowed: dict[str, float]
) -> list[Row]:
    rows = []
    for layout, sample in samples.items():
        wanted = _their_outputs(theirs, layout, sample)
        got = _our_outputs(ours, jax.tree.map(jnp.asarray, sample), frozenset(wanted))
        for name in wanted:
            largest = float(_differences(got[name], wanted[name], sample).max())
            rows.append(Row(f"{name}, {layout}", largest, allowed[name]))
    return rows


def _compare_sixteen_bits(path: str | os.PathLike, samples: dict[str, Sample]) -> list[Row]:
    """Compares the distances of both from float32, which has the same weights of 16 bits.

    The distances are root mean squares, because these vary less by chance than the largest.
    """
    stored = _dtype(from_pretrained(path))
    dtype = stored if stored.itemsize == 2 else jnp.dtype(jnp.bfloat16)
    ours = from_pretrained(path, dtype=dtype)
    theirs = load_reference(path, ours, str(dtype))
    exact = load_reference(path, ours, str(dtype)).calculate_in("float32")
    rows = []
    for layout, sample in samples.items():
        wanted = _their_outputs(exact, layout, sample)
        rounded = _their_outputs(theirs, layout, sample)
        got = _our_outputs(ours, jax.tree.map(jnp.asarray, sample), frozenset(wanted))
        for name in wanted:
            found = _differences(got[name], wanted[name], sample)
            limit = _differences(rounded[name], wanted[name], sample)
            # Where torch overflows, any of our numbers are allowed, but not NaN.
            distance = np.nan_to_num(_root_mean_square(limit), nan=np.inf)
            ratio = float(_root_mean_square(found) / max(distance, np.finfo(np.float32).tiny))
            # With fewer tokens or rows the ratio varies more. Over samples the logarithm of the
            # ratio varies by about 1 / sqrt(2 n), and three times that is allowed.
            vectors = found.size // found.shape[-1]
            allowed = FARTHER * float(np.exp(3 / np.sqrt(2 * vectors)))
            rows.append(Row(f"{name}, {layout}, {dtype}{RATIO}", ratio, allowed))
    return rows


def _root_mean_square(x: np.ndarray) -> np.floating:
    return np.sqrt(np.square(x).mean())


def _dtype(model: Model) -> np.dtype:
    return next(x.dtype for x in jax.tree.leaves(model) if eqx.is_array(x))


def _their_outputs(theirs: Reference, layout: str, sample: Sample) -> Outputs:
    """Returns their outputs, row by row if padding would change those of real tokens."""
    alike = layout == RIGHT or theirs.takes_positions
    told = layout == NO_PADDING or alike and not theirs.rotates_by_length
    return theirs(sample) if told else theirs.row_by_row(sample)


def _differences(got: Any, wanted: np.ndarray, sample: Sample) -> np.ndarray:
    """Returns the differences, without those at padding."""
    mask = sample[-1].mask
    difference = np.abs(np.asarray(got, np.float64) - wanted)
    return difference[mask] if mask is not None and difference.ndim == 3 else difference


def _our_outputs(model: Model, sample: Sample, names: frozenset[str]) -> Outputs:
    """Returns our outputs. `jit` is not used: it would compile each layout only to run it once."""
    tokens, mask, types = sample[0]
    if isinstance(model, TransformerLM):
        if model.output is None:
            return {"hidden states": model.forward(tokens, padding_mask=mask)[0]}
        return {"log-probs": model(tokens, padding_mask=mask)}
    if isinstance(model, Transformer):
        target = sample[1]
        masks = {"src_padding_mask": mask, "tgt_padding_mask": target.mask}
        if model.output is None:
            memory = model.encode(tokens, src_padding_mask=mask)
            return {"hidden states": model.decode(target.tokens, memory, **masks)}
        return {"log-probs": model(tokens, target.tokens, **masks)}
    methods: dict[str, Any] = {
        "hidden states": model,
        "pooled": model.pooled,
        "log-probs": model.logits,
        "classes": model.classify,
    }
    outputs = {name: methods[name](tokens, padding_mask=mask, token_types=types) for name in names}
    if "log-probs" in names:
        outputs["log-probs"] = jax.nn.log_softmax(outputs["log-probs"].astype(jnp.float32))
    return outputs


def _compare_generated(
    ours: TransformerLM | Transformer,
    theirs: Reference,
    samples: dict[str, Sample],
    allowed: float,
) -> list[Row]:
    """Compares new tokens and their log-probabilities, greedily and for a source also by beams."""
    if isinstance(ours, TransformerLM):
        prompt = samples[LEFT][0]
        start = prompt.tokens.shape[1]
        new = min(NEW_TOKENS, (ours.max_seq_length or start + NEW_TOKENS) - start)
        budget, searches = {"max_new_tokens": new}, {"greedy": 1}
        where = {"padding_mask": prompt.mask}
    else:
        prompt, start = samples[RIGHT][0], 0
        budget = {"max_length": min(NEW_TOKENS, ours.max_seq_length or NEW_TOKENS)}
        searches = {"greedy": 1, "beam search": NUM_BEAMS}
        where = {"src_padding_mask": prompt.mask}
    rows = []
    for name, num_beams in searches.items():
        options: Any = {**where, "num_beams": num_beams, "return_scores": True}
        with warnings.catch_warnings():  # both ignore the checkpoint's other settings
            warnings.simplefilter("ignore", UserWarning)
            got = ours.generate(prompt.tokens, *budget.values(), **options)
        wanted = theirs.generate(prompt, num_beams=num_beams, **budget)
        # transformers stops when all rows have ended. Here the rows are filled up.
        tokens = np.asarray(got.tokens)[:, start : start + wanted.tokens.shape[1]]
        differing = (tokens != wanted.tokens) & (wanted.tokens >= 0)
        scores = got.scores if num_beams > 1 else got.log_probs[:, : wanted.scores.shape[1]]
        difference = np.abs(np.asarray(scores) - wanted.scores)
        rows.append(Row(f"tokens, {name}", float(differing.sum()), 0))
        rows.append(Row(f"their log-probs, {name}", float(difference.max()), allowed))
    return rows


def _compare_saved(path: str | os.PathLike, sample: Sample) -> list[Row]:
    """Compares the checkpoint with the saved one, both under transformers.

    The checkpoint has the type of its file, whatever config.json says. The config.json of the saved
    one must have that type.
    """
    with tempfile.TemporaryDirectory() as copy:
        model = from_pretrained(path)
        model.save_pretrained(copy)
        before = load_reference(path, model, str(_dtype(model)))
        after = load_reference(copy, model, "auto")
    changed = before.changed(after)
    for reference in (before, after):
        # PyTorch rounds differently by memory layout, which the files decide. A copy removes that.
        for parameter in reference.model.float().parameters():
            parameter.data = parameter.data.clone()
    wanted, got = (x(sample) for x in (before, after))
    difference = max(float(np.abs(got[name] - wanted[name]).max()) for name in wanted)
    return [Row("tensors, saved", len(changed), 0), Row("outputs, saved", difference, 0)]
