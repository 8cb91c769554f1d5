"""The public names of all objects that a file may hold, which never change.

A class or function may move to another module or get another name in Python. Its name in files
stays. Objects of other packages have the name of their module and their own, as in `jax.nn:gelu`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxformers import (
    activations,
    attention,
    cache,
    decoder,
    embedding,
    encoder,
    heads,
    initializers,
    layer_stack,
    layers,
    masks,
    mixture_of_experts,
    norms,
    optim,
    origin,
    output,
    residual,
    training,
    transformer,
    transformer_encoder,
    transformer_lm,
    weights,
)
from jaxformers.adapters import kinds
from jaxformers.checkpoint import training_state
from jaxformers.files.safetensors_file import DTYPES
from jaxformers.kernels import blockwise, choice, flash, plain
from jaxformers.optim import adafactor, averaged, leafwise, muon, optimizer, schedules
from jaxformers.positions import absolute, bias, length_scaling, rotary, scaling
from jaxformers.quantization import quantized
from jaxformers.training import losses, run, step

# A new class or function that a model, an optimizer or a state of a training may hold needs a line
# here. The object of a line may change; its name may not. The functions only compute, because a
# file could make a model call any of them.
OURS: dict[str, Any] = {
    # Models.
    "TransformerLM": transformer_lm.TransformerLM,
    "Transformer": transformer.Transformer,
    "TransformerEncoder": transformer_encoder.TransformerEncoder,
    "Origin": origin.Origin,
    "SpecialTokens": origin.SpecialTokens,
    # Their parts.
    "Encoder": encoder.Encoder,
    "EncoderLayer": encoder.EncoderLayer,
    "Decoder": decoder.Decoder,
    "DecoderLayer": decoder.DecoderLayer,
    "ScannedLayers": layer_stack.ScannedLayers,
    "Rematerialization": layer_stack.Rematerialization,
    "TokenEmbedding": embedding.TokenEmbedding,
    "TransformerEmbedding": embedding.TransformerEmbedding,
    "OutputLayer": output.OutputLayer,
    "Classifier": heads.Classifier,
    "MultiHeadAttention": attention.MultiHeadAttention,
    "Residual": residual.Residual,
    "PreNorm": residual.PreNorm,
    "PostNorm": residual.PostNorm,
    "Sandwich": residual.Sandwich,
    "OutputNorm": residual.OutputNorm,
    "NoNorm": residual.NoNorm,
    "Addition": residual.Addition,
    "OneNorm": residual.OneNorm,
    "TwoNorms": residual.TwoNorms,
    "FeedForward": layers.FeedForward,
    "GatedFeedForward": layers.GatedFeedForward,
    "MixtureOfExperts": mixture_of_experts.MixtureOfExperts,
    "Dense": layers.Dense,
    "LowRank": weights.LowRank,
    "Quantized": quantized.Quantized,
    "Dora": kinds.Dora,
    "Replaced": kinds.Replaced,
    "Function": layers.Function,
    "LayerNorm": norms.LayerNorm,
    "RMSNorm": norms.RMSNorm,
    "PerHeadNorm": norms.PerHeadNorm,
    "AllHeadsNorm": norms.AllHeadsNorm,
    # Positions.
    "SinusoidalPositionalEncoding": absolute.SinusoidalPositionalEncoding,
    "LearnablePositionalEncoding": absolute.LearnablePositionalEncoding,
    "RotaryPositionalEncoding": rotary.RotaryPositionalEncoding,
    "ALiBi": bias.ALiBi,
    "T5PositionBias": bias.T5PositionBias,
    "LinearScaling": scaling.LinearScaling,
    "ProportionalScaling": scaling.ProportionalScaling,
    "Llama3Scaling": scaling.Llama3Scaling,
    "YarnScaling": scaling.YarnScaling,
    "DynamicScaling": length_scaling.DynamicScaling,
    "LongScaling": length_scaling.LongScaling,
    "sinusoid": absolute.sinusoid,
    "positional_encoding": absolute.positional_encoding,
    "alibi_slopes": bias.alibi_slopes,
    "t5_buckets": bias.t5_buckets,
    # Masks and caches.
    "AttentionMask": masks.AttentionMask,
    "KV": attention.KV,
    "Cache": cache.Cache,
    "LayerCache": cache.LayerCache,
    # Activations.
    "relu": activations.relu,
    "relu_squared": activations.relu_squared,
    "silu": activations.silu,
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "quick_gelu": activations.quick_gelu,
    "tanh": activations.tanh,
    # Kernels of attention.
    "fast_attention": choice.fast_attention,
    "dot_product_attention": plain.dot_product_attention,
    "blockwise_attention": blockwise.blockwise_attention,
    "flash_attention": flash.flash_attention,
    "scaled_dot_product_attention": plain.scaled_dot_product_attention,
    "attention_scores": plain.attention_scores,
    "attention_weights": plain.attention_weights,
    "match": plain.match,
    "mix": plain.mix,
    "choose_attention": choice.choose_attention,
    "Choice": choice.Choice,
    "Blocks": flash.Blocks,
    # Initializers and losses.
    "xavier_uniform": initializers.xavier_uniform,
    "normal": initializers.normal,
    "depth_scaled": initializers.depth_scaled,
    "cross_entropy": losses.cross_entropy,
    "chunked_cross_entropy": losses.chunked_cross_entropy,
    # Optimizers, their arguments and their states.
    "Optimizer": optimizer.Optimizer,
    "LeafwiseOptimizer": leafwise.LeafwiseOptimizer,
    "AdamW": optim.AdamW,
    "Lion": optim.Lion,
    "Adafactor": optim.Adafactor,
    "Muon": optim.Muon,
    "OrthogonalMomentum": optim.OrthogonalMomentum,
    "Groups": optim.Groups,
    "Averaged": optim.Averaged,
    "Optax": optimizer._Optax,
    "as_optimizer": optim.as_optimizer,
    "freeze": optim.freeze,
    "State": leafwise.State,
    "AveragedState": averaged.AveragedState,
    "Layout": optim.Layout,
    "default_layout": optim.default_layout,
    "default_decay_mask": optim.default_decay_mask,
    "is_hidden_matrix": optim.is_hidden_matrix,
    "orthogonalize": muon.orthogonalize,
    "match_adamw": optim.match_adamw,
    "match_width": optim.match_width,
    "global_norm": optim.global_norm,
    "clip_by_global_norm": optim.clip_by_global_norm,
    # Schedules and their formulas.
    "Schedule": schedules.Schedule,
    "warmup_cosine": schedules.warmup_cosine,
    "warmup_linear": schedules.warmup_linear,
    "warmup_stable_decay": schedules.warmup_stable_decay,
    "inverse_square_root": schedules.inverse_square_root,
    "relative_step": optim.relative_step,
    "schedules.constant": schedules.constant,
    "schedules.linear": schedules.linear,
    "schedules.cosine": schedules.cosine,
    "schedules.join": schedules.join,
    "formulas.ramp": schedules._ramp,
    "formulas.cosine_ramp": schedules._cosine_ramp,
    "formulas.inverse_root": schedules._inverse_root,
    "formulas.joined": schedules._joined,
    "formulas.relative_step": adafactor._relative_step,
    # States of a training.
    "Training": training.Training,
    "BadSteps": training.BadSteps,
    "Guard": step.Guard,
    "Gradients": step.Gradients,
    "Report": run.Report,
    "HostKey": training_state.HostKey,
}

# Files that are older than these names hold the module of an object and its name there. If that
# name is the public name above, it needs no line here.
OLDER: dict[str, str] = {
    "Rematerialisation": "Rematerialization",
    "_Optax": "Optax",
    "orthogonalise": "orthogonalize",
    "jaxformers.schedules:constant": "schedules.constant",
    "jaxformers.schedules:linear": "schedules.linear",
    "jaxformers.schedules:cosine": "schedules.cosine",
    "jaxformers.schedules:join": "schedules.join",
    "jaxformers.schedules:_ramp": "formulas.ramp",
    "jaxformers.schedules:_cosine_ramp": "formulas.cosine_ramp",
    "jaxformers.schedules:_inverse_root": "formulas.inverse_root",
    "jaxformers.schedules:_joined": "formulas.joined",
    "jaxformers.optim.adafactor:_relative_step": "formulas.relative_step",
}

# The allowed functions of jax.numpy and jax.lax. These modules also have functions that read and
# write files.
_ELEMENTWISE = (
    *("abs", "arctan", "clip", "cos", "cosh", "erf", "exp", "expm1", "log", "log1p", "logistic"),
    *("max", "maximum", "min", "minimum", "negative", "rsqrt", "sign", "sin", "sinc", "sinh"),
    *("sqrt", "square", "tan", "tanh", "where"),
)


def known_objects() -> dict[str, Any]:
    """Returns the objects that files may name, by name; an object's first name is written."""
    return OURS | _theirs()


def public_name(name: str) -> str:
    """Returns the present name of an object, given its name in a file of any version."""
    module, _, own = name.partition(":")
    if module.partition(".")[0] != "jaxformers":
        return name
    current = OLDER.get(name, OLDER.get(own, own))
    return current if current in OURS else name


@functools.cache
def _theirs() -> dict[str, Any]:
    """Returns the objects of other packages that files may name."""
    found = _members("jax.nn", jax.nn, lambda x: callable(x) and not isinstance(x, type))
    scalars = {name: x for name, x in list(vars(jnp).items()) if name in map(str, DTYPES.values())}
    found |= {f"jax.numpy:{name}": x for name, x in scalars.items()}
    for module in (jnp, jax.lax):
        found |= {
            f"{module.__name__}:{name}": getattr(module, name)
            for name in _ELEMENTWISE
            if hasattr(module, name)
        }
    found |= _members("equinox.nn", eqx.nn, is_record)
    # The identity that ends a multilayer perceptron has no name of its own.
    last = inspect.signature(eqx.nn.MLP.__init__).parameters["final_activation"].default
    return found | {"equinox.nn:MLP.final_activation": last}


def is_record(x: Any) -> bool:
    """Returns whether `x` is a class whose objects consist of their fields.

    Modules, dataclasses and NamedTuples are such classes.
    """
    if not isinstance(x, type):
        return False
    return dataclasses.is_dataclass(x) or issubclass(x, tuple) and hasattr(x, "_fields")


def field_names(x: Any) -> tuple[str, ...]:
    """Returns the names of the fields of a record or of its class."""
    return getattr(x, "_fields", None) or tuple(
        field.name for field in (dataclasses.fields(x) if dataclasses.is_dataclass(x) else ())
    )


def _members(name: str, module: ModuleType, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    return {
        f"{name}:{own}": x
        for own, x in list(vars(module).items())
        if not own.startswith("_") and not isinstance(x, ModuleType) and wanted(x)
    }
