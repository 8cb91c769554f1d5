"""The contenders of gpu.py. Each is built in a process of its own.

A contender is a function of a configuration, and returns a function `prepare(setting)`. That
returns steps by name, which are timed, and facts. Each step does the work once and waits for the
device. The facts say how many bytes, operations or tokens a step has, as `bytes`, `flops` and
`tokens`.
"""

import re
import time
from functools import partial

import decode
import long_context
import numpy as np
import train
import train_task as task

IN_FLIGHT = 10  # calls that are enqueued before a step waits, since waiting takes time as well


def card(config):
    """Measures a copy, or a product of two square matrices."""
    import jax
    import jax.numpy as jnp

    def copy(size):
        x = jnp.zeros(size // 4, jnp.float32)
        # XLA removes a plain copy. An addition moves the same bytes.
        add = jax.jit(lambda x: x + 1, donate_argnums=0)

        def step():
            nonlocal x
            for _ in range(IN_FLIGHT):
                x = add(x)
            x.block_until_ready()

        return {"step": step}, {"bytes": 2 * x.nbytes * IN_FLIGHT}

    def product(n, dtype, precision):
        # Random numbers, since a card takes less power and is faster on zeros.
        x, y = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
        multiply = jax.jit(partial(jnp.matmul, precision=precision))

        def step():
            for _ in range(IN_FLIGHT):
                out = multiply(x, y)
            out.block_until_ready()

        return {"step": step}, {"flops": 2 * n**3 * IN_FLIGHT}

    def prepare(setting):
        return copy(setting["size"]) if "size" in setting else product(**setting)

    return prepare


def cudnn(config):
    """Checks that cuDNN's kernels are in compiled programs, and what they compute."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import jaxformers as jf

    def calls_in(program, why):
        """Returns the calls of cuDNN's attention; on a GPU both directions must be there."""
        calls = sorted({*re.findall(r"__cudnn\$fmha\w*", program.as_text())})
        wanted = {False, True} if jax.default_backend() == "gpu" else set()
        if {"Backward" in call for call in calls} != wanted:
            raise RuntimeError(f"cuDNN must run forward and backward, got {calls} ({why}).")
        return calls, ", ".join(calls) or "no call of cuDNN"

    def model_alone(sizes):
        """Compiles the gradient of the loss of a decoder that computes in 16 bits."""
        rows = jnp.asarray(task.decoder_text(sizes))
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        weights, rest = eqx.partition(train.our_decoder(sizes), eqx.is_inexact_array)

        def loss(weights):
            model = jf.cast_floating(eqx.combine(weights, rest), jnp.bfloat16)
            return jf.language_model_loss(model, batch)

        program = jax.jit(jax.grad(loss)).lower(weights).compile()
        calls, told = calls_in(program, "the gradient of a model's loss")
        return {}, {"remark": told, "calls": calls}

    def prepare(setting):
        if "model" in setting:
            return model_alone(setting["model"])
        t, n, g, h = (setting[name] for name in ("t", "heads", "groups", "features"))
        b, mask = setting["batch"], jf.AttentionMask(causal=True, window=setting.get("window"))
        draw = partial(jax.random.normal, dtype=jnp.bfloat16)
        keys = jax.random.split(jax.random.key(t), 4)
        shapes = (b, n, t, h), (b, g, t, h), (b, g, t, h), (b, n, t, h)
        arrays = [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]

        def both(attend, q, k, v, gradient):
            out, pull = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
            return out, *pull(gradient)

        program = jax.jit(partial(both, jf.fast_attention)).lower(*arrays).compile()
        choice = jf.choose_attention(*arrays[:3], mask)
        calls, told = calls_in(program, choice)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(partial(both, jf.dot_product_attention))(
                *(x.astype(jnp.float32) for x in arrays)
            )
        pairs = zip((x.astype(jnp.float32) for x in program(*arrays)), exact, strict=True)
        error = max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)
        if not error < config["tolerance"]:
            raise RuntimeError(f"the attention differs from that in float32 by {error}: {choice}.")
        told = f"{choice}; {told}; error {error:.1e}"
        return {}, {"remark": told, "calls": calls, "why": choice.why, "error": error}

    return prepare


def attention(config, make=long_context.ours):
    """Measures causal attention; its operations are those of the scores that are not hidden."""

    def prepare(setting):
        step, check = make(config | setting)
        t = setting["t"]
        forward = 2 * t * t * long_context.HEADS * long_context.FEATURES
        flops = forward if setting["forward_only"] else forward * 7 // 2
        return {"step": step}, {"flops": flops, "check": check()}

    return prepare


def training(config, make=train.ours):
    def prepare(setting):
        step, check = make(config)
        tokens = config["batch"] * config["t"]
        facts = {"flops": train.model_flops(config), "tokens": tokens, "check": check()}
        return {"step": step}, facts

    return prepare


def torch_training(config):
    import train_torch

    return training(config, train_torch.compiled if config["compiled"] else train_torch.eager)


def decoding(config, bits=None):
    """Measures `generate` of ours, with weights of the model's type or of 8 bits."""
    import jax

    model = random_model(config, bits)
    unread = unread_table(config, "embedding.token_embedding", "embedding.position")
    leaves = jax.tree_util.tree_leaves_with_path(model)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    size = sum(
        x.nbytes
        for name, x in named.items()
        if isinstance(x, jax.Array) and not name.startswith(unread)
    )

    def prepare(setting):
        prompt = jax.numpy.asarray(decode.prompts(config | setting))
        counts = {name: config[name] for name in ("new", "fewer")}

        def step(count):
            model.generate(prompt, count, end_token=[]).block_until_ready()

        steps = {name: partial(step, count) for name, count in counts.items()}
        return steps, decoding_facts(config, setting, size)

    return prepare


def random_model(config, bits=None):
    """Returns a model whose random weights are made on the device in their own type."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import jaxformers as jf

    def build():
        model = jf.cast_floating(decode.our_architecture(config), config["dtype"])
        return model if bits is None else jf.quantize(model, bits=bits)

    @partial(jax.jit, static_argnums=(1, 2))
    def drawn(key, shape, dtype):
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, dtype)
        return 0.02 * jax.random.normal(key, shape, dtype)

    key = jax.random.key(0)

    def fill(path, x):
        nonlocal key
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        name = path[-1].name
        if name == "scale":  # of integers that are uniform up to 127
            return jnp.full(x.shape, 0.02 / 73, x.dtype)
        if name == "integers" or name.startswith("w"):
            key, own = jax.random.split(key)
            return drawn(own, x.shape, x.dtype)
        return jnp.full(x.shape, name == "gain", x.dtype)

    return jax.tree_util.tree_map_with_path(fill, eqx.filter_eval_shape(build))


def unread_table(config, tokens, positions):
    """Returns the table of which a token reads one row: that of tokens, unless it is tied."""
    return tokens if "d_ff" in config else positions


def decoding_facts(config, setting, weights):
    """Returns the bytes that a new token reads: all weights, and the cache at its mean length."""
    batch, length = setting["batch"], decode.PROMPT + (config["new"] + config["fewer"]) / 2
    item = 2 if config["dtype"] == "bfloat16" else 4
    cache = int(2 * config["layers"] * config["d_model"] * item * batch * length)
    counts = {name: config[name] for name in ("new", "fewer")}
    return counts | {
        "bytes": weights + cache,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "tokens": batch,
    }


def hugging_face(config):
    """Measures `generate` of transformers, which compiles the model for a static cache on a GPU.

    The longer run comes first: the shorter one keeps the length of its cache, and its program.
    """
    import torch
    import transformers

    model = decode.hugging_face_model(config)
    unread = unread_table(config, "model.embed_tokens", "transformer.wpe")
    size = sum(x.nbytes for name, x in model.named_parameters() if not name.startswith(unread))
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    options["cache_implementation"] = "static"

    def prepare(setting):
        torch.compiler.reset()  # a second batch size would be compiled for any size
        device = next(model.parameters()).device
        prompt = torch.from_numpy(decode.prompts(config | setting)).long().to(device)

        def step(count):
            settings = transformers.GenerationConfig(max_new_tokens=count, **options)
            out = model.generate(prompt, settings, attention_mask=torch.ones_like(prompt))
            out = out.cpu()  # a transfer waits for the device
            if out.shape[1] != decode.PROMPT + count:
                raise RuntimeError(f"{count} new tokens are due, got {tuple(out.shape)}.")

        steps = {name: partial(step, config[name]) for name in ("new", "fewer")}
        return steps, decoding_facts(config, setting, size)

    return prepare


def shakespeare(config):
    """Trains nanoGPT's model of characters, with its sizes, dropout, schedule and AdamW."""
    import jax

    import jaxformers as jf
    from jaxformers.data import Windows

    with open(config["text"], encoding="utf-8") as file:
        text = file.read()
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([characters[c] for c in text], np.int32)
    split, t, steps = int(0.9 * len(tokens)), config["t"], config["steps"]
    parts = tokens[:split], tokens[split:]
    fitted, held_out = (Windows(x, t, config["batch"], seed=0) for x in parts)

    def prepare(setting):
        model = train.our_decoder(config | {"vocab": len(characters)}, use_bias=False)
        losses: dict[int, float] = {}

        def note(report):
            losses[report.step] = report.metrics["eval_loss"]

        rate = jf.warmup_cosine(1e-3, min(100, steps), steps, 1e-4)
        start = time.perf_counter()
        jf.fit(
            model,
            jf.AdamW(rate, b2=0.99, weight_decay=task.DECAY, max_grad_norm=1.0),
            fitted,
            loss=jf.language_model_loss,
            steps=steps,
            key=jax.random.key(0),
            eval_batches=held_out,
            eval_every=config["eval_every"],
            callbacks=[note],
            progress=False,
            compute_dtype=config["dtype"],
        )
        seconds, best = time.perf_counter() - start, min(losses, key=losses.__getitem__)
        told = (
            f"validation loss {losses[best]:.4f} at step {best} of {steps}, {seconds:.0f} s in all"
        )
        return {}, {"remark": told, "losses": losses, "seconds": seconds, "best": losses[best]}

    return prepare


CONTENDERS = {
    "card": card,
    "cudnn": cudnn,
    "training": training,
    "torch training": torch_training,
    "attention": attention,
    "torch attention": partial(attention, make=long_context.torch_attention),
    "decoding": decoding,
    "decoding, int8": partial(decoding, bits=8),
    "Hugging Face": hugging_face,
    "shakespeare": shakespeare,
}
