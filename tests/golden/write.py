"""Writes golden files: what a version of this package saved, for later ones to load.

    python tests/golden/write.py             writes what is not there yet
    python tests/golden/write.py NAME ...    writes these anew, which no test ever asks for: a file
                                             stays as it is, and the package has to load it

A file shows what its time saved. So a new kind of model, optimizer or piece gets a golden file of
its own, by one more function here, and those that are there are left alone. The names of classes
and functions below are those of today; names in the files are those of the version that wrote them.
"""

import dataclasses
import gzip
import io
import json
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import golden_cases
from golden_cases import (
    GOLDEN,
    LABELS,
    SAVED,
    SIZES,
    SOURCE_VOCAB,
    SUMS,
    TOKENS,
    TRAININGS,
    VOCAB,
    Shifted,
    doubled_tanh,
    outputs,
    result,
    sha256,
    train,
)

import jaxformers
from jaxformers import (
    Adafactor,
    AdamW,
    ALiBi,
    AllHeadsNorm,
    AttentionMask,
    Averaged,
    Checkpoints,
    Classifier,
    Decoder,
    DecoderLayer,
    Dense,
    DynamicScaling,
    Encoder,
    EncoderLayer,
    FeedForward,
    GatedFeedForward,
    Groups,
    LayerNorm,
    LearnablePositionalEncoding,
    LinearScaling,
    Lion,
    Llama3Scaling,
    LongScaling,
    MixtureOfExperts,
    MultiHeadAttention,
    Muon,
    OrbaxCheckpoints,
    OutputLayer,
    PerHeadNorm,
    Pieces,
    ProportionalScaling,
    Residual,
    RMSNorm,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
    T5PositionBias,
    TokenEmbedding,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    YarnScaling,
    activations,
    cast_floating,
    freeze,
    rematerialize,
    save,
    scan_layers,
    schedules,
)
from jaxformers.optim import OrthogonalMomentum, is_hidden_matrix, match_width
from jaxformers.optim.adafactor import relative_step

KEY = jax.random.key(7)


def lm(num_layers: int = 2, **options: Any) -> TransformerLM:
    return moved(TransformerLM(VOCAB, num_layers=num_layers, **{**SIZES, **options}, key=KEY))


def moved(x: Any) -> Any:
    """All arrays a little elsewhere, that no gain is 1 and no bias 0; of few bits, to be small."""
    leaves, structure = jax.tree.flatten(x)
    return jax.tree.unflatten(
        structure,
        [
            jnp.round(32 * leaf + 4 * jax.random.normal(jax.random.fold_in(KEY, i), leaf.shape))
            / 32
            if eqx.is_inexact_array(leaf)
            else leaf
            for i, leaf in enumerate(leaves)
        ],
    )


# Models.


def gpt() -> Any:
    feed_forward = partial(FeedForward, activation=jax.nn.gelu)
    return lm(learnable_pos=True, tie_embeddings=True, feed_forward=feed_forward)


def llama(**options: Any) -> Any:
    return lm(
        position=RotaryPositionalEncoding(theta=100.0),
        norm=partial(RMSNorm, eps=1e-5),
        feed_forward=GatedFeedForward,
        use_bias=False,
        num_kv_heads=1,
        **options,
    )


def rotary() -> Any:
    """Each scaling, and the ways to pair."""
    schemes = [
        RotaryPositionalEncoding(50.0, interleaved=True),
        RotaryPositionalEncoding(50.0, rotary_dim=2, scaling=LinearScaling(2.0)),
        RotaryPositionalEncoding(50.0, scaling=ProportionalScaling(0.5, 2.0)),
        RotaryPositionalEncoding(50.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 7)),
        RotaryPositionalEncoding(50.0, scaling=YarnScaling(4.0, 6, truncate=False)),
        RotaryPositionalEncoding(50.0, scaling=DynamicScaling(2.0, 3)),
        RotaryPositionalEncoding(50.0, scaling=LongScaling((1.0, 1.5), (2.0, 9.0), 4, 1.1)),
    ]
    changes = lambda i: Pieces(position=schemes[i])  # noqa: E731
    return lm(len(schemes), position=schemes[0], per_layer=changes, num_kv_heads=1)


def bloom() -> Any:
    embedding = partial(TransformerEmbedding, norm=LayerNorm)
    return lm(position=ALiBi(), embedding=embedding, tie_embeddings=True)


def mixture() -> Any:
    experts = partial(MixtureOfExperts, num_experts=5, top_k=2)
    gelu = partial(jax.nn.gelu, approximate=False)
    shared = partial(experts, activation=gelu, renormalise=False, shared_d_ff=8)
    return lm(
        per_layer=lambda i: Pieces(feed_forward=shared if i else experts, window=3 - i),
        position=RotaryPositionalEncoding(),
        use_bias=False,
        use_qkv_bias=True,
    )


def placements() -> Any:
    """The places of norms, and the kinds of them."""
    layers = [
        Pieces(norm_placement="pre", norm=partial(LayerNorm, use_bias=False)),
        Pieces(norm_placement="post", norm=partial(LayerNorm, use_bias=False, use_gain=False)),
        Pieces(norm_placement="sandwich", norm=partial(RMSNorm, gain_offset=1.0)),
        Pieces(norm_placement="output", norm=partial(LayerNorm, eps=1e-3, gain_offset=1.0)),
        Pieces(norm_placement="none", residual_scale=0.5),
    ]
    return lm(len(layers), per_layer=lambda i: layers[i], final_norm=True)


def parallel() -> Any:
    return lm(
        per_layer=lambda i: Pieces(parallel="two norms" if i else "one norm"),
        position=RotaryPositionalEncoding(rotary_dim=2),
        use_logits_bias=True,
        use_out_bias=False,
    )


def gemma() -> Any:
    return lm(
        3,
        position=RotaryPositionalEncoding(),
        norm=partial(RMSNorm, gain_offset=1.0),
        norm_placement="sandwich",
        feed_forward=partial(GatedFeedForward, activation=activations.gelu_tanh),
        qk_norm=partial(RMSNorm, gain_offset=1.0),
        attention_scale=0.3,
        softcap=5.0,
        output=partial(OutputLayer, softcap=3.0, scale=0.7),
        per_layer=lambda i: Pieces(window=None if i == 2 else 2),
        embedding_scale=2.5,
        tie_embeddings=True,
        use_bias=False,
    )


def query_norms() -> Any:
    layers = [
        Pieces(qk_norm=RMSNorm),
        Pieces(qk_norm=partial(PerHeadNorm, LayerNorm)),
        Pieces(qk_norm=partial(AllHeadsNorm, RMSNorm), qkv_clip=0.8),
    ]
    return lm(len(layers), per_layer=lambda i: layers[i], num_kv_heads=1)


def with_kernels() -> Any:
    kernels = [
        jaxformers.dot_product_attention,
        jaxformers.blockwise_attention,
        jaxformers.flash_attention,
        partial(jaxformers.flash_attention, blocks=(2, 4)),
        jaxformers.fast_attention,
    ]
    return lm(len(kernels), per_layer=lambda i: Pieces(attention_fn=kernels[i]))


def paper() -> Any:
    return moved(
        Transformer(
            SOURCE_VOCAB,
            VOCAB,
            num_encoder_layers=2,
            num_decoder_layers=1,
            decoder_num_heads=2,
            decoder_d_ff=8,
            norm_first=False,
            **SIZES,
            key=KEY,
        )
    )


def t5() -> Any:
    return moved(
        Transformer(
            VOCAB,
            VOCAB,
            num_encoder_layers=1,
            num_decoder_layers=2,
            position=lambda key: T5PositionBias(3, 8, 16, key=key),
            norm=RMSNorm,
            feed_forward=partial(GatedFeedForward, activation=activations.gelu_tanh),
            use_bias=False,
            share_embeddings=True,
            tie_embeddings=True,
            output=partial(OutputLayer, scale=6**-0.5),
            attention_scale=1.0,
            **SIZES,
            key=KEY,
        )
    )


def marian() -> Any:
    """Sines before cosines, from 2 on; scanned on both sides, with gradients computed again."""
    position = SinusoidalPositionalEncoding(9, 6, interleaved=False, inclusive=True, offset=2)
    model = Transformer(
        VOCAB,
        VOCAB,
        num_encoder_layers=2,
        num_decoder_layers=2,
        position=position,
        feed_forward=partial(FeedForward, activation=jax.nn.silu),
        share_embeddings=True,
        tie_embeddings=True,
        **SIZES,
        key=KEY,
    )
    return moved(rematerialize(scan_layers(model), keep=("queries", "residual_after")))


def encoder(**options: Any) -> Any:
    return moved(TransformerEncoder(VOCAB, **{**SIZES, **options}, key=KEY))


def bert() -> Any:
    return encoder(
        num_layers=2,
        norm_first=False,
        learnable_pos=True,
        embedding=partial(TransformerEmbedding, num_token_types=2, norm=LayerNorm),
        pooler=partial(Dense, activation=jnp.tanh),
        classifier=partial(Classifier, num_labels=LABELS, pooling="pooler"),
        output=partial(
            OutputLayer, transform=partial(Dense, activation=activations.gelu, norm=LayerNorm)
        ),
        tie_embeddings=True,
        use_logits_bias=True,
        attention_dropout_rate=0.1,
    )


def albert() -> Any:
    transform = partial(Dense, activation=jax.nn.relu)
    return encoder(
        num_layers=2,
        layer_order=[0, 1, 1],
        embedding=partial(TransformerEmbedding, embedding_dim=5),
        position=SinusoidalPositionalEncoding(9, 5),
        classifier=partial(Classifier, num_labels=LABELS, pooling="late", transform=transform),
        output=partial(OutputLayer, transform=Dense),
        window=2,
    )


def opt() -> Any:
    embedding = partial(TransformerEmbedding, embedding_dim=5, project_tokens=True)
    return lm(
        embedding=embedding,
        output=partial(OutputLayer, transform=partial(Dense, use_bias=False)),
        position=lambda key: LearnablePositionalEncoding(9, 6, offset=2, key=key),
        tie_embeddings=True,
    )


def scanned() -> Any:
    return rematerialize(scan_layers(gpt()), keep=("head_outputs",))


def ensemble() -> Any:
    def make(key):
        return TransformerLM(VOCAB, num_layers=1, **SIZES, learnable_pos=True, key=key)

    return moved(eqx.filter_vmap(make)(jax.random.split(KEY, 4)))


# Models of checkpoints from elsewhere.


def from_hugging_face(model: Any, special: dict[str, Any]) -> Any:
    """A model as it is read from a checkpoint that names special tokens."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        path = Path(directory) / "generation_config.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | special))
        model = jaxformers.from_pretrained(directory)
    origin = dataclasses.replace(model.origin, directory="checkpoints/tiny")
    return with_origin(model, origin)


def with_origin(model: Any, origin: Any) -> Any:
    made = object.__new__(type(model))
    for field in dataclasses.fields(model):
        object.__setattr__(made, field.name, getattr(model, field.name))
    object.__setattr__(made, "origin", origin)
    return made


SPECIAL = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}


def hf_gpt2() -> Any:
    sizes: dict[str, Any] = {**SIZES, "head_dim": 2}
    model = lm(
        **sizes,
        learnable_pos=True,
        tie_embeddings=True,
        embedding_scale=1.0,
        feed_forward=partial(FeedForward, activation=activations.gelu_tanh),
    )
    return from_hugging_face(model, SPECIAL | {"bad_words_ids": [[3], [4, 6]]})


def hf_llama() -> Any:
    return from_hugging_face(llama(embedding_scale=1.0), SPECIAL)


def hf_bart() -> Any:
    model = moved(
        Transformer(
            VOCAB,
            VOCAB,
            **{**SIZES, "head_dim": 2},
            num_encoder_layers=2,
            num_decoder_layers=1,
            position=lambda key: LearnablePositionalEncoding(9, 6, offset=2, key=key),
            embedding=partial(TransformerEmbedding, norm=LayerNorm),
            feed_forward=partial(FeedForward, activation=activations.gelu),
            norm_first=False,
            share_embeddings=True,
            tie_embeddings=True,
            embedding_scale=1.0,
            use_logits_bias=True,
            key=KEY,
        )
    )
    forced = {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "decoder_start_token_id": 2}
    return from_hugging_face(model, SPECIAL | forced)


def hf_bert() -> Any:
    norm = partial(LayerNorm, eps=1e-12)
    model = encoder(
        num_layers=2,
        head_dim=2,
        norm_first=False,
        norm=norm,
        learnable_pos=True,
        embedding_scale=1.0,
        embedding=partial(TransformerEmbedding, num_token_types=2, norm=norm),
        feed_forward=partial(FeedForward, activation=activations.gelu),
    )
    return from_hugging_face(model, {})


# Parts.


def with_activations() -> Any:
    """The activations that a feed-forward is given, plain and gated."""
    ours = [getattr(activations, n) for n in ("relu", "relu_squared", "silu", "gelu")]
    ours += [getattr(activations, n) for n in ("gelu_tanh", "quick_gelu", "tanh")]
    theirs = [jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.swish, jax.nn.tanh, jax.nn.elu]
    theirs += [jax.nn.relu6, jax.nn.softplus, jax.nn.mish, jax.nn.sigmoid, jax.nn.leaky_relu]
    theirs += [jax.nn.hard_swish, jax.nn.identity, jnp.tanh, jnp.sin, jnp.square, jax.lax.logistic]
    more = {
        "exact gelu": partial(jax.nn.gelu, approximate=False),
        "leaky": partial(jax.nn.leaky_relu, negative_slope=0.2),
        "clipped": jax.tree_util.Partial(jnp.clip, max=0.5),
        "PReLU": eqx.nn.PReLU(0.3),
        "Lambda": eqx.nn.Lambda(jax.nn.selu),
    }
    plain = {f"{f.__module__} {f.__name__}": f for f in (*ours, *theirs)} | more
    feed_forwards = {
        name: FeedForward(6, 2, activation=f, key=KEY) for name, f in plain.items()
    } | {
        f"gated {name}": GatedFeedForward(6, 2, activation=f, use_bias=False, key=KEY)
        for name, f in more.items()
    }
    return moved(feed_forwards)


def norms() -> Any:
    return moved(
        {
            "LayerNorm": LayerNorm(6),
            "LayerNorm without a bias": LayerNorm(6, use_bias=False),
            "LayerNorm alone": LayerNorm(6, use_bias=False, use_gain=False),
            "LayerNorm with an offset": LayerNorm(6, 1e-3, gain_offset=1.0),
            "RMSNorm": RMSNorm(6),
            "RMSNorm with an offset": RMSNorm(6, 1e-3, gain_offset=1.0),
            "PerHeadNorm, by head": PerHeadNorm(LayerNorm, 4, 3),
            "AllHeadsNorm, of heads": AllHeadsNorm(RMSNorm, 4, 3),
            "theirs": eqx.nn.Identity(),
        }
    )


def positions() -> Any:
    rotary = partial(RotaryPositionalEncoding, 50.0)
    return moved(
        {
            "sinusoid": SinusoidalPositionalEncoding(9, 6),
            "sinusoid of M2M": SinusoidalPositionalEncoding(9, 6, False, True, 2),
            "learned": LearnablePositionalEncoding(9, 6, offset=3, key=KEY),
            "alibi": ALiBi(),
            "t5": T5PositionBias(3, 8, 16, key=KEY),
            "rotary": rotary(),
            "rotary, interleaved": rotary(interleaved=True),
            "rotary, partial": rotary(rotary_dim=4),
            "linear": rotary(scaling=LinearScaling(2.0)),
            "proportional": rotary(scaling=ProportionalScaling(0.5, 2.0)),
            "llama 3": rotary(scaling=Llama3Scaling(8.0, 1.0, 4.0, 7)),
            "yarn": rotary(scaling=YarnScaling(4.0, 6, 8.0, 2.0, 1.3, truncate=False)),
            "dynamic": rotary(scaling=DynamicScaling(2.0, 3)),
            "long": rotary(scaling=LongScaling([1, 1, 2, 3], [1, 4, 6, 9], 4, 1.1)),
        }
    )


def parts() -> Any:
    pieces: dict[str, Any] = dict(head_dim=4, num_kv_heads=1)
    return moved(
        {
            "attention": MultiHeadAttention(6, 3, **pieces, key=KEY),
            "encoder layer": EncoderLayer(6, 3, 10, **pieces, key=KEY),
            "decoder layer": DecoderLayer(6, 3, 10, **pieces, key=KEY),
            "encoder": Encoder(2, 6, 3, 10, **pieces, key=KEY),
            "decoder": Decoder(2, 6, 3, 10, **pieces, position=ALiBi(), key=KEY),
            "token embedding": TokenEmbedding(VOCAB, 6, key=KEY),
            "embedding": TransformerEmbedding(VOCAB, 6, 9, key=KEY),
            "output": OutputLayer(6, VOCAB, key=KEY),
            "tied output": OutputLayer(6, VOCAB, tied=True, key=KEY),
            "classifier": Classifier(6, LABELS, key=KEY),
            "feed forward": FeedForward(6, 10, key=KEY),
            "gated": GatedFeedForward(6, 10, key=KEY),
            "mixture": MixtureOfExperts(6, 10, 5, 2, key=KEY),
            "dense": Dense(6, 5, jnp.tanh, LayerNorm, key=KEY),
            "residual": Residual(LayerNorm, 6, 0.2, "sandwich", 0.5),
            "own norm": Shifted(jnp.arange(6.0), 1.5),
            "own activation": FeedForward(6, 10, doubled_tanh, key=KEY),
            "multilayer perceptron": eqx.nn.MLP(6, 2, 5, 1, key=KEY),
        }
    )


def kernels() -> Any:
    return {
        "plain": jaxformers.dot_product_attention,
        "blockwise": jaxformers.blockwise_attention,
        "flash": jaxformers.flash_attention,
        "flash in blocks": partial(jaxformers.flash_attention, blocks=(2, 4)),
        "fast": jaxformers.fast_attention,
    }


def functions() -> Any:
    """Further functions that a file may name."""
    return {
        "xavier uniform": jaxformers.xavier_uniform,
        "normal": jaxformers.normal,
        "depth scaled": jaxformers.depth_scaled,
        "cross entropy": jaxformers.cross_entropy,
        "chunked cross entropy": partial(jaxformers.chunked_cross_entropy, z_loss=1e-4),
        "attention": jaxformers.scaled_dot_product_attention,
        "choose attention": jaxformers.choose_attention,
        "global norm": jaxformers.global_norm,
        "clip": jaxformers.clip_by_global_norm,
        "decay mask": jaxformers.default_decay_mask,
        "match adamw": jaxformers.optim.match_adamw,
        "match width": jaxformers.optim.match_width,
        "layout": jaxformers.optim.default_layout,
        "freeze": jaxformers.freeze,
        "as optimizer": jaxformers.as_optimizer,
        "positional encoding": jaxformers.positional_encoding,
        "schedules": [
            *(schedules.constant, schedules.linear, schedules.cosine, schedules.join),
            *(jaxformers.warmup_cosine, jaxformers.warmup_linear),
            *(jaxformers.inverse_square_root, jaxformers.warmup_stable_decay, relative_step),
        ],
        "classes": [TransformerLM, LayerNorm, jaxformers.layers.Function, eqx.nn.Linear],
    }


def numbers() -> Any:
    """What is neither a module nor a function."""
    return {
        "numbers": (True, -(2**70), 0.1, 1e-320, float("-inf"), None, "\u2603"),
        "nested": [[], (), {}, [(1,)], {3: {"a.b": 1}}, {(1, "x"): 2.0}],
        "types": (np.dtype("int8"), jnp.dtype(jnp.bfloat16), jnp.bfloat16, jnp.float32),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 2),
        "old key": jax.random.PRNGKey(5),
        "dtypes": [jnp.ones(3, t) for t in ("bool", "int8", "uint32", "float16", "complex64")],
        "numpy": [np.float32(0.1), np.bool(True), np.ones((2, 0, 3)), np.arange(6.0)],
        "shared": [TOKENS, TOKENS],
    }


def all_schedules() -> Any:
    return {
        "constant": schedules.constant(0.3),
        "linear": schedules.linear(1.0, 0.2, 7),
        "cosine": schedules.cosine(1.0, 0.2, 7),
        "join": schedules.join(schedules.constant(0.3), 2, schedules.cosine(1.0, 0.0, 5)),
        "warmup cosine": schedules.warmup_cosine(1.0, 3, 9, 0.1),
        "warmup linear": schedules.warmup_linear(1.0, 3, 9, 0.1),
        "inverse square root": schedules.inverse_square_root(1.0, 3),
        "warmup stable decay": schedules.warmup_stable_decay(1.0, 2, 3, 4),
        "relative step": relative_step(0.4),
    }


def optimizers() -> Any:
    return {
        "AdamW": AdamW(1e-2),
        "AdamW with all": AdamW(
            schedules.warmup_cosine(1e-2, 1, 3),
            *(0.8, 0.95, 1e-6, 0.2),
            max_grad_norm=0.5,
            decay_mask=partial(jaxformers.default_decay_mask, decay_embeddings=False),
        ),
        "Lion": Lion(1e-2, 0.8, 0.9, 0.2, max_grad_norm=0.5),
        "Adafactor": Adafactor(),
        "Adafactor with all": Adafactor(1e-2, 0.7, None, None, 1e-20, 0.1, max_grad_norm=0.5),
        "OrthogonalMomentum": Groups(
            [(is_hidden_matrix, OrthogonalMomentum(1e-2, scale=match_width))], rest=None
        ),
        "Muon": Muon(1e-2, 0.9, 0.2, max_grad_norm=0.5, nesterov=False),
        "Muon with another": Muon(1e-2, rest=Lion(1e-3)),
        "Averaged": Averaged(AdamW(1e-2), 0.5),
        "Averaged with a schedule": Averaged(Lion(1e-2), schedules.constant(0.9)),
        "freeze": freeze(Adafactor(), is_hidden_matrix),
    }


def training() -> Any:
    """A whole state of a training, as a native file."""
    return train("averaged", SAVED, None)


def mask() -> Any:
    return {
        "attention": MultiHeadAttention(6, 3, head_dim=4, key=KEY),
        "mask": AttentionMask(
            causal=True,
            window=3,
            q_positions=jnp.asarray([[0, 1, 2, 3, 4], [-1, 0, 1, 2, 3]]),
            k_positions=jnp.asarray([[0, 1, 2, 3, 4], [-1, 0, 1, 2, 3]]),
            bias=ALiBi(),
        ),
    }


OBJECTS = {
    "gpt": gpt,
    "llama": llama,
    "rotary": rotary,
    "bloom": bloom,
    "mixture": mixture,
    "placements": placements,
    "parallel": parallel,
    "gemma": gemma,
    "query-norms": query_norms,
    "with-kernels": with_kernels,
    "paper": paper,
    "t5": t5,
    "marian": marian,
    "bert": bert,
    "albert": albert,
    "opt": opt,
    "scanned": scanned,
    "ensemble": ensemble,
    "bfloat16": lambda: cast_floating(llama(), jnp.bfloat16),
    "float16": lambda: cast_floating(bert(), jnp.float16),
    "hf-gpt2": hf_gpt2,
    "hf-llama": hf_llama,
    "hf-bart": hf_bart,
    "hf-bert": hf_bert,
    "activations": with_activations,
    "norms": norms,
    "positions": positions,
    "parts": parts,
    "kernels": kernels,
    "functions": functions,
    "numbers": numbers,
    "schedules": all_schedules,
    "optimizers": optimizers,
    "training": training,
    "mask": mask,
}


def write_object(name: str) -> None:
    """An object's file, and what it gives."""
    made = OBJECTS[name]()
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory) / f"{name}.safetensors", made)
        keep(Path(directory) / f"{name}.safetensors", GOLDEN / "objects")
    np.savez_compressed(GOLDEN / "objects" / f"{name}.npz", **outputs(name, made))


def keep(path: Path, directory: Path) -> None:
    """Put a file where it stays, compressed."""
    directory.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(path.read_bytes(), mtime=0)
    (directory / f"{path.name}.gz").write_bytes(packed)


def write_training(name: str) -> None:
    """A checkpoint after some steps, and what the steps after it lead to."""
    directory = GOLDEN / "trainings" / name
    with tempfile.TemporaryDirectory() as temporary:
        train(name, SAVED, Checkpoints(temporary))
        (saved,) = Path(temporary).glob("step-*.safetensors")
        keep(saved, directory)
        end = train(name, golden_cases.END, Checkpoints(temporary))
        losses = golden_cases.losses(Path(temporary))
    np.savez_compressed(directory / "after.npz", losses=losses, **result(name, end))


def write_plain() -> None:
    """A state that is no training of `fit`."""
    directory = GOLDEN / "trainings" / "plain"
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints = Checkpoints(temporary)
        checkpoints.save(golden_cases.plain_state(), SAVED)
        checkpoints.wait()
        (saved,) = Path(temporary).glob("step-*.safetensors")
        keep(saved, directory)


def write_orbax() -> None:
    """A checkpoint in orbax's format: a directory, of whose files one archive is made."""
    directory = GOLDEN / "trainings" / "orbax"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        checkpoints = OrbaxCheckpoints(run)
        train("averaged", SAVED, checkpoints, log=temporary)
        checkpoints.wait()
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for path in sorted(run.rglob("*")):
                info = archive.gettarinfo(path, str(path.relative_to(run)))
                info.mtime = info.uid = info.gid = 0
                info.uname = info.gname = ""
                # The files that say where this was written are there to be there.
                data = b"" if path.is_dir() or "commit_success" in path.name else path.read_bytes()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    path = directory / f"step-{SAVED:09}.tar.gz"
    path.write_bytes(gzip.compress(raw.getvalue(), mtime=0))


def main(names: list[str]) -> None:
    """Write what is named, or all that is missing, and the digests of all."""
    writers = {f"objects/{name}": partial(write_object, name) for name in OBJECTS}
    writers |= {f"trainings/{name}": partial(write_training, name) for name in TRAININGS}
    writers |= {"trainings/plain": write_plain, "trainings/orbax": write_orbax}
    unknown = [name for name in names if name not in writers]
    if unknown:
        raise SystemExit(f"there is no {', '.join(unknown)} among {', '.join(writers)}.")
    there = {str(path.relative_to(GOLDEN)).split(".")[0] for path in GOLDEN.glob("objects/*")}
    there |= {str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("trainings/*")}
    for name in names or [name for name in writers if name not in there]:
        print(name)
        writers[name]()
    files = sorted(p for p in GOLDEN.rglob("*") if p.suffix in (".gz", ".npz"))
    SUMS.write_text("".join(f"{sha256(p)}  {p.relative_to(GOLDEN).as_posix()}\n" for p in files))


if __name__ == "__main__":
    main(sys.argv[1:])
