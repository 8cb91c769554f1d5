"""The architecture of a model, read back from its modules."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from jaxformers.attention import MultiHeadAttention
from jaxformers.encoder import EncoderLayer
from jaxformers.hf.architecture import ACTIVATIONS, ALSO, Architecture, Rope
from jaxformers.kernels.blockwise import blockwise_attention
from jaxformers.kernels.choice import fast_attention
from jaxformers.kernels.flash import flash_attention
from jaxformers.kernels.plain import dot_product_attention
from jaxformers.layers import Dense, FeedForward, Function, GatedFeedForward
from jaxformers.mixture_of_experts import MixtureOfExperts
from jaxformers.norms import AllHeadsNorm, LayerNorm, PerHeadNorm, RMSNorm
from jaxformers.positions.absolute import (
    LearnablePositionalEncoding,
    SinusoidalPositionalEncoding,
)
from jaxformers.positions.bias import (
    ALiBi,
    T5PositionBias,
)
from jaxformers.positions.rotary import (
    RotaryPositionalEncoding,
)
from jaxformers.residual import PARALLELS, PLACEMENTS, NoNorm, OneNorm

# They compute the same.
KERNELS = [
    Function(kernel)
    for kernel in (fast_attention, dot_product_attention, blockwise_attention, flash_attention)
]


def describe(model: Any) -> Architecture:
    """The architecture that `build` would make this model of, whoever built it.

    Raises:
        ValueError: if it has a part of its own, such as another norm or kernel.
    """
    shape = (
        "seq2seq"
        if hasattr(model, "tgt_embedding")
        else "lm"
        if hasattr(model, "decoder")
        else "encoder"
    )
    embedding = model.tgt_embedding if shape == "seq2seq" else model.embedding
    stack = model.encoder if shape == "encoder" else model.decoder
    stacks = [model.encoder, model.decoder] if shape == "seq2seq" else [stack]
    if not all(each.layers for each in stacks):
        raise ValueError("a stack without layers has no name in checkpoints.")
    layers = [layer for each in stacks for layer in each.layers]
    fields = {
        "shape": shape,
        "vocab_size": embedding.vocab_size,
        "d_model": embedding.d_model,
        "num_heads": _own(stacks[0].layers[0]).num_heads,
        "num_layers": len(stacks[0].layers),
        "d_ff": _width(stacks[0].layers[0]),
        "dropout": embedding.dropout_rate,
        "final_norm": _same("final norms", [each.norm is not None for each in stacks]),
        **_stream(layers, [embedding.norm, *(each.norm for each in stacks), *_head_norms(model)]),
        **_attention(layers),
        **_feed_forward(layers),
        **_embedding(embedding),
        **_position(embedding, stack, stacks),
        **_output(model),
    }
    if shape == "seq2seq":
        decoder = model.decoder.layers
        fields |= {
            "src_vocab_size": model.src_vocab_size,
            "shared": model.src_embedding.token_embedding is None,
            "num_decoder_layers": len(decoder),
            "decoder_num_heads": _own(decoder[0]).num_heads,
            "decoder_d_ff": _width(decoder[0]),
        }
    if shape == "encoder":
        fields |= {"layer_order": model.encoder.layer_order, **_heads(model)}
    return Architecture(**fields)


def _own(layer: Any) -> MultiHeadAttention:
    """A layer's attention over its own sequence."""
    return layer.self_attention


def _attentions(layer: Any) -> list[Any]:
    return [x for x in (_own(layer), getattr(layer, "cross_attention", None)) if x is not None]


def _residuals(layer: Any) -> list[Any]:
    names = ("self_attention_residual", "cross_attention_residual")
    found = [getattr(layer, name, None) for name in names]
    return [x for x in found if x is not None]


def _width(layer: Any) -> int:
    ff = layer.feed_forward
    w = ff.w_down if hasattr(ff, "w_down") else getattr(ff, "w_out", None)
    if w is None:
        raise ValueError(f"the feed-forward {type(ff).__name__} has no name in checkpoints.")
    return w.shape[-2]


def _same(what: str, values: Sequence[Any]) -> Any:
    """The one value that all layers share."""
    if any(value != values[0] for value in values):
        raise ValueError(f"layers differ in their {what}: {sorted(set(map(str, values)))}.")
    return values[0]


def _norm(norm: Any) -> dict[str, Any]:
    if isinstance(norm, RMSNorm):
        return {"norm": "rms", "norm_eps": norm.eps, "norm_offset": norm.gain_offset}
    if isinstance(norm, LayerNorm):
        has = {"norm_bias": norm.b is not None, "norm_gain": norm.gain is not None}
        return {"norm": "layer", "norm_eps": norm.eps, "norm_offset": norm.gain_offset, **has}
    raise ValueError(f"the norm {type(norm).__name__} has no name in checkpoints.")


def _head_norms(model: Any) -> list[Any]:
    """The norms before the vocabulary and the classes."""
    heads = (model.output, getattr(model, "classifier", None))
    return [getattr(getattr(head, "transform", None), "norm", None) for head in heads]


def _stream(layers: list[Any], other_norms: list[Any]) -> dict[str, Any]:
    first_lacks = (
        isinstance(layers[0], EncoderLayer)
        and isinstance(layers[0].self_attention_residual, NoNorm)
        and not isinstance(layers[0].feed_forward_residual, NoNorm)
    )
    joints = [joint for layer in layers for joint in _residuals(layer)]
    joints = joints[1:] if first_lacks else joints
    parallel = _same("parallel", [layer.parallel for layer in layers])
    beside = isinstance(parallel, OneNorm)
    joints += [layer.feed_forward_residual for layer in layers if not beside]
    placement = _same("placement of norms", [_short_form(PLACEMENTS, type(x)) for x in joints])
    norms = [getattr(x, name, None) for x in joints for name in ("norm", "output_norm")]
    norms = [norm for norm in (*norms, *other_norms) if norm is not None]
    if not norms:
        raise ValueError("layers without any norm have no name in checkpoints.")
    norm = _same("norms", [_norm(norm) for norm in norms])
    return {
        **norm,
        **_qk_norms([x for layer in layers for x in _attentions(layer)], norm),
        "placement": placement,
        "first_attention_norm": not first_lacks,
        "parallel": None if parallel is None else _short_form(PARALLELS, parallel),
        "residual_scale": _same("residual scale", [joint.add.scale for joint in joints]),
    }


def _short_form(table: dict[str, Any], x: Any) -> str:
    """Returns the word for an object that the tables of families have."""
    for word, known in table.items():
        if known == x:
            return word
    raise ValueError(f"{x!r:.80} has no name in checkpoints.")


def _attention(layers: list[Any]) -> dict[str, Any]:
    own = [_own(layer) for layer in layers]
    every = [x for layer in layers for x in _attentions(layer)]
    for x in every:
        if x.attention_fn not in KERNELS:
            raise ValueError(f"the kernel {x.attention_fn!r} has no name in checkpoints.")
    biases = [(x.bq is not None, x.bk is not None, x.bv is not None) for x in every]
    q, k, v = _same("biases", biases)
    if not q == k == v:
        raise ValueError("queries, keys and values differ in having a bias.")
    return {
        "num_kv_heads": own[0].num_kv_heads,
        "head_dim": _same("head_dim", [_unusual_head_dim(x) for x in every]),
        "qkv_bias": q,
        "out_bias": _same("output biases", [x.bo is not None for x in every]),
        "softcap": _same("soft-caps", [x.softcap for x in every]),
        "qkv_clip": _same("bounds", [x.qkv_clip for x in every]),
        "attention_scale": tuple(x.attention_scale for x in own),
        "attention_dropout": _same("dropout", [x.attention_dropout_rate for x in every]),
        "window": tuple(x.window for x in own),
    }


def _unusual_head_dim(x: MultiHeadAttention) -> int | None:
    """The size of heads, where it does not follow from their number."""
    return None if x.head_dim * x.num_heads == x.d_model else x.head_dim


def _qk_norms(every: list[MultiHeadAttention], norm: dict[str, Any]) -> dict[str, Any]:
    """The norms on queries and keys, which but for a bias must be like the others."""
    norms: list[Any] = [n for x in every for n in (x.q_norm, x.k_norm)]
    kinds = {type(None): None, PerHeadNorm: "per head", AllHeadsNorm: "all heads"}
    kind = _same("norms of queries", [kinds.get(type(n), "head") for n in norms])
    if kind is None:
        return {"qk_norm": None}
    found = _same("norms of queries", [_norm(n if kind == "head" else n.norm) for n in norms])
    bias = found.get("norm_bias")
    _same("norms", [norm, found if bias is None else found | {"norm_bias": norm.get("norm_bias")}])
    return {"qk_norm": kind, "qk_norm_bias": bias}


def _feed_forward(layers: list[Any]) -> dict[str, Any]:
    def read(ff: Any) -> dict[str, Any]:
        if isinstance(ff, MixtureOfExperts):
            shared = ff.shared_expert
            own = {
                "experts": ff.num_experts,
                "experts_used": ff.top_k,
                "renormalize": ff.renormalize,
                "shared_expert_d_ff": None if shared is None else shared.w_down.shape[0],
                "gated": True,
            }
        elif isinstance(ff, GatedFeedForward):
            own = {"gated": True, "ff_bias": ff.b_down is not None}
        elif isinstance(ff, FeedForward):
            own = {"gated": False, "ff_bias": ff.b_out is not None}
        else:
            raise ValueError(f"the feed-forward {ff!r} has no name in checkpoints.")
        return {**own, "activation": activation_name(ff.activation)}

    return _same("feed-forwards", [read(layer.feed_forward) for layer in layers])


def activation_name(activation: Any) -> str:
    """What an activation is called in an `Architecture`."""
    function: Callable = getattr(activation, "function", activation)
    if isinstance(function, partial) and function.func is jax.nn.gelu and not function.args:
        exact = function.keywords == {"approximate": False}
        function = ACTIVATIONS["gelu"] if exact else function
    for name, known in [*ACTIVATIONS.items(), *ALSO]:
        if known is function:
            return name
    raise ValueError(f"the activation {function!r} has no name in checkpoints.")


def _embedding(embedding: Any) -> dict[str, Any]:
    projection, types = embedding.projection, embedding.type_embedding
    return {
        "embedding_scale": embedding.scale,
        "embedding_norm": embedding.norm is not None,
        "embedding_dim": None if projection is None else projection.w.shape[0],
        "project_tokens": embedding.project_tokens,
        "token_types": None if types is None else types.vocab_size,
    }


def _position(embedding: Any, stack: Any, stacks: list[Any]) -> dict[str, Any]:
    scheme, bias = embedding.position, stack.score_bias
    if scheme is not None and bias is not None:
        if not isinstance(bias, T5PositionBias):
            raise ValueError(f"positions {scheme!r} beside {bias!r} are not in checkpoints.")
        return {**_scheme(bias, stacks), **_scheme(scheme, stacks)}
    return _scheme(bias if scheme is None else scheme, stacks)


def _scheme(scheme: Any, stacks: list[Any]) -> dict[str, Any]:
    match scheme:
        case LearnablePositionalEncoding():
            own = {"position": "learned", "position_offset": scheme.offset}
            return own | {"max_seq_length": scheme.max_seq_length}
        case SinusoidalPositionalEncoding():
            return {
                "position": "sinusoid",
                "sinusoid_interleaved": scheme.interleaved,
                "sinusoid_inclusive": scheme.inclusive,
                "position_offset": scheme.offset,
                "max_seq_length": scheme.max_seq_length,
            }
        case ALiBi():
            return {"position": "alibi"}
        case T5PositionBias():
            buckets, distance = scheme.weight.shape[0], scheme.max_distance
            return {"position": "t5", "t5_buckets": buckets, "t5_distance": distance}
        case None:
            ropes = tuple(_rope(_own(layer)) for each in stacks for layer in each.layers)
            return {"position": "rope", "rope": ropes}
    raise ValueError(f"the positions {scheme!r} have no name in checkpoints.")


def _rope(x: MultiHeadAttention) -> Rope | None:
    if x.position is None:
        return None
    if not isinstance(x.position, RotaryPositionalEncoding):
        raise ValueError(f"the positions {x.position!r} have no name in checkpoints.")
    rope = x.position
    dim = x.head_dim if rope.rotary_dim is None else rope.rotary_dim
    return Rope(rope.theta, dim, rope.interleaved, rope.scaling)


def _output(model: Any) -> dict[str, Any]:
    output = model.output
    if output is None:
        return {"output": False}
    fields = {
        "tied": output.tied,
        "logits_bias": output.b is not None,
        "logits_scale": output.scale,
        "logits_softcap": output.softcap,
    }
    if output.transform is None:
        return fields
    transform = _dense(output.transform)
    plain = output.transform.activation is None and output.transform.norm is None
    if not plain and output.transform.norm is None:
        raise ValueError("an activation before the vocabulary has a norm in checkpoints.")
    return {
        **fields,
        "transform": "linear" if plain else activation_name(transform.activation),
        "transform_bias": transform.b is not None,
    }


def _dense(module: Any) -> Dense:
    if not isinstance(module, Dense):
        raise ValueError(f"the module {module!r} has no name in checkpoints.")
    return module


def _heads(model: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"pooler": model.pooler is not None}
    if model.pooler is not None and activation_name(_dense(model.pooler).activation) != "tanh":
        raise ValueError("a pooler has a tanh in checkpoints, this one has another activation.")
    head = model.classifier
    if head is None:
        return fields
    fields |= {"labels": head.out.w.shape[1], "classifier": head.pooling}
    if head.transform is not None:
        transform = _dense(head.transform)
        fields |= {
            "classifier_transform": activation_name(transform.activation),
            "classifier_norm": transform.norm is not None,
            "classifier_bias": transform.b is not None,
        }
    return fields
