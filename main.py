"""Calls the main parts of jaxformers once and prints their shapes, then the models.

    python main.py

The exit status is 1 if a check fails.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    LearnablePositionalEncoding,
    MultiHeadAttention,
    OutputLayer,
    TokenEmbedding,
    Transformer,
    TransformerEmbedding,
    TransformerLM,
    create_causal_mask,
    keep_compiled_programs,
    positional_encoding,
    scaled_dot_product_attention,
)

BATCH, SEQ, SRC_SEQ = 2, 10, 12
D_MODEL, HEADS, D_FF, LAYERS = 64, 8, 256, 2
VOCAB, MAX_LENGTH = 100, 32

failures: list[str] = []


def check(name: str, passed: bool, what: str) -> None:
    """Prints the result of one check and counts a failure."""
    print(f"{'ok  ' if passed else 'FAIL'}  {name:<30} {what}")
    if not passed:
        failures.append(name)


def show(name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    """Checks that a result has a shape and is finite."""
    finite = bool(jnp.isfinite(x).all())
    check(name, x.shape == shape and finite, f"{x.shape}{'' if finite else ', not finite'}")


def tour_of_the_parts(key: jax.Array) -> None:
    """Calls attention, positions, embeddings, layers and stacks."""
    keys = iter(jax.random.split(key, 20))
    x = jax.random.normal(next(keys), (BATCH, SEQ, D_MODEL))
    memory = jax.random.normal(next(keys), (BATCH, SRC_SEQ, D_MODEL))
    tokens = jax.random.randint(next(keys), (BATCH, SEQ), 0, VOCAB)
    causal = create_causal_mask(SEQ)
    hidden = BATCH, SEQ, D_MODEL

    heads = x.reshape(BATCH, SEQ, HEADS, -1).swapaxes(1, 2)
    output, weights = scaled_dot_product_attention(heads, heads, heads, causal)
    show("scaled_dot_product_attention", output, (BATCH, HEADS, SEQ, D_MODEL // HEADS))
    sums = jnp.allclose(weights.sum(-1), 1, atol=1e-5)
    check("  its weights", bool(sums), f"{weights.shape}, rows sum to 1")
    check("create_causal_mask", int(causal.sum()) == SEQ * (SEQ + 1) // 2, f"{causal.shape}")

    attention = MultiHeadAttention(D_MODEL, HEADS, key=next(keys))
    show("MultiHeadAttention", attention(x, mask=causal), hidden)
    show("  to another sequence", attention(x, memory), hidden)
    show("positional_encoding", positional_encoding(SEQ, D_MODEL), (SEQ, D_MODEL))
    learned = LearnablePositionalEncoding(MAX_LENGTH, D_MODEL, key=next(keys))
    show("LearnablePositionalEncoding", learned(SEQ), (SEQ, D_MODEL))
    show("TokenEmbedding", TokenEmbedding(VOCAB, D_MODEL, key=next(keys))(tokens), hidden)
    embedding = TransformerEmbedding(VOCAB, D_MODEL, MAX_LENGTH, key=next(keys))
    show("TransformerEmbedding", embedding(tokens), hidden)
    show("FeedForward", FeedForward(D_MODEL, D_FF, key=next(keys))(x), hidden)

    sizes = D_MODEL, HEADS, D_FF
    show("EncoderLayer", EncoderLayer(*sizes, key=next(keys))(x), hidden)
    show("Encoder", Encoder(LAYERS, *sizes, key=next(keys))(x), hidden)
    show("DecoderLayer", DecoderLayer(*sizes, key=next(keys))(x, memory, causal), hidden)
    show("Decoder", Decoder(LAYERS, *sizes, key=next(keys))(x, memory, causal), hidden)
    log_probs = OutputLayer(D_MODEL, VOCAB, key=next(keys))(x)
    show("OutputLayer", log_probs, (BATCH, SEQ, VOCAB))
    check(
        "  its probabilities",
        bool(jnp.allclose(jnp.exp(log_probs).sum(-1), 1, atol=1e-4)),
        "sum to 1",
    )


def tour_of_the_models(key: jax.Array) -> None:
    """Calls a language model and an encoder-decoder, and generates with both."""
    lm_key, seq2seq_key, sample_key, dropout_key = jax.random.split(key, 4)
    tokens = jnp.arange(BATCH * SEQ).reshape(BATCH, SEQ) % VOCAB
    sizes: dict[str, Any] = {
        "d_model": D_MODEL,
        "num_heads": HEADS,
        "d_ff": D_FF,
        "max_seq_length": MAX_LENGTH,
    }

    lm = TransformerLM(VOCAB, num_layers=LAYERS, **sizes, key=lm_key)
    show("TransformerLM", lm(tokens), (BATCH, SEQ, VOCAB))
    changed = lm(tokens.at[:, -1].set(0))[:, :-1]
    check("  is causal", bool((changed == lm(tokens)[:, :-1]).all()), "the past ignores the future")
    noisy = lm(tokens, key=dropout_key)
    check("  dropout with a key", not jnp.allclose(noisy, lm(tokens)), "and none without")
    greedy = lm.generate(tokens, 8)
    check("  generate, greedy", greedy.shape == (BATCH, SEQ + 8), str(np.asarray(greedy[0, SEQ:])))
    sampled = lm.generate(tokens, 8, temperature=0.8, key=sample_key)
    check("  at temperature 0.8", bool((sampled < VOCAB).all()), str(np.asarray(sampled[0, SEQ:])))

    seq2seq = Transformer(
        VOCAB, VOCAB, num_encoder_layers=LAYERS, num_decoder_layers=LAYERS, **sizes, key=seq2seq_key
    )
    show("Transformer", seq2seq(tokens, tokens[:, :7]), (BATCH, 7, VOCAB))
    show("  encode", seq2seq.encode(tokens), (BATCH, SEQ, D_MODEL))
    show("  decode", seq2seq.decode(tokens[:, :7], seq2seq.encode(tokens)), (BATCH, 7, D_MODEL))
    out = seq2seq.generate(tokens, 9, start_token=1, end_token=2)
    check("  generate, greedy", out.shape == (BATCH, 9), str(np.asarray(out[0])))


def main() -> None:
    """Runs all checks."""
    keep_compiled_programs()
    parts_key, models_key = jax.random.split(jax.random.key(0))
    print(f"batch {BATCH}, sequence {SEQ}, source {SRC_SEQ}, d_model {D_MODEL}, heads {HEADS}\n")
    tour_of_the_parts(parts_key)
    print()
    tour_of_the_models(models_key)
    if failures:
        sys.exit(f"\n{len(failures)} checks failed: {', '.join(failures)}")
    print("\nall checks passed")


if __name__ == "__main__":
    main()
