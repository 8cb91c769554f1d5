"""Steps of training beside the peers, on one machine in one run.

    python benchmarks/train.py [a b c ...] [--contenders ours torch ...] [--json FILE]

A step is forward, backward and AdamW, without dropout, from the same weights on the same batch; the
losses of the first four steps must agree. a, b and c are decoders of nanoGPT's shape (pre-norm,
learned positions, tied table, GELU by tanh), `seq2seq` the paper's encoder-decoder made smaller.
Contenders whose packages are not installed are left out.
"""

import math
from functools import partial

import contest
import numpy as np

CONFIGS = {
    "a": dict(vocab=65, d_model=128, layers=4, heads=4, t=64, batch=12),
    "b": dict(vocab=65, d_model=384, layers=6, heads=6, t=256, batch=8),
    "c": dict(vocab=50304, d_model=768, layers=12, heads=12, t=256, batch=1),
    "seq2seq": dict(vocab=1000, d_model=256, layers=4, heads=8, t=64, batch=32, source=64),
}
REPEATS = {"a": 20}
RATE, B1, B2, EPS, DECAY = 3e-4, 0.9, 0.95, 1e-8, 0.1


def weights(config: dict) -> dict[str, np.ndarray]:
    """The arrays of a nanoGPT-shaped decoder by name, layers stacked: the same for all."""
    rng = np.random.default_rng(0)
    v, d, n, t = config["vocab"], config["d_model"], config["layers"], config["t"]

    def normal(*shape, scale=0.02):
        return rng.normal(0, scale, shape).astype(np.float32)

    residual = 0.02 / math.sqrt(2 * n)
    return {
        "tokens": normal(v, d),
        "positions": normal(t, d),
        "qkv": normal(n, d, 3 * d),
        "out": normal(n, d, d, scale=residual),
        "up": normal(n, d, 4 * d),
        "down": normal(n, 4 * d, d, scale=residual),
    }


def text(config: dict) -> np.ndarray:
    shape = config["batch"], config["t"] + 1
    return np.random.default_rng(1).integers(0, config["vocab"], shape)


def check_losses(step, count: int = 4):
    return lambda: [float(step()) for _ in range(count)]


def ours(config, attention_fn=None):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import jaxformers

    if "source" in config:
        return ours_seq2seq(config)
    w, n, d = weights(config), config["layers"], config["d_model"]
    heads, h = config["heads"], d // config["heads"]
    model = jaxformers.TransformerLM(
        config["vocab"],
        d,
        heads,
        n,
        4 * d,
        config["t"],
        dropout_rate=0.0,
        learnable_pos=True,
        tie_embeddings=True,
        embedding_scale=1.0,
        feed_forward=partial(jaxformers.FeedForward, activation=jaxformers.activations.gelu_tanh),
        key=jax.random.key(0),
        **({} if attention_fn is None else {"attention_fn": attention_fn}),
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

    model = eqx.tree_at(places, model, [jnp.array(x) for x in values])
    rows = text(config)
    batch = {"tokens": jnp.array(rows[:, :-1]), "targets": jnp.array(rows[:, 1:])}
    return our_step(model, batch, jaxformers.language_model_loss)


def our_step(model, batch, loss):
    import jax

    import jaxformers

    optimizer = jaxformers.AdamW(RATE, B1, B2, EPS, DECAY)
    state, key = optimizer.init(model), jax.random.key(0)

    def step():
        nonlocal model, state
        model, state, value = jaxformers.train_step(
            model, state, batch, optimizer=optimizer, loss=loss, key=key
        )
        return value.block_until_ready()

    return step, check_losses(step)


def plain(config):
    """Ours with the plain attention."""
    import jaxformers

    return ours(config, jaxformers.dot_product_attention)


def torch_model(config):
    """nanoGPT's decoder, written for this comparison."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    d, heads, t = config["d_model"], config["heads"], config["t"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            b, t, _ = x.shape
            qkv = self.qkv(self.norm_1(x)).view(b, t, 3, heads, d // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(config["vocab"], d), nn.Embedding(t, d)
            self.blocks = nn.ModuleList(Block() for _ in range(config["layers"]))
            self.norm = nn.LayerNorm(d)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.tokens.weight.T
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model, w = Decoder(), weights(config)
    with torch.no_grad():
        model.tokens.weight.copy_(torch.from_numpy(w["tokens"]))
        model.positions.weight.copy_(torch.from_numpy(w["positions"]))
        for i, block in enumerate(model.blocks):
            for name in ("qkv", "out", "up", "down"):
                layer = getattr(block, name)
                layer.weight.copy_(torch.from_numpy(w[name][i].T))
                layer.bias.zero_()
    return model


def torch_eager(config, compiled=False):
    import torch

    if "source" in config:
        return torch_seq2seq(config)
    model = torch_model(config)
    rows = torch.from_numpy(text(config))
    return torch_step(model, (rows[:, :-1].contiguous(), rows[:, 1:].contiguous()), compiled)


def torch_step(model, batch, compiled):
    import torch

    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), eps=EPS, fused=True)
    forward = torch.compile(model) if compiled else model

    def step():
        loss = forward(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, check_losses(step)


def torch_compile(config):
    return torch_eager(config, compiled=True)


CONTENDERS = {"ours": ours, "plain": plain}
if contest.installed("torch"):
    CONTENDERS |= {"torch": torch_eager, "torch.compile": torch_compile}

if __name__ == "__main__":
    contest.main(__doc__, CONTENDERS, CONFIGS, repeats=REPEATS)
