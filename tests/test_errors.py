"""Bad input: an error that says what was expected, what came and what to do."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import (
    ALiBi,
    AttentionMask,
    Classifier,
    Decoder,
    DecoderLayer,
    Dense,
    Encoder,
    EncoderLayer,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    LearnablePositionalEncoding,
    MultiHeadAttention,
    OutputLayer,
    Residual,
    RMSNorm,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
    TokenEmbedding,
    Transformer,
    TransformerEmbedding,
    TransformerEncoder,
    TransformerLM,
    create_causal_mask,
    create_padding_mask,
    depth_scaled,
    normal,
    positional_encoding,
    scaled_dot_product_attention,
)

pytestmark = pytest.mark.usefixtures("no_shape_checker")

SRC_VOCAB, VOCAB, D, N, F, MAX = 11, 13, 8, 2, 12, 9
H = D // N
B, T, S = 2, 5, 7
LM_SIZES = (VOCAB, D, N, 1, F, MAX)
SEQ2SEQ_SIZES = (SRC_VOCAB, VOCAB, D, N, 1, 1, F, MAX)


def raises(*words, error=ValueError):
    """The error, with all these words in its message."""
    return pytest.raises(error, match="".join(f"(?=.*{word})" for word in words))


@cache
def build(constructor, *sizes, **options):
    with jax.ensure_compile_time_eval():  # a test may ask for it first within a `jit`
        return constructor(*sizes, key=jax.random.key(0), **options)


language_model = partial(build, TransformerLM, *LM_SIZES)
seq2seq_model = partial(build, Transformer, *SEQ2SEQ_SIZES)
encoder_model = partial(build, TransformerEncoder, *LM_SIZES)
TOKENS, SOURCE = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
X, MEMORY = jnp.ones((B, T, D)), jnp.ones((B, S, D))

# A call for every argument that takes token ids, with its name in messages and its vocabulary.
TAKES_TOKENS = {
    "language model": (lambda ids: language_model()(ids), "tokens", VOCAB),
    "encoder": (lambda ids: encoder_model()(ids), "tokens", VOCAB),
    "source": (lambda ids: seq2seq_model()(ids, TOKENS), "src", SRC_VOCAB),
    "target": (lambda ids: seq2seq_model()(SOURCE, ids), "tgt", VOCAB),
    "table": (lambda ids: build(TokenEmbedding, VOCAB, D)(ids), "tokens", VOCAB),
    "embedding": (lambda ids: build(TransformerEmbedding, VOCAB, D, MAX)(ids), "tokens", VOCAB),
}
takes_tokens = pytest.mark.parametrize("call, name, vocab", TAKES_TOKENS.values(), ids=TAKES_TOKENS)


@pytest.mark.few(3)
@takes_tokens
def test_token_ids(call, name, vocab):
    expected = f"{name} must be ids from 0 to {vocab - 1}"
    for make in (jnp.array, np.array, list):
        for bad in (vocab, -1, 1000):
            with raises(expected, f"got {bad}", "padding_mask="):
                call(make([[0, bad], [1, 1]]))
    # Beyond 32 bits, where a cast would wrap them to 1.
    with raises(expected, f"got {2**32 + 1}"):
        call(np.array([[1, 2**32 + 1]]))
    with raises(expected, f"got {2**63 + 1}"):
        call(np.array([[1, 2**63 + 1]], np.uint64))


@takes_tokens
def test_token_types_and_shapes(call, name, vocab):
    for bad, dtype in [
        (jnp.ones((B, T)), "float32"),
        (np.ones((B, T)), "float64"),
        (jnp.ones((B, T), bool), "bool"),
        (jnp.ones((B, T), jnp.complex64), "complex64"),
        ([["a", "b"]], "<U1"),
        ([[2**70]], "object"),
    ]:
        with raises(f"{name} must hold integer ids", f"got dtype {dtype}", "cast"):
            call(bad)
    for shape in [(), (1, B, T)]:
        with raises(f"{name} must have shape", r"\(t,\) or \(batch, t\)", "axis"):
            call(jnp.ones(shape, jnp.int32))
    for shape in [(0,), (0, T), (B, 0)]:
        with raises(f"{name} must not be empty", str(shape).replace("(", r"\(")[:-1]):
            call(np.ones(shape, int))


@takes_tokens
def test_what_a_tokenizer_returns_is_two_things(call, name, vocab):
    with raises(f"{name} must be one array", "tuple with a mask", "padding_mask="):
        call((TOKENS, TOKENS == 1))


@takes_tokens
def test_checks_under_jit(call, name, vocab):
    """The values are unknown there, shapes and types are not."""
    compiled = jax.jit(call)
    with raises(f"{name} must hold integer ids", "float32"):
        compiled(jnp.ones((B, T)))
    with raises(f"{name} must have shape"):
        compiled(jnp.ones((1, B, T), jnp.int32))
    with raises(f"{name} must not be empty"):
        compiled(jnp.ones((B, 0), jnp.int32))
    with raises("ids from 0 to", f"got {vocab}"):  # known nevertheless
        jax.jit(lambda: call(np.full((B, T), vocab)))()


def test_masks_and_lengths_under_jit():
    def call(tokens, mask=None, padding_mask=None):
        return language_model()(tokens, mask, padding_mask=padding_mask)

    compiled = jax.jit(call)
    with raises(f"max_seq_length = {MAX}", f"got {MAX + 1}"):
        compiled(jnp.ones((B, MAX + 1), jnp.int32))
    with raises("broadcast", r"\(4, 4\)"):
        compiled(TOKENS, jnp.ones((4, 4), bool))
    with raises("boolean", "int32"):
        compiled(TOKENS, jnp.ones((T, T), jnp.int32))
    with raises("padding_mask must be boolean", "float32"):
        compiled(TOKENS, None, jnp.ones((B, T)))


def test_what_works():
    """Lists, numpy arrays of any integer type and of both ranks are token ids."""
    expected = language_model()(TOKENS)
    for ids in ([[1] * T] * B, np.ones((B, T), np.int64), np.ones((B, T), np.uint8)):
        np.testing.assert_array_equal(language_model()(ids), expected)
    assert language_model()([1, 2, VOCAB - 1]).shape == (3, VOCAB)
    assert seq2seq_model()([[1, 2]], np.array([[1, 2, 3]])).shape == (1, 3, VOCAB)
    assert encoder_model()([1, 2]).shape == (2, D)
    # Masks as lists and numpy arrays too.
    real = [[True, True], [True, False]]
    a = language_model()([[1, 2], [3, 4]], padding_mask=real)
    b = language_model()([[1, 2], [3, 4]], padding_mask=np.array(real))
    np.testing.assert_array_equal(a, b)
    a = language_model()([[1, 2], [3, 4]], [[True, False], [True, True]])
    b = language_model()([[1, 2], [3, 4]], np.tril(np.ones((2, 2), bool)))
    np.testing.assert_array_equal(a, b)
    src = {"src_padding_mask": real, "tgt_padding_mask": real}
    assert seq2seq_model()([[1, 2], [3, 4]], [[1, 2], [3, 4]], **src).shape == (2, 2, VOCAB)


# Lengths and positions.


def test_sequences_longer_than_the_table():
    limit = f"max_seq_length = {MAX}", f"got {MAX + 1}", "RotaryPositionalEncoding"
    longer = jnp.ones((B, MAX + 1), jnp.int32)
    for learnable_pos in (False, True):
        options = {"learnable_pos": learnable_pos}
        with raises(*limit):
            language_model(**options)(longer)
        with raises(*limit):
            encoder_model(**options)(longer)
        with raises(*limit):
            seq2seq_model(**options)(longer, TOKENS)
        with raises(*limit):
            seq2seq_model(**options)(SOURCE, longer)
        with raises(*limit):
            language_model(**options).init_cache(B, MAX + 1)
        with raises(*limit):
            build(TransformerEmbedding, VOCAB, D, MAX, **options)(longer)
    with raises(*limit):
        SinusoidalPositionalEncoding(MAX, D)(MAX + 1)
    with raises(*limit):
        build(LearnablePositionalEncoding, MAX, D)(MAX + 1)
    assert language_model()(longer[:, :MAX]).shape == (B, MAX, VOCAB)
    for position in (RotaryPositionalEncoding(), ALiBi()):
        assert language_model(position=position)(longer).shape == (B, MAX + 1, VOCAB)


@pytest.mark.parametrize("learnable_pos", [False, True])
def test_positions_beyond_the_table(learnable_pos):
    positions = jnp.arange(T) + MAX - T + 1
    mask = AttentionMask(q_positions=positions, k_positions=positions)
    for model in (
        language_model(learnable_pos=learnable_pos),
        encoder_model(learnable_pos=learnable_pos),
    ):
        with raises(f"max_seq_length = {MAX}", f"got {MAX + 1}", "larger max_seq_length"):
            model(TOKENS, mask)


def test_positions_or_padding_not_both():
    real = jnp.ones((B, T), bool)
    mask = AttentionMask(q_positions=jnp.arange(T), k_positions=jnp.arange(T))
    for model in (language_model(), encoder_model()):
        with raises("q_positions", "padding_mask", "one of the two"):
            model(TOKENS, mask, padding_mask=real)


# Masks.


def attends(*arguments, mask=None):
    return build(MultiHeadAttention, D, N)(*arguments, mask=mask)


TAKES_MASK = {
    "attention": ((B, N, T, T), lambda mask: attends(X, mask=mask)),
    "cross-attention": ((B, N, T, S), lambda mask: attends(X, MEMORY, mask=mask)),
    "encoder layer": ((B, N, T, T), lambda mask: build(EncoderLayer, D, N, F)(X, mask)),
    "decoder": ((B, N, T, T), lambda mask: build(Decoder, 1, D, N, F)(X, MEMORY, mask)),
    "to memory": ((B, N, T, S), lambda mask: build(Decoder, 1, D, N, F)(X, MEMORY, None, mask)),
    "language model": ((B, N, T, T), lambda mask: language_model()(TOKENS, mask)),
    "encoder": ((B, N, T, T), lambda mask: encoder_model()(TOKENS, mask)),
    "source": ((B, N, S, S), lambda mask: seq2seq_model()(SOURCE, TOKENS, mask)),
    "target": ((B, N, T, T), lambda mask: seq2seq_model()(SOURCE, TOKENS, None, mask)),
    "source to target": (
        (B, N, T, S),
        lambda mask: seq2seq_model()(SOURCE, TOKENS, None, None, mask),
    ),
}


@pytest.mark.parametrize("shape, call", TAKES_MASK.values(), ids=TAKES_MASK)
def test_masks(shape, call):
    b, n, t, s = shape
    for bad in [(b + 1, 1, t, s), (b, n + 1, t, s), (t, s + 1), (t + 1, s), (s - 1,), (1, *shape)]:
        with raises("broadcast", rf"\({b}, {n}, {t}, {s}\)", r"got \(", r"mask\[:, None\]"):
            call(jnp.ones(bad, bool))
    for dtype in (jnp.int32, jnp.float32):
        with raises("boolean", f"got dtype {dtype.dtype.name}", "mask != 0"):
            call(jnp.ones((t, s), dtype))


PADDED = {
    "language model": ("padding_mask", lambda mask: language_model()(TOKENS, padding_mask=mask)),
    "encoder": ("padding_mask", lambda mask: encoder_model()(TOKENS, padding_mask=mask)),
    "source": (
        "src_padding_mask",
        lambda mask: seq2seq_model()(TOKENS, SOURCE, src_padding_mask=mask),
    ),
    "target": (
        "tgt_padding_mask",
        lambda mask: seq2seq_model()(SOURCE, TOKENS, tgt_padding_mask=mask),
    ),
    "decoding": (
        "src_padding_mask",
        lambda mask: seq2seq_model().decode(SOURCE, X, src_padding_mask=mask),
    ),
}


@pytest.mark.parametrize("name, call", PADDED.values(), ids=PADDED)
def test_padding_masks(name, call):
    expected = f"^{name} must be boolean", rf"shape \({B}, {T}\)", f"{name} == 1"
    for shape in [(T,), (B, T + 1), (B, 1, T), (1, T)]:
        with raises(*expected, "got an array of dtype bool and shape"):
            call(np.ones(shape, bool))
    for dtype in (np.int32, np.float32):
        with raises(*expected, f"got an array of dtype {np.dtype(dtype).name}"):
            call(np.ones((B, T), dtype))


def test_positions_and_segments_of_masks():
    for model in (language_model(), encoder_model()):
        with raises("needs q_positions", "k_positions alone", "Give q_positions"):
            model(TOKENS, AttentionMask(k_positions=jnp.arange(T)))
        for shape in [(T - 1,), (B + 1, T)]:
            segments = jnp.zeros(shape, jnp.int32)
            for names in [("q_positions", "k_positions"), ("q_segments", "k_segments")]:
                with raises(f"{names[0]} of a mask must have shape", rf"\({B}, {T}\)", "got"):
                    model(TOKENS, AttentionMask(**dict.fromkeys(names, segments)))
    for name in ("q_positions", "k_positions"):
        for bad in (jnp.zeros(T), jnp.zeros((B, 1, T), jnp.int32), 3):
            with raises(f"{name} of a mask must be integers of shape", "got dtype"):
                AttentionMask(**{name: bad})


def test_mask_descriptions():
    segments = jnp.zeros(T, jnp.int32)
    with raises("q_segments and k_segments together"):
        AttentionMask(q_segments=segments)
    with raises("q_segments and k_segments together"):
        AttentionMask(k_segments=segments)
    with raises("boolean", "float32", "mask != 0"):
        AttentionMask(explicit=jnp.ones((T, T)))
    with raises("integer ids", "float32"):
        create_padding_mask(jnp.ones((B, T)), 0)
    for size in (0, -1, 2.0, True):
        with raises("seq_length must be an integer of at least 1", f"got {size}"):
            create_causal_mask(size)
        with raises("window must be an integer of at least 1", f"got {size}"):
            AttentionMask(window=size)


# Activations.


def test_activations():
    mha, encoder = build(MultiHeadAttention, D, N), build(Encoder, 1, D, N, F)
    decoder, layer = build(Decoder, 1, D, N, F), build(DecoderLayer, D, N, F)
    calls = {
        "query": lambda x: mha(x, MEMORY),
        "keys": lambda x: mha(X, x),
        "values": lambda x: mha(X, MEMORY, x),
        "x": lambda x: encoder(x),
        "encoder_output": lambda x: layer(X, x),
    }
    for name, call in calls.items():
        with raises(f"^{name} must be a floating-point array", "dtype int32"):
            call(jnp.ones((B, T, D), jnp.int32))
        for shape in [(B, T, D + 1), (D,), (1, B, T, D), (B, 0, D), (0, T, D)]:
            with raises(
                rf"(\(batch, t, {D}\)|same batch axis)", name, "must have", str(shape)[1:-1]
            ):
                call(jnp.ones(shape))
    with raises("x must have shape", rf"\({B}, {T}, {D + 1}\)"):
        decoder(jnp.ones((B, T, D + 1)), MEMORY)


def test_batches_that_do_not_fit():
    more = jnp.ones((B + 1, S, D))
    shapes = rf"\({B}, {T}, {D}\)", rf"\({B + 1}, {S}, {D}\)"
    with raises("query and keys", "same batch axis", *shapes):
        attends(X, more)
    with raises("query and values", "same batch axis", *shapes):
        attends(X, MEMORY, more)
    with raises("query and keys", "same batch axis"):
        attends(X[0], MEMORY)
    with raises("keys and values must agree"):
        attends(X, MEMORY, MEMORY[:, :-1])
    for decoder in (build(Decoder, 1, D, N, F), build(DecoderLayer, D, N, F)):
        with raises("x and encoder_output", "same batch axis", *shapes):
            decoder(X, more)
        with raises("x and encoder_output", "same batch axis"):
            decoder(X, MEMORY[0])
    with raises("same batch axis"):
        seq2seq_model()(SOURCE, jnp.ones((B + 1, T), jnp.int32))
    with raises("same batch axis"):
        seq2seq_model()(SOURCE[0], TOKENS)


def test_scaled_dot_product_attention():
    q, k, v = jnp.ones((B, N, T, 4)), jnp.ones((B, N, S, 4)), jnp.ones((B, N, S, 3))
    for bad in [(q, k[0], v), (q, k, v[:1]), (q, k[:, :1], v), (q[0, 0, 0],) * 3]:
        with raises("share their leading axes", "got"):
            scaled_dot_product_attention(*bad)
    for bad in [(q, k[..., :3], v), (q, k, v[:, :, 1:])]:
        with raises("keys must have the query's features", "got query"):
            scaled_dot_product_attention(*bad)
    with raises("broadcast", rf"\({B}, {N}, {T}, {S}\)", r"got \(5, 5\)"):
        scaled_dot_product_attention(q, k, v, jnp.ones((T, T), bool))
    with raises("boolean", "float32"):
        scaled_dot_product_attention(q, k, v, jnp.ones((T, S)))


# Constructors.

# A constructor, its sizes by name, and whether it needs a key.
CONSTRUCTORS = {
    TransformerLM: {
        "vocab_size": VOCAB,
        "d_model": D,
        "num_heads": N,
        "num_layers": 1,
        "d_ff": F,
        "max_seq_length": MAX,
    },
    Transformer: {
        "src_vocab_size": SRC_VOCAB,
        "tgt_vocab_size": VOCAB,
        "d_model": D,
        "num_heads": N,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "d_ff": F,
        "max_seq_length": MAX,
    },
    Encoder: {"num_layers": 1, "d_model": D, "num_heads": N, "d_ff": F},
    EncoderLayer: {"d_model": D, "num_heads": N, "d_ff": F},
    MultiHeadAttention: {"d_model": D, "num_heads": N},
    FeedForward: {"d_model": D, "d_ff": F},
    TokenEmbedding: {"vocab_size": VOCAB, "d_model": D},
    LearnablePositionalEncoding: {"max_seq_length": MAX, "d_model": D},
    TransformerEmbedding: {"vocab_size": VOCAB, "d_model": D, "max_seq_length": MAX},
    OutputLayer: {"d_model": D, "vocab_size": VOCAB},
}
CONSTRUCTORS |= {
    TransformerEncoder: CONSTRUCTORS[TransformerLM],
    Decoder: CONSTRUCTORS[Encoder],
    DecoderLayer: CONSTRUCTORS[EncoderLayer],
    GatedFeedForward: CONSTRUCTORS[FeedForward],
}
TAKE_PIECES = [
    *(TransformerLM, Transformer, TransformerEncoder),
    *(Encoder, EncoderLayer, Decoder, DecoderLayer),
]
each_constructor = pytest.mark.parametrize("constructor", CONSTRUCTORS)
takes_pieces = pytest.mark.parametrize("constructor", TAKE_PIECES)


@each_constructor
def test_a_key_is_required(constructor):
    sizes = CONSTRUCTORS[constructor]
    for bad, got in [
        (None, "got None"),
        (0, "got 0"),
        ("key", "got 'key'"),
        (jnp.zeros(3), "float32"),
        (jax.random.split(jax.random.key(0)), r"shape \(2,\)"),
        (np.zeros(2, np.uint32), "uint32"),
    ]:
        with raises("key must be a JAX PRNG key", got, r"key=jax.random.key\(0\)"):
            constructor(**sizes, key=bad)
    with raises("key must be a JAX PRNG key", "got None"):
        constructor(**sizes)


@each_constructor
def test_sizes(constructor):
    sizes = CONSTRUCTORS[constructor]
    # One size names the same thing in a model and in the part that checks it.
    alias = {"num_encoder_layers": "num_layers", "num_decoder_layers": "num_layers"}
    alias |= {"src_vocab_size": "vocab_size", "tgt_vocab_size": "vocab_size"}
    for name in sizes:
        for bad in (0, -2, 2.0, True, "2", None):
            with raises(
                f"{alias.get(name, name)} must be an integer of at least 1", f"got {bad!r}"
            ):
                constructor(**sizes | {name: bad}, key=jax.random.key(0))


@takes_pieces
def test_unknown_options(constructor):
    """Python's own error for one is a TypeError, ours are all ValueErrors: it is both."""
    sizes, key = CONSTRUCTORS[constructor], jax.random.key(0)
    name = constructor.__name__
    for error in (ValueError, TypeError):
        with raises(
            name, "has no option 'num_kv_head'", "Did you mean 'num_kv_heads'", error=error
        ):
            constructor(**sizes, num_kv_head=1, key=key)
        with raises(name, "has no option 'dropout'", "Did you mean 'dropout_rate'", error=error):
            constructor(**sizes, dropout=0.1, key=key)
        with raises(name, "has no option 'zzz'", "Its options are: ", "norm_first", error=error):
            constructor(**sizes, zzz=1, key=key)


# Where each flag is an option; norm and feed-forward are those of a layer.
FLAGS = {
    "use_bias": [*TAKE_PIECES, MultiHeadAttention, FeedForward, GatedFeedForward, OutputLayer],
    "use_out_bias": [*TAKE_PIECES, MultiHeadAttention],
    "norm_first": TAKE_PIECES,
    "final_norm": [TransformerLM, Transformer, TransformerEncoder, Encoder, Decoder],
    "learnable_pos": [TransformerLM, Transformer, TransformerEncoder, TransformerEmbedding],
    "tie_embeddings": [TransformerLM, Transformer],
    "share_embeddings": [Transformer],
    "cross_attention": [Decoder, DecoderLayer],
    "tied": [OutputLayer],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag):
    """A string or a number is no flag: `"no"` would be true."""
    for constructor in FLAGS[flag]:
        for bad in ("no", 0, 1.0):
            with raises(f"{flag} must be True or False", f"got {bad!r}"):
                options = CONSTRUCTORS[constructor] | {flag: bad}
                constructor(**options, key=jax.random.key(0))


@takes_pieces
def test_pieces_are_constructors_and_functions(constructor):
    for piece in ("norm", "qk_norm", "feed_forward", "attention_fn", "init", "residual_init"):
        with raises(f"{piece} must be a function or a class to call", "got 3"):
            constructor(**CONSTRUCTORS[constructor], **{piece: 3}, key=jax.random.key(0))


@takes_pieces
def test_options_out_of_range(constructor):
    sizes, key = CONSTRUCTORS[constructor], jax.random.key(0)
    for name in ("dropout_rate", "attention_dropout_rate"):
        for bad in (1.0, -0.1, float("nan"), 2, "0.1", True, None):
            with raises(rf"{name} must be a number in \[0, 1\)", f"got {bad!r}"):
                constructor(**sizes, **{name: bad}, key=key)
    for name in ("num_kv_heads", "head_dim", "window"):
        for bad in (0, -1, 2.0, True, "2"):
            with raises(f"{name} must be an integer of at least 1", f"got {bad!r}"):
                constructor(**sizes, **{name: bad}, key=key)
    with raises("d_model must be divisible by num_heads", f"got {D} and 3", "head_dim"):
        constructor(**sizes | {"num_heads": 3}, key=key)
    with raises("num_heads must be a multiple of num_kv_heads", "got 4 and 3"):
        constructor(**sizes | {"num_heads": 4}, num_kv_heads=3, key=key)
    with raises("must be even", "got 3", "rotary_dim="):
        constructor(**sizes, head_dim=3, position=RotaryPositionalEncoding(), key=key)
    with raises("rotary_dim must be at most head_dim 4", "got 6"):
        constructor(**sizes, position=RotaryPositionalEncoding(rotary_dim=6), key=key)


@pytest.mark.parametrize("constructor", [TransformerLM, Transformer, TransformerEncoder])
def test_position_schemes_of_models(constructor):
    sizes, key = CONSTRUCTORS[constructor], jax.random.key(0)
    for scheme in (RotaryPositionalEncoding, ALiBi, LearnablePositionalEncoding):
        with raises("must be a scheme, got a class", rf"position={scheme.__name__}\(\)"):
            constructor(**sizes, position=scheme, key=key)
    for bad in (3, "rotary"):
        with raises("must be a position scheme", f"got {bad!r}", r"RotaryPositionalEncoding\(\)"):
            constructor(**sizes, position=bad, key=key)
    with raises("learnable_pos=True", "position=", "one of the two"):
        constructor(**sizes, position=ALiBi(), learnable_pos=True, key=key)
    with raises("embedding_scale|scale", "must be a finite number above 0"):
        constructor(**sizes, embedding_scale=0.0, key=key)


@pytest.mark.parametrize("width", [1, D + 2])
def test_position_scheme_of_another_width(width):
    scheme = SinusoidalPositionalEncoding(MAX, width)
    with raises("position", f"{D}", f"got {width}"):
        TransformerLM(*LM_SIZES, position=scheme, key=jax.random.key(0))(TOKENS)


@pytest.mark.parametrize(
    "constructor", [Encoder, EncoderLayer, Decoder, DecoderLayer, MultiHeadAttention]
)
def test_position_schemes_of_layers(constructor):
    """They rotate; ALiBi goes to a whole stack; and no scheme is a class."""
    sizes, key = CONSTRUCTORS[constructor], jax.random.key(0)
    refused = [RotaryPositionalEncoding, ALiBi, 3, SinusoidalPositionalEncoding(MAX, D)]
    for scheme in refused if constructor in (Encoder, Decoder) else [*refused, ALiBi()]:
        with raises("must rotate queries and keys", r"RotaryPositionalEncoding\(\)", "got"):
            constructor(**sizes, position=scheme, key=key)


def test_encoder_and_decoder_do_not_share_weights():
    scheme = build(LearnablePositionalEncoding, MAX, D)
    with raises("cannot share a position scheme with weights", "function `key -> scheme`"):
        Transformer(*SEQ2SEQ_SIZES, position=scheme, key=jax.random.key(0))
    model = seq2seq_model(position=lambda key: LearnablePositionalEncoding(MAX, D, key=key))
    tables = [m.position.weight for m in (model.src_embedding, model.tgt_embedding)]
    assert not np.allclose(*tables)
    with raises("share_embeddings=True", "one vocabulary", f"{SRC_VOCAB}", f"{VOCAB}"):
        Transformer(*SEQ2SEQ_SIZES, share_embeddings=True, key=jax.random.key(0))


def test_numbers():
    """Of the small parts that have no constructor in common."""
    for bad in (0, 0.0, -1, float("inf"), float("nan"), "1", True, None):
        for name, constructor in {
            "theta": RotaryPositionalEncoding,
            "eps": partial(LayerNorm, D),
            "stddev": normal,
        }.items():
            with raises(f"{name} must be a finite number above 0", f"got {bad!r}"):
                constructor(bad)
        with raises("eps must be a finite number above 0", f"got {bad!r}"):
            RMSNorm(D, bad)
    for bad in (0, -1, 2.0, True):
        for call in (
            depth_scaled,
            LayerNorm,
            RMSNorm,
            partial(positional_encoding, d_model=D),
            partial(positional_encoding, 3),
            partial(SinusoidalPositionalEncoding, d_model=D),
            partial(SinusoidalPositionalEncoding, 3),
            SinusoidalPositionalEncoding(3, D),
            build(LearnablePositionalEncoding, MAX, D),
        ):
            with raises("must be an integer of at least 1", f"got {bad!r}"):
                call(bad)
    with raises(r"dropout_rate must be a number in \[0, 1\)", "got 1.0"):
        Residual(LayerNorm, D, 1.0)
    with raises("must be even", "got 3"):
        RotaryPositionalEncoding(rotary_dim=3)
    for bad in (0, -2, 2.0, "4"):
        with raises("rotary_dim must be an integer of at least 1", f"got {bad!r}"):
            RotaryPositionalEncoding(rotary_dim=bad)


# Caches, encoders and tied layers.


def test_a_full_cache():
    model = language_model()
    cache = model.init_cache(B, T)
    _, cache = model.forward(TOKENS[:, :3], cache=cache)
    with raises(f"cache has {T} slots", "3 of them in use", "cannot take 3 more", "more slots"):
        model.forward(TOKENS[:, :3], cache=cache)
    _, cache = model.forward(TOKENS[:, :2], cache=cache)
    with raises(f"cache has {T} slots", f"{T} of them in use", "cannot take 1 more"):
        model.forward(TOKENS[:, :1], cache=cache)
    for bad in (0, 2.0, None):
        with raises("slots must be an integer of at least 1", f"got {bad}"):
            model.init_cache(B, bad)
        with raises("batch_size must be an integer of at least 1", f"got {bad}"):
            model.init_cache(bad, T)


@pytest.mark.parametrize("shape", [(B + 1, 2), (1, 2), (2,)])
def test_a_cache_for_another_batch(shape):
    model = language_model()
    with raises("cache", f"{B}", "batch"):
        model.forward(jnp.ones(shape, jnp.int32), cache=model.init_cache(B, T))


def test_encoder_output_where_there_is_cross_attention():
    for constructor, sizes in [(DecoderLayer, (D, N, F)), (Decoder, (1, D, N, F))]:
        with raises("has cross-attention", "encoder_output none", "cross_attention=True"):
            build(constructor, *sizes)(X)
        with raises("has no cross-attention", rf"\({B}, {S}, {D}\)", "cross_attention=True"):
            build(constructor, *sizes, cross_attention=False)(X, MEMORY)
    with raises("has cross-attention", "encoder_output none"):
        seq2seq_model().forward(TOKENS)
    with raises("has cross-attention", "encoder_output none"):
        build(Decoder, 1, D, N, F).init_cache(B, T)


def test_tied_output():
    table = build(TokenEmbedding, VOCAB, D).weight
    with raises("tied output layer needs the token table", "table = None"):
        OutputLayer(D, VOCAB, tied=True)(X)
    with raises("one with weights of its own takes none"):
        build(OutputLayer, D, VOCAB)(X, table)
    embedding = build(TransformerEmbedding, VOCAB, D, MAX).with_tokens(None)
    with raises("with_tokens"):
        embedding(TOKENS)


def test_dropout_keys_of_calls():
    for bad, got in [(0, "got 0"), (True, "got True"), (jnp.zeros(3), "float32")]:
        for call in (
            lambda key: language_model()(TOKENS, key=key),
            lambda key: encoder_model()(TOKENS, key=key),
            lambda key: seq2seq_model()(SOURCE, TOKENS, key=key),
            lambda key: build(Encoder, 1, D, N, F)(X, None, key),
        ):
            with raises("key must be a JAX PRNG key", got, r"jax.random.key\(0\)"):
                call(bad)


def test_ids_that_are_unknown_under_jit_read_no_other_row():
    """No error is possible there; JAX would read the last row, or count from the end."""
    for call, _, vocab in TAKES_TOKENS.values():
        compiled = jax.jit(call)
        for bad in (vocab, -1, -vocab):
            ids = jnp.ones((B, T), jnp.int32).at[0, 0].set(bad)
            assert jnp.isnan(compiled(ids)[0]).any()
            assert jnp.isfinite(compiled(ids)[1]).all()


def test_messages_hold_with_the_model_as_argument():
    """Not only where the model is known: `eqx.filter_jit` hands its arrays in as unknowns."""
    with raises("ids from 0 to", f"got {VOCAB}"):
        eqx.filter_jit(lambda model: model(np.full((B, T), VOCAB)))(language_model())


@pytest.mark.few(3)
@takes_pieces
def test_what_is_built_already_is_no_constructor(constructor):
    """`norm=RMSNorm(8)` is one norm, and each layer needs its own."""
    key = jax.random.key(0)
    built = {
        "norm": RMSNorm(D),
        "qk_norm": RMSNorm(H),
        "feed_forward": FeedForward(D, F, key=key),
    }
    for piece, module in built.items():
        kind = type(module).__name__
        with raises(
            rf"{piece} must be a constructor", f"instance of {kind}", f"Pass {kind} itself"
        ):
            constructor(**CONSTRUCTORS[constructor], **{piece: module}, key=key)


def test_what_is_built_already_is_no_constructor_of_a_models_parts():
    key = jax.random.key(0)
    sizes = CONSTRUCTORS[TransformerLM]
    model = TransformerLM(**sizes, key=key)
    for piece in ("embedding", "output"):
        with raises(f"{piece} must be a constructor", "which is built already"):
            TransformerLM(**sizes, **{piece: getattr(model, piece)}, key=key)
    sizes = CONSTRUCTORS[TransformerEncoder]
    with raises("pooler must be a constructor", "instance of Dense"):
        TransformerEncoder(**sizes, pooler=Dense(D, D, key=key), key=key)
    with raises("classifier must be a constructor", "instance of Classifier"):
        TransformerEncoder(**sizes, classifier=Classifier(D, 3, key=key), key=key)
    with raises("norm must be a constructor", "instance of RMSNorm"):
        Dense(D, D, norm=RMSNorm(D), key=key)
    with raises("transform must be a constructor", "instance of Dense"):
        OutputLayer(D, 7, transform=Dense(D, D, key=key), key=key)


@takes_pieces
def test_pieces_that_are_called_otherwise(constructor):
    """A function with other arguments is refused where it is passed, not where it is called."""
    sizes, key = CONSTRUCTORS[constructor], jax.random.key(0)
    with raises(r"feed_forward must be .* feed_forward\(d_model, d_ff, key=...\)", "got gelu"):
        constructor(**sizes, feed_forward=jax.nn.gelu, key=key)
    with raises("norm must be a constructor", "which returned 4"):
        constructor(**sizes, norm=lambda d_model: 4, key=key)
    with raises(r"norm must be .* norm\(d_model\)"):
        constructor(**sizes, norm=lambda: RMSNorm(D), key=key)
    with raises(r"attention_fn\(q, k, v, mask\), got <lambda>\(q, k, v\)"):
        constructor(**sizes, attention_fn=lambda q, k, v: v, key=key)
    with raises(r"attention_fn\(q, k, v, mask, softcap=...\), got <lambda>\(q, k, v, mask\)"):
        constructor(**sizes, attention_fn=lambda q, k, v, mask: v, softcap=3.0, key=key)
    with raises(r"attention_fn\(q, k, v, mask, dropout=...\)"):
        options = {"attention_dropout_rate": 0.5}
        constructor(**sizes, attention_fn=lambda q, k, v, mask: v, **options, key=key)
    for init in ("init", "residual_init"):
        with raises(f"{init} must be a function .key, shape, fan_in, fan_out", "takes a dtype"):
            constructor(**sizes, **{init: jax.nn.initializers.normal()}, key=key)
        with raises(rf"{init}\(key, shape, fan_in, fan_out\), got <lambda>\(key, shape\)"):
            constructor(**sizes, **{init: lambda key, shape: jnp.zeros(shape)}, key=key)


def test_names_that_arguments_have_elsewhere(no_shape_checker):
    """What Hugging Face's models call `attention_mask` is a padding mask here."""
    lm, seq2seq, encoder = language_model(), seq2seq_model(), encoder_model()
    real = TOKENS > 0
    for call, given, meant in [
        (lambda **x: lm(**x), {"input_ids": TOKENS}, "tokens"),
        (lambda **x: lm(TOKENS, **x), {"attention_mask": real}, "padding_mask"),
        (lambda **x: lm.logits(TOKENS, **x), {"attention_mask": real}, "padding_mask"),
        (lambda **x: lm.score(TOKENS, **x), {"attention_mask": real}, "padding_mask"),
        (lambda **x: lm.forward(TOKENS, **x), {"past_key_values": None}, "cache"),
        (lambda **x: lm.generate(TOKENS, 2, **x), {"attention_mask": real}, "padding_mask"),
        (lambda **x: lm.generate(TOKENS, **x), {"max_length": 5}, "max_new_tokens"),
        (lambda **x: seq2seq.generate(SOURCE, 2, **x), {"padding_mask": real}, "src_padding_mask"),
        (
            lambda **x: seq2seq.generate(SOURCE, 2, **x),
            {"attention_mask": real},
            "src_padding_mask",
        ),
        (lambda **x: seq2seq.generate(SOURCE, **x), {"max_new_tokens": 2}, "max_length"),
        (lambda **x: lm.generate(TOKENS, 2, **x), {"eos_token_id": 2}, "end_token"),
        (lambda **x: lm.generate(TOKENS, 2, **x), {"do_sample": True}, "key"),
        (lambda **x: next(lm.stream(TOKENS, 2, **x)), {"pad_token_id": 2}, "pad_token"),
        (lambda **x: seq2seq(SOURCE, TOKENS, **x), {"attention_mask": real}, "src_padding_mask"),
        (lambda **x: seq2seq(SOURCE, **x), {"decoder_input_ids": TOKENS}, "tgt"),
        (lambda **x: seq2seq.encode(SOURCE, **x), {"attention_mask": real}, "src_padding_mask"),
        (lambda **x: seq2seq.encode(SOURCE, **x), {"src_paddin_mask": real}, "src_padding_mask"),
        (lambda **x: encoder(TOKENS, **x), {"token_type_ids": TOKENS}, "token_types"),
        (lambda **x: encoder.embed(TOKENS, **x), {"attention_mask": real}, "padding_mask"),
        (lambda **x: TransformerLM(VOCAB, **x), {"num_attention_heads": 2}, "num_heads"),
        (lambda **x: lm(TOKENS, **x), {"pad_mask": real}, "padding_mask"),
    ]:
        for error in (ValueError, TypeError):
            name = next(iter(given))
            with raises(f"has no option '{name}'", f"Did you mean '{meant}'", error=error):
                call(**given)
