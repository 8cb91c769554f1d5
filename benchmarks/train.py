"""Measures steps of training beside other libraries, on one machine in one run.

    python benchmarks/train.py [a b c ...] [--contenders ours torch ...] [--json FILE]

A step is forward, backward and AdamW, without dropout. All contenders start from the same weights
and have the same batch. The losses of the first four steps must agree. `own loop` is ours in a step
that a user writes, with `log_probs_of`, and `own loop, gathered` with entries of `model(tokens)`.

a, b and c are decoders of nanoGPT's shape: pre-norm, learned positions, a tied table and GELU by
tanh. `seq2seq` is a smaller form of the paper's encoder-decoder, post-norm, beside
torch.nn.Transformer. Where JAX finds a GPU, `124M` is GPT-2 in bfloat16 with float32 weights.
Contenders whose packages are not installed are left out.
"""

import sys
from functools import partial

import contest
import numpy as np
import train_task as task

CONFIGS = {
    "a": dict(vocab=65, d_model=128, layers=4, heads=4, t=64, batch=12),
    "b": dict(vocab=65, d_model=384, layers=6, heads=6, t=256, batch=8),
    "c": dict(vocab=50304, d_model=768, layers=12, heads=12, t=256, batch=1),
    "seq2seq": dict(
        vocab=1000,
        d_model=256,
        layers=4,
        heads=8,
        t=64,
        batch=32,
        source=57,
        without=("own loop", "own loop, gathered", "Flax NNX", "Equinox"),
    ),
}
ON_GPU = {
    "124M": dict(vocab=50304, d_model=768, layers=12, heads=12, t=1024, batch=16, dtype="bfloat16")
}
REPEATS = {"a": 20, "124M": 10}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, in bfloat16


def ours(config, **pieces):
    import jax.numpy as jnp

    import jaxformers

    if "source" in config:
        model = our_seq2seq(config, **pieces)
        src, tgt = (jnp.array(x) for x in task.seq2seq_text(config))
        batch = {"src": src, "tgt": tgt[:, :-1], "targets": tgt[:, 1:]}
        return our_step(model, batch, jaxformers.sequence_to_sequence_loss)
    rows = jnp.array(task.decoder_text(config))
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    model = our_decoder(config, **pieces)
    return our_step(model, batch, jaxformers.language_model_loss, config.get("dtype"))


def own_loop(config, gathered=False):
    """Builds a user's own step, with a loss of `log_probs_of` or of entries of `model(tokens)`."""
    import equinox as eqx
    import jax.numpy as jnp

    import jaxformers

    rows = jnp.array(task.decoder_text(config))
    tokens, targets = rows[:, :-1], rows[:, 1:]
    model = our_decoder(config)
    optimizer = jaxformers.AdamW(task.RATE, task.B1, task.B2, task.EPS, task.DECAY)
    state = optimizer.init(model)

    @eqx.filter_jit(donate="all-except-first")
    def update(batch, model, state):
        tokens, targets = batch

        def loss(model):
            if "dtype" in config:
                model = jaxformers.cast_floating(model, config["dtype"])
            if gathered:
                return -jnp.take_along_axis(model(tokens), targets[..., None], axis=-1).mean()
            return -model.log_probs_of(tokens, targets).mean()

        value, grads = eqx.filter_value_and_grad(loss)(model)
        model, state = optimizer.update(grads, state, model)
        return model, state, value

    def step():
        nonlocal model, state
        model, state, value = update((tokens, targets), model, state)
        return value.block_until_ready()

    return task.timed(step)


def our_step(model, batch, loss, dtype=None):
    import jax

    import jaxformers

    optimizer = jaxformers.AdamW(task.RATE, task.B1, task.B2, task.EPS, task.DECAY)
    state, key = optimizer.init(model), jax.random.key(0)
    options = dict(optimizer=optimizer, loss=loss, key=key)
    options |= {} if dtype is None else {"compute_dtype": dtype}

    def step():
        nonlocal model, state
        model, state, value = jaxformers.train_step(model, state, batch, **options)
        return value.block_until_ready()

    return task.timed(step)


def our_decoder(config, **pieces):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import jaxformers

    w, n, d = task.decoder_weights(config), config["layers"], config["d_model"]
    heads, h = config["heads"], d // config["heads"]
    model = jaxformers.TransformerLM(
        config["vocab"],
        d,
        heads,
        n,
        4 * d,
        config["t"],
        dropout_rate=config.get("dropout", 0.0),
        learnable_pos=True,
        tie_embeddings=True,
        embedding_scale=1.0,
        feed_forward=partial(jaxformers.FeedForward, activation=jaxformers.activations.gelu_tanh),
        key=jax.random.key(0),
        **pieces,
    )
    values = [w["tokens"], w["positions"]]
    for i in range(n):
        q, k, v = np.split(w["qkv"][i], 3, axis=1)
        values += [x.reshape(d, heads, h) for x in (q, k, v)] + [w["out"][i].reshape(heads, h, d)]
        values += [w["up"][i], w["down"][i]]

    def places(m):
        found = [m.embedding.token_embedding.weight, m.embedding.position.weight]
        for layer in m.decoder.layers:
            a, f = layer.self_attention, layer.feed_forward
            found += [a.wq, a.wk, a.wv, a.wo, f.w_in, f.w_out]
        return found

    return eqx.tree_at(places, model, [jnp.array(x) for x in values])


def our_seq2seq(config, **pieces):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import jaxformers

    w, n, d = task.seq2seq_weights(config), config["layers"], config["d_model"]
    heads, h, v = config["heads"], d // config["heads"], config["vocab"]
    model = jaxformers.Transformer(
        v,
        v,
        d,
        heads,
        n,
        n,
        4 * d,
        max(config["t"], config["source"]),
        dropout_rate=0.0,
        learnable_pos=True,
        norm_first=False,
        final_norm=True,  # as torch.nn.Transformer has
        embedding_scale=1.0,
        key=jax.random.key(0),
        **pieces,
    )
    values = [w["src"], w["tgt"], w["head"], w["src_positions"], w["tgt_positions"]]
    for i in range(n):
        for stack, kinds in {"encoder": ["encoder"], "decoder": ["decoder", "cross"]}.items():
            for kind in kinds:
                q, k, v, out = w[kind][i]
                values += [x.reshape(d, heads, h) for x in (q, k, v)] + [out.reshape(heads, h, d)]
            values += [w[f"{stack}_up"][i], w[f"{stack}_down"][i]]

    def places(m):
        found = [m.src_embedding.token_embedding.weight, m.tgt_embedding.token_embedding.weight]
        found += [m.output.w, m.src_embedding.position.weight, m.tgt_embedding.position.weight]
        for encoder, decoder in zip(m.encoder.layers, m.decoder.layers, strict=True):
            for layer, attentions in (
                (encoder, [encoder.self_attention]),
                (decoder, [decoder.self_attention, decoder.cross_attention]),
            ):
                for a in attentions:
                    found += [a.wq, a.wk, a.wv, a.wo]
                found += [layer.feed_forward.w_in, layer.feed_forward.w_out]
        return found

    rows = max(config["t"], config["source"])
    values[3:5] = [np.pad(x, ((0, rows - len(x)), (0, 0))) for x in values[3:5]]
    return eqx.tree_at(places, model, [jnp.array(x) for x in values])


def plain(config):
    """Builds ours with the plain attention."""
    import jaxformers

    return ours(config, attention_fn=jaxformers.dot_product_attention)


def model_flops(config: dict) -> int:
    """Returns the model's own operations of a step (PaLM, appendix B)."""
    d, n, t = config["d_model"], config["layers"], config["t"]
    parameters = 12 * n * d * d + config["vocab"] * d
    return config["batch"] * t * (6 * parameters + 12 * n * d * t)


def peak_flops(gpu: str | None) -> float | None:
    """Returns the peak in bfloat16 of a card of this name, or None if it is not known."""
    return next((x for name, x in PEAK_FLOPS.items() if name in (gpu or "")), None)


def utilization(gpu: str | None, config: dict, row: dict) -> str:
    """Returns the model's own operations as a share of the GPU's peak."""
    peak = peak_flops(gpu)
    if peak is None or "dtype" not in config:
        return ""
    return f"{model_flops(config) / row['seconds'] / peak:6.1%} of peak FLOP/s"


CONTENDERS = {
    "ours": ours,
    "own loop": own_loop,
    "own loop, gathered": partial(own_loop, gathered=True),
    "plain": plain,
}
if contest.installed("torch"):
    import train_torch

    CONTENDERS |= {"torch": train_torch.eager, "torch.compile": train_torch.compiled}
if contest.installed("flax", "optax"):
    import train_jax

    CONTENDERS |= {"Flax NNX": train_jax.flax_nnx, "Equinox": train_jax.equinox_nn}


def main():
    child = "--child" in sys.argv
    gpu = None if child else contest.found_gpu()
    contest.main(
        __doc__,
        CONTENDERS,
        CONFIGS | (ON_GPU if gpu or child else {}),
        repeats=REPEATS,
        remark=partial(utilization, gpu),
    )


if __name__ == "__main__":
    main()
