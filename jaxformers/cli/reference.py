"""A checkpoint loaded by transformers and torch, to be compared with."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxformers.transformer import Transformer
from jaxformers.transformer_encoder import TransformerEncoder
from jaxformers.transformer_lm import TransformerLM

Model = TransformerLM | Transformer | TransformerEncoder


class Batch(NamedTuple):
    """Arrays `(b, t)`: tokens, a mask of real tokens (None is all), the segment of each token."""

    tokens: Any
    mask: Any = None
    types: Any = None

    def row(self, i: int) -> "Batch":
        """Returns one row without its padding."""
        real = slice(None) if self.mask is None else self.mask[i]
        types = None if self.types is None else self.types[i : i + 1, real]
        return Batch(self.tokens[i : i + 1, real], None, types)


Sample = list[Batch]  # the inputs of one call: tokens, or source and target
Outputs = dict[str, Any]  # by name: `(b, t, ...)` for each token, or `(b, ...)` for each row


class Generated(NamedTuple):
    """New tokens (-1 where a row has fewer), and log-probabilities of each token or each beam."""

    tokens: np.ndarray
    scores: np.ndarray


class Reference(NamedTuple):
    """The torch model, our class of its kind, and the names of weights that its file lacks."""

    model: Any
    kind: type[Model]
    missing: frozenset[str]

    @property
    def takes_positions(self) -> bool:
        """Returns whether positions can be passed to it, counted over the real tokens."""
        parameters = inspect.signature(self.model.forward).parameters
        return self.kind is TransformerLM and "position_ids" in parameters

    @property
    def rotates_by_length(self) -> bool:
        """Returns whether angles depend on lengths: of the longest row there, of each row here."""
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        return rope.get("rope_type") in ("dynamic", "longrope")

    def __call__(self, sample: Sample) -> Outputs:
        inputs = _inputs(sample, self.takes_positions)
        if self.kind is not TransformerEncoder:
            out = self.model(**inputs)
            if "logits" in out:
                return {"log-probs": _log_softmax(out.logits)}
            return {"hidden states": _numpy(out.last_hidden_state)}
        base = self.model.base_model(**inputs)
        outputs = {"hidden states": _numpy(base.last_hidden_state)}
        made_up = any("pooler" in name for name in self.missing)
        if base.get("pooler_output") is not None and not made_up:
            outputs["pooled"] = _numpy(base.pooler_output)
        if self.model is not self.model.base_model:
            outputs |= self._heads(self.model(**inputs))
        return outputs

    def _heads(self, out: Any) -> Outputs:
        """Returns the outputs of the heads on an encoder. Pretraining models may have two heads."""
        if "start_logits" in out:
            return {"classes": np.stack([_numpy(out.start_logits), _numpy(out.end_logits)], -1)}
        if "prediction_logits" in out:
            [order] = (
                out[name] for name in ("seq_relationship_logits", "sop_logits") if name in out
            )
            return {"log-probs": _log_softmax(out.prediction_logits), "classes": _numpy(order)}
        if "Classification" in type(self.model).__name__:
            return {"classes": _numpy(out.logits)}
        if out.logits.ndim == 2:  # whether each token was replaced (ELECTRA)
            return {"classes": _numpy(out.logits)[..., None]}
        return {"log-probs": _log_softmax(out.logits)}

    def calculate_in(self, dtype: str) -> "Reference":
        """Returns the model after casting it, with its present weights, to a wider type."""
        import torch

        return self._replace(model=self.model.to(getattr(torch, dtype)))

    def row_by_row(self, sample: Sample) -> Outputs:
        """Returns the outputs of each row without its padding, at its position in the sample."""
        mask = sample[-1].mask
        outputs: Outputs = {}
        for i, real in enumerate(mask):
            for name, (value,) in self([batch.row(i) for batch in sample]).items():
                per_token = value.ndim == 2
                shape = (*mask.shape, value.shape[1]) if per_token else (len(mask), *value.shape)
                output = outputs.setdefault(name, np.zeros(shape, value.dtype))
                output[(i, real) if per_token else i] = value
        return outputs

    def generate(self, batch: Batch, **options: int) -> Generated:
        """Generates greedily or by beams, with no settings of the checkpoint but special tokens."""
        self._forget_other_settings(options)
        if not self.rotates_by_length:
            return self._generate(batch)
        rows = [self._generate(batch.row(i)) for i in range(len(batch.tokens))]
        return Generated(_stack([x.tokens for x in rows], -1), _stack([x.scores for x in rows], 0))

    def _generate(self, batch: Batch) -> Generated:
        import torch

        out = self.model.generate(**_inputs([batch._replace(types=None)], False))
        prompt = batch.tokens.shape[1] if self.kind is TransformerLM else 0
        tokens = out.sequences[:, prompt:]
        if self.model.generation_config.num_beams > 1:
            return Generated(tokens.numpy(), out.sequences_scores.numpy())
        log_probs = torch.stack(out.logits, 1).float().log_softmax(-1)
        new = tokens[:, -len(out.logits) :]
        scores = log_probs.gather(2, new[..., None])[..., 0].numpy()
        end = self.model.generation_config.eos_token_id
        ends = np.isin(new, [] if end is None else end)
        ended = ends.cumsum(1) > ends  # before this token
        return Generated(tokens.numpy(), np.where(ended, 0, scores))

    def _forget_other_settings(self, options: dict[str, int]) -> None:
        import transformers

        given = self.model.generation_config
        names = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
        settings = {name: getattr(given, name) for name in (f"{x}_token_id" for x in names)}
        self.model.generation_config = transformers.GenerationConfig(
            **settings,
            bad_words_ids=given.bad_words_ids,
            suppress_tokens=given.suppress_tokens,
            begin_suppress_tokens=given.begin_suppress_tokens,
            # The cache of T5 is too small for a decoder with more layers than its encoder. If
            # angles depend on the length, keys in the cache keep the angles of an earlier length.
            use_cache=self.rotates_by_length,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **options,
        )

    def changed(self, other: "Reference") -> list[str]:
        """Returns the names of tensors whose bits differ between the two models."""
        a, b = (x.model.state_dict() for x in (self, other))
        made_up = self.missing & other.missing
        return [x for x in a | b if x not in made_up and not _same_bits(a.get(x), b.get(x))]


def load_reference(path: str | os.PathLike, ours: Model, dtype: str) -> Reference:
    """Returns the checkpoint in the class of transformers that corresponds to our model."""
    import transformers

    config, kind = transformers.AutoConfig.from_pretrained(path), type(ours)
    architecture = {
        TransformerLM: transformers.AutoModelForCausalLM,
        Transformer: transformers.AutoModelForSeq2SeqLM,
        TransformerEncoder: getattr(transformers, (config.architectures or ["AutoModel"])[0]),
    }[kind]
    if kind is not TransformerEncoder and ours.output is None:
        architecture = transformers.AutoModel
    model, info = architecture.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    # Other implementations cannot multiply float64, or small experts of 16 bits.
    model.config._experts_implementation = "eager"
    return Reference(model.eval(), kind, frozenset(info["missing_keys"]))


@contextlib.contextmanager
def torch_without_gradients() -> Iterator[None]:
    """Opens a context without gradients, and without progress bars or advice of transformers.

    Raises:
        ImportError: if transformers or torch is missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"this compares with transformers and torch, which are missing: {error}. Install "
            "them: pip install 'jaxformers[hf,parity]'"
        ) from error
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.no_grad():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _inputs(sample: Sample, with_positions: bool) -> dict[str, Any]:
    """Returns the arguments of a torch model's forward."""
    import torch

    inputs = {}
    for prefix, batch in zip(("", "decoder_"), sample, strict=False):
        inputs[f"{prefix}input_ids"] = torch.tensor(batch.tokens)
        if batch.mask is not None:
            inputs[f"{prefix}attention_mask"] = torch.tensor(batch.mask.astype(np.int64))
            if with_positions:
                inputs["position_ids"] = torch.tensor(np.maximum(batch.mask.cumsum(1) - 1, 0))
        if batch.types is not None:
            inputs["token_type_ids"] = torch.tensor(batch.types)
    return inputs


def _stack(rows: list[np.ndarray], filler: int) -> np.ndarray:
    """Returns rows `(1, t)` of any length as one array, padded with `filler`."""
    length = max(row.shape[1] for row in rows)
    ends = [((0, 0), (0, length - row.shape[1])) for row in rows]
    return np.vstack(
        [np.pad(row, end, constant_values=filler) for row, end in zip(rows, ends, strict=True)]
    )


def _log_softmax(logits: Any) -> np.ndarray:
    return _numpy(_wide(logits).log_softmax(-1))


def _numpy(x: Any) -> np.ndarray:
    return _wide(x).numpy()


def _wide(x: Any) -> Any:
    """Returns numbers of at least 32 bits, because NumPy has no bfloat16."""
    return x if x.element_size() > 4 else x.float()


def _same_bits(a: Any, b: Any) -> bool:
    import torch

    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))
