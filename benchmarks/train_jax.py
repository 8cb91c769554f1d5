"""The other JAX libraries of train.py, each with a decoder as its own documentation writes it."""

from functools import partial

import train_task as task


def optimizer(matrices):
    """Returns AdamW with decay of `matrices`, a tree of booleans or a function that returns one."""
    import optax

    numbers = dict(b1=task.B1, b2=task.B2, eps=task.EPS, weight_decay=task.DECAY)
    return optax.adamw(task.RATE, **numbers, mask=matrices)


def rows_of(config):
    import jax.numpy as jnp

    rows = jnp.array(task.decoder_text(config))
    return rows[:, :-1], rows[:, 1:]


def flax_nnx(config):
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    d, heads = config["d_model"], config["heads"]
    rngs = nnx.Rngs(0)

    class Block(nnx.Module):
        def __init__(self):
            self.norm_1 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
            self.norm_2 = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(heads, d, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norm_1(x), mask=mask)
            return x + self.down(jax.nn.gelu(self.up(self.norm_2(x)), approximate=True))

    class Decoder(nnx.Module):
        def __init__(self):
            self.tokens = nnx.Embed(config["vocab"], d, rngs=rngs)
            self.positions = nnx.Embed(config["t"], d, rngs=rngs)
            self.blocks = nnx.List([Block() for _ in range(config["layers"])])
            self.norm = nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs)

        def __call__(self, tokens):
            x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
            mask = nnx.make_causal_mask(tokens)
            for block in self.blocks:
                x = block(x, mask)
            return self.tokens.attend(self.norm(x))

    model, w = Decoder(), task.decoder_weights(config)
    model.tokens.embedding[...] = jnp.array(w["tokens"])
    model.positions.embedding[...] = jnp.array(w["positions"])
    for i, block in enumerate(model.blocks):
        maps = jnp.split(jnp.array(w["qkv"][i]), 3, axis=1)
        for part, x in zip(("query", "key", "value"), maps, strict=True):
            getattr(block.attention, part).kernel[...] = x.reshape(d, heads, -1)
        block.attention.out.kernel[...] = jnp.array(w["out"][i]).reshape(heads, -1, d)
        block.up.kernel[...], block.down.kernel[...] = (
            jnp.array(w["up"][i]),
            jnp.array(w["down"][i]),
        )

    def is_matrix(params):
        # Attention has biases of two axes.
        named = jax.tree_util.tree_map_with_path
        return named(lambda path, _: "bias" not in str(path) and "scale" not in str(path), params)

    state = nnx.Optimizer(model, optimizer(is_matrix), wrt=nnx.Param)
    tokens, targets = rows_of(config)

    @partial(nnx.jit, donate_argnums=(0, 1))
    def update(model, state, tokens, targets):
        def loss(model):
            logits = model(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        state.update(model, grads)
        return value

    return task.timed(lambda: update(model, state, tokens, targets).block_until_ready())


def equinox_nn(config):
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    d, heads = config["d_model"], config["heads"]
    key = jax.random.key(0)

    class Block(eqx.Module):
        norm_1: eqx.nn.LayerNorm
        norm_2: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self):
            biases = (f"use_{x}_bias" for x in ("query", "key", "value", "output"))
            self.norm_1, self.norm_2 = eqx.nn.LayerNorm(d), eqx.nn.LayerNorm(d)
            self.attention = eqx.nn.MultiheadAttention(
                heads, d, key=key, **dict.fromkeys(biases, True)
            )
            self.up, self.down = (
                eqx.nn.Linear(*sizes, key=key) for sizes in ((d, 4 * d), (4 * d, d))
            )

        def __call__(self, x, mask):
            y = jax.vmap(self.norm_1)(x)
            x = x + self.attention(y, y, y, mask)
            y = jax.vmap(self.up)(jax.vmap(self.norm_2)(x))
            return x + jax.vmap(self.down)(jax.nn.gelu(y, approximate=True))

    class Decoder(eqx.Module):
        tokens: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        blocks: list[Block]
        norm: eqx.nn.LayerNorm

        def __init__(self):
            self.tokens = eqx.nn.Embedding(config["vocab"], d, key=key)
            self.positions = eqx.nn.Embedding(config["t"], d, key=key)
            self.blocks = [Block() for _ in range(config["layers"])]
            self.norm = eqx.nn.LayerNorm(d)

        def __call__(self, tokens):
            places = jnp.arange(len(tokens))
            x = jax.vmap(self.tokens)(tokens) + jax.vmap(self.positions)(places)
            mask = places[:, None] >= places
            for block in self.blocks:
                x = block(x, mask)
            return jax.vmap(self.norm)(x) @ self.tokens.weight.T

    def filled(block, i):
        q, k, v = jnp.split(jnp.array(w["qkv"][i]), 3, axis=1)
        a = block.attention
        linears = [a.query_proj, a.key_proj, a.value_proj, a.output_proj, block.up, block.down]
        maps = [q, k, v, *(jnp.array(w[name][i]) for name in ("out", "up", "down"))]
        new = [
            eqx.tree_at(lambda x: (x.weight, x.bias), old, (x.T, jnp.zeros(x.shape[1])))
            for old, x in zip(linears, maps, strict=True)
        ]
        return eqx.tree_at(
            lambda b: [
                b.attention.query_proj,
                b.attention.key_proj,
                b.attention.value_proj,
                b.attention.output_proj,
                b.up,
                b.down,
            ],
            block,
            new,
        )

    model, w = Decoder(), task.decoder_weights(config)
    blocks = [filled(block, i) for i, block in enumerate(model.blocks)]
    tables = jnp.array(w["tokens"]), jnp.array(w["positions"])
    model = eqx.tree_at(
        lambda m: (m.blocks, m.tokens.weight, m.positions.weight), model, (blocks, *tables)
    )
    adamw = optimizer(lambda params: jax.tree.map(lambda x: x.ndim >= 2, params))
    state = adamw.init(eqx.filter(model, eqx.is_inexact_array))
    tokens, targets = rows_of(config)

    @eqx.filter_jit(donate="all-except-first")
    def update(batch, model, state):
        tokens, targets = batch

        def loss(model):
            logits = jax.vmap(model)(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = adamw.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    def step():
        nonlocal model, state
        model, state, value = update((tokens, targets), model, state)
        return value.block_until_ready()

    return task.timed(step)
